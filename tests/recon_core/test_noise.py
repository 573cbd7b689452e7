import math

import pytest
import torch

from recon_core.errors import DataError
from recon_core.preprocess.noise import (
    RELATIVE_BANDWIDTH,
    WHITENED_NOISE_STD,
    dead_channels,
    noise_covariance,
    whitening_matrix,
    whitening_scale,
)

N_COILS = 6


def mixing(seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    gains = torch.tensor([1.0, 3.0, 0.1, 20.0, 1.0, 1e-3])
    return gains[:, None] * (torch.eye(N_COILS) + 0.3 * torch.randn(N_COILS, N_COILS, dtype=torch.complex64, generator=g))


def receiver_noise(n: int, variance: float, seed: int, n_samples: int = 256) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    white = torch.randn(n, N_COILS, n_samples, dtype=torch.complex64, generator=g)  # E|n|^2 = 1
    return mixing() @ white * math.sqrt(variance)


def test_covariance_is_the_textbook_sum() -> None:
    noise = receiver_noise(3, 1.0, 1, n_samples=20) + 5.0
    flat = noise.movedim(1, 0).reshape(N_COILS, -1).to(torch.complex128)
    centred = flat - flat.mean(dim=1, keepdim=True)
    torch.testing.assert_close(noise_covariance(noise), centred @ centred.mH / (flat.shape[1] - 1))
    torch.testing.assert_close(noise_covariance(noise.numpy()), noise_covariance(noise))


def test_covariance_converges_to_the_truth_whatever_the_receivers_offset() -> None:
    a = mixing().to(torch.complex128)
    truth = a @ a.mH
    noise = receiver_noise(400, 1.0, 2) + 2.0 * mixing().abs().sum(1)[:, None]
    sd = truth.diagonal().real.sqrt()
    error = (noise_covariance(noise) - truth) / (sd[:, None] * sd[None, :])
    assert float(error.abs().max()) < 4 / math.sqrt(400 * 256) * 1.5


@pytest.mark.parametrize(("dwell", "noise_dwell"), [(5e-6, 5e-6), (2e-6, 10e-6), (12e-6, 3e-6)])
def test_whitened_imaging_noise_has_the_stated_deviation(dwell: float, noise_dwell: float) -> None:
    # the receiver's noise density is one; a noise scan sees bandwidth rel_bw / noise_dwell, imaging 1 / dwell
    density = 1e-6
    calibration = receiver_noise(200, density * RELATIVE_BANDWIDTH / noise_dwell, 3)
    imaging = receiver_noise(200, density / dwell, 4)
    w = whitening_matrix(noise_covariance(calibration), dwell_time=dwell, noise_dwell_time=noise_dwell)
    assert w.dtype == torch.complex64
    white = w @ imaging
    covariance = noise_covariance(white)
    torch.testing.assert_close(
        covariance, WHITENED_NOISE_STD**2 * torch.eye(N_COILS, dtype=torch.complex128), atol=0.05, rtol=0
    )
    assert float(white.real.std()) == pytest.approx(1.0, rel=0.01)
    assert float(white.imag.std()) == pytest.approx(1.0, rel=0.01)


def test_scale_formula() -> None:
    assert whitening_scale(4e-6, 2e-6, 0.5) == pytest.approx(math.sqrt(2 * 2 * 0.5))
    assert whitening_scale(1e-6, 1e-6) == pytest.approx(math.sqrt(2 * 0.793))
    for bad in (0.0, -1e-6, math.nan, math.inf):
        with pytest.raises(DataError, match="dwell_time"):
            whitening_scale(bad, 1e-6)


def test_dead_channel_is_named_and_can_be_left_out() -> None:
    noise = receiver_noise(50, 1.0, 5)
    noise[:, 3] = 0
    covariance = noise_covariance(noise)
    assert dead_channels(covariance) == (3,)
    with pytest.raises(DataError, match=r"channels \[3\]"):
        whitening_matrix(covariance, dwell_time=1e-6, noise_dwell_time=1e-6)
    w = whitening_matrix(covariance, dwell_time=1e-6, noise_dwell_time=1e-6, relative_bandwidth=0.5, silent=[3])
    white = w @ noise
    assert bool((white[:, 3] == 0).all())
    live = [0, 1, 2, 4, 5]
    torch.testing.assert_close(noise_covariance(white[:, live]), torch.eye(5, dtype=torch.complex128), atol=1e-4, rtol=0)


def test_dependent_channels_are_named() -> None:
    noise = receiver_noise(50, 1.0, 6)
    noise[:, 4] = 2j * noise[:, 1]
    with pytest.raises(DataError, match=r"channels \[1, 4\]"):
        whitening_matrix(noise_covariance(noise), dwell_time=1e-6, noise_dwell_time=1e-6)


def test_bad_samples() -> None:
    with pytest.raises(DataError, match=r"8 samples for 6 coils.*at least 2 for each"):
        noise_covariance(torch.ones(1, 6, 8, dtype=torch.complex64))
    with pytest.raises(DataError, match="wrong form"):
        noise_covariance(torch.ones(6, 8))
    noise = receiver_noise(5, 1.0, 7)
    noise[2, 1, 3] = complex(math.nan, 0)
    with pytest.raises(DataError, match="not finite"):
        noise_covariance(noise)
    with pytest.raises(DataError, match="channels"):
        whitening_matrix(torch.zeros(3, 3, dtype=torch.complex128), dwell_time=1e-6, noise_dwell_time=1e-6)
