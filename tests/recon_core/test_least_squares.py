"""Levenberg-Marquardt: truth, scipy, bounds, regularisation, independence of pixels, covariance, bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares

from recon_core.errors import DataError, SettingError
from recon_core.signal_models import MultiEcho, SaturationRecovery, SignalModel, ThreeParameterRecovery
from recon_core.solvers.least_squares import levenberg_marquardt

SATURATION = SaturationRecovery((0.5, 1.0, 1.5, 2.0, 8.0))
MOLLI = ThreeParameterRecovery((0.1, 0.18, 1.1, 1.18, 2.1, 2.18, 3.1, 4.1))
ECHOES = MultiEcho((0.002, 0.006, 0.010, 0.014, 0.018))
STARTS = {SATURATION: (0.9, 0.0, 0.8), MOLLI: (0.9, 1.8, 1.0), ECHOES: (0.5, 0.5, 20.0, 0.0)}


def random_numbers(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def draw(model: SignalModel, n: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """True parameters, noisy data in single precision, and a start that is far off."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.rand(4, n, generator=generator, dtype=torch.float64)
    if model is SATURATION:
        p = torch.stack([0.4 + u[0], u[1] - 0.5, 1 / (0.3 + 2.5 * u[2])])
    elif model is MOLLI:
        a = 0.4 + u[0]
        p = torch.stack([a, a * (1.6 + 0.5 * u[1]), 1 / (0.2 + 1.6 * u[2])])
    else:
        p = torch.stack([u[0] + 0.3, u[1] - 0.2, 5 + 60 * u[2], 60 * (u[3] - 0.5)])
    y = model.signal(p)
    rows = random_numbers(generator, *y.shape)
    y = y + noise * (torch.complex(rows, random_numbers(generator, *y.shape)) if y.is_complex() else rows)
    start = torch.tensor(STARTS[model]).reshape(-1, 1).expand(-1, n)
    return p, y.to(torch.complex64 if y.is_complex() else torch.float32), start


@pytest.mark.parametrize("model", STARTS, ids=lambda m: type(m).__name__)
def test_noiseless_data_give_the_truth(model: SignalModel) -> None:
    p, y, start = draw(model, 2000, 0.0)
    fit = levenberg_marquardt(model, y, start)
    assert bool(fit.converged.all()) and not bool(fit.at_bound.any())
    error = (fit.parameters - p).abs() / (p.abs() + 0.1)
    assert float(error.max()) < 2e-3 and float(error.median()) < 3e-6
    assert fit.parameters.dtype == torch.float32


@pytest.mark.parametrize("model", STARTS, ids=lambda m: type(m).__name__)
def test_minimum_is_scipys(model: SignalModel) -> None:
    _, y, start = draw(model, 25, 0.02)
    fit = levenberg_marquardt(model, y, start)
    assert bool(fit.converged.all())
    for i in range(25):

        def residual(q: np.ndarray[Any, Any], i: int = i) -> np.ndarray[Any, Any]:
            r = (model.signal(torch.tensor(q)) - y[:, i]).numpy()
            return np.concatenate([r.real, r.imag]) if np.iscomplexobj(r) else r

        best = least_squares(residual, start[:, i].double().numpy(), method="lm", xtol=1e-13, ftol=1e-13, gtol=1e-13)
        np.testing.assert_allclose(fit.parameters[:, i], best.x, rtol=2e-4, atol=2e-5)
        assert float(fit.residual[i]) == pytest.approx(2 * best.cost, rel=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.3])
@pytest.mark.parametrize("model", STARTS, ids=lambda m: type(m).__name__)
def test_a_pixel_does_not_depend_on_the_others(model: SignalModel, weight: float) -> None:
    _, y, start = draw(model, 1500, 0.03)
    y[:, 7] = 0  # empty, absurd and huge neighbours
    y[:, 8] *= -50
    y[:, 9] *= 1e6
    together = levenberg_marquardt(model, y, start, regularisation=weight, reference=start)
    for chunk in (1, 61):
        pixels = slice(0, 20) if chunk == 1 else slice(0, 1500)
        other = levenberg_marquardt(
            model, y[:, pixels], start[:, pixels], regularisation=weight, reference=start[:, pixels], chunk=chunk
        )
        torch.testing.assert_close(other.parameters, together.parameters[:, pixels], rtol=1e-6, atol=1e-6)
        assert torch.equal(other.converged, together.converged[pixels])


