"""What a process that runs for months does about its own memory. For commands: all of it is the whole process's.

Python gives memory back to the C library, and that one keeps most of it: glibc has up to eight areas ("arenas") for each core, threads
take theirs as they come, and an area shrinks only from its end. A server with a thread for each connection so grows for hours without
any leak. Where the C library is another one, or the system no Linux, nothing is done.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)

TIDY_SECONDS = 60.0

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # malloc.h
ARENAS = 2
"""One is enough where Python's lock lets one thread run at a time; a second for what computes or copies without the lock."""


LARGE_BYTES = 1 << 20
"""Pieces of this size come from the system and go back to it at once. By itself glibc raises this limit to the largest piece ever freed
(32 MiB at most), and then puts buffers of 4 MiB into the areas, with small things on top that keep their place for ever."""


def bound_allocator() -> bool:
    """Let all threads share few areas, for small things only. To be called before threads are begun; whether glibc was told."""
    tell = _of_glibc("mallopt", ctypes.c_int, ctypes.c_int)
    return tell is not None and tell(M_ARENA_MAX, ARENAS) == 1 and tell(M_MMAP_THRESHOLD, LARGE_BYTES) == 1


KEPT_BYTES = 32 << 20
"""The largest value that glibc takes as M_MMAP_THRESHOLD, and where its own adaptation ends."""


def keep_freed_memory() -> bool:
    """For a process that computes: what it frees it will need again at once. Whether glibc was told.

    This is what glibc does by itself, unless somebody has set one of its thresholds: Dask starts its workers with
    ``MALLOC_TRIM_THRESHOLD_=65536``, and then every array of 128 KiB or more comes from the system as fresh pages and goes back to it.
    """
    tell = _of_glibc("mallopt", ctypes.c_int, ctypes.c_int)
    return tell is not None and tell(M_MMAP_THRESHOLD, KEPT_BYTES) == 1 and tell(M_TRIM_THRESHOLD, 2 * KEPT_BYTES) == 1


def settle() -> None:
    """When everything is imported and running: what exists now stays, and is not looked at again for circles to break.

    The collector takes a full look when a quarter of what it looks at is new. With the 200,000 objects of torch in the account this takes
    hundreds of scans, and the look half a second, in which nothing is read; without them it comes often and costs milliseconds.
    """
    gc.collect()
    gc.freeze()


@contextmanager
def importing() -> Iterator[None]:
    """Where heavy libraries are imported: nothing of theirs is garbage, and it is looked for again and again (0.2 s of torch's 1.3)."""
    looks = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if looks:
            gc.enable()


def end_at_once() -> None:
    """When this process ends, it does not look for circles among all that it imported (0.5 s with torch): all memory is freed anyhow."""
    atexit.register(gc.freeze)


def tidy() -> None:
    """Free what nobody refers to, and give the system back what is free."""
    gc.collect()
    trim = _of_glibc("malloc_trim", ctypes.c_size_t)
    if trim is not None:
        trim(0)


def tidy_until(stop: threading.Event, seconds: float = TIDY_SECONDS) -> None:
    """Wait for ``stop``, and `tidy` meanwhile."""
    while not stop.wait(seconds):
        tidy()


def _of_glibc(name: str, *arguments: Any) -> Callable[..., int] | None:
    """A function of glibc that returns an int; ``None`` elsewhere."""
    try:
        library = ctypes.CDLL(None)
        if not hasattr(library, "gnu_get_libc_version"):
            return None
        found = getattr(library, name)
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes, found.restype = arguments, ctypes.c_int
    return found
