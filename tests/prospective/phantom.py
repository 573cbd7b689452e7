"""A phantom whose every number is known: spheres in an ellipsoid, with fields in closed form. numpy alone.

Lengths in m, axes ``(z, y, x)``, B0 along z. The ellipsoid's own field is uniform inside it (demagnetisation of an ellipsoid), so it
is nothing but the centre frequency. A sphere shifts nothing inside itself (Lorentz-corrected) and is a dipole outside:
``chi/3 (a/r)^3 (3 cos^2 - 1)``. A source outside the ellipsoid makes the background field that has to be removed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
ComplexArray = NDArray[np.complex128]
Vector = tuple[float, float, float]

GAMMA = 42.577478518e6  # Hz/T
R2 = 5.0  # 1/s, everywhere: what is left of R2* is reversible dephasing


@dataclass(frozen=True)
class Sphere:
    """``chi`` in ppm relative to the ellipsoid, ``r2star`` in 1/s."""

    centre: Vector
    radius: float
    chi: float
    r2star: float


@dataclass(frozen=True)
class Phantom:
    """``outside`` are sources of background field: no signal comes from them."""

    semi_axes: Vector
    r2star: float
    inserts: tuple[Sphere, ...]
    outside: tuple[Sphere, ...] = ()
    field_strength: float = 3.0
    t1: float = 1.0
    n_coils: int = 4

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Phantom:
        stored = json.loads(path.read_text(encoding="utf-8"))
        for group in ("inserts", "outside"):
            stored[group] = tuple(Sphere(**{**sphere, "centre": tuple(sphere["centre"])}) for sphere in stored[group])
        return cls(**stored | {"semi_axes": tuple(stored["semi_axes"])})


def grid(matrix: tuple[int, int, int], fov: Vector) -> list[FloatArray]:
    """Centres of the voxels along each axis, broadcastable; DC of the FFT and the origin are at index ``n // 2``."""
    axes = [(np.arange(n) - n // 2) * (length / n) for n, length in zip(matrix, fov, strict=True)]
    return list(np.meshgrid(*axes, indexing="ij", sparse=True))


def inside(sphere: Sphere, place: list[FloatArray], margin: float = 0.0) -> NDArray[np.bool_]:
    """Points deeper than ``margin`` in the sphere."""
    return np.asarray(_distance2(sphere.centre, place) <= max(0.0, sphere.radius - margin) ** 2)


def in_body(phantom: Phantom, place: list[FloatArray], margin: float = 0.0) -> NDArray[np.bool_]:
    """Points in the ellipsoid whose semi-axes are shortened by ``margin``."""
    return np.asarray(sum((p / (a - margin)) ** 2 for p, a in zip(place, phantom.semi_axes, strict=True)) <= 1.0)


def field(phantom: Phantom, place: list[FloatArray]) -> FloatArray:
    """Frequency shift in Hz."""
    total = np.zeros(np.broadcast_shapes(*(p.shape for p in place)))
    for sphere in (*phantom.inserts, *phantom.outside):
        r2 = np.maximum(_distance2(sphere.centre, place), 1e-12)
        cos2 = (place[0] - sphere.centre[0]) ** 2 / r2
        dipole = sphere.chi / 3 * (sphere.radius**2 / r2) ** 1.5 * (3 * cos2 - 1)
        total += np.where(r2 <= sphere.radius**2, 0.0, dipole)
    return total * 1e-6 * GAMMA * phantom.field_strength


def chi(phantom: Phantom, place: list[FloatArray]) -> FloatArray:
    """ppm."""
    return _painted(phantom, place, 0.0, "chi")


def r2star(phantom: Phantom, place: list[FloatArray]) -> FloatArray:
    """1/s."""
    return _painted(phantom, place, phantom.r2star, "r2star")


def coil_maps(phantom: Phantom, place: list[FloatArray]) -> ComplexArray:
    """``(coil, z, y, x)``: loops around z, alternately above and below, each with a phase that changes in space."""
    z, y, x = place
    a_z, a_y, a_x = phantom.semi_axes
    maps = []
    for coil in range(phantom.n_coils):
        angle = 2 * np.pi * coil / phantom.n_coils
        at = (0.5 * a_z * (-1) ** coil, 1.6 * a_y * np.sin(angle), 1.6 * a_x * np.cos(angle))
        distance2 = (z - at[0]) ** 2 + (y - at[1]) ** 2 + (x - at[2]) ** 2
        phase = angle + 0.8 * (np.cos(angle) * x / a_x + np.sin(angle) * y / a_y) + 0.4 * z / a_z
        maps.append((a_x * a_y / (distance2 + 0.5 * a_x * a_y)) * np.exp(1j * phase))
    return np.stack(maps)


def voxel_means(
    phantom: Phantom, matrix: tuple[int, int, int], fov: Vector, n: int = 4
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Signal fraction, field (Hz) and R2* (1/s) of voxels, each the mean over ``n``^3 points (the last two over those with signal)."""
    fraction, frequency, rate = np.zeros(matrix), np.zeros(matrix), np.zeros(matrix)
    steps = (np.arange(n) + 0.5) / n - 0.5
    centres = grid(matrix, fov)
    voxel = [length / size for length, size in zip(fov, matrix, strict=True)]
    for dz, dy, dx in np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3):
        place = [c + d * v for c, d, v in zip(centres, (dz, dy, dx), voxel, strict=True)]
        body = in_body(phantom, place)
        fraction += body
        frequency += body * field(phantom, place)
        rate += body * r2star(phantom, place)
    points = np.maximum(fraction, 1)
    return fraction / n**3, frequency / points, np.where(fraction > 0, rate / points, phantom.r2star)


def _distance2(centre: Vector, place: list[FloatArray]) -> FloatArray:
    return np.asarray(sum((p - c) ** 2 for p, c in zip(place, centre, strict=True)))


def _painted(phantom: Phantom, place: list[FloatArray], base: float, name: str) -> FloatArray:
    values = np.full(np.broadcast_shapes(*(p.shape for p in place)), base)
    for sphere in phantom.inserts:
        values[inside(sphere, place)] = getattr(sphere, name)
    return values
