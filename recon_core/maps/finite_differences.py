"""Differences between neighbouring voxels of a volume, and their adjoint: what total variation and edges are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recon_core.errors import DataError

Tensor = torch.Tensor


def relative_steps(voxel: Sequence[float]) -> tuple[float, float, float]:
    """Voxel sides ``(z, y, x)`` over their geometric mean: a gradient then has the map's unit, whatever the resolution.

    Raises
    ------
    DataError
        Not three finite lengths above zero.
    """
    if len(voxel) != 3 or not all(math.isfinite(v) and v > 0 for v in voxel):
        raise DataError("not a voxel size", where="maps", got=tuple(voxel), expected="(z, y, x) in m, above zero")
    mean = math.prod(voxel) ** (1 / 3)
    z, y, x = (float(v) / mean for v in voxel)
    return z, y, x


def gradient(x: Tensor, steps: Sequence[float], *, periodic: bool = False) -> Tensor:
    """Forward differences ``(x[i + 1] - x[i]) / step``, real ``(z, y, x)`` to ``(3, z, y, x)``.

    The last difference of every axis is 0, or wraps to the first voxel when ``periodic``.
    """
    out = torch.empty((3, *x.shape), dtype=x.dtype, device=x.device)
    for axis, step in enumerate(steps):
        n = x.shape[axis]
        part = out[axis]
        torch.sub(x.narrow(axis, 1, n - 1), x.narrow(axis, 0, n - 1), out=part.narrow(axis, 0, n - 1))
        last = part.narrow(axis, n - 1, 1)
        if periodic:
            torch.sub(x.narrow(axis, 0, 1), x.narrow(axis, n - 1, 1), out=last)
        else:
            last.zero_()
        part /= step
    return out


def divergence(v: Tensor, steps: Sequence[float], *, periodic: bool = False) -> Tensor:
    """Minus the adjoint of `gradient`: ``<gradient(x), v> = -<x, divergence(v)>``; ``(3, z, y, x)`` to ``(z, y, x)``."""
    out = torch.zeros_like(v[0])
    for axis, step in enumerate(steps):
        n = v.shape[axis + 1]
        part = v[axis] / step
        if not periodic:
            part.narrow(axis, n - 1, 1).zero_()  # that difference does not exist
        out += part
        out.narrow(axis, 1, n - 1).sub_(part.narrow(axis, 0, n - 1))
        out.narrow(axis, 0, 1).sub_(part.narrow(axis, n - 1, 1))
    return out


def periodic_laplacian(shape: Sequence[int], steps: Sequence[float], like: Tensor) -> Tensor:
    """Eigenvalues of ``gradient^T gradient`` (periodic) on the half spectrum of `torch.fft.rfftn`: ``(z, y, x // 2 + 1)``."""
    total: Tensor | None = None
    for axis, (n, step) in enumerate(zip(shape, steps, strict=True)):
        count = n // 2 + 1 if axis == 2 else n
        k = torch.arange(count, dtype=like.dtype, device=like.device)
        value = ((2 - 2 * torch.cos(2 * math.pi * k / n)) / step**2).reshape([-1 if a == axis else 1 for a in range(3)])
        total = value if total is None else total + value
    assert total is not None
    return total
