"""The ``fourier`` method against NumPy's FFT in double precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recon_core.errors import CalibrationError, DataError
from recon_core.methods.fourier import Settings, reconstruct
from recon_core.types import Report
from tests.recon_core.small_series import small_series


@pytest.mark.parametrize("shape", [(1, 15, 12), (6, 10, 7)], ids=["2D odd", "3D"])
def test_root_sum_of_squares(shape: tuple[int, int, int]) -> None:
    series = small_series(shape, n_states=3, keep=0.7)
    bare = replace(series.kspace, coil_maps=None, acs=None, acs_mask=None, noise_std=None)
    image = reconstruct(bare, series.scan, Settings(), Report()).images[0]
    data = np.fft.ifftshift(series.kspace.data.numpy().astype(complex), axes=(-3, -2))
    coil_images = np.fft.fftshift(np.fft.ifftn(data, axes=(-3, -2), norm="ortho"), axes=(-3, -2))
    expected = np.sqrt((np.abs(coil_images) ** 2).sum(1))
    assert image.name == "magnitude" and image.data.dtype == torch.float32
    np.testing.assert_allclose(image.data.numpy(), expected, rtol=2e-6, atol=2e-6 * expected.max())


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_squares_that_do_not_fit_single_precision_are_no_black_image(factor: float) -> None:
    series = small_series((1, 15, 12), n_states=2)
    k = series.kspace
    usual, other = (
        reconstruct(replace(k, data=k.data * by), series.scan, Settings(), Report()).images[0].data for by in (1.0, factor)
    )
    torch.testing.assert_close(other / factor, usual, rtol=1e-4, atol=1e-5)


def test_adaptive_recovers_the_complex_truth() -> None:
    series = small_series(keep=1.0, noise=1e-4)
    image = reconstruct(series.kspace, series.scan, Settings(combine="adaptive"), Report()).images[0]
    assert image.name == "image" and image.data.dtype == torch.complex64
    assert series.error(image.data) < 1e-3


def test_adaptive_estimates_maps_when_there_are_none() -> None:
    series = small_series((1, 64, 64), keep=1.0, noise=1e-4, n_acs=24)
    image = reconstruct(replace(series.kspace, coil_maps=None), series.scan, Settings(combine="adaptive"), Report()).images[
        0
    ]
    magnitude = torch.from_numpy(abs(series.images)).float()
    assert image.data.is_complex()
    assert float((image.data.abs() - magnitude).norm() / magnitude.norm()) < 0.02


def test_adaptive_without_anything_to_calibrate_on() -> None:
    series = small_series()
    bare = replace(series.kspace, coil_maps=None, acs=None, acs_mask=None)
    with pytest.raises(CalibrationError):
        reconstruct(bare, series.scan, Settings(combine="adaptive"), Report())


def test_states_without_samples_are_named() -> None:
    series = small_series()
    counts = series.kspace.counts.clone()
    counts[4] = 0
    with pytest.raises(DataError, match=r"states \[4\]"):
        reconstruct(replace(series.kspace, counts=counts), series.scan, Settings(), Report())
