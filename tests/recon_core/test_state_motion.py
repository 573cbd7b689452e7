"""An object that moves in one state makes T1 wrong at edges, and the fit takes much of it up: what is left says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon_core.errors import DataError
from recon_core.maps.series import ImageNoise
from recon_core.maps.series_t1 import t1_maps
from recon_core.maps.settings import MapSettings
from recon_core.types import ImageSeries, ScanInfo

N = 64
FOV = (0.008, 0.25, 0.25)
SATURATION_TIMES = (0.5, 1.0, 8.0, 1.5, 2.0)
MOLLI_TIMES = (0.1, 1.1, 2.1, 3.1, 4.1, 0.18, 1.18, 2.18)
NOISE = 0.01
SCALED = 1.04


def head(dy: float = 0.0, dx: float = 0.0, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """M0 and T1 (s) of a body with inclusions and soft edges, moved by pixels and enlarged, ``(y, x)``."""
    y, x = np.meshgrid(*[(np.arange(N) - N // 2) / scale] * 2, indexing="ij")
    y, x = y - dy / scale, x - dx / scale
    m0, t1 = np.zeros((N, N)), np.ones((N, N))
    for centre, radii, density, time in (
        ((0, 0), (26, 21), 0.7, 0.8),
        ((-9, 6), (6, 8), 1.0, 1.8),
        ((10, -5), (7, 5), 0.8, 1.2),
        ((3, 9), (4, 4), 0.5, 0.4),
    ):
        radius = np.hypot((y - centre[0]) / radii[0], (x - centre[1]) / radii[1])
        share = 1 / (1 + np.exp((radius - 1) * min(radii) / 0.6))
        m0, t1 = m0 + share * (density - m0), t1 + share * (time - t1)
    return m0, t1


def series(model: str, state: int | None = None, *, magnitude: bool = False, seed: int = 0, **motion: float) -> ImageSeries:
    """Noisy images with a smooth phase, of which one state is moved."""
    y, x = np.meshgrid(*[np.linspace(-1, 1, N)] * 2, indexing="ij")
    images = []
    for index, time in enumerate(times_of(model)):
        m0, t1 = head(**motion) if index == state else head()
        a, b, apparent = (1.0, 1.0, t1) if model == "saturation_recovery" else (0.9, 1.8, 0.9 * t1)
        signal = m0 * (a - b * np.exp(-time / apparent))
        images.append(signal * np.exp(0.6j * y - 0.4j * x))
    rng = np.random.default_rng(seed)
    data = np.stack(images)[:, None]
    data = data + NOISE * (rng.standard_normal(data.shape) + 1j * rng.standard_normal(data.shape))
    found = torch.from_numpy(data.astype(np.complex64))
    return ImageSeries("image", found.abs() if magnitude else found)


def times_of(model: str) -> tuple[float, ...]:
    return SATURATION_TIMES if model == "saturation_recovery" else MOLLI_TIMES


def notes(model: str, images: ImageSeries) -> list[str]:
    """What is said of motion where every map is sent."""
    times = times_of(model)
    saturated = model == "saturation_recovery"
    scan = ScanInfo(
        (1, N, N),
        FOV,
        (1, N, N),
        FOV,
        inversion_times=() if saturated else times,
        saturation_times=times if saturated else (),
    )
    settings = MapSettings(maps="t1", map_model=model, map_delays="tell")
    found = t1_maps(images, scan, ImageNoise(NOISE, True), settings)
    return [note for note in found.notes if "seems to have moved" in note]


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("model", ["saturation_recovery", "molli"])
def test_an_object_at_rest_is_not_said_to_move(model: str, magnitude: bool) -> None:
    for seed in range(2):
        assert not notes(model, series(model, magnitude=magnitude, seed=seed))


@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize(
    ("model", "state", "motion"),
    [
        ("saturation_recovery", 2, {"dy": 2.0}),
        ("saturation_recovery", 2, {"dx": 0.5}),
        ("saturation_recovery", 0, {"dx": -2.0}),
        ("saturation_recovery", 3, {"dy": 1.0}),
        ("saturation_recovery", 2, {"scale": SCALED}),
        ("molli", 7, {"dy": 2.0}),
        ("molli", 0, {"dx": 1.0}),
        ("molli", 6, {"scale": SCALED}),
    ],
)
def test_the_state_in_which_the_object_moved_is_named(
    model: str, state: int, motion: dict[str, float], magnitude: bool
) -> None:
    (said,) = notes(model, series(model, state, magnitude=magnitude, **motion))
    assert f"at {times_of(model)[state]:g} s" in said and "T1 is wrong" in said


def test_where_a_quarter_of_the_object_is_a_tenth_wrong_there_is_no_map() -> None:
    scan = ScanInfo((1, N, N), FOV, (1, N, N), FOV, saturation_times=SATURATION_TIMES)
    settings = MapSettings(maps="t1", map_model="saturation_recovery")
    with pytest.raises(DataError, match=r"T1 would be wrong.*moved at 8 s") as refused:
        t1_maps(series("saturation_recovery", 2, dy=3.0), scan, ImageNoise(NOISE, True), settings)
    assert "map_delays = tell" in (refused.value.remedy or "")
