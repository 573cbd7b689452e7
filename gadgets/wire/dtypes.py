"""The fixed structures of the wire as numpy dtypes: little-endian, field names as in ``ismrmrd``.

The acquisition and image headers are packed; the waveform header has the C compiler's natural alignment (40 bytes).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

ENCODING_COUNTERS = np.dtype(
    [
        ("kspace_encode_step_1", "<u2"),
        ("kspace_encode_step_2", "<u2"),
        ("average", "<u2"),
        ("slice", "<u2"),
        ("contrast", "<u2"),
        ("phase", "<u2"),
        ("repetition", "<u2"),
        ("set", "<u2"),
        ("segment", "<u2"),
        ("user", "<u2", (8,)),
    ]
)

ACQUISITION_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("scan_counter", "<u4"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", (3,)),
        ("number_of_samples", "<u2"),
        ("available_channels", "<u2"),
        ("active_channels", "<u2"),
        ("channel_mask", "<u8", (16,)),
        ("discard_pre", "<u2"),
        ("discard_post", "<u2"),
        ("center_sample", "<u2"),
        ("encoding_space_ref", "<u2"),
        ("trajectory_dimensions", "<u2"),
        ("sample_time_us", "<f4"),
        ("position", "<f4", (3,)),
        ("read_dir", "<f4", (3,)),
        ("phase_dir", "<f4", (3,)),
        ("slice_dir", "<f4", (3,)),
        ("patient_table_position", "<f4", (3,)),
        ("idx", ENCODING_COUNTERS),
        ("user_int", "<i4", (8,)),
        ("user_float", "<f4", (8,)),
    ]
)

READOUT_RECORD = np.dtype([("id", "<u2"), ("header", ACQUISITION_HEADER)])
"""The fixed beginning of an acquisition message: id and header, 342 bytes; trajectory and samples follow."""

IMAGE_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("data_type", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("matrix_size", "<u2", (3,)),
        ("field_of_view", "<f4", (3,)),
        ("channels", "<u2"),
        ("position", "<f4", (3,)),
        ("read_dir", "<f4", (3,)),
        ("phase_dir", "<f4", (3,)),
        ("slice_dir", "<f4", (3,)),
        ("patient_table_position", "<f4", (3,)),
        ("average", "<u2"),
        ("slice", "<u2"),
        ("contrast", "<u2"),
        ("phase", "<u2"),
        ("repetition", "<u2"),
        ("set", "<u2"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", (3,)),
        ("image_type", "<u2"),
        ("image_index", "<u2"),
        ("image_series_index", "<u2"),
        ("user_int", "<i4", (8,)),
        ("user_float", "<f4", (8,)),
        ("attribute_string_len", "<u4"),
    ]
)

WAVEFORM_HEADER = np.dtype(
    {
        "names": [
            "version",
            "flags",
            "measurement_uid",
            "scan_counter",
            "time_stamp",
            "number_of_samples",
            "channels",
            "sample_time_us",
            "waveform_id",
        ],
        "formats": ["<u2", "<u8", "<u4", "<u4", "<u4", "<u2", "<u2", "<f4", "<u2"],
        "offsets": [0, 8, 16, 20, 24, 28, 30, 32, 36],
        "itemsize": 40,
    }
)

DATA_TYPES: dict[int, np.dtype[np.generic]] = {
    1: np.dtype("<u2"),
    2: np.dtype("<i2"),
    3: np.dtype("<u4"),
    4: np.dtype("<i4"),
    5: np.dtype("<f4"),
    6: np.dtype("<f8"),
    7: np.dtype("<c8"),
    8: np.dtype("<c16"),
}
"""``data_type`` of the image header to the dtype of its pixels."""

DATA_TYPE_CODES: dict[np.dtype[np.generic], int] = {dtype: code for code, dtype in DATA_TYPES.items()}


class Flag(IntEnum):
    """Flags of an acquisition header with ISMRMRD's numbers: flag ``n`` is bit ``n - 1``."""

    ACQ_FIRST_IN_ENCODE_STEP1 = 1
    ACQ_LAST_IN_ENCODE_STEP1 = 2
    ACQ_FIRST_IN_ENCODE_STEP2 = 3
    ACQ_LAST_IN_ENCODE_STEP2 = 4
    ACQ_FIRST_IN_AVERAGE = 5
    ACQ_LAST_IN_AVERAGE = 6
    ACQ_FIRST_IN_SLICE = 7
    ACQ_LAST_IN_SLICE = 8
    ACQ_FIRST_IN_CONTRAST = 9
    ACQ_LAST_IN_CONTRAST = 10
    ACQ_FIRST_IN_PHASE = 11
    ACQ_LAST_IN_PHASE = 12
    ACQ_FIRST_IN_REPETITION = 13
    ACQ_LAST_IN_REPETITION = 14
    ACQ_FIRST_IN_SET = 15
    ACQ_LAST_IN_SET = 16
    ACQ_FIRST_IN_SEGMENT = 17
    ACQ_LAST_IN_SEGMENT = 18
    ACQ_IS_NOISE_MEASUREMENT = 19
    ACQ_IS_PARALLEL_CALIBRATION = 20
    ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING = 21
    ACQ_IS_REVERSE = 22
    ACQ_IS_NAVIGATION_DATA = 23
    ACQ_IS_PHASECORR_DATA = 24
    ACQ_LAST_IN_MEASUREMENT = 25
    ACQ_IS_HPFEEDBACK_DATA = 26
    ACQ_IS_DUMMYSCAN_DATA = 27
    ACQ_IS_RTFEEDBACK_DATA = 28
    ACQ_IS_SURFACECOILCORRECTIONSCAN_DATA = 29
    ACQ_IS_PHASE_STABILIZATION_REFERENCE = 30
    ACQ_IS_PHASE_STABILIZATION = 31
    ACQ_COMPRESSION1 = 53  # ZFP (client -Z): refused here
    ACQ_COMPRESSION2 = 54  # NHLBI (client -P, -T): decoded here
    ACQ_COMPRESSION3 = 55
    ACQ_COMPRESSION4 = 56
    ACQ_USER1 = 57
    ACQ_USER2 = 58
    ACQ_USER3 = 59
    ACQ_USER4 = 60
    ACQ_USER5 = 61
    ACQ_USER6 = 62
    ACQ_USER7 = 63
    ACQ_USER8 = 64
    COMPRESSION1 = 53
    COMPRESSION2 = 54

    @property
    def bit(self) -> int:
        """The flag as a mask for the 64-bit ``flags`` field."""
        return 1 << (int(self) - 1)


