"""Raw data are on the device before a job counts as received; where the device does not take them, row and operator say so."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gadgets.bookkeeping import NOT_FORCED, Books
from gadgets.errors import WorkerDied
from gadgets.journal import JobRow
from gadgets.wire.events import Readouts
from tests.gadgets.left_behind import Site, over
from tests.gadgets.serving import CountingScan
from tests.gadgets.test_bookkeeping import keeping
from tests.waiting import PATIENCE


@dataclass
class DeadlyWhileStreaming(CountingScan):
    """Its workers die before the peer's CLOSE."""

    def readouts(self, event: Readouts) -> None:
        raise WorkerDied("a worker process died twice", where="prepare")


def forced_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The device and number of every file that was forced to the device, as it happens."""
    forced: list[int] = []
    really = os.fsync

    def fsync(fd: int) -> None:
        forced.append(os.fstat(fd).st_ino)
        really(fd)

    monkeypatch.setattr("gadgets.scan_log.os.fsync", fsync)
    return forced


def test_a_scan_that_failed_while_it_came_in_is_forced_before_its_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced, known = forced_at(monkeypatch), list[int]()
    with keeping(tmp_path, DeadlyWhileStreaming) as kept:
        kept.books.left = lambda row: known.extend(forced)  # right after the row was written
        kept.scan()
        [row] = kept.rows()
        assert (row.state, row.owner) == ("received", "")
        assert (kept.root / row.capture).stat().st_ino in known
        assert row.timings["flush"] >= 0.0


@pytest.fixture
def broken_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that takes no raw data."""
    really = os.fsync

    def fsync(fd: int) -> None:
        really(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("gadgets.scan_log.os.fsync", fsync)
    monkeypatch.setattr("gadgets.connection.FORCED_SECONDS", PATIENCE)


def test_a_device_that_fails_is_told_to_the_operator_and_in_the_row(tmp_path: Path, broken_device: None) -> None:
    with keeping(tmp_path) as kept:
        answer = kept.scan()
        [row] = kept.rows()
    assert len(answer.images) == 1
    [text] = [text for text in answer.texts if NOT_FORCED in text]
    assert text.startswith("WRN ") and os.strerror(errno.EIO) in text
    assert row.state == "sent"
    [warning] = row.warnings
    assert text.strip() == f"WRN {warning}"


def test_the_row_of_a_failed_scan_says_it_as_well(tmp_path: Path, broken_device: None) -> None:
    with keeping(tmp_path, DeadlyWhileStreaming) as kept:
        kept.scan()
        [row] = kept.rows()
    assert row.state == "received"
    assert [warning for warning in row.warnings if warning.startswith(NOT_FORCED)]


def test_it_is_remembered_when_the_job_is_taken_up_again(tmp_path: Path) -> None:
    site = Site(tmp_path / "spool")
    stem = site.left(1, info={})
    warnings = ("the table moved", f"{NOT_FORCED} (Input/output error)")
    with site.recovery(start=False) as (_, books):
        books.journal().put(JobRow(stem, "fourier", "received", capture=f"{stem}.mrd", warnings=warnings))
    with site.recovery() as (_, books):
        row = over(books, stem)
    assert row.state == "sent" and row.warnings == warnings[1:]


def test_later_rows_of_the_same_job_keep_the_warning(tmp_path: Path) -> None:
    books = Books(tmp_path)
    row = JobRow("a", owner=books.token)
    books.put(row, lambda: "Input/output error")
    books.put(replace(row, state="reconstructing"))
    books.put(replace(row, state="sent", finished=1.0))
    assert books.settle(PATIENCE)
    assert books.journal().row("a").warnings == (f"{NOT_FORCED} (Input/output error)",)
    assert not books._unforced
    books.close()
