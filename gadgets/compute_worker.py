"""What runs inside a Dask worker: one slice at a time, its words kept until the server asks, and an end to what takes too long.

The worker needs no file of the server's: readouts come with the task, words and previews go back with `news`. Nothing here is called by
peers of the reconstruction server; who may reach the Dask scheduler may run any code on its workers (docs/operations.md).
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import platform
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distributed import WorkerPlugin

from gadgets import __version__, process_memory
from gadgets.compute_local import WORKER_NICENESS, log_python_warnings, places, prepare_process
from gadgets.device_errors import device_failure
from gadgets.errors import SchedulerError
from gadgets.scratch import SCRATCH_PREFIX

GRACE = 30.0
"""s after a task's limit at which the process ends by itself, when the server's word has not done it."""

DOOMED_SECONDS = 30.0
"""s that a process whose GPU failed waits for the server to end it; then it does so itself. Its last result has to be fetched before."""

Words = Mapping[str, bytes]
"""Contents of report files by name, as `gadgets.reports.FileReport` writes them."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended: its result or its error (and where in the code it was), its last words, and who did it (``host:process``)."""

    result: Any
    error: BaseException | None
    places: str
    words: Words
    by: str


@dataclass(frozen=True)
class News:
    """What a running task has said since the last look, and for how long it has been running, s."""

    seconds: float
    words: Words


@dataclass(frozen=True)
class _Running:
    folder: Path
    since: float


_lock = threading.Lock()
_running: dict[str, _Running] = {}
_doomed: set[str] = set()  # tasks at which this process's GPU failed: no later one can use it
_yields = False  # a plugin may be set up again in the same process


def run_packed(key: str, function: Callable[[Any], Any], job: Any, seconds: float | None) -> Outcome:
    """Call ``function`` with a job that brings its data along; it reports into a folder of this machine.

    ``seconds`` bounds the time, also of code that never gives way to the worker's other threads: the process ends then. Once a GPU has
    failed here, nothing is begun any more: the process is ended, and the scheduler gives its tasks to others.
    """
    if _doomed:
        time.sleep(DOOMED_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)
    folder = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
    with _lock:
        _running[key] = _Running(folder, time.monotonic())
    try:
        with _last_resort(seconds):
            result, error, where = function(replace(job, report_folder=str(folder))), None, ""
    except Exception as raised:
        result, error, where = None, raised, places(raised)
        if device_failure(raised) is not None:
            _doomed.add(key)
    finally:
        with _lock:
            _running.pop(key, None)
        words = {} if not folder.is_dir() else _words(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return Outcome(result, error, where, words, f"{platform.node()}:{os.getpid()}")


@contextlib.contextmanager
def _last_resort(seconds: float | None) -> Any:
    if seconds is None:
        yield
        return
    with open(os.devnull, "w") as nowhere:
        # a thread of the interpreter's own that needs no lock; where several tasks run in one process the last one's time counts
        faulthandler.dump_traceback_later(max(1.0, seconds) + GRACE, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def news(abandoned: Collection[str]) -> dict[str, News]:
    """Words of every running task since the last call; those of scans that were given up lose their folder, and end by that."""
    with _lock:
        running = dict(_running)
    found = {}
    for key, entry in running.items():
        if key in abandoned:
            shutil.rmtree(entry.folder, ignore_errors=True)
        else:
            found[key] = News(time.monotonic() - entry.since, _words(entry.folder))
    return found


def end(key: str) -> bool:
    """End this process, if it is the one that runs the task or lost its GPU at it; whoever started the worker starts another one."""
    with _lock:
        here = key in _running or key in _doomed
    if here:  # after the answer has left
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return here


def _words(folder: Path) -> dict[str, bytes]:
    """Read and remove what a task has written; files that it is writing have another ending."""
    found = {}
    for path in sorted(folder.glob("*")):
        if path.suffix == ".part":
            continue
        with contextlib.suppress(OSError):
            found[path.name] = path.read_bytes()
            path.unlink()
    return found


def versions() -> dict[str, str]:
    """What has to be equal on the server and its workers: code is sent by name, and results have to be the same bits."""
    import numpy as np
    import torch

    return {
        "recon-gadgets": __version__,
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__.partition("+")[0],
        "numpy": np.__version__,
    }


def _not_a_look(record: logging.LogRecord) -> bool:
    """Two lines a second about our own questions would be all that is in a worker's log."""
    return "out-of-band" not in record.msg


class Prepare(WorkerPlugin):
    """Makes a Dask worker one of this server's: same versions, imports done, threads bounded, every method run once.

    Raises
    ------
    SchedulerError
        In the worker, which does not start then: it has other versions.
    """

    name = "recon-gadgets"

    def __init__(self, expected: Mapping[str, str], threads: int, *, rehearse: bool = True) -> None:
        self.expected, self.threads, self.rehearse = dict(expected), threads, rehearse

    def setup(self, worker: Any) -> None:
        found = versions()
        wrong = [name for name, version in self.expected.items() if found.get(name) != version]
        if wrong:
            raise SchedulerError(
                "a Dask worker has other versions than the server",
                where="scheduler",
                got=", ".join(f"{name} {found.get(name)}" for name in wrong),
                expected=", ".join(f"{name} {self.expected[name]}" for name in wrong),
                remedy="Install the same lock file on all machines",
            )
        log_python_warnings()
        process_memory.keep_freed_memory()
        logging.getLogger("distributed.worker").addFilter(_not_a_look)
        prepare_process(self.threads, rehearse=self.rehearse)
        global _yields
        with contextlib.suppress(OSError):
            os.nice(0 if _yields else WORKER_NICENESS)
        _yields = True
