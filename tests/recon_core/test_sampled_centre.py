"""A centre of k-space that some states lack: what coils can tell gives the true T1, what they cannot gives no map."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recon_core.errors import CalibrationError, DataError
from recon_core.maps.sampled_centre import missing_at_centre, missing_centre
from recon_core.maps.settings import MapSettings
from recon_core.methods import get_method
from recon_core.reconstruct import Recipe, reconstruct
from tests.recon_core.pinqi.saturation_scan import SaturationScan, saturation_scan

T1 = MapSettings(maps="t1", map_model="saturation_recovery")


def recipe(maps: MapSettings = T1) -> Recipe:
    return Recipe("llr", get_method("llr").Settings(), maps=maps)


def without_lines(s: SaturationScan, lines: range, state: int = -1) -> SaturationScan:
    """One state does not have some of its lines."""
    counts = s.kspace.counts.clone()
    counts[state, 0, list(lines)] = 0
    data = s.kspace.data * (counts > 0)[:, None, :, :, None]
    return replace(s, kspace=replace(s.kspace, data=data, counts=counts))


def test_runs_that_touch_the_centre_count() -> None:
    mask = torch.ones(6, 1, 16, dtype=torch.bool)  # DC at 8
    mask[1, 0, 8] = False
    mask[2, 0, [6, 7]] = False
    mask[3, 0, [5, 6]] = False  # beside, not next to DC
    mask[4, 0, 9:] = False
    mask[5, 0, [7, 9, 10]] = False
    assert missing_at_centre(mask) == [0, 1, 2, 0, 7, 2]


def test_in_a_slab_the_shorter_direction_counts() -> None:
    mask = torch.ones(2, 12, 16, dtype=torch.bool)
    mask[0, 6] = False  # a whole partition: its neighbours are there
    mask[1, 5:8, 4:12] = False
    assert missing_at_centre(mask) == [1, 3]


def test_a_single_line_is_there_or_not() -> None:
    assert missing_at_centre(torch.tensor([True, False]).reshape(2, 1, 1)) == [0, 1]


@pytest.mark.parametrize(
    ("n_coils", "n_missing", "preparation", "right"),
    [(1, 1, "saturation", False), (1, 0, "saturation", True), (4, 2, "saturation", True), (4, 3, "saturation", False),
     (16, 3, "saturation", True), (16, 4, "saturation", False), (2, 1, "inversion", True), (2, 2, "inversion", False),
     (16, 4, "inversion", True), (16, 5, "inversion", False)],
)  # fmt: skip
def test_how_much_coils_can_tell(n_coils: int, n_missing: int, preparation: str, right: bool) -> None:
    mask = torch.ones(3, 1, 32, dtype=torch.bool)
    mask[1, 0, 16 : 16 + n_missing] = False
    error = missing_centre(mask, n_coils, preparation, "slice 0")
    assert (error is None) == right
    assert error is None or (error.remedy and "first: 1" in str(error))


def test_one_coil_without_the_centre_of_one_delay_gives_images_and_no_t1() -> None:
    """T1 would be wrong everywhere: nothing tells how bright the images of that delay are."""
    s = without_lines(saturation_scan((48, 40), n_coils=1, noise=1e-3), range(24, 25))
    with pytest.raises(CalibrationError, match="centre of k-space is not measured"):
        reconstruct(s.kspace, s.scan, recipe())
    result = reconstruct(s.kspace, s.scan, recipe(replace(T1, map_failure="warn")))
    assert not result.maps and any("no T1 map" in note and "centre of k-space" in note for note in result.notes)
    assert bool((result.images[0].data != 0).any())
    assert not reconstruct(s.kspace, s.scan, recipe(MapSettings())).notes  # images alone need no such word


def test_an_image_that_was_lost_is_none_without_signal() -> None:
    s = saturation_scan((48, 40), n_coils=2, noise=1e-3)
    data = s.kspace.data.clone()
    data[1] = 0
    lost = replace(s.kspace, data=data)
    with pytest.raises(DataError, match=r"nothing but zeros in 1 of \d images, the first: 1"):
        reconstruct(lost, s.scan, recipe())
    result = reconstruct(lost, s.scan, recipe(replace(T1, map_failure="warn")))
    assert not result.maps and any("images without any signal" in note for note in result.notes)


def test_what_four_coils_can_tell_gives_the_true_t1() -> None:
    s = without_lines(saturation_scan((48, 40), noise=1e-3), range(24, 26))
    (t1, *_), truth = reconstruct(s.kspace, s.scan, recipe()).maps, s.t1
    valid = t1.valid[0].numpy() & s.body
    assert valid.sum() > 0.9 * s.body.sum()
    assert np.median(np.abs(t1.data[0].numpy() / truth - 1)[valid]) < 0.02


@pytest.mark.parametrize(("n_missing", "told"), [(2, False), (3, True)])
def test_what_the_coils_may_not_tell_is_said(n_missing: int, told: bool) -> None:
    s = without_lines(saturation_scan((48, 40), n_coils=6, noise=1e-3), range(24, 24 + n_missing))
    result = reconstruct(s.kspace, s.scan, recipe(replace(T1, map_delays="tell")))
    assert result.maps and any("T1 may be 10 % wrong" in note for note in result.notes) == told
