"""Headers and readouts of made-up scans for the buffer's tests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gadgets.wire.dtypes import ACQUISITION_HEADER
from gadgets.wire.header import Encoding, Limit, MrdHeader


def flag(*bits: int) -> int:
    return sum(1 << (b - 1) for b in bits)


def mrd_header(
    n_x: int = 16,
    n1: int = 8,
    n2: int = 1,
    *,
    limits: Mapping[str, Limit] | None = None,
    recon_x: int | None = None,
    **fields: Any,
) -> MrdHeader:
    """One Cartesian encoding of ``n_x`` encoded samples; the image has ``recon_x`` of those pixels."""
    recon_x = recon_x or n_x
    encoding = Encoding(
        trajectory="cartesian",
        encoded_matrix=(n2, n1, n_x),
        encoded_fov=(0.008, 0.2, 0.2 * n_x / recon_x),
        recon_matrix=(n2, n1, recon_x),
        recon_fov=(0.008, 0.2, 0.2),
        limits=dict(limits or {}),
        acceleration=fields.pop("acceleration", None),
    )
    return MrdHeader(encodings=(encoding, *fields.pop("more_encodings", ())), **fields)


def readout_headers(counters: Iterable[Mapping[str, int]], n_samples: int = 16, n_channels: int = 2) -> np.ndarray:
    """One header per mapping; keys are idx names, ``k1``, ``k2``, or header field names (``flags``, ...)."""
    counters = list(counters)
    headers = np.zeros(len(counters), ACQUISITION_HEADER)
    headers["version"] = 1
    headers["scan_counter"] = np.arange(len(counters))
    headers["number_of_samples"] = n_samples
    headers["center_sample"] = n_samples // 2
    headers["active_channels"] = headers["available_channels"] = n_channels
    headers["read_dir"], headers["phase_dir"], headers["slice_dir"] = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    names = {"k1": "kspace_encode_step_1", "k2": "kspace_encode_step_2"}
    for header, values in zip(headers, counters, strict=True):
        for key, value in values.items():
            name = names.get(key, key)
            if name in (ACQUISITION_HEADER["idx"].names or ()):
                header["idx"][name] = value
            else:
                header[name] = value
    return headers


def numbered_rows(n: int, n_coils: int, n_x: int) -> np.ndarray:
    """complex64 ``(readout, coil, x)``; small integers, so that means of few are exact and every readout differs."""
    readout, coil, x = np.meshgrid(np.arange(n), np.arange(n_coils), np.arange(n_x), indexing="ij")
    return (readout * 64 + coil * 16 + x + 1j * (x - readout)).astype(np.complex64)
