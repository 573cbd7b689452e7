"""Rows of real connections: what is written when, and that no scan waits for its row or fails with it."""

from __future__ import annotations

import json
import logging
import socket
import sqlite3
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gadgets import journal as journals
from gadgets.bookkeeping import Books, Entry
from gadgets.errors import WorkerDied
from gadgets.handlers import ScanFacts
from gadgets.image_file import read_images
from gadgets.job_images import write_image_file
from gadgets.journal import FILE_NAME, JobRow, Journal
from gadgets.scan_log import ScanLog
from gadgets.wire import codec
from gadgets.wire.events import Readouts
from recon_core.errors import DataError
from tests.gadgets.serving import HEADER, CountingScan, Served, count_image, data, serving
from tests.strict_client import Answer
from tests.waiting import PATIENCE

PATIENT = "Zuzana^Nowak"
SUBJECT = f"<subjectInformation><patientName>{PATIENT}</patientName></subjectInformation>"
NAMED = HEADER.replace("<encoding>", SUBJECT + "<encoding>", 1)


@dataclass
class Kept:
    served: Served
    books: Books
    root: Path

    def scan(self, chain: str = "fourier", n: int = 4, **options: Any) -> Answer:
        return self.served.client().scan(chain, header=NAMED, messages=[data(n)], **options)

    def rows(self) -> list[JobRow]:
        """When every connection has ended and everything is written."""
        self.served.ended()
        assert self.books.settle(PATIENCE)
        journal = Journal.open(self.root)
        try:
            return journal.rows()
        finally:
            journal.close()


@contextmanager
def keeping(tmp_path: Path, scan: type = CountingScan, **options: Any) -> Iterator[Kept]:
    books = Books(tmp_path / "spool", **options)
    with serving(tmp_path, scan) as served:
        served.server.handlers = replace(served.server.handlers, entry=books.entry)
        yield Kept(served, books, tmp_path / "spool")
    books.close()


@dataclass
class InformedScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        self.facts = ScanFacts("fourier", {"method": {"combine": "rss"}}, "cd" * 32, "llr")
        self.say("WRN the table moved")
        yield codec.text("WRN two lines are missing\n")
        yield count_image(1, series=1001)  # a preview
        yield count_image(self.n_readouts, series=1)
        yield count_image(self.n_readouts, series=2)


def test_a_scan_that_was_sent(tmp_path: Path) -> None:
    with keeping(tmp_path, InformedScan) as kept:
        assert len(kept.scan().images) == 3
        [row] = kept.rows()
    [capture] = kept.root.glob("*.mrd")
    assert (row.id, row.capture) == (capture.stem, capture.name)
    assert (row.state, row.why, row.origin, row.peer) == ("sent", "", "connection", "127.0.0.1")
    assert (row.chain, row.n_readouts, row.n_images, row.fallback, row.weights) == ("fourier", 4, 2, "llr", "cd" * 32)
    assert row.settings == {"method": {"combine": "rss"}}
    assert row.warnings == ("the table moved", "two lines are missing")
    assert row.versions["protocol"] == "server" and row.versions["torch"] and row.versions["recon-gadgets"]
    assert row.received is not None and row.started is not None and row.finished is not None
    assert row.received <= row.started <= row.finished
    assert set(row.timings) == {"receiving", "flush", "first_image", "last_image"}
    assert row.timings["first_image"] <= row.timings["last_image"]


def test_a_row_is_written_when_the_raw_data_are_on_the_device(tmp_path: Path) -> None:
    books, seen = Books(tmp_path), []

    def force() -> str:
        seen.append(Journal(tmp_path).counts()["received"])
        return ""

    books.put(JobRow("a"), force)
    assert books.settle(PATIENCE)
    seen.append(Journal(tmp_path).counts()["received"])
    assert seen == [0, 1]
    books.close()
    assert books.settle(0.0), "nothing is waited for when the writer has ended"


def test_raw_data_that_cannot_be_forced_to_the_device_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    books = Books(tmp_path)
    books.put(JobRow("a"), lambda: "Input/output error")
    assert books.settle(PATIENCE) and "event=capture_not_flushed" in caplog.text
    books.close()


