"""The queue to archives without any archive: whose turn it is, and how long what nobody took is kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gadgets.pacs import Attempt, Destination
from gadgets.pacs_queue import Job, Queue

DEAD, LIVING = Destination("192.0.2.1", 104, "DEAD"), Destination("192.0.2.2", 104, "LIVING")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.dcm"
    path.write_bytes(b"DICM")
    return path


class Archives:
    """Stands for the network: ``DEAD`` does not answer, the others take everything. Notes who was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.dead = True

    def __call__(self, files: list[Path], destination: Destination, stored: Callable[[Path], None]) -> Attempt:
        self.asked.append(destination.aet)
        if destination == DEAD and self.dead:
            return Attempt(left=list(files), problem="no association", silent=True)
        for path in files:
            stored(path)
        return Attempt(stored=list(files))


def filled(root: Path, image: Path, *destinations: Destination, clock: list[float]) -> tuple[Queue, list[Job]]:
    """A job a second, in this order."""
    queue, jobs = Queue(root, now=lambda: clock[0]), []
    for destination in destinations:
        jobs.append(queue.put([image], destination))
        clock[0] += 1
    return queue, jobs


def test_an_archive_that_does_not_answer_is_asked_once(image: Path, tmp_path: Path) -> None:
    archives = Archives()
    queue, jobs = filled(tmp_path / "queue", image, DEAD, DEAD, LIVING, DEAD, LIVING, clock=[1e9])
    done = queue.send_due(archives)
    assert archives.asked == ["DEAD", "LIVING", "LIVING"]
    assert [(job.id, job.left) for job in done] == [(jobs[0].id, 1), (jobs[2].id, 0), (jobs[4].id, 0)]
    assert {job.id: job.attempts for job in queue.jobs()} == {jobs[0].id: 1, jobs[1].id: 0, jobs[3].id: 0}


def test_those_that_answered_come_first_the_next_time(image: Path, tmp_path: Path) -> None:
    archives = Archives()
    queue, _ = filled(tmp_path / "queue", image, DEAD, DEAD, DEAD, clock=[1e9])
    queue.send_due(archives)
    queue.put([image], LIVING)
    archives.asked.clear()
    queue.send_due(archives)
    assert archives.asked == ["LIVING", "DEAD"]
    archives.dead = False  # it is asked in every call, so that it is noticed
    archives.asked.clear()
    assert [job.left for job in queue.send_due(archives)] == [0] and archives.asked == ["DEAD"]


def test_a_refusal_is_an_answer(image: Path, tmp_path: Path) -> None:
    """One object that an archive does not take must not keep the others from it."""
    asked = []

    def refuse(files: list[Path], destination: Destination, stored: Callable[[Path], None]) -> Attempt:
        asked.append(destination)
        return Attempt(left=list(files), problem="1 refused: status 0xA700")

    queue, _ = filled(tmp_path / "queue", image, LIVING, LIVING, clock=[1e9])
    queue.send_due(refuse)
    assert asked == [LIVING, LIVING]
