"""NHLBI compression of readouts (client options ``-P`` and ``-T``; acquisition flag 54).

A buffer is ``u64 elements, f32 scale, u8 bits`` (packed, 13 bytes) and then, without gaps, ``elements`` two's-complement
integers of ``bits`` bits each, least significant bit first. A value is ``integer / scale``; real and imaginary parts
alternate.

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


def _malformed(field: str, got: object, expected: object) -> MalformedMessage:
    return MalformedMessage(f"the {field} is wrong", where="compressed readout", got=got, expected=expected)
