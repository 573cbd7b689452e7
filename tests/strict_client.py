"""A test client as unforgiving as the real ``gadgetron_ismrmrd_client`` 4.7.2, and where that one is silent, stricter.

It shares no framing code with the product. One thread sends, another reads. Where the real client calls ``std::terminate``
(or loses its images), ``scan`` raises ``ClientAborted``.
"""

from __future__ import annotations

import itertools
import json
import socket
import struct
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from gadgets.wire.dtypes import DATA_TYPES, IMAGE_HEADER
from gadgets.wire.events import Image
from tests.waiting import PATIENCE

CONFIG_FILE, CONFIG_SCRIPT, HEADER, CLOSE, TEXT, QUERY, RESPONSE = 1, 2, 3, 4, 5, 6, 7
DICOM_WITHNAME, DEPENDENCY, IMAGE = 1018, 1019, 1022


class ClientAborted(Exception):
    """The real client would have died here; ``answer`` is what had arrived (it would be lost)."""

    def __init__(self, reason: str, answer: Answer) -> None:
        super().__init__(reason)
        self.reason, self.answer = reason, answer


@dataclass
class Answer:
    """What the server sent."""

    images: list[Image] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    responses: list[tuple[int, str]] = field(default_factory=list)
    dependencies: list[str] = field(default_factory=list)
    dicoms: list[tuple[str, bytes]] = field(default_factory=list)
    converted_series: set[int] = field(default_factory=set)  # mixed dtypes: the real client converts them silently


class _Abort(Exception):
    pass


class StrictClient:
    """One server's client.

    Parameters
    ----------
    host, port
        The server.
    dialect
        ``"gadgetron"``: texts without NUL. ``"fire"``: CONFIG_SCRIPT and HEADER end with a NUL that the length counts, and
        ``parameters`` go as JSON in a TEXT between header and data.
    nul
        Overrides what the dialect does about NULs.
    timeout
        Seconds without a byte or without progress in sending until the scan counts as hung (the real client waits for ever).
    """

    def __init__(
        self, host: str, port: int, *, dialect: str = "gadgetron", nul: bool | None = None, timeout: float = PATIENCE
    ) -> None:
        if dialect not in ("gadgetron", "fire"):
            raise ValueError(dialect)
        self.host, self.port, self.timeout = host, port, timeout
        self.nul = dialect == "fire" if nul is None else nul

    def scan(
        self,
        config: str | None = None,
        *,
        script: str | None = None,
        header: str | None = None,
        messages: Iterable[bytes | bytearray] = (),
        parameters: dict[str, object] | None = None,
        query: str | None = None,
        dependency: bool = False,
        close: bool = True,
    ) -> Answer:
        """Send one session and take everything until the server's CLOSE and end of stream.

        Parameters
        ----------
        config, script
            A configuration's name (CONFIG_FILE) or text (CONFIG_SCRIPT).
        header
            The MRD header.
        messages
            Encoded data messages.
        parameters
            FIRE's console parameters.
        query
            Sent first, as ``-Q`` does.
        dependency
            A noise-dependency connection: only 1019 and CLOSE are understood.
        close
            Send CLOSE at the end; without it the sending direction is shut down (a client that vanishes).

        Raises
        ------
        ClientAborted
        """
        nul = b"\0" if self.nul else b""
        start = []  # sent as one piece: a busy machine puts no pause between header and parameters
        if query is not None:
            words = query.encode()
            start.append(struct.pack("<HQQQ", QUERY, 0, 0, len(words)) + words)
        if config is not None:
            start.append(struct.pack("<H1024s", CONFIG_FILE, config.encode()))
        if script is not None:
            start.append(_sized(CONFIG_SCRIPT, script.encode() + nul))
        if header is not None:
            start.append(_sized(HEADER, header.encode() + nul))
        if parameters is not None:
            start.append(_sized(TEXT, json.dumps({"version": "1.1.0", "parameters": parameters}).encode() + nul))
        return self._run([b"".join(start)], messages, dependency, close)

    def send(self, stream: bytes, *, dependency: bool = False) -> Answer:
        """Send raw bytes (a capture, a hostile stream) and then nothing more; see ``scan``."""
        return self._run([], [stream], dependency, close=False)

    def _run(self, start: list[bytes], messages: Iterable[bytes | bytearray], dependency: bool, close: bool) -> Answer:
        answer = Answer()
        failures: list[str] = []
        with socket.create_connection((self.host, self.port), timeout=self.timeout) as sock:
            stop = threading.Event()

            def send() -> None:
                try:
                    for piece in itertools.chain(start, messages):
                        if stop.is_set():
                            return
                        sock.sendall(piece)
                    if close:
                        sock.sendall(struct.pack("<H", CLOSE))
                    else:
                        sock.shutdown(socket.SHUT_WR)
                except OSError as error:
                    failures.append(f"sending failed: the server stopped reading ({type(error).__name__})")
                except Exception as error:
                    failures.append(f"the messages could not be made: {error!r}")
                    sock.shutdown(socket.SHUT_RDWR)

            def read() -> None:
                try:
                    read_answer(sock, answer, dependency)
                    sender.join(self.timeout)
                    if sender.is_alive():
                        raise _Abort("the server sent CLOSE but does not read what is left")
                    if not failures:
                        _expect_end(sock)
                except _Abort as error:
                    failures.append(str(error))
                except TimeoutError:
                    failures.append(f"nothing came for {self.timeout} s: no CLOSE")
                except OSError as error:
                    failures.append(f"the connection broke ({type(error).__name__})")
                finally:
                    stop.set()

            sender = threading.Thread(target=send, name="strict-client-send", daemon=True)
            reader = threading.Thread(target=read, name="strict-client-read", daemon=True)
            sender.start()
            reader.start()
            reader.join()
        sender.join()
        if failures:
            raise ClientAborted("; ".join(failures), answer)
        return answer


