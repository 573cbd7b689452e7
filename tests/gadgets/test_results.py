"""Images of jobs that are over: what stands in the way of their file today is tried again, and is said when it stays."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gadgets.bookkeeping import Books
from gadgets.errors import JobFailed
from gadgets.image_file import read_images
from gadgets.job_images import IMAGES, MESSAGES
from gadgets.jobs import Jobs
from gadgets.journal import JobRow
from gadgets.results import MOST_TRIES, Handed, Results
from tests.gadgets.serving import count_image
from tests.gadgets.test_job_images import kept
from tests.waiting import PATIENCE

STEM = "20260101T000000.000000Z-00000001"


@pytest.fixture
def books(tmp_path: Path) -> Iterator[Books]:
    (tmp_path / "spool").mkdir()
    made = Books(tmp_path / "spool")
    yield made
    made.close()


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    running = Jobs(0, rehearse=False)
    yield running
    running.close()


@pytest.fixture
def no_workers() -> Jobs:
    """Every task fails at once with ``JobFailed``, as when no worker can be started."""
    closed = Jobs(0)
    closed.close()
    return closed


def ended(books: Books, id: str = STEM, *, owner: str | None = None, state: str = "sent") -> JobRow:
    """A job that is over and whose images are still the messages that went out."""
    assert books.root is not None
    row = JobRow(id, "fourier", state, capture=f"{STEM}.mrd", owner=books.token if owner is None else owner, n_images=2)  # type: ignore[arg-type]
    kept(books.root / row.folder, count_image(1, series=1), count_image(2, series=1))
    books.journal().put(row)
    return row


def folder_of(books: Books, row: JobRow) -> Path:
    assert books.root is not None
    return books.root / row.folder


def pixels(books: Books, row: JobRow) -> list[complex]:
    return [complex(image.data.flat[0]) for image in read_images(folder_of(books, row) / IMAGES)]


def caught_up(results: Results, books: Books, row: JobRow) -> None:
    deadline = time.monotonic() + PATIENCE
    while results._working or not (folder_of(books, row) / IMAGES).exists():  # the file is there before its task has ended
        assert time.monotonic() < deadline, "no image file was made"
        results.catch_up(books.journal())
        time.sleep(0.01)


def test_without_a_worker_the_images_wait(
    books: Books, jobs: Jobs, no_workers: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gadgets.results.FIRST_PAUSE", 0.0)
    row, results = ended(books), Results(books.root, books, no_workers)  # type: ignore[arg-type]
    with caplog.at_level(logging.WARNING):
        results.over(row)
    assert "event=images_later" in caplog.text and "images_not_kept" not in caplog.text
    assert (folder_of(books, row) / MESSAGES).exists()
    results._jobs = jobs  # workers are back
    caught_up(results, books, row)
    assert pixels(books, row) == [1, 2] and not (folder_of(books, row) / MESSAGES).exists()
    assert not results._tried


def test_between_two_tries_there_is_a_pause(books: Books, jobs: Jobs, no_workers: Jobs) -> None:
    row, results = ended(books), Results(books.root, books, no_workers)  # type: ignore[arg-type]
    results.over(row)
    results._jobs = jobs
    results.catch_up(books.journal())
    assert not (folder_of(books, row) / IMAGES).exists() and not results._working


def test_it_is_said_when_it_does_not_pass(
    books: Books, no_workers: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gadgets.results.FIRST_PAUSE", 0.0)
    row, results = ended(books), Results(books.root, books, no_workers)  # type: ignore[arg-type]
    results.over(row)
    for _ in range(MOST_TRIES + 3):
        results.catch_up(books.journal())
    said = [record.getMessage().split()[0] for record in caplog.records if record.name == "gadgets.results"]
    assert said == ["event=images_later"] * (MOST_TRIES - 1) + ["event=images_not_kept"]
    assert (folder_of(books, row) / MESSAGES).exists(), "the next server tries again"


def test_a_disk_that_was_full_is_tried_again(books: Books, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadgets.results.FIRST_PAUSE", 0.0)
    row, results = ended(books), Results(books.root, books, jobs)  # type: ignore[arg-type]
    (folder_of(books, row) / IMAGES).mkdir()  # nothing can be put there
    results.over(row)
    results.close()
    assert results._tried
    (folder_of(books, row) / IMAGES).rmdir()
    caught_up(results, books, row)


@pytest.mark.parametrize("id", [STEM, f"{STEM}.r2"])
def test_what_a_dead_server_left_is_made_by_the_next(books: Books, jobs: Jobs, id: str) -> None:
    row = ended(books, id, owner="sdead")
    caught_up(Results(books.root, books, jobs), books, row)  # type: ignore[arg-type]
    assert pixels(books, row) == [1, 2]


def test_what_others_work_on_is_left_to_them(books: Books, jobs: Jobs) -> None:
    assert books.root is not None
    results, other = Results(books.root, books, jobs), Books(books.root)
    rows = [ended(books, STEM, owner=other.token), ended(books, STEM[:-1] + "2", state="reconstructing")]
    kept(books.root / "nobody.job", count_image(1))
    results.catch_up(books.journal())
    results.close()
    assert not any((folder_of(books, row) / IMAGES).exists() for row in rows)
    assert (books.root / "nobody.job" / MESSAGES).exists()
    other.close()


def test_twice_is_once(books: Books, jobs: Jobs) -> None:
    row, results = ended(books), Results(books.root, books, jobs)  # type: ignore[arg-type]
    for _ in range(20):
        results.over(row)
        results.catch_up(books.journal())
    results.close()
    assert pixels(books, row) == [1, 2] and not results._tried


def test_closing_waits_until_what_came_of_a_job_is_noted(books: Books, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    note = Results.note

    def slowly(results: Results, row: JobRow, handed: Handed) -> JobRow:
        time.sleep(0.2)
        return note(results, row, handed)

    monkeypatch.setattr(Results, "note", slowly)
    row = replace(ended(books), archive="due")
    books.journal().put(row)
    results = Results(books.root, books, jobs)  # type: ignore[arg-type]
    results.over(row)
    results.close()
    assert books.settle(PATIENCE) and books.journal().row(row.id).archive == "failed", "there is no archive"


def test_an_archive_waits_for_its_images(books: Books, no_workers: Jobs) -> None:
    """An image that is due is not given up for want of a worker."""
    row = JobRow(**{**ended(books).__dict__, "archive": "due"})
    books.journal().put(row)
    results = Results(books.root, books, no_workers)  # type: ignore[arg-type]
    results.over(row)
    assert books.settle(PATIENCE) and books.journal().row(row.id).archive == "due"
    with pytest.raises(JobFailed):
        no_workers.submit(os.getpid).result(5)
