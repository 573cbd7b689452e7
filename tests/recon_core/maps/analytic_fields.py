"""Susceptibility shapes whose field is known in closed form, and a small head made of ellipsoids."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from recon_core.simulation.signal import dipole_field

Array = NDArray[np.float64]


def positions(shape: tuple[int, int, int], voxel: tuple[float, float, float], parts: int = 1) -> tuple[Array, Array, Array]:
    """Coordinates in m of (parts of) voxels, 0 at the volume's middle, broadcastable ``(z, y, x)``."""
    axes = [((np.arange(n * parts) + 0.5) / parts - n / 2) * d for n, d in zip(shape, voxel, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    return z, y, x


def mean_of_parts(fine: NDArray[np.generic], parts: int) -> Array:
    """Voxels as the mean of ``parts`` cubed samples."""
    z, y, x = (n // parts for n in fine.shape)
    return np.asarray(fine.reshape(z, parts, y, parts, x, parts).mean((1, 3, 5)), dtype=np.float64)


def sphere_field(where: tuple[Array, Array, Array], radius: float, b0: tuple[float, float, float]) -> Array:
    """Field over susceptibility: ``(a/r)^3 (3 cos^2 - 1) / 3`` outside, 0 inside (sphere of Lorentz)."""
    z, y, x = where
    r2 = z**2 + y**2 + x**2
    cos2 = (z * b0[0] + y * b0[1] + x * b0[2]) ** 2 / np.maximum(r2, 1e-12)
    return np.where(r2 > radius**2, (radius**2 / np.maximum(r2, 1e-12)) ** 1.5 * (3 * cos2 - 1) / 3, 0.0)


@dataclass(frozen=True)
class Head:
    """float64 ``(z, y, x)``, ppm: true susceptibility, its field (computed on a grid twice as fine), brain, magnitude, fluid."""

    chi: torch.Tensor
    field: torch.Tensor
    mask: torch.Tensor
    magnitude: torch.Tensor
    fluid: torch.Tensor
    voxel: tuple[float, float, float]
    b0: tuple[float, float, float]


# centre and half axes in m (z, y, x), ppm, magnitude
PARTS = (
    ((0.0, 0.0, 0.0), (0.026, 0.030, 0.026), -0.02, 0.8),
    ((0.006, 0.002, 0.0), (0.006, 0.013, 0.005), 0.0, 1.2),  # fluid
    ((-0.002, -0.006, 0.013), (0.006, 0.008, 0.004), 0.17, 0.5),
    ((-0.002, -0.006, -0.013), (0.006, 0.008, 0.004), 0.17, 0.5),
    ((-0.010, 0.010, 0.006), (0.004, 0.004, 0.004), 0.12, 0.6),
    ((0.014, -0.010, 0.006), (0.003, 0.010, 0.003), 0.08, 0.7),
)


def small_head(side: float = 0.002, *, b0: tuple[float, float, float] = (1.0, 0.0, 0.0), noise: float = 0.0) -> Head:
    """About 30 x 34 x 30 voxels of ``side`` m."""
    shape = tuple(2 * round(e / side / 2) for e in (0.060, 0.068, 0.060))
    voxel = (side, side, side)
    where = positions(shape, voxel, 2)  # type: ignore[arg-type]
    maps = {name: np.zeros([2 * n for n in shape]) for name in ("chi", "magnitude", "label")}
    for index, (centre, axes, chi, magnitude) in enumerate(PARTS):
        level = sum(((w - c) / a) ** 2 for w, c, a in zip(where, centre, axes, strict=True))
        for name, value in zip(maps, (chi, magnitude, index + 1), strict=True):
            maps[name][level < 1] = value
    fine = dipole_field(maps["chi"].astype(np.float32), (side / 2,) * 3, b0, 1.0) / 42.577478518
    mask = mean_of_parts(maps["label"] > 0, 2) > 0.99
    field = mean_of_parts(fine, 2) + noise * np.random.default_rng(3).standard_normal(shape)
    arrays = (np.where(mask, mean_of_parts(maps["chi"], 2), 0), np.where(mask, field, 0), mask)
    fluid = mean_of_parts(maps["label"] == 2, 2) > 0.99
    chi, local, inside = (torch.from_numpy(a) for a in arrays)
    return Head(
        chi, local, inside, torch.from_numpy(mean_of_parts(maps["magnitude"], 2)), torch.from_numpy(fluid), voxel, b0
    )
