"""The tasks of one scan, which are given up together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from gadgets.compute_pool import Budget, Place, Task
from gadgets.fair_queue import SCAN

if TYPE_CHECKING:
    from gadgets.jobs import Jobs

T = TypeVar("T")


class Scope:
    """The tasks of one scan. ``submit`` as in `Jobs`; ``abandon`` drops those that wait and silences those that run.

    A running task ends by itself, at the latest when its report finds that the scan's folder is gone (`FileReport`).
    """

    def __init__(self, jobs: Jobs, priority: int = SCAN) -> None:
        self._jobs = jobs
        self.priority = priority
        self.abandoned = False

    def submit(
        self,
        task: Callable[..., T],
        *args: Any,
        place: Place = "local",
        budget: Budget | None = None,
        alone: bool = False,
    ) -> Future[T]:
        """Run ``task(*args)`` on a worker, unless the scan has been abandoned: then the future holds ``GivenUp``.

        Parameters
        ----------
        place
            ``remote`` where the task may leave this machine: its one argument has ``packed()`` and needs no files then.
        budget
            What it may compute, together with other tasks of the scan; then it fails with ``TimeLimitReached``.
        alone
            On this machine, not beside other tasks: memory is short.
        """
        made = Task(task, args, self, place, budget, alone)
        self._jobs.add(made)
        return made.outer

    def abandon(self) -> None:
        """Give up every task that is not done; later ones are not begun."""
        self._jobs.give_up(self)
