"""Measured MOLLI images times simulated coils, encoded as readouts: semi-measured scans that go through the whole path."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.measured_series import Measured, measured
from gadgets.simulate import simulate_kind, stream_of
from recon_core.maps.t1 import molli_t1
from recon_core.preprocess.oversampling import to_recon_matrix
from recon_core.simulation.options import settings_for
from tests.e2e.scans import SimulatedScan

OVERSAMPLING = 2


@lru_cache(maxsize=4)
def semi_measured_molli(name: str, matrix: int, **settings: Any) -> tuple[SimulatedScan, Measured]:
    """A measured series at a smaller (or its own) square matrix as a MOLLI scan; and the series itself.

    Parameters
    ----------
    name
        See ``benchmarks.measured_series``; polarity is restored.
    matrix
        At most the images' own.
    settings
        Of the simulation: coils, mask, acceleration, snr, ...
    """
    series = measured(name)
    images = _inverted(series)
    fov = (1.0, 1.0, 1.0)
    images = to_recon_matrix(torch.from_numpy(images)[:, None], (1, *images.shape[1:]), fov, (1, matrix, matrix), fov)[
        :, 0
    ].numpy()
    n_states, n, _ = images.shape
    complete = settings_for(
        "molli",
        {
            "matrix_x": n,
            "matrix_y": n,
            "scheme": str(n_states),
            "oversampling": OVERSAMPLING,
            "waveforms": False,
            **settings,
        },
    )
    scan = simulate_kind("molli", complete)
    # as bright as the simulated object, so that its noise and SNR hold
    images = images * np.percentile(np.abs(scan.truth.images), 99) / np.percentile(np.abs(images), 99)
    y, x = np.meshgrid(*[(np.arange(n) - n // 2) / (n / 2)] * 2, indexing="ij")
    images = (images * np.exp(1j * (0.8 * x - 0.6 * y + 0.4 * x * y)))[None, :, None]  # (slice, state, z, y, x)
    coil_images = images[:, :, None] * scan.truth.coil_maps[:, None]
    clean = encode_oversampled(coil_images, (-2, -1))
    truth = replace(scan.truth, images=images.astype(np.complex64), states=series.times)
    scan = replace(scan, clean=clean, truth=truth)
    return SimulatedScan(Path("(in memory)"), stream_of(scan)), series


def _inverted(series: Measured) -> NDArray[np.float64]:
    """Polarity that an inversion can have: a series that only ever rises from above zero may fit better, but none starts there."""
    signed, magnitude = (
        molli_t1(images, series.times).t1.valid[0].numpy()
        for images in (
            torch.from_numpy(series.images)[:, None].to(torch.complex64),
            torch.from_numpy(np.abs(series.images))[:, None].float(),
        )
    )
    images = series.images.copy()
    earliest = int(np.argmin(series.times))
    images[earliest][magnitude & ~signed & (images[earliest] > 0)] *= -1
    return images


def encode_oversampled(images: NDArray[np.complexfloating], axes: tuple[int, ...]) -> NDArray[np.complex64]:
    """Oversampled k-space of ``(..., z, y, x)``: the field of view along x is padded with air."""
    n = images.shape[-1]
    pad = (OVERSAMPLING - 1) * n
    wide = np.pad(images, [(0, 0)] * (images.ndim - 1) + [(pad // 2, pad - pad // 2)])
    shifted = np.fft.fftn(np.fft.ifftshift(wide, axes=axes), axes=axes, norm="ortho")
    return np.fft.fftshift(shifted, axes=axes).astype(np.complex64)
