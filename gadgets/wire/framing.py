"""From bytes to events: an incremental frame parser without any I/O.

The parser keeps no samples. A readout's bytes lie verbatim in the scan's log already, so its header is copied, its offset
and size are noted and its payload is skipped by counting. Runs of readouts of one shape inside a chunk are framed by a few
numpy operations on a strided view; everything else goes one message at a time through ``_messages``.

Every length is compared with its limit before a byte of it is kept, and texts grow only as their bytes arrive.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Generator
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from gadgets.errors import (
    Disconnected,
    MalformedMessage,
    MalformedText,
    Oversized,
    UnknownMessage,
    UnsupportedCompression,
    WireError,
)
from gadgets.wire import composite, events
from gadgets.wire.dialect import is_node_configuration
from gadgets.wire.dtypes import (
    ACQUISITION_HEADER,
    DATA_TYPES,
    IMAGE_HEADER,
    READOUT_RECORD,
    WAVEFORM_HEADER,
    Flag,
    concatenate_headers,
    flag_bits,
)
from gadgets.wire.header_text import header_text
from gadgets.wire.ids import MessageId, message_name
from gadgets.wire.limits import Limits as Limits

Role = Literal["server", "client", "node"]
Need = Generator[None, None, bytes]
Step = Generator[None, None, None]

CONFIG_NAME_BYTES = 1024
COMPRESSED = flag_bits(Flag.ACQ_COMPRESSION1, Flag.ACQ_COMPRESSION2)
_COMPRESSED_BITS = int(COMPRESSED)
_ZFP_BIT = Flag.ACQ_COMPRESSION1.bit
_SMALLEST_BLOCK, _LARGEST_BLOCK = 4, 16384


class FrameParser:
    """Frame one direction of one connection.

    Parameters
    ----------
    limits
        Size caps.
    role
        Whose side this is: ``"server"`` reads what a scanner sends, ``"client"`` what a server answers, ``"node"`` what
        Gadgetron sends to an external node. A server's parser becomes a node's when the configuration shows that Gadgetron is
        talking (``<connect>``): whoever answers reads ``role``.

    Notes
    -----
    ``feed`` never raises for what a peer sends: a message that cannot be used becomes ``events.Problem`` at its place in the
    list. When the end of the bad message is known, framing goes on (a text that is not UTF-8; ZFP-compressed readouts, of
    which only the first is reported and all are left out of the events). When it is not (unknown id, a length over its
    limit), ``lost`` becomes true and later bytes are ignored. ``closed`` becomes true at CLOSE; bytes behind it are ignored.
    ``nul_terminated`` tells that the peer ends its texts with NUL, as consoles do, and wants ours like that.

    A ``Readouts`` event holds successive readouts, *not necessarily of one shape* (see ``gadgets.wire.readouts.groups``);
    all their bytes have been fed when it is returned.

    A parser refers to itself; a context manager (or ``close``) ends that, so that it goes with its last reference.
    """

    def __init__(self, limits: Limits | None = None, role: Role = "server") -> None:
        self.limits = limits or Limits()
        self.role: Role = role
        self.lost = False
        self.closed = False
        self.error: WireError | None = None
        self.nul_terminated = False
        self._base = 0  # stream offset of the chunk's first byte
        self._chunk = memoryview(b"")
        self._at = 0
        self._end = 0
        self._start = 0  # stream offset of the message in progress
        self._name = "message id"
        self._expected = 2
        self._block = 64
        self._texts = 0
        self._zfp_reported = False
        self._events: list[events.Event] = []
        self._run: list[tuple[NDArray[np.void], NDArray[np.int64], NDArray[np.int64]]] = []
        self._readers = self._table()
        self._machine = self._messages()

    @property
    def offset(self) -> int:
        """Stream position of the first byte that has not been framed or skipped yet."""
        return self._base + self._at

    def feed(self, chunk: bytes | bytearray | memoryview) -> list[events.Event]:
        """Frame the next bytes of the stream.

        Parameters
        ----------
        chunk
            Any number of bytes; may be overwritten as soon as this returns.

        Returns
        -------
        The messages that are complete now, in the order of the stream.
        """
        if self.lost or self.closed:
            return []
        self._chunk, self._at = memoryview(chunk).cast("B"), 0
        self._end = len(self._chunk)
        try:
            next(self._machine)
        except StopIteration:
            self.closed = True
        except WireError as error:
            self.lost = True
            self._problem(error)
        self._flush()
        self._base, self._chunk, self._at, self._end = self.offset, memoryview(b""), 0, 0
        found, self._events = self._events, []
        return found

    @property
    def boundary(self) -> int:
        """Stream position behind the last whole message (of a stream that is not ``lost``)."""
        return self._start if self.in_message else self.offset

    @property
    def in_message(self) -> bool:
        """Whether part of a message has come and the rest of it has not."""
        return self.offset > self._start and not (self.lost or self.closed)

    def incomplete(self, kind: type[WireError], what: str, remedy: str | None = None) -> WireError:
        """The error that says: ``what`` (has happened) in the middle of the message in progress."""
        return kind(
            f"{what} in the middle of {self._name}",
            where=f"byte {self._start} of the stream",
            got=f"{self.offset - self._start} bytes of the message",
            expected=f"{self._expected} bytes",
            remedy=remedy,
        )

    def finish(self) -> None:
        """Say that the stream has ended.

        Raises
        ------
        Disconnected
            The last message is incomplete. (An end between two messages is legal for the parser, with or without CLOSE.)
        """
        if self.in_message:
            raise self.incomplete(Disconnected, "the peer closed the connection")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frame nothing more, and let go of what refers back to this parser, so that its memory is free with its last reference."""
        self.closed = True
        self._machine.close()
        self._readers = {}

    # -- taking bytes ---------------------------------------------------------------------------------------------------

    def _take(self, n: int) -> Need:
        """Exactly ``n`` bytes."""
        if self._end - self._at >= n:
            piece = bytes(self._chunk[self._at : self._at + n])
            self._at += n
            return piece
        gathered = bytearray()
        while len(gathered) < n:
            while self._at == self._end:
                yield
            take = min(n - len(gathered), self._end - self._at)
            gathered += self._chunk[self._at : self._at + take]
            self._at += take
        return gathered  # type: ignore[return-value]  # read-only use; a copy of a large image would be waste

    def _skip(self, n: int) -> Step:
        while n:
            while self._at == self._end:
                yield
            step = min(n, self._end - self._at)
            self._at += step
            n -= step

    def _body(self, n: int, limit: int, what: str) -> Need:
        """A body of announced size, capped."""
        self._expect(n, limit, what)
        return (yield from self._take(n))

    def _expect(self, n: int, limit: int, what: str) -> None:
        if n > limit:
            raise Oversized(
                f"{what} is larger than this side accepts",
                where=self._place(),
                got=f"{n} bytes",
                expected=f"at most {limit} bytes",
            )
        self._expected = self.offset - self._start + n

    def _place(self) -> str:
        return f"{self._name} at byte {self._start}"

    # -- events ---------------------------------------------------------------------------------------------------------

    def _emit(self, event: events.Event) -> None:
        self._flush()
        self._events.append(event)

    def _problem(self, error: WireError) -> None:
        self.error = self.error or error
        self._emit(events.Problem(self._start, error))

    def _flush(self) -> None:
        """Successive readouts become one event."""
        if self._run:
            parts, starts, payloads = zip(*self._run, strict=True)
            self._run = []
            offsets = np.concatenate(starts)
            found = events.Readouts(int(offsets[0]), concatenate_headers(parts), offsets, np.concatenate(payloads))
            self._events.append(found)

    # -- the message loop -----------------------------------------------------------------------------------------------

    def _messages(self) -> Step:
        while True:
            self._start, self._name, self._expected = self.offset, "message id", 2
            if self._leading_run():
                continue
            number = int.from_bytes((yield from self._take(2)), "little")
            self._name = message_name(number)
            if number == MessageId.CLOSE:
                self._emit(events.Close(self._start))
                return
            reader = self._readers.get(number)
            if reader is None:
                raise self._unknown(number)
            try:
                yield from reader()
            except (MalformedText, UnsupportedCompression) as error:
                self._problem(error)  # the message has been read to its end

    def _unknown(self, number: int) -> UnknownMessage:
        known = ", ".join(message_name(i) for i in sorted([*self._readers, MessageId.CLOSE]))
        dicom = number in (MessageId.DICOM, MessageId.DICOM_WITHNAME)
        return UnknownMessage(
            f"message id {message_name(number)} is not understood here; nothing behind it can be read",
            where=f"byte {self._start} of the stream",
            got=number,
            expected=known,
            remedy="Let the server answer with MRD images instead of DICOM" if dicom else None,
        )

    def _table(self) -> dict[int, Callable[[], Step]]:
        """Which ids this role reads, and by what."""
        both: dict[int, Callable[[], Step]] = {
            MessageId.TEXT: self._text,
            MessageId.ERROR: self._error,
            MessageId.IMAGE: self._image,
        }
        incoming: dict[int, Callable[[], Step]] = {
            MessageId.CONFIG_FILE: self._config_file,
            MessageId.CONFIG_SCRIPT: self._config_script,
            MessageId.HEADER: self._header,
            MessageId.QUERY: self._query,
            MessageId.ACQUISITION: self._readout,
            MessageId.WAVEFORM: self._waveform,
        }
        if self.role == "server":
            return both | incoming
        if self.role == "client":
            return both | {MessageId.RESPONSE: self._response, MessageId.DEPENDENCY: self._dependency}
        composites: dict[int, Callable[[], Step]] = {
            MessageId.RECON_DATA: lambda: self._composite(MessageId.RECON_DATA, composite.recon_data),
            MessageId.BUCKET: lambda: self._composite(MessageId.BUCKET, composite.bucket),
        }
        return both | incoming | composites

    # -- readouts -------------------------------------------------------------------------------------------------------

    def _leading_run(self) -> bool:
        """Frame the run of complete, uncompressed readouts of one shape at the current position, if there is one."""
        room = self._end - self._at
        if room < 2 * READOUT_RECORD.itemsize or self._chunk[self._at] != 0xF0 or self._chunk[self._at + 1] != 0x03:
            return False
        flags, samples, channels, dims = _shape_fields(self._chunk, self._at + 2)
        payload = samples * (4 * dims + 8 * channels)
        size = READOUT_RECORD.itemsize + payload
        n = min(room // size, self._block)
        if n < 2 or flags & _COMPRESSED_BITS or payload > self.limits.readout:
            return False
        following = self._at + size  # alone, a readout is cheaper to frame without numpy
        if self._chunk[following] != 0xF0 or _shape_fields(self._chunk, following + 2)[1:] != (samples, channels, dims):
            return False
        records: NDArray[np.void] = np.ndarray((n,), READOUT_RECORD, buffer=self._chunk, offset=self._at, strides=(size,))
        heads = records["header"]
        same = records["id"] == int(MessageId.ACQUISITION)
        same &= heads["number_of_samples"] == samples
        same &= heads["active_channels"] == channels
        same &= heads["trajectory_dimensions"] == dims
        same &= (heads["flags"] & COMPRESSED) == 0
        if same.all():
            self._block = min(2 * self._block, _LARGEST_BLOCK)
        else:
            # a short block next time: alternating shapes must not cost a look at the whole chunk for each readout
            n = int(same.argmin())
            self._block = max(n, _SMALLEST_BLOCK)
        offsets = self.offset + size * np.arange(n, dtype=np.int64)
        # row by row as bytes: numpy would copy a structure field by field
        rows: NDArray[np.uint8] = np.ndarray(
            (n, ACQUISITION_HEADER.itemsize), np.uint8, self._chunk, offset=self._at + 2, strides=(size, 1)
        )
        copied = rows.copy().view(ACQUISITION_HEADER)[:, 0]
        self._run.append((copied, offsets, np.full(n, payload, np.int64)))
        self._at += n * size
        return True

    def _readout(self) -> Step:
        """One readout, possibly compressed, possibly spread over many chunks."""
        start = self._start
        self._expected = READOUT_RECORD.itemsize
        raw = yield from self._take(ACQUISITION_HEADER.itemsize)
        flags, samples, channels, dims = _shape_fields(raw, 0)
        payload = 4 * dims * samples
        if flags & _COMPRESSED_BITS:
            self._expect(payload + 4, self.limits.readout, "a readout's trajectory")
            yield from self._skip(payload)
            packed = int.from_bytes((yield from self._take(4)), "little")
            self._expect(packed, self.limits.readout, "a compressed readout")
            yield from self._skip(packed)
            payload += 4 + packed
        else:
            payload += 8 * channels * samples
            self._expect(payload, self.limits.readout, "a readout")
            yield from self._skip(payload)
        if flags & _ZFP_BIT:
            if self._zfp_reported:
                return
            self._zfp_reported = True
            raise UnsupportedCompression(
                "readouts compressed with ZFP cannot be decoded here",
                where=self._place(),
                got="flag 53 (ACQ_COMPRESSION1, ZFP)",
                expected="uncompressed readouts or NHLBI compression (flag 54)",
                remedy="Start the client without -Z; -P or -T alone select NHLBI compression",
            )
        head = np.frombuffer(raw, ACQUISITION_HEADER)
        self._run.append((head, np.array([start], np.int64), np.array([payload], np.int64)))

    # -- texts ----------------------------------------------------------------------------------------------------------

    def _count_text(self) -> None:
        # each costs far more memory as an event than on the wire
        self._texts += 1
        if self.role != "client" and self._texts > self.limits.texts:
            raise Oversized(
                "too many messages that are no data", where=self._place(), expected=f"at most {self.limits.texts}"
            )

    def _sized_text(self, length_bytes: int, limit: int, what: str, *, strict: bool = True) -> Generator[None, None, str]:
        raw = yield from self._sized(length_bytes, limit, what)
        return self._decoded(raw, what, strict=strict)

    def _sized(self, length_bytes: int, limit: int, what: str) -> Need:
        """The bytes of a text behind their length."""
        self._count_text()
        self._expected = self.offset - self._start + length_bytes
        n = int.from_bytes((yield from self._take(length_bytes)), "little")
        raw = yield from self._body(n, limit, what)
        self.nul_terminated = self.nul_terminated or raw.endswith(b"\0")
        return raw

    def _decoded(self, raw: bytes, what: str, *, strict: bool = True) -> str:
        """UTF-8 without the trailing NULs that FIRE clients and Gadgetron count in the length."""
        raw = raw.rstrip(b"\0")
        try:
            return raw.decode("utf-8", "strict" if strict else "replace")
        except UnicodeDecodeError as error:
            raise MalformedText(
                f"{what} is not UTF-8",
                where=self._place(),
                got=f"byte 0x{raw[error.start]:02x} at position {error.start}",
                expected="UTF-8 text",
            ) from None

    def _config_file(self) -> Step:
        self._count_text()
        self._expected = 2 + CONFIG_NAME_BYTES
        raw = yield from self._take(CONFIG_NAME_BYTES)
        end = raw.find(b"\0")
        if end < 0:
            raise MalformedText(
                "the name of the configuration is not closed",
                where=self._place(),
                got=f"{CONFIG_NAME_BYTES} bytes without NUL",
                expected=f"at most {CONFIG_NAME_BYTES - 1} bytes, padded with NUL",
            )
        self._emit(events.ConfigFile(self._start, self._decoded(raw[:end], "the name of the configuration")))

    def _config_script(self) -> Step:
        text = yield from self._sized_text(4, self.limits.config_script, "the configuration")
        if self.role == "server" and is_node_configuration(text):
            self.role = "node"
            self._readers = self._table()
        self._emit(events.ConfigScript(self._start, text))

    def _header(self) -> Step:
        raw = yield from self._sized(4, self.limits.header, "the MRD header")
        text, guessed = header_text(bytes(raw).rstrip(b"\0"))
        self._emit(events.HeaderText(self._start, text, guessed))

    def _text(self) -> Step:
        # what a server says is shown to a person, whatever its encoding
        text = yield from self._sized_text(4, self.limits.text, "a text", strict=self.role == "server")
        self._emit(events.Text(self._start, text))

    def _error(self) -> Step:
        text = yield from self._sized_text(8, self.limits.text, "an error text", strict=False)
        self._emit(events.ErrorText(self._start, text))

    def _dependency(self) -> Step:
        text = yield from self._sized_text(8, self.limits.text, "a dependency's answer")
        self._emit(events.Dependency(self._start, text))

    def _query(self) -> Step:
        self._expected = 26
        _reserved, correlation = struct.unpack("<QQ", (yield from self._take(16)))
        text = yield from self._sized_text(8, self.limits.query, "a query")
        self._emit(events.Query(self._start, correlation, text))

    def _response(self) -> Step:
        self._expected = 18
        correlation = int.from_bytes((yield from self._take(8)), "little")
        text = yield from self._sized_text(8, self.limits.text, "a response", strict=False)
        self._emit(events.Response(self._start, correlation, text))

    # -- waveforms, images, composites ----------------------------------------------------------------------------------

    def _waveform(self) -> Step:
        self._expected = 2 + WAVEFORM_HEADER.itemsize
        header = np.frombuffer((yield from self._take(WAVEFORM_HEADER.itemsize)), WAVEFORM_HEADER)[0]
        shape = int(header["channels"]), int(header["number_of_samples"])
        raw = yield from self._body(4 * shape[0] * shape[1], self.limits.waveform, "a waveform")
        self._emit(events.Waveform(self._start, header, np.frombuffer(raw, "<u4").reshape(shape)))

    def _image(self) -> Step:
        self._expected = 2 + IMAGE_HEADER.itemsize + 8
        header = np.frombuffer((yield from self._take(IMAGE_HEADER.itemsize)), IMAGE_HEADER)[0]
        dtype = DATA_TYPES.get(int(header["data_type"]))
        if dtype is None:
            raise MalformedMessage(
                "an image of unknown data type; nothing behind it can be read",
                where=self._place(),
                got=int(header["data_type"]),
                expected="1 to 8",
            )
        x, y, z = (int(n) for n in header["matrix_size"])
        shape = int(header["channels"]), z, y, x
        size = dtype.itemsize * shape[0] * x * y * z
        cap = self.limits.input_image if self.role == "server" else self.limits.image
        n = int.from_bytes((yield from self._take(8)), "little")
        self._expect(n, self.limits.image_meta, "an image's attributes")
        self._expect(n + size, self.limits.image_meta + cap, "an image")
        attributes = yield from self._take(n)
        raw = yield from self._body(size, cap, "an image")
        text = self._decoded(attributes, "an image's attributes")
        self._emit(events.Image(self._start, header, text, np.frombuffer(raw, dtype).reshape(shape)))

    def _composite(self, number: MessageId, parts: Callable[[int], composite.Parts]) -> Step:
        """Composite messages have no length; their reader asks for one piece after the other."""
        reader = parts(self.limits.composite)
        try:
            need = next(reader)
            while True:
                self._expected = self.offset - self._start + need
                need = reader.send((yield from self._take(need)))
        except StopIteration as done:
            self._emit(events.Composite(self._start, int(number), done.value))


def _shape_fields(raw: bytes | memoryview, at: int) -> tuple[int, int, int, int]:
    """Flags, number of samples, active channels and trajectory dimensions of the acquisition header at ``at``."""
    (flags,) = struct.unpack_from("<Q", raw, at + 2)
    samples, _available, channels = struct.unpack_from("<3H", raw, at + 34)
    (dims,) = struct.unpack_from("<H", raw, at + 176)
    return flags, samples, channels, dims
