"""Where computing happens: tasks of several scans, shared out fairly to worker processes, behind ``concurrent.futures``.

The connection's thread only reads: it puts tasks into a queue and never waits. One thread of the server hands them to workers, one
task to a worker at a time. Everything that computes is a pure function of files and arguments, so a task whose worker died can simply
be run again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from gadgets.compute_local import LocalPool, ThreadPool, places
from gadgets.compute_pool import Budget, Events, Place, Pool, RemotePool, Task
from gadgets.cores import cores
from gadgets.device_errors import device_failure
from gadgets.errors import GivenUp, JobFailed, TimeLimitReached, WorkerDied, WorkerKilled
from gadgets.fair_queue import SCAN, FairQueue
from gadgets.memory_errors import out_of_memory
from gadgets.reports import given_up
from gadgets.scope import Scope as Scope
from recon_core.errors import ReconError

log = logging.getLogger(__name__)
T = TypeVar("T")

MOST_DEATHS = 2
"""Workers that may die of one task."""

MOST_REFUSALS = 8
"""Times that a pool may fail to begin one task."""

REST_SECONDS = 0.5
"""After a failure of handing out: threads or memory that are short may come back, and the log must not fill meanwhile."""

ABANDONED_SECONDS = 60.0
"""A task of a scan that was given up ends by itself at its next word of progress; if it has none to say, its worker is ended."""

HERE: tuple[Place, ...] = ("local",)
ELSEWHERE: tuple[Place, ...] = ("remote",)
MakeRemote = Callable[[Events, int], RemotePool]
Late = tuple[Task, Pool | None, JobFailed]
"""A task that is to be stopped, where it runs (``None``: it still waits), and why."""

SHORT = "Threads or memory of this machine are used up: see the log of the server"


@dataclass(frozen=True)
class State:
    """How busy the workers are: tasks that wait and that run, tasks at a time, and what went wrong since the start.

    ``stalled``: seconds for which tasks have been waiting while none ran and none began; 0 when that is not so. ``remote`` of
    ``remote_wanted`` tasks at a time have room on the cluster; without a cluster, both are ``None``.
    """

    waiting: int
    running: int
    capacity: int
    deaths: int
    stopped: int
    stalled: float = 0.0
    remote: int | None = None
    remote_wanted: int | None = None


class Jobs:
    """Executes tasks: in this process (tests, ``recon run``), in warm local worker processes (the server), or on a Dask cluster.

    Parameters
    ----------
    workers
        Number of worker processes; 0 computes in a thread of this process.
    threads
        Compute threads per worker; ``None`` shares the machine's cores among the workers.
    remote
        Makes a pool of workers elsewhere, given who hears of its tasks and the threads of a worker. It takes the tasks that may leave
        this machine; without room or connection there, they are computed here.
    devices
        CUDA devices of this machine.
    rehearse
        Whether fresh workers run every method once on tiny data. A worker that replaces a dead one does not: tasks wait for it.
    """

    def __init__(
        self,
        workers: int = 0,
        *,
        threads: int | None = None,
        remote: MakeRemote | None = None,
        devices: int = 0,
        rehearse: bool = True,
    ) -> None:
        self.workers = workers
        self.threads = threads or max(1, cores() // max(workers, 1))
        self._wake = threading.Condition(threading.RLock())
        self._queue = FairQueue()
        self._running: dict[Task, Pool] = {}
        self._deaths = self._stopped = 0
        self._moved = time.monotonic()  # when a task last began or ended, or began to wait where nothing else did
        self._warmed = self._closed = False
        self._dispatcher: threading.Thread | None = None
        self._local: LocalPool | ThreadPool = (
            LocalPool(workers, self.threads, self, devices=devices, rehearse=rehearse)
            if workers
            else ThreadPool(self.threads, self, rehearse=rehearse)
        )
        self._remote: RemotePool | None = None if remote is None else remote(self, self.threads)

    @property
    def capacity(self) -> int:
        """Slices that are computed at a time."""
        remote = 0 if self._remote is None else self._remote.capacity
        return remote or self._local.capacity

    @property
    def state(self) -> State:
        """For those who watch. Should nobody hand out what waits, somebody does from now on."""
        with self._wake:
            waiting, running = len(self._queue), len(self._running)
            if waiting:
                self._is_dispatched()
            idle = (waiting or running) and not any(task.begun for task in self._running)
            stalled = time.monotonic() - self._moved if idle else 0.0
        there = (None, None) if self._remote is None else (self._remote.capacity, self._remote.wanted)
        return State(waiting, running, self.capacity, self._deaths, self._stopped, stalled, *there)

    def warm(self) -> None:
        """Start every worker now, so that the first scan does not wait for imports."""
        self._local.warm()
        if self._remote is not None:
            self._remote.warm()
        self._warmed = True

    def submit(self, task: Callable[..., T], *args: Any) -> Future[T]:
        """Run ``task(*args)`` on a worker; its future answers even when the worker process dies (one retry)."""
        return self.scope().submit(task, *args)

    def scope(self, priority: int = SCAN) -> Scope:
        """Tasks that can be given up together: those of one scan."""
        return Scope(self, priority)

    def close(self) -> None:
        """Stop the workers; running tasks are not waited for."""
        with self._wake:
            self._closed = True
            left = self._queue.tasks()
            for task in left:
                self._queue.drop(task)
            self._wake.notify_all()
        for task in left:
            task.outer.set_exception(_stopping(task))
        self._local.close()
        if self._remote is not None:
            self._remote.close()

    # ---- from scans ----------------------------------------------------------------------------------------------------

    def add(self, task: Task) -> None:
        """Queue a task. Never waits."""
        with self._wake:
            if self._closed:
                refusal: JobFailed = _stopping(task)
            elif task.owner.abandoned:
                refusal = given_up(task.name)
            elif not self._is_dispatched():
                refusal = JobFailed("no thread can be had to hand out tasks", where=task.name, remedy=SHORT)
            else:
                if not (len(self._queue) or self._running):
                    self._moved = time.monotonic()
                self._queue.add(task)
                self._wake.notify_all()
                return
        task.outer.set_exception(refusal)

    def give_up(self, scope: Scope) -> None:
        """Drop the waiting tasks of a scan; running ones end soon."""
        with self._wake:
            scope.abandoned = True
            left = self._queue.tasks(scope)
            for task in left:
                self._queue.drop(task)
            for task in self._running:
                if task.owner is scope:
                    task.give_up_at = time.monotonic() + ABANDONED_SECONDS
            self._wake.notify_all()
        for task in left:
            task.outer.set_exception(given_up(task.name))

    # ---- from pools ----------------------------------------------------------------------------------------------------

    def began(self, task: Task) -> None:
        with self._wake:
            if task in self._running and not task.begun:
                task.begun, self._moved = True, time.monotonic()
                if task.budget is not None:
                    task.budget.begin(self._moved)
                self._wake.notify_all()

    def succeeded(self, task: Task, result: Any) -> None:
        if self._ended(task):
            task.outer.set_result(result)

    def failed(self, task: Task, error: BaseException, places: str) -> None:
        if not self._ended(task):
            return
        # the files of an abandoned scan are gone: what its tasks say about that is no news
        if not isinstance(error, ReconError) and not task.owner.abandoned:
            # neither words nor values: they may quote the scan. The places are enough to find it
            log.error("event=task_crashed task=%s error=%s at=%s", task.name, type(error).__name__, places)
        told = device_failure(error)
        if told is not None:
            log.error("event=device_failed task=%s reason=%r", task.name, str(told))
        task.outer.set_exception(told or out_of_memory(error) or error)

    def died(self, task: Task, error: BaseException) -> None:
        if not self._ended(task):
            return
        task.deaths += 1
        with self._wake:
            self._deaths += task.stopped is None and not self._closed
        if self._again(task, _died(task, error) if task.deaths >= MOST_DEATHS else None):
            log.warning("event=worker_died task=%s error=%s action=retry", task.name, type(error).__name__)

    def lost(self, task: Task) -> None:
        if not self._ended(task):
            return
        task.place = "local"
        self.add(task)

    def changed(self) -> None:
        with self._wake:
            if len(self._queue):
                self._is_dispatched()
            self._wake.notify_all()

    def _again(self, task: Task, verdict: JobFailed | None) -> bool:
        """Put a task that has ended without an answer before its scan's others, unless a ``verdict`` (or more) is against it."""
        with self._wake:
            if self._closed:
                verdict = _stopping(task)
            elif task.stopped is not None or task.owner.abandoned:
                verdict = task.stopped or given_up(task.name)
            if verdict is None:
                self._queue.add(task, first=True)
            self._wake.notify_all()
        if verdict is not None:
            task.outer.set_exception(verdict)
        return verdict is None

    def _ended(self, task: Task) -> bool:
        """Note the end of a task's run; false when it was noted before."""
        with self._wake:
            if self._running.pop(task, None) is None:
                return False
            self._queue.ended(task)
            if task.begun:
                self._moved = time.monotonic()
                if task.budget is not None:
                    task.budget.end(self._moved)
            task.begun = False
            self._wake.notify_all()
            return True

    # ---- the thread that hands tasks to workers ------------------------------------------------------------------------

    def _is_dispatched(self) -> bool:
        """Whether somebody hands out tasks; the first time, and when whoever did it is gone, that is a new thread. Under the lock."""
        if self._closed or (self._dispatcher is not None and self._dispatcher.is_alive()):
            return True
        if self._dispatcher is not None:
            log.critical("event=dispatcher_gone waiting=%d action=another", len(self._queue))
        dispatcher = threading.Thread(target=self._dispatch, name="dispatch", daemon=True)
        try:
            dispatcher.start()
        except RuntimeError as error:  # the system has no thread for us
            log.critical("event=dispatcher_not_started error=%s", type(error).__name__)
            return False
        self._dispatcher = dispatcher
        return True

    def _dispatch(self) -> None:
        """Hand out tasks. Whatever fails, this goes on: without it the server takes scans and answers none."""
        while not self._closed:
            try:
                self._hand_out()
            except BaseException as error:  # also SystemExit, which would end a thread without a word
                log.error("event=dispatch_failed error=%s at=%s", type(error).__name__, places(error))
                with self._wake:
                    self._wake.wait_for(lambda: self._closed, REST_SECONDS)

    def _hand_out(self) -> None:
        """Stop what is late, or begin one task, or start workers; without anything to do, wait."""
        with self._wake:
            if self._closed:
                return
            late = self._overdue()
            chosen = None if late else self._choose()
            grow = self._local.missing and (self._warmed or bool(len(self._queue)))
            if not late and chosen is None and not grow:
                self._wake.wait(self._patience())
                return
        if late:
            self._stop_all(late)
        elif chosen is not None:
            self._start(*chosen)
        else:
            self._local.grow()
            self._refuse_all(self._local.unable)

    def _start(self, task: Task, pool: Pool) -> None:
        try:
            pool.start(task)
        except BaseException as error:
            if self._ended(task):
                task.refusals += 1
                got = type(error).__name__
                refused = JobFailed("a task cannot be begun", where=task.name, got=got, remedy=SHORT)
                self._again(task, refused if task.refusals >= MOST_REFUSALS else None)
            raise

    def _choose(self) -> tuple[Task, Pool] | None:
        """The fairest task that a free worker can begin; it is taken from the queue."""
        remote = self._remote if self._remote is not None and self._remote.capacity else None
        if remote is not None and remote.free():
            there = self._queue.choose(ELSEWHERE)
            if there is not None:
                return self._take(there, remote)
        if self._local.free():
            task = self._queue.choose(HERE if remote is not None else (*HERE, *ELSEWHERE))
            if task is not None and not self._held_back(task):
                return self._take(task, self._local)
        return None

    def _held_back(self, task: Task) -> bool:
        """A task that wants the machine for itself waits for the others, and they for it."""
        here = [other for other, pool in self._running.items() if pool is self._local]
        return bool(here) and (task.alone or any(other.alone for other in here))

    def _take(self, task: Task, pool: Pool) -> tuple[Task, Pool]:
        self._queue.take(task)
        self._running[task] = pool
        return task, pool

    def _overdue(self) -> list[Late]:
        now = time.monotonic()
        late: list[Late] = []
        for task, pool in self._running.items():
            if task.stopped is not None:
                continue
            if task.budget is not None and task.budget.left(now) <= 0:  # also those that were sent ahead
                late.append((task, pool, _too_long(task.budget)))
            elif task.give_up_at is not None and task.give_up_at <= now:
                late.append((task, pool, given_up(task.name)))
        for task in self._queue.tasks():
            if task.budget is not None and task.budget.left(now) <= 0:
                self._queue.drop(task)
                late.append((task, None, _too_long(task.budget)))
        return late

    def _patience(self) -> float | None:
        """Seconds until something has to be stopped."""
        now = time.monotonic()
        ends = [t.budget.left(now) for t in self._running if t.budget is not None and t.begun and t.stopped is None]
        ends += [t.give_up_at - now for t in self._running if t.give_up_at is not None and t.stopped is None]
        return max(0.001, min(ends)) if ends else None

    def _stop_all(self, late: list[Late]) -> None:
        failure: BaseException | None = None
        for task, pool, why in late:
            try:
                self._stop(task, pool, why)
            except BaseException as error:  # it is late the next time as well; the others are stopped now
                task.stopped, failure = None, error
        if failure is not None:
            raise failure

    def _stop(self, task: Task, pool: Pool | None, why: JobFailed) -> None:
        if pool is None:
            task.outer.set_exception(why)
            return
        task.stopped = why
        log.warning("event=task_stopped task=%s reason=%r", task.name, str(why))
        pool.stop(task)
        self._stopped += 1

    def _refuse_all(self, why: JobFailed | None) -> None:
        """No worker can be started: every task that waits for one is told."""
        if why is None:
            return
        with self._wake:
            left = self._queue.tasks()
            for task in left:
                self._queue.drop(task)
            self._warmed = False  # the next task tries again
        for task in left:
            task.outer.set_exception(why)


def _stopping(task: Task) -> GivenUp:
    return GivenUp("the server is stopping", where=task.name)


def _too_long(budget: Budget) -> TimeLimitReached:
    remedy = "Raise time_limit, or choose a quicker chain"
    return TimeLimitReached("not done within the time limit", where=budget.name, got=f"{budget.seconds:g} s", remedy=remedy)


def _died(task: Task, error: BaseException) -> WorkerDied:
    remedy = "The system ends processes when the machine's memory is used up"
    kind = WorkerKilled if "SIGKILL" in str(error) else WorkerDied
    return kind("a worker process died twice", where=task.name, got=type(error).__name__, remedy=remedy)
