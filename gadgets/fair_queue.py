"""Which waiting task is next: scans take turns, the scan on the table comes before replays."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection

from gadgets.compute_pool import Owner, Place, Task

SCAN, REPLAY, HOUSEKEEPING = 0, 1, 2
"""Priorities. A scanner's scan; a replay or a retry, where nobody waits at a console; files that nobody waits for."""

AGEING = 600.0
"""s of waiting after which files count as a replay, and after as long again as a scan: an archive must get its images also on a day, or in
a night, when the queue is never empty."""


class FairQueue:
    """Tasks that wait, by the scan that owns them.

    Among the scans of the best priority that have a waiting task, the one with the fewest running tasks is next, and of equal ones the one
    that was served longest ago. So a scan of many slices cannot keep another's preview waiting for longer than one task. Within a scan
    the order is that of submission. Files that have waited for long take turns with scans, all of them together as one scan: a night's
    files must not stand before the morning's first preview. Used under the lock of `Jobs`.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._files_running = self._files_served = 0
        self._waiting: dict[Owner, dict[Place, deque[Task]]] = {}
        self._running: dict[Owner, int] = {}
        self._served: dict[Owner, int] = {}
        self._turn = 0

    def __len__(self) -> int:
        return sum(len(tasks) for places in self._waiting.values() for tasks in places.values())

    def add(self, task: Task, *, first: bool = False) -> None:
        """Put a task at the end of its scan's tasks, or before them (one that is tried again)."""
        tasks = self._waiting.setdefault(task.owner, {}).setdefault(task.place, deque())
        if first:
            tasks.appendleft(task)
        else:
            tasks.append(task)

    def choose(self, places: Collection[Place]) -> Task | None:
        """The task that is next at one of the places; it stays where it is."""
        heads = [tasks[0] for owner in self._waiting.values() for place, tasks in owner.items() if tasks and place in places]
        return min(heads, key=self._rank, default=None)

    def take(self, task: Task) -> None:
        """A chosen task leaves the queue and runs."""
        self._waiting[task.owner][task.place].remove(task)
        self._turn += 1
        self._served[task.owner] = self._turn
        self._running[task.owner] = self._running.get(task.owner, 0) + 1
        if task.owner.priority == HOUSEKEEPING:
            self._files_running += 1
            self._files_served = self._turn

    def ended(self, task: Task) -> None:
        """A task that was taken runs no more."""
        self._files_running -= task.owner.priority == HOUSEKEEPING
        left = self._running[task.owner] - 1
        if left:
            self._running[task.owner] = left
            return
        del self._running[task.owner]
        self._forget(task.owner)

    def tasks(self, owner: Owner | None = None) -> list[Task]:
        """Waiting tasks of a scan, or of all."""
        chosen = self._waiting.values() if owner is None else [self._waiting.get(owner, {})]
        return [task for places in chosen for tasks in places.values() for task in tasks]

    def drop(self, task: Task) -> None:
        """Remove a waiting task."""
        self._waiting[task.owner][task.place].remove(task)
        self._forget(task.owner)

    def _rank(self, task: Task) -> tuple[int, int, int, float]:
        owner = task.owner
        if owner.priority < HOUSEKEEPING:
            return owner.priority, self._running.get(owner, 0), self._served.get(owner, 0), 0.0
        priority = max(SCAN, HOUSEKEEPING - int((self._now() - task.made) / AGEING))
        return priority, self._files_running, self._files_served, task.made  # among files, the oldest

    def _forget(self, owner: Owner) -> None:
        """Nothing is kept of scans that have neither waiting nor running tasks."""
        if owner in self._running or any(self._waiting.get(owner, {}).values()):
            return
        self._waiting.pop(owner, None)
        self._served.pop(owner, None)
