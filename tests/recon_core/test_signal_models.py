"""Signal models: closed-form values, Jacobians against autograd and finite differences, shapes and bad input."""

from __future__ import annotations

import math

import pytest
import torch

from recon_core.errors import DataError
from recon_core.signal_models import (
    InversionRecovery,
    MultiEcho,
    SaturationRecovery,
    SignalModel,
    ThreeParameterRecovery,
    look_locker_t1,
    relaxation_time,
)

TIMES = (0.12, 0.5, 1.1, 1.7, 4.0)
MODELS: tuple[SignalModel, ...] = (
    SaturationRecovery(TIMES),
    SaturationRecovery(TIMES, is_complex=False),
    InversionRecovery(TIMES),
    InversionRecovery(TIMES, efficiency=0.93),
    InversionRecovery(TIMES, is_complex=False, efficiency=0.93),
    ThreeParameterRecovery(TIMES),
    MultiEcho((0.002, 0.005, 0.011, 0.019)),
)
IDS = [f"{type(m).__name__}-{len(m.parameter_names)}-{i}" for i, m in enumerate(MODELS)]


def some_parameters(model: SignalModel, *pixels: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    scale = {"1/s": 1.5, "Hz": 40.0, "1": 1.0}
    rows = [(torch.rand(pixels, generator=generator, dtype=torch.float64) - 0.3) * scale[unit] for unit in model.units]
    return torch.stack(rows)


def as_rows(t: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(t) if t.is_complex() else t[..., None]


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_shapes_and_dtypes(model: SignalModel) -> None:
    p = some_parameters(model, 2, 3).float()
    signal, jacobian = model.signal_and_jacobian(p)
    n = len(model.parameter_names)
    assert len(model.units) == n
    assert signal.shape == (model.n_states, 2, 3) and jacobian.shape == (model.n_states, n, 2, 3)
    assert signal.dtype == jacobian.dtype == (torch.complex64 if model.is_complex else torch.float32)
    assert torch.equal(signal, model.signal(p))
    assert model.signal_and_jacobian(p[:, 0, 0])[1].shape == (model.n_states, n)


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_jacobian_is_autograds(model: SignalModel) -> None:
    p = some_parameters(model, 7)
    by_autograd = torch.func.jacfwd(lambda q: as_rows(model.signal(q)).sum(1))(p)  # pixels are independent
    mine = as_rows(model.signal_and_jacobian(p)[1])  # (state, parameter, pixel, part)
    torch.testing.assert_close(mine, by_autograd.permute(0, 2, 3, 1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_jacobian_is_the_finite_difference(model: SignalModel) -> None:
    p = some_parameters(model, 7)
    jacobian = model.signal_and_jacobian(p)[1]
    for i, unit in enumerate(model.units):
        h = 1e-6 * (40 if unit == "Hz" else 1)
        step = torch.zeros_like(p)
        step[i] = h
        difference = (model.signal(p + step) - model.signal(p - step)) / (2 * h)
        torch.testing.assert_close(jacobian[:, i], difference, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("model", MODELS, ids=IDS)
def test_curvature_is_autograds(model: SignalModel) -> None:
    p = some_parameters(model, 6)
    target = model.signal(p.flip(-1)) * 1.3
    residual = model.signal(p) - target

    def left_out(q: torch.Tensor) -> torch.Tensor:
        return (residual.conj() * model.signal(q)).real.sum() if model.is_complex else (residual * model.signal(q)).sum()

    hessian = torch.autograd.functional.hessian(left_out, p)
    expected = torch.stack([hessian[:, n, :, n] for n in range(6)], dim=-1)
    torch.testing.assert_close(model.curvature(p, residual), expected, rtol=1e-10, atol=1e-10)


def test_saturation_is_equation_19() -> None:
    q = SaturationRecovery((0.5, 8.0)).signal(torch.tensor([0.6, -0.2, 1 / 1.3]))
    expected = [complex(0.6, -0.2) * (1 - math.exp(-tau / 1.3)) for tau in (0.5, 8.0)]
    torch.testing.assert_close(q, torch.tensor(expected, dtype=torch.complex64))


def test_inversion_starts_at_minus_the_efficiency_and_crosses_zero() -> None:
    ideal = InversionRecovery((0.0, math.log(2) * 0.9), is_complex=False)
    torch.testing.assert_close(ideal.signal(torch.tensor([3.0, 1 / 0.9])), torch.tensor([-3.0, 0.0]), atol=1e-6, rtol=0)
    partial = InversionRecovery((0.0, 100.0), is_complex=False, efficiency=0.9)
    torch.testing.assert_close(partial.signal(torch.tensor([1.0, 1.0])), torch.tensor([-0.9, 1.0]))
    assert partial.efficiency == pytest.approx(0.9)
    three = ThreeParameterRecovery((0.0, 100.0))
    torch.testing.assert_close(three.signal(torch.tensor([1.0, 1.9, 1.0])), torch.tensor([-0.9, 1.0]))


def test_multi_echo_decays_and_turns() -> None:
    q = MultiEcho((0.0, 0.010)).signal(torch.tensor([2.0, 0.0, 30.0, 25.0]))  # a quarter turn in 10 ms at 25 Hz
    torch.testing.assert_close(q, torch.tensor([2 + 0j, 2j * math.exp(-0.3)]), atol=1e-6, rtol=0)


def test_look_locker_correction_recovers_t1_of_a_driven_series() -> None:
    # a train of small flip angles: 1/T1* = 1/T1 - ln(cos a)/TR, and M0* = M0 (1 - E) / (1 - E cos a) exactly
    t1, repetition, flip = 1.2, 0.005, math.radians(4)
    e = math.exp(-repetition / t1)
    rate = 1 / t1 - math.log(math.cos(flip)) / repetition
    steady = (1 - e) / (1 - e * math.cos(flip))
    found, sd = look_locker_t1(torch.tensor([steady, 1 + steady, rate], dtype=torch.float64))
    assert sd is None
    assert float(found) == pytest.approx(t1, rel=3e-3)  # the correction is first order in TR/T1


def test_standard_deviations_are_propagated() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([1.0, 2.1, 1.1], dtype=torch.float64)
    root = torch.tensor([[1.0, 0, 0], [0.5, 0.8, 0], [-0.6, 0.2, 0.9]], dtype=torch.float64) * 0.004
    draws = mean[:, None] + root @ torch.randn(3, 200_000, generator=generator, dtype=torch.float64)
    _, sd = look_locker_t1(mean, root @ root.T)
    assert sd is not None
    assert float(sd) == pytest.approx(float(look_locker_t1(draws)[0].std()), rel=0.01)
    t1, t1_sd = relaxation_time(mean[2], (root @ root.T)[2, 2])
    assert t1_sd is not None
    assert float(t1) == pytest.approx(1 / 1.1)
    assert float(t1_sd) == pytest.approx(float((1 / draws[2]).std()), rel=0.01)


@pytest.mark.parametrize("times", [(), (0.1, -0.2), (0.1, math.nan), (math.inf,)])
def test_bad_times_are_refused(times: tuple[float, ...]) -> None:
    for make in (SaturationRecovery, InversionRecovery, ThreeParameterRecovery, MultiEcho):
        with pytest.raises(DataError):
            make(times)


def test_bad_factors_are_refused() -> None:
    for efficiency in (0.0, 1.1, math.nan):
        with pytest.raises(DataError):
            InversionRecovery(TIMES, efficiency=efficiency)
    with pytest.raises(DataError):
        SaturationRecovery(TIMES, factor=2.0)
