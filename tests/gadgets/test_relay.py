"""What runs in the process that Gadgetron starts: whole answers, and one way out whatever dies."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gadgets import relay
from gadgets.listener import Access
from gadgets.node import node_request
from gadgets.openrecon_forward import Forwarder, tls_client
from gadgets.tls import ServerTls
from gadgets.wire import codec
from tests.gadgetron_stand_in import GadgetronCrashed, Received, connected, session
from tests.gadgets.certificates import Authority, authority
from tests.gadgets.serving import HEADER, Served, count_image, data, serving
from tests.waiting import PATIENCE
from tests.wire import streams

Core = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever listens is slow on a busy machine; all the others close."""
    monkeypatch.setattr(relay, "CONNECT_SECONDS", PATIENCE)
    monkeypatch.setattr(relay, "ANSWER_SECONDS", PATIENCE)


def relayed(core: Core, stream: bytes, **options: object) -> Received:
    """One session through a relay, with ``core`` in the place of whoever reconstructs."""
    (gadgetron, node), (ours, theirs) = socket.socketpair(), socket.socketpair()
    threads = [
        threading.Thread(target=relay.Relay(node).run, args=(ours, b"start"), daemon=True),
        threading.Thread(target=core, args=(theirs,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    received = session(gadgetron, stream, **options)  # type: ignore[arg-type]
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    return received


def read_to_close(core: socket.socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        got += core.recv(1 << 20)
    return got


SCAN = 200 * data(5, 4, 64) + codec.close()
SIZE = len(b"start") + len(SCAN)


def test_everything_goes_up_and_whole_messages_come_back() -> None:
    seen = []

    def core(end: socket.socket) -> None:
        seen.append(read_to_close(end, SIZE))
        answer = count_image(1) + count_image(2) + codec.close()
        for at in range(0, len(answer), 7):
            end.sendall(answer[at : at + 7])
        end.close()

    received = relayed(core, SCAN)
    assert seen == [b"start" + SCAN]
    assert [image.data.flat[0].real for image in received.images] == [1, 2] and not received.errors


def test_its_error_is_passed_on() -> None:
    def core(end: socket.socket) -> None:
        read_to_close(end, SIZE)
        end.sendall(count_image(1) + codec.error("SortError: no such line") + codec.close())
        end.close()

    received = relayed(core, SCAN)
    assert len(received.images) == 1 and received.errors == ["SortError: no such line"]


@pytest.mark.parametrize("after", [0, 1, 100, len(count_image(1)) - 1, len(count_image(1))])
def test_death_in_the_middle_of_an_answer(after: int) -> None:
    """Half an image is not sent: the ERROR behind it would be taken for pixels."""

    def core(end: socket.socket) -> None:
        read_to_close(end, SIZE)
        end.sendall(count_image(1) + count_image(2)[:after])
        end.close()

    received = relayed(core, SCAN)
    assert len(received.images) == 1 + (after == len(count_image(1)))
    assert received.errors == ["the reconstruction ended without an answer"]


def test_death_in_the_middle_of_the_scan() -> None:
    """What Gadgetron still sends is read, to its CLOSE: leaving earlier crashes it."""

    def core(end: socket.socket) -> None:
        end.recv(1000)
        end.close()

    received = relayed(core, data(5, 4, 64), after_error=lambda: 300 * data(5, 4, 512) + codec.close())
    assert len(received.errors) == 1


def test_death_before_anything_was_taken() -> None:
    received = relayed(lambda end: end.close(), SCAN)
    assert len(received.errors) == 1


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (codec.text("INF hello\n"), "message 5"),
        (streams.image(dtype="<i2"), "data type 2"),
        (struct.pack("<HQ", 8, 1 << 40), "too many words"),
    ],
)
def test_what_gadgetron_would_choke_on_is_not_passed_on(wrong: bytes, words: str) -> None:
    def core(end: socket.socket) -> None:
        read_to_close(end, SIZE)
        end.sendall(count_image(1) + wrong)
        while end.recv(1000):
            pass
        end.close()

    received = relayed(core, SCAN)
    assert len(received.images) == 1
    (error,) = received.errors
    assert words in error


def test_gadgetron_vanishes() -> None:
    (gadgetron, node), (ours, theirs) = socket.socketpair(), socket.socketpair()
    thread = threading.Thread(target=relay.Relay(node).run, args=(ours, b"start"), daemon=True)
    thread.start()
    gadgetron.sendall(data(5))
    gadgetron.close()
    seen = b"".join(iter(lambda: theirs.recv(1 << 16), b""))  # the end of the stream reaches the other side
    theirs.sendall(codec.error("x") + codec.close())
    theirs.close()
    thread.join(PATIENCE)
    assert not thread.is_alive() and seen == b"start" + data(5)


def test_a_refusal_is_said_and_everything_read() -> None:
    gadgetron, node = socket.socketpair()
    thread = threading.Thread(target=relay.Relay(node).refuse, args=("no torch\nhere",), daemon=True)
    thread.start()
    received = session(gadgetron, SCAN)
    thread.join(PATIENCE)
    assert received.errors == ["no torch here"]


def test_the_stand_in_is_unforgiving() -> None:
    """A node that leaves in the ways that were measured to break the real Gadgetron is caught."""
    stream = 20 * data(5, 4, 512)
    for leave in (
        b"",
        codec.error("said, but not read on"),
        codec.text("x"),
        streams.image(dtype="<i2"),
        codec.close() + b"\0",
    ):
        gadgetron, node = socket.socketpair()
        node.sendall(leave)
        node.close()
        with pytest.raises(GadgetronCrashed):
            session(gadgetron, stream)


# -- configuration ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (
            '<?xml version="1.0"?>\n<configuration>\n<property name="iterations" value="8"/></configuration>',
            {"iterations": "8"},
        ),
        ('<?xml version="1.0"?>\n', {}),
        ("<configuration/>", {}),
        ("<configuration />", {}),
        ("<configuration></configuration>", {}),
    ],
)
def test_the_target_becomes_a_property(text: str, settings: dict[str, str]) -> None:
    request = node_request(relay.with_chain(text, "llr"))
    assert request.name == "llr" and dict(request.overrides) == settings