def test_regularised_minimum_has_no_gradient() -> None:
    _, y, start = draw(SATURATION, 3000, 0.05)
    generator = torch.Generator().manual_seed(3)
    reference = (start + 0.2 * random_numbers(generator, *start.shape)).float()
    weight = torch.tensor([3.0, 0.5, 0.05])[:, None]
    fit = levenberg_marquardt(SATURATION, y, start, regularisation=weight, reference=reference)
    assert bool(fit.converged.all())
    p = fit.parameters.double()
    signal, jacobian = SATURATION.signal_and_jacobian(p)
    gradient = (jacobian.conj() * (signal - y)[:, None]).real.sum(0) + weight * (p - reference)
    assert float(gradient.abs().max()) < 2e-4
    assert float(gradient.abs().median()) < 1e-6


def test_strong_regularisation_gives_the_reference() -> None:
    _, y, start = draw(SATURATION, 50, 0.05)
    fit = levenberg_marquardt(SATURATION, y, start, regularisation=1e6, reference=start + 0.1)
    torch.testing.assert_close(fit.parameters, start + 0.1, atol=1e-5, rtol=0)


def test_bounds_hold_and_are_reported() -> None:
    _, y, start = draw(SATURATION, 4000, 0.01)
    lower, upper = torch.tensor([-9.0, -9.0, 0.5])[:, None], torch.tensor([9.0, 9.0, 2.0])[:, None]
    fit = levenberg_marquardt(SATURATION, y, start, lower=lower, upper=upper)
    rate = fit.parameters[2]
    assert bool((rate >= 0.5).all() & (rate <= 2.0).all()) and bool(fit.converged.all())
    free = levenberg_marquardt(SATURATION, y, start)
    outside = (free.parameters[2] < 0.5) | (free.parameters[2] > 2.0)
    assert 0.1 < float(outside.float().mean()) < 0.9
    assert torch.equal(fit.at_bound[2], outside) and not bool(fit.at_bound[:2].any())
    torch.testing.assert_close(fit.parameters[:, ~outside], free.parameters[:, ~outside], rtol=1e-4, atol=1e-4)
    # with the rate held, M0 is the linear solution
    weights = SATURATION.signal(torch.stack([torch.ones_like(rate), torch.zeros_like(rate), rate])).real
    m0 = (weights * y).sum(0) / weights.square().sum(0)
    torch.testing.assert_close(torch.complex(fit.parameters[0], fit.parameters[1]), m0, rtol=1e-4, atol=1e-5)
    assert bool(torch.isnan(fit.covariance[:, :, outside]).all())
    assert bool(torch.isfinite(fit.covariance[:, :, ~outside]).all())


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_covariance_is_the_spread(known: bool, weight: float) -> None:
    n, noise = 20_000, 0.01
    generator = torch.Generator().manual_seed(1)
    p = torch.tensor([0.8, 0.3, 0.8], dtype=torch.float64)[:, None]
    noises = torch.complex(random_numbers(generator, 5, n), random_numbers(generator, 5, n)) * noise
    y = (SATURATION.signal(p) + noises).to(torch.complex64)
    # a reference at the truth, so that a zero-residual problem stays one
    start = p.float().expand(3, n)
    fit = levenberg_marquardt(
        SATURATION, y, start, regularisation=weight, reference=start, noise_std=noise if known or weight else None
    )
    spread = torch.cov(fit.parameters.double())
    mean = fit.covariance.double().mean(-1)
    torch.testing.assert_close(mean, spread, rtol=0.06, atol=float(spread.abs().max()) * 0.02)


