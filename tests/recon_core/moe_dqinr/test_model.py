"""Eq. 5-21: synthesis, routing, variants, grids of every shape."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.methods.moe_dqinr.configurations import QUANTITATIVE, TINY, MlpShape
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.networks import Branches, state_features

SHAPE = (7, 1, 6)


def field_of(variant: str = "full", n_states: int = 5, shape: tuple[int, ...] = SHAPE, seed: int = 0) -> MoeField:
    return MoeField(TINY, n_states, shape, variant, torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_mlp(branches: Branches, index: int, x: torch.Tensor) -> torch.Tensor:
    """Eq. 12-14 for one branch and one pixel."""
    layers = list(zip(branches.weights, branches.biases, strict=True))
    for number, (weight, bias) in enumerate(layers):
        x = weight[index].T @ x + bias[index, 0]
        if number < len(layers) - 1:
            x = x / (1 + torch.exp(-x))
    return x


@pytest.mark.parametrize("variant", ["full", "residual_only", "no_residual"])
def test_synthesis_pixel_by_pixel(variant: str) -> None:
    field = field_of(variant)
    images, features = field.images(), field.encoder().detach()
    assert images.shape == (5, *SHAPE) and images.is_complex()
    alpha, beta = field.routing(), field.residual_coefficients()
    for q in range(5):
        for p in (0, 3, 17, 41):
            value = naive_mlp(field.background, 0, features[p])
            if field.experts is not None:
                value = value + sum(alpha[q, k] * naive_mlp(field.experts, k, features[p]) for k in range(3))
            if field.residual is not None:
                value = value + 0.022 * sum(beta[q, r] * naive_mlp(field.residual, r, features[p]) for r in range(2))
            assert complex(images[q].flatten()[p]) == pytest.approx(complex(*value.tolist()), rel=1e-10)


def test_variants_have_their_parts() -> None:
    full, only, without = (field_of(v) for v in ("full", "residual_only", "no_residual"))
    assert full.experts is not None and full.residual is not None
    assert only.experts is None and only.router is None and only.residual is not None
    assert without.residual is None and without.coefficients is None and without.experts is not None
    assert only.residual.n_branches == full.residual.n_branches and without.experts.n_branches == full.experts.n_branches
    # a configuration without residual branch has none, whatever the variant
    assert MoeField(QUANTITATIVE, 3, (8, 1, 8)).residual is None


def test_routing_stays_on_the_simplex() -> None:
    field = field_of()
    with torch.no_grad():
        for parameter in field.state_parameters():
            parameter.mul_(30.0)
    alpha = field.routing()
    assert alpha.shape == (5, 3) and float(alpha.detach().min()) >= 0
    torch.testing.assert_close(alpha.sum(1), torch.ones(5, dtype=torch.float64))
    # residual coefficients are free: not normalised, both signs allowed
    assert not torch.allclose(field.residual_coefficients().sum(1), torch.ones(5, dtype=torch.float64))


def test_state_features_are_eq_17() -> None:
    features = state_features(5, 2, dtype=torch.float64)
    q = 1 / 4
    a = 2 * math.pi * q
    assert features.shape == (5, 5)
    assert features[1].tolist() == pytest.approx([q, math.sin(a), math.cos(a), math.sin(2 * a), math.cos(2 * a)])
    assert state_features(1, 2).tolist() == [[0.0, 0.0, 1.0, 0.0, 1.0]]


@pytest.mark.parametrize("shape", [(9, 1, 4), (4, 1, 9), (1, 1, 5), (5, 1, 1), (2, 1, 2)])
@pytest.mark.parametrize("n_states", [1, 2])
def test_any_grid_any_number_of_states(shape: tuple[int, ...], n_states: int) -> None:
    field = field_of(n_states=n_states, shape=shape)
    assert field.images().shape == (n_states, *shape)
    assert bool(torch.isfinite(torch.view_as_real(field.images())).all())


def test_images_with_and_without_gradient_and_in_chunks() -> None:
    field = field_of()
    torch.testing.assert_close(field().detach(), field.images())
    torch.testing.assert_close(field.images(chunk=10), field.images())
    torch.testing.assert_close(
        torch.einsum("qn,nxzy->qxzy", field.mixing().to(torch.complex128), field.component_images()), field.images()
    )


def test_support_cuts_pixels_and_nothing_else() -> None:
    support = torch.zeros(SHAPE, dtype=torch.bool)
    support[2:6, :, 1:4] = True
    whole = field_of().images()
    cut = MoeField(TINY, 5, SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64, support=support).images()
    torch.testing.assert_close(cut, whole * support)


def test_precision_of_the_products() -> None:
    shape = MlpShape(width=64, depth=3)
    branches = Branches(4, 16, shape, generator=torch.Generator().manual_seed(0))
    features = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    exact, half = branches(features), branches(features, torch.bfloat16)
    assert half.dtype == torch.float32
    error = float((half - exact).detach().norm() / exact.detach().norm())
    # bfloat16 keeps 8 bits: 0.4 % for each rounding, a few of them
    assert 1e-5 < error < 0.02


def test_same_seed_same_bits() -> None:
    assert torch.equal(field_of(seed=7).images(), field_of(seed=7).images())
    assert not torch.equal(field_of(seed=7).images(), field_of(seed=8).images())


def test_errors_say_what_is_wrong() -> None:
    with pytest.raises(DataError, match="3D slabs are not supported"):
        field_of(shape=(8, 4, 8))
    with pytest.raises(DataError, match="not a series"):
        field_of(n_states=0)
    with pytest.raises(SettingError, match="no such variant"):
        field_of("everything")
    with pytest.raises(SettingError, match="no residual branch"):
        MoeField(replace(TINY, residual=None), 3, SHAPE, "residual_only")
    with pytest.raises(DataError, match="not a support"):
        MoeField(TINY, 3, SHAPE, support=torch.zeros(SHAPE, dtype=torch.bool))
    with pytest.raises(SettingError, match="no router"):
        field_of("residual_only").logits()
