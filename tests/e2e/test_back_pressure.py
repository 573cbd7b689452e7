"""A server whose workers are busy reads on: the scanner is never held up by computing."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import pytest

from gadgets.service import Service, ServiceOptions
from gadgets.wire import codec
from tests.e2e.scans import SimulatedScan, ask, in_memory, stack
from tests.strict_client import Answer, read_answer
from tests.waiting import PATIENCE, until

SEND_BUFFER, RECEIVE_BUFFER = 4096, 65536
"""Bytes; the kernel doubles them. Nothing else holds what is sent and not read."""


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """Many times as large as the buffers between the sockets."""
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=16, states=6, slices=2)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Service]:
    options = ServiceOptions(port=0, workers=1, threads=1, spool=tmp_path / "spool", min_free_bytes=0, rehearse=False)
    with Service(options) as running:
        listening = running.server._listener._socket
        assert listening is not None
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)  # connections have the same
        yield running


@contextmanager
def busy(service: Service, release: Path) -> Iterator[Future[object]]:
    """The only worker has a task that ends when ``release`` exists, and not before."""
    taken = release.with_name("taken")
    stuck = service.jobs.submit(
        subprocess.run, ["sh", "-c", 'touch "$0"; while [ ! -e "$1" ]; do sleep 0.05; done', str(taken), str(release)]
    )
    try:
        until(taken.exists)
        yield stuck
    finally:
        release.touch()


def test_a_whole_scan_is_read_and_kept_while_no_worker_is_free(site: Service, scan: SimulatedScan, tmp_path: Path) -> None:
    spool = site.spool.root
    assert spool is not None
    session = codec.config_file("fourier") + codec.header(scan.header) + b"".join(scan.messages) + codec.close()
    assert len(session) > 40 * (SEND_BUFFER + RECEIVE_BUFFER), "buffers alone must not hold it"
    answer = Answer()
    with busy(site, tmp_path / "release") as stuck, socket.socket() as scanner:
        scanner.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        scanner.settimeout(PATIENCE)
        scanner.connect((site.host, site.port))
        scanner.sendall(session)  # the last byte has left the scanner
        until(lambda: [p for p in spool.glob("*.mrd") if p.stat().st_size == len(session)], "what was sent is not kept")
        [capture] = spool.glob("*.mrd")
        assert capture.read_bytes() == session
        until(lambda: site.jobs.state.waiting, "the scan does not wait")
        assert not stuck.done(), "and its worker has not begun it"
        (tmp_path / "release").touch()
        read_answer(scanner, answer)
    assert stuck.result().returncode == 0  # type: ignore[attr-defined]
    assert len(answer.images) == 12 and not [text for text in answer.texts if text.startswith("ERR")]
    straight = ask(site, "fourier", scan)
    assert (stack(answer.images, 6) == stack(straight.images, 6)).all()
