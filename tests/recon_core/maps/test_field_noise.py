"""The noise of a field, and what no susceptibility explains of it, by the field itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

import recon_core.maps.field_noise as field_noise_module
from recon_core.maps.dipole import TVSettings, tv_admm
from recon_core.maps.dipole_kernel import DipoleOperator
from recon_core.maps.field_checks import squared_weights
from recon_core.maps.field_noise import field_noise, unexplained_field
from tests.recon_core.maps.analytic_fields import small_head


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_the_noise_of_a_head_s_field_is_found(noise: float) -> None:
    h = small_head(noise=noise)
    smooth = small_head()
    assert field_noise(smooth.field, smooth.mask) < 0.2 * noise  # what sources leave
    assert field_noise(h.field, h.mask) == pytest.approx(noise, rel=0.08)
    outside = torch.where(h.mask, h.field, 100.0)
    assert field_noise(outside, h.mask) == field_noise(h.field, h.mask)


def test_where_no_block_is_whole_nothing_is_known() -> None:
    plane = torch.zeros(5, 6, 7, dtype=torch.bool)
    plane[2] = True
    assert field_noise(torch.randn(5, 6, 7), plane) == 0.0


def test_a_head_s_own_field_is_explained_and_noise_is_not() -> None:
    for noise in (0.0, 0.02):
        h = small_head(noise=noise)
        found = unexplained_field(h.field, h.mask, h.voxel, DipoleOperator(tuple(h.mask.shape), h.voxel, h.b0, h.field))
        assert found == pytest.approx(noise, rel=0.2)


def test_a_smooth_disturbance_is_seen_and_the_inversion_yields_less_to_it() -> None:
    h = small_head(noise=0.001)
    smooth = gaussian_filter(np.random.default_rng(1).standard_normal(h.mask.shape), 1.5)
    field = torch.where(h.mask, h.field + torch.from_numpy(0.01 * smooth / smooth.std()).to(h.field.dtype), 0)
    operator = DipoleOperator(tuple(h.mask.shape), h.voxel, h.b0, field)
    noise = field_noise(field, h.mask)
    assert noise < 0.002 < 0.008 < unexplained_field(field, h.mask, h.voxel, operator)
    by_noise = TVSettings(weight=math.hypot(TVSettings.weight, TVSettings.noise_weight * noise), noise_weight=0.0)
    truth = (h.chi - h.chi[h.mask].mean())[h.mask]
    errors = [
        float(torch.linalg.vector_norm(tv_admm(field, h.mask, h.voxel, h.b0, settings=s).chi.data[h.mask] - truth))
        for s in (TVSettings(), by_noise)
    ]
    assert errors[0] < 0.9 * errors[1]


def test_what_the_echoes_hardly_know_is_no_disturbance_of_the_rest() -> None:
    """64 voxels 60 Hz off, of a thousandth of the others' weight: total variation blurred the whole brain for them."""
    h = small_head(noise=0.001)
    field, weights = h.field.float(), h.mask.float()
    n = h.mask.shape[0] // 2
    odd = (slice(n - 2, n + 2),) * 3
    field[odd] += 0.47
    weights[odd] = 1e-3
    operator = DipoleOperator(tuple(h.mask.shape), h.voxel, h.b0, field)
    known = squared_weights(weights, h.mask, field)
    assert unexplained_field(field, h.mask, h.voxel, operator, known) < 0.002
    assert unexplained_field(field, h.mask, h.voxel, operator) > 0.02
    truth = (h.chi - h.chi[h.mask].mean())[h.mask]
    found = tv_admm(field, h.mask, h.voxel, h.b0, weights=weights).chi.data[h.mask]
    assert torch.linalg.vector_norm(found - truth) < 0.12 * torch.linalg.vector_norm(truth)


def test_of_a_slab_too_thin_to_tell_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    h = small_head(noise=0.02)
    field, mask = h.field[8:22], h.mask[8:22]
    operator = DipoleOperator(tuple(mask.shape), h.voxel, h.b0, field)
    assert unexplained_field(field, mask, h.voxel, operator) == 0.0
    monkeypatch.setattr(field_noise_module, "LEAST_DEPTH", 0.0)
    assert unexplained_field(field, mask, h.voxel, operator) > 0.01


def test_nothing_is_said_of_a_mask_without_an_inside() -> None:
    nowhere, field = torch.zeros(8, 8, 8, dtype=torch.bool), torch.randn(8, 8, 8)
    assert unexplained_field(field, nowhere, (1e-3,) * 3, DipoleOperator((8, 8, 8), (1e-3,) * 3, (1, 0, 0), field)) == 0.0
