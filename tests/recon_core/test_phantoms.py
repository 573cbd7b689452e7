"""Phantoms: plausible tissue, smooth periodic motion, textures instead of flat regions, seeds."""

import numpy as np
import pytest

from recon_core.errors import SettingError
from recon_core.simulation import brain, torso
from recon_core.simulation.phantoms import Canvas, Grid, Texture, Tissue, centred_axis, ellipse, soft

CHEST = Grid(np.array([0.0]), centred_axis(160, 0.34), centred_axis(160, 0.34))


def area(maps, label: str) -> float:
    return float((maps.labels == torso.LABELS[label]).sum()) * CHEST.pixel**2 * 1e4  # cm^2


@pytest.fixture(scope="module")
def cycle():
    return torso.TorsoPhantom(0).frames(CHEST, np.arange(12) / 12)


def test_the_ventricle_contracts_and_its_wall_thickens(cycle) -> None:
    blood = np.array([area(m, "lv_blood") + area(m, "papillary") for m in cycle])
    wall = np.array([area(m, "myocardium") for m in cycle])
    assert 14 < blood[0] < 26  # cm^2 at end diastole
    assert 3 <= blood.argmin() <= 5 and 0.35 < blood.min() / blood[0] < 0.60
    assert np.ptp(wall) / wall.mean() < 0.25  # tissue is nearly incompressible: area stays, thickness grows
    outer, inner = np.sqrt((blood + wall) / np.pi), np.sqrt(blood / np.pi)
    thickness = outer - inner
    assert thickness[blood.argmin()] > 1.3 * thickness[0]
    rv = np.array([area(m, "rv_blood") for m in cycle])
    assert rv.min() < 0.75 * rv[0]


def test_motion_is_periodic_and_smooth() -> None:
    t = np.linspace(0, 1, 400, endpoint=False)
    c = torso.contraction(t)
    np.testing.assert_allclose(torso.contraction(t + 1.0), c, atol=1e-12)
    assert np.ptp(c) > 0.8 and c.min() >= 0 and c.max() <= 1
    assert np.abs(np.diff(np.append(c, c[0]))).max() < 0.03
    phantom = torso.TorsoPhantom(1)
    start, end = (phantom.maps(CHEST, phase) for phase in (0.0, 1.0))
    np.testing.assert_allclose(start.pd, end.pd, atol=1e-4)


def test_what_does_not_beat_stands_still(cycle) -> None:
    for label in ("fat", "liver", "bone", "csf"):
        far = (np.hypot(CHEST.y[:, None], CHEST.x[None] - 0.03) > 0.085)[None]  # the heart reaches no further
        where = [(m.labels == torso.LABELS[label]) & far for m in cycle]
        always = np.logical_and.reduce(where)
        assert always.sum() > 20
        for m in cycle:
            np.testing.assert_array_equal(m.pd[always], cycle[0].pd[always])


def test_values_are_those_of_tissue(cycle) -> None:
    expected = {"myocardium": (0.9, 1.1), "lv_blood": (1.4, 1.7), "fat": (0.25, 0.35), "liver": (0.5, 0.65)}
    for label, (low, high) in expected.items():
        t1 = np.median(cycle[0].t1[cycle[0].labels == torso.LABELS[label]])
        assert low < t1 < high, label
    outside = cycle[0].labels == 0
    assert np.mean(cycle[0].pd[outside] > 0) < 0.05 and 0.2 < outside.mean() < 0.6


@pytest.mark.parametrize("label", ["myocardium", "lv_blood", "liver", "muscle", "fat"])
def test_tissue_has_texture(cycle, label: str) -> None:
    inside = cycle[0].pd[cycle[0].labels == torso.LABELS[label]]
    assert 0.02 < np.std(inside) / np.mean(inside) < 0.35
    assert len(np.unique(inside)) > 0.9 * len(inside)


