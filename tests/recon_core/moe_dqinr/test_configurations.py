"""Layer sizes of section 3.7 against numbers worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recon_core.errors import SettingError
from recon_core.methods.moe_dqinr.configurations import DYNAMIC, QUANTITATIVE, TINY, Configuration, HashGridShape
from recon_core.methods.moe_dqinr.encoding import interpolation, level_entries, level_resolution
from recon_core.methods.moe_dqinr.model import MoeField


def count(module: torch.nn.Module | None) -> int:
    return 0 if module is None else sum(p.numel() for p in module.parameters())


def full_entries(grid: HashGridShape) -> int:
    """Entries of the table with those that no pixel touches."""
    return sum(level_entries(grid, level) for level in range(grid.levels))


def test_dynamic_counts() -> None:
    field = MoeField(DYNAMIC, 12, (204, 1, 204))
    # 18 levels x 2 features = 36 inputs; (inputs + 1 bias) x outputs, layer after layer
    # background, width 160, 6 hidden layers: 37*160 + 5*161*160 + 161*2 = 5,920 + 128,800 + 322
    assert count(field.background) == 135_042
    # expert, width 224, 7 hidden layers: 37*224 + 6*225*224 + 225*2 = 8,288 + 302,400 + 450 = 311,138; seven of them
    assert count(field.experts) == 7 * 311_138 == 2_177_966
    # residual basis, our 64 x 3: 37*64 + 2*65*64 + 65*2 = 2,368 + 8,320 + 130 = 10,818; two of them
    assert count(field.residual) == 2 * 10_818 == 21_636
    # router, our 64 x 2 from 5 state features: 6*64 + 65*64 + 65*7 = 384 + 4,160 + 455
    assert count(field.router) == 4_999
    # residual coefficients, our 64 x 2: 384 + 4,160 + 65*2
    assert count(field.coefficients) == 4_674
    # 1,717,504 touched entries of 2 features; 8,629,016 in the full table
    assert count(field.encoder) == 3_435_008
    assert 2 * full_entries(DYNAMIC.grid) == 17_258_032
    assert count(field) == 3_435_008 + 135_042 + 2_177_966 + 21_636 + 4_999 + 4_674


def test_quantitative_counts() -> None:
    field = MoeField(QUANTITATIVE, 9, (144, 1, 144))
    # 16 x 2 = 32 inputs; background 128 x 5: 33*128 + 4*129*128 + 129*2 = 4,224 + 66,048 + 258
    assert count(field.background) == 70_530
    # expert 160 x 6: 33*160 + 5*161*160 + 161*2 = 5,280 + 128,800 + 322 = 134,402; ten of them
    assert count(field.experts) == 1_344_020
    assert field.residual is None and field.coefficients is None
    # router: 384 + 4,160 + 65*10
    assert count(field.router) == 5_194
    assert count(field.encoder) == 2 * 763_964
    assert full_entries(QUANTITATIVE.grid) == 3_829_192


@pytest.mark.parametrize("configuration", [DYNAMIC, QUANTITATIVE, TINY], ids=lambda c: c.name)
def test_every_parameter_is_trained_once(configuration: Configuration) -> None:
    field = MoeField(configuration, 5, (20, 1, 16))
    trained = [*field.image_parameters(), *field.state_parameters()]
    assert len({id(p) for p in trained}) == len(trained) == len(list(field.parameters()))


def test_published_sizes() -> None:
    assert (DYNAMIC.grid.levels, DYNAMIC.grid.log2_size, DYNAMIC.grid.base, DYNAMIC.grid.growth) == (18, 20, 20, 1.45)
    assert (QUANTITATIVE.grid.levels, QUANTITATIVE.grid.log2_size) == (16, 19)
    assert (QUANTITATIVE.grid.base, QUANTITATIVE.grid.growth) == (16, 1.5)
    assert (DYNAMIC.n_experts, QUANTITATIVE.n_experts) == (7, 10)
    assert (DYNAMIC.weight_decay, QUANTITATIVE.weight_decay) == (1.2e-4, 1e-4)
    assert DYNAMIC.residual is not None and (DYNAMIC.residual.rank, DYNAMIC.residual.gamma) == (2, 0.022)


@pytest.mark.parametrize(("configuration", "n", "millions"), [(DYNAMIC, 204, 1.718), (QUANTITATIVE, 144, 0.764)])
def test_a_fifth_of_the_table_is_touched(configuration: Configuration, n: int, millions: float) -> None:
    touched = interpolation(configuration.grid, n, n, torch.device("cpu")).n_entries
    full = full_entries(configuration.grid)
    assert touched / 1e6 == pytest.approx(millions, abs=5e-4)
    assert 100 * touched / full == pytest.approx(19.9, abs=0.06)


def test_levels() -> None:
    # level 0: scale 19, 20 grid lines, 400 entries; level 1: 20 * 1.45 - 1 = 28, 29 lines, 841 rounded up to 848
    assert level_resolution(DYNAMIC.grid, 0) == 20 and level_entries(DYNAMIC.grid, 0) == 400
    assert level_resolution(DYNAMIC.grid, 1) == 29 and level_entries(DYNAMIC.grid, 1) == 848
    assert level_entries(DYNAMIC.grid, 17) == 2**20


def test_sizes_are_checked() -> None:
    with pytest.raises(SettingError, match="positive"):
        replace(TINY, n_experts=0)
