"""Times of an inversion recovery in another order than its images make T1 wrong, where there is any T1 at all."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recon_core.errors import DataError
from recon_core.maps.saturation import strong_signal
from recon_core.maps.series import ImageNoise
from recon_core.maps.series_t1 import t1_maps
from recon_core.maps.settings import MapSettings
from recon_core.maps.state_order import order_of_times
from recon_core.maps.t1 import molli_t1
from recon_core.types import ImageSeries, ScanInfo
from tests.recon_core.test_state_motion import FOV, MOLLI_TIMES, NOISE, N, series

SETTINGS = MapSettings(maps="t1", map_model="molli", map_delays="tell")


def maps(images: ImageSeries, times: tuple[float, ...], delays: str = "tell") -> list[str]:
    """What is said of the order."""
    scan = ScanInfo((1, N, N), FOV, (1, N, N), FOV, inversion_times=times)
    found = t1_maps(images, scan, ImageNoise(NOISE, True), replace(SETTINGS, map_delays=delays))
    return [note for note in found.notes if "fit the times far better" in note]


def exchanged(i: int, j: int) -> tuple[float, ...]:
    times = list(MOLLI_TIMES)
    times[i], times[j] = times[j], times[i]
    return tuple(times)


@pytest.mark.parametrize(("i", "j", "magnitude"), [(0, 1, False), (1, 2, False), (1, 2, True)])
def test_two_times_that_are_exchanged_are_named_and_give_no_map(i: int, j: int, magnitude: bool) -> None:
    """Of 1.1 and 2.1 s a third of the pixels is empty, and T1 a tenth too short in the others: silence would be a wrong map."""
    images, stated = series("molli", magnitude=magnitude), exchanged(i, j)
    (note,) = maps(images, stated)
    assert f"with {MOLLI_TIMES[i]:g} and {MOLLI_TIMES[j]:g} s exchanged" in note
    with pytest.raises(DataError, match=r"T1 would be wrong.*times in another order than the images"):
        maps(images, stated, "require")


def test_times_that_were_sorted_are_told_with_the_order_of_the_images() -> None:
    (note,) = maps(series("molli"), tuple(sorted(MOLLI_TIMES)))
    assert f"in the order {', '.join(f'{t:g}' for t in MOLLI_TIMES)} s" in note


@pytest.mark.parametrize("magnitude", [False, True])
def test_sound_images_and_such_of_another_gain_have_no_other_order(magnitude: bool) -> None:
    """Nor have those that come in another order, with their times."""
    images, rising = series("molli", magnitude=magnitude).data, sorted(range(len(MOLLI_TIMES)), key=MOLLI_TIMES.__getitem__)
    inside = strong_signal(images)
    assert order_of_times(images, MOLLI_TIMES, inside, molli_t1) is None
    assert order_of_times(images[rising], sorted(MOLLI_TIMES), inside, molli_t1) is None
    for state in (0, 4, 5):
        data = images.clone()
        data[state] *= 0.8
        assert order_of_times(data, MOLLI_TIMES, inside, molli_t1) is None


def test_an_image_half_as_bright_is_told_as_such_and_not_as_another_order() -> None:
    images = series("molli", magnitude=True)
    images.data[0] *= 0.5
    scan = ScanInfo((1, N, N), FOV, (1, N, N), FOV, inversion_times=MOLLI_TIMES)
    found = t1_maps(images, scan, ImageNoise(NOISE, True), SETTINGS)
    assert any("darker than the others say" in note for note in found.notes)
    assert not any("fit the times far better" in note for note in found.notes)
