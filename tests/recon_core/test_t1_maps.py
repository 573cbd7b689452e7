"""T1 maps: simulated truth (bias, standard deviation, lost signs), a measured phantom, what is marked, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.io import loadmat

from recon_core.errors import DataError, SettingError
from recon_core.maps.t1 import T1Maps, T1Settings, inversion_recovery_t1, molli_t1, saturation_recovery_t1
from tests.recon_core.molli_phantom import TUBES

PHANTOM = Path(__file__).parent.parent / "data" / "molli" / "myomapnet_phantom.mat"
MOLLI_TIMES = (0.12, 1.12, 2.12, 3.12, 4.12, 0.20, 1.20, 2.20)  # 5(3)3, as acquired: not in order
SATURATION_TIMES = (0.5, 1.0, 1.5, 2.0, 8.0)
T1S = (0.3, 0.5, 0.9, 1.3, 1.8)  # at 0.3 s one image of ours lies within two SD of its zero crossing


def molli(
    t1: torch.Tensor, times: tuple[float, ...] = MOLLI_TIMES, m0: float = 1.0, shortening: float = 0.8
) -> torch.Tensor:
    """``M0* - (M0 + M0*) exp(-TI/T1*)`` with ``T1* = shortening T1`` and ``M0* = M0 T1*/T1``; signed, ``(state, *t1)``."""
    ti = torch.tensor(times, dtype=torch.float64).reshape(-1, *(1,) * t1.ndim)
    return m0 * (shortening - (1 + shortening) * torch.exp(-ti / (shortening * t1)))


def saturation(t1: torch.Tensor, m0: float = 1.0) -> torch.Tensor:
    tau = torch.tensor(SATURATION_TIMES, dtype=torch.float64).reshape(-1, *(1,) * t1.ndim)
    return m0 * (1 - torch.exp(-tau / t1))


def noisy(signal: torch.Tensor, noise: float, *, magnitude: bool, phase: float = 2.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    real, imag = (torch.randn(signal.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    y = signal * complex(math.cos(phase), math.sin(phase)) + noise * torch.complex(real, imag)
    return y.abs().float() if magnitude else y.to(torch.complex64)


def stack(t1s: tuple[float, ...], repeats: int) -> torch.Tensor:
    return torch.tensor(t1s, dtype=torch.float64)[None, :, None].expand(1, len(t1s), repeats)  # (z, y, x)


@pytest.mark.parametrize("magnitude", [False, True])
def test_molli_noiseless_truth(magnitude: bool) -> None:
    t1 = torch.linspace(0.1, 3.0, 500, dtype=torch.float64).reshape(1, 1, -1)
    maps = molli_t1(noisy(molli(t1, m0=700.0), 0.0, magnitude=magnitude), MOLLI_TIMES)
    assert bool(maps.t1.valid.all())
    torch.testing.assert_close(maps.t1.data.double(), t1, rtol=1e-3, atol=0)
    torch.testing.assert_close(maps.m0.data, torch.full_like(maps.m0.data, 700.0), rtol=1e-3, atol=0)
    assert (maps.m0_phase is None) == magnitude
    if maps.m0_phase is not None:
        torch.testing.assert_close(maps.m0_phase.data, torch.full_like(maps.m0.data, 2.0), rtol=0, atol=1e-3)


@pytest.mark.parametrize("known_noise", [False, True])
@pytest.mark.parametrize("kind", ["molli complex", "molli magnitude", "saturation complex", "saturation magnitude"])
def test_bias_and_standard_deviation(kind: str, known_noise: bool) -> None:
    noise, t1 = 0.01, stack(T1S, 2500)
    magnitude, given = kind.endswith("magnitude"), 0.01 if known_noise else None
    if kind.startswith("molli"):
        maps = molli_t1(noisy(molli(t1), noise, magnitude=magnitude), MOLLI_TIMES, noise_std=given)
    else:
        maps = saturation_recovery_t1(noisy(saturation(t1), noise, magnitude=magnitude), SATURATION_TIMES, noise_std=given)
    for row, truth in enumerate(T1S):
        valid = maps.t1.valid[0, row]
        assert float(valid.float().mean()) > 0.995
        found, claimed = maps.t1.data[0, row][valid].double(), maps.t1_sd.data[0, row][valid].double()
        assert abs(float(found.mean()) / truth - 1) < 0.01
        assert float(claimed.square().mean().sqrt()) == pytest.approx(float(found.std()), rel=0.15)
    residual = maps.residual.data[maps.residual.valid].square().mean().sqrt()
    assert float(residual) == pytest.approx(noise, rel=0.05)


def test_no_zero_crossing_is_lost() -> None:
    """Wherever the crossing lies, also on a sample or before the first, magnitudes give what signs give."""
    t1 = torch.logspace(math.log10(0.08), math.log10(2.5), 4000, dtype=torch.float64).reshape(1, 1, -1)
    signed = molli_t1(noisy(molli(t1), 0.004, magnitude=False), MOLLI_TIMES)
    lost = molli_t1(noisy(molli(t1), 0.004, magnitude=True), MOLLI_TIMES)
    both = signed.t1.valid & lost.t1.valid
    # in between, 0.12 s and 0.20 s are the only samples before full recovery and fit with either sign: marked, not guessed
    clear = (t1 < 0.12) | (t1 > 0.22)
    assert float(both[clear].float().mean()) > 0.995
    assert bool(signed.t1.valid.all()) and not bool(both[~clear].all())
    wrong = (lost.t1.data - signed.t1.data).abs() > 6 * lost.t1_sd.data + 0.005 * signed.t1.data
    assert float((wrong & both).float().mean()) < 1e-3


def test_inversion_recovery_with_imperfect_inversion_and_unrecovered_end() -> None:
    times = (0.35, 0.5, 0.65, 0.8, 0.95, 1.1, 1.25, 1.4, 1.7)
    t1 = torch.linspace(0.4, 3.0, 300, dtype=torch.float64).reshape(1, 1, -1)
    ti = torch.tensor(times, dtype=torch.float64).reshape(-1, 1, 1, 1)
    signal = 1 - 1.85 * torch.exp(-ti / t1)  # the last image is still negative for T1 above 2.8 s
    maps = inversion_recovery_t1(noisy(signal, 0.0, magnitude=False), times)
    assert bool(maps.t1.valid.all())
    torch.testing.assert_close(maps.t1.data.double(), t1, rtol=1e-2, atol=0)  # ends at TI = 0.6 T1: single precision shows
    torch.testing.assert_close(maps.m0.data, torch.ones_like(maps.m0.data), rtol=1e-2, atol=0)
    short = t1.flatten() < 2.0
    lost = inversion_recovery_t1(noisy(signal, 0.0, magnitude=True)[..., short], times)
    torch.testing.assert_close(lost.t1.data.double().flatten(), t1.flatten()[short], rtol=3e-3, atol=0)


def test_scale_order_and_neighbours_do_not_matter() -> None:
    t1 = stack(T1S, 40)
    y = noisy(molli(t1), 0.01, magnitude=True)
    maps = molli_t1(y, MOLLI_TIMES)
    order = [3, 0, 7, 1, 6, 2, 5, 4]
    shuffled = molli_t1(y[order], [MOLLI_TIMES[i] for i in order])
    assert torch.equal(shuffled.t1.data, maps.t1.data)
    large = molli_t1(y * 2.0**18, MOLLI_TIMES)
    torch.testing.assert_close(large.t1.data, maps.t1.data, rtol=1e-5, atol=0)
    torch.testing.assert_close(large.m0.data, maps.m0.data * 2.0**18, rtol=1e-5, atol=0)
    part = molli_t1(y[..., :7], MOLLI_TIMES)
    torch.testing.assert_close(part.t1.data, maps.t1.data[..., :7], rtol=1e-5, atol=0)


def test_measured_phantom_within_3_percent() -> None:
    mat = loadmat(PHANTOM)
    series, reference = mat["MOLLIT1wTI"][0, 0], mat["MOLLIoffLineT1Map"][0]
    maps = molli_t1(torch.tensor(series[:5])[:, None], series[5:, 0, 0].tolist())
    for y, x in TUBES:
        roi = np.hypot(*np.ogrid[-y : 160 - y, -x : 160 - x]) <= 5
        assert bool(maps.t1.valid[0][roi].all())
        t1 = maps.t1.data[0].numpy()[roi]
        assert float(t1.mean()) == pytest.approx(float(reference[roi].mean()), rel=0.03)
        assert float(np.median(maps.t1_sd.data[0].numpy()[roi] / t1)) < 0.05


def test_what_cannot_be_believed_is_marked_and_empty() -> None:
    t1 = stack((0.9,), 8)
    y = noisy(molli(t1), 0.002, magnitude=True)
    generator = torch.Generator().manual_seed(5)
    y[..., 1] = 0.0  # nothing
    y[..., 2] = 0.003 * torch.rand(8, 1, 1, generator=generator)  # under the floor
    y[..., 3] = 1.0  # no recovery
    y[..., 4] = torch.tensor([1.0, 0.05] * 4)[:, None, None]  # no recovery curve
    y[..., 5] = molli(torch.tensor([[30.0]], dtype=torch.float64)).abs()  # implausibly long
    maps = molli_t1(y, MOLLI_TIMES)
    assert maps.t1.valid[0, 0].tolist() == [True, False, False, False, False, False, True, True]
    for m in maps.maps:
        assert m.valid is maps.t1.valid or torch.equal(m.valid, maps.t1.valid)
        assert m.data.dtype == torch.float32 and m.data.shape == (1, 1, 8)
        assert not bool(m.data[~m.valid].any()) and bool(torch.isfinite(m.data).all())


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("fit", [molli_t1, inversion_recovery_t1, saturation_recovery_t1])
def test_pure_noise_and_nothing_at_all(fit: Callable[..., T1Maps], magnitude: bool) -> None:
    times = SATURATION_TIMES if fit is saturation_recovery_t1 else MOLLI_TIMES
    nothing = torch.zeros(len(times), 1, 40, 40, dtype=torch.float64)
    empty = fit(noisy(nothing, 0.0, magnitude=magnitude), times)
    assert not bool(empty.t1.valid.any()) and not bool(empty.t1.data.any())
    noise = fit(noisy(nothing, 1.0, magnitude=magnitude), times, noise_std=1.0)
    assert not bool(noise.t1.valid.any())
    unknown = fit(noisy(nothing, 1.0, magnitude=magnitude), times)  # signs of magnitudes are free: noise often fits itself
    assert float(unknown.t1.valid.float().mean()) < (0.12 if magnitude else 0.01)


def test_maps_carry_name_and_unit_and_the_input_stays() -> None:
    y = noisy(saturation(stack((1.2,), 3), m0=5.0), 0.01, magnitude=False)
    before = y.clone()
    maps = saturation_recovery_t1(y, SATURATION_TIMES)
    assert torch.equal(before, y)
    units = {m.name: m.unit for m in maps.maps}
    assert units == {"T1": "s", "T1_SD": "s", "M0": "1", "T1_residual": "1", "M0_phase": "rad"}
    assert maps.m0_phase is not None
    torch.testing.assert_close(maps.m0.data, torch.full((1, 1, 3), 5.0), rtol=0.02, atol=0)
    torch.testing.assert_close(maps.m0_phase.data, torch.full((1, 1, 3), 2.0), rtol=0, atol=0.02)


def test_bad_input_is_refused() -> None:
    y = noisy(molli(stack((0.9,), 3)), 0.01, magnitude=True)
    broken = y.clone()
    broken[0, 0, 0, 1] = math.nan
    wrong: tuple[tuple[torch.Tensor, tuple[float, ...]], ...] = (
        (y, MOLLI_TIMES[:5]),  # count
        (y[:3], MOLLI_TIMES[:3]),  # too few
        (y, (0.1, 0.1, 0.5, 0.5, 0.9, 0.9, 0.9, 0.9)),  # too few different ones
        (broken, MOLLI_TIMES),
        (y - 0.5, MOLLI_TIMES),  # negative magnitudes
        (y, (math.nan, *MOLLI_TIMES[1:])),
        (y[:, 0], MOLLI_TIMES),  # no z
        (y[..., :0], MOLLI_TIMES),
    )
    for images, times in wrong:
        for fit in (molli_t1, inversion_recovery_t1):
            with pytest.raises(DataError):
                fit(images, times)
    with pytest.raises(DataError, match="too few"):
        saturation_recovery_t1(y[:2], (0.5, 1.0))
    with pytest.raises(SettingError):
        molli_t1(y, MOLLI_TIMES, noise_std=-1.0)
    with pytest.raises(SettingError):
        molli_t1(y, MOLLI_TIMES, settings=T1Settings(t1_min=3.0, t1_max=2.0))


def test_three_times_suffice_when_sign_and_noise_are_known() -> None:
    times = (0.1, 1.0, 3.0)
    y = noisy(molli(stack((0.9,), 200), times), 0.005, magnitude=False)
    maps = molli_t1(y, times, noise_std=0.005)
    assert bool(maps.t1.valid.all())
    assert float(maps.t1.data.mean()) == pytest.approx(0.9, rel=0.01)
    with pytest.raises(DataError):
        molli_t1(y, times)
