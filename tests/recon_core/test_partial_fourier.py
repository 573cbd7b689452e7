from collections.abc import Sequence

import pytest
import torch

from recon_core.errors import DataError
from recon_core.fourier import fft_centred, ifft_centred
from recon_core.preprocess.measured_part import extents_of
from recon_core.preprocess.partial_fourier import complete, homodyne, is_partial, measured_extent, partial_axes, pocs
from recon_core.sampling.learned import draw_mask, multilevel_density
from recon_core.types import KSpace
from tests.recon_core.coil_phantom import phantom

N = 96
TRUTH = phantom((N, N))[None]
Y, X = -2, -1


def acquire(axis: int, eighths: int, late: bool = False, noise: float = 0.0) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Zero-filled image with ``eighths`` / 8 of k-space along ``axis``, and the extents."""
    g = torch.Generator().manual_seed(0)
    image = TRUTH + noise * torch.randn(TRUTH.shape, dtype=torch.complex64, generator=g)
    missing = N - N * eighths // 8
    extent = (0, N - missing) if late else (missing, N)
    kspace = fft_centred(image, axis)
    inside = torch.zeros(N)
    inside[slice(*extent)] = 1
    kspace = kspace * (inside[:, None] if axis == Y else inside)
    extents = [(0, 1), (0, N), (0, N)]
    extents[axis] = extent
    return ifft_centred(kspace, axis), extents


def error(image: torch.Tensor) -> float:
    return float((image - TRUTH).norm() / TRUTH.norm())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("axis", [Y, X])
@pytest.mark.parametrize(("eighths", "pocs_gain", "homodyne_gain"), [(5, 2.5, 2.0), (6, 2.5, 2.0), (7, 2.0, 1.8)])
def test_beats_zero_filling(axis: int, eighths: int, pocs_gain: float, homodyne_gain: float, late: bool) -> None:
    zero_filled, extents = acquire(axis, eighths, late)
    before = zero_filled.clone()
    assert error(pocs(zero_filled, extents)) < error(zero_filled) / pocs_gain
    assert error(homodyne(zero_filled, extents)) < error(zero_filled) / homodyne_gain
    torch.testing.assert_close(zero_filled, before, rtol=0, atol=0)


def test_pocs_keeps_what_was_measured() -> None:
    zero_filled, extents = acquire(Y, 5, noise=0.02)
    start, stop = extents[1]
    measured = fft_centred(zero_filled, Y)[:, start:stop]
    found = fft_centred(pocs(zero_filled, extents), Y)[:, start:stop]
    torch.testing.assert_close(found, measured, rtol=0, atol=1e-5)


def test_both_axes_at_once() -> None:
    _, (_, y, _) = acquire(Y, 6)
    _, (_, _, x) = acquire(X, 6)
    kspace = fft_centred(TRUTH, (Y, X))
    both = torch.zeros_like(kspace)
    both[:, slice(*y), slice(*x)] = kspace[:, slice(*y), slice(*x)]
    zero_filled = ifft_centred(both, (Y, X))
    extents = [(0, 1), y, x]
    assert error(pocs(zero_filled, extents)) < error(zero_filled) / 1.5
    assert partial_axes(extents, zero_filled.shape) == (Y, X)


def test_a_series_is_completed_image_by_image() -> None:
    zero_filled, extents = acquire(Y, 6)
    series = torch.stack([zero_filled, 2j * zero_filled])
    for method in ("pocs", "homodyne"):
        alone = complete(zero_filled, extents, method)
        for found, factor in zip(complete(series, extents, method), (1, 2j), strict=True):
            # where there is no signal the phase is that of rounding, which differs between processors
            assert float((found - factor * alone).norm() / alone.norm()) < 5e-4


@pytest.mark.parametrize("extents", [[(0, 1), (0, N), (0, N)], [(0, 1), (20, N - 19), (0, N)], [(0, 1), (2, N), (0, N)]])
def test_complete_or_symmetric_data_are_left_alone(extents: list[tuple[int, int]]) -> None:
    assert pocs(TRUTH, extents) is TRUTH
    assert homodyne(TRUTH, extents) is TRUTH
    assert complete(TRUTH, extents, "zero_fill") is TRUTH


def test_measured_extent() -> None:
    mask = torch.zeros(2, 6, 10, dtype=torch.bool)
    mask[0, 1, 3] = mask[1, 4, 7] = True
    assert measured_extent(mask) == ((1, 5), (3, 8))
    assert measured_extent(mask[0]) == ((1, 2), (3, 4))
    with pytest.raises(DataError, match="nothing is sampled"):
        measured_extent(torch.zeros(3, 3, dtype=torch.bool))


def test_is_partial() -> None:
    assert is_partial((36, 96), 96)
    assert is_partial((0, 60), 96)
    assert not is_partial((0, 96), 96)
    assert not is_partial((0, 93), 96)
    assert not is_partial((0, 1), 1)


def test_errors() -> None:
    with pytest.raises(DataError, match="both sides"):
        pocs(TRUTH, [(0, 1), (N // 2 - 2, N), (0, N)])
    with pytest.raises(DataError, match="outside the axis"):
        homodyne(TRUTH, [(0, 1), (0, N + 1), (0, N)])
    with pytest.raises(DataError, match="no such method"):
        complete(TRUTH, [(0, 1), (0, N), (0, N)], "margosian")
    with pytest.raises(DataError, match="at least one"):
        pocs(TRUTH, [(0, 1), (30, N), (0, N)], 0)


def test_states_have_ends_of_their_own_where_a_side_is_missing_and_not_by_chance() -> None:
    def ends(*masks: torch.Tensor) -> list[tuple[int, int]]:
        counts = torch.stack(masks)[:, None].float()
        return [y for _, y, _ in extents_of(KSpace(torch.zeros(len(masks), 1, 1, 96, 4, dtype=torch.complex64), counts))]

    lines = torch.arange(96)
    whole, right, left, every_second = lines >= 0, lines >= 24, lines < 72, lines % 2 == 0
    assert ends(whole, right, left) == [(0, 96), (24, 96), (0, 72)]
    assert ends(right, right) == [(24, 96)] * 2
    assert ends(whole, right & every_second) == [(0, 96), (24, 96)]
    assert ends(whole, lines >= 46) == [(0, 96)] * 2  # too little for a phase: zeros, as if all were like that
    assert ends(whole, lines >= 6) == [(0, 96)] * 2
    chance = (lines - 48).abs() < 10
    chance[[72, 80, 84, 91]] = True  # few are on the other side, too
    assert ends(whole, chance) == [(0, 96)] * 2


def test_one_random_pattern_of_a_slab_is_no_partial_fourier_scan() -> None:
    """Its outermost samples are so few that a side may have none: a smooth phase would take the place of what coils tell."""

    def ends(mask: torch.Tensor) -> list[tuple[int, int]]:
        counts = mask[None].float()
        (found,) = extents_of(KSpace(torch.zeros(1, 1, *mask.shape, 4, dtype=torch.complex64), counts))
        return list(found[:2])

    def partial(mask: torch.Tensor, found: Sequence[tuple[int, int]]) -> bool:
        return any(is_partial(extent, n) for extent, n in zip(found, mask.shape, strict=True))

    density = multilevel_density((32, 64), 256, (8, 8))[None]
    drawn = [torch.from_numpy(draw_mask(density, 256, seed, (8, 8))[0]) for seed in range(30)]
    assert sum(partial(mask, measured_extent(mask)) for mask in drawn) > 10
    assert not any(partial(mask, ends(mask)) for mask in drawn)
    k2, k1 = torch.meshgrid(torch.arange(32), torch.arange(64), indexing="ij")
    thin = (k1 >= 16) & (k2 == 14)  # few lie opposite, but all that there could be
    for regular in (k1 >= 16, (k1 >= 16) & (k1 % 2 == 0) & (k2 % 2 == 0), thin):
        assert ends(regular)[1] == (16, 64)
