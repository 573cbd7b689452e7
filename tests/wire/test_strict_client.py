"""The strict client itself: it must abort where the real one does. The servers here are scripts of a few lines."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from gadgets.wire import codec, events
from gadgets.wire.framing import FrameParser
from tests.strict_client import ClientAborted, StrictClient
from tests.waiting import PATIENCE
from tests.wire import streams


@contextmanager
def server(behave: Callable[[socket.socket], None]) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                behave(connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(PATIENCE)
        assert not thread.is_alive()


def drain(connection: socket.socket) -> list[events.Event]:
    parser, found = FrameParser(), []
    while not parser.closed and (piece := connection.recv(1 << 16)):
        found += parser.feed(piece)
    return found


def answering(*messages: bytes) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        drain(connection)
        connection.sendall(b"".join(messages))

    return behave


def scan(behave: Callable[[socket.socket], None], timeout: float = PATIENCE, **arguments: object) -> object:
    with server(behave) as port:
        return StrictClient("127.0.0.1", port, timeout=timeout).scan("a.xml", header=streams.HEADER, **arguments)  # type: ignore[arg-type]


def test_a_good_session() -> None:
    data = codec.acquisitions(*streams.readouts(5, 2, 8))
    answer = scan(
        answering(codec.text("hello"), streams.image(), codec.response(3, "r"), codec.close()),
        messages=[data],
    )
    assert answer.texts == ["hello"]  # type: ignore[attr-defined]
    assert answer.responses == [(3, "r")]  # type: ignore[attr-defined]
    (image,) = answer.images  # type: ignore[attr-defined]
    np.testing.assert_array_equal(image.data.ravel(), np.arange(12))


def test_what_is_sent() -> None:
    seen: list[events.Event] = []

    def behave(connection: socket.socket) -> None:
        seen.extend(drain(connection))
        connection.sendall(codec.close())

    with server(behave) as port:
        client = StrictClient("127.0.0.1", port, dialect="fire")
        client.scan(script="cg_sense", header="h", parameters={"config": "llr"}, query="gadgetron::info")
    assert [type(e).__name__ for e in seen] == ["Query", "ConfigScript", "HeaderText", "Text", "Close"]
    assert seen[2].offset - seen[1].offset == 6 + len("cg_sense") + 1  # the NUL is in the length
    assert seen[3].text == '{"version": "1.1.0", "parameters": {"config": "llr"}}'  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([streams.image()], "without CLOSE"),
        ([streams.image()[:100]], "of 198 bytes"),
        ([codec.error("x"), codec.close()], "unknown message id 8"),
        ([codec.waveform(*streams.waveform()), codec.close()], "unknown message id 1026"),
        ([streams.image(), streams.image((1, 1, 4, 4)), codec.close()], "two matrix sizes in series 0"),
        ([streams.image(), streams.image((2, 1, 3, 4)), codec.close()], "two matrix sizes in series 0"),
        ([codec.close(), codec.text("x")], "after the server's CLOSE"),
        # seen with the real one: its file then has images without attributes
        ([streams.image(), codec.dependency("<m/>"), codec.close()], "writes it over its image file"),
    ],
)
def test_aborts(answer: list[bytes], reason: str) -> None:
    with pytest.raises(ClientAborted, match=reason):
        scan(answering(*answer))


def test_texts_end_at_their_first_nul() -> None:
    answer = scan(answering(codec.text("seen\0lost\n"), codec.response(1, "a\0b"), codec.close()))
    assert answer.texts == ["seen"]  # type: ignore[attr-defined]
    assert answer.responses == [(1, "a")]  # type: ignore[attr-defined]


@pytest.mark.parametrize("message", [streams.image(), codec.text("x"), codec.response(0, "x")])
def test_dependency_connection_knows_only_its_answer(message: bytes) -> None:
    with pytest.raises(ClientAborted, match="unknown message id"):
        scan(answering(message, codec.close()), dependency=True)
    answer = scan(answering(codec.dependency("<m/>"), codec.close()), dependency=True)
    assert answer.dependencies == ["<m/>"]  # type: ignore[attr-defined]


def test_mixed_types_in_a_series_are_reported() -> None:
    answer = scan(answering(streams.image(), streams.image(dtype="<u2"), codec.close()))
    assert answer.converted_series == {0}  # type: ignore[attr-defined]


def test_early_close_is_fatal() -> None:
    """CLOSE and away while the client still sends: the kernel answers with RST and the real client loses its images."""

    def behave(connection: socket.socket) -> None:
        connection.recv(1000)
        connection.sendall(streams.image() + codec.close())

    data = bytes(codec.acquisitions(*streams.readouts(100, 8, 256)))
    with pytest.raises(ClientAborted, match=r"stopped reading|broke|everything|without CLOSE"):
        scan(behave, messages=[data] * 50)


def test_reset_is_fatal() -> None:
    def behave(connection: socket.socket) -> None:
        drain(connection)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with pytest.raises(ClientAborted, match=r"broke|without CLOSE"):
        scan(behave)


def test_silence_is_a_hang() -> None:
    release = threading.Event()

    def behave(connection: socket.socket) -> None:
        drain(connection)
        release.wait(PATIENCE)

    with server(behave) as port:
        with pytest.raises(ClientAborted, match="no CLOSE"):
            StrictClient("127.0.0.1", port, timeout=0.2).scan("a")
        release.set()


def test_raw_streams() -> None:
    with server(answering(codec.text("cut short"), codec.close())) as port:
        answer = StrictClient("127.0.0.1", port).send(streams.session()[:3000])
    assert answer.texts == ["cut short"]
