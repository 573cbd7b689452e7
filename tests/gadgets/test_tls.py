"""TLS in front of the server: the same sessions, nothing for plain peers, and no peer that can hold up others."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gadgets.errors import ReplayFailed
from gadgets.listener import Access
from gadgets.peer import Timing
from gadgets.replay import replay
from gadgets.tls import ClientTls, ServerTls, TlsError, connect_tls, server_tls
from gadgets.wire import codec
from gadgets.wire.events import Close, Image, Text
from gadgets.wire.framing import FrameParser
from tests.gadgets.certificates import Authority, authority
from tests.gadgets.serving import HEADER, CountingScan, Served, count_image, data, serving
from tests.waiting import PATIENCE, until


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("ours"))


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("theirs"), "stranger")


@pytest.fixture
def served(tmp_path: Path, ours: Authority) -> Iterator[Served]:
    with serving(tmp_path, access=Access(tls=ServerTls(*ours.issue("server")), handshake_seconds=PATIENCE)) as running:
        yield running


SESSION = codec.config_file("fourier") + codec.header(HEADER) + data(5) + codec.close()


def dial(served: Served) -> socket.socket:
    return socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE)


def answer(end: socket.socket) -> tuple[list[Image], list[str], bool]:
    """Images, texts and whether a CLOSE came, until the end of the stream."""
    parser, images, texts, closed = FrameParser(role="client"), [], [], False
    while chunk := end.recv(1 << 16):
        for event in parser.feed(chunk):
            match event:
                case Image():
                    images.append(event)
                case Text():
                    texts.append(event.text)
                case Close():
                    closed = True
    return images, texts, closed


def scan(served: Served, tls: ClientTls, session: bytes = SESSION) -> tuple[list[Image], list[str], bool]:
    with connect_tls(dial(served), "127.0.0.1", tls, PATIENCE) as end:
        end.sendall(session)
        return answer(end)


def test_a_session_through_tls(served: Served, ours: Authority) -> None:
    images, texts, closed = scan(served, ClientTls(ours.certificate))
    assert closed and not texts and images[0].data.flat[0] == 5
    [(stored, info)] = served.captures()
    assert stored == SESSION and info["status"] == "complete"


@pytest.mark.parametrize("newest", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_another_implementation_of_the_client_s_side(served: Served, ours: Authority, newest: ssl.TLSVersion) -> None:
    """Python's ordinary TLS socket, one thread."""
    context = ssl.create_default_context(cafile=ours.certificate)
    context.maximum_version = newest
    with context.wrap_socket(dial(served), server_hostname="127.0.0.1") as end:
        assert end.version() in ("TLSv1.2", "TLSv1.3")
        end.sendall(SESSION)
        images, _, closed = answer(end)
    assert closed and len(images) == 1


def test_a_scan_that_comes_with_the_end_of_the_handshake(served: Served, ours: Authority) -> None:
    """In one piece with the client's last word of it; then the client waits for its images."""
    context = ssl.create_default_context(cafile=ours.certificate)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = context.wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
    with dial(served) as end:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                end.sendall(outgoing.read())
                incoming.write(end.recv(1 << 16))
        tls.write(SESSION)
        end.sendall(outgoing.read())
        parser, images = FrameParser(role="client"), list[Image]()
        while not parser.closed:
            piece = end.recv(1 << 16)
            assert piece, "the connection ended without a CLOSE"
            incoming.write(piece)
            try:
                while text := tls.read(1 << 16):
                    images += [event for event in parser.feed(text) if isinstance(event, Image)]
            except ssl.SSLWantReadError:
                continue
    assert len(images) == 1


@pytest.mark.filterwarnings("ignore:.*TLSv1_1 is deprecated:DeprecationWarning")
def test_old_tls_is_refused(served: Served, ours: Authority) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(ours.certificate)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError), context.wrap_socket(dial(served), server_hostname="127.0.0.1"):
        pass


@pytest.mark.parametrize("start", [SESSION, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + bytes(100), bytes(1000)])
def test_plain_peers_are_closed(served: Served, start: bytes) -> None:
    with dial(served) as plain:
        plain.sendall(start)
        got = b""
        try:
            while piece := plain.recv(1000):
                got += piece
        except ConnectionResetError:
            pass
        assert b"INF" not in got and len(got) < 100  # an alert of TLS at most
    assert served.captures() == [] and not served.scans


