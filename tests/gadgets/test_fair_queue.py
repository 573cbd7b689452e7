"""Scans take turns; the scan on the table comes before replays."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadgets.compute_pool import Budget, Task
from gadgets.fair_queue import AGEING, HOUSEKEEPING, REPLAY, SCAN, FairQueue

EVERYWHERE = ("local", "remote")


@dataclass(eq=False)
class Scan:
    name: str
    priority: int = SCAN
    abandoned: bool = False
    made: list[Task] = field(default_factory=list)

    def task(self, **options: Any) -> Task:
        task = Task(print, (self.name, len(self.made)), self, **options)
        self.made.append(task)
        return task


def filled(*scans: tuple[Scan, int]) -> FairQueue:
    queue = FairQueue()
    for scan, n in scans:
        for _ in range(n):
            queue.add(scan.task())
    return queue


def served(queue: FairQueue, n_workers: int = 1) -> list[tuple[str, int]]:
    """The order in which ``n_workers`` workers take everything, the one that began first being done first."""
    order, running = [], []
    while len(queue) or running:
        task = queue.choose(EVERYWHERE)
        if task is None or len(running) == n_workers:
            queue.ended(running.pop(0))
            continue
        queue.take(task)
        running.append(task)
        order.append(task.args)
    return order


def test_scans_take_turns() -> None:
    a, b, c = Scan("a"), Scan("b"), Scan("c")
    order = served(filled((a, 4), (b, 2), (c, 2)))
    assert [name for name, _ in order] == ["a", "b", "c", "a", "b", "c", "a", "a"]


def test_a_scan_keeps_its_own_order() -> None:
    order = served(filled((Scan("a"), 5), (Scan("b"), 5)), n_workers=2)
    for name in "ab":
        assert [number for owner, number in order if owner == name] == list(range(5))


def test_a_preview_waits_for_no_more_than_what_runs() -> None:
    long, short = Scan("long"), Scan("short")
    queue = filled((long, 12))
    for _ in range(2):
        queue.take(queue.choose(EVERYWHERE))
    queue.add(short.task())
    assert queue.choose(EVERYWHERE).owner is short


def test_workers_are_shared_evenly() -> None:
    """A scan that came later gets the next workers until it has as many."""
    first, second = Scan("first"), Scan("second")
    queue = filled((first, 8))
    for _ in range(3):
        queue.take(queue.choose(EVERYWHERE))
    for _ in range(8):
        queue.add(second.task())
    for _ in range(3):
        task = queue.choose(EVERYWHERE)
        assert task.owner is second
        queue.take(task)


@pytest.mark.parametrize("order", [(SCAN, REPLAY, HOUSEKEEPING), (HOUSEKEEPING, REPLAY, SCAN), (REPLAY, SCAN, HOUSEKEEPING)])
def test_live_scans_come_before_replays_and_those_before_files(order: tuple[int, ...]) -> None:
    queue = filled(*((Scan(str(priority), priority), 2) for priority in order))
    assert [int(name) for name, _ in served(queue)] == [SCAN, SCAN, REPLAY, REPLAY, HOUSEKEEPING, HOUSEKEEPING]


def aged(queue: FairQueue, clock: list[float], n: int, seconds: float) -> None:
    """Files of ``n`` scans, each waiting for so long."""
    for number in range(n):
        task = Scan(f"file{number}", HOUSEKEEPING).task()
        task.made = clock[0] - seconds
        queue.add(task)


@pytest.mark.parametrize(
    ("others", "seconds", "place"),
    [
        (REPLAY, 0, 6),
        (REPLAY, 0.99 * AGEING, 6),
        (REPLAY, 1.01 * AGEING, 1),
        (SCAN, 1.99 * AGEING, 6),
        (SCAN, 2.01 * AGEING, 1),
    ],
)
def test_files_wait_for_replays_and_scans_but_not_for_ever(others: int, seconds: float, place: int) -> None:
    """A night of replays, a day of scans: their tasks never end, and the archive gets its images all the same."""
    clock = [1e6]
    queue, scan = FairQueue(now=lambda: clock[0]), Scan("scan", others)
    for _ in range(6):
        queue.add(scan.task())
    aged(queue, clock, 1, seconds)
    assert [task.owner.name for task in drained(queue)].index("file0") == place


def test_a_heap_of_old_files_is_as_one_scan() -> None:
    """What has piled up does not stand before a preview: it is one file, one slice, one file."""
    clock = [1e6]
    queue, scan = FairQueue(now=lambda: clock[0]), Scan("scan")
    aged(queue, clock, 50, 3 * AGEING)
    for _ in range(4):
        queue.add(scan.task())
    names = [name.rstrip("0123456789") for name, _ in served(queue)]
    assert names[:8].count("scan") == 4 and names[0] != names[1] != names[2]


def test_files_do_not_take_every_worker() -> None:
    clock = [1e6]
    queue, scan = FairQueue(now=lambda: clock[0]), Scan("scan")
    aged(queue, clock, 50, 3 * AGEING)
    for _ in range(50):
        queue.add(scan.task())
    taken = []
    for _ in range(4):
        taken.append(queue.choose(EVERYWHERE))
        queue.take(taken[-1])
    assert [task.owner is scan for task in taken].count(True) == 2


def test_of_files_the_oldest_is_next_and_nothing_is_kept_of_them() -> None:
    clock = [1e6]
    queue = FairQueue(now=lambda: clock[0])
    for age in (10, 30, 20):
        aged(queue, clock, 1, age)
    ages = [clock[0] - task.made for task in drained(queue)]
    assert ages == [30, 20, 10]
    assert not any(vars(queue)[name] for name in ("_waiting", "_running", "_served", "_files_running"))


def drained(queue: FairQueue) -> list[Task]:
    """Tasks in the order in which one worker takes them."""
    order = []
    while (task := queue.choose(EVERYWHERE)) is not None:
        queue.take(task)
        queue.ended(task)
        order.append(task)
    return order


def test_a_task_that_is_tried_again_comes_first() -> None:
    scan = Scan("a")
    queue = filled((scan, 3))
    again = queue.choose(EVERYWHERE)
    queue.take(again)
    queue.ended(again)
    queue.add(again, first=True)
    assert queue.choose(EVERYWHERE) is again


def test_places_have_queues_of_their_own() -> None:
    scan, queue = Scan("a"), FairQueue()
    here, there = scan.task(), scan.task(place="remote")
    queue.add(there)
    queue.add(here)
    assert queue.choose(("local",)) is here
    assert queue.choose(("remote",)) is there


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([SCAN, REPLAY])), max_size=40), st.integers(1, 4))
def test_every_task_is_served_once_and_nothing_is_kept(arrivals: list[tuple[int, int]], n_workers: int) -> None:
    scans = {key: Scan(str(key), key[1]) for key in set(arrivals)}
    queue = FairQueue()
    for key in arrivals:
        queue.add(scans[key].task())
    order = served(queue, n_workers)
    assert sorted(order) == sorted(task.args for scan in scans.values() for task in scan.made)
    assert not any(vars(queue)[name] for name in ("_waiting", "_running", "_served"))


def test_a_budget_counts_time_while_something_runs_once() -> None:
    budget = Budget(10.0, name="llr")
    assert budget.left(100.0) == 10.0
    budget.begin(100.0)
    budget.begin(102.0)  # side by side: not twice
    assert budget.left(104.0) == 6.0
    budget.end(104.0)
    budget.end(105.0)
    assert budget.left(200.0) == 5.0  # waiting costs nothing
    budget.begin(200.0)
    assert budget.left(206.0) == -1.0
