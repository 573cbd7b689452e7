"""What the frame parser makes of the bytes: one frozen object per message, readouts in batches.

The parser never holds a readout's samples. The bytes lie verbatim in the scan's log (``gadgets.spool``); an event says at
which offset of the stream a message begins, and whoever needs the samples reads them from the log.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gadgets.errors import WireError


@dataclass(frozen=True)
class Event:
    """One message; ``offset`` is the position of its two id bytes in the stream."""

    offset: int


@dataclass(frozen=True)
class ConfigFile(Event):
    """Id 1: the name of a configuration, NUL padding removed."""

    name: str


@dataclass(frozen=True)
class ConfigScript(Event):
    """Id 2: a configuration as text (or a chain's name, as FIRE clients send), trailing NUL removed."""

    text: str


@dataclass(frozen=True)
class HeaderText(Event):
    """Id 3: the MRD header as text, trailing NUL removed. ``guessed``: it was not UTF-8, and did not say what it was."""

    text: str
    guessed: bool = False


@dataclass(frozen=True)
class Close(Event):
    """Id 4."""


@dataclass(frozen=True)
class Text(Event):
    """Id 5."""

    text: str


@dataclass(frozen=True)
class Query(Event):
    """Id 6."""

    correlation: int
    text: str


@dataclass(frozen=True)
class ErrorText(Event):
    """Id 8."""

    text: str


@dataclass(frozen=True)
class Readouts(Event):
    """Id 1008, one or more in a row; ``offset`` is the first one's.

    Attributes
    ----------
    headers
        Structured array of ``gadgets.wire.dtypes.ACQUISITION_HEADER``, one per readout (a copy: safe to keep).
    offsets
        int64, position in the stream of each readout's two id bytes.
    payload_bytes
        int64, bytes behind each 340-byte header (trajectory, then samples or u32 + compressed buffer).
    """

    headers: NDArray[np.void]
    offsets: NDArray[np.int64]
    payload_bytes: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.headers)


@dataclass(frozen=True)
class Waveform(Event):
    """Id 1026: header of ``gadgets.wire.dtypes.WAVEFORM_HEADER`` and uint32 ``(channel, sample)``."""

    header: np.void
    data: NDArray[np.uint32]


@dataclass(frozen=True)
class Image(Event):
    """Id 1022: 198-byte header, attribute text (trailing NUL removed) and data ``(channel, z, y, x)``."""

    header: np.void
    attributes: str
    data: NDArray[np.generic]


@dataclass(frozen=True)
class Response(Event):
    """Id 7."""

    correlation: int
    text: str


@dataclass(frozen=True)
class Dependency(Event):
    """Id 1019: an ismrmrdMeta document about a noise dependency."""

    text: str


@dataclass(frozen=True)
class Composite(Event):
    """Id 1023 or 1050, Gadgetron to a node: ``content`` is of ``gadgets.wire.composite`` (``ReconData`` or ``Bucket``)."""

    id: int
    content: object


@dataclass(frozen=True)
class Problem(Event):
    """A message that cannot be used. Framing goes on behind it unless the parser's ``lost`` is true.

    It stands at its place among the events, so that everything before it can still be used.
    """

    error: WireError