def test_silent_peers_hold_up_nobody_and_are_closed(tmp_path: Path, ours: Authority) -> None:
    tls = ServerTls(*ours.issue("server"))
    for seconds in (PATIENCE, 0.5):
        with serving(tmp_path, access=Access(tls=tls, handshake_seconds=seconds)) as served:
            silent = [dial(served) for _ in range(8)]
            silent[0].sendall(b"\x16\x03\x01")  # the beginning of a handshake, and no more
            if seconds == PATIENCE:
                assert scan(served, ClientTls(ours.certificate))[2], "others are served meanwhile"
            for peer in silent:
                assert seconds == PATIENCE or peer.recv(100) == b"", "closed when its time is over"
                peer.close()
            until(lambda: not len(served.server._listener.places), "their places are not free")


def test_certificates_of_peers(tmp_path: Path, ours: Authority, theirs: Authority) -> None:
    tls = ServerTls(*ours.issue("server"), client_ca=ours.certificate)
    with serving(tmp_path, access=Access(tls=tls)) as served:
        known = ClientTls(ours.certificate, *ours.issue("scanner"))
        assert scan(served, known)[2]
        for unknown in (ClientTls(ours.certificate), ClientTls(ours.certificate, *theirs.issue("scanner"))):
            try:
                images, texts, closed = scan(served, unknown)
            except (TlsError, OSError):
                continue  # TLS 1.2 says so in the handshake, 1.3 afterwards
            assert not images and not texts and not closed
        assert len(served.scans) == 1


def test_renewed_certificates_count_from_the_next_connection_on(
    tmp_path: Path, ours: Authority, theirs: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    files = [tmp_path / "server.pem", tmp_path / "server.key"]

    def put(*sources: str) -> None:
        for file, source in zip(files, sources, strict=True):
            file.write_bytes(Path(source).read_bytes())

    old, new = ours.issue("server"), theirs.issue("server")
    put(*old)
    with (
        serving(tmp_path, access=Access(tls=ServerTls(*map(str, files)))) as served,
        connect_tls(dial(served), "127.0.0.1", ClientTls(ours.certificate), PATIENCE) as begun,
    ):
        put(new[0], old[1])  # another's key: as long as the files are half renewed, those before them count
        assert scan(served, ClientTls(ours.certificate))[2]
        assert scan(served, ClientTls(ours.certificate))[2]
        assert caplog.text.count("tls_not_renewed") == 1, "told once"
        put(*new)
        assert scan(served, ClientTls(theirs.certificate))[2]
        with pytest.raises(TlsError, match="CERTIFICATE_VERIFY_FAILED"):
            scan(served, ClientTls(ours.certificate))
        begun.sendall(SESSION)
        assert answer(begun)[2], "a session that was begun goes on"


def test_the_client_verifies_the_server(served: Served, ours: Authority, theirs: Authority) -> None:
    for wrong in (ClientTls(theirs.certificate), ClientTls(), ClientTls(ours.certificate, server_name="scanner.example")):
        with pytest.raises(TlsError, match="CERTIFICATE_VERIFY_FAILED"):
            scan(served, wrong)


def test_a_server_without_tls(tmp_path: Path, ours: Authority) -> None:
    with serving(tmp_path) as served, pytest.raises(TlsError):
        connect_tls(dial(served), "127.0.0.1", ClientTls(ours.certificate), seconds=1.0)


RAW = Path(__file__).parent.parent / "data" / "wire-captures" / "replayed_with_waveforms.h5"


def test_a_replay_without_tls_to_a_port_that_speaks_it_is_told_the_option(served: Served) -> None:
    with pytest.raises(ReplayFailed, match=r"It may speak TLS \(--tls, or --tls-ca FILE.*or let in other addresses"):
        replay(RAW, port=served.server.port, config="fourier")


def test_a_replay_with_tls_to_a_plain_port_or_a_stranger_is_told_the_option(
    tmp_path: Path, served: Served, ours: Authority, theirs: Authority
) -> None:
    with pytest.raises(
        TlsError, match=r"127.0.0.1:\d+: no TLS.*Is --tls-ca the authority of its certificate, and --tls-name"
    ):
        replay(RAW, port=served.server.port, config="fourier", tls=ClientTls(theirs.certificate))
    with (
        serving(tmp_path / "plain") as plain,
        pytest.raises(TlsError, match=r"Does this port speak TLS\? A plain one is asked without --tls"),
    ):
        replay(RAW, port=plain.server.port, config="fourier", tls=ClientTls(ours.certificate))


def test_a_client_that_stops_sending_still_gets_its_answer(served: Served, ours: Authority) -> None:
    """The end of one direction does not end the other."""
    with connect_tls(dial(served), "127.0.0.1", ClientTls(ours.certificate), PATIENCE) as end:
        end.sendall(SESSION)
        end.shutdown(socket.SHUT_WR)
        images, _, closed = answer(end)
    assert closed and len(images) == 1


def test_a_client_that_vanishes(served: Served, ours: Authority) -> None:
    end = connect_tls(dial(served), "127.0.0.1", ClientTls(ours.certificate), PATIENCE)
    end.sendall(SESSION[:-2])
    end.close()
    until(lambda: served.scans and served.scans[0].abandoned)
    [(stored, info)] = served.captures()
    assert stored == SESSION[:-2] and info["status"] == "truncated"


class LargeScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        for i in range(40):
            yield count_image(1, series=i, shape=(512, 512))


def test_large_data_in_both_directions(tmp_path: Path, ours: Authority) -> None:
    with serving(tmp_path, LargeScan, access=Access(tls=ServerTls(*ours.issue("server")))) as served:
        session = codec.config_file("fourier") + codec.header(HEADER) + data(200, 16, 512) * 4 + codec.close()
        with connect_tls(dial(served), "127.0.0.1", ClientTls(ours.certificate), PATIENCE) as end:
            sender = threading.Thread(target=end.sendall, args=(session,))
            sender.start()
            images, _, closed = answer(end)
            sender.join()
        assert closed and len(images) == 40 and all((image.data == 1).all() for image in images)
        [(stored, _)] = served.captures()
        assert stored == session


def test_nothing_is_left_of_ended_connections(served: Served, ours: Authority) -> None:
    for _ in range(3):
        assert scan(served, ClientTls(ours.certificate))[2]
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("tls")])
    until(lambda: not len(served.server._listener.places))


