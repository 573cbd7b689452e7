"""Maps as settings of a chain: any chain can be asked for them, names never collide, displays keep the value."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from gadgets.chain import SHARED_GROUPS, chain_names, load_chain
from gadgets.windows import map_display
from recon_core.errors import SettingError
from recon_core.maps.settings import MapSettings
from recon_core.methods import methods
from recon_core.settings import describe


def test_no_two_groups_of_settings_share_a_name() -> None:
    """A chain file has one flat list of properties: a name in two groups would silently reach only one of them."""
    shared = Counter(info.name for group in SHARED_GROUPS.values() for info in describe(group))
    for method in methods().values():
        names = shared + Counter(info.name for info in describe(method.Settings))
        assert [name for name, count in names.items() if count > 1] == [], method.NAME


def test_any_chain_makes_t1_maps_when_asked() -> None:
    for name in chain_names():
        assert load_chain(name, {"maps": "t1"}).maps.maps == "t1"
    assert load_chain("llr").maps == MapSettings()
    chain = load_chain("llr_t1", {"map_sign": "magnitude", "map_t1_max": "3.5"})
    assert (chain.maps.maps, chain.maps.map_sign, chain.maps.t1.t1_max) == ("t1", "magnitude", 3.5)
    with pytest.raises(SettingError, match="map_model"):
        load_chain("llr", {"map_model": "guess"})


@pytest.mark.parametrize("text", ["up", "1, 0", "0, 0, 0", "1, nan, 0", "1 0 0"])
def test_b0_along_no_direction_is_refused_with_the_other_settings(text: str) -> None:
    with pytest.raises(SettingError, match="map_b0_direction"):
        load_chain("llr_qsm", {"map_b0_direction": text})


def test_b0_along_a_direction() -> None:
    assert load_chain("llr_qsm", {"map_b0_direction": "0; -2; 0"}).maps.b0_direction == (0.0, -1.0, 0.0)
    assert load_chain("llr_qsm").maps.b0_direction is None


def test_limits_of_the_fit_have_one_default() -> None:
    assert all(
        getattr(MapSettings().t1, field.name) == field.default for field in dataclasses.fields(type(MapSettings().t1))
    )


@pytest.mark.parametrize("peak", [3e-9, 0.02, 7.0, 850.0, 4.4e4, 2e7])
@pytest.mark.parametrize("name", ["M0", "T1_residual"])
def test_maps_in_the_images_unit_keep_their_value_at_every_scale(name: str, peak: float) -> None:
    values = peak * np.random.default_rng(0).uniform(0, 1, 4000)
    display = map_display(name, "1", values, 1.5)
    scaling = display.scaling(12)
    codes, saturated = scaling.encode(values * display.factor)
    assert saturated == 0 and int(codes.max()) <= 2048
    unit = float(display.unit) if display.unit else 1.0
    np.testing.assert_allclose(scaling.decode(codes) * unit, values, atol=peak / 900)
    assert display.window is not None
    assert abs(display.window.limits[0]) <= 0.5 and display.window.limits[1] * unit == pytest.approx(0.99 * peak, rel=0.02)
    assert (display.role, display.unit == "") == ("".join(c for c in name.upper() if c.isalnum()), 100 <= peak < 1e5)


def test_an_empty_first_slice_has_a_display_too() -> None:
    assert map_display("M0", "1", np.zeros(0), None).window is not None
