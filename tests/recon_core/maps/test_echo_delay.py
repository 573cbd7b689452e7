"""An echo at another time than the header says is told, with what follows; sound echoes, noise and eddy currents are not."""

from __future__ import annotations

import math
import re

import pytest
import torch

from recon_core.maps.dipole_kernel import ppm_per_hz
from recon_core.maps.echo_agreement import AgreedField, agreed_field
from recon_core.maps.echo_delay import echo_delay
from recon_core.maps.field import fit_field
from tests.recon_core.maps.analytic_fields import small_head

TIMES = (0.004, 0.009, 0.014, 0.019)
HEAD = small_head()


def echoes(times: tuple[float, ...], noise: float = 0.01, eddy: float = 0.0) -> torch.Tensor:
    """Complex ``(echo, z, y, x)``; ``eddy``: rad by which the first echo's phase bends across x."""
    t = torch.tensor(times)[:, None, None, None]
    field = HEAD.field.float() / ppm_per_hz(3.0)
    images = torch.polar(HEAD.mask * torch.exp(-20.0 * t), 2 * math.pi * field * t + 0.4)
    images[0] *= torch.exp(1j * eddy * torch.linspace(-1, 1, images.shape[-1]))
    return images + noise * torch.randn(images.shape, dtype=images.dtype, generator=torch.Generator().manual_seed(0))


def found(images: torch.Tensor, times: tuple[float, ...]) -> AgreedField:
    return agreed_field(images, times, HEAD.mask, 0.007, backwards=())


@pytest.mark.parametrize(("echo", "late"), [(0, 0.001), (0, -0.002), (3, 0.002), (2, -0.003)])
def test_one_wrong_time_is_named_with_the_error_that_follows(echo: int, late: float) -> None:
    images = echoes(TIMES)
    wrong = tuple(t + late * (i == echo) for i, t in enumerate(TIMES))
    (note,) = found(images, wrong).notes
    stated, was, percent = (float(n) for n in re.findall(r"([\d.]+) (?:ms|%)", note))
    assert stated == pytest.approx(1e3 * wrong[echo]) and was == pytest.approx(1e3 * TIMES[echo], abs=0.15)
    right, bent = (found(images, t).field.field.data[HEAD.mask] for t in (TIMES, wrong))
    scale = float(bent @ right / (right @ right)) - 1
    assert abs(scale) == pytest.approx(percent / 100, abs=0.015) and ("high" in note) == (scale > 0)


@pytest.mark.parametrize(("noise", "eddy"), [(0.01, 0.0), (0.1, 0.0), (0.01, 0.3)])
def test_sound_echoes_are_not_told(noise: float, eddy: float) -> None:
    assert found(echoes(TIMES, noise, eddy), TIMES).notes == ()


def test_what_phases_cannot_tell_is_not_told() -> None:
    images = echoes(TIMES)
    for times in (tuple(t + 0.003 for t in TIMES), tuple(1.2 * t for t in TIMES)):
        assert found(images, times).notes == ()
    assert echo_delay(images[:3], TIMES[:3], fit_field(images[:3], TIMES[:3], HEAD.mask)) is None
    flat = torch.ones(4, 12, 12, 12, dtype=torch.complex64)
    assert echo_delay(flat, TIMES, fit_field(flat, TIMES, torch.ones(12, 12, 12, dtype=torch.bool))) is None
