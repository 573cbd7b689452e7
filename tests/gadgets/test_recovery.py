"""Jobs without a connection: what a dead server or client left, and retries."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gadgets.bookkeeping import Books
from gadgets.errors import CaptureGone, WorkerKilled
from gadgets.image_file import read_images
from gadgets.journal import JobRow
from gadgets.recovery import MAX_ATTEMPTS, require_capture
from gadgets.spool import Spool
from gadgets.wire import codec
from recon_core.errors import DataError
from tests.gadgets.left_behind import SESSION, STEM, Site, begin, over
from tests.gadgets.serving import HEADER, CountingScan, data
from tests.waiting import PATIENCE

FIRE = json.dumps({"version": "1.1.0", "parameters": {"weight": "7"}})
FIRE_SESSION = codec.config_file("fourier") + codec.header(HEADER) + codec.text(FIRE) + data(4) + codec.close()
RECENT = time.time() - 100.0
CAPTURES = Path(__file__).parent.parent / "data" / "wire-captures"


def pixel(root: Path, row: JobRow) -> complex:
    """The one image's value: readouts + 1j * waveforms."""
    path = row.images(root)
    assert path is not None
    [image] = read_images(path)
    return complex(image.data.flat[0])


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path / "spool")


# -- after the death of a server -----------------------------------------------------------------------------------------------


def test_a_complete_capture_without_a_row_is_reconstructed(site: Site) -> None:
    stem = site.left(1)
    with site.recovery() as (_, books):
        row = over(books, stem)
    assert (row.state, row.chain, row.n_readouts, row.n_images, row.attempts) == ("sent", "fourier", 5, 1, 1)
    assert "server ended" in row.why and row.capture == f"{stem}.mrd"
    assert pixel(site.root, row) == 5
    info = site.info(stem)
    assert info["status"] == "complete" and "it was complete" in info["note"]
    with site.recovery() as (recovery, books):
        assert over(books, stem) == row
        recovery.wake()
    assert len(site.opened) == 1, "once is enough"


def test_a_capture_that_was_cut_is_a_failed_job(site: Site) -> None:
    stem = site.left(1, SESSION[: -len(data(2)) + 100])
    with site.recovery() as (_, books):
        row = over(books, stem)
    assert row.state == "failed" and "cut" in row.why and "3 readouts" in row.why
    assert site.info(stem)["status"] == "truncated" and not site.opened
    assert (site.root / row.capture).exists(), "what was received is kept"


def test_what_is_no_scan_gets_no_row(site: Site) -> None:
    stem = site.left(1, codec.config_file("fourier"))
    site.left(2, b"")
    site.left(3, b"GET / HTTP/1.1\r\n\r\n")
    last = site.left(4)
    with site.recovery() as (_, books):
        over(books, last)
        assert [row.id for row in books.journal().rows()] == [last]
    assert "cut" in site.info(stem)["note"]


@pytest.mark.parametrize("state", ["received", "reconstructing"])
def test_an_open_row_of_a_dead_server_is_taken_up(site: Site, state: str) -> None:
    stem = site.left(1)
    with site.recovery(start=False) as (_, books):
        books.journal().put(
            JobRow(stem, "fourier", state, capture=f"{stem}.mrd", peer="192.0.2.7", owner="sdead", received=RECENT)  # type: ignore[arg-type]
        )
    with site.recovery() as (_, books):
        row = over(books, stem)
    assert (row.state, row.peer, row.received, row.attempts) == ("sent", "192.0.2.7", RECENT, 1)
    assert pixel(site.root, row) == 5 and site.info(stem)["status"] == "complete"


def test_a_scan_that_was_sent_is_not_repeated(site: Site) -> None:
    stem = site.left(1)
    with site.recovery(start=False) as (_, books):
        books.journal().put(JobRow(stem, "fourier", "sent", capture=f"{stem}.mrd", owner="sdead"))
    other = site.left(2)
    with site.recovery() as (_, books):
        over(books, other)
    assert len(site.opened) == 1
    assert site.info(stem)["status"] == "complete"


