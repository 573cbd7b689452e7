"""Images that no scan simulation made (measured, or drawn for training) encoded as readouts, so that they go through the whole path."""

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
from recon_core.simulation.head_atlas import HeadAtlas
from recon_core.simulation.options import settings_for
from recon_core.simulation.quantitative_brain import SATURATION_TIMES, BrainBatch, QuantitativeBrains, SampleRecipe
from recon_core.simulation.scan import Scan
from recon_core.training.pinqi_tasks import EVALUATION_SEED
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
    y, x = np.meshgrid(*[(np.arange(n) - n // 2) / (n / 2)] * 2, indexing="ij")
    return _in_place_of(scan, images * np.exp(1j * (0.8 * x - 0.6 * y + 0.4 * x * y)), series.times), series


@lru_cache(maxsize=2)
def synthetic_brain(matrix: int, index: int, **settings: Any) -> tuple[SimulatedScan, BrainBatch]:
    """A held-out sample of what PINQI is trained on, as a saturation-recovery scan; and the sample.

    Parameters
    ----------
    settings
        Of the simulation: mask, acceleration, snr, ...
    """
    brains = QuantitativeBrains(HeadAtlas(), SampleRecipe(size=matrix), seed=EVALUATION_SEED)
    batch = brains.batch("test", [index])
    n_coils = batch.coil_maps.shape[1]
    values = {"matrix_x": matrix, "matrix_y": matrix, "coils": n_coils, "oversampling": OVERSAMPLING, **settings}
    scan = simulate_kind("satrec", settings_for("satrec", values))
    maps = batch.coil_maps[:, :, None].numpy()  # (slice, coil, z, y, x)
    scan = replace(scan, truth=replace(scan.truth, coil_maps=maps))
    return _in_place_of(scan, batch.images[0].numpy(), SATURATION_TIMES), batch


def _in_place_of(scan: Scan, images: NDArray[np.complexfloating], times: tuple[float, ...]) -> SimulatedScan:
    """Other images ``(state, y, x)`` seen by the coils of a scan of one slice, as bright as its own, so that its noise and SNR hold."""
    images = images * np.percentile(np.abs(scan.truth.images), 99) / np.percentile(np.abs(images), 99)
    images = images[None, :, None]  # (slice, state, z, y, x)
    clean = encode_oversampled(images[:, :, None] * scan.truth.coil_maps[:, None], (-2, -1))
    truth = replace(scan.truth, images=images.astype(np.complex64), states=times)
    return SimulatedScan(Path("(in memory)"), stream_of(replace(scan, clean=clean, truth=truth)))


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
