"""Metrics against hand-made numbers and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.signal import correlate2d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from recon_core.errors import DataError
from recon_core.metrics import hfen, laplacian_of_gaussian, map_nmse, nrmse, psnr, ssim

RNG = np.random.default_rng(0)
TRUTH = RNG.random((2, 20, 24))
IMAGE = TRUTH + 0.1 * RNG.standard_normal(TRUTH.shape)


def test_nrmse_by_hand() -> None:
    assert nrmse([[3.0, 4.0]], [[3.0, 3.0j]]) == pytest.approx(1 / 18**0.5)
    assert nrmse([[3.0, 9.0]], [[3.0, 4.0]], [[True, False]]) == 0
    assert nrmse(-TRUTH, TRUTH) == 0


def test_psnr_equals_scikit_image() -> None:
    image = abs(IMAGE)
    assert psnr(image, TRUTH) == pytest.approx(peak_signal_noise_ratio(TRUTH, image, data_range=TRUTH.max()))
    assert psnr(TRUTH, TRUTH) == float("inf")


def test_ssim_equals_scikit_image() -> None:
    image = abs(IMAGE)
    expected = np.mean([structural_similarity(t, i, data_range=TRUTH.max()) for t, i in zip(TRUTH, image, strict=True)])
    assert ssim(image, TRUTH) == pytest.approx(expected, rel=1e-9)
    assert ssim(TRUTH, TRUTH) == pytest.approx(1.0)


def test_laplacian_of_gaussian_is_the_second_derivative_of_a_gaussian() -> None:
    kernel = laplacian_of_gaussian()
    assert kernel.shape == (15, 15)
    assert kernel.sum() == pytest.approx(0, abs=1e-15)
    # on x^2 + y^2 a Laplacian of a normalised Gaussian gives 4 everywhere; 15 pixels cut almost nothing of sigma = 1.5
    y, x = np.mgrid[-30:31, -30:31]
    inner = correlate2d((x**2 + y**2).astype(float), kernel, mode="valid")
    assert np.allclose(inner, inner[0, 0])
    assert inner[0, 0] == pytest.approx(4, rel=1e-3)


def test_hfen_by_direct_filtering() -> None:
    kernel, image = laplacian_of_gaussian(), abs(IMAGE)

    def filtered(stack: np.ndarray) -> np.ndarray:
        return np.stack([correlate2d(np.pad(plane, 7, mode="edge"), kernel, mode="valid") for plane in stack])

    error, reference = filtered(image - TRUTH), filtered(TRUTH)
    assert hfen(image, TRUTH) == pytest.approx(np.linalg.norm(error) / np.linalg.norm(reference))
    part = np.zeros(TRUTH.shape, bool)
    part[:, 5:9, 3:20] = True
    assert hfen(image, TRUTH, part) == pytest.approx(np.linalg.norm(error[part]) / np.linalg.norm(reference[part]))


def test_hfen_sees_edges_and_not_offsets() -> None:
    assert hfen(TRUTH + 5, TRUTH) == pytest.approx(0, abs=1e-12)
    assert hfen(1.1 * TRUTH, TRUTH) == pytest.approx(0.1)
    assert hfen(0 * TRUTH, TRUTH) == pytest.approx(1)


def test_map_nmse_by_hand() -> None:
    truth = np.array([[1.0, 2.0], [2.0, 0.0]])
    assert map_nmse([[1.0, 2.0], [2.0, 3.0]], truth) == pytest.approx(1.0)
    assert map_nmse([[1.0, 2.0], [2.0, 3.0]], truth, truth > 0) == 0
    assert map_nmse([[1.0, 0.0], [2.0, 0.0]], truth) == pytest.approx(4 / 9)
    assert map_nmse(-truth, truth) == pytest.approx(4)  # maps are signed


def test_misfits_are_errors() -> None:
    with pytest.raises(DataError):
        nrmse(TRUTH, TRUTH[:1])
    with pytest.raises(DataError):
        nrmse(TRUTH, TRUTH * 0)
    with pytest.raises(DataError):
        ssim(TRUTH[:, :5, :5], TRUTH[:, :5, :5])
    with pytest.raises(DataError):
        psnr(TRUTH, TRUTH, np.zeros(TRUTH.shape, bool))
    with pytest.raises(DataError):
        hfen(TRUTH, TRUTH * 0 + 1)
    with pytest.raises(DataError):
        map_nmse(TRUTH, TRUTH * 0)
    with pytest.raises(DataError):
        map_nmse(TRUTH, TRUTH[:1])
