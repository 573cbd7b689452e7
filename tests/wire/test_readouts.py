"""Samples and trajectories read back from a verbatim log."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from gadgets.errors import MalformedMessage, SpoolError
from gadgets.wire import codec, events, readouts
from gadgets.wire.framing import FrameParser
from gadgets.wire.readouts import groups, read_samples
from recon_core.errors import DataError
from tests.wire import streams
from tests.wire.compressed import compressed_acquisitions


def write(path: Path, *parts: bytes | bytearray) -> tuple[Path, events.Readouts]:
    data = b"".join(parts)
    path.write_bytes(data)
    found = [e for e in FrameParser().feed(data) if isinstance(e, events.Readouts)]
    return path, events.Readouts(
        found[0].offset,
        np.concatenate([e.headers for e in found]),
        np.concatenate([e.offsets for e in found]),
        np.concatenate([e.payload_bytes for e in found]),
    )


def pick(event: events.Readouts, index: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return event.headers[index], event.offsets[index], event.payload_bytes[index]


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, events.Readouts, np.ndarray]:
    """30 readouts of one shape with waveforms, navigators and a long gap between them."""
    headers, samples, _ = streams.readouts(30, 2, 8)
    wave, navigator = codec.waveform(*streams.waveform()), codec.acquisitions(*streams.readouts(1, 1, 3, seed=9))
    gap = codec.text("x" * 200_000)
    path, event = write(
        tmp_path / "log",
        codec.acquisitions(headers[:7], samples[:7]),
        wave,
        codec.acquisitions(headers[7:9], samples[7:9]),
        navigator,
        codec.acquisitions(headers[9:10], samples[9:10]),
        wave,
        gap,
        codec.acquisitions(headers[10:], samples[10:]),
    )
    keep = np.flatnonzero(event.headers["number_of_samples"] == 8)
    return path, events.Readouts(event.offset, *pick(event, keep)), samples


@given(order=st.lists(st.integers(0, 29), max_size=60), block=st.sampled_from([1, 1000, 3000, 4 << 20]))
@settings(max_examples=60, deadline=None)
def test_any_selection_in_any_order(
    order: list[int], block: int, mixed_once: tuple[Path, events.Readouts, np.ndarray], request: pytest.FixtureRequest
) -> None:
    path, event, samples = mixed_once
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readouts, "BLOCK_BYTES", block)
        index = np.array(order, int)
        got = read_samples(path, *pick(event, index))
    if order:
        assert_array_equal(got, samples[index])
    assert got.dtype == np.complex64


@pytest.fixture(scope="module")
def mixed_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, events.Readouts, np.ndarray]:
    return mixed.__wrapped__(tmp_path_factory.mktemp("log"))  # type: ignore[attr-defined]


def test_open_descriptor_and_given_place(mixed: tuple[Path, events.Readouts, np.ndarray]) -> None:
    path, event, samples = mixed
    slab = np.zeros((40, 2, 8), np.complex64)
    fd = os.open(path, os.O_RDONLY)
    try:
        got = read_samples(fd, *pick(event, slice(None)), out=slab[5:35])
    finally:
        os.close(fd)
    assert np.shares_memory(got, slab)
    assert_array_equal(slab[5:35], samples)
    assert not slab[:5].any() and not slab[35:].any()
    with pytest.raises(DataError):
        read_samples(path, *pick(event, slice(None)), out=slab)


def test_compressed_and_plain_together(tmp_path: Path) -> None:
    headers, samples, _ = streams.readouts(6, 3, 10)
    path, event = write(
        tmp_path / "log",
        codec.acquisitions(headers[:2], samples[:2]),
        compressed_acquisitions(headers[2:4], samples[2:4], tolerance=1e-3),
        codec.acquisitions(headers[4:], samples[4:]),
    )
    order = [5, 2, 0, 3, 4, 1]
    got = read_samples(path, *pick(event, order))
    assert_array_equal(got[[0, 2, 4, 5]], samples[[5, 0, 4, 1]])
    assert 0 < np.abs(got - samples[order]).max() < 1.5e-3
    assert sorted(len(g) for g in groups(event.headers)) == [2, 4]


def test_samples_behind_trajectories(tmp_path: Path) -> None:
    headers, samples, points = streams.readouts(7, 2, 5, dims=3)
    assert points is not None
    path, event = write(
        tmp_path / "log",
        codec.acquisitions(headers[:4], samples[:4], points[:4]),
        compressed_acquisitions(headers[4:], samples[4:], points[4:], bits=20),
    )
    order = [6, 0, 5, 1]
    got = read_samples(path, *pick(event, order))
    assert np.abs(got - samples[order]).max() < 1e-4
    assert_array_equal(got[[1, 3]], samples[[0, 1]])


def test_nothing_and_empty_readouts(tmp_path: Path) -> None:
    headers, samples, _ = streams.readouts(3, 0, 0)
    path, event = write(tmp_path / "log", codec.acquisitions(headers, samples))
    assert read_samples(path, *pick(event, slice(None))).shape == (3, 0, 0)
    assert len(read_samples(path, *pick(event, slice(0)))) == 0
    assert list(groups(event.headers[:0])) == []


def test_different_shapes_are_refused(tmp_path: Path) -> None:
    path, event = write(
        tmp_path / "log", codec.acquisitions(*streams.readouts(1, 2, 4)), codec.acquisitions(*streams.readouts(1, 2, 5))
    )
    with pytest.raises(DataError, match="number_of_samples"):
        read_samples(path, *pick(event, slice(None)))


def test_short_or_missing_log(tmp_path: Path) -> None:
    path, event = write(tmp_path / "log", codec.acquisitions(*streams.readouts(3, 2, 4)))
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(SpoolError, match="ends before"):
        read_samples(path, *pick(event, slice(None)))
    with pytest.raises(SpoolError, match="opened"):
        read_samples(tmp_path / "none", *pick(event, slice(None)))


def test_compressed_buffer_must_fit_its_header(tmp_path: Path) -> None:
    data = compressed_acquisitions(*streams.readouts(1, 2, 4), bits=8)
    data[40] = 3  # one coil more than were packed
    path, event = write(tmp_path / "log", data)
    with pytest.raises(MalformedMessage, match="elements"):
        read_samples(path, *pick(event, slice(None)))
