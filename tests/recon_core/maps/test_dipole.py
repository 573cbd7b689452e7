"""Dipole inversion of a small head with known susceptibility."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import pytest
import torch
from scipy.ndimage import binary_dilation

from recon_core.errors import DataError
from recon_core.maps.dipole import Susceptibility, TKDSettings, TVSettings, mean_response, tkd, tv_admm
from recon_core.maps.dipole_kernel import dipole_spectrum
from recon_core.maps.medi import MEDISettings, csf_region, medi, smooth_places
from recon_core.metrics import hfen
from tests.recon_core.maps.analytic_fields import Head, small_head

FEW = TVSettings(weight=2e-4, max_iterations=60)
SHORT = MEDISettings(max_iterations=6, cg_iterations=60)


@cache
def head() -> Head:
    return small_head(noise=2e-4)


def by_tkd(h: Head) -> Susceptibility:
    return tkd(h.field, h.mask, h.voxel, h.b0)


def by_tv(h: Head) -> Susceptibility:
    return tv_admm(h.field, h.mask, h.voxel, h.b0, settings=FEW)


@cache
def by_medi(h: Head) -> Susceptibility:
    return medi(h.field, h.mask, h.magnitude, h.voxel, h.b0, settings=SHORT)


def relative_error(found: Susceptibility, h: Head) -> float:
    a, b = found.chi.data.double()[h.mask], h.chi[h.mask]
    return float(torch.linalg.vector_norm(a - a.mean() - b + b.mean()) / torch.linalg.vector_norm(b - b.mean()))


@pytest.mark.parametrize(("method", "error", "high"), [(by_tkd, 0.37, 0.34), (by_tv, 0.085, 0.052), (by_medi, 0.055, 0.028)])
def test_susceptibility_of_a_head(method: Callable[[Head], Susceptibility], error: float, high: float) -> None:
    h = head()
    kept = h.field.clone()
    found = method(h)
    assert torch.equal(h.field, kept)
    assert found.chi.unit == "ppm" and found.reference == "whole mask"
    assert found.chi.data.dtype == torch.float32
    assert (found.chi.data[~h.mask] == 0).all()
    assert abs(float(found.chi.data[h.mask].mean())) < 1e-6
    assert relative_error(found, h) < error
    lift = 1.0  # HFEN takes magnitudes: lift the map above zero
    truth = torch.where(h.mask, h.chi - h.chi[h.mask].mean(), 0.0)
    assert hfen(found.chi.data.double() + lift, truth + lift, h.mask) < high


def test_total_variation_beats_the_threshold() -> None:
    assert relative_error(by_tv(head()), head()) < 0.25 * relative_error(by_tkd(head()), head())


def test_noise_grows_and_contrast_stays() -> None:
    """The nuclei of a field with 10 ppb of noise, against a fixed weight without the residual added back."""
    h = small_head(noise=0.010)
    inside, nuclei = h.mask, h.chi > 0.16

    def contrast(chi: torch.Tensor) -> float:
        return float(chi[nuclei].mean() - chi[inside & ~nuclei].mean())

    true, quiet = contrast(h.chi), small_head(noise=1e-4)
    found = tv_admm(h.field, h.mask, h.voxel, h.b0)
    fixed = tv_admm(h.field, h.mask, h.voxel, h.b0, settings=TVSettings(weight=5e-5, noise_weight=0.0, added_back=0))
    plain = tv_admm(h.field, h.mask, h.voxel, h.b0, settings=TVSettings(added_back=0))
    assert relative_error(found, h) < 0.7 * relative_error(fixed, h)
    assert contrast(found.chi.data) == pytest.approx(true, rel=0.12)
    assert contrast(found.chi.data) > contrast(fixed.chi.data) and contrast(found.chi.data) > 1.05 * contrast(plain.chi.data)
    without = tv_admm(quiet.field, quiet.mask, quiet.voxel, quiet.b0)
    assert contrast(without.chi.data) == pytest.approx(true, rel=0.03)


def test_steps_are_of_both_minimisations_together() -> None:
    h = head()
    few = tv_admm(h.field, h.mask, h.voxel, h.b0, settings=TVSettings(max_iterations=7))
    assert few.iterations == 7 and not few.converged
    enough = tv_admm(h.field, h.mask, h.voxel, h.b0)
    assert enough.converged and enough.iterations < TVSettings.max_iterations


@pytest.mark.parametrize("method", ["tv", "medi"])
def test_what_weighs_little_spoils_little(method: str) -> None:
    """A block whose field is wrong, as beside a vessel: with its weight near zero the map outside it is as without the fault."""
    h = head()
    block = torch.zeros_like(h.mask)
    block[14:18, 8:12, 20:24] = True
    beside = h.mask & ~torch.from_numpy(binary_dilation(block.numpy(), iterations=2))
    field = torch.where(block, h.field + 0.15, h.field)
    weights = torch.where(block, 1e-3, 2.0) * h.mask  # any scale

    def found(field: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
        if method == "tv":
            return tv_admm(field, h.mask, h.voxel, h.b0, weights=weights, settings=TVSettings(max_iterations=30)).chi.data
        settings = MEDISettings(max_iterations=2, cg_iterations=25)
        return medi(field, h.mask, h.magnitude, h.voxel, h.b0, weights=weights, settings=settings).chi.data

    right = found(h.field, None)
    alike, weighted = ((found(field, w) - right)[beside].std() for w in (None, weights))
    assert float(weighted) < 0.3 * float(alike)


def test_oblique_field_direction() -> None:
    h = small_head(b0=(0.8, 0.6, 0.0))
    right = tv_admm(h.field, h.mask, h.voxel, h.b0, settings=FEW)
    wrong = tv_admm(h.field, h.mask, h.voxel, (1.0, 0.0, 0.0), settings=FEW)
    assert relative_error(right, h) < 0.15
    assert relative_error(wrong, h) > 5 * relative_error(right, h)


def test_uniform_fluid_is_the_zero() -> None:
    h = head()
    found = medi(h.field, h.mask, h.magnitude, h.voxel, h.b0, csf=h.fluid, settings=SHORT)
    assert found.reference == "cerebrospinal fluid"
    assert abs(float(found.chi.data[h.fluid].mean())) < 1e-6
    nucleus = h.chi > 0.16
    assert float(found.chi.data[nucleus].mean()) == pytest.approx(float(h.chi[nucleus].mean()), abs=0.003)
    assert float(found.chi.data[h.fluid].std()) < 0.7 * float(by_medi(h).chi.data[h.fluid].std())


def test_wrong_wraps_do_not_spread_through_the_exponential() -> None:
    h = head()
    turns_per_ppm = 4.0
    field = h.field.clone()
    field[15, 17, 10:20] += 1 / turns_per_ppm  # a whole turn too much
    linear = medi(field, h.mask, h.magnitude, h.voxel, h.b0, settings=SHORT)
    exponential = medi(
        field, h.mask, h.magnitude, h.voxel, h.b0, radians_per_ppm=2 * math.pi * turns_per_ppm, settings=SHORT
    )
    assert relative_error(exponential, h) < 0.1 * relative_error(linear, h)
    assert relative_error(exponential, h) < 1.1 * relative_error(by_medi(h), h)


def test_threshold_underestimates_by_the_mean_response() -> None:
    """``1 - mean(1 - |D| / threshold)`` over the held part of k-space; by D's distribution on spheres, ``D = 1/3 - u^2``."""
    threshold, like = 0.2, torch.zeros((), dtype=torch.float64)
    d = dipole_spectrum((48, 48, 48), (1e-3,) * 3, (1.0, 0.0, 0.0), like)
    response = (d.abs() / threshold).clamp_max(1)
    k = torch.fft.fftfreq(48, dtype=torch.float64)
    ball = k[:, None, None] ** 2 + k[None, :, None] ** 2 + torch.fft.rfftfreq(48, dtype=torch.float64) ** 2 < 0.25
    ball[0, 0, 0] = False
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    sphere = ((1 / 3 - u**2).abs() / threshold).clamp_max(1).mean()
    within = mean_response(torch.where(ball, response, 0.0), 48) / mean_response(ball.double(), 48)
    assert within == pytest.approx(float(sphere), abs=0.01)
    # the corners of the cube lie on the cone: the whole of k-space answers less, and that is what the map is divided by
    cube = mean_response(response, 48)
    assert cube < float(sphere)
    h = head()
    plain = tkd(h.field, h.mask, h.voxel, h.b0, settings=TKDSettings(correct=False))
    ratio = by_tkd(h).chi.data[h.mask].norm() / plain.chi.data[h.mask].norm()
    assert 1 / float(ratio) == pytest.approx(cube, abs=0.01)


