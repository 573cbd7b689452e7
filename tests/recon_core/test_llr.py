"""Locally low rank: the shrinkage against the SVD, the blocks against loops, images against the truth."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch

from recon_core.batches import batch_share
from recon_core.errors import DataError
from recon_core.methods import cg_sense, grasp_pro, llr
from recon_core.problem import outer_noise, pose, upper_quartile
from recon_core.solvers.low_rank import LocallyLowRank, shrink_singular_values
from recon_core.types import ImageSeries, Report
from tests.recon_core.live_memory import peak_bytes
from tests.recon_core.small_series import small_series


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(4, 20, 5), (4, 5, 20)], ids=["tall", "wide"])
@pytest.mark.parametrize("power", [1.0, 0.6])
def test_shrinkage_equals_the_svd(shape: tuple[int, ...], power: float) -> None:
    blocks = random(*shape)
    u, s, vh = torch.linalg.svd(blocks, full_matrices=False)
    factor = (1 - (4.0 / s) ** (2 - power)).clamp_min(0)
    torch.testing.assert_close(shrink_singular_values(blocks, 4.0, power), (u * (s * factor)[:, None]) @ vh)
    assert 0 < int((factor > 0).sum()) < factor.numel()


def test_soft_shrinkage_is_the_proximal_map_of_the_nuclear_norm() -> None:
    """No nearby matrix has a smaller ``|Z - B|^2 / 2 + t |Z|_*``."""
    block, t = random(8, 4), 1.5
    best = shrink_singular_values(block[None], t)[0]

    def cost(z: torch.Tensor) -> float:
        return float((z - block).abs().square().sum() / 2 + t * torch.linalg.svdvals(z).sum())

    assert all(cost(best) < cost(best + 0.01 * random(8, 4, seed=seed)) for seed in range(20))


def test_zero_blocks_stay_zero_in_float32() -> None:
    zero = torch.zeros(3, 36, 9, dtype=torch.complex64)
    for power in (1.0, 0.6, 0.0):
        assert float(shrink_singular_values(zero, 0.1, power).abs().max()) == 0
        assert float(shrink_singular_values(zero, 0.0, power).abs().max()) == 0


@pytest.mark.parametrize("spatial", [(9, 1, 11), (7, 5, 6)], ids=["2D", "3D"])
def test_blocks_tile_the_image(spatial: tuple[int, int, int]) -> None:
    images, shift, side = random(3, *spatial), (2, 0, 1), 4
    found = LocallyLowRank((side, side, side)).shrink(images, shift, 2.0, 1.0)
    moved = torch.roll(images, shift, (1, 2, 3))
    expected = torch.zeros_like(moved)
    for a in range(0, spatial[0], side):
        for b in range(0, spatial[1], side):
            for c in range(0, spatial[2], side):
                part = (slice(None), slice(a, a + side), slice(b, b + side), slice(c, c + side))
                matrix = moved[part].reshape(3, -1).T
                expected[part] = shrink_singular_values(matrix[None], 2.0, 1.0)[0].T.reshape(moved[part].shape)
    torch.testing.assert_close(found, torch.roll(expected, tuple(-s for s in shift), (1, 2, 3)))


@pytest.mark.parametrize("spatial", [(9, 1, 11), (13, 5, 6), (3, 6, 6)], ids=["2D", "3D", "thin"])
@pytest.mark.parametrize("first", [0, 2, -1])
def test_a_few_layers_at_a_time_give_the_same(spatial: tuple[int, int, int], first: int) -> None:
    images, shift, regulariser = random(3, *spatial), (first, 0, 1), LocallyLowRank((4, 4, 4))
    whole = regulariser.shrink(images, shift, 2.0, 0.7)
    with batch_share(1e-9):
        torch.testing.assert_close(regulariser.shrink(images, shift, 2.0, 0.7), whole)
        assert not torch.equal(images, whole)
        into = images.clone()
        assert regulariser.shrink(into, shift, 2.0, 0.7, out=into) is into
        torch.testing.assert_close(into, whole)
        regulariser.shrink(images, shift, 2.0, 0.7, out=into, add=True)
        torch.testing.assert_close(into, 2 * whole)


def test_memory_grows_with_the_slab_by_no_more_than_five_images() -> None:
    """Start, x, y, z and the mean over grids; all else is done for a part of the readout positions at a time."""
    peaks, sizes = [], []
    with batch_share(1 / 64):
        for n_x in (32, 96):
            series = small_series((8, 16, n_x), n_states=6, keep=0.4, noise=0.01)
            problem = pose(series.kspace, "here", Report())
            peaks.append(peak_bytes(partial(llr.estimate, problem, llr.Settings(iterations=5), Report())))
            sizes.append(problem.rhs.numel() * problem.rhs.element_size())
    assert peaks[1] - peaks[0] < 6 * (sizes[1] - sizes[0])
    assert peaks[0] > 3 * sizes[0]  # it does see them


def test_noise_threshold_is_the_edge_of_pure_noise() -> None:
    regulariser = LocallyLowRank((6, 6, 6))
    noise = random(400, 36, 9) / 2**0.5 * 2**0.5
    edge = regulariser.noise_threshold((60, 1, 60), 9)
    largest = torch.linalg.svdvals(noise)[:, 0]
    assert edge == 9.0
    assert 0.9 * edge < float(largest.mean()) < edge < float(largest.max()) < 1.25 * edge
    with pytest.raises(DataError):
        LocallyLowRank((0, 1, 1))


@pytest.mark.parametrize("shape", [(1, 48, 40), (8, 20, 16)], ids=["2D", "3D"])
def test_far_better_than_sense(shape: tuple[int, int, int]) -> None:
    series = small_series(shape, n_states=8, keep=0.2, noise=0.01)
    ours = llr.reconstruct(series.kspace, series.scan, llr.Settings(), Report())
    sense = cg_sense.reconstruct(series.kspace, series.scan, cg_sense.Settings(), Report())
    assert series.error(ours.images[0].data) < 0.5 * series.error(sense.images[0].data)
    assert series.error(ours.images[0].data) < 0.06
    assert not ours.notes


@pytest.mark.parametrize("noise", [0.002, 0.01, 0.04])
def test_default_weight_follows_the_noise(noise: float) -> None:
    """No other weight is much better at any noise level, and far ones are worse.

    This phantom is of exactly low rank and likes more weight than measured series do (``benchmarks/llr_weight.py``).
    """
    series = small_series((1, 48, 40), n_states=8, keep=0.25, noise=noise)

    def error(weight: float) -> float:
        result = llr.reconstruct(series.kspace, series.scan, llr.Settings(weight=weight), Report())
        return series.error(result.images[0].data)

    default = error(1.0)
    assert default < 1.6 * min(error(0.33), error(3.0))
    assert default < error(0.03) and default < error(20.0)


def test_unknown_noise_costs_little() -> None:
    series = small_series((1, 48, 40), n_states=8, keep=0.25, noise=0.01)
    known = llr.reconstruct(series.kspace, series.scan, llr.Settings(), Report())
    unknown = llr.reconstruct(replace(series.kspace, noise_std=None), series.scan, llr.Settings(), Report())
    assert series.error(unknown.images[0].data) < 1.25 * series.error(known.images[0].data)


@pytest.mark.parametrize("noise", [0.01, 0.05])
def test_noise_is_found_in_the_outer_kspace(noise: float) -> None:
    series = small_series((1, 64, 64), noise=noise, keep=0.4)
    assert 0.9 * noise < outer_noise(series.kspace) < 1.6 * noise
    # averages are less noisy: the estimate is for one readout
    averaged = replace(series.kspace, data=series.kspace.data / 2, counts=series.kspace.counts * 4)
    assert outer_noise(averaged) == pytest.approx(outer_noise(series.kspace), rel=1e-5)
    # channels without a receiver have none
    silent = replace(series.kspace, data=torch.cat([series.kspace.data, torch.zeros_like(series.kspace.data)], 1))
    assert outer_noise(silent) == pytest.approx(outer_noise(series.kspace), rel=1e-5)


def test_outer_positions_that_all_states_share_by_chance_are_no_scale() -> None:
    series = small_series((1, 64, 64), n_states=2, n_coils=1, keep=1.0)
    mask = series.kspace.mask.clone()
    mask[0, :, 20:44:2] = mask[1, :, 21:44:2] = False
    data = series.kspace.data * mask[:, None, :, :, None]
    kspace = replace(series.kspace, data=data, counts=mask.float(), acs=None, acs_mask=None)
    assert pose(kspace, "here", Report()).scale > 0.5 * float(abs(series.images).max())


def test_more_positions_than_torch_takes_quantiles_of() -> None:
    values = torch.arange(1 << 24 | 1).float()
    assert float(upper_quartile(values)) == 3 << 22


def test_strong_averaging_lowers_the_weight() -> None:
    """Four averages of everything is the same experiment with half the noise."""
    series = small_series()
    averaged = replace(series.kspace, counts=series.kspace.counts * 4, noise_std=0.02)
    a = llr.reconstruct(series.kspace, series.scan, llr.Settings(), Report()).images[0].data
    b = llr.reconstruct(averaged, series.scan, llr.Settings(), Report()).images[0].data
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_single_state_says_that_it_used_sense() -> None:
    series = small_series(n_states=1, keep=0.6)
    ours = llr.reconstruct(series.kspace, series.scan, llr.Settings(), Report())
    sense = cg_sense.reconstruct(series.kspace, series.scan, cg_sense.Settings(), Report())
    assert torch.equal(ours.images[0].data, sense.images[0].data)
    assert "one state" in ours.notes[0]


def test_more_states_than_pixels_in_a_block() -> None:
    series = small_series((1, 24, 20), n_states=12, keep=0.4)
    result = llr.reconstruct(series.kspace, series.scan, llr.Settings(block=3), Report())
    assert series.error(result.images[0].data) < 0.1


def test_unfinished_work_is_told() -> None:
    class Listener(Report):
        warnings: tuple[str, ...] = ()
        previews: tuple[ImageSeries, ...] = ()

        def warn(self, message: str) -> None:
            self.warnings += (message,)

    series, listener = small_series(keep=0.1, n_acs=4, noise=0.001), Listener()
    result = llr.reconstruct(series.kspace, series.scan, llr.Settings(iterations=1), listener)
    assert listener.warnings == result.notes and "still changing" in result.notes[0]


def test_power_rises_with_the_noise() -> None:
    powers = [llr.shrinkage_power(noise) for noise in (0.0, 0.001, 0.01, 0.02, 0.04, 1.0)]
    np.testing.assert_allclose(powers, [0.6, 0.6, 0.6, 0.75, 0.9, 0.9])


@pytest.mark.parametrize("method", [llr, grasp_pro])
def test_a_threshold_that_leaves_nothing_is_told(method: ModuleType) -> None:
    series = small_series()
    result = method.reconstruct(series.kspace, series.scan, method.Settings(weight=1000.0, iterations=3), Report())
    assert not bool(result.images[0].data.any()) and "images are black" in result.notes[0]