def test_flushing_works_after_the_log_has_ended(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        log = served.server.spool.open()
        log.append(b"x" * 100)
        force = log.flush()
        log.finish("complete")
        assert force() == ""
        assert served.server.spool.open().flush()() == "", "nothing to flush"


def test_nothing_about_the_patient(tmp_path: Path) -> None:
    with keeping(tmp_path, InformedScan) as kept:
        kept.scan()
        kept.rows()
        written = b"".join(path.read_bytes() for path in kept.root.glob(FILE_NAME + "*"))
    assert b"fourier" in written and b"127.0.0.1" in written
    assert PATIENT.encode() not in written and b"Nowak" not in written
    assert PATIENT.encode() in next(kept.root.glob("*.mrd")).read_bytes()


@dataclass
class FailingScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        yield count_image(1)
        if self.request.name == "fourier":
            raise DataError("channels changed", where="readout 7", got=3, expected=4)
        raise ValueError(PATIENT)


@pytest.mark.parametrize(
    ("chain", "why"), [("fourier", "DataError: readout 7: channels changed; got 3; expected 4"), ("cg_sense", "ValueError")]
)
def test_a_scan_that_failed(tmp_path: Path, chain: str, why: str) -> None:
    with keeping(tmp_path, FailingScan) as kept:
        kept.scan(chain)
        [row] = kept.rows()
    assert (row.state, row.why, row.n_images, row.chain) == ("failed", why, 1, chain)
    assert row.finished is not None


def test_a_scan_whose_workers_died_waits_for_another_attempt(tmp_path: Path) -> None:
    @dataclass
    class Deadly(CountingScan):
        def finish(self) -> Iterator[bytes]:
            raise WorkerDied("a worker process died twice", where="reconstruct_slice")

    with keeping(tmp_path, Deadly) as kept:
        assert any("died twice" in text for text in kept.scan().texts), "the operator hears of it all the same"
        [row] = kept.rows()
    assert (row.state, row.owner) == ("received", "") and "died twice" in row.why


def test_an_unknown_chain(tmp_path: Path) -> None:
    with keeping(tmp_path) as kept:
        kept.scan("defualt.xml")
        [row] = kept.rows()
    assert row.state == "failed" and "no such chain" in row.why and row.n_readouts == 4 and row.capture


def test_a_scan_that_was_cut(tmp_path: Path) -> None:
    with keeping(tmp_path) as kept:
        kept.scan(close=False)
        [row] = kept.rows()
    assert row.state == "failed" and "before its CLOSE" in row.why and row.n_readouts == 4
    assert (kept.root / row.capture).exists()


def test_queries_and_noise_are_no_scans(tmp_path: Path) -> None:
    with keeping(tmp_path) as kept:
        kept.served.client().scan(query="gadgetron::info")
        kept.served.client().scan("fourier")
        kept.scan()
        assert len(kept.rows()) == 1


@dataclass
class PatientScan(CountingScan):
    """Two images, and between them the peer's end."""

    def finish(self) -> Iterator[bytes]:
        yield count_image(1)
        PatientScan.begun.set()
        assert PatientScan.gone.wait(PATIENCE)
        while True:
            yield codec.text("DBG still at it\n")

    begun = threading.Event()
    gone = threading.Event()


@pytest.fixture
def fresh_events() -> None:
    PatientScan.begun, PatientScan.gone = threading.Event(), threading.Event()


def leave(kept: Kept) -> None:
    with socket.create_connection(("127.0.0.1", kept.served.server.port)) as connection:
        connection.sendall(codec.config_file("fourier") + codec.header(NAMED) + data(4) + codec.close())
        assert PatientScan.begun.wait(PATIENCE)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    PatientScan.gone.set()


def test_a_peer_that_left_leaves_a_job(tmp_path: Path, fresh_events: None) -> None:
    left: list[JobRow] = []
    with keeping(tmp_path, PatientScan, keep_images=True) as kept:
        kept.books.left = left.append
        leave(kept)
        [row] = kept.rows()
        assert [waiting.id for waiting in Journal.open(kept.root).waiting()] == [row.id]
    assert (row.state, row.owner, row.finished) == ("received", "", None) and "peer left" in row.why
    assert left == [row]
    assert not list(kept.root.rglob("images*")), "they will be made again"


def test_a_peer_that_left_without_raw_data_is_a_failure(tmp_path: Path, fresh_events: None) -> None:
    with keeping(tmp_path, PatientScan) as kept:
        kept.served.server.spool.min_free_bytes = 1 << 62
        leave(kept)
        [row] = kept.rows()
    assert row.state == "failed" and row.capture == "" and row.why


def test_images_are_kept_as_they_were_sent(tmp_path: Path) -> None:
    with keeping(tmp_path, InformedScan, keep_images=True) as kept:
        over: list[JobRow] = []
        kept.books.over = over.append
        answer = kept.scan()
        [row] = kept.rows()
        assert over == [row]
        folder = kept.root / row.folder
        assert write_image_file(folder) == 3 and write_image_file(folder) == 0
    found = list(read_images(folder / "images.h5"))
    assert sorted(image.data.tobytes() for image in found) == sorted(image.data.tobytes() for image in answer.images)
    assert [path.name for path in folder.iterdir()] == ["images.h5"]


def test_images_for_an_archive_that_cannot_be_kept_are_missed_loudly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with keeping(tmp_path, InformedScan, archive=True) as kept:
        kept.scan()
        kept.served.server.spool.min_free_bytes = 1 << 62
        assert len(kept.scan().images) == 3
        missed, due = kept.rows()
    assert (due.archive, missed.archive, missed.state) == ("due", "failed", "sent")
    assert any("not sent to the archive" in warning for warning in missed.warnings)
    assert "event=archive_failed" in caplog.text


# -- a journal that does not work ----------------------------------------------------------------------------------------------


@dataclass
class DetailedScan(InformedScan):
    """A row that needs pages of its own in the file."""

    def finish(self) -> Iterator[bytes]:
        yield from super().finish()
        self.facts.settings = {"method": {"words": "x" * 20_000}}


def locked(root: Path) -> Callable[[], None]:
    database = sqlite3.connect(root / FILE_NAME, isolation_level=None, check_same_thread=False)
    database.execute("BEGIN IMMEDIATE")
    return lambda: (database.execute("ROLLBACK") and None) or None


def full(root: Path, books: Books) -> Callable[[], None]:
    database = books.journal()._database
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages}")
    return lambda: (database.execute("PRAGMA max_page_count = 1000000") and None) or None