def test_double_precision_systems_agree_and_double_data_reach_rounding() -> None:
    p, y, start = draw(MOLLI, 500, 0.0)
    single = levenberg_marquardt(MOLLI, y, start)
    mixed = levenberg_marquardt(MOLLI, y, start, system_dtype=torch.float64)
    torch.testing.assert_close(mixed.parameters, single.parameters, rtol=2e-3, atol=2e-3)
    double = levenberg_marquardt(MOLLI, MOLLI.signal(p), start.double(), tolerance=1e-10)
    assert double.parameters.dtype == torch.float64
    torch.testing.assert_close(double.parameters, p, rtol=1e-9, atol=1e-10)


def test_what_cannot_be_fitted_is_not_called_converged() -> None:
    _, y, start = draw(SATURATION, 100, 0.0)
    few = levenberg_marquardt(SATURATION, y, start, max_iterations=1)
    assert not bool(few.converged.any()) and bool((few.iterations == 1).all())
    overflow = start.clone()
    overflow[2, 3] = -1000.0  # exp(8000)
    fit = levenberg_marquardt(SATURATION, y, overflow)
    assert not bool(fit.converged[3]) and int(fit.converged.sum()) == 99


def test_undetermined_parameters_have_no_finite_variance() -> None:
    y = torch.zeros(5, 1, dtype=torch.complex64)
    fit = levenberg_marquardt(SATURATION, y, torch.tensor([[0.0], [0.0], [0.8]]), noise_std=0.1)
    assert not bool(torch.isfinite(fit.covariance[2, 2]).any())  # M0 = 0 says nothing about T1


def test_shapes_pixels_and_inputs_are_kept() -> None:
    _, y, start = draw(SATURATION, 24, 0.01)
    images, begin = y.reshape(5, 2, 3, 4), start.contiguous().reshape(3, 2, 3, 4)
    before = images.clone(), begin.clone()
    fit = levenberg_marquardt(SATURATION, images, begin, regularisation=0.1, reference=begin)
    assert fit.parameters.shape == fit.at_bound.shape == (3, 2, 3, 4)
    assert fit.residual.shape == fit.converged.shape == fit.iterations.shape == (2, 3, 4)
    assert fit.covariance.shape == (3, 3, 2, 3, 4)
    assert torch.equal(before[0], images) and torch.equal(before[1], begin)
    empty = levenberg_marquardt(SATURATION, y[:, :0], start[:, :0])
    assert empty.parameters.shape == (3, 0) and empty.covariance.shape == (3, 3, 0)


def test_bad_input_is_refused() -> None:
    _, y, start = draw(SATURATION, 4, 0.0)
    broken = y.clone()
    broken[2, 1] = float("nan")
    for data, begin in ((y[:4], start), (y, start[:2]), (y, start[:, :3]), (y.real, start), (broken, start), (y, start / 0)):
        with pytest.raises(DataError):
            levenberg_marquardt(SATURATION, data, begin)
    with pytest.raises(DataError):
        levenberg_marquardt(SATURATION, y, start, lower=torch.zeros(2, 1))
    bad: tuple[dict[str, Any], ...] = (
        {"tolerance": 0.0},
        {"max_iterations": 0},
        {"chunk": 0},
        {"noise_std": 0.0},
        {"regularisation": -1.0},
        {"regularisation": float("nan")},
        {"lower": torch.tensor(1.0), "upper": torch.tensor(0.0)},
    )
    for settings in bad:
        with pytest.raises(SettingError):
            levenberg_marquardt(SATURATION, y, start, **settings)


def test_without_statistics_the_fit_is_the_same() -> None:
    _, y, start = draw(SATURATION, 300, 0.02)
    with_them = levenberg_marquardt(SATURATION, y, start)
    without = levenberg_marquardt(SATURATION, y, start, statistics=False)
    assert torch.equal(with_them.parameters, without.parameters) and torch.equal(with_them.converged, without.converged)
    assert bool(without.residual.isnan().all()) and without.covariance.shape == with_them.covariance.shape
    assert bool(without.covariance.isnan().all())
