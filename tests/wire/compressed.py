"""Readouts as the client sends them with ``-T tolerance`` or ``-P bits``; the format is that of ``gadgets.wire.compression``."""

from __future__ import annotations

import math
import struct

import numpy as np
from numpy.typing import NDArray

from gadgets.wire import codec
from gadgets.wire.compression import PREFIX
from gadgets.wire.dtypes import READOUT_RECORD, Flag, flag_bits


def encode(samples: NDArray[np.complex64], *, tolerance: float | None = None, bits: int | None = None) -> bytes:
    """Pack samples to a largest error (the client's ``-T``) or a number of bits (``-P``); give exactly one of them.

    Values are rounded to the nearest integer, so the error is at most ``0.5 / scale``. The real client chooses a slightly larger
    scale for the same request; any decoder reads the scale from the buffer.

    Parameters
    ----------
    samples
        complex64 of any shape, packed in C order.
    tolerance
        Largest error of a real or imaginary part.
    bits
        2 to 31 bits per value; the scale then follows from the largest value.

    Raises
    ------
    ValueError
        Neither or both were given, or the values would need more than 32 bits.
    """
    if (tolerance is None) == (bits is None):
        raise ValueError("give either tolerance or bits")
    values = np.ascontiguousarray(samples, dtype="<c8").reshape(-1).view("<f4").astype(np.float64)
    largest = float(np.abs(values).max(initial=0.0))
    if tolerance is not None:
        scale = float(np.float32(0.5 / tolerance))
        bits = math.ceil(scale * largest + 1).bit_length() + 1
    else:
        assert bits is not None
        scale = float(np.float32((2 ** (bits - 1) - 2) / largest)) if largest else 1.0
    if not 2 <= bits <= 32:
        raise ValueError(f"{bits} bits per value; 2 to 32 are possible")
    largest_integer = 2 ** (bits - 1) - 1  # float32 may have rounded the scale up
    whole = np.rint(values * scale).clip(-largest_integer, largest_integer).astype(np.int64)
    lanes = ((whole[:, None] >> np.arange(bits)) & 1).astype(np.uint8)
    prefix = np.array((len(values), scale, bits), PREFIX)
    return prefix.tobytes() + np.packbits(lanes.reshape(-1), bitorder="little").tobytes()


def compressed_acquisitions(
    headers: NDArray[np.void],
    samples: NDArray[np.complex64],
    trajectories: NDArray[np.float32] | None = None,
    *,
    tolerance: float | None = None,
    bits: int | None = None,
) -> bytearray:
    """``codec.acquisitions`` with each readout's samples packed and flag 54 set."""
    plain = codec.acquisitions(headers, samples, trajectories)
    size = len(plain) // len(samples)
    stream = bytearray()
    for start, readout in zip(range(0, len(plain), size), samples, strict=True):
        record = np.frombuffer(plain, READOUT_RECORD, 1, start).copy()
        record["header"]["flags"] |= flag_bits(Flag.ACQ_COMPRESSION2)
        trajectory = plain[start + READOUT_RECORD.itemsize : start + size - 8 * readout.size]
        packed = encode(readout, tolerance=tolerance, bits=bits)
        stream += record.tobytes() + trajectory + struct.pack("<I", len(packed)) + packed
    return stream
