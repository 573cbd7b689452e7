"""What the conditions of a head do to its images, before any map is made."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.qsm_conditions import (
    CONDITIONS,
    FAT,
    IN_PHASE,
    METAL,
    Condition,
    array_coil,
    fat,
    metal,
    surface_coil,
    thick,
)
from recon_core.simulation.brain import LABELS
from recon_core.simulation.multi_echo_brain import BrainScan, ScanRecipe, simulate


@pytest.fixture(scope="module")
def scan() -> BrainScan:
    recipe = ScanRecipe(
        matrix=(20, 80, 72), voxel=(2.5, 2.5), n_echoes=2, first_echo=(IN_PHASE / 3,) * 2, echo_spacing=(IN_PHASE / 6,) * 2
    )
    return simulate(recipe, 11)


def test_fat_is_in_phase_with_water_and_out_of_phase(scan: BrainScan) -> None:
    factor = fat(scan, 3.0)
    scalp = (scan.labels == LABELS["scalp"]).numpy()
    assert scalp.any() and (factor[:, ~scalp] == 1).all()
    assert abs(factor[0][scalp][0]) > 0.75 > abs(factor[1][scalp][0])
    assert sum(share for _, share in FAT) == pytest.approx(1.0, abs=1e-2)


def test_metal_has_no_signal_inside_and_turns_phases_outside(scan: BrainScan) -> None:
    factor = metal(scan, 3.0)
    z, y, x = (n // 2 + round(c / side) for n, c, side in zip(scan.brain.shape, METAL[0], scan.voxel, strict=True))
    assert abs(factor[0, z, y, x]) < 0.1
    assert np.angle(factor[0, z + 3, y, x]) != 0 and (np.abs(factor) <= 1 + 1e-6).all()
    assert (factor[:, :, 0] == 1).all()


def test_coils_are_ten_times_as_bright_at_one_place_as_at_another(scan: BrainScan) -> None:
    assert surface_coil(scan, 3.0).max() == pytest.approx(10 * surface_coil(scan, 3.0).min())
    assert array_coil(scan, 3.0).max() >= 10 > array_coil(scan, 3.0).min() >= 1
    assert CONDITIONS["as it is"] == Condition()


def test_thick_planes_are_the_mean_of_thin_ones(scan: BrainScan) -> None:
    two = thick(scan, 2)
    assert two.images.shape == (2, 10, 80, 72) and two.voxel == (2 * scan.voxel[0], *scan.voxel[1:])
    torch.testing.assert_close(two.images[:, 3], (scan.images[:, 6] + scan.images[:, 7]) / 2)
    torch.testing.assert_close(two.chi[3], (scan.chi[6] + scan.chi[7]) / 2)
    assert bool((two.labels[3][scan.labels[6] != scan.labels[7]] == 0).all())
