"""Semi-measured cells before they are undersampled: a measured series, a smooth phase, and coil maps, simulated or measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.cell import Array, BoolArray, Cell, centred_ifft
from benchmarks.measured_series import Measured, measured
from benchmarks.series import centred_fft
from benchmarks.simulated_series import FOV
from recon_core.simulation.coils import biot_savart_maps, donor_maps
from recon_core.simulation.encoding import polynomial_field
from recon_core.simulation.phantoms import Grid, centred_axis

PHASE = 1.2
"""Peak of the smooth phase of semi-measured images, rad."""


def semi_measured(name: str, matrix: tuple[int, int] | None, donor: Path | None, n_coils: int) -> tuple[Cell, Array]:
    series = measured(name)
    if matrix is None:
        matrix = (160, 160) if name.startswith("kidney") else series.images.shape[1:]
    assert matrix is not None
    fov_y, fov_x = (n * series.pixel for n in series.images.shape[1:])
    grid = Grid(np.zeros(1), centred_axis(matrix[0], fov_y), centred_axis(matrix[1], fov_x))
    rng = np.random.default_rng([7, sum(map(ord, name))])
    if donor is None:
        scale = max(fov_y, fov_x) / FOV
        maps, _ = biot_savart_maps(grid, n_coils, rng, radii=(0.20 * scale, 0.165 * scale))
    else:
        maps, _ = donor_maps(donor, grid, n_coils)
    images = resample(series.images, matrix)[:, None] * np.exp(1j * polynomial_field(grid, rng, PHASE))
    full = centred_fft(images[:, None] * maps, -2)
    cell = Cell(
        name=name,
        images=images,
        coil_maps=maps,
        kspace=full[:0],
        mask=np.ones((0, 1, matrix[0]), bool),
        acs_mask=np.zeros((1, matrix[0]), bool),
        noise_std=0.0,
        support=_resized(series, matrix, "support"),
        kind="molli",
        origin="semi-measured",
        roi=_resized(series, matrix, "roi"),
        times=series.times,
        t1=None,
        look_locker=series.look_locker,
        acceleration=1.0,
        fov=(0.008, fov_y, fov_x),
    )
    return cell, full


def resample(images: NDArray[np.floating], matrix: tuple[int, int]) -> NDArray[np.float64]:
    """Real images ``(..., y, x)`` at another, smaller matrix of the same field of view: the centre of their k-space.

    Raises
    ------
    ValueError
        The matrix is larger than the images.
    """
    if matrix[0] > images.shape[-2] or matrix[1] > images.shape[-1]:
        raise ValueError(f"matrix {matrix} is finer than the measured {images.shape[-2:]}")
    result: Array = images.astype(np.complex128)
    for axis, n in ((-2, matrix[0]), (-1, matrix[1])):
        old = result.shape[axis]
        spectrum = centred_fft(result, axis)
        start = old // 2 - n // 2
        cut = np.take(spectrum, range(start, start + n), axis=axis)
        result = centred_ifft(cut, axis) * np.sqrt(n / old)
    return np.ascontiguousarray(result.real)


def _resized(series: Measured, matrix: tuple[int, int], which: str) -> BoolArray:
    return (resample(getattr(series, which).astype(float), matrix) > 0.5)[None]
