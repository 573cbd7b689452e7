"""MRD streams: the same bytes in and out as ``gadgetron --from_stream`` and ISMRMRD's stream tools.

In: HEADER (3), readouts and waveforms, CLOSE. Out: the header again, images (1022) as they are made, CLOSE. There is no CONFIG in
such a stream; one that is there all the same (a capture) names the chain unless the caller does. Questions (QUERY) before the header,
as captures of replays have them, are left out: nobody reads their answers. Words go elsewhere: only ISMRMRD's own reader knows TEXT
in a stream of images.

A stream that ends without CLOSE is a failure for every reader. So is ours when the reconstruction failed, after all images that
were made.
"""

from __future__ import annotations

import contextlib
import io
import logging
import socket
import struct
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO
from xml.sax.saxutils import quoteattr

from gadgets.chain import MODULE, chain_from_script
from gadgets.errors import ConfigRefused, Disconnected, IllegalOrder, Oversized, WireError
from gadgets.image_file import ImageFile
from gadgets.progress import read_progress_line
from gadgets.raw_source import Source, open_source
from gadgets.replay import fresh_group
from gadgets.service import Service, ServiceOptions
from gadgets.wire import codec, events
from gadgets.wire.framing import CONFIG_NAME_BYTES, FrameParser
from gadgets.wire.ids import MessageId, message_name
from gadgets.wire.limits import Limits
from recon_core.errors import ReconError

logger = logging.getLogger(__name__)

STANDARD = "-"
"""In the place of a file: stdin or stdout."""

PIECE_BYTES = 1 << 20
ERROR_WORDS = "ERROR "


class StreamFailed(WireError):
    """No images, or not all of them; what was made is in the output, which has no CLOSE."""


@dataclass
class StreamResult:
    """What a stream became."""

    n_images: int = 0
    texts: list[str] = field(default_factory=list)
    group: str | None = None  # in the image file, where there is one
    job_folder_problems: list[str] = field(default_factory=list)


def run_stream(
    source: BinaryIO,
    sink: BinaryIO | None,
    *,
    config: str | None = None,
    settings: Mapping[str, str] | None = None,
    options: ServiceOptions | None = None,
    on_text: Callable[[str], None] | None = None,
    on_image: Callable[[events.Image], None] | None = None,
) -> StreamResult:
    """Reconstruct one scan from a stream into a stream, by the pipeline of the server.

    Parameters
    ----------
    source
        Read to its CLOSE, or to its end.
    sink
        Header, images and CLOSE; flushed behind each. ``None``: ``on_image`` keeps the images.
    config
        Name of the chain; needed unless the stream holds a configuration.
    settings
        Overrides.
    options
        Of the service that reconstructs; by default those of ``recon run``.
    on_text
        Called with each line that the reconstruction says.
    on_image
        Called with each image.

    Raises
    ------
    StreamFailed
        The reconstruction failed, or made no image.
    WireError
        The stream does not begin as one, or ends too early.
    ConfigRefused
        No chain is named.
    """
    options = options or ServiceOptions(port=0, spool=None, previews=False, rehearse=False)
    start, header = _beginning(source, options.limits)
    if config is not None:
        start = codec.config_script(chain_script(config, settings or {}))
        chain_from_script(chain_script(config, settings or {}), directory=options.configs)  # before anything is started
    elif settings:
        raise ConfigRefused("settings without a chain", where="stream", remedy="Name one: --config NAME")
    if not start:
        raise ConfigRefused("no chain to reconstruct with", where="stream", remedy="Name one: --config NAME")
    result = StreamResult()
    _put(sink, struct.pack("<HI", MessageId.HEADER, len(header)) + header)
    broken: list[ReconError] = []
    with Service(options) as service, socket.create_connection((service.host, service.port)) as connection:
        head = start + struct.pack("<HI", MessageId.HEADER, len(header)) + header
        sender = threading.Thread(target=_send, args=(source, connection, head, broken), name="stream-send", daemon=True)
        sender.start()
        _receive(connection, sink, result, on_text, on_image)
    result.job_folder_problems = service.job_folders.problems
    if broken:
        raise StreamFailed(f"the source broke off: {broken[0]}", where="stream")
    failures = [text.strip() for text in result.texts if text.startswith(ERROR_WORDS)]
    if failures:
        raise StreamFailed(failures[0].removeprefix(ERROR_WORDS))
    if not result.n_images and not any("noise measurement stored" in text for text in result.texts):
        raise StreamFailed("no image was made", where="stream", got=" | ".join(text.strip() for text in result.texts))
    _put(sink, codec.close())
    return result


def _put(sink: BinaryIO | None, data: bytes | bytearray) -> None:
    if sink is not None:
        sink.write(data)
        sink.flush()


def chain_script(name: str, settings: Mapping[str, str]) -> str:
    """A chain with overrides as a configuration text: in a stream there is no place for parameters behind the header."""
    properties = "".join(f"<property name={quoteattr(k)} value={quoteattr(v)}/>" for k, v in settings.items())
    return (
        "<configuration><version>2</version><stream><external>"
        f'<execute name="{MODULE}" target={quoteattr(name.removesuffix(".xml"))} type="python"/>'
        f"<configuration>{properties}</configuration></external></stream></configuration>"
    )


