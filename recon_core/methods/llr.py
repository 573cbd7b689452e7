"""Locally low rank over states: small blocks of the series have few independent time courses."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from recon_core.methods import cg_sense
from recon_core.problem import Problem, pose
from recon_core.settings import setting
from recon_core.solvers.low_rank import LocallyLowRank
from recon_core.solvers.proximal import ProximalResult, proximal_gradient
from recon_core.types import ImageSeries, KSpace, Report, Result, ScanInfo

NAME = "llr"
SUMMARY = "Locally low rank over states, with parallel imaging"
NEEDS_COIL_MAPS = True

WEIGHT = 0.25
"""Threshold as a part of the largest singular value of a block of pure noise (the gradient step damps noise, so it is below 1).
A compromise: phantoms like it higher, a measured series lower (``benchmarks/llr_weight.py`` prints the scan)."""

LEAST_NOISE = 1e-3
"""Noise, relative to the peak, below which undersampling artefacts and float32 matter more."""

START_NOISE = 0.06
"""Thresholds begin as if this were the noise: undersampling artefacts, not noise, rule the first iterations."""

DESCENT = 0.75
"""Part of the iterations over which threshold and power change."""

WARM_START_WEIGHT, WARM_START_ITERATIONS = 0.03, 8
"""Tikhonov weight and iterations of the CG-SENSE images from which the iterations start."""

FINAL_GRIDS = 4
"""Block grids averaged in the last step, so that no block edge stays visible."""

SEED = 20
"""Of the block grids' displacements: the same data give the same images."""


@dataclass(frozen=True)
class Settings:
    """How strongly, on which blocks and how long."""

    weight: float = setting(1.0, "threshold, as a multiple of the noise-scaled default", low=0.0, high=1000.0)
    block: int = setting(6, "side of the blocks in 2D", unit="pixels", low=2, high=64)
    block_3d: int = setting(4, "side of the blocks in 3D", unit="voxels", low=2, high=32)
    power: float = setting(
        0.0,
        "p of the shrinkage: 1 soft threshold (nuclear norm), less keeps strong components whole; 0: by the noise",
        low=0.0,
        high=1.0,
    )
    iterations: int = setting(30, "most iterations", low=1, high=2000)
    tolerance: float = setting(0.0, "relative change at which to stop early; 0 runs all iterations", low=0.0, high=0.1)


def shrinkage_power(noise: float) -> float:
    """p of the shrinkage for a noise level relative to the peak: 0.6 up to 1 %, rising with its logarithm to 0.9 at 4 %.

    The nuclear norm's bias is the larger error when there is little noise; variance is when there is much.
    """
    return min(0.9, max(0.6, 0.6 + 0.3 * math.log(max(noise, 1e-12) / 0.01) / math.log(4)))


def solve(
    problem: Problem,
    lift: Callable[[torch.Tensor], torch.Tensor],
    lower: Callable[[torch.Tensor], torch.Tensor],
    initial: torch.Tensor,
    settings: Settings,
    report: Report,
    *,
    start_noise: float = START_NOISE,
) -> ProximalResult:
    """``min_c |A lift(c) - b|^2 / 2 + weight sum_b |B_b c|_p`` by FISTA over randomly displaced block grids.

    ``lift`` and its adjoint ``lower`` lead from coefficient images to states; both are the identity for plain LLR. For an
    orthonormal basis a block of coefficients has the singular values of the block of states, so the thresholds agree.
    Thresholds begin as if ``start_noise`` were the noise; with 0 they are the final ones from the first iteration on.
    """
    operator = problem.operator
    side = settings.block_3d if initial.shape[-2] > 1 else settings.block
    # working order (x, z, y)
    regulariser = LocallyLowRank((side, side, side))
    spatial = tuple(initial.shape[1:])
    sides = regulariser.sides(spatial)
    noise = max(problem.noise, LEAST_NOISE)
    step = 1.0 / operator.norm_bound
    final = settings.weight * WEIGHT * noise * regulariser.noise_threshold(spatial, len(initial)) * step
    first = final * max(1.0, start_noise / noise)
    power = settings.power or shrinkage_power(noise)
    target = lower(problem.rhs)
    grids = np.random.default_rng(SEED)
    descent = max(1, round(settings.iterations * DESCENT))

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return lower(operator.normal(lift(x))).sub_(target)

    def prox(z: torch.Tensor, iteration: int) -> torch.Tensor:
        # first part of the iterations: threshold from `first` to `final`, power from 1 (convex) to its goal
        part = min(1.0, iteration / descent)
        threshold = final * (first / final) ** (1 - part) if final > 0 else 0.0
        now = 1.0 + (power - 1.0) * part
        n_grids = FINAL_GRIDS if iteration == settings.iterations - 1 else 1
        shifts = [tuple(int(grids.integers(n)) for n in sides) for _ in range(n_grids)]
        if n_grids == 1:
            return regulariser.shrink(z, shifts[0], threshold, now, out=z)
        total = regulariser.shrink(z, shifts[0], threshold, now)
        for shift in shifts[1:]:
            regulariser.shrink(z, shift, threshold, now, out=total, add=True)
        return total.div_(n_grids)

    return proximal_gradient(
        gradient,
        prox,
        initial,
        step=step,
        max_iterations=settings.iterations,
        tolerance=settings.tolerance,
        min_iterations=descent + 1,
        on_iteration=lambda done: report.progress(done / settings.iterations, NAME),
    )


