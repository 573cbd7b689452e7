"""Routing weights from a temporal subspace, and fields that start from a given series."""

from __future__ import annotations

import pytest
import torch

from recon_core.errors import DataError
from recon_core.methods.moe_dqinr.configurations import SMALL_QUANTITATIVE, TINY
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.warm_start import PREFIT, component_targets, prefit, set_routing, simplex_weights
from tests.recon_core.moe_dqinr.tiny_problem import MIDDLE, low_rank_series


@pytest.mark.parametrize(
    ("n_states", "rank", "n_experts"), [(12, 4, 7), (12, 3, 4), (9, 5, 10), (5, 2, 7), (2, 2, 3), (1, 1, 3)]
)
def test_weights_are_on_the_simplex_and_span_the_series(n_states: int, rank: int, n_experts: int) -> None:
    series = low_rank_series(n_states, 12, 14, rank)
    weights = simplex_weights(series, n_experts)
    assert weights.shape == (n_states, n_experts)
    assert float(weights.min()) >= 0.02 * 0.99
    torch.testing.assert_close(weights.sum(1), torch.ones(n_states, dtype=torch.float64))
    # what the weights cannot explain: nothing, for a series of rank below K
    mixing = torch.cat([torch.ones(n_states, 1, dtype=torch.float64), weights], 1).to(torch.complex128)
    flat = series.flatten(1)
    rest = flat - mixing @ torch.linalg.pinv(mixing, rtol=1e-9) @ flat
    assert float(rest.norm() / flat.norm()) < 1e-8


def test_best_subspace_of_a_series_of_higher_rank() -> None:
    series = low_rank_series(12, 12, 14, 12)
    mean = series.mean(0, keepdim=True)
    flat = (series - mean).flatten(1)
    squares = torch.linalg.eigvalsh(torch.view_as_real(flat).flatten(1) @ torch.view_as_real(flat).flatten(1).mT)
    optimal = squares[: 12 - 4].sum()  # K = 5: mean and four components
    weights = simplex_weights(series, 5).to(torch.complex128)
    whole = series.flatten(1)
    rest = whole - weights @ torch.linalg.pinv(weights) @ whole
    # the affine subspace is the best one; a linear combination can only be better
    assert float(rest.norm() ** 2) <= float(optimal) * (1 + 1e-9)


def test_router_takes_the_weights() -> None:
    series = low_rank_series(9, 12, 14, 4)
    field = MoeField(SMALL_QUANTITATIVE, 9, (12, 1, 14), generator=torch.Generator().manual_seed(0))
    weights = simplex_weights(series, 7)
    set_routing(field, weights)
    torch.testing.assert_close(field.routing().detach().double(), weights, rtol=1e-3, atol=1e-4)


def test_targets_explain_the_series() -> None:
    series = low_rank_series(6, 12, 14, 2)
    field = MoeField(TINY, 6, (12, 1, 14), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    set_routing(field, simplex_weights(series, 3))
    targets = component_targets(field, series)
    mixed = torch.einsum("qn,nxzy->qxzy", field.mixing().detach().to(torch.complex128), targets)
    # 3 experts and a router of 8 hidden units for 6 states: mean and two components, to the router's precision
    assert float((mixed - series).norm() / series.norm()) < 1e-3


def test_prefit_reproduces_a_rank_k_series() -> None:
    series = low_rank_series(8, 16, 18, 3)
    generator = torch.Generator().manual_seed(0)
    field = MoeField(MIDDLE, 8, (16, 1, 18), generator=generator, dtype=torch.float64)
    result = prefit(field, series, PREFIT)
    assert float((result.images - series).norm() / series.norm()) < 0.05
    torch.testing.assert_close(result.images, field.images())
    # and not by one expert: all three components are there
    values, true = torch.linalg.svdvals(result.images.flatten(1)), torch.linalg.svdvals(series.flatten(1))
    assert values[:3].tolist() == pytest.approx(true[:3].tolist(), rel=0.05)


def test_prefit_checks_the_series() -> None:
    field = MoeField(TINY, 3, (6, 1, 7))
    with pytest.raises(DataError, match="does not fit"):
        prefit(field, torch.zeros(3, 7, 1, 6, dtype=torch.complex64))
    with pytest.raises(DataError, match="cannot be that large"):
        simplex_weights(torch.zeros(3, 4, dtype=torch.complex64), 3, least_weight=0.5)
    with pytest.raises(DataError, match="no router"):
        set_routing(MoeField(TINY, 3, (6, 1, 7), "residual_only"), torch.ones(3, 3) / 3)
