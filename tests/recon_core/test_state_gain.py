"""One image of an inversion recovery that is brighter or darker than the others makes T1 wrong, and the fit takes much of it up."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recon_core.errors import DataError
from recon_core.maps.series import ImageNoise
from recon_core.maps.series_t1 import t1_maps
from recon_core.maps.settings import MapSettings
from recon_core.types import ImageSeries, ScanInfo
from tests.recon_core.test_state_motion import FOV, MOLLI_TIMES, NOISE, N, head, series

SETTINGS = MapSettings(maps="t1", map_model="molli", map_delays="tell")


def scan(times: tuple[float, ...] = MOLLI_TIMES) -> ScanInfo:
    return ScanInfo((1, N, N), FOV, (1, N, N), FOV, inversion_times=times)


def scaled(images: ImageSeries, state: int, gain: float) -> ImageSeries:
    data = images.data.clone()
    data[state] *= gain
    return replace(images, data=data)


def told(images: ImageSeries, times: tuple[float, ...] = MOLLI_TIMES) -> list[str]:
    """What is said of an image's brightness where every map is sent."""
    found = t1_maps(images, scan(times), ImageNoise(NOISE, True), SETTINGS)
    return [note for note in found.notes if "than the others say" in note]


def t1_off(images: ImageSeries, times: tuple[float, ...] = MOLLI_TIMES) -> float:
    """Relative error of T1, the size that a quarter of the body's pixels exceed."""
    t1 = t1_maps(images, scan(times), ImageNoise(NOISE, True), SETTINGS).maps[0]
    m0, truth = head()
    inside = (m0 > 0.4) & t1.valid[0].numpy()
    apparent = 0.9 * truth  # B / A of `series` is 2: what the correction leaves as it is
    return float(np.quantile(np.abs(t1.data[0].numpy() / apparent - 1)[inside], 0.75))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_sound_series_is_left_alone(magnitude: bool, seed: int) -> None:
    images = series("molli", magnitude=magnitude, seed=seed)
    assert not told(images)
    assert not told(replace(images, data=images.data[:5]), MOLLI_TIMES[:5])


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize(
    ("state", "gain", "words"), [(0, 0.8, "darker"), (0, 1.2, "brighter"), (5, 1.2, "brighter"), (1, 0.9, "darker")]
)
def test_an_image_of_another_gain_is_told(state: int, gain: float, words: str, magnitude: bool) -> None:
    images = scaled(series("molli", magnitude=magnitude), state, gain)
    (note,) = told(images)
    assert f"the image of {MOLLI_TIMES[state]:g} s seems to be" in note and f"% {words}" in note
    said = float(note.partition("pixels by about ")[2].partition(" %")[0]) / 100
    assert said == pytest.approx(t1_off(images), abs=0.02)


def test_times_of_one_inversion_that_are_wrong_are_told() -> None:
    later = tuple(t + 0.08 * (state >= 5) for state, t in enumerate(MOLLI_TIMES))
    assert t1_off(series("molli"), later) > 0.08
    assert len(told(series("molli"), later)) == 1


def test_a_gain_that_makes_t1_a_tenth_wrong_gives_no_map() -> None:
    images = scaled(series("molli"), 0, 0.5)
    with pytest.raises(DataError, match=r"T1 would be wrong.*darker than the others say") as caught:
        t1_maps(images, scan(), ImageNoise(NOISE, True), replace(SETTINGS, map_delays="require"))
    assert "map_delays = tell" in caught.value.remedy
    assert len(told(images)) == 1
    assert torch.equal(images.data, scaled(series("molli"), 0, 0.5).data)
