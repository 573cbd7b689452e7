"""Sampling masks: exact counts, seeds, and requests that cannot be fulfilled."""

import numpy as np
import pytest

from recon_core.errors import SettingError
from recon_core.sampling import masks

DRAWN_1D = {
    "random": masks.random_variable_density,
    "golden": masks.golden_angle,
    "vista": masks.vista,
}


@pytest.mark.parametrize("name", DRAWN_1D)
@pytest.mark.parametrize(("n", "acceleration", "acs"), [(192, 8, 8), (144, 4, 16), (97, 3.5, 0), (64, 1, 12)])
def test_count_is_exact_in_every_state(name: str, n: int, acceleration: float, acs: int) -> None:
    mask = DRAWN_1D[name](n, 7, acceleration, acs, np.random.default_rng(3))
    assert mask.shape == (7, n) and mask.dtype == bool
    assert (mask.sum(axis=1) == round(n / acceleration)).all()
    assert mask[:, masks.centre_block((n,), (acs,))].all()


@pytest.mark.parametrize("name", DRAWN_1D)
def test_calibration_may_come_on_top_and_nothing_is_drawn_outside(name: str) -> None:
    available = masks.partial_fourier_lines(128, 0.75)
    mask = DRAWN_1D[name](128, 5, 4, 12, np.random.default_rng(0), available=available, acs_counted=False)
    assert (mask.sum(axis=1) == 24 + 12).all()
    assert not mask[:, ~available].any()


@pytest.mark.parametrize("name", DRAWN_1D)
def test_seeds_and_states(name: str) -> None:
    first, again, other = (DRAWN_1D[name](160, 6, 6, 10, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len(np.unique(first, axis=0)) == 6


def test_pinqi_recipe_is_denser_in_the_middle() -> None:
    mask = masks.random_variable_density(192, 400, 8, 8, np.random.default_rng(0))
    frequency = mask.mean(axis=0)
    density = masks.pinqi_density((192,), 8)
    assert (mask.sum(axis=1) == 24).all()
    # without replacement the frequencies saturate, but their order follows the density
    assert frequency[80:92].mean() > 3 * frequency[20:60].mean() > 0
    assert np.corrcoef(frequency[:92], density[:92])[0, 1] > 0.95


def test_vista_keeps_clear_of_its_neighbours_in_time() -> None:
    vista = masks.vista(192, 12, 8, 0, np.random.default_rng(0))
    random = masks.random_variable_density(192, 12, 8, 0, np.random.default_rng(0))

    def repeats(mask: np.ndarray) -> int:
        return int((mask & np.roll(mask, 1, axis=0)).sum())

    assert repeats(vista) < 0.1 * repeats(random)
    # the union over the cycle covers most of k-space, with no large gap

    def widest_gap(mask: np.ndarray) -> int:
        return int(np.diff(np.flatnonzero(mask.any(axis=0))).max())

    assert widest_gap(vista) <= 8
    assert vista.any(axis=0).mean() > 0.5


def test_golden_angle_states_fill_each_others_gaps() -> None:
    mask = masks.golden_angle(144, 4, 4, 0)
    assert (mask.sum(axis=1) == 36).all()
    assert mask.any(axis=0).mean() > 0.8


def test_uniform_contains_dc_and_moves_when_interleaved() -> None:
    mask = masks.uniform(96, 3, 3, acs=12, interleaved=True)
    comb = np.arange(96) - 48
    for state in range(3):
        np.testing.assert_array_equal(mask[state], ((comb - state) % 3 == 0) | masks.centre_block((96,), (12,)))
    assert masks.uniform(96, 2, 4)[:, 48].all()


@pytest.mark.parametrize("draw", [masks.poisson_disc, masks.random_variable_density])
def test_counts_in_two_dimensions(draw) -> None:
    shape, acs = (40, 60), (8, 10)
    available = masks.elliptical(shape)
    mask = draw(shape, 3, 6, acs, np.random.default_rng(0), available=available)
    assert (mask.sum(axis=(1, 2)) == round(available.sum() / 6)).all()
    assert not mask[:, ~available].any()
    assert mask[:, masks.centre_block(shape, acs)].all()
    assert (mask[0] != mask[1]).any()


def test_poisson_disc_keeps_a_distance() -> None:
    shape = (48, 64)

    def nearest(mask: np.ndarray) -> float:
        points = np.argwhere(mask)
        distance = np.linalg.norm(points[:, None] - points[None], axis=-1) + 1e9 * np.eye(len(points))
        return float(np.median(distance.min(axis=1)))

    poisson = masks.poisson_disc(shape, 1, 8, (0, 0), np.random.default_rng(0))[0]
    random = masks.random_variable_density(shape, 1, 8, (0, 0), np.random.default_rng(0))[0]
    assert nearest(poisson) >= 2.0 > nearest(random)


def test_uniform_2d_with_caipirinha_shift() -> None:
    mask = masks.uniform_2d((8, 12), 1, (2, 3), caipi_shift=1)[0]
    assert mask.sum() == 8 * 12 // 6
    assert mask[4, 6] and mask[6, 7] and not mask[6, 6]


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (lambda g: masks.random_variable_density(64, 2, 8, 16, g), "more calibration lines"),
        (lambda g: masks.vista(64, 0, 4, 4, g), "no states"),
        (lambda g: masks.golden_angle(64, 2, 0.5, 4, g), "not an acceleration"),
        (lambda g: masks.random_variable_density(64, 2, float("nan"), 4, g), "not an acceleration"),
        (lambda g: masks.vista(64, 2, 2, 80, g), "does not fit"),
        (lambda g: masks.uniform(64, 2, 2.5, 4), "not an integer"),
        (lambda g: masks.uniform_2d((8, 8), 1, (0, 2)), "not an acceleration"),
        (
            lambda g: masks.random_variable_density(64, 1, 2, 30, g, available=masks.partial_fourier_lines(64, 0.6)),
            "not acquired",
        ),
        (lambda g: masks.partial_fourier_lines(64, 0.4), "partial Fourier"),
        (lambda g: masks.poisson_disc((8, 8), 1, 2, (0, 0), g, available=np.ones((4, 4), bool)), "wrong shape"),
    ],
)
def test_impossible_requests_are_refused(request_, words: str) -> None:
    with pytest.raises(SettingError, match=words):
        request_(np.random.default_rng(0))


def test_callers_array_is_left_alone() -> None:
    available = masks.partial_fourier_lines(64, 0.75)
    available.flags.writeable = False
    masks.vista(64, 3, 4, 8, np.random.default_rng(0), available=available)
    masks.full((64,), 2, available)
