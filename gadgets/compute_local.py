"""Workers on this machine: warm `loky` processes, one executor each, or a thread of this process.

An executor per worker, because a pool whose process dies fails every task that it has: with one process each, the death of a worker
concerns the one task that it was computing, and a worker can be ended without disturbing the others.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import threading
import traceback
import warnings
from collections.abc import Mapping
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

from gadgets import process_memory
from gadgets.compute_pool import Events, Task
from gadgets.device_errors import device_failure
from gadgets.errors import JobFailed
from gadgets.orphans import end_with
from gadgets.storage_room import memory_in_all
from gadgets.worker_pipes import guard

log = logging.getLogger(__name__)

GROWTH_SHARE = 0.5
"""Part of the machine's memory that all workers together may gain over their first task before they are replaced by fresh ones."""

LEAST_GROWTH = 1 << 30
"""Bytes that a worker may gain in any case: what the allocator keeps for the next scan is no leak."""

WORKER_NICENESS = 10
"""Computing yields to reading: where cores are short, the scanner's readouts come first. An idle machine does not notice."""

WORKER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
"""Threads that wait must sleep, not spin: the reader, other workers and the client share these cores. numpy's and scipy's BLAS only
gets small problems here, and its threads spin for longer than those take; torch has its own. A file in the folder in which somebody
typed a command, ``json.py`` say, is no module of ours: Python would import it in every process that is started there."""

MOST_FAILED_STARTS = 8


@dataclass(eq=False)
class _Slot:
    """One worker process: not there, starting, waiting for a task, or computing one."""

    number: int
    state: Literal["cold", "warming", "idle", "busy"] = "cold"
    executor: Executor | None = None
    task: Task | None = None
    rehearse: bool = True


