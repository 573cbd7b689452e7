"""What a saturation leaves makes every T1 wrong and hardly shows: it is found from all pixels together, and said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recon_core.errors import DataError
from recon_core.maps.saturation import MOST_LEFT, magnetisation_left
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


def recovery(left: float, noise: float = 0.005, seed: int = 0) -> torch.Tensor:
    """complex64 ``(state, 1, y, x)``: T1 from 0.3 to 2 s, M0 of varying strength and phase, of which a part is not saturated."""
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*[np.linspace(-1, 1, N)] * 2, indexing="ij")
    t1, m0 = 1.15 + 0.85 * x, (0.8 + 0.2 * y) * np.exp(1j * (x - y))
    images = np.stack([m0 * (1 - (1 - left) * np.exp(-t / t1)) for t in TIMES])[:, None]
    images = images + noise * (rng.standard_normal(images.shape) + 1j * rng.standard_normal(images.shape))
    return torch.from_numpy(images.astype(np.complex64))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("left", [0.0, 0.02, 0.05, 0.1, -0.1])
def test_what_the_saturation_left_is_found_from_a_fit_that_knows_nothing_of_it(left: float, magnitude: bool) -> None:
    images = recovery(left)
    images = images.abs() if magnitude else images
    fitted = saturation_recovery_t1(images, TIMES)
    seen = fitted.t1.valid
    m0 = fitted.m0.data[seen]
    if fitted.m0_phase is not None:
        m0 = torch.polar(m0, fitted.m0_phase.data[seen])
    found = magnetisation_left(images[:, seen], m0, fitted.t1.data[seen], TIMES)
    assert found == pytest.approx(left, abs=0.004 + 0.2 * abs(left))


@pytest.mark.parametrize("seed", range(3))
def test_noise_is_no_remainder(seed: int) -> None:
    images = recovery(0.0, noise=0.05, seed=seed)
    fitted = saturation_recovery_t1(images, TIMES)
    seen = fitted.t1.valid
    m0 = torch.polar(fitted.m0.data[seen], fitted.m0_phase.data[seen])  # type: ignore[union-attr]
    found = magnetisation_left(images[:, seen], m0, fitted.t1.data[seen], TIMES)
    assert found is not None and abs(found) < MOST_LEFT / 2


def test_too_few_pixels_or_delays_tell_nothing() -> None:
    images, m0, t1 = torch.ones(5, 40, dtype=torch.complex64), torch.ones(40), torch.ones(40)
    assert magnetisation_left(images, m0, t1, TIMES) is None
    assert magnetisation_left(torch.ones(3, 90), torch.ones(90), torch.ones(90), (0.5, 0.5, 8.0)) is None


@pytest.mark.parametrize(("left", "said"), [(0.0, ""), (0.1, "too short"), (-0.1, "too long")])
def test_a_fitted_map_says_that_the_saturation_was_incomplete(left: float, said: str) -> None:
    found = t1_maps(ImageSeries("image", recovery(left)), SCAN, ImageNoise(0.005, measured=True), SATURATION)
    told = [note for note in found.notes if "of M0" in note]
    assert len(told) == bool(said) and all(said in note for note in told)


def test_a_missing_declaration_of_the_times_is_named() -> None:
    """Most often the header has a TI list and does not say that it is of a saturation."""
    undeclared = replace(SCAN, saturation_times=(), inversion_times=TIMES)
    with pytest.raises(DataError, match=r"no saturation times.*SaturationTime_ms_0.*MagnetizationPreparation"):
        recovery_times(undeclared, len(TIMES), SATURATION)


def test_an_inversion_that_is_called_a_saturation_gives_no_map() -> None:
    with pytest.raises(DataError, match="no recovery from saturation"):
        t1_maps(ImageSeries("image", recovery(-1.0)), SCAN, ImageNoise(0.005, measured=True), SATURATION)
