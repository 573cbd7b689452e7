"""Fan-beam order: the paper's figures, coverage, bounded jumps."""

import numpy as np
import pytest

from recon_core.errors import DataError, SettingError
from recon_core.sampling.learned import draw_mask, multilevel_density, samples_for
from recon_core.sampling.ordering import check_order, fan_beam_order, jumps


def _masks(shape: tuple[int, int], echoes: int, n: int, acs: tuple[int, int]) -> np.ndarray:
    return draw_mask(np.repeat(multilevel_density(shape, n, acs)[None], echoes, 0), n, 1, acs)


def test_the_papers_scan() -> None:
    n = samples_for((80, 206), 8, 11)
    mask = _masks((80, 206), 10, n, (20, 20))
    order = fan_beam_order(mask, 11)
    assert (order.n_segments, order.per_segment, len(order.positions)) == (11, 188, 2068)
    check_order(order.positions, mask)
    # rank by rank the echoes stay closer than samples in the order of the grid's rows or in any order
    shuffled = np.stack([np.random.default_rng(e).permutation(np.argwhere(m)) for e, m in enumerate(mask)], 1)
    assert np.median(jumps(order.positions)) < 0.2 * np.median(jumps(shuffled))
    assert order.largest_jump == pytest.approx(jumps(order.positions).max()) and not order.matched


def test_segments_are_fans_and_ranks_go_outwards() -> None:
    mask = _masks((24, 32), 3, 180, (4, 4))
    order = fan_beam_order(mask, 6)
    check_order(order.positions, mask)
    away = order.positions - np.array([12, 16])
    angle = np.arctan2(away[..., 0], away[..., 1]) % (2 * np.pi)
    distance = np.hypot(away[..., 0], away[..., 1])
    for echo in range(3):
        fans = angle[:, echo].reshape(6, 30)
        assert (fans.max(1)[:-1] <= fans.min(1)[1:] + 1e-12).all()
        assert (np.diff(distance[:, echo].reshape(6, 30), axis=1) >= 0).all()


def test_equal_echoes_never_jump() -> None:
    order = fan_beam_order(np.repeat(_masks((16, 16), 1, 64, (2, 2)), 4, 0), 4, max_jump=0.0)
    assert order.largest_jump == 0 and order.largest_step == (0, 0) and not order.matched
    assert fan_beam_order(_masks((16, 16), 1, 64, (2, 2)), 4).largest_jump == 0


def test_jumps_are_bounded_when_asked() -> None:
    mask = _masks((24, 32), 4, 180, (4, 4))
    paper = fan_beam_order(mask, 3)
    with pytest.raises(SettingError, match="at least") as refused:
        fan_beam_order(mask, 3, max_jump=0.5)
    best = float(str(refused.value.expected).split()[2])
    assert best < paper.largest_jump
    order = fan_beam_order(mask, 3, max_jump=best)
    assert order.matched and order.largest_jump <= best
    check_order(order.positions, mask)
    # the first echo is still the paper's, and nothing changes where the paper's order keeps the bound
    np.testing.assert_array_equal(order.positions[:, 0], paper.positions[:, 0])
    same = fan_beam_order(mask, 3, max_jump=paper.largest_jump)
    assert not same.matched and (same.positions == paper.positions).all()


def test_matching_has_the_smallest_largest_jump() -> None:
    """By trying all orders of a small segment."""
    from itertools import permutations

    rng = np.random.default_rng(5)
    mask = np.zeros((2, 9, 9), bool)
    for echo in mask:
        echo.reshape(-1)[rng.choice(81, 6, replace=False)] = True
    first, second = (np.argwhere(m) for m in mask)
    best = min(np.hypot(*(first - second[list(p)]).T).max() for p in permutations(range(6)))
    assert fan_beam_order(mask, 1, max_jump=best).largest_jump == pytest.approx(best)


def test_physical_steps_measure_the_jump() -> None:
    mask = _masks((16, 16), 2, 64, (2, 2))
    grid = fan_beam_order(mask, 1)
    assert fan_beam_order(mask, 1, step=(5.0, 5.0)).largest_jump == pytest.approx(5 * grid.largest_jump)


def test_refusals() -> None:
    mask = _masks((16, 16), 2, 64, (2, 2))
    with pytest.raises(
        SettingError, match="64 samples in 11 segments; expected a number that divides the samples, such as 8 or 16"
    ):
        fan_beam_order(mask, 11)
    uneven = mask.copy()
    uneven[0][tuple(np.argwhere(uneven[0])[0])] = False
    with pytest.raises(DataError, match="63 to 64"):
        fan_beam_order(uneven, 1)
    with pytest.raises(DataError):
        fan_beam_order(np.zeros((2, 4, 4), bool), 1)
    order = fan_beam_order(mask, 4).positions
    for broken in (order[:-1], np.concatenate([order[:1], order[:-1]]), order + 100, order[:, :1]):
        with pytest.raises(DataError):
            check_order(broken, mask)