class LocalPool:
    """Worker processes on this machine.

    Parameters
    ----------
    workers, threads
        Processes, and compute threads of each.
    events
        Hears what becomes of the tasks.
    devices
        CUDA devices to share among the workers; each worker sees one of them when there are several.
    rehearse
        Whether the first process of each worker runs every method once; one that replaces it does not, since tasks wait for it.
    """

    def __init__(self, workers: int, threads: int, events: Events, *, devices: int = 0, rehearse: bool = True) -> None:
        self.capacity, self._threads, self._events, self._devices = workers, threads, events, devices
        self._changed = threading.Condition()
        self._slots = [_Slot(number, rehearse=rehearse) for number in range(workers)]
        self._failed_starts = 0
        self._why: BaseException | None = None
        self._closed = False

    def free(self) -> bool:
        with self._changed:
            return any(slot.state == "idle" for slot in self._slots)

    @property
    def unable(self) -> JobFailed | None:
        """Why no worker can be started, after several attempts in a row."""
        with self._changed:
            if self._failed_starts < MOST_FAILED_STARTS:
                return None
            self._failed_starts = 0  # the next task may try again
            kind = type(self._why).__name__
        return JobFailed("no worker process can be started", where="workers", got=kind, remedy="See the log of the server")

    @property
    def missing(self) -> bool:
        """Whether a worker is neither there nor starting."""
        with self._changed:
            return not self._closed and any(slot.state == "cold" for slot in self._slots)

    def grow(self) -> None:
        while True:
            with self._changed:
                slot = next((s for s in self._slots if s.state == "cold"), None)
                if slot is None or self._closed or self._failed_starts >= MOST_FAILED_STARTS:
                    return
                slot.state = "warming"
            self._begin(slot)

    def warm(self) -> None:
        """Start every worker and wait until all imports are done.

        Raises
        ------
        JobFailed
            They die at once.
        """
        while True:
            self.grow()
            with self._changed:
                states = [slot.state for slot in self._slots]
                if self._closed or all(state in ("idle", "busy") for state in states):
                    break
                if "cold" not in states:
                    self._changed.wait(1.0)
                    continue
            broken = self.unable
            if broken is not None:
                raise broken
        log.info("event=workers_ready workers=%d threads=%d", self.capacity, self._threads)

    def start(self, task: Task) -> None:
        with self._changed:
            slot = next(s for s in self._slots if s.state == "idle")
            slot.state, slot.task, executor = "busy", task, slot.executor
        assert executor is not None
        self._events.began(task)
        try:
            inner = executor.submit(task.function, *task.args)
        except Exception as error:
            self._retire(slot)
            if not _is_dead_worker(error):
                raise
            self._events.lost(task)  # it died while it was idle, which says nothing against the task
            return
        inner.add_done_callback(lambda finished: self._done(slot, task, finished))

    def stop(self, task: Task) -> None:
        with self._changed:
            slot = next((s for s in self._slots if s.task is task), None)
            executor = None if slot is None else slot.executor
        if executor is not None:
            _kill(executor, wait=False)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            executors = [slot.executor for slot in self._slots if slot.executor is not None]
        for executor in executors:
            _kill(executor, wait=True)

    def _begin(self, slot: _Slot) -> None:
        try:
            from loky import ProcessPoolExecutor

            env = worker_environment(self.capacity, slot.number, self._devices, os.environ)
            once = (self._threads, slot.rehearse, os.getpid())
            executor = ProcessPoolExecutor(1, timeout=None, initializer=start_worker, initargs=once, env=env)
            with self._changed:
                slot.executor = executor
            hello = executor.submit(os.getpid)
            guard(executor)
        except Exception as error:  # no memory, no processes
            self._not_started(slot, error)
            return
        hello.add_done_callback(lambda finished: self._begun(slot, finished))

    def _begun(self, slot: _Slot, hello: Future[int]) -> None:
        error = None if hello.cancelled() else hello.exception()
        if error is not None:
            self._not_started(slot, error)
            return
        with self._changed:
            slot.state = "cold" if hello.cancelled() else "idle"
            slot.rehearse = False
            self._failed_starts = 0
            self._changed.notify_all()
        self._events.changed()

    def _not_started(self, slot: _Slot, error: BaseException) -> None:
        if not self._closed:
            log.error("event=worker_not_started error=%s", type(error).__name__)
        with self._changed:
            self._failed_starts += 1
            self._why = error
        self._retire(slot)

    def _done(self, slot: _Slot, task: Task, finished: Future[Any]) -> None:
        error = CancelledError() if finished.cancelled() else finished.exception()
        if error is not None and _is_dead_worker(error):
            self._retire(slot)
            self._events.died(task, error)
            return
        dead_gpu = device_failure(error) is not None
        if dead_gpu:
            log.warning("event=worker_ended task=%s reason='its GPU failed'", task.name)
        if dead_gpu or task.stopped is not None:  # the latter: it has ended while its worker was about to be
            self._retire(slot)
        else:
            with self._changed:
                slot.state, slot.task = "idle", None
        if error is None:
            self._events.succeeded(task, finished.result())
        else:
            self._events.failed(task, error, places(error))

    def _retire(self, slot: _Slot) -> None:
        """Forget a slot's process and end it. Never raises: whoever calls this has to say what became of a task."""
        with self._changed:
            executor, slot.executor, slot.task, slot.state = slot.executor, None, None, "cold"
            self._changed.notify_all()
        if executor is not None and not self._closed:
            try:  # not here: this may be the dead executor's own thread
                threading.Thread(target=_kill, args=(executor,), name="retire", daemon=True).start()
            except RuntimeError as error:  # no thread can be had: the process ends all the same, only nobody waits for that
                log.error("event=not_waited_for_worker error=%s", type(error).__name__)
                with contextlib.suppress(Exception):
                    _kill(executor, wait=False)
        self._events.changed()