def test_a_row_whose_raw_data_were_never_kept(site: Site) -> None:
    with site.recovery(start=False) as (_, books):
        books.journal().put(JobRow("a", "fourier", "reconstructing", owner="sdead"))
        books.journal().put(JobRow("b", "fourier", "received", capture="b.mrd"))
    with site.recovery() as (_, books):
        assert "not kept" in over(books, "a").why
        assert "have been removed" in over(books, "b").why
    with pytest.raises(CaptureGone):
        require_capture(site.root, JobRow("a"))


def test_a_row_cannot_lead_out_of_the_spool(site: Site) -> None:
    site.left(1)
    elsewhere = site.root.parent / "elsewhere.mrd"
    elsewhere.write_bytes(SESSION)
    for row in (
        JobRow("a", capture="../elsewhere.mrd"),
        JobRow("a", capture=str(elsewhere)),
        JobRow("../a", capture=f"{STEM}1.mrd"),
    ):
        with pytest.raises(CaptureGone):
            require_capture(site.root, row)
    assert require_capture(site.root, JobRow("a", capture=f"{STEM}1.mrd")) == site.root / f"{STEM}1.mrd"


def test_a_scan_that_ends_every_server_is_given_up(site: Site) -> None:
    stem = site.left(1)
    with site.recovery(start=False) as (_, books):
        row = JobRow(stem, "fourier", "received", capture=f"{stem}.mrd", owner="sdead", attempts=MAX_ATTEMPTS)
        books.journal().put(row)
    with site.recovery() as (_, books):
        row = over(books, stem)
    assert row.state == "failed" and f"{MAX_ATTEMPTS} attempts" in row.why and not site.opened


def test_an_attempt_is_counted_before_it_begins(site: Site) -> None:
    seen: list[int] = []

    @dataclass
    class Counted(CountingScan):
        def finish(self) -> Iterator[bytes]:
            seen.append(held[0].journal().row(stem).attempts)
            return super().finish()

    stem, held = site.left(1), list[Books]()
    site.scan = Counted
    with site.recovery(start=False) as (recovery, books):
        held.append(books)
        begin(recovery, books)
        over(books, stem)
    assert seen == [1]


@dataclass
class FailingScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        if self.n_readouts == 4:
            raise DataError("no good", where="readout 1")
        return super().finish()


def test_a_job_that_fails_keeps_no_other_waiting(site: Site) -> None:
    site.scan = FailingScan
    bad, good = site.left(1, FIRE_SESSION), site.left(2)
    with site.recovery() as (_, books):
        assert over(books, good).state == "sent"
        row = over(books, bad)
    assert (row.state, row.why) == ("failed", "DataError: readout 1: no good")
    assert site.info(bad)["status"] == "failed"


def test_the_end_of_the_server_is_no_attempt(site: Site) -> None:
    begun = threading.Event()

    @dataclass
    class Slow(CountingScan):
        def finish(self) -> Iterator[bytes]:
            begun.set()
            while True:
                yield codec.text("DBG still at it\n")

    stem = site.left(1)
    site.scan = Slow
    with site.recovery():
        assert begun.wait(PATIENCE)
    with site.recovery(start=False) as (_, books):
        row = books.journal().row(stem)
        assert (row.state, row.owner, row.attempts) == ("received", "", 0)
    site.scan = CountingScan
    with site.recovery() as (_, books):
        assert over(books, stem).state == "sent"


def test_a_job_is_done_by_one_of_two(site: Site) -> None:
    stems = [site.left(number, info={}) for number in range(1, 6)]
    with site.recovery(start=False) as (_, books):
        for stem in stems:
            books.journal().put(JobRow(stem, "fourier", "received", capture=f"{stem}.mrd"))
    with site.recovery() as (_, one), site.recovery() as (_, other):
        for stem in stems:
            over(one, stem)
            over(other, stem)
    assert len(site.opened) == 5


