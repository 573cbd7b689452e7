"""NHLBI compression of readouts (client options ``-P`` and ``-T``; acquisition flag 54).

A buffer is ``u64 elements, f32 scale, u8 bits`` (packed, 13 bytes) and then, without gaps, ``elements`` two's-complement
integers of ``bits`` bits each, least significant bit first. A value is ``integer / scale``; real and imaginary parts
alternate. The encoder rounds to the nearest integer, so the error is at most ``0.5 / scale``.

Format as in gadgetron 4.7.2 (``NHLBICompression.h``), checked against bytes that its client sent.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gadgets.errors import MalformedMessage

PREFIX = np.dtype([("elements", "<u8"), ("scale", "<f4"), ("bits", "u1")])


def decode(buffer: bytes | memoryview, elements: int) -> NDArray[np.float32]:
    """Unpack one buffer.

    Parameters
    ----------
    buffer
        The whole buffer, prefix included.
    elements
        How many float32 values the readout's header promises (``2 * coils * samples``).

    Returns
    -------
    float32 ``(elements,)``.

    Raises
    ------
    MalformedMessage
        The buffer disagrees with ``elements``, its bits are not 1 to 32, its scale is not positive, or its size is not what
        elements and bits need. Checked before anything is allocated.
    """
    size = len(buffer)
    if size < PREFIX.itemsize:
        raise _malformed("buffer", f"{size} bytes", f"at least {PREFIX.itemsize} bytes")
    prefix = np.frombuffer(buffer, PREFIX, 1)[0]
    claimed, scale, bits = int(prefix["elements"]), float(prefix["scale"]), int(prefix["bits"])
    if claimed != elements:
        raise _malformed("number of elements", claimed, f"{elements}, twice coils times samples of the header")
    if not 1 <= bits <= 32:
        raise _malformed("number of bits", bits, "1 to 32")
    if not scale > 0:
        raise _malformed("scale", scale, "a positive number")
    packed = -(-bits * elements // 8)
    # newer encoders fill up to whole 64-bit words
    if not packed <= size - PREFIX.itemsize <= packed + 8:
        raise _malformed("size", f"{size} bytes", f"{packed + PREFIX.itemsize} bytes")
    if math.isinf(scale):
        return np.zeros(elements, np.float32)  # how a readout of nothing but zeros is encoded with -P
    return _unpack(buffer, bits, elements) / np.float32(scale)


def _unpack(buffer: bytes | memoryview, bits: int, elements: int) -> NDArray[np.float32]:
    """The integers as float32. Eight of them take ``bits`` whole bytes, so each of the eight has a constant stride."""
    groups = -(-elements // 8)
    padded = np.zeros(groups * bits + 8, np.uint8)
    data = np.frombuffer(buffer, np.uint8, offset=PREFIX.itemsize)[: groups * bits]
    padded[: len(data)] = data
    values = np.empty((groups, 8), np.float32)
    up = np.int64(64 - bits)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        words: NDArray[np.int64] = np.ndarray((groups,), "<i8", padded, offset=byte, strides=(bits,))
        # to the top, then back with the sign
        values[:, lane] = (words << (up - shift)) >> up
    return values.reshape(-1)[:elements]


def encode(samples: NDArray[np.complex64], *, tolerance: float | None = None, bits: int | None = None) -> bytes:
    """Pack samples to a largest error (the client's ``-T``) or a number of bits (``-P``); give exactly one of them.

    The real client chooses a slightly larger scale for the same request; any decoder reads the scale from the buffer.

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


def _malformed(field: str, got: object, expected: object) -> MalformedMessage:
    return MalformedMessage(f"the {field} is wrong", where="compressed readout", got=got, expected=expected)