def _beginning(source: BinaryIO, limits: Limits) -> tuple[bytes, bytes]:
    """The configuration message (empty when there is none) and the header's text, read from the source."""
    config = b""
    while True:
        (number,) = struct.unpack("<H", _exactly(source, 2, "a message id"))
        if number == MessageId.HEADER:
            return config, _sized(source, limits.header, "the MRD header")
        if number == MessageId.QUERY:
            _exactly(source, 16, "a query")  # reserved, and the id of its answer
            _sized(source, limits.query, "a query", "<Q")
            continue
        if config or number not in (MessageId.CONFIG_FILE, MessageId.CONFIG_SCRIPT):
            raise IllegalOrder("a stream begins with the MRD header", where="stream", got=message_name(number))
        if number == MessageId.CONFIG_FILE:
            config = struct.pack("<H", number) + _exactly(source, CONFIG_NAME_BYTES, "a configuration's name")
        else:
            text = _sized(source, limits.config_script, "a configuration")
            config = struct.pack("<HI", number, len(text)) + text


def _sized(source: BinaryIO, limit: int, what: str, length: str = "<I") -> bytes:
    (n,) = struct.unpack(length, _exactly(source, struct.calcsize(length), what))
    if n > limit:
        raise Oversized(f"{what} is larger than this side accepts", where="stream", got=n, expected=f"at most {limit} bytes")
    return _exactly(source, n, what)


def _exactly(source: BinaryIO, n: int, what: str) -> bytes:
    got = bytearray()
    while len(got) < n:
        piece = source.read(n - len(got))
        if not piece:
            raise Disconnected(f"the stream ends in the middle of {what}", where="stream", got=len(got), expected=n)
        got += piece
    return bytes(got)


def _send(source: BinaryIO, connection: socket.socket, head: bytes, broken: list[ReconError]) -> None:
    """Everything, then the end: the server itself sees whether a CLOSE came. ``broken`` hears why a file could not be read on."""
    read = getattr(source, "read1", source.read)  # what is there already, rather than waiting for a whole piece
    try:
        connection.sendall(head)
        while piece := read(PIECE_BYTES):
            connection.sendall(piece)
    except (OSError, ValueError) as error:  # ValueError: our caller has closed the source, or it is no stream any more
        # the answer says what became of it: why the server went, or that the scan ends too early
        logger.warning("event=sending_ended error=%s", type(error).__name__)
    except ReconError as error:
        broken.append(error)
    finally:
        with contextlib.suppress(OSError):  # else the server would wait for more
            connection.shutdown(socket.SHUT_WR)


def _receive(
    connection: socket.socket,
    sink: BinaryIO | None,
    result: StreamResult,
    on_text: Callable[[str], None] | None,
    on_image: Callable[[events.Image], None] | None,
) -> None:
    """Images to the sink until the server's CLOSE."""
    with FrameParser(role="client") as parser:
        while not parser.closed:
            chunk = connection.recv(PIECE_BYTES)
            if not chunk:
                raise StreamFailed("the reconstruction broke off", where="stream")
            for event in parser.feed(chunk):
                match event:
                    case events.Image():
                        if sink is not None:
                            _put(sink, codec.image(event.header, event.attributes, event.data))
                        if on_image is not None:
                            on_image(event)
                        result.n_images += 1
                    case events.Text():
                        result.texts.append(event.text)
                        if on_text is not None:
                            on_text(event.text)
                    case events.Problem():
                        raise StreamFailed(f"the answer cannot be understood: {event.error}", where="stream")


def run_files(
    source: Path,
    output: Path,
    *,
    config: str | None = None,
    settings: Mapping[str, str] | None = None,
    options: ServiceOptions | None = None,
) -> StreamResult:
    """A scan from a file, or ``-``: an MRD stream on stdin; to an image file, or ``-``: an MRD stream on stdout. Words go to stderr.

    Raises
    ------
    ConfigRefused
        As `run_stream`, or stdout is a terminal.
    RawFileError, SpoolError, ImageFileError
        A file cannot be used.
    """

    def tell(text: str) -> None:
        if read_progress_line(text) is None:
            print(text.rstrip(), file=sys.stderr, flush=True)

    if source.exists() and output.exists() and source.samefile(output):
        raise ConfigRefused("input and output are the same file", where=str(source), remedy="Name another output")
    incoming = _stdin() if str(source) == STANDARD else _session(open_source(source, config=config))
    if str(output) == STANDARD:
        if sys.stdout.isatty():
            raise ConfigRefused(
                "a terminal cannot show a stream of images", where="stdout", remedy="Name a file: --out FILE.h5"
            )
        return run_stream(incoming, sys.stdout.buffer, config=config, settings=settings, options=options, on_text=tell)
    with _Images(output) as images:
        result = run_stream(
            incoming, None, config=config, settings=settings, options=options, on_text=tell, on_image=images.take
        )
    result.group = images.group
    return result


def _stdin() -> BinaryIO:
    """Without its buffer, whose lock a thread that still waits for the stream would hold when the interpreter ends: an abort."""
    raw: BinaryIO = getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    return raw


class _Images(contextlib.ExitStack):
    """An image file that appears with the first image."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.group = path, fresh_group(path, None)
        self._file: ImageFile | None = None

    def take(self, image: events.Image) -> None:
        if self._file is None:
            self._file = self.enter_context(ImageFile(self.path, self.group))
        self._file.append(image)


def _session(source: Source) -> BinaryIO:
    """A file's messages as they would come through a pipe."""
    return io.BufferedReader(_Pieces(source), PIECE_BYTES)


class _Pieces(io.RawIOBase):
    def __init__(self, source: Source) -> None:
        self._pieces = (memoryview(piece.data).cast("B") for piece in source.pieces())
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, room: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = piece
        n = min(len(room), len(self._left))
        room[:n] = self._left[:n]
        self._left = self._left[n:]
        return n