def test_captures_that_wait_are_not_removed(site: Site) -> None:
    site.options = {"max_bytes": 1}
    kept: list[bool] = []

    @dataclass
    class Looking(CountingScan):
        def finish(self) -> Iterator[bytes]:
            spools[0].make_room(10)
            kept.append((site.root / f"{second}.mrd").exists())
            return super().finish()

    spools: list[Spool] = []
    first, second = site.left(1, info={}), site.left(2, info={})
    site.scan = Looking
    with site.recovery(start=False) as (_, books):
        for stem in (first, second):
            books.journal().put(JobRow(stem, "fourier", "received", capture=f"{stem}.mrd"))
    with site.recovery(start=False) as (recovery, books):
        spools.append(recovery._spool)
        begin(recovery, books)
        assert over(books, second).state == "sent"
        recovery._spool.held = frozenset
        recovery._spool.make_room(10)
    assert kept == [True, True]
    assert not list(site.root.glob("*.mrd")), "the limits hold afterwards"
    assert len(site.opened) == 2


@pytest.mark.parametrize("kind", ["acquisitions", "bucket", "recondata"])
def test_what_gadgetron_sent_is_reconstructed_as_well(site: Site, kind: str) -> None:
    stem = site.left(1, (CAPTURES / f"gadgetron_node_{kind}.bin").read_bytes())
    with site.recovery() as (recovery, books):
        row = over(books, stem)
        assert (row.origin, row.state) == ("node", "failed") and "names no chain" in row.why
        again = books.journal().add_retry(row, {"config": "fourier"})
        recovery.wake()
        row = over(books, again.id)
    assert (row.state, row.chain, row.versions["protocol"]) == ("sent", "fourier", "node")
    assert pixel(site.root, row).real == row.n_readouts > 0


def test_a_scan_whose_workers_die_is_tried_again_and_not_for_ever(site: Site) -> None:
    @dataclass
    class Deadly(CountingScan):
        def finish(self) -> Iterator[bytes]:
            if len(site.opened) < succeeds_at:
                raise WorkerKilled("a worker process died twice", where="reconstruct_slice")
            return super().finish()

    site.scan, succeeds_at = Deadly, 2
    stem = site.left(1)
    with site.recovery() as (_, books):
        row = over(books, stem)
    assert (row.state, row.attempts) == ("sent", 2)
    site.opened.clear()
    succeeds_at = 100
    stem = site.left(2)
    with site.recovery() as (_, books):
        row = over(books, stem)
    assert row.state == "failed" and "died twice" in row.why and len(site.opened) == MAX_ATTEMPTS


# -- retries ---------------------------------------------------------------------------------------------------------------------


def retried(site: Site, session: bytes, ask: Mapping[str, Any], status: str = "sent") -> tuple[JobRow, Any]:
    stem = site.left(1, session, {})
    with site.recovery() as (recovery, books):
        original = JobRow(stem, "fourier", status, capture=f"{stem}.mrd", received=RECENT)  # type: ignore[arg-type]
        books.journal().put(original)
        waiting = books.journal().add_retry(original, ask)
        recovery.wake()
        row = over(books, waiting.id)
        assert books.journal().row(stem) == original, "the scan's own row is not touched"
    return row, site.opened[-1] if site.opened else None


def test_a_retry_does_what_the_scanner_asked_for(site: Site) -> None:
    row, scan = retried(site, FIRE_SESSION, {})
    assert (row.state, row.origin, row.id) == ("sent", f"retry of {STEM}1", f"{STEM}1.r1")
    assert pixel(site.root, row) == 4
    assert (scan.request.name, dict(scan.request.overrides)) == ("fourier", {"weight": "7"})
    assert scan.raw.replayed and scan.raw.path == site.root / f"{STEM}1.mrd"


def test_a_retry_may_change_settings(site: Site) -> None:
    _, scan = retried(site, FIRE_SESSION, {"config": None, "set": {"other": "1"}})
    assert dict(scan.request.overrides) == {"weight": "7", "other": "1"}


