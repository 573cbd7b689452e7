"""What a saturation leaves, or a delay of another gain, makes every T1 wrong and hardly shows: all pixels together tell."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from recon_core.errors import DataError
from recon_core.maps.saturation import MOST_LEFT, Deviation, Judgement, judge_recovery
from recon_core.maps.series import ImageNoise
from recon_core.maps.series_t1 import recovery_times, t1_maps
from recon_core.maps.settings import MapSettings
from recon_core.maps.t1 import saturation_recovery_t1
from recon_core.types import ImageSeries, ScanInfo

TIMES = (8.0, 0.5, 2.0, 1.0, 1.5)
N = 24
FOV = (0.008, 0.2, 0.2)
SCAN = ScanInfo((1, N, N), FOV, (1, N, N), FOV, saturation_times=TIMES)
SATURATION = MapSettings(maps="t1", map_model="saturation_recovery")


def recovery(
    left: float, noise: float = 0.005, seed: int = 0, longer: float = 0.0, slope: float = 0.0, n: int = N
) -> torch.Tensor:
    """complex64 ``(state, 1, y, x)``: T1 from 0.3 to 2 s, M0 of varying strength and phase, of which a part is not saturated.

    That part is by ``slope`` larger at the last edge of y. All delays are ``longer`` than `TIMES`, s.
    """
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*[np.linspace(-1, 1, n)] * 2, indexing="ij")
    t1, m0 = 1.15 + 0.85 * x, (0.8 + 0.2 * y) * np.exp(1j * (x - y))
    images = np.stack([m0 * (1 - (1 - left - slope * y) * np.exp(-(t + longer) / t1)) for t in TIMES])[:, None]
    images = images + noise * (rng.standard_normal(images.shape) + 1j * rng.standard_normal(images.shape))
    return torch.from_numpy(images.astype(np.complex64))


def judged(images: torch.Tensor, times: tuple[float, ...] = TIMES) -> Judgement:
    """What is said of a fit that knows nothing of what may be wrong."""
    fitted = saturation_recovery_t1(images, times)
    seen = fitted.t1.valid
    m0 = fitted.m0.data[seen]
    if fitted.m0_phase is not None:
        m0 = torch.polar(m0, fitted.m0_phase.data[seen])
    return judge_recovery(images[:, seen], m0, fitted.t1.data[seen], times, seen)


def scaled(images: torch.Tensor, gains: dict[float, float]) -> torch.Tensor:
    """The images of some delays made brighter."""
    return images * torch.tensor([1 + gains.get(t, 0.0) for t in TIMES])[:, None, None, None]


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("left", [0.0, 0.02, 0.05, 0.1, -0.1])
def test_what_the_saturation_left_is_found_from_a_fit_that_knows_nothing_of_it(left: float, magnitude: bool) -> None:
    images = recovery(left)
    found = judged(images.abs() if magnitude else images)
    if left == 0:
        assert found.likely[0].effect < 0.001
    else:
        assert found.likely[0].delay is None
        assert found.likely[0].size == pytest.approx(left, abs=0.004 + 0.2 * abs(left))
    assert bool(found.note) == (abs(left) > MOST_LEFT) and not found.several


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("gain", [0.05, -0.05, 0.1])
@pytest.mark.parametrize("delay", TIMES)
def test_a_delay_of_another_gain_is_named_with_its_size_and_what_follows(delay: float, gain: float, magnitude: bool) -> None:
    images = scaled(recovery(0.0), {delay: gain})
    images = images.abs() if magnitude else images
    found = judged(images)
    (said,) = found.likely
    assert said.delay == delay and said.size == pytest.approx(gain, abs=0.01) and not found.several
    assert f"delay {delay:g} s" in found.note and ("brighter" if gain > 0 else "darker") in found.note
    fitted, true = saturation_recovery_t1(images, TIMES).t1, 1.15 + 0.85 * np.linspace(-1, 1, N)
    error = np.sort((fitted.data[0].numpy() / true - 1)[fitted.valid[0].numpy()])
    assert said.t1_median == pytest.approx(np.median(error), abs=0.02)
    assert said.t1_quartile == pytest.approx(np.quantile(np.abs(error), 0.75), abs=0.03)


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("longer", [0.03, 0.06, 0.12, -0.04, -0.08])
def test_delays_that_are_all_longer_are_told_with_what_follows(longer: float, magnitude: bool) -> None:
    """As if the recovery had begun earlier: short T1 is further off than one remainder for all would make it."""
    images = recovery(0.0, longer=longer)
    images = images.abs() if magnitude else images
    found = judged(images)
    said = found.likely[0]
    assert said.shifted and said.size == pytest.approx(longer, rel=0.15) and not found.several
    assert f"ms {'longer' if longer > 0 else 'shorter'} than stated" in found.note
    fitted, true = saturation_recovery_t1(images, TIMES).t1, 1.15 + 0.85 * np.linspace(-1, 1, N)
    error = np.sort((fitted.data[0].numpy() / true - 1)[fitted.valid[0].numpy()])
    assert said.t1_median == pytest.approx(np.median(error), abs=0.025)
    assert said.t1_quartile == pytest.approx(np.quantile(np.abs(error), 0.75), abs=0.03)
    assert found.forbids_map == (abs(longer) > 0.07)


def test_small_gains_and_a_gain_of_all_delays_are_nothing() -> None:
    assert not judged(scaled(recovery(0.0), {8.0: 0.02})).note
    assert not judged(1.3 * recovery(0.0)).note


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_remainder_and_no_gain(seed: int) -> None:
    found = judged(recovery(0.0, noise=0.05, seed=seed))
    assert not found.note and not found.forbids_map
    few = judged(recovery(0.0, noise=0.05, seed=seed)[..., :3, :])
    assert not few.note and not few.forbids_map and max(d.doubt for d in few.likely) > 0.02


def test_too_few_pixels_or_delays_tell_nothing() -> None:
    images, m0, t1 = torch.ones(5, 40, dtype=torch.complex64), torch.ones(40), torch.ones(40)
    assert judge_recovery(images, m0, t1, TIMES) == Judgement()
    assert judge_recovery(torch.ones(3, 90), torch.ones(90), torch.ones(90), (0.5, 0.5, 8.0)) == Judgement()


def test_three_delays_cannot_tell_a_gain_from_a_remainder() -> None:
    times = TIMES[:3]
    found = judged(scaled(recovery(0.0), {0.5: 0.1})[:3], times)
    assert {d.delay for d in found.likely} == {None} and "states of unlike gain" in found.note


@pytest.mark.parametrize(("gains", "said"), [
    ({8.0: 0.1}, "delay 8 s .*10 % brighter.*T1 is 1. % too long"),
    ({0.5: -0.3}, "delay 0.5 s .*3. % darker.*too long"),
    ({8.0: 0.06, 2.0: 0.06}, "several delays"),
    ({0.5: 0.05, 1.0: -0.05, 1.5: 0.05}, "several delays"),
])  # fmt: skip
def test_a_map_that_would_be_wrong_by_a_tenth_is_not_made(gains: dict[float, float], said: str) -> None:
    series, noise = ImageSeries("image", scaled(recovery(0.0), gains)), ImageNoise(0.005, measured=True)
    with pytest.raises(DataError, match=said):
        t1_maps(series, SCAN, noise, SATURATION)
    asked_for = t1_maps(series, SCAN, noise, replace(SATURATION, map_delays="tell"))
    assert bool(asked_for.maps[0].valid.any()) and any(re.search(said, note) for note in asked_for.notes)


@pytest.mark.parametrize(("left", "said"), [(0.0, ""), (0.06, "too short"), (-0.06, "too long")])
def test_a_fitted_map_says_that_the_saturation_was_incomplete(left: float, said: str) -> None:
    found = t1_maps(ImageSeries("image", recovery(left)), SCAN, ImageNoise(0.005, measured=True), SATURATION)
    told = [note for note in found.notes if "of M0" in note]
    assert len(told) == bool(said) and all(said in note for note in told)


def test_a_missing_declaration_of_the_times_is_named() -> None:
    """Most often the header has a TI list and does not say that it is of a saturation."""
    undeclared = replace(SCAN, saturation_times=(), inversion_times=TIMES)
    with pytest.raises(DataError, match=r"no saturation times.*SaturationTime_ms_0.*MagnetizationPreparation"):
        recovery_times(undeclared, len(TIMES), SATURATION)


@pytest.mark.parametrize("longest", [0.0, 0.4])
@pytest.mark.parametrize("delays", ["require", "tell"])
def test_a_reference_without_saturation_that_is_called_the_shortest_delay_is_refused_in_words(
    delays: str, longest: float
) -> None:
    """Nothing fits, and an empty map would tell nobody why."""
    scan = replace(SCAN, saturation_times=(longest, *TIMES[1:]))
    with pytest.raises(DataError, match="shortest delay are the brightest") as refused:
        t1_maps(
            ImageSeries("image", recovery(0.0)),
            scan,
            ImageNoise(0.005, measured=True),
            replace(SATURATION, map_delays=delays),
        )
    assert "reference without saturation" in str(refused.value)


@pytest.mark.parametrize("delays", ["require", "tell"])
def test_an_inversion_that_is_called_a_saturation_gives_no_map(delays: str) -> None:
    settings = replace(SATURATION, map_delays=delays)
    with pytest.raises(DataError, match="no recovery from saturation"):
        t1_maps(ImageSeries("image", recovery(-1.0)), SCAN, ImageNoise(0.005, measured=True), settings)


def test_what_follows_for_t1_is_in_the_part_of_a_comment_that_consoles_get() -> None:
    remainder = Deviation(None, None, 0.07, 0.0, 0.02, 1.0, -0.06, 0.084)
    gain = Deviation(0, 0.5, -0.1, 0.0, 0.02, 1.0, 0.05, 0.091)
    assert (
        "T1 is 5 % too long (median), a quarter of the pixels by 9 %" in f"pinqi: {Judgement((remainder, gain)).note}"[:200]
    )


@pytest.mark.parametrize("magnitude", [False, True])
def test_a_saturation_that_varies_in_space_is_told_though_all_pixels_together_tell_nothing(magnitude: bool) -> None:
    """B1: an eighth is left at one edge, and an eighth inverted at the other; T1 is a tenth wrong at both, and right in the median."""
    images = recovery(0.0, slope=0.13)
    images = images.abs() if magnitude else images
    found = judged(images)
    assert not any(deviation.matters for deviation in found.likely)
    assert found.places[0].left < -0.04 and found.places[-1].left > 0.04
    t1 = saturation_recovery_t1(images, TIMES).t1
    truth = 1.15 + 0.85 * torch.linspace(-1, 1, N)
    wrong = (t1.data[0, : N // 2] / truth - 1)[t1.valid[0, : N // 2]].median()
    assert found.places[0].t1_error + found.places[1].t1_error == pytest.approx(2 * float(wrong), abs=0.04)
    said = r"T1 is wrong in \d+ % of the object, by \d+ % and more in places: the recovery seems to begin at -\d+ to \d+ % of M0 from place"
    assert re.match(said, found.note)
    (note,) = t1_maps(ImageSeries("image", images), SCAN, None, SATURATION).notes
    assert note == f"T1: {found.note}"


@pytest.mark.parametrize(
    ("left", "slope", "noise"), [(0.0, 0.0, 0.005), (0.0, 0.0, 0.05), (0.03, 0.0, 0.005), (0.0, 0.03, 0.005)]
)
def test_a_saturation_that_is_alike_everywhere_is_said_of_no_place(left: float, slope: float, noise: float) -> None:
    found = judged(recovery(left, noise=noise, slope=slope, n=48))
    assert len(found.places) == 16 and not found.note


def test_what_is_said_of_the_whole_is_not_said_of_places_again() -> None:
    found = judged(recovery(0.06))
    assert "begin at 6 % of M0" in found.note and "from place to place" not in found.note


def test_a_small_object_is_not_divided() -> None:
    assert judged(recovery(0.0, slope=0.2, n=18)).places == ()


def test_an_empty_map_of_an_inversion_says_what_is_likely_wrong() -> None:
    """With short times states differ in sign, nothing can be fitted, and no remainder be found."""
    times = (0.05, 0.2, 0.5, 1.0, 2.0)
    images = torch.stack([torch.full((1, N, N), 1 - 2 * float(np.exp(-t / 0.5)), dtype=torch.complex64) for t in times])
    scan = replace(SCAN, saturation_times=times)
    (note,) = t1_maps(ImageSeries("image", images), scan, None, SATURATION).notes
    assert "100 % of the object" in note and "likely no saturation recovery (setting map_model)" in note
