"""What a replay plays: an MRD raw file (HDF5), turned into a session's messages, or a capture, as it was received."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
from numpy.typing import NDArray

from gadgets.capture import read_capture, windows
from gadgets.errors import MalformedText, RawFileError
from gadgets.queries import BEHIND, BEHIND_ID
from gadgets.wire import codec, events
from gadgets.wire.dtypes import ACQUISITION_HEADER, WAVEFORM_HEADER
from gadgets.wire.framing import FrameParser
from gadgets.wire.header import MrdHeader, parse_header
from gadgets.wire.header_text import header_text
from recon_core.errors import ReconError
from recon_core.hdf5_input import plain_dataset, plain_item, why_unreadable

SLAB_BYTES = 32 << 20
"""Read and sent as one piece."""

UNREADABLE = (KeyError, IndexError, ValueError, TypeError, AttributeError, OSError, RuntimeError)
"""What h5py and numpy raise at a file that is not made as it has to be; RuntimeError at damage in HDF5's own structures."""

VERSION_ELEMENT = re.compile(r"\s*<(?:\w+:)?version>[^<]*</(?:\w+:)?version>")


@dataclass(frozen=True)
class Piece:
    """Bytes to send, and where in them a readout ends (int64, ascending; empty when there is none)."""

    data: bytes | bytearray | memoryview
    ends: NDArray[np.int64]


NO_ENDS = np.zeros(0, np.int64)


class Source(Protocol):
    """A whole session from its first byte to its last."""

    path: Path
    n_readouts: int
    header: MrdHeader | None
    ends_with_close: bool

    def pieces(self) -> Iterator[Piece]:
        """In the order in which they are sent; may be called again."""


def open_source(
    path: Path | str,
    *,
    config: str | None = None,
    script: str | None = None,
    parameters: Mapping[str, str] | None = None,
    dataset: str = "dataset",
    strip_version: bool = False,
) -> Source:
    """The source for a file: HDF5 by its signature, anything else as a capture.

    Parameters
    ----------
    path
        The file.
    config, script
        Name or text of the configuration. An HDF5 file needs one; a capture's own is replaced.
    parameters
        Sent as FIRE's JSON text before the data.
    dataset
        Group of the raw data in an HDF5 file.
    strip_version
        Leave out the header's ``<version>``, which other servers may refuse; for HDF5 files only.

    Raises
    ------
    RawFileError, SpoolError
        The file cannot be used.
    """
    if config is not None and script is not None:
        raise MalformedText("a configuration's name and its text exclude each other", where="replay")
    start = b""
    if config is not None or script is not None:
        start = codec.config_file(config) if config is not None else codec.config_script(script or "")
    fire = b""
    if parameters:
        fire = codec.text(json.dumps({"version": "1.1.0", "parameters": dict(parameters)}))
    path = Path(path)
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise RawFileError("cannot read the file", where=str(path), got=error.strerror) from error
    if not (path.is_file() and h5py.is_hdf5(path)):
        return CapturedSession(path, start, fire)
    if not start:
        raise RawFileError("no chain to ask for", where=path.name, remedy="Name one: --config NAME")
    return RawFile(path, start, fire, dataset, strip_version)


