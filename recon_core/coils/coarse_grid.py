"""Coil maps are smooth: find them on a coarse grid, give them a smooth phase there, and interpolate.

A coil map is an eigenvector at every position, and its phase is arbitrary position by position. Fixing it by one coil (or
one virtual coil) leaves a phase vortex wherever that coil has a zero. Here the phases are chosen together, so that
neighbouring vectors agree best: angular synchronisation (Singer, Appl Comput Harmon Anal 30:20, 2011) with the overlaps of
neighbours as the connection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

from recon_core.errors import CalibrationError

Tensor = torch.Tensor

TOLERANCE = 1e-6
"""Of the leading eigenvalue. It is near 1 and its distance to the next about 1 / (grid points along an axis)^2."""

WEIGHT_FLOOR = 1e-3
"""Weight of a position without signal in the choice of phases, relative to the brightest position."""


@dataclass(frozen=True)
class GridAxis:
    """Positions ``start + i * step``, i < ``n_coarse``, in pixels of an axis of ``n`` pixels; 0 is the centre ``n // 2``."""

    n: int
    n_coarse: int
    start: float
    step: float

    @classmethod
    def spanning(cls, n: int, n_coarse: int) -> GridAxis:
        """From the first to the last pixel; every pixel when there are no more than ``n_coarse``."""
        m = min(n, n_coarse)
        return cls(n, m, -float(n // 2), (n - 1) / (m - 1) if m > 1 else 1.0)

    @classmethod
    def low_resolution(cls, n: int, n_coarse: int) -> GridAxis:
        """The pixels of an image from the ``n_coarse`` central k-space samples."""
        m = min(n, n_coarse)
        return cls(n, m, -(m // 2) * n / m, n / m)

    @property
    def positions(self) -> Tensor:
        return self.start + self.step * torch.arange(self.n_coarse, dtype=torch.float64)


def interpolation_matrix(axis: GridAxis) -> Tensor:
    """float32 ``(n, n_coarse)``: cubic convolution (Keys, a = -1/2); the outermost values continue beyond the ends."""
    m = axis.n_coarse
    t = (torch.arange(axis.n, dtype=torch.float64) - axis.n // 2 - axis.start) / axis.step
    t = t.clamp(0, m - 1)
    base = t.floor()
    f = t - base
    weights = (
        ((-0.5 * f + 1.0) * f - 0.5) * f,
        (1.5 * f - 2.5) * f * f + 1.0,
        ((-1.5 * f + 2.0) * f + 0.5) * f,
        (0.5 * f - 0.5) * f * f,
    )
    matrix = torch.zeros(axis.n, m, dtype=torch.float64)
    rows = torch.arange(axis.n)
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        columns = (base.long() + offset).clamp(0, m - 1)
        matrix.index_put_((rows, columns), weight, accumulate=True)
    return matrix.float()


def interpolate(values: Tensor, axes: Sequence[GridAxis]) -> Tensor:
    """``(..., *coarse)`` to ``(..., *fine)`` over the last ``len(axes)`` axes."""
    out = values
    for i, axis in enumerate(axes):
        if axis.n_coarse == axis.n:
            continue
        dim = i - len(axes)
        matrix = interpolation_matrix(axis).to(out.device, out.dtype)
        out = torch.movedim(torch.movedim(out, dim, -1) @ matrix.mT, -1, dim)
    return out


def coil_energy(calibration: Tensor, where: str) -> tuple[Tensor, float]:
    """Energy of each coil in units of the largest sample squared, float64 ``(coil,)``, and that sample's magnitude.

    Raises
    ------
    CalibrationError
        All is zero, or a value is not finite.
    """
    peak = float(calibration.abs().max())
    if not math.isfinite(peak) or peak == 0:
        raise CalibrationError("no signal, or not finite, in the calibration lines", where=where, got=f"largest {peak}")
    # squares of very small or large samples do not fit float32
    return (calibration / peak).abs().flatten(1).square().sum(1, dtype=torch.float64), peak


def low_resolution_images(block: Tensor, axes: Sequence[GridAxis]) -> tuple[Tensor, float]:
    """Images of a Hann-windowed block of k-space at the coarse positions.

    A hard edge would spread the object over the background. ``block`` is ``(coil, *k)``; returns ``(coil, *coarse)`` and the
    factor by which the SD of its noise is smaller than that of the samples.
    """
    images = block
    gain = 1.0
    for i, axis in enumerate(axes):
        n = int(block.shape[1 + i])
        k = torch.arange(n, dtype=torch.float64) - n // 2
        window = torch.cos(math.pi * (k + (0.5 if n % 2 == 0 else 0.0)) / (n + 1)).square()
        waves = torch.exp(2j * math.pi * torch.outer(axis.positions, k) / axis.n) * window / math.sqrt(axis.n)
        gain *= float(window.square().sum()) / axis.n
        images = torch.movedim(torch.movedim(images, 1 + i, -1) @ waves.to(block.device, block.dtype).mT, -1, 1 + i)
    return images, math.sqrt(gain)


def leading_eigenvector(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue and unit eigenvector of Hermitian ``(..., coil, coil)``: ``(...)`` and ``(..., coil)``."""
    values, vectors = torch.linalg.eigh(matrices)
    if not bool(torch.isfinite(values[..., -1]).all()):
        raise CalibrationError("calibration data are not finite", where="coil maps", remedy="Check the raw data for NaN")
    return values[..., -1], vectors[..., -1]


def align_phases(vectors: Tensor, energy: Tensor) -> Tensor:
    """Choose the free phase of every vector so that neighbours agree.

    Maximises ``sum_edges w_ij Re(conj(p_i) p_j v_i^H v_j)`` over phases ``p``, relaxed to the leading eigenvector of the
    degree-normalised connection matrix. The one phase left is set by the strongest coil of the energy-weighted mean vector.

    Parameters
    ----------
    vectors
        complex ``(*grid, coil)``, unit length.
    energy
        ``(*grid)``, non-negative: where the phase matters (squared signal).

    Returns
    -------
    ``vectors`` times a phase for each position.
    """
    grid = vectors.shape[:-1]
    v = vectors.reshape(-1, vectors.shape[-1]).to(torch.complex128).cpu()
    e = energy.reshape(-1).double().cpu()
    weight = WEIGHT_FLOOR + e / e.max().clamp_min(1e-300)
    index = torch.arange(len(v)).reshape(grid)
    ends = []
    for axis in range(len(grid)):
        n = grid[axis]
        ends.append(torch.stack([index.narrow(axis, 0, n - 1).reshape(-1), index.narrow(axis, 1, n - 1).reshape(-1)]))
    i, j = torch.cat(ends, dim=1)
    if len(i):
        w = (weight[i] * weight[j]).sqrt()
        degree = torch.zeros(len(v), dtype=torch.float64).index_add_(0, i, w).index_add_(0, j, w)
        overlap = (v[i].conj() * v[j]).sum(dim=1) * w / (degree[i] * degree[j]).sqrt()
        edges = sparse.coo_matrix((overlap.numpy(), (i.numpy(), j.numpy())), shape=(len(v), len(v)))
        connection = (edges + edges.conj().T).tocsr()
        v = v * torch.from_numpy(_leading_phase(connection, _first_guess(v, weight)))[:, None]
    mean = (e[:, None] * v).sum(dim=0)
    v = v * torch.sgn(mean[mean.abs().argmax()]).conj()
    return v.reshape(vectors.shape).to(vectors.device, vectors.dtype)


def _first_guess(v: Tensor, weight: Tensor) -> np.ndarray:
    """Phases relative to the principal virtual coil: right almost everywhere, with vortices at its zeros."""
    _, principal = torch.linalg.eigh((weight[:, None] * v).mT @ v.conj())
    return np.asarray(torch.sgn(v.conj() @ principal[:, -1]).numpy()) * np.sqrt(weight.numpy())


def _leading_phase(connection: sparse.csr_matrix, guess: np.ndarray) -> np.ndarray:
    if len(guess) < 4:
        return _phase_of(guess)
    # the guess may be orthogonal to the answer (a sign change across a zero): a fixed random part opens every direction
    random = np.random.default_rng(0).standard_normal((2, len(guess)))
    start = guess + np.abs(guess).mean() * (random[0] + 1j * random[1])
    try:
        _, vectors = eigsh(connection, k=1, which="LA", v0=start, tol=TOLERANCE, ncv=min(len(guess) - 1, 32), maxiter=400)
        return _phase_of(vectors[:, 0])
    except ArpackNoConvergence:
        # any phases are valid maps; these are merely less smooth
        return _phase_of(guess)


def _phase_of(z: np.ndarray) -> np.ndarray:
    magnitude = np.abs(z)
    return np.where(magnitude > 0, z / np.where(magnitude > 0, magnitude, 1.0), 1.0)
