"""Where computing happens: worker processes behind ``concurrent.futures``, and the shared scratch space between them.

The connection's thread only reads. Everything that computes is a pure function on files (raw log in, rows or results out), so a
task whose worker died can simply be run again.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import tempfile
import threading
import time
import traceback
import uuid
import warnings
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TextIO, TypeVar

import numpy as np

from gadgets.errors import JobFailed
from recon_core.errors import ReconError
from recon_core.types import ImageSeries, Report

log = logging.getLogger(__name__)
T = TypeVar("T")

SCRATCH_PREFIX = "recon-gadgets-"
WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
"""Threads that wait must sleep, not spin: the reader, other workers and the client share these cores. numpy's and scipy's BLAS only
gets small problems here, and its threads spin for longer than those take; torch has its own."""

WORKER_NICENESS = 10
"""Computing yields to reading: where cores are short, the scanner's readouts come first. An idle machine does not notice."""

MIN_SHARED_BYTES = 1 << 30
"""With less room than this in shared memory (64 MiB in a container by default), scratch files go to the temporary directory."""


class Jobs:
    """Executes tasks: in this process (tests, ``recon run``) or in warm local worker processes (the server).

    Parameters
    ----------
    workers
        Number of worker processes; 0 computes in a thread of this process.
    threads
        Compute threads per worker; ``None`` shares the machine's cores among the workers.
    """

    def __init__(self, workers: int = 0, *, threads: int | None = None) -> None:
        self.workers = workers
        self.threads = threads or max(1, (os.cpu_count() or 1) // max(workers, 1))
        self._lock = threading.Lock()
        self._one_retry = threading.Lock()
        self._executor: Executor | None = None
        self._closed = False

    def warm(self) -> None:
        """Start every worker now, so that the first scan does not wait for imports."""
        if self.workers:
            gate = [self.submit(_hello, 0.2) for _ in range(self.workers)]
            pids = {future.result() for future in gate}
            log.info("event=workers_ready workers=%d processes=%d threads=%d", self.workers, len(pids), self.threads)
        else:
            _warm(self.threads)

    def submit(self, task: Callable[..., T], *args: Any) -> Future[T]:
        """Run ``task(*args)`` on a worker; its future answers even when the worker process dies (one retry)."""
        return self.scope().submit(task, *args)

    def scope(self) -> Scope:
        """Tasks that can be given up together: those of one scan."""
        return Scope(self)

    def close(self) -> None:
        """Stop the workers; running tasks are not waited for."""
        with self._lock:
            executor, self._executor = self._executor, None
            self._closed = True
        if executor is not None:
            _shutdown(executor)

    def _start(
        self, scope: Scope, outer: Future[T], task: Callable[..., T], args: tuple[Any, ...], attempts_left: int
    ) -> None:
        if scope.abandoned:
            outer.set_exception(given_up(task.__name__))
            return
        executor: Executor | None = None
        try:
            executor = self._get()
            inner = executor.submit(task, *args)
        except Exception as error:
            self._retry(scope, outer, task, args, attempts_left, error, executor)
            return

        def done(finished: Future[T]) -> None:
            scope.forget(finished)
            if finished.cancelled():
                outer.set_exception(given_up(task.__name__))
                return
            error = finished.exception()
            if error is None:
                outer.set_result(finished.result())
            elif _is_dead_worker(error):
                self._retry(scope, outer, task, args, attempts_left, error, executor)
            else:
                # the files of an abandoned scan are gone: what its tasks say about that is no news
                if not isinstance(error, ReconError) and not scope.abandoned:
                    # neither words nor values: they may quote the scan. The places are enough to find it
                    name, kind = task.__name__, type(error).__name__
                    log.error("event=task_crashed task=%s error=%s at=%s", name, kind, _places(error))
                outer.set_exception(out_of_memory(error) or error)

        scope.remember(inner)
        inner.add_done_callback(done)

    def _retry(
        self,
        scope: Scope,
        outer: Future[T],
        task: Callable[..., T],
        args: tuple[Any, ...],
        left: int,
        error: BaseException,
        dead: Executor | None,
    ) -> None:
        with self._lock:
            if self._executor is dead:
                self._executor = None
            closed = self._closed
        if closed:
            outer.set_exception(JobFailed("the server is stopping", where=task.__name__))
            return
        if scope.abandoned:
            outer.set_exception(given_up(task.__name__))
            return
        if left <= 0:
            words = "a worker process died twice"
            remedy = "The system ends processes when the machine's memory is used up"
            outer.set_exception(JobFailed(words, where=task.__name__, got=type(error).__name__, remedy=remedy))
            return
        log.warning("event=worker_died task=%s error=%s action=retry", task.__name__, type(error).__name__)

        def again() -> None:
            # one at a time: the task that killed the worker must not take the retries of innocent ones with it
            with self._one_retry:
                self._start(scope, outer, task, args, left - 1)
                wait([outer])

        # a fresh thread: callbacks run in the dead executor's own management thread, which must not start another one
        threading.Thread(target=again, name="retry", daemon=True).start()

    def _get(self) -> Executor:
        with self._lock:
            if self._closed:
                raise JobFailed("the server is stopping", where="workers")
            if self._executor is None:
                self._executor = self._make()
            return self._executor

    def _make(self) -> Executor:
        if self.workers == 0:
            return ThreadPoolExecutor(1, thread_name_prefix="compute")
        from loky import ProcessPoolExecutor

        return ProcessPoolExecutor(
            self.workers, timeout=None, initializer=_start_worker, initargs=(self.threads,), env=WORKER_ENVIRONMENT
        )


class Scope:
    """The tasks of one scan. ``submit`` as in `Jobs`; ``abandon`` drops those that wait and silences those that run.

    A running task ends by itself, at the latest when its report finds that the scan's folder is gone (`FileReport`).
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._lock = threading.Lock()
        self._open: set[Future[Any]] = set()
        self.abandoned = False

    def submit(self, task: Callable[..., T], *args: Any) -> Future[T]:
        """Run ``task(*args)`` on a worker, unless the scan has been abandoned: then the future holds a ``JobFailed``."""
        outer: Future[T] = Future()
        self._jobs._start(self, outer, task, args, attempts_left=1)
        return outer

    def abandon(self) -> None:
        """Give up every task that is not done; later ones are not begun."""
        with self._lock:
            self.abandoned = True
            left = list(self._open)
        for future in left:
            future.cancel()

    def remember(self, future: Future[Any]) -> None:
        with self._lock:
            self._open.add(future)
            late = self.abandoned
        if late:
            future.cancel()

    def forget(self, future: Future[Any]) -> None:
        with self._lock:
            self._open.discard(future)


def given_up(task: str) -> JobFailed:
    return JobFailed("the scan was given up", where=task)


_ALLOCATORS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
)
"""How torch, cuFFT and cuBLAS say that they got no memory; all of them raise a plain ``RuntimeError`` on some path."""

_AMOUNT = re.compile(r"(?:tried to allocate|unable to allocate) ([\d.]+) ?(bytes|[KMGTP]i?B)", re.IGNORECASE)


def out_of_memory(error: BaseException) -> JobFailed | None:
    """What to tell the operator of a failed allocation; ``None`` for any other error.

    Only the amount is quoted from the library's words: the rest of them is about processes, devices and shapes.
    """
    words, kind = str(error), type(error).__name__  # torch is not imported here
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    if isinstance(error, RuntimeError) and kind != "OutOfMemoryError" and not any(mark in words for mark in _ALLOCATORS):
        return None
    on_gpu = kind == "OutOfMemoryError" or any(library in words for library in ("CUDA", "CUFFT", "CUBLAS"))
    amount = _AMOUNT.search(words)
    where = "the GPU" if on_gpu else "this machine"
    asked = "" if amount is None else f": {_readable(amount[1], amount[2])} more were asked for"
    return JobFailed(f"out of memory on {where}{asked}", remedy="Use fewer virtual coils or a chain that needs less")


def _readable(number: str, unit: str) -> str:
    if unit.lower() != "bytes":
        return f"{number} {unit}"
    size = float(number)
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"


def _places(error: BaseException) -> str:
    """Where a task failed, innermost last: ``file:line>file:line``; in the worker's process when it was one."""
    lines = str(error.__cause__) if error.__cause__ is not None else "".join(traceback.format_tb(error.__traceback__))
    found = re.findall(r'File "([^"]+)", line (\d+)', lines)
    return ">".join(f"{Path(file).name}:{line}" for file, line in found[-8:])


def _is_dead_worker(error: BaseException) -> bool:
    from concurrent.futures.process import BrokenProcessPool

    return isinstance(error, BrokenProcessPool) or type(error).__name__ in ("TerminatedWorkerError", "ShutdownExecutorError")


def _shutdown(executor: Executor) -> None:
    try:
        executor.shutdown(wait=True, kill_workers=True)  # type: ignore[call-arg]  # loky's extension
    except TypeError:
        executor.shutdown(wait=True, cancel_futures=True)


def log_python_warnings() -> None:
    """Warnings of libraries as one log line each; by default they are two lines on stderr, outside the log."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        place = f"{Path(filename).name}:{lineno}"
        log.warning("event=library_warning kind=%s at=%s text=%r", category.__name__, place, str(message))

    warnings.showwarning = show


def _start_worker(threads: int) -> None:
    log_python_warnings()
    with contextlib.suppress(OSError):
        os.nice(WORKER_NICENESS)
    threading.Thread(target=_end_with, args=(os.getppid(),), name="parent", daemon=True).start()
    _warm(threads)


def _end_with(parent: int) -> None:
    """A server that is killed cannot stop its workers: they have to notice, or they would keep their memory for ever."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _warm(threads: int) -> None:
    """What a worker does once: import the heavy libraries, bound its threads, touch the code paths of a first scan."""
    import torch

    torch.set_num_threads(threads)
    from gadgets import tasks

    tasks.rehearse()


def _hello(seconds: float) -> int:
    time.sleep(seconds)  # long enough that every worker of the pool takes one of these
    return os.getpid()


class Scratch:
    """A scan's files between processes: prepared readouts, progress, previews. Memory-backed where there is room.

    The directory's name carries the process id, so that a later start can remove what a killed server left behind.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-", dir=_scratch_root()))
        self._overflow: Path | None = None

    def allocate(self, n_bytes: int) -> Path:
        """A new file with ``n_bytes`` really reserved; falls from shared memory to disk when memory is short."""
        path = self.path / uuid.uuid4().hex
        try:
            _reserve(path, n_bytes)
        except OSError as error:
            path.unlink(missing_ok=True)
            if self._overflow is None:
                self._overflow = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
                log.warning("event=scratch_overflow bytes=%d error=%s", n_bytes, error.strerror)
            path = self._overflow / path.name
            _reserve(path, n_bytes)
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


class FileReport(Report):
    """A method's report, written to files so that it crosses the process border without locks or pickles.

    Raises
    ------
    JobFailed
        From ``progress``, when the folder is gone: the scan was given up, and so is the task.
    """

    def __init__(self, folder: Path, tag: str) -> None:
        self.folder, self.tag = folder, tag
        self._last = 0.0
        self._warnings = 0
        self._previews = 0

    def progress(self, fraction: float, message: str = "") -> None:
        now = time.monotonic()
        if fraction < 1.0 and now - self._last < 0.1:
            return
        self._last = now
        self._write(f"{self.tag}.progress", json.dumps([float(fraction), message]).encode())

    def warn(self, message: str) -> None:
        self._warnings += 1
        self._write(f"{self.tag}.warning-{self._warnings:04d}", message.encode())

    def preview(self, series: ImageSeries) -> None:
        self._previews += 1
        content = io.BytesIO()
        np.savez(content, name=series.name, comment=series.comment, data=series.data.detach().cpu().numpy())
        self._write(f"{self.tag}.preview-{self._previews:04d}", content.getbuffer())

    def _write(self, name: str, data: bytes | memoryview) -> None:
        path = self.folder / name
        part = path.with_name(path.name + ".part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except OSError:  # a report must never fail a reconstruction, nor fill memory that is short already
            with contextlib.suppress(OSError):
                part.unlink()
        if not self.folder.is_dir():
            raise given_up(self.tag)


class ReportReader:
    """The server's side of ``FileReport``: news since the last look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: set[str] = set()

    def fractions(self) -> dict[str, float]:
        """Progress of each task by its tag."""
        found: dict[str, float] = {}
        for path in self.folder.glob("*.progress"):
            with contextlib.suppress(OSError, ValueError):
                found[path.stem] = float(json.loads(path.read_bytes())[0])
        return found

    def warnings(self) -> list[str]:
        """Warnings not read yet, in order."""
        return [path.read_text(encoding="utf-8") for path in self._new("*.warning-????")]

    def previews(self) -> list[tuple[str, ImageSeries]]:
        """Previews not read yet: task's tag and series. Their files are removed: they may be large."""
        import torch

        found = []
        for path in self._new("*.preview-????"):
            try:
                with np.load(path, allow_pickle=False) as file:
                    series = ImageSeries(str(file["name"]), torch.from_numpy(file["data"]), str(file["comment"]))
            except Exception as error:  # numpy and zipfile raise many kinds; the final images do not need this one
                log.warning("event=preview_unreadable file=%s error=%s", path.name, type(error).__name__)
            else:
                found.append((path.name.partition(".")[0], series))
            path.unlink(missing_ok=True)
        return found

    def _new(self, pattern: str) -> list[Path]:
        fresh = sorted(p for p in self.folder.glob(pattern) if p.name not in self._seen)
        self._seen.update(p.name for p in fresh)
        return fresh
