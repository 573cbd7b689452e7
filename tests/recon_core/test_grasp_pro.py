"""GRASP-Pro: the subspace against the known time courses, the images against the truth, typed errors where it cannot work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recon_core.errors import CalibrationError, DataError
from recon_core.methods import cg_sense, grasp_pro
from recon_core.types import Report
from tests.recon_core.small_series import small_series


def test_basis_spans_the_two_recovery_curves() -> None:
    series = small_series((1, 48, 40), n_states=9, noise=0.002)
    basis = grasp_pro.temporal_basis(series.kspace, 0, 0.002, "slice 0").numpy()
    times = np.geomspace(0.1, 3, 9)
    assert basis.shape == (9, 2)
    np.testing.assert_allclose(basis.conj().T @ basis, np.eye(2), atol=1e-5)
    for t1 in (1.2, 0.35):
        curve = 1 - 2 * np.exp(-times / t1)
        assert np.linalg.norm(curve - basis @ (basis.conj().T @ curve)) < 0.01 * np.linalg.norm(curve)


def test_size_of_the_subspace_falls_with_the_noise_and_can_be_set() -> None:
    quiet, loud = small_series(noise=0.002), small_series(noise=0.5)
    sizes = [grasp_pro.temporal_basis(s.kspace, 0, float(s.kspace.noise_std or 0), "").shape[1] for s in (quiet, loud)]
    assert sizes == [2, 1]
    assert grasp_pro.temporal_basis(quiet.kspace, 4, 0.002, "").shape == (6, 4)
    assert grasp_pro.temporal_basis(quiet.kspace, 40, 0.002, "").shape == (6, 6)


def test_pure_noise_leaves_one_component() -> None:
    series = small_series()
    noise = torch.randn(series.kspace.data.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    assert grasp_pro.temporal_basis(replace(series.kspace, data=noise), 0, 1.0, "").shape[1] == 1


@pytest.mark.parametrize("shape", [(1, 48, 40), (8, 20, 16)], ids=["2D", "3D"])
def test_far_better_than_sense(shape: tuple[int, int, int]) -> None:
    series = small_series(shape, n_states=8, keep=0.2)
    ours = grasp_pro.reconstruct(series.kspace, series.scan, grasp_pro.Settings(), Report())
    sense = cg_sense.reconstruct(series.kspace, series.scan, cg_sense.Settings(), Report())
    assert series.error(ours.images[0].data) < 0.45 * series.error(sense.images[0].data)
    assert ours.quality["components"] == 2.0 and ours.extras["temporal_basis"].shape == (8, 2)


def test_images_lie_in_the_subspace() -> None:
    series = small_series()
    result = grasp_pro.reconstruct(series.kspace, series.scan, grasp_pro.Settings(components=1), Report())
    singular = torch.linalg.svdvals(result.images[0].data.flatten(1))
    assert float(singular[1]) < 1e-4 * float(singular[0])


def test_too_few_states() -> None:
    series = small_series(n_states=3)
    with pytest.raises(DataError, match="too few states") as caught:
        grasp_pro.reconstruct(series.kspace, series.scan, grasp_pro.Settings(), Report())
    assert caught.value.remedy


def test_no_common_lines() -> None:
    series = small_series(keep=1.0)
    counts = series.kspace.counts.clone()
    for state in range(6):
        counts[state, :, torch.arange(32) % 6 != state] = 0
    interleaved = replace(series.kspace, counts=counts, data=series.kspace.data * (counts > 0)[:, None, :, :, None])
    with pytest.raises(CalibrationError, match="share too few lines") as caught:
        grasp_pro.reconstruct(interleaved, series.scan, grasp_pro.Settings(), Report())
    assert caught.value.remedy