# -- who reconstructs -------------------------------------------------------------------------------------------------------------


@contextmanager
def listening(answer: bytes) -> Iterator[int]:
    """Some other server."""

    def serve(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(100)
            peer.sendall(answer)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(PATIENCE)


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", codec.response(1, "4.7.2"), codec.response(2, "recon-gadgets 1")]
)
def test_another_server_gets_no_data(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Gadgetron itself, when somebody names its port."""
    monkeypatch.setattr(relay, "ANSWER_SECONDS", 1.0)
    with listening(answer) as port:
        monkeypatch.setenv(relay.SERVER, f"127.0.0.1:{port}")
        assert relay.find_server() is None


@pytest.mark.parametrize("address", ["none", "", "127.0.0.1:1", "no port"])
def test_no_server(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(relay.SERVER, address)
    assert relay.find_server() is None


def test_our_server_is_found_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gadgetron, node = socket.socketpair()
    with serving(tmp_path) as served:
        monkeypatch.setenv(relay.SERVER, f"127.0.0.1:{served.server.port}")
        thread = threading.Thread(
            target=relay.run, args=(node, "fourier", b"<configuration/>", HEADER.encode()), daemon=True
        )
        thread.start()
        received = session(gadgetron, data(5) + codec.close())
        thread.join(PATIENCE)
    assert received.images[0].data.flat[0] == 5 and served.scans[0].request.name == "fourier"


@pytest.fixture(params=["no certificate of ours", "only with one of ours"])
def tls_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Served, Authority]]:
    ours = authority(tmp_path / "ours")
    client_ca = ours.certificate if request.param.startswith("only") else None
    access = Access(tls=ServerTls(*ours.issue("server"), client_ca=client_ca))
    with serving(tmp_path, access=access) as served:
        yield served, ours


def test_a_server_that_speaks_only_tls_is_named_as_such(
    tls_server: tuple[Served, Authority], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else a site would have a warm server and wonder why every scan takes so long."""
    served, _ = tls_server
    monkeypatch.setenv(relay.SERVER, f"127.0.0.1:{served.server.port}")
    assert relay.find_server() is None
    (said,) = [record.message for record in caplog.records if record.name == relay.__name__]
    assert f"event=server_wants_tls address=127.0.0.1:{served.server.port}" in said
    assert "only TLS" in said and "slowly" in said and "docs/gadgetron.md" in said
    monkeypatch.setattr(relay.importlib, "import_module", no_such_module)
    with pytest.raises(relay.Failed, match=r"only TLS.*plain port.*on loopback"):
        relay.in_this_process()


def no_such_module(name: str) -> None:
    raise ModuleNotFoundError(f"No module named {name!r}")


@pytest.mark.parametrize("answer", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"])
def test_whoever_else_listens_speaks_no_tls(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "ANSWER_SECONDS", 1.0)
    with listening(answer) as port:
        assert not relay.speaks_tls(f"127.0.0.1:{port}")
    assert not relay.speaks_tls("127.0.0.1:1") and not relay.speaks_tls("no port")


def test_a_forwarder_is_the_plain_port_beside_a_server_with_tls(
    tls_server: tuple[Served, Authority], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As docs/gadgetron.md says, for ``<execute>`` and for ``<connect>``."""
    served, ours = tls_server
    secure = tls_client(ours.certificate, *ours.issue("gadgetron"))
    with Forwarder("127.0.0.1", 0, [f"127.0.0.1:{served.server.port}"], secure=secure) as forwarder:
        monkeypatch.setenv(relay.SERVER, f"127.0.0.1:{forwarder.port}")
        gadgetron, node = socket.socketpair()
        thread = threading.Thread(
            target=relay.run, args=(node, "fourier", b"<configuration/>", HEADER.encode()), daemon=True
        )
        thread.start()
        executed = session(gadgetron, data(5) + codec.close())
        thread.join(PATIENCE)
        text = '<configuration><property name="chain" value="fourier"/></configuration>'
        stream = codec.config_script(text) + codec.header(HEADER) + data(7) + codec.close()
        linked = session(connected(forwarder.port), stream)
    assert [received.images[0].data.flat[0] for received in (executed, linked)] == [5, 7]
    assert [scan.request.name for scan in served.scans] == ["fourier", "fourier"]


# -- the module that Gadgetron imports ----------------------------------------------------------------------------------------------


def test_chains_are_no_attributes_elsewhere() -> None:
    import gadgets

    assert not hasattr(gadgets, "llr")
    with pytest.raises(AttributeError, match="'llr'"):
        relay.target("llr")


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, gadgets.relay; print([m for m in ('torch', 'numpy', 'ismrmrd', 'h5py') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout.strip() == "[]"