class ThreadPool:
    """One thread of this process, for `recon run` and tests. A running task cannot be ended: its result is dropped instead."""

    capacity = 1
    missing = False
    unable: JobFailed | None = None

    def __init__(self, threads: int, events: Events, *, rehearse: bool = True) -> None:
        self._threads, self._events, self._rehearse = threads, events, rehearse
        self._lock = threading.Lock()
        self._executor: Executor | None = None
        self._task: Task | None = None

    def free(self) -> bool:
        with self._lock:
            return self._task is None

    def grow(self) -> None:
        pass

    def warm(self) -> None:
        prepare_process(self._threads, rehearse=self._rehearse)

    def start(self, task: Task) -> None:
        with self._lock:
            self._task = task
            self._executor = self._executor or ThreadPoolExecutor(1, thread_name_prefix="compute")
            executor = self._executor
        self._events.began(task)
        try:
            inner = executor.submit(task.function, *task.args)
        except Exception:  # no thread can be had; its queue has the task nevertheless
            with self._lock:
                self._executor = self._task = None
            executor.shutdown(wait=False, cancel_futures=True)
            raise
        inner.add_done_callback(lambda finished: self._done(task, finished))

    def stop(self, task: Task) -> None:
        """The thread is left to itself, and another one takes the next task."""
        with self._lock:
            if self._task is not task:
                return
            executor, self._executor, self._task = self._executor, None, None
        if executor is not None:
            executor.shutdown(wait=False)
        self._events.died(task, JobFailed("left to itself", where=task.name))

    def close(self) -> None:
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True, cancel_futures=True)

    def _done(self, task: Task, finished: Future[Any]) -> None:
        with self._lock:
            if self._task is not task:
                return  # it was stopped
            self._task = None
        if finished.cancelled():  # the pool was closed before its thread came to it
            self._events.died(task, CancelledError())
            return
        error = finished.exception()
        if error is None:
            self._events.succeeded(task, finished.result())
        else:
            self._events.failed(task, device_failure(error, here=True) or error, places(error))


def worker_environment(workers: int, number: int, devices: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What a worker's environment has beyond the server's: threads that sleep, room to grow, and which GPU is its own.

    `loky` replaces a worker that has gained 300 MB since its first task, which a scan of ordinary size does: the next scan would wait
    2 to 3 s for a fresh process. The limit here follows the machine's memory, so that only a real leak reaches it.
    """
    growth = max(LEAST_GROWTH, int(GROWTH_SHARE * memory_in_all() / max(1, workers)))
    found = {**WORKER_ENVIRONMENT, "LOKY_MAX_MEMORY_LEAK_SIZE": str(growth)}
    if devices > 1:
        named = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        known = named or [str(device) for device in range(devices)]
        found["CUDA_VISIBLE_DEVICES"] = known[number % len(known)]
    return found


def start_worker(threads: int, rehearse: bool, server: int) -> None:
    """The first thing in a worker's process. ``server`` is the process that started it, which may be gone by now.

    Ctrl-C and systemd say their word to every process; the server's alone counts, since it lets workers finish what a scan waits for.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    log_python_warnings()
    end_with(server, look_every=1.0)  # or a killed server's workers would keep their memory for ever
    with process_memory.importing():
        importlib.import_module("gadgets.tasks")
    prepare_process(threads, rehearse=rehearse)
    process_memory.settle()
    with contextlib.suppress(OSError):  # only now: on a busy machine a fresh worker must not take a minute to be there
        os.nice(WORKER_NICENESS)


def prepare_process(threads: int, *, rehearse: bool) -> None:
    """What a worker does once: import the heavy libraries, bound its threads, touch the code paths of a first scan."""
    import torch

    torch.set_num_threads(threads)
    from gadgets import tasks

    if rehearse:
        tasks.rehearse()


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


def places(error: BaseException) -> str:
    """Where a task failed, innermost last: ``file:line>file:line``; in the worker's process when it was one."""
    lines = str(error.__cause__) if error.__cause__ is not None else "".join(traceback.format_tb(error.__traceback__))
    found = re.findall(r'File "([^"]+)", line (\d+)', lines)
    return ">".join(f"{Path(file).name}:{line}" for file, line in found[-8:])


def _is_dead_worker(error: BaseException) -> bool:
    from concurrent.futures.process import BrokenProcessPool

    return isinstance(error, BrokenProcessPool | CancelledError) or type(error).__name__ in (
        "TerminatedWorkerError",
        "ShutdownExecutorError",
    )


def _kill(executor: Executor, wait: bool = True) -> None:
    executor.shutdown(wait=wait, kill_workers=True)  # type: ignore[call-arg]  # loky's extension
