"""Who may connect, judged before the first byte."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadgets.admission import AllowList, Places, Quota, is_loopback, require_guarded
from gadgets.listener import Access, Listener
from gadgets.wire import codec
from recon_core.errors import SettingError
from tests.gadgets.serving import HEADER, counted, data, errors, serving, still_works
from tests.strict_client import ClientAborted
from tests.waiting import PATIENCE


@pytest.mark.parametrize(
    ("networks", "address", "allowed"),
    [
        ((), "203.0.113.9", True),
        (("10.1.2.0/24",), "10.1.2.255", True),
        (("10.1.2.0/24",), "10.1.3.0", False),
        (("10.1.2.0/24",), "::ffff:10.1.2.7", True),  # IPv4 through an IPv6 socket
        (("10.1.2.0/24",), "::ffff:10.1.3.7", False),
        (("10.1.2.0/24",), "127.0.0.1", False),  # nothing besides what is listed
        (("10.1.2.3",), "10.1.2.3", True),
        (("::1", "fe80::/10"), "fe80::1%eth0", True),
        (("::1",), "::2", False),
        (("0.0.0.0/0",), "::1", False),
        (("10.1.2.0/24",), "", False),
        (("10.1.2.0/24",), "10.1.2.3.example.com", False),
    ],
)
def test_allow_list(networks: tuple[str, ...], address: str, allowed: bool) -> None:
    assert AllowList(networks).allows(address) is allowed


@pytest.mark.parametrize(
    "text", ["", "10.1.2", "10.1.2.3/24", "scanner", "10.1.2.0/33", "::1/129", "10.1.2.0/24,10.2.0.0/16"]
)
def test_what_is_no_network_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match="neither an address nor a network"):
        AllowList([text])


@given(st.text(max_size=40))
def test_a_list_never_lets_in_what_is_no_address(text: str) -> None:
    assert not AllowList(["198.51.100.0/24"]).allows(text)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("", False),
        ("0.0.0.0", False),
        ("::", False),
        ("10.1.2.3", False),
        ("127.example.invalid", False),
        ("::ffff:127.0.0.1", True),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_an_open_address_needs_an_allow_list() -> None:
    for host in ("0.0.0.0", "::", "", "10.1.2.3"):
        with pytest.raises(SettingError, match="nothing says who may connect"):
            require_guarded(host, AllowList(), allow_any=False)
        with pytest.raises(SettingError, match="nothing says who may connect"):
            Listener(host, 0, lambda connection, place: None)
    require_guarded("0.0.0.0", AllowList(["10.0.0.0/8"]), allow_any=False)
    require_guarded("0.0.0.0", AllowList(), allow_any=True)
    require_guarded("127.0.0.1", AllowList(), allow_any=False)


def dial(port: int, source: str) -> socket.socket:
    """A connection from another address of this machine."""
    return socket.create_connection(("127.0.0.1", port), timeout=PATIENCE, source_address=(source, 0))


def test_a_peer_that_is_not_listed_is_closed_at_once_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), serving(tmp_path, access=Access(allow=("127.0.0.1",))) as served:
        for _ in range(5):
            with dial(served.server.port, "127.0.0.2") as refused:
                assert refused.recv(100) == b""
        still_works(served)
        assert len(served.scans) == 1
    lines = [record.getMessage() for record in caplog.records if "peer_refused" in record.getMessage()]
    assert lines == ["event=peer_refused address=127.0.0.2 reason='its address is in none of the allowed networks'"]


def test_one_peer_cannot_take_every_place(tmp_path: Path) -> None:
    quota = Quota(total=4, per_address=2, refusals=3, refusals_per_address=1)
    with serving(tmp_path, access=Access(quota=quota)) as served:
        port = served.server.port
        held = [dial(port, "127.0.0.2") for _ in range(2)]
        for connection in held:
            connection.sendall(codec.query("ismrmrd::version"))
            assert connection.recv(1), "is being served"
        refused = dial(port, "127.0.0.2")
        assert b"busy with 2 connections of this peer" in refused.recv(200)
        with dial(port, "127.0.0.2") as dropped:  # not even a thread for it
            assert dropped.recv(100) == b""
        still_works(served)  # another address
        for connection in (*held, refused):
            connection.close()


def test_refusals_do_not_take_the_places_of_scanners(tmp_path: Path) -> None:
    quota = Quota(total=2, per_address=1, refusals=4, refusals_per_address=4)
    with serving(tmp_path, access=Access(quota=quota)) as served:
        port = served.server.port
        held = [dial(port, "127.0.0.2") for _ in range(5)]
        for connection in held[1:]:
            assert b"busy" in connection.recv(200)
        assert counted(served.client().scan("fourier", header=HEADER, messages=[data(3)])) == 3
        for connection in held:
            connection.close()


def test_places_are_given_back_once() -> None:
    places = Places(Quota(total=1, per_address=1, refusals=1))
    first = places.take("a")
    assert first is not None and first.refusal is None
    second = places.take("b")
    assert second is not None and second.refusal
    assert places.take("c") is None
    first.leave()
    first.leave()
    again = places.take("c")
    assert again is not None and again.refusal is None
    for place in (second, again):
        place.leave()
    assert len(places) == 0 and not places._served and not places._refused


def test_a_refused_scan_gets_words(tmp_path: Path) -> None:
    with serving(tmp_path, access=Access(quota=Quota(total=0))) as served:
        answer = served.client().scan("fourier", header=HEADER, messages=[data(10)])
        assert "busy" in errors(answer)[0] and not answer.images
    with serving(tmp_path, access=Access(quota=Quota(total=0, refusals=0))) as served, pytest.raises(ClientAborted):
        served.client().scan("fourier", header=HEADER, messages=[data(10)])
