"""One moment has one name, wherever it is written: in ids, tables and logs, on a server of any time zone."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.clock import utc
from gadgets.journal import JobRow, Journal
from gadgets.log_lines import LOG_FORMAT, OneLine
from gadgets.monitor.files import begun
from gadgets.pacs import Attempt, Destination
from gadgets.pacs_queue import Pauses, Queue
from gadgets.spool import Spool
from tests.waiting import PATIENCE

STEM = "20261101T053000.250000Z-0a1b2c3d"
"""An hour that comes twice in New York."""
MOMENT = 1793511000.25
WORDS = "2026-11-01 05:30:00Z"
WIDE = {"COLUMNS": "250"}


@pytest.fixture(autouse=True)
def new_york(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "America/New_York")
        time.tzset()
        assert time.localtime(MOMENT).tm_hour == 1
        yield
    time.tzset()


def test_words_and_ids_agree() -> None:
    assert begun(STEM) == MOMENT and utc(MOMENT) == WORDS


def test_the_table_of_jobs(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.put(JobRow(STEM, "fourier", "sent", received=MOMENT, started=MOMENT, finished=MOMENT + 2.0))
    journal.close()
    done = CliRunner().invoke(app, ["jobs", "--spool", str(tmp_path)], env=WIDE)
    [line] = [line for line in done.output.splitlines() if STEM in line]
    assert WORDS in line
    done = CliRunner().invoke(app, ["jobs", "--spool", str(tmp_path), "--json"])
    assert json.loads(done.output)[0]["received"] == MOMENT


def test_the_table_of_transfers(tmp_path: Path) -> None:
    file = tmp_path / "image.dcm"
    file.write_bytes(b"x")
    queue = Queue(tmp_path / "queue", Pauses(), now=lambda: MOMENT)
    job = queue.put([file], Destination("127.0.0.1", 104, "ARCHIVE"))
    done = CliRunner().invoke(app, ["pacs", "queue", "--queue", str(tmp_path / "queue")], env=WIDE)
    [line] = [line for line in done.output.splitlines() if job.id in line]
    assert WORDS in line and job.id.startswith("20261101-053000")


def test_the_log() -> None:
    record = logging.makeLogRecord(
        {"name": "gadgets.x", "levelname": "INFO", "msg": "event=y", "created": MOMENT, "msecs": 250.0}
    )
    assert OneLine(LOG_FORMAT).format(record) == "2026-11-01 05:30:00.250Z level=INFO logger=gadgets.x event=y"


FORWARDER = """
import logging
from gadgets.openrecon_forward import log_to_stderr
log_to_stderr()
record = logging.makeLogRecord({"name": "x", "levelname": "INFO", "levelno": 20, "msg": "event=y", "created": %r, "msecs": 250.0})
logging.getLogger().handle(record)
"""


def test_the_log_of_the_forwarder() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORWARDER % MOMENT], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    assert done.stderr == "2026-11-01 05:30:00.250Z level=INFO logger=x event=y\n"


def test_a_clock_that_jumps_ahead_makes_nothing_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raw data and what no archive took are gone for good when they are removed."""
    spool = Spool(tmp_path / "spool", min_free_bytes=0, max_age=86400.0)
    log = spool.open()
    log.append(b"\1\0")
    capture = log.finish("failed")
    assert capture is not None
    file, queue = tmp_path / "image.dcm", Queue(tmp_path / "queue", Pauses(attempts=1))
    file.write_bytes(b"x")
    job = queue.put([file], Destination("127.0.0.1", 104, "ARCHIVE"))
    queue.send_due(lambda files, *_: Attempt(left=files, problem="no association"))
    now = time.time
    monkeypatch.setattr("time.time", lambda: now() + 10 * 86400.0)
    spool._counted = -math.inf  # a minute later
    spool.make_room()
    queue.prune(86400.0)
    assert capture.exists() and len(list((tmp_path / "queue" / "failed" / job.id).glob("*.dcm"))) == 1