def test_files_that_cannot_be_used(tmp_path: Path, ours: Authority) -> None:
    certificate, key = ours.issue("server")
    text = tmp_path / "text.pem"
    text.write_text("no certificate")
    for tls, named in (
        (ServerTls(str(tmp_path / "none.pem")), "none.pem"),
        (ServerTls(str(text)), "text.pem"),
        (ServerTls(certificate, str(text)), "text.pem"),
        (ServerTls(certificate, str(tmp_path / "none.pem")), r"TLS [^,]*none.pem"),
        (ServerTls(certificate, key, client_ca=str(text)), "text.pem"),
        (ClientTls(str(text)), "text.pem"),
        (ClientTls(ours.certificate, certificate), Path(certificate).name),
    ):
        with pytest.raises(TlsError, match=f"{named}: cannot use the TLS files"):
            tls.context()
    with pytest.raises(TlsError, match="no certificate"):
        server_tls(None, None, Path(ours.certificate))


def test_waits_hold_behind_tls(tmp_path: Path, ours: Authority) -> None:
    """A peer that says nothing, or reads nothing, after the handshake is given up as without TLS."""
    access = Access(tls=ServerTls(*ours.issue("server")), handshake_seconds=PATIENCE)
    with (
        serving(tmp_path / "silent", timing=Timing(handshake=0.2, linger=0.3), access=access) as served,
        connect_tls(dial(served), "127.0.0.1", ClientTls(ours.certificate), PATIENCE) as silent,
    ):
        images, texts, closed = answer(silent)
        assert closed and not images and "too long" in texts[0]
    with serving(tmp_path / "mute", LargeScan, timing=Timing(send=0.3, linger=0.3), access=access) as served:
        with connect_tls(dial(served), "127.0.0.1", ClientTls(ours.certificate), PATIENCE) as mute:
            mute.sendall(SESSION)
            listener = served.server._listener
            until(lambda: not len(listener.places) and not listener._bridges)
        [(_, info)] = served.captures()
        assert info["status"] == "failed" and "does not read" in info["note"]
