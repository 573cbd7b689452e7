"""The shared space between a scan's processes: prepared readouts, progress, previews, in memory-backed files where there is room."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import tempfile
import uuid
from pathlib import Path

from gadgets.errors import SpoolError
from gadgets.storage_room import is_in_memory, memory_room

log = logging.getLogger(__name__)

SCRATCH_PREFIX = "recon-gadgets-"

MIN_SHARED_BYTES = 1 << 30
"""With less room than this in shared memory (64 MiB in a container by default), scratch files go to the temporary directory."""


LOOK_BYTES = 64 << 20
"""Memory taken between two looks at how much is left: they cost the thread that reads its time."""


class Scratch:
    """A scan's files between processes: prepared readouts, progress, previews. Memory-backed where there is room.

    The directory's name carries the process id, so that a later start can remove what a killed server left behind.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-", dir=_scratch_root()))
        self._in_memory = is_in_memory(self.path)
        self._granted = 0  # bytes that may be taken before the next look at the memory
        self._overflow: Path | None = None

    def allocate(self, n_bytes: int) -> Path:
        """A new file with ``n_bytes`` really reserved; on disk where memory would become short.

        Raises
        ------
        SpoolError
            Neither has room.
        """
        path = self.path / uuid.uuid4().hex
        try:
            if self._in_memory:
                self._ask_for_memory(n_bytes)
            _reserve(path, n_bytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            path = self._on_disk(path.name, n_bytes, error.strerror)
        return path

    def _ask_for_memory(self, n_bytes: int) -> None:
        """The file system itself would give what programs need."""
        if self._granted < n_bytes:
            left = memory_room()
            if left < n_bytes:
                raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
            self._granted = max(n_bytes, min(left, LOOK_BYTES))
        self._granted -= n_bytes

    def _on_disk(self, name: str, n_bytes: int, why: str | None) -> Path:
        path: Path | None = None
        try:
            if self._overflow is None:
                self._overflow = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
                log.warning("event=scratch_overflow bytes=%d error=%s", n_bytes, why)
            path = self._overflow / name
            _reserve(path, n_bytes)
        except OSError as error:
            if path is not None:
                path.unlink(missing_ok=True)
            raise SpoolError(
                "no room for prepared readouts", where="temporary storage", got=f"{why}; {error.strerror}",
                expected=f"{n_bytes >> 20} MiB more", remedy="Free memory, or disk space where TMPDIR points to",
            ) from None  # fmt: skip
        return path

    def close(self) -> None:
        """Remove every file of this scan."""
        for folder in (self.path, self._overflow):
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)


def _reserve(path: Path, n_bytes: int) -> None:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        if n_bytes:
            os.posix_fallocate(handle, 0, n_bytes)
    finally:
        os.close(handle)


def _scratch_root() -> str | None:
    shared = Path("/dev/shm")
    with contextlib.suppress(OSError):
        if os.access(shared, os.W_OK) and shutil.disk_usage(shared).free >= MIN_SHARED_BYTES:
            return str(shared)
    return None


def remove_stale_scratch() -> int:
    """Delete scratch directories whose process no longer exists; returns how many."""
    removed = 0
    for root in {Path("/dev/shm"), Path(tempfile.gettempdir())}:
        for folder in root.glob(f"{SCRATCH_PREFIX}*-*"):
            owner = folder.name.removeprefix(SCRATCH_PREFIX).partition("-")[0]
            if owner.isdigit() and not Path(f"/proc/{owner}").exists() and Path("/proc/self").exists():
                shutil.rmtree(folder, ignore_errors=True)
                removed += 1
    return removed