def test_rendering_does_not_depend_on_the_grid() -> None:
    phantom = torso.TorsoPhantom(2)
    fine = phantom.maps(Grid(np.array([0.0]), centred_axis(320, 0.34), centred_axis(320, 0.34)), 0.3).pd[:, ::2, ::2]
    coarse = phantom.maps(CHEST, 0.3).pd
    assert np.linalg.norm(fine - coarse) / np.linalg.norm(coarse) < 0.10  # they differ at edges only
    assert np.median(np.abs(fine - coarse)) < 1e-5


@pytest.mark.parametrize(
    "make", [lambda seed: torso.TorsoPhantom(seed).maps(CHEST, 0.1), lambda seed: brain.BrainPhantom(seed).maps(CHEST)]
)
def test_seeds_give_other_people(make) -> None:
    first, again, other = make(5), make(5), make(6)
    np.testing.assert_array_equal(first.pd, again.pd)
    assert (first.labels != other.labels).mean() > 0.03


def test_slices_of_the_heart_differ_and_get_smaller_towards_the_apex() -> None:
    grid = Grid(np.array([-0.02, 0.0, 0.04]), CHEST.y, CHEST.x)
    maps = torso.TorsoPhantom(0).maps(grid, 0.0)
    cavity = [(maps.labels[i] == torso.LABELS["lv_blood"]).sum() for i in range(3)]
    assert cavity[2] < 0.7 * cavity[1] and maps.pd.shape == (3, 160, 160)


def test_the_brain_has_its_parts() -> None:
    grid = Grid(centred_axis(20, 0.08), centred_axis(110, 0.22), centred_axis(110, 0.22))
    maps = brain.BrainPhantom(0).maps(grid)
    count = {name: int((maps.labels == label).sum()) for name, label in brain.LABELS.items()}
    assert all(count[name] > 10 for name in brain.LABELS if name != "ruber"), count
    assert 0.3 < count["grey"] / count["white"] < 1.2
    order = ["csf", "white", "putamen", "pallidum", "vein"]
    r2star = [np.median(maps.r2star[maps.labels == brain.LABELS[name]]) for name in order]
    assert r2star == sorted(r2star)
    assert np.median(maps.t1[maps.labels == brain.LABELS["grey"]]) > 1.3 * np.median(
        maps.t1[maps.labels == brain.LABELS["white"]]
    )
    for field in (maps.pd, maps.r1, maps.r2, maps.r2star, maps.chi):
        assert np.isfinite(field).all() and field.dtype == np.float32


def test_ellipse_is_a_distance_near_its_border() -> None:
    y, x = np.meshgrid(np.linspace(-2, 2, 401), np.linspace(-2, 2, 401), indexing="ij")
    distance = ellipse(x, y, 1.0, 1.0)
    near = np.abs(np.hypot(x, y) - 1) < 0.1
    np.testing.assert_allclose(distance[near], (np.hypot(x, y) - 1)[near], atol=1e-3)
    inside = soft(distance, 0.02).sum() * 0.01**2
    assert inside == pytest.approx(np.pi, rel=2e-3)


def test_texture_is_normalised_and_painting_mixes_rates() -> None:
    field = Texture(np.random.default_rng(0), 2, 0.003)(*np.meshgrid(np.arange(0, 0.2, 1e-3), np.arange(0, 0.2, 1e-3)))
    assert abs(field.mean()) < 0.2 and field.std() == pytest.approx(1.0, abs=0.25)
    canvas = Canvas((2, 2), 0.001)
    canvas.paint(np.ones((2, 2)), Tissue(1.0, 1.0, 0.1), 1)
    canvas.paint(np.full((2, 2), 0.5), Tissue(0.5, 0.25, 0.05), 2)
    maps = canvas.maps()
    np.testing.assert_allclose(maps.r1, 2.5)
    np.testing.assert_allclose(maps.pd, 0.75)


def test_empty_grid_is_refused() -> None:
    with pytest.raises(SettingError, match="not a grid"):
        centred_axis(0, 0.3)