def _sized(number: int, raw: bytes) -> bytes:
    return struct.pack("<HI", number, len(raw)) + raw


def _exactly(sock: socket.socket, n: int, what: str) -> bytes:
    got = bytearray()
    while len(got) < n:
        piece = sock.recv(min(n - len(got), 1 << 20))
        if not piece:
            raise _Abort(f"the server closed without CLOSE: {len(got)} of {n} bytes of {what}")
        got += piece
    return bytes(got)


def _unsigned(sock: socket.socket, size: int, what: str) -> int:
    return int.from_bytes(_exactly(sock, size, what), "little")


def read_answer(sock: socket.socket, answer: Answer, dependency: bool = False) -> None:
    """Everything up to the server's CLOSE, into ``answer``."""
    known = {DEPENDENCY, CLOSE} if dependency else {IMAGE, DICOM_WITHNAME, DEPENDENCY, TEXT, RESPONSE, CLOSE}
    first: dict[int, Image] = {}
    while True:
        number = _unsigned(sock, 2, "a message id")
        if number not in known:
            raise _Abort(f"unknown message id {number}")
        if number == CLOSE:
            return
        if number == DEPENDENCY and not dependency:
            raise _Abort("1019 on a scan's connection: the real client writes it over its image file")
        if number == TEXT:
            answer.texts.append(_printed(sock, 4))
        elif number == RESPONSE:
            correlation = _unsigned(sock, 8, "RESPONSE")
            answer.responses.append((correlation, _printed(sock, 8)))
        elif number == DEPENDENCY:
            answer.dependencies.append(_text(sock, 8))
        elif number == DICOM_WITHNAME:
            raw = _exactly(sock, _unsigned(sock, 4, "DICOM"), "DICOM")
            answer.dicoms.append((_text(sock, 8), raw))
            _text(sock, 8)
        else:
            image = _image(sock)
            series = int(image.header["image_series_index"])
            before = first.setdefault(series, image)
            if before.data.shape != image.data.shape:
                raise _Abort(f"two matrix sizes in series {series}: {before.data.shape} and {image.data.shape}")
            if before.data.dtype != image.data.dtype:
                answer.converted_series.add(series)
            answer.images.append(image)


def _text(sock: socket.socket, length_bytes: int) -> str:
    return _exactly(sock, _unsigned(sock, length_bytes, "a length"), "a text").rstrip(b"\0").decode("utf-8")


def _printed(sock: socket.socket, length_bytes: int) -> str:
    """As the real client prints it: up to the first NUL."""
    raw = _exactly(sock, _unsigned(sock, length_bytes, "a length"), "a text")
    return raw.split(b"\0", 1)[0].decode("utf-8")


def _image(sock: socket.socket) -> Image:
    header = np.frombuffer(_exactly(sock, IMAGE_HEADER.itemsize, "IMAGE"), IMAGE_HEADER)[0]
    attributes = _text(sock, 8)
    x, y, z = (int(n) for n in header["matrix_size"])
    dtype = DATA_TYPES.get(int(header["data_type"]))
    if dtype is None:
        raise _Abort(f"image of data type {header['data_type']}")
    shape = int(header["channels"]), z, y, x
    pixels = _exactly(sock, dtype.itemsize * int(np.prod(shape)), "an image")
    return Image(-1, header, attributes, np.frombuffer(pixels, dtype).reshape(shape))


def _expect_end(sock: socket.socket) -> None:
    """Stricter than the real client: nothing but an orderly end may follow the server's CLOSE."""
    try:
        rest = sock.recv(1)
    except ConnectionResetError:
        raise _Abort("the server closed before it had read everything: a real client loses its images") from None
    if rest:
        raise _Abort("bytes after the server's CLOSE")