def concatenate_headers(parts: Sequence[NDArray[np.void]]) -> NDArray[np.void]:
    """Join arrays ``(n,)`` of one structured dtype.

    ``numpy.concatenate`` compares the fields of every acquisition header array one by one; here they are bytes.
    """
    if len(parts) == 1:
        return parts[0]
    dtype = parts[0].dtype
    rows = np.concatenate([np.ascontiguousarray(p).view(np.uint8).reshape(len(p), dtype.itemsize) for p in parts])
    return rows.view(dtype)[:, 0]


def flag_bits(*flags: Flag) -> np.uint64:
    """Several flags as one mask."""
    mask = 0
    for flag in flags:
        mask |= flag.bit
    return np.uint64(mask)


def any_flag(headers: NDArray[np.void], *flags: Flag) -> NDArray[np.bool_]:
    """For each header: is at least one of the flags set?

    Parameters
    ----------
    headers
        ``ACQUISITION_HEADER`` (or ``IMAGE_HEADER``, ``WAVEFORM_HEADER``) array of any shape.

    Returns
    -------
    bool array of the same shape.
    """
    return np.asarray((headers["flags"] & flag_bits(*flags)) != 0)


def has_flag(headers: NDArray[np.void], flag: Flag) -> NDArray[np.bool_]:
    """For each header: is this flag set?"""
    return any_flag(headers, flag)