@pytest.mark.parametrize("trouble", ["locked", "full"])
def test_scans_go_on_and_rows_are_written_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    monkeypatch.setattr(journals, "BUSY_SECONDS", 0.05)
    with keeping(tmp_path, DetailedScan) as kept:
        kept.books.journal()
        better = locked(kept.root) if trouble == "locked" else full(kept.root, kept.books)
        for _ in range(4):
            assert len(kept.scan().images) == 3
        assert kept.books.settle(PATIENCE)
        errors = [record for record in caplog.records if "event=journal_failed" in record.getMessage()]
        assert errors and all(record.levelno == logging.ERROR for record in errors)
        assert Journal.open(kept.root).counts()["sent"] < 4
        better()
        assert len(kept.scan().images) == 3
        assert [row.state for row in kept.rows()] == ["sent"] * 5


def test_no_journal_at_all(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spool" / FILE_NAME).mkdir(parents=True)
    with keeping(tmp_path, InformedScan) as kept:
        assert len(kept.scan().images) == 3
        kept.served.ended()
        assert kept.books.settle(PATIENCE) and "event=journal_failed" in caplog.text
    assert json.loads(next(kept.root.glob("*.json")).read_text())["status"] == "complete"


def test_a_damaged_journal_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spool").mkdir()
    (tmp_path / "spool" / FILE_NAME).write_bytes(b"\xff" * 8192)
    with keeping(tmp_path) as kept:
        kept.scan()
        assert [row.state for row in kept.rows()] == ["sent"]
    assert "event=journal_damaged" in caplog.text
    [aside] = kept.root.glob("*damaged*")
    assert aside.read_bytes() == b"\xff" * 8192


def test_without_a_spool_there_is_no_journal(tmp_path: Path) -> None:
    books = Books(None)
    entry = books.entry("192.0.2.1")
    assert isinstance(entry, Entry)
    entry.received(None, "fourier", 1, "server")
    entry.sent(count_image(1))
    entry.end(
        None, ScanFacts(), complete=True, delivered=True, stopping=False, raw=None, chain="", n_readouts=1, protocol="server"
    )
    assert entry.row is None and books.settle(PATIENCE)
    books.close()


def test_a_bug_in_the_bookkeeping_ends_no_later_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def broken(row: JobRow) -> None:
        raise RuntimeError("a bug")

    books = Books(tmp_path)
    books.put(JobRow("a"), then=broken)
    books.put(JobRow("b"))
    assert books.settle(PATIENCE) and "event=journal_crashed" in caplog.text
    assert books.journal().counts()["received"] == 2
    books.close()


def test_who_needs_a_log_is_told_what_it_is(tmp_path: Path) -> None:
    """The early work of a scan happens while readouts come in: events pass through as before."""
    seen: list[int] = []

    @dataclass
    class Looking(CountingScan):
        def readouts(self, event: Readouts) -> None:
            super().readouts(event)
            assert isinstance(self.raw, ScanLog) and not self.raw.replayed
            seen.append(len(event))

    with keeping(tmp_path, Looking) as kept:
        kept.scan(n=6)
        kept.rows()
    assert sum(seen) == 6
