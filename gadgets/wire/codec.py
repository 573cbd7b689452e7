"""Encoders: one function per message, each returns the message's bytes including its id.

Array shapes are the truth: header fields that describe a shape are set from the arrays, in a copy.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gadgets.errors import MalformedText, Oversized
from gadgets.wire.dtypes import (
    ACQUISITION_HEADER,
    DATA_TYPE_CODES,
    IMAGE_HEADER,
    READOUT_RECORD,
    WAVEFORM_HEADER,
    Flag,
    flag_bits,
)
from gadgets.wire.framing import CONFIG_NAME_BYTES
from gadgets.wire.ids import MessageId
from recon_core.errors import DataError

_COMPRESSION_FLAGS = flag_bits(Flag.ACQ_COMPRESSION1, Flag.ACQ_COMPRESSION2)


def _id(number: MessageId) -> bytes:
    return struct.pack("<H", number)


def _sized(text: str | bytes, length: str, nul: bool = False) -> bytes:
    raw = (text.encode("utf-8") if isinstance(text, str) else text) + (b"\0" if nul else b"")
    if length == "<I" and len(raw) >= 1 << 32:
        raise Oversized("a text does not fit its length field", got=f"{len(raw)} bytes", expected="under 4 GiB")
    return struct.pack(length, len(raw)) + raw


def config_file(name: str) -> bytes:
    """Id 1: the name of a configuration, NUL padded to 1024 bytes.

    Raises
    ------
    MalformedText
        The name is longer than 1023 bytes in UTF-8 or contains a NUL.
    """
    raw = name.encode("utf-8")
    if len(raw) >= CONFIG_NAME_BYTES or b"\0" in raw:
        raise MalformedText("not a configuration name", got=f"{len(raw)} bytes", expected="at most 1023 bytes without NUL")
    return _id(MessageId.CONFIG_FILE) + raw.ljust(CONFIG_NAME_BYTES, b"\0")


def config_script(text: str, nul: bool = False) -> bytes:
    """Id 2: a configuration as text; ``nul`` adds FIRE's NUL, counted in the length."""
    return _id(MessageId.CONFIG_SCRIPT) + _sized(text, "<I", nul)


def header(text: str | bytes, nul: bool = False) -> bytes:
    """Id 3: the MRD header (bytes as they are); ``nul`` adds FIRE's NUL, counted in the length."""
    return _id(MessageId.HEADER) + _sized(text, "<I", nul)


def close() -> bytes:
    """Id 4."""
    return _id(MessageId.CLOSE)


def text(words: str) -> bytes:
    """Id 5. The real client prints it as it is: end it with a newline."""
    return _id(MessageId.TEXT) + _sized(words, "<I")


def query(words: str, correlation: int = 0) -> bytes:
    """Id 6: reserved u64 (0), correlation id, length, text."""
    return _id(MessageId.QUERY) + struct.pack("<QQ", 0, correlation) + _sized(words, "<Q")


def response(correlation: int, words: str) -> bytes:
    """Id 7: the answer to a query."""
    return _id(MessageId.RESPONSE) + struct.pack("<Q", correlation) + _sized(words, "<Q")


def error(words: str) -> bytes:
    """Id 8: only from an external node to Gadgetron; a client aborts on it."""
    return _id(MessageId.ERROR) + _sized(words, "<Q")


def dependency(meta_xml: str) -> bytes:
    """Id 1019: an ismrmrdMeta document, the answer on a noise-dependency connection."""
    return _id(MessageId.DEPENDENCY) + _sized(meta_xml, "<Q")


def acquisitions(
    headers: NDArray[np.void], samples: NDArray[np.complex64], trajectories: NDArray[np.float32] | None = None
) -> bytearray:
    """Id 1008: ``n`` readouts of one shape as one run of bytes.

    Parameters
    ----------
    headers
        ``ACQUISITION_HEADER`` ``(n,)``. Number of samples, active channels, trajectory dimensions and the compression flags
        are set from the arrays.
    samples
        complex64 ``(n, coil, sample)``.
    trajectories
        float32 ``(n, sample, dimension)``.

    Raises
    ------
    DataError
        The arrays do not belong together.
    """
    records, points = _records(headers, samples, trajectories)
    n, channels, n_samples = samples.shape
    first = READOUT_RECORD.itemsize + points.shape[-1]
    size = first + 8 * channels * n_samples
    stream = bytearray(n * size)
    rows = np.frombuffer(stream, np.uint8).reshape(n, size)
    rows[:, : READOUT_RECORD.itemsize] = records.view(np.uint8).reshape(n, -1)
    rows[:, READOUT_RECORD.itemsize : first] = points
    rows[:, first:] = np.ascontiguousarray(samples, dtype="<c8").view(np.uint8).reshape(n, size - first)
    return stream


