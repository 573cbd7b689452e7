"""Errors of the outside world. All are ``ReconError``: what, where, got, expected, remedy; never patient data."""

from __future__ import annotations

from recon_core.errors import ReconError


class WireError(ReconError):
    """The byte stream is not a legal MRD/Gadgetron session."""


class Disconnected(WireError):
    """The peer closed the connection in the middle of a message or before its CLOSE."""


class Oversized(WireError):
    """A length field asks for more than the configured limit; nothing was allocated."""


class UnknownMessage(WireError):
    """A message id that this side does not know; nothing behind it can be framed."""


class IllegalOrder(WireError):
    """A known message at a moment when the protocol does not allow it."""


class MalformedText(WireError):
    """A text that is not UTF-8, not closed, or not what it has to be."""


class MalformedMessage(WireError):
    """A message whose fields contradict each other or name something that does not exist."""


class UnsupportedCompression(WireError):
    """Readouts compressed in a way that is not decoded here (ZFP)."""


class HeaderError(ReconError):
    """The MRD header cannot be used: not XML, XML with entities, or a needed field missing."""


class SortError(ReconError):
    """Readouts that do not fit into the k-space that the header describes."""


class UnknownChain(ReconError):
    """The peer named a chain that is not installed."""


class ConfigRefused(ReconError):
    """A configuration text that names code, libraries or addresses, or is no configuration at all."""


class SpoolError(ReconError):
    """Raw data cannot be captured or read back."""


class ImageFileError(ReconError):
    """An MRD image file that cannot be read or written, or an image that does not fit into its series."""


class JobFailed(ReconError):
    """A worker died or a job exceeded its limit, and no fallback could answer."""


class RawFileError(ReconError):
    """A raw data file cannot be read, or is no MRD raw file."""


class ReplayFailed(ReconError):
    """A replay did not end as it should: the server reported an error, sent no image, or broke the protocol.

    ``result`` has what arrived until then (``gadgets.replay.ReplayResult``).
    """

    result: object = None
