"""GRASP-Pro: time courses live in a subspace that the centre lines of all states reveal; only its coefficients are unknown."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from recon_core.errors import CalibrationError, DataError
from recon_core.methods import llr
from recon_core.operators.linear import Composed, Subspace
from recon_core.problem import pose
from recon_core.settings import setting
from recon_core.solvers.cg import conjugate_gradient
from recon_core.types import KSpace, Report, Result, ScanInfo

NAME = "grasp_pro"
SUMMARY = "Temporal subspace from the centre lines, locally low rank coefficient images"
NEEDS_COIL_MAPS = True

FEWEST_STATES = 4
"""Below this a subspace is no restriction worth the name."""

FEWEST_LINES = 4
"""Centre lines that all states must share."""

GRAM_BLOCK = 1 << 16
"""Samples per state that are held in double precision at a time."""

NOISE_MARGIN = 1.1
"""A component counts when its singular value is so many times the largest that noise alone would have."""


@dataclass(frozen=True)
class Settings:
    """Size of the subspace, and the settings of the locally low rank step on its coefficients."""

    components: int = setting(0, "size of the temporal subspace; 0: all components above the noise", low=0, high=256)
    weight: float = setting(1.0, "threshold, as a multiple of the noise-scaled default", low=0.0, high=1000.0)
    block: int = setting(6, "side of the blocks in 2D", unit="pixels", low=2, high=64)
    block_3d: int = setting(4, "side of the blocks in 3D", unit="voxels", low=2, high=32)
    power: float = setting(0.0, "p of the shrinkage, 1: soft threshold; 0: by the noise", low=0.0, high=1.0)
    iterations: int = setting(30, "most iterations", low=1, high=2000)
    tolerance: float = setting(0.0, "relative change at which to stop early; 0 runs all iterations", low=0.0, high=0.1)


def temporal_basis(kspace: KSpace, components: int, noise: float, where: str) -> torch.Tensor:
    """Orthonormal time courses ``(state, component)`` of the centre lines, strongest first.

    The lines that every state holds, ``C[s, (coil, k2, k1, x)]``, are decomposed as ``C = V S U^H``; the first columns of V are
    the basis. With ``components`` = 0 those count whose singular value exceeds ``1.1 noise (sqrt(samples) + sqrt(states))``,
    the largest that noise alone would have.

    Parameters
    ----------
    noise
        Standard deviation of one complex sample of ``kspace.data``.

    Raises
    ------
    DataError
        Fewer than 4 states.
    CalibrationError
        Fewer than 4 lines in common, or no signal in them.
    """
    n_states = kspace.n_states
    if n_states < FEWEST_STATES:
        raise DataError(
            "too few states for a temporal subspace",
            where=where,
            got=n_states,
            expected=f">= {FEWEST_STATES}",
            remedy="Use llr or cg_sense",
        )
    common = kspace.mask.all(0)
    n_lines = int(common.sum())
    if n_lines < FEWEST_LINES:
        raise CalibrationError(
            "the states share too few lines to find their time courses",
            where=where,
            got=f"{n_lines} lines",
            expected=f">= {FEWEST_LINES}",
            remedy="Acquire the same centre lines in every state, or use llr",
        )
    samples = kspace.data.movedim(1, -1)[:, common].reshape(n_states, -1)
    peak = float(samples.abs().max())
    if peak == 0:
        raise CalibrationError("the shared centre lines hold no signal", where=where, remedy="Use cg_sense")
    samples = samples / peak
    # the Gram matrix of the states, *summed* in double precision: its condition number is the square, and in single precision
    # the number of components depended on the number of threads
    gram = torch.zeros(n_states, n_states, dtype=torch.complex128, device=samples.device)
    for block in samples.split(GRAM_BLOCK, dim=1):
        double = block.to(torch.complex128)
        gram += double @ double.mH
    squares, vectors = torch.linalg.eigh(gram)
    singular = squares.clamp_min(0).sqrt().flip(0)
    basis = vectors.flip(1).to(torch.complex64)
    if components == 0:
        edge = NOISE_MARGIN * noise / peak * (math.sqrt(samples.shape[1]) + math.sqrt(n_states))
        # float32 data cannot tell smaller components from rounding
        edge = max(edge, 1e-5 * float(singular[0]))
        components = int((singular > edge).sum())
    return basis[:, : max(1, min(components, n_states))].contiguous()


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """``argmin_c |W (F S V c - k)|^2 / 2 + weight sum_b |B_b c|_p``, images ``V c``; complex64 ``(state, z, y, x)``.

    ``V`` is :func:`temporal_basis`. Regularised by local low rank of the coefficient images (the original uses temporal total
    variation of ``V c``, which suits breathing-resolved contrast uptake; states here may be contrasts without order). Starts
    from CG in the subspace.

    Raises
    ------
    DataError, CalibrationError
        See :func:`temporal_basis` and ``recon_core.problem.pose``.

    References
    ----------
    Feng et al., Magn. Reson. Med. 83 (2020) 94, eqs 3-5.
    """
    where = f"slice {scan.slice_index}"
    problem = pose(kspace, where, report)
    # pose's noise belongs to the typical count; the basis sees unweighted samples, which are at most a little noisier
    basis = temporal_basis(kspace, settings.components, problem.noise * problem.scale, where)
    subspace = Subspace(basis.to(problem.rhs.device))
    model = Composed(problem.operator, subspace)
    start = conjugate_gradient(
        lambda c: model.normal(c).add_(c, alpha=llr.WARM_START_WEIGHT),
        subspace.adjoint(problem.rhs),
        max_iterations=llr.WARM_START_ITERATIONS,
        tolerance=1e-3,
        n_batch_axes=0,
    )
    inner = llr.Settings(
        **{name: getattr(settings, name) for name in ("weight", "block", "block_3d", "power", "iterations", "tolerance")}
    )
    solved = llr.solve(problem, subspace.forward, subspace.adjoint, start.solution, inner, report)
    result = llr.finish(NAME, problem, subspace.forward(solved.solution), solved, report)
    return replace(
        result,
        quality={**result.quality, "components": float(basis.shape[1])},
        extras={"temporal_basis": basis.cpu().numpy()},
    )
