"""The accepting thread: nothing that one connection does ends it, and when it ends all the same, that is known."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gadgets import listener as listening
from gadgets.admission import Place
from gadgets.errors import JobFailed, WireError
from gadgets.jobs import Jobs
from gadgets.listener import Access, Listener
from gadgets.service import Service, ServiceOptions
from tests.gadgets.serving import serving, still_works
from tests.monitor.site import monitoring
from tests.waiting import PATIENCE, until


def break_socket(listener: Listener) -> None:
    """As if the kernel had taken it away: every accept fails from now on."""
    assert listener._socket is not None
    listener._socket.shutdown(socket.SHUT_RDWR)


def test_a_listener_runs_from_start_to_stop() -> None:
    listener = Listener("127.0.0.1", 0, lambda accepted, place: None)
    assert not listener.running
    listener.start()
    assert listener.running
    listener.stop()
    assert not listener.running


def refused(port: int) -> bool:
    with contextlib.closing(socket.socket()) as peer:
        return peer.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_a_claimed_address_is_nobody_elses_and_lets_nobody_in() -> None:
    served: list[Place] = []

    def serve(accepted: socket.socket, place: Place) -> None:
        served.append(place)
        accepted.close()
        place.leave()

    one = Listener("127.0.0.1", 0, serve)
    one.claim()
    port = one.port
    assert port and refused(port) and not one.running
    other = Listener("127.0.0.1", port, serve)
    other.claim()  # two that begin at the same moment: the kernel decides when one of them listens
    one.start()
    assert one.port == port and not refused(port)
    with pytest.raises(WireError, match=r"cannot listen.*in use"):
        other.start()
    with pytest.raises(WireError, match=r"cannot listen.*in use.*another server"):
        Listener("127.0.0.1", port, serve).claim()
    with pytest.raises(WireError, match=r"192\.0\.2\.1:.*cannot listen.*Name an address of this machine: --host"):
        Listener("192.0.2.1", 0, serve, Access(allow_any=True)).claim()
    until(lambda: served)
    one.stop()
    assert refused(port)
    left = Listener("127.0.0.1", port, serve)
    left.claim()
    left.stop()  # without a start
    with socket.create_server(("127.0.0.1", port)) as free:
        assert free.getsockname()[1] == port


def test_a_taken_port_is_said_before_the_workers_are_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def warm(self: Jobs) -> None:
        seen.append("refused" if refused(service.port) else "let in")

    monkeypatch.setattr(Jobs, "warm", warm)
    with other_socket() as taken:
        service = Service(ServiceOptions(port=taken, workers=0, threads=1, spool=tmp_path / "spool", rehearse=False))
        with pytest.raises(WireError, match=rf"127.0.0.1:{taken}.*in use"), service:
            pass
    assert seen == []
    service = Service(ServiceOptions(port=taken, workers=0, threads=1, spool=tmp_path / "spool", rehearse=False))
    with service:
        assert seen == ["refused"] and not refused(service.port)


def test_a_start_that_fails_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Jobs) -> None:
        raise JobFailed("no worker", where="the test")

    monkeypatch.setattr(Jobs, "warm", broken)
    service = Service(ServiceOptions(port=0, workers=0, threads=1, rehearse=False))
    with pytest.raises(JobFailed), service:
        pass
    assert service.port and service.jobs._closed
    with socket.create_server(("127.0.0.1", service.port)) as free:
        assert free.getsockname()[1] == service.port


@pytest.fixture
def for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket that broke is not opened again within this test."""
    monkeypatch.setattr(listening, "AGAIN_SECONDS", 3600.0)


@pytest.mark.usefixtures("for_good")
def test_a_listener_whose_socket_is_gone_does_not_run(caplog: pytest.LogCaptureFixture) -> None:
    listener = Listener("127.0.0.1", 0, lambda accepted, place: None)
    listener.start()
    with caplog.at_level(logging.CRITICAL):
        break_socket(listener)
        until(lambda: not listener.running)
    assert "event=listening_ended error=OSError" in caplog.text
    listener.stop()  # at once, although it waits


def test_a_socket_that_broke_is_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the same port; while another program has it, again and again."""
    monkeypatch.setattr(listening, "AGAIN_SECONDS", 0.05)
    monkeypatch.setattr(listening, "AGAIN_SECONDS_AT_MOST", 0.05)
    with serving(tmp_path) as served:
        port, own = served.server.port, served.server._listener
        for _ in range(2):
            with other_socket() as taken:
                own.port = taken  # what it finds when it tries
                break_socket(own)
                until(lambda: not served.server.is_listening)
                time.sleep(0.2)
                assert not served.server.is_listening
                own.port = port
            until(lambda: served.server.is_listening)
            assert served.server.port == port
            still_works(served)


@contextlib.contextmanager
def other_socket() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield int(other.getsockname()[1])


def test_a_connection_that_fails_in_an_odd_way_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    places: list[Place] = []

    def serve(accepted: socket.socket, place: Place) -> None:
        places.append(place)
        # a scanner without power is noticed within minutes, and a firewall does not forget one that pauses
        assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) <= 120
        if len(places) == 1:
            raise ValueError("odd")
        accepted.sendall(b"served")
        accepted.close()
        place.leave()

    listener = Listener("127.0.0.1", 0, serve)
    listener.start()
    try:
        with socket.create_connection(("127.0.0.1", listener.port), timeout=PATIENCE) as first:
            assert first.recv(10) == b""
        with socket.create_connection(("127.0.0.1", listener.port), timeout=PATIENCE) as second:
            assert second.recv(10) == b"served"
        until(lambda: len(listener.places) == 0)  # both have given theirs back
        assert listener.running
    finally:
        listener.stop()
    assert "event=dropped error=ValueError" in caplog.text


@pytest.mark.usefixtures("for_good")
def test_a_server_without_its_thread_says_so_and_ends(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        still_works(served)
        assert served.server.is_listening
        break_socket(served.server._listener)
        until(lambda: not served.server.is_listening)


@pytest.mark.usefixtures("for_good")
def test_healthz_says_that_nobody_is_let_in(tmp_path: Path) -> None:
    options = ServiceOptions(
        port=0, workers=0, threads=1, spool=tmp_path / "spool", observe=True, min_free_bytes=0, rehearse=False
    )
    with Service(options) as service, monitoring(tmp_path, tmp_path / "spool") as site:
        until(lambda: site.get("/healthz?check=server").code == 200)
        break_socket(service.server._listener)
        until(lambda: site.get("/healthz?check=server").code == 503)
        assert site.get("/healthz").json["reasons"] == ["server: the server does not accept connections"]