class RawFile:
    """An ISMRMRD HDF5 file as a session: configuration, header, readouts and waveforms by time stamp, CLOSE."""

    ends_with_close = True

    def __init__(
        self, path: Path, config: bytes, fire: bytes = b"", group: str = "dataset", strip_version: bool = False
    ) -> None:
        self.path, self.group, self._config, self._fire = path, group, config, fire
        self._verbatim: bytes | None = None  # the header, where it is sent as it is
        with self._open() as file:
            try:
                self.header_text, self.n_readouts = self._content(file)
            except ReconError:
                raise
            except UNREADABLE as error:
                got = type(error).__name__
                raise RawFileError("no header or no readouts", where=path.name, got=got, expected="xml and data") from None
        if strip_version:
            self.header_text, self._verbatim = VERSION_ELEMENT.sub("", self.header_text, count=1), None
        try:
            self.header: MrdHeader | None = parse_header(self.header_text)
        except ReconError:
            self.header = None  # the server's business

    def _content(self, file: h5py.File) -> tuple[str, int]:
        """Text of the header, and number of readouts."""
        root = plain_item(file, self.group)
        if not isinstance(root, h5py.Group) or "xml" not in root or "data" not in root:
            known = ", ".join(name for name in file if isinstance(file.get(name), h5py.Group) and "xml" in file[name])
            got, expected = f"group {self.group!r}", f"group {known}" if known else "a group with xml and data"
            raise RawFileError("no raw data in this group", where=self.path.name, got=got, expected=expected)
        text = plain_dataset(root, "xml")[0]
        raw = (text if isinstance(text, bytes) else str(text).encode("utf-8", "surrogateescape")).rstrip(b"\0")
        found, guessed = header_text(raw)
        if guessed:  # whoever reads it says so
            self._verbatim = raw
        return found, len(plain_dataset(root, "data"))

    def pieces(self) -> Iterator[Piece]:
        yield Piece(self._config + codec.header(self._verbatim or self.header_text) + self._fire, NO_ENDS)
        try:
            yield from self._data()
        except UNREADABLE as error:
            raise RawFileError(
                "readouts or waveforms of another kind", where=self.path.name, got=type(error).__name__
            ) from None
        yield Piece(codec.close(), NO_ENDS)

    def _data(self) -> Iterator[Piece]:
        with self._open() as file:
            root = plain_item(file, self.group)
            if not isinstance(root, h5py.Group):
                raise RawFileError("the file has changed", where=self.path.name)
            waveforms, stamps = _waveforms(root)
            rows = plain_dataset(root, "data")
            sent, newest = 0, 0
            for first, last in self._slabs(rows):
                slab = rows[first:last]
                heads = _headers(slab["head"], self.path.name)
                # a waveform goes before the first readout that is later than it, as the reference client sends them
                times = np.maximum.accumulate(np.maximum(heads["acquisition_time_stamp"].astype(np.int64), newest))
                newest = int(times[-1])
                at = 0
                before = np.searchsorted(times, stamps[sent:], side="right")
                for stop in [*before[before < len(heads)].tolist(), len(heads)]:
                    yield from _runs(slab[at:stop], heads[at:stop], self.path.name)
                    at = stop
                    if stop < len(heads):
                        yield Piece(waveforms[sent], NO_ENDS)
                        sent += 1
            for waveform in waveforms[sent:]:
                yield Piece(waveform, NO_ENDS)

    def _open(self) -> h5py.File:
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise RawFileError("cannot be read", where=self.path.name, got=why_unreadable(error)) from None

    def _slabs(self, rows: h5py.Dataset) -> Iterator[tuple[int, int]]:
        n = len(rows)
        if n:
            first = rows[0:1]
            step = max(1, SLAB_BYTES // (342 + 4 * (len(first["data"][0]) + len(first["traj"][0]))))
            for start in range(0, n, step):
                yield start, min(start + step, n)


def _headers(heads: NDArray[np.void], where: str) -> NDArray[np.void]:
    if heads.dtype.names != ACQUISITION_HEADER.names:
        raise RawFileError("the readouts have other header fields", where=where, got=heads.dtype.names)
    return heads.astype(ACQUISITION_HEADER)


def _runs(rows: NDArray[np.void], heads: NDArray[np.void], where: str) -> Iterator[Piece]:
    """Successive readouts of one shape as one piece each."""
    if not len(rows):
        return
    shape = np.stack([heads[name] for name in ("active_channels", "number_of_samples", "trajectory_dimensions")])
    borders = np.flatnonzero((shape[:, 1:] != shape[:, :-1]).any(axis=0)) + 1
    for start, stop in zip([0, *borders.tolist()], [*borders.tolist(), len(rows)], strict=True):
        channels, samples, dims = (int(value) for value in shape[:, start])
        values = _joined(rows["data"][start:stop], 2 * channels * samples, where)
        points = _joined(rows["traj"][start:stop], dims * samples, where)
        data = codec.acquisitions(
            heads[start:stop],
            values.view(np.complex64).reshape(-1, channels, samples),
            points.reshape(-1, samples, dims) if dims else None,
        )
        size = len(data) // (stop - start)
        yield Piece(data, size * np.arange(1, stop - start + 1, dtype=np.int64))


def _joined(rows: NDArray[np.object_], length: int, where: str) -> NDArray[np.float32]:
    if any(len(row) != length for row in rows):
        got = sorted({len(row) for row in rows})[:4]
        raise RawFileError("a readout is not as long as its header says", where=where, got=got, expected=length)
    return np.concatenate(list(rows)).astype(np.float32, copy=False) if length else np.zeros(0, np.float32)


def _waveforms(root: h5py.Group) -> tuple[list[bytes], NDArray[np.int64]]:
    if "waveforms" not in root:
        return [], NO_ENDS
    rows = plain_dataset(root, "waveforms", whole=True)[:]
    heads = np.zeros(len(rows), WAVEFORM_HEADER)
    for name in WAVEFORM_HEADER.names or ():
        heads[name] = rows["head"][name]
    order = np.argsort(heads["time_stamp"], kind="stable")
    encoded = [codec.waveform(heads[i], rows["data"][i].reshape(int(heads["channels"][i]), -1)) for i in order]
    return encoded, heads["time_stamp"][order].astype(np.int64)


def _behind(capture: Path) -> int:
    """Bytes at a capture's beginning by which replays let scanners go first."""
    question, n = codec.query(BEHIND, BEHIND_ID), 0
    with capture.open("rb") as file:
        while file.read(len(question)) == question:
            n += len(question)
    return n


class CapturedSession:
    """A capture, sent bit for bit as it came; only ``config`` replaces its own, and ``fire`` goes before the data.

    That an earlier replay let scanners go first is none of the scan's: it is left out.

    Raises
    ------
    SpoolError
        No capture (see ``read_capture``).
    RawFileError
        It holds no header, so that there is no place for a configuration or parameters.
    """

    def __init__(self, path: Path, config: bytes = b"", fire: bytes = b"") -> None:
        self.path = read_capture(path).path
        self.n_readouts = 0
        self.header: MrdHeader | None = None
        header_at, data_at = 0, 0
        with FrameParser() as parser:
            for window in windows(self.path):
                for event in parser.feed(window):
                    if isinstance(event, events.Readouts):
                        self.n_readouts += len(event)
                    if isinstance(event, events.HeaderText):
                        header_at = header_at or event.offset
                    elif header_at and not data_at and not isinstance(event, events.Text):
                        data_at = event.offset
            self.ends_with_close = parser.closed
        if (config and not header_at) or (fire and not data_at):
            raise RawFileError("no header and data in this capture", where=self.path.name, remedy="Replay it as it is")
        # what stands in place of which bytes
        behind = _behind(self.path)
        self._edits = [(0, header_at, config)] if config else [(0, behind, b"")] if behind else []
        self._edits += [(data_at, data_at, fire)] if fire else []

    def pieces(self) -> Iterator[Piece]:
        edits = list(self._edits)
        base = resume = 0  # stream offsets: of the window, and of the next byte to send
        with FrameParser() as parser:
            for window in windows(self.path):
                found = [e.offsets + 342 + e.payload_bytes for e in parser.feed(window) if isinstance(e, events.Readouts)]
                ends = np.concatenate(found) if found else NO_ENDS
                stop = base + len(window)
                while edits and edits[0][0] < stop:
                    first, last, new = edits.pop(0)
                    if first > resume:
                        yield Piece(window[max(resume - base, 0) : first - base], NO_ENDS)
                    yield Piece(new, NO_ENDS)
                    resume = max(resume, last)
                start = max(resume, base)
                if start < stop:
                    yield Piece(window[start - base :], ends - start)
                    resume = stop
                base = stop