UNCONVERGED = 0.02
"""Relative change of the last step above which the operator is told. Random grids alone keep it near 0.003."""


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """``argmin_x |W (F S x - k)|^2 / 2 + weight sum_b |B_b x|_p``; complex64 ``(state, z, y, x)``.

    ``B_b x`` is the matrix pixels x states of block b. The default weight follows the noise: a block of pure noise of standard
    deviation ``sigma`` has singular values up to ``sigma (sqrt(pixels) + sqrt(states))`` (Marchenko-Pastur). Starts from a few
    iterations of CG-SENSE; the threshold falls and the shrinkage leaves the convex case during the first three quarters (continuation).

    A single state has no rank to speak of and is reconstructed by ``cg_sense``; the result's notes say so.

    Raises
    ------
    DataError, CalibrationError
        See ``recon_core.problem.pose``.

    References
    ----------
    Zhang, Pauly & Levesque, Magn. Reson. Med. 73 (2015) 655 (LLR); Trzasko & Manduca, ISMRM 2011, 4371. Deviations: p-shrinkage,
    continuation, and a noise-scaled weight.
    """
    if kspace.n_states == 1:
        text = "llr: only one state, nothing to be low rank over; reconstructed by cg_sense"
        report.warn(text)
        single = cg_sense.reconstruct(kspace, scan, cg_sense.Settings(), report)
        return Result(images=single.images, quality=single.quality, notes=(text, *single.notes))
    problem = pose(kspace, f"slice {scan.slice_index}", report)
    solved = estimate(problem, settings, report)
    return finish(NAME, problem, solved.solution, solved, report)


def estimate(problem: Problem, settings: Settings, report: Report) -> ProximalResult:
    """The method on a posed problem of two or more states: working images, scaled units.

    Beside the problem five arrays of the images' size are held at most; everything else is done for a part of the readout positions
    or of the states at a time.
    """
    start = torch.empty_like(problem.rhs)
    for state, into in enumerate(start):
        one = problem.state(state)
        into.copy_(cg_sense.solve(one, WARM_START_WEIGHT, WARM_START_ITERATIONS, 1e-3, Report()).solution[0])
    return solve(problem, _same, _same, start, settings, report)


def refine(problem: Problem, images: torch.Tensor, iterations: int, report: Report) -> ProximalResult:
    """A few steps of the method, with its defaults, from images that are good already: working images, scaled units."""
    return solve(problem, _same, _same, images, Settings(iterations=iterations), report, start_noise=0.0)


def restore(problem: Problem, images: torch.Tensor, iterations: int, report: Report) -> ProximalResult:
    """One Bregman iteration: a few steps of the method from regularised images, the residual of the data added to the data.

    What a penalty holds back of small and faint structures is still in ``b - A x``. With ``b + (b - A x)`` for the data the same penalty
    gives it back, and some noise with it: less than a smaller weight would cost for the same contrast. Working images, scaled units.

    References
    ----------
    Osher et al., Multiscale Model. Simul. 4 (2005) 460, Eq. 3.
    """
    rhs = problem.operator.normal(images).neg_().add_(problem.rhs, alpha=2.0)
    return refine(replace(problem, rhs=rhs), images, iterations, report)


def finish(name: str, problem: Problem, images: torch.Tensor, solved: ProximalResult, report: Report) -> Result:
    """The result of an iterative method, with its figures of merit and what the operator has to know."""
    notes = []
    if not bool((images != 0).any()) and bool((problem.rhs != 0).any()):
        notes.append(f"{name}: the threshold has taken all signal away, the images are black; a smaller weight keeps it")
        report.warn(notes[0])
    elif solved.change > UNCONVERGED:
        notes.append(f"{name}: still changing by {100 * solved.change:.1f} % in iteration {solved.iterations}")
        report.warn(notes[0])
    report.progress(1.0)
    return Result(
        images=(ImageSeries("image", problem.leave(images)),),
        quality={
            "iterations": float(solved.iterations),
            "last_change": solved.change,
            "restarts": float(solved.restarts),
            "noise": problem.noise,
        },
        notes=tuple(notes),
    )


def _same(x: torch.Tensor) -> torch.Tensor:
    return x
