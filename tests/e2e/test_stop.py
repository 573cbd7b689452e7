"""The end of a server: scans under way get their images first, within the time that it has; nobody waits for it longer than he wants."""

from __future__ import annotations

import re
import signal
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from gadgets.capture import capture_status
from gadgets.chain import load_chain
from gadgets.errors import GivenUp
from gadgets.jobs import Jobs
from gadgets.journal import JobRow, Journal, JournalError
from gadgets.pipeline import Scan, Services
from gadgets.server import Server
from gadgets.service import Service, ServiceOptions
from gadgets.spool import Spool
from gadgets.wire import codec
from gadgets.wire.events import Readouts
from gadgets.wire.framing import FrameParser
from gadgets.wire.header import parse_header
from tests.e2e.scans import SimulatedScan, in_memory
from tests.e2e.slow_chain import write_chain
from tests.e2e.test_cli import Serving, serving
from tests.strict_client import Answer, StrictClient
from tests.waiting import PATIENCE, until

LATE = 12.0
"""s that a scan computes after the server was told to stop: more than the 10 s after which servers used to abandon it."""


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return in_memory("cine", matrix_x=32, matrix_y=32, coils=4, states=2, slices=1, calibration="separate", acs=16)


@pytest.fixture
def chains(tmp_path: Path) -> Path:
    """``late`` computes for `LATE` s on any machine, and then its stand-in answers; ``endless`` does not end."""
    folder = tmp_path / "chains"
    folder.mkdir()
    write_chain(folder, "late", "moe_dqinr", "quick", preset="paper", iterations=20_000, time_limit=LATE)
    write_chain(folder, "endless", "moe_dqinr", "quick", preset="paper", iterations=20_000)
    write_chain(folder, "quick", "fourier")
    return folder


def asked(server: Serving, scan: SimulatedScan, chain: str) -> Future[Answer]:
    """A client in a thread of its own, and its scan in a worker when this returns."""
    client = StrictClient("127.0.0.1", server.port, timeout=PATIENCE)
    pool = ThreadPoolExecutor(1)
    answer = pool.submit(client.scan, chain, header=scan.header, messages=scan.messages)
    pool.shutdown(wait=False)
    until(lambda: answer.done() or [row for row in rows(server) if row.state == "reconstructing"])
    assert not answer.done(), answer.result()
    return answer


def rows(server: Serving) -> list[JobRow]:
    try:
        journal = Journal.open(server.spool)
    except JournalError:  # not there yet
        return []
    try:
        return journal.rows()
    finally:
        journal.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("told", ["the server", "every process"])
def test_a_scan_that_is_being_computed_is_answered_first(
    told: str, scan: SimulatedScan, chains: Path, tmp_path: Path
) -> None:
    """Docker tells the server to stop, systemd all of its processes (and so does Ctrl-C)."""
    options = ("--workers", "1", "--configs", str(chains), "--stop-seconds", str(PATIENCE))
    with serving(tmp_path / "server", *options) as server:
        answer = asked(server, scan, "late")
        process = psutil.Process(server.process.pid)
        for one in [process] if told == "the server" else [*process.children(recursive=True), process]:
            one.send_signal(signal.SIGTERM)
        until(lambda: "event=stopping" in server.log.read_text())
        assert len(answer.result(PATIENCE).images) == 2, answer.result().texts
        assert server.process.wait(PATIENCE) == 0
        [row] = rows(server)
        assert row.state == "sent"
        assert capture_status(server.spool / row.capture) == "complete"
        log = server.log.read_text()
        assert "event=abandoned" not in log
        assert "event=worker_died" not in log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_who_says_it_twice_does_not_wait(scan: SimulatedScan, chains: Path, tmp_path: Path) -> None:
    options = ("--workers", "1", "--configs", str(chains), "--stop-seconds", "86400")
    with serving(tmp_path / "server", *options) as server:
        answer = asked(server, scan, "endless")
        server.process.send_signal(signal.SIGTERM)
        until(lambda: "event=stopping" in server.log.read_text())
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(PATIENCE) == 0
        told = answer.result(PATIENCE)
        assert not told.images and any("the server is stopping" in text for text in told.texts)
        [row] = rows(server)
        assert (row.state, row.owner) == ("received", "") and "stopped" in row.why, "the next server makes its images"
        assert not re.search("event=(crashed|fallback|method_failed)", server.log.read_text())


def test_the_end_of_a_server_is_no_failure_of_a_method(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The slices that wait are told that nobody computes them any more: no stand-in is tried, none is counted."""
    scan = in_memory("cine", matrix_x=32, matrix_y=32, coils=4, states=2, slices=4, calibration="separate", acs=16)
    jobs, said = Jobs(0, threads=1, rehearse=False), list[str]()
    log = Spool(tmp_path / "spool").open()
    services = Services(jobs, previews=False)
    running = Scan(load_chain("cg_sense"), parse_header(scan.header), log, services, said.append)
    with FrameParser() as parser:
        for message in [codec.config_file("cg_sense"), codec.header(scan.header), *scan.messages]:
            log.append(message)
            for event in parser.feed(message):
                if isinstance(event, Readouts):
                    running.readouts(event)
    answer = running.finish()
    next(answer)
    jobs.close()
    with pytest.raises(GivenUp, match="the server is stopping"):
        list(answer)
    log.discard()
    assert not running.facts.fallback
    assert not [record for record in caplog.records if "cg_sense" in record.getMessage()], "neither a failure nor a fallback"
    assert not [words for words in said if words.startswith("WRN")]


@pytest.mark.parametrize("seconds", [10.0, 300.0])
def test_a_service_waits_as_long_as_it_is_told(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(Server, "close", lambda server, timeout=0.0, hurry=None: waited.append(timeout))
    service = Service(ServiceOptions(port=0, workers=0, stop_seconds=seconds, rehearse=False))
    service.close()
    assert waited == [seconds]