def test_a_retry_with_another_chain_has_its_own_settings(site: Site) -> None:
    row, scan = retried(site, FIRE_SESSION, {"config": "cg_sense", "set": {"other": "1"}})
    assert (scan.request.name, dict(scan.request.overrides)) == ("cg_sense", {"other": "1"})
    assert row.chain == "cg_sense" and row.state == "sent"


LOGGED = {
    "another chain": (SESSION, {"config": "cg_sense"}, "cg_sense"),
    "another chain than FIRE's": (FIRE_SESSION, {"config": "cg_sense", "set": {"other": "1"}}, "cg_sense"),
    "another chain than Gadgetron's": (
        (CAPTURES / "gadgetron_node_bucket.bin").read_bytes(),
        {"config": "cg_sense"},
        "cg_sense",
    ),
    "another setting": (FIRE_SESSION, {"set": {"other": "1"}}, "fourier"),
}


@pytest.mark.parametrize("case", LOGGED)
def test_the_log_names_the_chain_of_the_retry(site: Site, caplog: pytest.LogCaptureFixture, case: str) -> None:
    session, ask, chain = LOGGED[case]
    with caplog.at_level(logging.INFO, "gadgets.connection"):
        row, _ = retried(site, session, ask)
    assert (row.state, row.chain) == ("sent", chain)
    lines = [record.getMessage() for record in caplog.records if record.name == "gadgets.connection"]
    begun, closed = (next(line for line in lines if f"event={event}" in line) for event in ("scan_started", "closed"))
    assert f"chain='{chain}'" in begun and f"chain='{chain}'" in closed and row.id in begun
    assert not any("fourier" in line for line in lines if chain != "fourier")


def test_a_scan_with_an_unknown_chain_can_be_rescued(site: Site) -> None:
    session = SESSION.replace(b"fourier", b"fuorier", 1)
    row, _ = retried(site, session, {}, "failed")
    assert row.state == "failed" and "no such chain" in row.why
    again = Site(site.root.parent / "again")
    row, scan = retried(again, session, {"config": "cg_sense"}, "failed")
    assert row.state == "sent" and scan.request.name == "cg_sense"


def test_a_retry_with_an_unknown_chain_fails_with_its_reason(site: Site) -> None:
    row, scan = retried(site, SESSION, {"config": "nonsense"})
    assert row.state == "failed" and "no such chain" in row.why and scan is None


@pytest.mark.parametrize(("missing", "n_readouts"), [(2, 5), (3, 4), (2 + len(data(2)), 3), (2 + len(data(2)) + 1, 2)])
def test_a_retry_of_a_cut_scan_takes_what_is_whole(site: Site, missing: int, n_readouts: int) -> None:
    row, scan = retried(site, SESSION[:-missing], {}, "failed")
    assert (row.state, row.n_readouts, row.n_images) == ("sent", n_readouts, 1)
    assert pixel(site.root, row) == n_readouts
    assert scan.raw.cut == f"the scan broke off after {n_readouts} readouts"


def test_a_retry_of_a_whole_scan_is_not_of_a_cut_one(site: Site) -> None:
    _, scan = retried(site, SESSION, {})
    assert scan.raw.cut == ""


UNREADABLE = {
    "half a header": codec.config_file("fourier") + codec.header(HEADER)[:-5],
    "no message": SESSION[: -2 - len(data(2))] + b"\xff\xff" + data(2),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_to_its_end_is_no_cut_scan(site: Site, name: str) -> None:
    row, _ = retried(site, UNREADABLE[name], {}, "failed")
    assert row.state == "failed" and row.why and row.images(site.root) is None


def test_an_older_result_is_replaced_whole(site: Site) -> None:
    first, _ = retried(site, SESSION, {})
    before = first.images(site.root)
    assert before is not None
    with site.recovery() as (_, books):
        second = books.journal().add_retry(first, {})
        row = over(books, second.id)
    assert row.images(site.root) != before and before.exists() and pixel(site.root, row) == 5
    assert replace(row, id="") != replace(first, id="")
