"""Codes and windows on known values."""

import numpy as np
import pytest

from gadgets.windows import (
    MAP_DISPLAYS,
    PHASE_SCALING,
    Window,
    integer_window,
    magnitude_scaling,
    magnitude_window,
    map_display,
    map_key,
    percentile_window,
)
from recon_core.errors import DataError


def test_t1_is_stored_in_milliseconds_with_the_window_of_the_field_strength() -> None:
    t1 = np.array([0.3, 1.2345, 3.9], np.float32)
    display = map_display("T1", "s", t1, 1.5)
    scaling = display.scaling(12)
    codes, saturated = scaling.encode(t1 * display.factor)
    assert codes.tolist() == [300, 1234, 3900] and saturated == 0
    assert (display.window, scaling.slope, scaling.intercept) == (Window(1300, 1300), 1.0, 0.0)
    assert map_display("t1", "s", t1, 3.0).window == Window(1600, 1600)
    assert map_display("t1", "s", t1, None).window == Window(1300, 1300)


def test_a_phase_map_shows_the_whole_circle_in_steps_of_two_milliradians() -> None:
    phase = np.array([-np.pi, -1.0, 0.0, 1.0, np.pi])
    display = map_display("M0_phase", "rad", phase, 3.0)
    assert (display.role, display.unit, display.window) == ("M0_PHASE", "mrad", Window(0, 6283))
    scaling = display.scaling(12)
    codes, saturated = scaling.encode(phase * display.factor)
    assert saturated == 0 and codes[2] == 2048 and scaling.slope == 2.0
    np.testing.assert_allclose(scaling.decode(codes), 1e3 * phase, atol=1.0)
    # and a slice that lies on one side only is shown like all the others
    assert map_display("M0_phase", "rad", phase[3:], 3.0) == display


def test_susceptibility_codes_leave_zero_for_the_padding() -> None:
    display = map_display("chi", "ppm", np.array([-1.0, 1.0]), None)
    scaling = display.scaling(12)
    assert (scaling.slope, scaling.intercept, scaling.first, scaling.last, scaling.padding) == (0.5, -1024.0, 1, 4095, 0)
    ppb = np.array([-1023.5, 0.0, 100.0, 1023.5, 5000.0, np.nan])
    codes, saturated = scaling.encode(ppb)
    assert codes.tolist() == [1, 2048, 2248, 4095, 4095, 0] and saturated == 1
    decoded = scaling.decode(codes)
    np.testing.assert_allclose(decoded[:4], ppb[:4])
    assert np.isnan(decoded[5])


def test_susceptibility_range_widens_for_a_strong_source_but_not_for_a_single_wild_pixel() -> None:
    strong = np.linspace(-3, 3, 5000)
    assert map_display("QSM", "ppm", strong, None).slope == 2.0
    assert map_display("QSM", "ppm", strong, None, 16).slope == 0.5  # 16 bits hold them as they are
    mild = np.zeros(5000)
    mild[7] = 50.0
    assert map_display("QSM", "ppm", mild, None).slope == 0.5


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("name", sorted(MAP_DISPLAYS))
def test_every_map_survives_within_half_a_step_and_its_window_is_whole(name: str, bits: int) -> None:
    display = MAP_DISPLAYS[name]
    scaling = display.scaling(bits)
    low, high = (scaling.first * scaling.slope + scaling.intercept, scaling.last * scaling.slope + scaling.intercept)
    values = np.random.default_rng(3).uniform(low, high, 1000)
    codes, saturated = scaling.encode(values)
    assert saturated == 0 and codes.min() >= 1
    np.testing.assert_allclose(scaling.decode(codes), values, atol=0.5 * scaling.slope * (1 + 1e-5) + 1e-3)
    assert display.window is not None and display.window.width > 1
    assert low - scaling.slope <= display.window.limits[0] and display.window.limits[1] <= high
    assert display.role == display.role[:16]


def test_saturation_is_counted_among_valid_pixels_only() -> None:
    scaling = MAP_DISPLAYS["r2star"].scaling(12)
    values = np.array([0.0, 100.0, 500.0, 900.0, -5.0])
    codes, saturated = scaling.encode(values, np.array([True, True, True, False, True]))
    assert codes.tolist() == [1, 1000, 4095, 0, 1]
    assert saturated == 2  # 500 and -5; a true zero is one step from code 1 and no loss


def test_encoding_leaves_the_caller_s_array_alone() -> None:
    values = np.array([1.0, np.nan, 3.0])
    values.flags.writeable = False
    MAP_DISPLAYS["t1"].scaling(12).encode(values)


def test_a_map_in_the_wrong_unit_is_refused() -> None:
    with pytest.raises(DataError, match="unit"):
        map_display("T1", "ms", np.ones(3), 3.0)


@pytest.mark.parametrize(("name", "key"), [("R2*", "r2star"), ("r2_star", "r2star"), ("QSM", "chi"), ("T1 SD", "t1sd")])
def test_names_are_matched_loosely(name: str, key: str) -> None:
    assert map_key(name) == key


@pytest.mark.parametrize("scale", [1e-7, 3e-3, 1.0, 4e6])
@pytest.mark.parametrize("signed", [False, True])
def test_an_unknown_quantity_gets_a_scaling_that_keeps_three_digits(scale: float, signed: bool) -> None:
    values = np.random.default_rng(0).uniform(-scale if signed else 0, scale, 5000)
    display = map_display("perfusion", "l/s", values, None)
    scaling = display.scaling(12)
    codes, saturated = scaling.encode(values * display.factor)
    assert saturated == 0
    assert np.abs(scaling.decode(codes) - values).max() < 0.02 * scale


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("scale", [2e-9, 1.0, 7e5])
def test_magnitude_scaling_leaves_headroom_for_the_slices_to_come(scale: float, bits: int) -> None:
    image = np.abs(np.random.default_rng(1).normal(size=(2, 1, 64, 64))) * scale
    scaling = magnitude_scaling(image, bits)
    codes, saturated = scaling.encode(image)
    assert saturated == 0 and 2**bits / 4 - 1 <= codes.max() <= 2**bits / 2
    assert np.log2(scaling.slope) == round(np.log2(scaling.slope))
    assert scaling.encode(2 * image)[1] == 0


def test_magnitude_scaling_ignores_a_spike_and_survives_an_empty_image() -> None:
    image = np.full((1, 1, 64, 64), 1.0)
    image[0, 0, 3, 3] = 1e6
    codes, saturated = magnitude_scaling(image, 12).encode(image)
    assert codes[0, 0, 0, 0] >= 500 and saturated == 1
    assert magnitude_scaling(np.zeros((1, 1, 4, 4)), 12).slope == 1.0


def test_windows_are_integers_or_absent() -> None:
    values = np.concatenate([np.zeros(500), np.linspace(100, 1100, 1001)])
    assert percentile_window(values) == Window(600, 980)
    assert percentile_window(values * 1e-6) is None
    assert percentile_window(np.zeros(5)) is None
    assert integer_window(float("nan"), 3) is None


def test_a_magnitude_window_begins_at_zero_even_where_the_background_is_masked() -> None:
    masked = np.concatenate([np.zeros(500), np.linspace(900, 1000, 201)])
    window = magnitude_window(masked)
    assert window is not None and window.limits[0] == 0 and 998 <= window.limits[1] <= 1000
    assert magnitude_window(np.zeros(5)) is None and magnitude_window(masked * 1e-6) is None


def test_phase_scaling_is_the_vendors() -> None:
    assert PHASE_SCALING.decode(np.array([0, 2048, 4095], np.uint16)).tolist() == [-4096.0, 0.0, 4094.0]
