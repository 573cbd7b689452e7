"""Structures and flags against the ISMRMRD library, and encoders against its reader."""

from __future__ import annotations

import io

import ismrmrd
import numpy as np
import pytest
from ismrmrd import hdf5
from numpy.testing import assert_array_equal

from gadgets.errors import MalformedText
from gadgets.wire import codec
from gadgets.wire.dtypes import (
    ACQUISITION_HEADER,
    DATA_TYPES,
    IMAGE_HEADER,
    WAVEFORM_HEADER,
    Flag,
    any_flag,
    has_flag,
)
from recon_core.errors import DataError
from tests.wire import streams


def test_headers_equal_the_library() -> None:
    assert np.dtype(hdf5.acquisition_header_dtype) == ACQUISITION_HEADER
    assert np.dtype(hdf5.image_header_dtype) == IMAGE_HEADER
    theirs = np.dtype(hdf5.waveform_header_dtype)
    assert WAVEFORM_HEADER.itemsize == theirs.itemsize == 40
    assert {n: WAVEFORM_HEADER.fields[n] for n in WAVEFORM_HEADER.names or ()} == dict(theirs.fields or {})  # type: ignore[index]
    assert (ACQUISITION_HEADER.itemsize, IMAGE_HEADER.itemsize) == (340, 198)


def test_flags_equal_the_library() -> None:
    ours = {flag.name: int(flag) for flag in Flag}
    theirs = {n: v for n, v in vars(ismrmrd).items() if n.startswith("ACQ_") and isinstance(v, int)}
    assert ours == theirs


def test_data_types_equal_the_library() -> None:
    names = {1: "USHORT", 2: "SHORT", 3: "UINT", 4: "INT", 5: "FLOAT", 6: "DOUBLE", 7: "CXFLOAT", 8: "CXDOUBLE"}
    assert {code: getattr(ismrmrd, f"DATATYPE_{name}") for code, name in names.items()} == {c: c for c in DATA_TYPES}


def test_flag_queries() -> None:
    headers = np.zeros(4, ACQUISITION_HEADER)
    headers["flags"][1] = Flag.ACQ_IS_NOISE_MEASUREMENT.bit
    headers["flags"][2] = Flag.ACQ_USER8.bit | Flag.ACQ_FIRST_IN_ENCODE_STEP1.bit
    assert has_flag(headers, Flag.ACQ_IS_NOISE_MEASUREMENT).tolist() == [False, True, False, False]
    assert has_flag(headers, Flag.ACQ_USER8).tolist() == [False, False, True, False]
    assert any_flag(headers, Flag.ACQ_USER8, Flag.ACQ_IS_NOISE_MEASUREMENT).tolist() == [False, True, True, False]
    assert has_flag(headers[2], Flag.ACQ_FIRST_IN_ENCODE_STEP1)


def test_library_reads_our_acquisitions() -> None:
    headers, samples, points = streams.readouts(3, 2, 5, dims=2)
    stream = io.BytesIO(bytes(codec.acquisitions(headers, samples, points)))
    for i in range(3):
        assert stream.read(2) == b"\xf0\x03"
        theirs = ismrmrd.Acquisition.deserialize_from(stream.read)
        assert_array_equal(theirs.data, samples[i])
        assert_array_equal(theirs.traj, points[i])  # type: ignore[index]
        assert theirs.scan_counter == i
    assert stream.read() == b""


def test_library_reads_our_image() -> None:
    meta = "<ismrmrdMeta><meta><name>GT</name><value>ü &lt; 1</value></meta></ismrmrdMeta>"
    pixels = np.arange(24, dtype=np.float32).reshape(2, 1, 3, 4)
    stream = io.BytesIO(codec.image(np.zeros((), IMAGE_HEADER), meta, pixels))
    assert stream.read(2) == b"\xfe\x03"
    theirs = ismrmrd.Image.deserialize_from(stream.read)
    assert_array_equal(theirs.data, pixels)
    assert theirs.meta["GT"] == "ü < 1"
    assert stream.read() == b""


def test_encoders_leave_the_callers_arrays_alone() -> None:
    headers, samples, points = streams.readouts(2, 3, 4, dims=1)
    for array in (headers, samples, points):
        assert array is not None
        array.flags.writeable = False
    codec.acquisitions(headers, samples, points)
    assert (headers["number_of_samples"] == 0).all()


def test_encoders_refuse_what_does_not_fit() -> None:
    headers, samples, points = streams.readouts(2, 3, 4, dims=1)
    with pytest.raises(DataError):
        codec.acquisitions(headers[:1], samples)
    with pytest.raises(DataError):
        codec.acquisitions(headers, samples, points[:, :2] if points is not None else None)
    with pytest.raises(DataError):
        codec.acquisitions(headers, np.zeros((2, 1, 70000), np.complex64))
    with pytest.raises(DataError):
        codec.image(np.zeros((), IMAGE_HEADER), "", np.zeros((1, 1, 2, 2), np.int64))
    with pytest.raises(DataError):
        codec.image(np.zeros((), IMAGE_HEADER), "", np.zeros((2, 2), np.float32))
    for name in ("a" * 1024, "a\0b"):
        with pytest.raises(MalformedText):
            codec.config_file(name)
