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


class IncompleteScan(SortError):
    """A scan that broke off, and of which too little is there."""


class UnknownChain(ReconError):
    """The peer named a chain that is not installed."""


class ConfigRefused(ReconError):
    """A configuration text that names code, libraries or addresses, or is no configuration at all."""


class MissingExtra(ReconError):
    """A package of an optional part (``recon-gadgets[dicom]``, say) is not installed."""


class SpoolError(ReconError):
    """Raw data cannot be captured or read back."""


class OutputError(ReconError):
    """What a command is to write cannot be written where it was asked for."""


class ImageFileError(ReconError):
    """An MRD image file that cannot be read or written, or an image that does not fit into its series."""


class JobFailed(ReconError):
    """A worker died or a job exceeded its limit, and no fallback could answer."""


class GivenUp(JobFailed):
    """A task that nobody waits for any more: its scan was given up, or the server is stopping. Not the method's failure."""


class OutOfMemory(JobFailed):
    """A task got no memory."""


class OutOfGpuMemory(OutOfMemory):
    """A task got no memory on the GPU; the same task may do on the CPU."""


class DeviceFailed(JobFailed):
    """A task's GPU failed, or is gone. Its process can use no GPU any more and was ended; another worker may do the task."""


class DeviceFailedHere(DeviceFailed):
    """The same in a process that cannot be ended, the server's own: the task is left with the CPU."""


class TimeLimitReached(JobFailed):
    """A scan's method computed for longer than its limit; its worker was ended."""


class WorkerDied(JobFailed):
    """A worker process died of a task, and the next one as well."""


class WorkerKilled(WorkerDied):
    """The same, by SIGKILL: what the system does when the machine's memory is used up."""


class SchedulerError(ReconError):
    """The Dask scheduler cannot be used: not reachable, not safe, not installed, or its workers are of another version."""


class RawFileError(ReconError):
    """A raw data file cannot be read, or is no MRD raw file."""


class ReplayFailed(ReconError):
    """A replay did not end as it should: the server reported an error, sent no image, or broke the protocol.

    ``result`` has what arrived until then (``gadgets.replay.ReplayResult``).
    """

    result: object = None


class CaptureGone(ReconError):
    """The raw data of a job were not kept, or have been removed since."""


class RetryFailed(ReconError):
    """A job that was tried again failed again."""
