"""NHLBI buffers: bounds, error bound, refusal of contradictions."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from gadgets.errors import MalformedMessage
from gadgets.wire.compression import decode
from tests.wire.compressed import encode


def samples(n: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((n, 2)) * 10.0).astype(np.float32).view(np.complex64)[:, 0]


@given(st.integers(1, 70), st.integers(3, 31), st.integers(0, 99))
@settings(max_examples=100, deadline=None)
def test_precision(n: int, bits: int, seed: int) -> None:
    values = samples(n, seed)
    parts = values.view(np.float32)
    decoded = decode(encode(values, bits=bits), 2 * n)
    step = np.abs(parts).max() / (2 ** (bits - 1) - 2)
    assert np.abs(decoded - parts).max() <= 0.5 * step + 4e-7 * np.abs(parts).max()


@pytest.mark.parametrize("tolerance", [3.0, 0.05, 1e-4])
def test_tolerance(tolerance: float) -> None:
    values = samples(1000)
    decoded = decode(encode(values, tolerance=tolerance), 2000)
    assert np.abs(decoded - values.view(np.float32)).max() <= tolerance + 4e-7 * np.abs(values.view(np.float32)).max()


@pytest.mark.parametrize("bits", range(1, 33))
def test_integers_of_every_width(bits: int) -> None:
    """Bits packed one by one with Python's integers, as the format says, against the strided decoder."""
    rng = np.random.default_rng(bits)
    numbers = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), 37).tolist()
    packed = sum((number & ((1 << bits) - 1)) << (i * bits) for i, number in enumerate(numbers))
    size = -(-bits * 37 // 8)
    buffer = struct.pack("<QfB", 37, 2.0, bits) + packed.to_bytes(size, "little")
    assert_array_equal(decode(buffer, 37), np.array(numbers, np.float32) / 2)


def test_whole_words_are_accepted() -> None:
    buffer = encode(samples(5), bits=9)
    assert_array_equal(decode(buffer + b"\0" * (-(len(buffer) - 13) % 8), 10), decode(buffer, 10))


def test_zeros() -> None:
    assert not decode(encode(np.zeros(4, np.complex64), bits=12), 8).any()
    assert not decode(struct.pack("<QfB", 8, float("inf"), 2) + b"\0\0", 8).any()
    assert decode(struct.pack("<QfB", 0, 1.0, 2), 0).shape == (0,)


@pytest.mark.parametrize(
    "buffer",
    [
        b"",
        struct.pack("<QfB", 8, 1.0, 8)[:-1],
        struct.pack("<QfB", 7, 1.0, 8) + bytes(8),
        struct.pack("<QfB", 1 << 60, 1.0, 8) + bytes(8),
        struct.pack("<QfB", 8, 1.0, 0) + bytes(8),
        struct.pack("<QfB", 8, 1.0, 33) + bytes(33),
        struct.pack("<QfB", 8, 0.0, 8) + bytes(8),
        struct.pack("<QfB", 8, -1.0, 8) + bytes(8),
        struct.pack("<QfB", 8, float("nan"), 8) + bytes(8),
        struct.pack("<QfB", 8, 1.0, 8) + bytes(7),
        struct.pack("<QfB", 8, 1.0, 8) + bytes(17),
    ],
)
def test_contradictions(buffer: bytes) -> None:
    with pytest.raises(MalformedMessage):
        decode(buffer, 8)
