"""Nothing waits behind a job that takes hours: scans that lost their client, housekeeping, raw data that somebody needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from gadgets.bookkeeping import Books
from gadgets.journal import JobRow
from gadgets.recovery import Recovery
from tests.gadgets.left_behind import Site, begin, over
from tests.gadgets.serving import CountingScan
from tests.waiting import PATIENCE


@dataclass
class LongRetry:
    """A retry that goes on until it is let."""

    site: Site
    recovery: Recovery
    books: Books
    begun: threading.Event
    end: threading.Event


@contextmanager
def long_retry(root: Path, **options: object) -> Iterator[LongRetry]:
    site, begun, end = Site(root, options=dict(options)), threading.Event(), threading.Event()

    @dataclass
    class Slow(CountingScan):
        def finish(self) -> Iterator[bytes]:
            if self.request.name == "cg_sense":
                begun.set()
                assert end.wait(PATIENCE)
            return super().finish()

    site.scan = Slow
    stem = site.left(1, info={})
    with site.recovery(start=False) as (recovery, books):
        original = JobRow(stem, "fourier", "sent", capture=f"{stem}.mrd")
        books.journal().put(original)
        books.journal().add_retry(original, {"config": "cg_sense"})
        tidied = threading.Event()
        recovery.housekeeping = tidied.set
        begin(recovery, books)  # only now: a spool that is too small keeps no raw data that nobody waits for
        try:
            assert begun.wait(PATIENCE)
            assert tidied.wait(PATIENCE)  # or what a test leaves here could go before somebody waits for it
            yield LongRetry(site, recovery, books, begun, end)
        finally:
            end.set()


def test_a_scan_that_lost_its_client_does_not_wait_for_a_retry(tmp_path: Path) -> None:
    with long_retry(tmp_path / "spool") as retry:
        lost = retry.site.left(2, info={})
        retry.books.put(JobRow(lost, "fourier", "received", capture=f"{lost}.mrd"))
        assert over(retry.books, lost).state == "sent"
        assert not retry.end.is_set()


def test_scans_that_are_lost_meanwhile_are_seen_at_once(tmp_path: Path) -> None:
    """The journal is read again after each job."""
    site, order = Site(tmp_path / "spool"), list[str]()
    stems = [site.left(number, info={}) for number in range(1, 4)]

    @dataclass
    class Noted(CountingScan):
        def finish(self) -> Iterator[bytes]:
            order.append(self.raw.path.stem)
            if len(order) == 1:  # as the journal was when the look began, nothing else waited
                held[0].journal().put(JobRow(stems[1], "fourier", "received", capture=f"{stems[1]}.mrd"))
            return super().finish()

    site.scan, held = Noted, list[Books]()
    with site.recovery(start=False) as (recovery, books):
        held.append(books)
        for stem, received in ((stems[0], 1.0), (stems[2], 3.0)):
            books.journal().put(JobRow(stem, "fourier", "received", capture=f"{stem}.mrd", received=received))
        recovery._look_for_lost()
        assert sorted(order) == sorted(stems)


def test_housekeeping_does_not_wait_for_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadgets.recovery.HOUSEKEEPING_SECONDS", 0.0)
    with long_retry(tmp_path / "spool") as retry:
        kept = threading.Event()
        retry.recovery.housekeeping = kept.set
        assert kept.wait(PATIENCE)
        assert not retry.end.is_set()


def test_raw_data_of_rows_that_came_meanwhile_are_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of one that the journal's thread has not written yet: it is busy forcing raw data to the device."""
    with long_retry(tmp_path / "spool", max_bytes=1) as retry:
        forced, go_on = threading.Event(), threading.Event()

        def force() -> str:
            forced.set()
            assert go_on.wait(PATIENCE)
            return ""

        # of somebody else, who lives: nobody here takes them up
        written, unwritten, free = (retry.site.left(number, info={}) for number in (2, 3, 4))
        retry.books.journal().put(
            JobRow(written, "fourier", "reconstructing", capture=f"{written}.mrd", owner=retry.books.token)
        )
        retry.books.put(JobRow(unwritten, "fourier", "received", capture=f"{unwritten}.mrd", owner=retry.books.token), force)
        assert forced.wait(PATIENCE)
        retry.recovery._spool.make_room(10)
        go_on.set()
        left = {path.stem for path in retry.site.root.glob("*.mrd")}
        assert {written, unwritten} <= left and free not in left
        assert len(left) == 3, "that of the retry itself"