def _records(
    headers: NDArray[np.void], samples: NDArray[np.complex64], trajectories: NDArray[np.float32] | None
) -> tuple[NDArray[np.void], NDArray[np.uint8]]:
    """Completed ids and headers ``(n,)`` and the trajectories as bytes ``(n, bytes)``."""
    if samples.ndim != 3 or headers.shape != samples.shape[:1] or headers.dtype != ACQUISITION_HEADER:
        raise DataError(
            "headers and samples do not belong together",
            where="acquisitions",
            got=f"headers {headers.shape}, samples {samples.shape}",
            expected="headers (n,) of ACQUISITION_HEADER, samples (n, coil, sample)",
        )
    n, channels, n_samples = samples.shape
    if max(channels, n_samples) > 0xFFFF:
        raise DataError(
            "a readout does not fit its header", got=samples.shape[1:], expected="at most 65535 coils and samples"
        )
    points, dims = np.zeros((n, 0), np.uint8), 0
    if trajectories is not None:
        if trajectories.ndim != 3 or trajectories.shape[:2] != (n, n_samples):
            raise DataError(
                "trajectories and samples do not belong together",
                where="acquisitions",
                got=trajectories.shape,
                expected=f"({n}, {n_samples}, dimension)",
            )
        dims = trajectories.shape[2]
        points = np.ascontiguousarray(trajectories, dtype="<f4").view(np.uint8).reshape(n, 4 * n_samples * dims)
    records = np.zeros(n, READOUT_RECORD)
    records["id"] = MessageId.ACQUISITION
    records["header"] = headers
    head = records["header"]
    head["number_of_samples"], head["active_channels"], head["trajectory_dimensions"] = n_samples, channels, dims
    head["flags"] &= ~_COMPRESSION_FLAGS
    return records, points


def waveform(header: NDArray[np.void] | np.void, data: NDArray[np.uint32]) -> bytes:
    """Id 1026: ``data`` is uint32 ``(channel, sample)``; the header's counts are set from it."""
    head = _one(header, WAVEFORM_HEADER)
    head["channels"], head["number_of_samples"] = data.shape
    return _id(MessageId.WAVEFORM) + head.tobytes() + np.ascontiguousarray(data, dtype="<u4").tobytes()


def image(header: NDArray[np.void] | np.void, attributes: str, data: NDArray[np.generic]) -> bytes:
    """Id 1022.

    Parameters
    ----------
    header
        ``IMAGE_HEADER``; data type, matrix size, channels and attribute length are set from the other arguments.
    attributes
        An ismrmrdMeta document, or ``""``.
    data
        ``(channel, z, y, x)`` of one of ``DATA_TYPES``.

    Raises
    ------
    DataError
        The data's axes or dtype cannot be sent.
    """
    code = DATA_TYPE_CODES.get(data.dtype.newbyteorder("<"))
    if code is None or data.ndim != 4 or max(data.shape) > 0xFFFF:
        raise DataError(
            "not an image that MRD can carry",
            where="image",
            got=f"{data.dtype} {data.shape}",
            expected="(channel, z, y, x) of u16, i16, u32, i32, f32, f64, c64 or c128",
        )
    raw = attributes.encode("utf-8")
    head = _one(header, IMAGE_HEADER)
    head["data_type"], head["channels"], head["matrix_size"] = code, data.shape[0], data.shape[:0:-1]
    head["attribute_string_len"] = len(raw)
    pixels = np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("<"))
    return b"".join((_id(MessageId.IMAGE), head.tobytes(), struct.pack("<Q", len(raw)), raw, pixels.tobytes()))


def _one(header: ArrayLike | np.void, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    """A writable copy of one header as a 0-dimensional array."""
    head = np.zeros((), dtype)
    head[...] = np.asarray(header, dtype=dtype).reshape(())
    return head
