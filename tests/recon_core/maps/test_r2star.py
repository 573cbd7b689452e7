"""R2* of known decays: equal and unequal echo spacing, noise, noise floor; standard deviations against repeated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.maps.echo_agreement import known_field
from recon_core.maps.field import fit_field
from recon_core.maps.magnitude_decay import MagnitudeDecay
from recon_core.maps.r2star import R2StarSettings, arlo, nonlinear_r2star

EQUAL = tuple(0.002 + 0.0034 * i for i in range(8))
UNEQUAL = (0.0020, 0.0045, 0.0080, 0.0125, 0.0165, 0.0230, 0.0280)
RATES = torch.tensor([5.0, 20.0, 45.0, 90.0, 140.0], dtype=torch.float64)


def decays(times: tuple[float, ...], rates: torch.Tensor = RATES, s0: float = 700.0) -> torch.Tensor:
    return (s0 * torch.exp(-torch.tensor(times, dtype=torch.float64)[:, None] * rates))[:, None, None]


@pytest.mark.parametrize(("times", "error"), [(EQUAL, 2e-3), (UNEQUAL, 2e-3)])
def test_arlo_without_noise(times: tuple[float, ...], error: float) -> None:
    maps = arlo(decays(times), times)
    assert maps.r2star.valid.all()
    torch.testing.assert_close(maps.r2star.data[0, 0].double(), RATES, rtol=error, atol=0)
    torch.testing.assert_close(maps.s0.data[0, 0].double(), torch.full_like(RATES, 700.0), rtol=error, atol=0)
    assert maps.r2star.unit == "1/s"


def test_unequal_spacing_matters() -> None:
    """Equal spacing assumed for these echoes is wrong by more than a tenth: the parabola through unequal ones is at work."""
    wrong = tuple(np.linspace(UNEQUAL[0], UNEQUAL[-1], len(UNEQUAL)))
    found = arlo(decays(UNEQUAL), wrong).r2star.data[0, 0].double()
    assert ((found - RATES).abs() / RATES).max() > 0.2
    right = arlo(decays(UNEQUAL), UNEQUAL).r2star.data[0, 0].double()
    assert ((right - RATES).abs() / RATES).max() < 0.002


def test_arlo_is_the_papers_formula_for_equal_spacing() -> None:
    s = decays(EQUAL)[:, 0, 0] + torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = 0.0034
    simpson = step / 3 * (s[:-2] + 4 * s[1:-1] + s[2:])
    drop = s[:-2] - s[2:]
    t2star = ((simpson**2).sum(0) + step / 3 * (simpson * drop).sum(0)) / (
        step / 3 * (drop**2).sum(0) + (simpson * drop).sum(0)
    )
    found = arlo(s[:, None, None], EQUAL).r2star.data[0, 0].double()
    torch.testing.assert_close(found, 1 / t2star, rtol=1e-5, atol=0)


@pytest.mark.parametrize("times", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("kind", ["complex", "magnitude"])
def test_nonlinear_fit_is_exact(times: tuple[float, ...], kind: str) -> None:
    images = decays(times)
    if kind == "complex":
        images = images * torch.exp(1j * (0.7 + 2 * math.pi * 31.0 * torch.tensor(times).double()))[:, None, None, None]
    order = torch.tensor([2, 0, 1, *range(3, len(times))])
    kept = images[order].clone()
    maps = nonlinear_r2star(images[order], [times[int(i)] for i in order], noise_std=None)
    assert torch.equal(images[order], kept)
    torch.testing.assert_close(maps.r2star.data[0, 0].double(), RATES, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(maps.s0.data[0, 0].double(), torch.full_like(RATES, 700.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["arlo", "magnitude", "complex"])
def test_standard_deviation_is_that_of_repeated_draws(method: str) -> None:
    noise, rate, n = 7.0, 40.0, 2000
    rng = np.random.default_rng(1)
    clean = decays(EQUAL, torch.tensor([rate]).double()).numpy()
    draws = clean + noise * (rng.standard_normal((8, 1, 1, n)) + 1j * rng.standard_normal((8, 1, 1, n)))
    images = torch.from_numpy(draws).to(torch.complex64)
    if method == "arlo":
        maps = arlo(images.abs(), EQUAL, noise_std=noise)
    else:
        maps = nonlinear_r2star(images if method == "complex" else images.abs(), EQUAL, noise_std=noise)
    found, claimed = maps.r2star.data[maps.r2star.valid].double(), maps.r2star_sd.data[maps.r2star.valid].double()
    assert len(found) > 0.99 * n
    assert found.mean().item() == pytest.approx(rate, rel=0.01)
    assert claimed.mean().item() == pytest.approx(found.std().item(), rel=0.07)
    from_residual = (arlo(images.abs(), EQUAL) if method == "arlo" else nonlinear_r2star(images, EQUAL)).r2star_sd.data
    assert from_residual.double().square().mean().sqrt().item() == pytest.approx(found.std().item(), rel=0.1)


def test_noise_floor_is_taken_out() -> None:
    """The last echoes are noise: the plain fit of magnitudes is far too low, the Rician mean and the complex fit are not."""
    noise, rate, n = 0.05, 150.0, 1000
    rng = np.random.default_rng(2)
    clean = decays(EQUAL, torch.tensor([rate]).double(), s0=1.0).numpy()
    images = torch.from_numpy(clean + noise * (rng.standard_normal((8, 1, 1, n)) + 1j * rng.standard_normal((8, 1, 1, n))))
    limits = R2StarSettings(signal_floor=0.0, min_snr=0.0)
    plain = nonlinear_r2star(images.abs(), EQUAL, settings=limits).r2star
    aware = nonlinear_r2star(images.abs(), EQUAL, noise_std=noise, settings=limits).r2star
    of_complex = nonlinear_r2star(images, EQUAL, noise_std=noise, settings=limits).r2star
    assert plain.data[plain.valid].mean() < 0.95 * rate
    assert aware.data[aware.valid].mean().item() == pytest.approx(rate, rel=0.03)
    assert of_complex.data[of_complex.valid].mean().item() == pytest.approx(rate, rel=0.03)


def test_late_echoes_of_nothing_but_noise_take_no_voxel_away() -> None:
    """A fast decay, SNR 10, by 25 echoes: what the first four tell is not lost, for R2* and for the field; air stays without."""
    times, shape, noise = tuple(0.004 * (i + 1) for i in range(25)), (6, 8, 10), 0.1
    t = torch.tensor(times)[:, None, None, None]
    air = torch.zeros(shape, dtype=torch.bool)
    air[:, :, 6:] = True
    generator = torch.Generator().manual_seed(0)
    echoes = torch.exp(-80.0 * t) * ~air + noise * 2**0.5 * torch.randn(
        25, *shape, dtype=torch.complex64, generator=generator
    )
    r2star = nonlinear_r2star(echoes.abs(), times, noise_std=noise).r2star
    assert float(r2star.valid[~air].float().mean()) > 0.97 and not bool(r2star.valid[air].any())
    assert float(r2star.data[r2star.valid].median()) == pytest.approx(80.0, rel=0.1)
    field = fit_field(echoes, times, torch.ones(shape, dtype=torch.bool), noise_std=noise)
    known = known_field(field, echoes, noise)
    assert float(known[:, :, :5].float().mean()) > 0.97 and not bool(known[:, :, 7:].any())


@pytest.mark.parametrize("loud", [1.0, 1.5])
@pytest.mark.parametrize("n_echoes", [3, 6, 20])
def test_dim_fluid_is_no_void(n_echoes: int, loud: float) -> None:
    """Fluid a seventh as bright as tissue at SNR 20 has a field; what is empty has none, also where unfolding made noise louder."""
    shape, noise, times = (16, 20, 40), 0.05, tuple(0.004 * (i + 1) for i in range(n_echoes))
    z, y, x = torch.meshgrid(*(torch.arange(n) - n // 2 for n in shape), indexing="ij")
    fluid, empty = ((z**2 + y**2 + (x - at) ** 2).float().sqrt() for at in (-10, 10))
    signal = torch.where(fluid < 6.5, 0.15, 1.0) * (empty >= 6.5)
    phase = 2 * math.pi * 20.0 * torch.tensor(times)[:, None, None, None] * (1 + 0.02 * z)
    scatter = torch.randn(n_echoes, *shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    echoes = torch.polar(signal.expand_as(phase), phase) + noise * 2**0.5 * scatter * torch.where(empty < 6.5, loud, 1.0)
    known = known_field(fit_field(echoes, times, torch.ones(shape, dtype=torch.bool), noise_std=noise), echoes, noise)
    assert float(known[fluid < 5].float().mean()) > 0.95 and not bool(known[empty < 5].any())
    assert bool(known[(fluid > 8) & (empty > 8)].all())


@pytest.mark.parametrize("noise", [None, 0.1])
def test_magnitude_model_derivatives(noise: float | None) -> None:
    model = MagnitudeDecay(EQUAL, noise)
    p = torch.tensor([[1.0, 0.3, 2.0, 0.02], [20.0, 60.0, 150.0, 10.0]], dtype=torch.float64)
    signal, jacobian = model.signal_and_jacobian(p)
    torch.testing.assert_close(signal, model.signal(p))
    weights = torch.randn(signal.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    curvature = model.curvature(p, weights)
    for k in range(p.shape[1]):
        at = p[:, k : k + 1].clone()
        auto = torch.autograd.functional.jacobian(lambda v: model.signal(v)[:, 0], at)
        torch.testing.assert_close(auto[..., 0], jacobian[:, :, k], rtol=1e-8, atol=1e-10)
        slope = torch.autograd.functional.jacobian(
            lambda v, k=k: (model.signal_and_jacobian(v)[1][:, :, 0] * weights[:, None, k]).sum(0), at
        )
        torch.testing.assert_close(slope[..., 0], curvature[:, :, k], rtol=1e-6, atol=1e-8)


def test_rician_mean_of_pure_noise() -> None:
    zero = torch.tensor([[0.0], [10.0]], dtype=torch.float64)
    assert MagnitudeDecay(EQUAL, 2.0).signal(zero)[0, 0].item() == pytest.approx(2.0 * math.sqrt(math.pi / 2))


def test_what_cannot_be_believed_is_marked_and_nonsense_refused() -> None:
    images = decays(EQUAL).float()
    images[..., 0] = 0.0
    images[..., 1] = images[..., 1].flip(0)  # grows with time
    valid = arlo(images, EQUAL).r2star.valid[0, 0]
    assert valid.tolist() == [False, False, True, True, True]
    with pytest.raises(DataError, match="count of echo times"):
        arlo(images, EQUAL[:-1])
    with pytest.raises(DataError, match="too few echoes"):
        arlo(images[:2], EQUAL[:2])
    with pytest.raises(DataError, match="occurs twice"):
        arlo(images[:3], (0.002, 0.002, 0.004))
    with pytest.raises(DataError, match="not an echo time"):
        arlo(images[:3], (0.002, math.nan, 0.004))
    with pytest.raises(SettingError, match="noise SD"):
        arlo(images, EQUAL, noise_std=0.0)
    with pytest.raises(DataError, match="mask is empty"):
        arlo(images, EQUAL, mask=torch.zeros(1, 1, 5, dtype=torch.bool))
