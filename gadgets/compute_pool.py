"""What the parts that compute have in common: a task, the limit on a scan's computing time, and what a pool of workers can do."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from gadgets.errors import JobFailed

Place = Literal["local", "remote"]
"""On the server's own workers, which see its files, or on a Dask cluster's, which need not."""


class Owner(Protocol):
    """Whose task it is: a scan. Owners of a lower ``priority`` number come first; equal ones take turns."""

    priority: int
    abandoned: bool


class Budget:
    """Seconds that a scan's method may compute: time while at least one of its tasks runs. Waiting for a worker costs nothing.

    Not safe by itself: used under the lock of `Jobs`.
    """

    def __init__(self, seconds: float, *, name: str) -> None:
        self.seconds, self.name = seconds, name
        self._used, self._running, self._since = 0.0, 0, 0.0

    def begin(self, now: float) -> None:
        """A task runs from now on."""
        if self._running == 0:
            self._since = now
        self._running += 1

    def end(self, now: float) -> None:
        """A task has ended."""
        self._running -= 1
        if self._running == 0:
            self._used += now - self._since

    def left(self, now: float) -> float:
        """Seconds; negative when the limit has passed."""
        return self.seconds - self._used - (now - self._since if self._running else 0.0)


@dataclass(eq=False)
class Task:
    """One call on its way to a worker.

    ``alone`` asks for a machine on which no other task of this server runs. ``stopped`` says why its worker was ended on purpose;
    ``deaths`` counts the workers that died of it, ``refusals`` how often a pool failed to begin it.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    owner: Owner
    place: Place = "local"
    budget: Budget | None = None
    alone: bool = False
    outer: Future[Any] = field(default_factory=Future)
    deaths: int = 0
    refusals: int = 0
    begun: bool = False
    stopped: JobFailed | None = None
    give_up_at: float | None = None
    made: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return str(getattr(self.function, "__name__", "task"))


class Events(Protocol):
    """What a pool tells; may be called from any thread."""

    def began(self, task: Task) -> None:
        """The task runs now."""

    def succeeded(self, task: Task, result: Any) -> None: ...

    def failed(self, task: Task, error: BaseException, places: str) -> None:
        """The task raised; ``places`` are the lines of code, without words or values."""

    def died(self, task: Task, error: BaseException) -> None:
        """The worker died, or was ended."""

    def lost(self, task: Task) -> None:
        """The pool cannot run it any more; another one should."""

    def changed(self) -> None:
        """There may be room for another task."""


class Pool(Protocol):
    """Workers. All methods but ``warm`` and ``close`` return at once."""

    @property
    def capacity(self) -> int:
        """Tasks at a time."""

    def free(self) -> bool:
        """Whether a task would begin now."""

    def grow(self) -> None:
        """Tasks wait: begin to start workers that are missing."""

    def warm(self) -> None:
        """Start every worker and wait for it."""

    def start(self, task: Task) -> None:
        """Begin a task. When this raises, the pool has forgotten the task and is as before."""

    def stop(self, task: Task) -> None:
        """End the worker that runs it."""

    def close(self) -> None:
        """End all workers; running tasks are not waited for."""


class RemotePool(Pool, Protocol):
    """Workers that others start and end."""

    @property
    def wanted(self) -> int:
        """Tasks at a time when all workers are there."""