def test_edges_are_where_the_magnitude_has_them() -> None:
    magnitude = torch.ones(6, 6, 6)
    magnitude[:, :, 3:] = 2.0
    smooth = smooth_places(magnitude, torch.ones(6, 6, 6, dtype=torch.bool), (1.0, 1.0, 1.0), 0.1)
    assert (smooth[2, :, :, 2] == 0).all()
    assert smooth.sum() == smooth.numel() - 36


def test_fluid_is_found_by_its_slow_decay() -> None:
    h = head()
    r2star = torch.where(h.fluid, 2.0, 20.0)
    r2star[0, 0, 0] = 1.0  # outside the mask
    found = csf_region(r2star, h.mask, h.voxel)
    assert torch.equal(found, h.fluid)
    with pytest.raises(DataError, match=r"no cerebrospinal fluid found.*map_reference = brain"):
        csf_region(torch.full_like(r2star, 20.0), h.mask, h.voxel)


def test_nonsense_is_refused() -> None:
    h = head()
    with pytest.raises(DataError, match="mask is empty"):
        tkd(h.field, h.mask & False, h.voxel, h.b0)
    with pytest.raises(DataError, match="not finite"):
        tkd(torch.where(h.mask, math.nan, 0.0), h.mask, h.voxel, h.b0)
    with pytest.raises(DataError, match="weights do not fit"):
        tv_admm(h.field, h.mask, h.voxel, h.b0, weights=h.field[1:])
    with pytest.raises(DataError, match="reference region"):
        tkd(h.field, h.mask, h.voxel, h.b0, reference=~h.mask)
    with pytest.raises(DataError, match="magnitude"):
        medi(h.field, h.mask, h.magnitude[1:], h.voxel, h.b0)
