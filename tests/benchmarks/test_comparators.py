"""The neural comparators fit the data they are given, and what they share is right."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.cell import Cell
from benchmarks.comparators import COMPARATORS
from benchmarks.comparators.fitting import render_all, split, state_positions, temporal_order
from benchmarks.comparators.st_inr import interpolation, nuclear_norm
from benchmarks.dynamic_cells import make_cell
from recon_core.problem import pose
from recon_core.types import Report, ScanInfo

TINY: dict[str, dict[str, Any]] = {
    "fmlp": {"iterations": 150, "column_groups": 2, "width": 48, "depth": 2, "spatial_features": 48, "spatial_scale": 5.0},
    "st_inr": {"iterations": 60, "column_groups": 2, "levels": 6, "log2_entries": 14, "learning_rate": 0.02},
    "tddip": {"iterations": 150, "channels": 12, "scales": 3},
}


@pytest.fixture(scope="module")
def cell() -> Cell:
    return make_cell("cine", 40, 2, 0.005, matrix=(32, 40), n_coils=4, frames=6, acs=8)


@pytest.mark.parametrize("name", COMPARATORS)
def test_comparators_reduce_the_residual_and_come_near_the_truth(name: str, cell: Cell) -> None:
    method = COMPARATORS[name]
    kspace, scan = cell.problem()
    result = method.reconstruct(kspace, scan, method.Settings(**TINY[name]), Report())
    images = result.images[0].data.numpy()
    assert images.shape == cell.images.shape and images.dtype == np.complex64
    history = result.extras["residual_history"]
    assert len(history) == TINY[name]["iterations"] == result.quality["iterations"]
    assert np.mean(history[-5:]) < 0.5 * history[0]
    # better than no image at all, in the data's unit
    assert np.linalg.norm(images - cell.images) < 0.6 * np.linalg.norm(cell.images)


@pytest.mark.parametrize("name", COMPARATORS)
def test_comparators_are_reproducible_and_follow_the_data_s_scale(name: str, cell: Cell) -> None:
    method = COMPARATORS[name]
    kspace, scan = cell.problem()
    settings = method.Settings(**{**TINY[name], "iterations": 4})
    first, second = (method.reconstruct(kspace, scan, settings, Report()).images[0].data for _ in range(2))
    assert torch.equal(first, second)
    louder = method.reconstruct(
        type(kspace)(**{**vars(kspace), "data": 1000 * kspace.data, "acs": None, "noise_std": None}),
        scan,
        settings,
        Report(),
    )
    assert torch.allclose(louder.images[0].data, 1000 * first, rtol=1e-3, atol=1.0)


def test_parts_sum_to_the_whole_gradient(cell: Cell) -> None:
    kspace, _ = cell.problem()
    problem = pose(kspace, "test", Report())
    x = problem.operator.enter_image(torch.randn(cell.images.shape, dtype=torch.complex64))
    whole = problem.operator.normal(x) - problem.rhs
    for groups in ({"column_groups": 3}, {"state_groups": 4}, {"column_groups": 2, "state_groups": 2}):
        found = torch.full_like(whole, torch.nan)
        for part in split(problem, kspace, **groups):
            some = x[part.states][:, part.columns].contiguous()
            found[part.states[:, None], part.columns[None]] = part.residual(some)
        assert torch.allclose(found, whole, atol=1e-5)


def test_parts_are_put_back_where_they_came_from(cell: Cell) -> None:
    kspace, _ = cell.problem()
    parts = split(pose(kspace, "test", Report()), kspace, column_groups=3, state_groups=2)
    images = torch.tensor(cell.images)
    back = render_all(parts, lambda part: images[part.states][..., part.columns], len(images), tuple(images.shape[1:]))
    assert torch.equal(back, images)


def test_contrasts_are_ordered_by_inversion_time_and_frames_go_round() -> None:
    matrix = (1, 8, 8)
    fov = (0.01, 0.3, 0.3)
    positions, periodic = state_positions(ScanInfo(matrix, fov, matrix, fov, inversion_times=(0.1, 1.1, 0.2)), 3)
    assert positions.tolist() == [0, 1, 0.5] and not periodic
    order = temporal_order(ScanInfo(matrix, fov, matrix, fov, inversion_times=(0.1, 1.1, 0.2)), 3)
    assert order.tolist() == [0, 2, 1]
    positions, periodic = state_positions(ScanInfo(matrix, fov, matrix, fov), 4)
    assert positions.tolist() == [0, 0.25, 0.5, 0.75] and periodic


@pytest.mark.parametrize("n_entries", [1 << 12, 1 << 6])
def test_hash_interpolation_is_trilinear(n_entries: int) -> None:
    points = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    entries, weights = interpolation(points, (6, 6, 3), n_entries)
    assert entries.min() >= 0 and entries.max() < n_entries
    assert torch.allclose(weights.sum(1), torch.ones(50, dtype=torch.float64))
    if n_entries > 7 * 7 * 4:  # numbered row by row: a linear function is reproduced
        y, x, t = entries // 28, entries // 4 % 7, entries % 4
        value = (weights * (2.0 * y / 6 - 0.5 * x / 6 + 3.0 * t / 3)).sum(1)
        assert torch.allclose(value, points @ torch.tensor([2.0, -0.5, 3.0], dtype=torch.float64))


def test_hash_corners_are_shared_by_neighbouring_cells() -> None:
    # continuity: values on both sides of a cell's face agree, hashed or not
    face = torch.tensor([[0.5, 0.37, 0.2]], dtype=torch.float64)
    for n_entries in (1 << 12, 1 << 6):
        table = torch.randn(n_entries, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        values = []
        for step in (-1e-9, 1e-9):
            entries, weights = interpolation(face + torch.tensor([step, 0, 0]), (6, 6, 3), n_entries)
            values.append(float((table[entries] * weights).sum()))
        assert all(abs(a - b) < 1e-6 for a, b in pairwise(values))


def test_nuclear_norm_is_the_sum_of_singular_values() -> None:
    images = torch.randn(5, 1, 12, 14, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    expected = torch.linalg.svdvals(images.flatten(1)).sum() / (images.numel() ** 0.5 * 5**0.5)
    assert float(nuclear_norm(images)) == pytest.approx(float(expected), rel=1e-3)
