"""Unwrapping, the field across echoes and alternating readouts, on known phases."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from recon_core.errors import DataError
from recon_core.maps.echo_agreement import agreed_field
from recon_core.maps.field import correct_bipolar, fit_field
from recon_core.maps.unwrap import laplacian_unwrap, unwrap_phase

SHAPE = (10, 16, 18)
EQUAL = tuple(0.003 + 0.0034 * i for i in range(6))
UNEQUAL = (0.004, 0.009, 0.015)


def coordinates() -> tuple[torch.Tensor, ...]:
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in SHAPE]
    return torch.meshgrid(*axes, indexing="ij")


def ball(radius: float = 0.95) -> torch.Tensor:
    z, y, x = coordinates()
    return z**2 + y**2 + x**2 < radius**2


def smooth_hz(strength: float) -> torch.Tensor:
    z, y, x = coordinates()
    return strength * (x * y + 0.7 * z + 0.5 * x**2 - 0.2)


def echo_images(times: tuple[float, ...], field: torch.Tensor, *, noise: float = 0.0, seed: int = 0) -> torch.Tensor:
    z, y, x = coordinates()
    t = torch.tensor(times, dtype=torch.float64)[:, None, None, None]
    offset = 0.8 * x - 0.5 * y + 0.3
    images = (1 + 0.3 * z) * torch.exp(-t * 30) * torch.exp(1j * (offset + 2 * math.pi * field * t))
    rng = np.random.default_rng(seed)
    return images + noise * torch.from_numpy(rng.standard_normal(images.shape) + 1j * rng.standard_normal(images.shape))


def wrapped(phase: torch.Tensor) -> torch.Tensor:
    return torch.remainder(phase + math.pi, 2 * math.pi) - math.pi


def test_unwrapping_is_exact_modulo_whole_turns() -> None:
    truth, mask = 12.0 * smooth_hz(1.0), ball()
    found = unwrap_phase(wrapped(truth), mask)
    turns = (found - truth)[mask] / (2 * math.pi)
    assert torch.allclose(turns, turns[0].round().expand_as(turns), atol=1e-12)
    assert (found[~mask] == 0).all()
    assert found[mask].median().abs() <= math.pi
    noisy = truth + 0.5 * torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    steps = (unwrap_phase(wrapped(noisy), mask) - noisy)[mask] / (2 * math.pi)
    assert torch.allclose(steps, steps.round(), atol=1e-9)
    assert (steps.round() == steps.median().round()).all()


def test_unwrapping_goes_round_a_noisy_wall_of_low_quality() -> None:
    """Random phase in a plane with one opening: only a path by quality gets round without carrying its wraps along."""
    truth = 9.0 * coordinates()[2] + 3.0 * coordinates()[1]
    phase, quality = wrapped(truth), torch.ones(SHAPE, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    wall = torch.zeros(SHAPE, dtype=torch.bool)
    wall[:, :12, 9] = True
    phase[wall] = (torch.rand(int(wall.sum()), dtype=torch.float64, generator=generator) - 0.5) * 2 * math.pi
    quality[wall] = 0.01
    found = unwrap_phase(phase, torch.ones(SHAPE, dtype=torch.bool), quality=quality)
    turns = ((found - truth)[~wall] / (2 * math.pi)).round()
    assert (turns == turns[0]).all()


def test_separate_parts_are_each_centred() -> None:
    truth = 8.0 * smooth_hz(1.0) + 20.0
    mask = ball()
    mask[:, :, 8:10] = False
    found = unwrap_phase(wrapped(truth), mask)
    for part in (slice(0, 8), slice(10, 18)):
        inside = mask[..., part]
        turns = (found - truth)[..., part][inside] / (2 * math.pi)
        assert torch.allclose(turns, turns[0].expand_as(turns), atol=1e-9)
        assert found[..., part][inside].median().abs() < math.pi + 1e-9


def test_laplacian_unwrapping_is_close_on_the_whole_volume() -> None:
    truth = 10.0 * smooth_hz(1.0)
    everywhere = torch.ones(SHAPE, dtype=torch.bool)
    found = laplacian_unwrap(wrapped(truth), everywhere)
    torch.testing.assert_close(found, truth - truth.mean(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("times", [EQUAL, UNEQUAL])
def test_field_is_exact_without_noise(times: tuple[float, ...]) -> None:
    field, mask = smooth_hz(260.0), ball()  # wraps several times
    images = echo_images(times, field)
    kept = images.clone()
    maps = fit_field(images, times, mask)
    assert torch.equal(images, kept)
    error = (maps.field.data.double() - field)[mask]
    period = 1 / min(b - a for a, b in pairwise(times))
    assert torch.allclose(error, (error[0] / period).round() * period * torch.ones_like(error), atol=1e-3)
    _, y, x = coordinates()
    if float(error[0].abs()) < 1:
        residue = wrapped(maps.phase_offset.data.double() - (0.8 * x - 0.5 * y + 0.3))[mask]
        assert residue.abs().max() < 1e-3
    assert maps.residual.data.max() < 1e-3


def test_a_long_train_s_field_starts_where_there_is_signal() -> None:
    """25 echoes 4 ms apart; by the last digit of their differences the 18th and 19th are the nearest, when fast decays are long over."""
    times = tuple((4.0 + 4.0 * i) * 1e-3 for i in range(25))
    z, _, x = coordinates()
    field, rate = 60.0 * x, torch.where(z.abs() < 0.5, 80.0, 20.0)
    t = torch.tensor(times, dtype=torch.float64)[:, None, None, None]
    noise = torch.randn(25, *SHAPE, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    images = torch.exp(-t * rate + 2j * math.pi * field * t) + 0.03 * 2**0.5 * noise
    found = fit_field(images, times, torch.ones(SHAPE, dtype=torch.bool), noise_std=0.03).field.data
    assert float((found - field)[rate > 50].square().mean().sqrt()) < 3.0


def test_field_standard_deviation_is_that_of_repeated_draws() -> None:
    field, mask, noise = smooth_hz(20.0), ball(0.8), 0.02
    draws = [fit_field(echo_images(EQUAL, field, noise=noise, seed=i), EQUAL, mask, noise_std=noise) for i in range(30)]
    found = torch.stack([d.field.data[mask] for d in draws]).double()
    claimed = torch.stack([d.field_sd.data[mask] for d in draws]).double()
    assert (found.mean(0) - field[mask]).abs().mean() < 1.2 * found.std(0).mean() / math.sqrt(30)
    assert (claimed.square().mean() / found.var(0).mean()).sqrt().item() == pytest.approx(1.0, abs=0.05)
    residual = torch.stack(
        [fit_field(echo_images(EQUAL, field, noise=noise, seed=i), EQUAL, mask).field_sd.data[mask] for i in range(10)]
    ).double()
    assert (residual.square().mean() / found.var(0).mean()).sqrt().item() == pytest.approx(1.0, abs=0.08)
    weights = draws[0].weights
    assert (weights[mask] > 0).all() and (weights[~mask] == 0).all()


@pytest.mark.parametrize("times", [EQUAL, UNEQUAL])
def test_alternating_readouts_equal_unipolar_ones_after_correction(times: tuple[float, ...]) -> None:
    field, mask = smooth_hz(60.0), ball()
    clean = echo_images(times, field, noise=0.002)
    n = SHAPE[2]
    theta = 0.9 + 11.0 * (torch.arange(n, dtype=torch.float64) - n // 2) / n
    bipolar = clean.clone()
    bipolar[1::2] *= torch.exp(1j * theta)
    corrected, constant, slope = correct_bipolar(bipolar, times, mask)
    assert constant == pytest.approx(0.9, abs=1e-3)
    assert slope == pytest.approx(11.0, abs=2e-3)
    reference, wrong, right = (fit_field(im, times, mask).field.data[mask] for im in (clean, bipolar, corrected))
    assert (right - reference).abs().mean() < 0.002
    assert (wrong - reference).abs().mean() > 30.0


@pytest.mark.parametrize(
    "backwards",
    [
        (False, False, True, False, True),  # the second of an alternating train was lost
        (True, False, True, False, True),
        (False, True, True, True, True),
        (False, False, False, False, True),
    ],
)
def test_any_order_of_directions_is_corrected_by_what_the_readouts_say(backwards: tuple[bool, ...]) -> None:
    times = (0.003, 0.0098, 0.0132, 0.0166, 0.02)
    field, mask = smooth_hz(60.0), ball()
    clean = echo_images(times, field, noise=0.002)
    n = SHAPE[2]
    theta = 0.9 + 11.0 * (torch.arange(n, dtype=torch.float64) - n // 2) / n
    bipolar = clean.clone()
    bipolar[torch.tensor(backwards)] *= torch.exp(1j * theta)
    order = [3, 0, 4, 1, 2]
    corrected, _, slope = correct_bipolar(
        bipolar[order], [times[i] for i in order], mask, backwards=[backwards[i] for i in order]
    )
    assert abs(slope) == pytest.approx(11.0, abs=0.02)
    found = fit_field(corrected, [times[i] for i in order], mask)
    reference = fit_field(clean, times, mask)
    # which direction keeps its phase is a matter of convention: a constant and a ramp of the offset, not of the field
    assert (found.field.data - reference.field.data)[mask].abs().mean() < 0.3
    assert found.residual.data[mask].median() < 0.01
    with pytest.raises(DataError, match="one direction"):
        correct_bipolar(bipolar, times, mask, backwards=[True] * 5)


@pytest.mark.parametrize("centre", [0.0, 70.0, -70.0])
def test_alternating_readouts_at_unequal_times_need_no_centre_frequency_near_zero(centre: float) -> None:
    """Half a period of the first and the third echo are 43 Hz: beyond it the phase between directions is off by a part of a turn."""
    times = (0.003, 0.0075, 0.0145, 0.023)
    mask = ball()
    clean = echo_images(times, smooth_hz(20.0) + centre, noise=0.002)
    bipolar = clean.clone()
    bipolar[1::2] *= torch.exp(1j * (0.9 + 5.0 * (torch.arange(SHAPE[2], dtype=torch.float64) - SHAPE[2] // 2) / SHAPE[2]))
    found = agreed_field(bipolar, times, mask, 0.002, backwards=(False, True, False, True))
    reference = fit_field(clean, times, mask)
    assert (found.field.field.data - reference.field.data)[mask].abs().mean() < 0.05
    assert found.residual < 0.01


def test_nonsense_is_refused() -> None:
    images, mask = echo_images(EQUAL, smooth_hz(10.0)), ball()
    with pytest.raises(DataError, match="complex"):
        fit_field(images.abs(), EQUAL, mask)
    with pytest.raises(DataError, match="no signal"):
        fit_field(0 * images, EQUAL, mask)
    with pytest.raises(DataError, match="mask is empty"):
        fit_field(images, EQUAL, 0 * mask)
    with pytest.raises(DataError, match="too few echoes"):
        correct_bipolar(images[:2], EQUAL[:2], mask)
    with pytest.raises(DataError, match="not finite"):
        unwrap_phase(torch.full(SHAPE, math.nan), mask)
    with pytest.raises(DataError, match="quality"):
        unwrap_phase(torch.zeros(SHAPE), mask, quality=-torch.ones(SHAPE))


def test_weights_trust_no_voxel_for_fitting_by_chance_and_distrust_those_that_do_not_fit() -> None:
    field, mask, noise = smooth_hz(20.0), ball(0.8), 0.02
    images = echo_images(EQUAL, field, noise=noise)
    images[3, 5, 8, 9] *= torch.exp(torch.tensor(1.5j))  # a voxel that no straight line fits
    for known in (noise, None):
        maps = fit_field(images, EQUAL, mask, noise_std=known)
        weights, strength = maps.weights[mask].double(), images.abs().square().sum(0).sqrt()[mask]
        ratio = weights / strength
        usual = ratio.median()
        assert ((ratio / usual).quantile(torch.tensor([0.05, 0.95], dtype=torch.float64)) - 1).abs().max() < 0.1
        assert maps.weights[5, 8, 9] / images[:, 5, 8, 9].abs().square().sum().sqrt() < 0.5 * usual
