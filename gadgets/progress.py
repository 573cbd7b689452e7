"""How far a scan's reconstruction is and how long it will still take, and the line that says so to the operator.

Slices run side by side on the workers and report the part of their work that is done. What is left is scheduled: running
slices go on at their recent speed, waiting ones take as long as their like and begin when a worker is free.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

FIRST_ESTIMATE = 3.0
"""Seconds of observed work before anything is said about the rest: beginnings are not typical."""

LEAST_FRACTION = 0.02
WINDOW = 10.0
"""Seconds (or half of a slice's time, where that is longer) over which its speed is taken: work is not equally fast throughout."""

SMOOTHING = 4.0
"""Time constant in s with which the announced end follows the estimated one."""

_LINE = re.compile(r"DBG \S+ (\d+) %(?:, about (\d+) (s|min) left)?\s*")


@dataclass
class _Task:
    """What was seen of one slice: ``(time, fraction)``, and the time at which it was seen to be done."""

    seen: list[tuple[float, float]] = field(default_factory=list)
    ended: float | None = None

    def left(self, now: float) -> float | None:
        """Seconds that a running task will still take, at its recent speed."""
        # what comes before the first progress (coil maps, a first guess) says nothing about the speed
        moving = [sample for sample in self.seen if sample[1] > 0]
        if len(moving) < 2:
            return None
        start, latest = moving[0], moving[-1]
        since = now - max(WINDOW, (now - start[0]) / 2)
        # the last sample before the window: a task that reports rarely still has a speed
        then = next((s for s in reversed(moving[:-1]) if s[0] <= since), start)
        silence = now - latest[0]
        gap = max(b[0] - a[0] for a, b in itertools.pairwise(moving) if b[0] >= then[0])
        # between two reports it goes on as before; after an unusual silence it does not
        idle = 0.0 if silence <= 1.5 * gap else silence
        span, gained = latest[0] - then[0] + idle, latest[1] - then[1]
        if span <= 0 or gained <= 0:
            return None
        return max(0.0, (1.0 - latest[1]) * span / gained - (silence - idle))


class RemainingTime:
    """Estimates the end of a scan's reconstruction from the fractions of its slices.

    Parameters
    ----------
    n_tasks
        Slices in all.
    workers
        How many are computed at a time.
    """

    def __init__(self, n_tasks: int, workers: int) -> None:
        self.n_tasks, self.workers = max(1, n_tasks), max(1, workers)
        self._tasks: dict[int, _Task] = {}
        self._began: float | None = None
        self._end: float | None = None
        self._updated = 0.0

    def update(self, now: float, fractions: Mapping[int, float]) -> None:
        """Note the fraction of every slice that was begun (0 at first); 1 when it is done. ``now`` in s, never decreasing."""
        for number, given in fractions.items():
            fraction = min(1.0, max(0.0, given)) if math.isfinite(given) else 0.0
            self._began = now if self._began is None else self._began
            task = self._tasks.setdefault(number, _Task())
            if not task.seen or fraction > task.seen[-1][1]:
                task.seen.append((now, fraction))
            elif fraction < task.seen[-1][1]:  # begun anew: its worker died, or another method takes over
                self._tasks[number] = _Task([(now, fraction)])
            if fraction >= 1.0 and task.ended is None:
                task.ended = now
        self._smooth(now)

    @property
    def fraction(self) -> float:
        """Of all slices together, 0 to 1."""
        return sum(task.seen[-1][1] for task in self._tasks.values()) / self.n_tasks

    def seconds_left(self, now: float) -> float | None:
        """``None`` as long as nothing sensible can be said."""
        return None if self._end is None else max(0.0, self._end - now)

    def _smooth(self, now: float) -> None:
        left = self._estimate(now)
        if left is None:
            return
        if self._end is None:
            self._end = now + left
        else:
            self._end += (1.0 - math.exp(-(now - self._updated) / SMOOTHING)) * (now + left - self._end)
        self._updated = now

    def _estimate(self, now: float) -> float | None:
        if self._began is None or now - self._began < FIRST_ESTIMATE or self.fraction < LEAST_FRACTION:
            return None
        running = {n: task.left(now) for n, task in self._tasks.items() if task.ended is None}
        # as long as a slice takes that was watched from its beginning to its (expected) end
        spans = [
            task.ended - task.seen[0][0] for task in self._tasks.values() if task.ended is not None and len(task.seen) > 1
        ]
        spans += [now - self._tasks[n].seen[0][0] + left for n, left in running.items() if left is not None]
        n_waiting = self.n_tasks - len(self._tasks)
        if not spans:
            return None if running or n_waiting else 0.0
        typical = statistics.median(spans)
        free = [typical if left is None else left for left in running.values()]
        free += [0.0] * (self.workers - len(free))
        heapq.heapify(free)
        for _ in range(n_waiting):
            heapq.heappush(free, heapq.heappop(free) + typical)
        return max(free)


def progress_line(chain: str, fraction: float, seconds: float | None) -> str:
    """One line for the console: ``DBG llr 43 %, about 25 s left``."""
    line = f"DBG {chain} {100 * fraction:.0f} %"
    return f"{line}\n" if seconds is None else f"{line}, about {_rounded(seconds)} left\n"


def read_progress_line(text: str) -> tuple[float, str] | None:
    """Fraction and remaining time (``"25 s"``, or nothing) of a progress line; ``None`` for any other text."""
    found = _LINE.fullmatch(text)
    return None if found is None else (int(found[1]) / 100, f"{found[2]} {found[3]}" if found[2] else "")


def _rounded(seconds: float) -> str:
    """As exact as such an estimate is."""
    if seconds >= 120:
        return f"{seconds / 60:.0f} min"
    step = 1 if seconds < 20 else 5
    return f"{max(1, step * round(seconds / step))} s"
