"""Standard deviations against the least-squares covariance and against spread, and residuals against known noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon_core.methods.pinqi.model import PinqiOutput
from recon_core.methods.pinqi.parameter_maps import agreement, image_noise_variance, parameter_maps, relaxation_deviation
from recon_core.methods.pinqi.settings import Settings
from recon_core.operators.batched_sense import BatchedSense
from recon_core.signal_models import SaturationRecovery
from recon_core.solvers.least_squares import levenberg_marquardt
from recon_core.solvers.nonlinear_layer import NonlinearReport
from tests.recon_core.small_series import coil_maps

TIMES = (0.5, 1.0, 1.5, 2.0, 8.0)
MODEL = SaturationRecovery(TIMES)


def parameters(n: int = 64, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    t1 = 0.4 + 2.0 * torch.rand(n, generator=g)
    m0 = torch.polar(0.5 + 0.5 * torch.rand(n, generator=g), torch.randn(n, generator=g))
    return torch.stack((m0.real, m0.imag, 1 / t1))


def test_equal_noise_gives_the_covariance_of_an_unregularised_fit() -> None:
    p = parameters().double()
    t1, sd = relaxation_deviation(MODEL, p, torch.full((5,), 0.02**2))
    fit = levenberg_marquardt(MODEL, MODEL.signal(p), p, noise_std=0.02)
    assert torch.allclose(t1, 1 / p[2])
    assert torch.allclose(sd, fit.covariance[2, 2].sqrt() / p[2] ** 2, rtol=1e-6)


def test_states_of_different_noise_by_monte_carlo() -> None:
    """A weighted fit on many noisy copies: its spread is the bound, within 15 %."""
    p = parameters(1, seed=3)
    deviation = torch.tensor([0.01, 0.02, 0.01, 0.03, 0.005])
    n = 4000
    g = torch.Generator().manual_seed(1)
    noise = torch.complex(*(torch.randn(5, n, generator=g) * deviation[:, None] for _ in range(2)))
    data = MODEL.signal(p) + noise
    # weighting by Newton steps from the truth: an estimator of its own, not the code under test
    found = p.double().expand(3, n).clone()
    for _ in range(8):
        signal, jacobian = MODEL.signal_and_jacobian(found)
        rows = torch.view_as_real(jacobian / deviation[:, None, None]).permute(2, 0, 3, 1).reshape(n, 10, 3)
        left = torch.view_as_real((data - signal) / deviation[:, None]).permute(1, 0, 2).reshape(n, 10, 1).double()
        found += torch.linalg.lstsq(rows, left).solution[..., 0].mT
    _, sd = relaxation_deviation(MODEL, p, deviation**2)
    assert float((1 / found[2]).std()) == pytest.approx(float(sd), rel=0.15)


def test_what_the_data_do_not_determine_is_infinite_and_no_noise_is_zero() -> None:
    p = parameters(2)
    p[:2, 1] = 0.0  # no magnetisation, so no rate
    _, sd = relaxation_deviation(MODEL, p, torch.full((5,), 1e-4))
    assert bool(torch.isfinite(sd[0])) and bool(torch.isinf(sd[1]))
    assert float(relaxation_deviation(MODEL, p, torch.zeros(5))[1][0]) == 0.0


@pytest.mark.parametrize("noise", [0.01, 0.0])
def test_residuals_of_the_truth_are_the_noise(noise: float) -> None:
    rng = np.random.default_rng(0)
    n_y, n_x = 30, 24
    maps = torch.from_numpy(coil_maps((1, n_y, n_x), 4, rng)[None, :, 0])
    weights = torch.from_numpy((rng.random((1, 5, n_y)) < 0.5).astype(float))
    weights[..., 12:18] = np.sqrt(2)
    operator = BatchedSense(maps, weights)
    p = parameters(n_y * n_x).double().reshape(1, 3, n_x, n_y)
    signal = MODEL.signal(p[0]).to(torch.complex128)[None]
    clean = operator.forward(signal)
    g = torch.Generator().manual_seed(2)
    sampled = torch.fft.ifftshift(weights > 0, dim=-1)[:, :, None, None]
    data = clean + noise * torch.randn(clean.shape, dtype=clean.dtype, generator=g) * sampled
    found = PinqiOutput(p, signal, (p,))
    agreed = agreement(operator, data, found, signal, noise)
    assert not agreed.fails(Settings())
    assert agreed.maps == agreed.images == pytest.approx(1.0 if noise else 0.0, abs=0.02)
    if noise:
        assert float(agreed.local.mean()) == pytest.approx(1.0, abs=0.05) and agreed.local.shape == (n_y, n_x)
    # the same for another signal: a tenth too bright is ten per cent unexplained
    bright = agreement(operator, data, PinqiOutput(p, 1.1 * signal, (p,)), 1.1 * signal, noise or 1e-6)
    assert bright.unexplained == pytest.approx(0.1, abs=0.01) and bright.fails(Settings(quality_signal=0.05))
    assert float(bright.misfit.median()) > 0.01
    share = weights.square().mean(-1)[0]
    assert torch.allclose(image_noise_variance(operator, 0.3), 0.045 / share)


def test_a_rate_at_the_end_of_what_the_network_predicts_is_not_believed() -> None:
    """The fit is drawn to the prediction and ends close to its limit, not on a bound of its own: T1 of 0.06 s would show as 0.1 s."""
    p = parameters(20 * 16).double().reshape(1, 3, 16, 20)
    p[0, 2, :3, 0] = torch.tensor([10.0, 9.95, 0.1])
    operator = BatchedSense(torch.ones(1, 1, 20, 16, dtype=torch.complex128), torch.ones(1, 5, 20))
    signal = MODEL.signal(p[0]).to(torch.complex128)[None]
    found = PinqiOutput(p, signal, (p,))
    agreed = agreement(operator, operator.forward(signal), found, signal, 1e-9)
    settings = Settings(t1_max=20.0, signal_floor=0.0)

    def valid(rates: tuple[float, float] | None) -> torch.Tensor:
        return parameter_maps(MODEL, operator, found, agreed, 1e-9, 1.0, settings, "", rates)[0][0].valid[0]

    free, held = valid(None), valid((0.1, 10.0))
    assert bool(free.all()) and int((~held).sum()) == 3


def test_pixels_on_a_bound_or_without_an_end_of_the_fit_are_emptied_whatever_their_parameters() -> None:
    """Of the last fit, and where they lie: working images are ``(x, y)``, maps ``(y, x)``."""
    p = parameters(20 * 16).double().reshape(1, 3, 16, 20)
    operator = BatchedSense(torch.ones(1, 1, 20, 16, dtype=torch.complex128), torch.ones(1, 5, 20))
    signal = MODEL.signal(p[0]).to(torch.complex128)[None]
    none = torch.zeros(1, 16, 20, dtype=torch.bool)

    def report(on_bound: tuple[int, int], unfinished: tuple[int, int]) -> NonlinearReport:
        at_bound, converged = none[:, None].repeat(1, 3, 1, 1), ~none
        at_bound[0, 0, on_bound[0], on_bound[1]] = True  # of M0: T1 of the pixel is no more to be believed
        converged[0, unfinished[0], unfinished[1]] = False
        return NonlinearReport(none.int(), converged, at_bound)

    found = PinqiOutput(p, signal, (p,), nonlinear=(report((9, 9), (8, 8)), report((3, 7), (12, 2))))
    agreed = agreement(operator, operator.forward(signal), found, signal, 1e-9)
    maps, share = parameter_maps(MODEL, operator, found, agreed, 1e-9, 1.0, Settings(signal_floor=0.0), "")
    empty = [tuple(where) for where in (~maps[0].valid[0]).nonzero().tolist()]
    assert empty == [(2, 12), (7, 3)] and share == 1 - 2 / 320
    assert all(float(m.data[0][y, x]) == 0 for m in maps for y, x in empty)


def test_t1_out_of_range_without_signal_or_undetermined_is_not_believed() -> None:
    p = parameters(20 * 16).double().reshape(1, 3, 16, 20)
    p[0, 2, 0, :2] = torch.tensor([1 / 0.15, 1 / 6.5])  # s
    p[0, :2, 1, 0] *= 1e-3
    operator = BatchedSense(torch.ones(1, 1, 20, 16, dtype=torch.complex128), torch.ones(1, 5, 20))
    signal = MODEL.signal(p[0]).to(torch.complex128)[None]
    found = PinqiOutput(p, signal, (p,))

    def maps(noise: float, **limits: float) -> tuple[list[list[int]], torch.Tensor]:
        agreed = agreement(operator, operator.forward(signal), found, signal, noise)
        made, _ = parameter_maps(MODEL, operator, found, agreed, noise, 1.0, Settings(**limits), "")  # type: ignore[arg-type]
        return (~made[0].valid[0].mT).nonzero().tolist(), made[1].data[0] / made[0].data[0]

    assert maps(1e-5, t1_min=0.2)[0] == [[0, 0], [0, 1], [1, 0]]
    assert maps(1e-5, t1_min=0.1, t1_max=7.0, signal_floor=0.0)[0] == []
    limit = float(maps(1e-2)[1].nanmedian())
    undetermined, left = maps(1e-2, max_relative_sd=limit)
    assert 0.4 < len(undetermined) / 320 < 0.6 and float(left.nan_to_num().max()) <= limit * (1 + 1e-6)
