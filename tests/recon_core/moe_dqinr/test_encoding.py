"""The precomputed interpolation against hash-grid look-ups written as loops."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from recon_core.methods.moe_dqinr.configurations import HashGridShape
from recon_core.methods.moe_dqinr.encoding import HashGrid, SparseProduct, interpolation

# two dense levels, the others hashed into 64 entries with many collisions
GRID = HashGridShape(levels=5, log2_size=6, base=3, growth=1.7, features=2, init_scale=1e-4)
CPU = torch.device("cpu")


def naive_features(grid: HashGridShape, tables: list[list[list[float]]], x: float, y: float) -> list[float]:
    """One coordinate of the unit square, as instant-ngp describes it."""
    out: list[float] = []
    for level, table in enumerate(tables):
        scale = grid.base * grid.growth**level - 1
        resolution = math.ceil(scale) + 1
        px, py = x * scale + 0.5, y * scale + 0.5
        ix, iy = math.floor(px), math.floor(py)
        features = [0.0] * grid.features
        for dx, dy in ((0, 0), (1, 0), (0, 1), (1, 1)):
            cx, cy = ix + dx, iy + dy
            index = cx + cy * resolution if resolution**2 <= 2**grid.log2_size else cx ^ (cy * 2654435761)
            weight = (px - ix if dx else 1 - (px - ix)) * (py - iy if dy else 1 - (py - iy))
            for f in range(grid.features):
                features[f] += weight * table[index % len(table)][f]
        out += features
    return out


@pytest.mark.parametrize(("height", "width"), [(7, 6), (6, 7), (1, 5), (5, 1)])
def test_equals_naive_look_up(height: int, width: int) -> None:
    encoder = HashGrid(GRID, height, width, torch.Generator().manual_seed(1), dtype=torch.float64)
    plan = interpolation(GRID, height, width, CPU)
    # the full tables, with NaN where nothing may look
    tables, first = [], 0
    for level in range(GRID.levels):
        resolution = math.ceil(GRID.base * GRID.growth**level - 1) + 1
        size = min(8 * math.ceil(resolution**2 / 8), 2**GRID.log2_size)
        table = torch.full((size, 2), math.nan, dtype=torch.float64)
        here = slice(first, first + plan.touched[level])
        table[plan.entries[here]] = encoder.table.detach()[here]
        tables.append(table.tolist())
        first += plan.touched[level]
    features = encoder().detach().reshape(width, height, -1)
    for j in range(width):
        for k in range(height):
            i = (k + height // 2) % height  # working rows start at the image's centre
            expected = naive_features(GRID, tables, j / max(1, width - 1), i / max(1, height - 1))
            assert features[j, k].tolist() == pytest.approx(expected, rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("subset", [False, True])
def test_transpose_is_the_adjoint(gather: bool, subset: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    plan = interpolation(GRID, 9, 8, CPU)
    pixels = torch.arange(3, 72, 4) if subset else None
    product = SparseProduct(plan, 2, torch.float64, pixels, gather)
    table = torch.randn(plan.n_entries, 2, dtype=torch.float64, generator=generator)
    features = torch.randn(product.n_pixels, 10, dtype=torch.float64, generator=generator)
    left = (product.forward(table) * features).sum()
    right = (table * product.transpose(features)).sum()
    assert float(left) == pytest.approx(float(right), rel=1e-12)


def test_both_forms_agree() -> None:
    plan = interpolation(GRID, 9, 8, CPU)
    csr, gathered = (SparseProduct(plan, 2, torch.float64, None, g) for g in (False, True))
    table = torch.randn(plan.n_entries, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(csr.forward(table), gathered.forward(table))
    torch.testing.assert_close(csr.transpose(csr.forward(table)), gathered.transpose(csr.forward(table)))


def test_gradient_of_the_module() -> None:
    encoder = HashGrid(GRID, 4, 5, torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = torch.randn(20, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    def value(table: torch.Tensor) -> torch.Tensor:
        return (torch.func.functional_call(encoder, {"table": table}, ()).sin() * weights).sum()

    assert torch.autograd.gradcheck(value, (encoder.table.detach().clone().requires_grad_(),))


def test_weights_of_a_pixel_sum_to_one() -> None:
    plan = interpolation(GRID, 9, 8, CPU)
    torch.testing.assert_close(plan.weights.sum(-1), torch.ones(72, GRID.levels, dtype=torch.float64))
    assert float(plan.weights.min()) >= 0


def test_start_is_uniform_and_the_same_for_a_seed() -> None:
    first, again = (HashGrid(GRID, 30, 30, torch.Generator().manual_seed(6)).table.detach() for _ in range(2))
    assert torch.equal(first, again)
    assert float(first.abs().max()) <= 1e-4
    assert float(first.std()) == pytest.approx(1e-4 / math.sqrt(3), rel=0.1)
    larger = HashGrid(replace(GRID, init_scale=0.1), 30, 30, torch.Generator().manual_seed(6)).table.detach()
    torch.testing.assert_close(larger, first * 1000)


def test_fine_levels_have_private_vertices() -> None:
    # more than two grid lines for a pixel spacing: no two pixels share a corner
    # (but at the border, where instant-ngp's last corner wraps into the next row)
    grid = HashGridShape(levels=1, log2_size=20, base=64, growth=2.0)
    plan = interpolation(grid, 20, 20, CPU)
    columns = plan.columns.reshape(20, 20, 4)
    row = (torch.arange(20) + 10) % 20
    inner = columns[:-1][:, row < 19].flatten()
    assert len(inner.unique()) == len(inner) == 4 * 19 * 19
    assert plan.n_entries > len(inner)
