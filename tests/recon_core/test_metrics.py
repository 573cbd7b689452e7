"""Metrics against hand-made numbers and scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from recon_core.errors import DataError
from recon_core.metrics import nrmse, psnr, ssim

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


def test_misfits_are_errors() -> None:
    with pytest.raises(DataError):
        nrmse(TRUTH, TRUTH[:1])
    with pytest.raises(DataError):
        nrmse(TRUTH, TRUTH * 0)
    with pytest.raises(DataError):
        ssim(TRUTH[:, :5, :5], TRUTH[:, :5, :5])
    with pytest.raises(DataError):
        psnr(TRUTH, TRUTH, np.zeros(TRUTH.shape, bool))
