"""The journal: rows that outlive everything, for any number of readers."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gadgets import journal as journals
from gadgets.journal import STATES, JobRow, Journal, JournalDamaged, JournalError, Owner, UnknownJob

FULL = JobRow(
    id="20260101T000000.000000Z-00000001", chain="llr_t1", state="failed", why="SortError: where; got 1",
    received=1e9, started=1e9 + 1, finished=1e9 + 2.5, timings={"flush": 0.25}, n_readouts=7, n_images=3,
    settings={"method": {"weight": 0.5, "name": "x"}}, versions={"torch": "2.13.0"}, weights="ab" * 32, peer="192.0.2.7",
    origin="node", capture="20260101T000000.000000Z-00000001.mrd", fallback="fourier", warnings=("one", "two"),
    archive="queued", ask={"config": "llr"}, attempts=2, owner="s0",
)  # fmt: skip


def row(number: int, **changes: object) -> JobRow:
    stem = f"20260101T00000{number}.000000Z-0000000{number}"
    values = {"id": stem, "capture": f"{stem}.mrd", "received": 1e9 + number, **changes}
    return JobRow(**values)  # type: ignore[arg-type]


def test_a_row_comes_back_as_it_was(tmp_path: Path) -> None:
    written = Journal(tmp_path)
    written.put(FULL)
    assert Journal.open(tmp_path).row(FULL.id) == FULL
    written.update(FULL.id, state="sent", warnings=("three",))
    found = Journal.open(tmp_path).row(FULL.id)
    assert (found.state, found.warnings, found.why) == ("sent", ("three",), FULL.why)
    assert stat.S_IMODE((tmp_path / "journal.sqlite").stat().st_mode) == 0o600


def test_rows_are_listed_newest_first_and_counted(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number, state in enumerate(STATES):
        journal.put(row(number, state=state))
    journal.put(row(7, state="sent"))
    assert [found.received for found in journal.rows()] == [1e9 + 7, 1e9 + 3, 1e9 + 2, 1e9 + 1, 1e9]
    assert [found.state for found in journal.rows(limit=2)] == ["sent", "failed"]
    assert [found.received for found in journal.rows(state="sent")] == [1e9 + 7, 1e9 + 2]
    assert journal.counts() == {"received": 1, "reconstructing": 1, "sent": 2, "failed": 1}
    (tmp_path / "new").mkdir()
    assert Journal(tmp_path / "new").counts() == dict.fromkeys(STATES, 0)


def test_jobs_are_found_by_the_beginning_of_their_id(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.put(row(1))
    journal.put(row(2))
    retried = journal.add_retry(row(1), {})
    assert journal.find("20260101T000002").id == row(2).id
    assert journal.find("20260101T000001").id == row(1).id, "a scan and its retries are one scan"
    assert journal.find(row(1).id) == row(1), "an id is itself, also where it begins another's"
    assert journal.find(retried.id).id == retried.id
    for unknown in ("2026", "", "x' OR '1'='1", "%"):
        with pytest.raises(UnknownJob):
            journal.find(unknown)


def test_retries_point_to_their_scan(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.put(FULL)
    first = journal.add_retry(FULL, {"config": "llr", "set": {"weight": "1"}})
    again = journal.add_retry(first, {})
    assert (first.id, again.id) == (f"{FULL.id}.r1", f"{FULL.id}.r2")
    assert (first.chain, first.state, first.origin, first.capture) == (
        "llr",
        "received",
        f"retry of {FULL.id}",
        FULL.capture,
    )
    assert again.origin == f"retry of {first.id}"
    assert journal.row(first.id).ask == {"config": "llr", "set": {"weight": "1"}}
    assert (FULL.folder, first.folder) == (f"{FULL.id}.job", f"{FULL.id}.job/r1")


def test_one_of_many_takes_a_job_up(tmp_path: Path) -> None:
    journal, other = Journal(tmp_path), Journal(tmp_path)
    journal.put(row(1))
    assert [found.id for found in journal.waiting()] == [row(1).id]
    assert journal.claim(row(1), "sA") and not other.claim(row(1), "sB")
    assert journal.row(row(1).id).attempts == 1
    journal.update(row(1).id, state="sent")
    assert not journal.claim(journal.row(row(1).id), "sB"), "what is over is over"


HOLDS = """
import sys
from pathlib import Path
from gadgets.journal import Owner
print(Owner(Path(sys.argv[1]), server=True).token, flush=True)
sys.stdin.read()
"""


def test_the_jobs_of_a_process_wait_when_it_is_killed(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    token = process.stdout.readline().strip()
    journal.put(row(1, owner=token, state="reconstructing"))
    assert journal.is_alive(token) and journal.has_server() and not journal.waiting()
    process.kill()
    process.communicate()
    assert not journal.is_alive(token) and not journal.has_server()
    assert [found.id for found in journal.waiting()] == [row(1).id]
    mine = Owner(tmp_path, server=False)
    assert not (tmp_path / f".owner-{token}.lock").exists(), "what the dead left is tidied up"
    assert journal.is_alive(mine.token) and not journal.has_server()
    mine.close()
    mine.close()
    assert not journal.is_alive(mine.token)


def test_rows_are_bounded_and_open_ones_stay(tmp_path: Path) -> None:
    journal = Journal(tmp_path, max_rows=3)
    journal.put(row(0))
    for number in range(1, 7):
        journal.put(row(number, state="sent"))
    assert journal.prune() == 3
    assert [found.received for found in journal.rows()] == [1e9 + 6, 1e9 + 5, 1e9 + 4, 1e9]
    assert journal.prune(before=1e9 + 6) == 2
    assert [found.received for found in journal.rows()] == [1e9 + 6, 1e9]


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="no journal"):
        Journal.open(tmp_path)
    with pytest.raises(JournalError, match="cannot open"):
        Journal(tmp_path / "missing")
    (tmp_path / "journal.sqlite").write_bytes(b"certainly no database" * 100)
    with pytest.raises(JournalDamaged):
        Journal.open(tmp_path)
    aside = Journal.set_aside(tmp_path)
    assert aside.read_bytes().startswith(b"certainly")
    assert Journal(tmp_path).rows() == []


def test_a_journal_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    Journal(tmp_path).close()
    with sqlite3.connect(tmp_path / "journal.sqlite") as database:
        database.execute("PRAGMA user_version = 99")
    before = (tmp_path / "journal.sqlite").read_bytes()
    with pytest.raises(JournalError, match="newer version"):
        Journal.open(tmp_path)
    assert (tmp_path / "journal.sqlite").read_bytes() == before


def test_a_locked_journal_is_a_typed_error_and_may_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journals, "BUSY_SECONDS", 0.05)
    journal = Journal(tmp_path)
    journal.put(row(1))
    other = sqlite3.connect(tmp_path / "journal.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(JournalError, match="cannot write"):
        journal.put(row(2))
    assert [found.id for found in Journal.open(tmp_path).rows()] == [row(1).id]
    other.execute("ROLLBACK")
    journal.put(row(2))
    assert len(journal.rows()) == 2


def test_a_closed_journal_is_a_typed_error(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.close()
    journal.close()
    with pytest.raises(JournalError):
        journal.rows()


def test_images_are_found_when_they_are_there(tmp_path: Path) -> None:
    assert FULL.images(tmp_path) is None
    os.makedirs(tmp_path / FULL.folder)
    (tmp_path / FULL.folder / "images.h5").write_bytes(b"")
    assert FULL.images(tmp_path) == tmp_path / FULL.folder / "images.h5"


@pytest.mark.parametrize(("version", "strict"), [((3, 34, 1), False), ((3, 37, 0), True)])
def test_an_older_sqlite_keeps_a_journal_as_well(
    version: tuple[int, ...], strict: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sqlite3.sqlite_version_info", version)
    journal = Journal(tmp_path)
    [(made,)] = journal._database.execute("SELECT sql FROM sqlite_master WHERE name = 'jobs'").fetchall()
    assert ("STRICT" in made) == strict
    journal.put(FULL)
    assert journal.row(FULL.id) == FULL
    journal.close()
