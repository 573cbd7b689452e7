"""CG-SENSE against a dense least-squares solution and the truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from recon_core.methods import cg_sense
from recon_core.methods.cg_sense import Settings, reconstruct
from recon_core.problem import pose
from recon_core.types import Report
from tests.recon_core.small_series import centred_fft, small_series


def test_equals_the_dense_solution_of_one_column() -> None:
    """Regularised normal equations of readout column 4, written out as a matrix in double precision."""
    series = small_series((1, 16, 8), n_states=2, n_coils=3, keep=0.5, n_acs=4)
    result = reconstruct(series.kspace, series.scan, Settings(iterations=300, tolerance=1e-7), Report())
    weight, state, column = result.quality["weight"], 1, 4
    maps = series.kspace.coil_maps
    assert maps is not None
    fourier = centred_fft(np.eye(16, dtype=complex), (0,))
    mask = series.kspace.mask[state, 0].numpy()
    rows = [mask[:, None] * fourier * maps[coil, 0, :, column].numpy()[None] for coil in range(3)]
    a = np.concatenate(rows)
    b = np.concatenate([series.kspace.data[state, coil, 0, :, column].numpy() for coil in range(3)])
    expected = np.linalg.solve(a.conj().T @ a + weight * np.eye(16), a.conj().T @ b)
    np.testing.assert_allclose(result.images[0].data[state, 0, :, column].numpy(), expected, atol=2e-4 * abs(expected).max())


def test_fully_sampled_is_exact() -> None:
    series = small_series(keep=1.0, noise=1e-5)
    assert series.error(reconstruct(series.kspace, series.scan, Settings(), Report()).images[0].data) < 1e-3


@pytest.mark.parametrize("noise", [0.003, 0.03])
def test_default_weight_suits_the_noise(noise: float) -> None:
    series = small_series((1, 48, 40), keep=0.3, noise=noise)
    errors = [
        series.error(reconstruct(series.kspace, series.scan, Settings(weight=weight), Report()).images[0].data)
        for weight in (0.1, 1.0, 10.0)
    ]
    assert errors[1] < 1.1 * min(errors)


def test_says_when_it_has_not_converged() -> None:
    series = small_series(keep=0.2)
    result = reconstruct(series.kspace, series.scan, Settings(iterations=2, tolerance=1e-6), Report())
    assert "not converged" in result.notes[0] and result.quality["cg_residual"] > 1e-6
    assert not reconstruct(series.kspace, series.scan, Settings(iterations=200), Report()).notes


def test_states_do_not_see_each_other() -> None:
    series = small_series(n_states=3)
    problem = pose(series.kspace, "", Report())
    rhs = problem.rhs.clone()
    rhs[2] *= 100
    one = cg_sense.solve(problem, 0.01, 30, 1e-4, Report())
    other = cg_sense.solve(replace(problem, rhs=rhs), 0.01, 30, 1e-4, Report())
    torch.testing.assert_close(other.solution[:2], one.solution[:2])
    torch.testing.assert_close(other.solution[2], one.solution[2] * 100, rtol=1e-3, atol=1e-2)


def test_scale_puts_the_brightest_state_near_one() -> None:
    """Also when the calibration lines are a mean over states in which signs cancel."""
    series = small_series(keep=1.0)
    acs = series.kspace.data.mean(0) * 0.01
    problem = pose(replace(series.kspace, acs=acs), "", Report())
    assert 0.7 < problem.scale < 1.3
