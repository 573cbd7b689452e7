"""CG-SENSE: every state on its own by regularised least squares over all coils."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recon_core.problem import Problem, pose
from recon_core.settings import setting
from recon_core.solvers.cg import CGResult, conjugate_gradient
from recon_core.types import ImageSeries, KSpace, Report, Result, ScanInfo

NAME = "cg_sense"
SUMMARY = "Parallel imaging by regularised least squares, state by state"
NEEDS_COIL_MAPS = True
SEPARABLE = True

SIGNAL_POWER = 0.04
"""Mean square of an image whose peak is 1, for the Wiener weight noise^2 / signal^2. Within 4 % of the best nRMSE on ten
cases of 0.3 to 4 % noise, 4x and 8x, inversion recovery, cine and measured kidney."""

LEAST_WEIGHT = 1e-4
"""Keeps noiseless data solvable in float32."""


@dataclass(frozen=True)
class Settings:
    """How much and how long."""

    weight: float = setting(1.0, "Tikhonov weight, as a multiple of noise power over signal power", low=0.0, high=1e6)
    iterations: int = setting(30, "most CG iterations", low=1, high=1000)
    tolerance: float = setting(1e-3, "relative residual at which a state is done", low=1e-7, high=0.5)


def tikhonov_weight(noise: float, multiple: float) -> float:
    """``multiple * noise^2 / SIGNAL_POWER``, at least ``LEAST_WEIGHT``, in scaled units."""
    return max(multiple * noise**2 / SIGNAL_POWER, LEAST_WEIGHT)


def solve(problem: Problem, weight: float, iterations: int, tolerance: float, report: Report) -> CGResult:
    """``(A^H A + weight) x = A^H b``, each state with its own steps."""
    normal = problem.operator.normal
    return conjugate_gradient(
        lambda x: normal(x).add_(x, alpha=weight),
        problem.rhs,
        max_iterations=iterations,
        tolerance=tolerance,
        on_iteration=lambda done: report.progress(done / iterations, "CG"),
    )


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """``argmin_x |W (F S x - k)|^2 + weight |x|^2`` for every state; complex64 ``(state, z, y, x)``.

    The weight is ``noise^2 / signal^2`` in units in which the image peaks near 1, that is the Wiener filter of an image that
    is white over the pixels; the noise is measured, or estimated from the outer k-space.

    Raises
    ------
    DataError, CalibrationError
        See ``recon_core.problem.pose``.

    References
    ----------
    Pruessmann et al., Magn. Reson. Med. 46 (2001) 638, eqs 22-27.
    """
    problem = pose(kspace, f"slice {scan.slice_index}", report)
    weight = tikhonov_weight(problem.noise, settings.weight)
    n_states = kspace.n_states
    # one after the other: sums over all states at once are ordered by how many there are, and easy states would wait for hard ones
    solved = [
        solve(problem.state(state), weight, settings.iterations, settings.tolerance, _Share(report, state, n_states))
        for state in range(n_states)
    ]
    notes = []
    if not all(state.all_converged for state in solved):
        # the residual is among the figures: every worker that computes some of the states has the same words
        notes.append(f"cg_sense: not converged to {settings.tolerance:.1e} after {settings.iterations} iterations")
        report.warn(notes[0])
    report.progress(1.0)
    return Result(
        images=(ImageSeries("image", problem.leave(torch.cat([state.solution for state in solved]))),),
        quality={
            "iterations": max(float(state.iterations.max()) for state in solved),
            "cg_residual": max(float(state.residual.max()) for state in solved),
            "weight": weight,
            "noise": problem.noise,
        },
        notes=tuple(notes),
    )


class _Share(Report):
    """The progress of one state as that of all."""

    def __init__(self, report: Report, state: int, n_states: int) -> None:
        self._report, self._state, self._n_states = report, state, n_states

    def progress(self, fraction: float, message: str = "") -> None:
        self._report.progress((self._state + fraction) / self._n_states, message)
