"""Receive coils: loops of wire around the body (Biot-Savart), measured donors, and the noise they bring.

Maps are complex64 ``(coil, z, y, x)`` with unit root-sum-of-squares everywhere, which is what a reconstruction can
estimate at best; the shading that the real array adds is returned beside them and belongs to the object.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.interpolate import CubicSpline

from recon_core.errors import DataError, SettingError
from recon_core.simulation.phantoms import FloatArray, Grid

ComplexArray = NDArray[np.complex64]
DONOR = "an .npz with coil images or radial k-space"
N_SEGMENTS = 24
N_COARSE = 33  # maps are smooth: the field is computed on a coarse grid and interpolated with cubic splines


def biot_savart_maps(
    grid: Grid,
    n_coils: int,
    rng: np.random.Generator,
    *,
    radii: tuple[float, float] = (0.20, 0.165),
    n_rows: int = 1,
    row_distance: float = 0.09,
) -> tuple[ComplexArray, FloatArray]:
    """Sensitivities of ``n_coils`` circular loops on an elliptical cylinder around the z axis.

    ``c(r) ~ conj(Bx + i By)``, with ``B`` from the Biot-Savart law for unit current (reciprocity; B0 is taken along
    z). Loops
    are displaced, tilted and sized at random by some per cent, and each has its own constant phase, as cables give it.

    Parameters
    ----------
    grid
        Where the maps are wanted (m).
    radii
        Half axes of the cylinder along x and y in m.
    n_rows, row_distance
        Loops are spread over this many rings along z, that far apart (m).

    Returns
    -------
    maps, shading
        complex64 ``(coil, z, y, x)`` with unit root-sum-of-squares, and float32 ``(z, y, x)``: the array's own
        root-sum-of-squares, 1 on average.

    Raises
    ------
    SettingError
        Fewer than one coil, or fewer coils than rows.
    """
    if n_coils < 1 or not 1 <= n_rows <= n_coils:
        raise SettingError(
            "impossible array", where="coils", got=f"{n_coils} coils in {n_rows} rows", expected="1 or more per row"
        )
    coarse = Grid(*(_coarse(axis) for axis in (grid.z, grid.y, grid.x)))
    z, y, x = np.meshgrid(coarse.z, coarse.y, coarse.x, indexing="ij")
    points = np.stack([x, y, z], axis=-1)
    row_of = np.arange(n_coils) % n_rows
    maps = np.empty((n_coils, *coarse.shape), dtype=np.complex128)
    start = rng.uniform(0, 2 * np.pi)
    for coil in range(n_coils):
        angle = start + 2 * np.pi * (coil + 0.15 * rng.uniform(-1, 1)) / n_coils
        centre = np.array(
            [radii[0] * np.cos(angle), radii[1] * np.sin(angle), (row_of[coil] - (n_rows - 1) / 2) * row_distance]
        )
        normal = -np.array([np.cos(angle) / radii[0], np.sin(angle) / radii[1], 0.0])
        normal = normal / np.linalg.norm(normal) + 0.08 * rng.standard_normal(3)
        perimeter = np.pi * (radii[0] + radii[1])
        loop_radius = np.clip(0.62 * perimeter * n_rows / n_coils, 0.045, 0.11) * rng.uniform(0.92, 1.08)
        field = _loop_field(points, centre, normal / np.linalg.norm(normal), float(loop_radius))
        maps[coil] = (field[..., 0] - 1j * field[..., 1]) * np.exp(2j * np.pi * rng.random())
    return _normalised(_interpolate(maps, coarse, grid))


def _coarse(axis: NDArray[np.float64]) -> NDArray[np.float64]:
    if len(axis) <= N_COARSE // 2:
        return axis
    return np.linspace(axis[0], axis[-1], N_COARSE)


def _loop_field(
    points: NDArray[np.float64], centre: NDArray[np.float64], normal: NDArray[np.float64], radius: float
) -> NDArray[np.float64]:
    """Biot-Savart field (arbitrary unit) of a circular loop of straight segments at ``points`` ``(..., 3)``."""
    helper = np.array([0.0, 0.0, 1.0]) if abs(normal[2]) < 0.9 else np.array([1.0, 0.0, 0.0])
    u = np.cross(normal, helper)
    u /= np.linalg.norm(u)
    v = np.cross(normal, u)
    angles = 2 * np.pi * np.arange(N_SEGMENTS + 1) / N_SEGMENTS
    wire = centre + radius * (np.cos(angles)[:, None] * u + np.sin(angles)[:, None] * v)
    field = np.zeros_like(points)
    for a, b in pairwise(wire):
        r = points - 0.5 * (a + b)
        # the wire has a finite thickness: no singularity where it touches the grid
        field += np.cross(b - a, r) / ((r**2).sum(-1, keepdims=True) + 0.03**2) ** 1.5
    return field


def _interpolate(maps: NDArray[np.complexfloating], coarse: Grid, grid: Grid) -> ComplexArray:
    result: NDArray[np.complexfloating] = maps
    for axis, (old, new) in enumerate(((coarse.z, grid.z), (coarse.y, grid.y), (coarse.x, grid.x)), start=1):
        if len(old) != len(new) or not np.array_equal(old, new):
            result = CubicSpline(old, result, axis=axis)(new)
    return result.astype(np.complex64)


def _normalised(maps: ComplexArray) -> tuple[ComplexArray, FloatArray]:
    rss = np.sqrt((np.abs(maps) ** 2).sum(0, keepdims=True))
    return (maps / np.maximum(rss, 1e-12)).astype(np.complex64), (rss[0] / rss.mean()).astype(np.float32)


def donor_maps(
    path: str | Path, grid: Grid, n_coils: int, fov: tuple[float, float] = (0.0, 0.0)
) -> tuple[ComplexArray, FloatArray]:
    """Sensitivities of a measured array, smoothed, continued outside the body and put on ``grid``.

    Two kinds of ``.npz`` are understood: ``image`` complex ``(coil, y, x)``, and radial ``kspace`` ``(coil, spoke, sample)``
    with ``trajectory`` ``(spoke, sample)`` in cycles per pixel (real part along x), of which the central disc is gridded.

    Parameters
    ----------
    path
        The donor file.
    n_coils
        How many of its coils to use (the first ones); 0 is all.
    fov
        Extent ``(y, x)`` in m onto which the donor's image is laid; by default the extent of ``grid``.

    Returns
    -------
    maps, shading
        As :func:`biot_savart_maps`; constant along z, because the donors are single slices, and with a shading of 1,
        because an image cannot tell the array's shading from the anatomy's.

    Raises
    ------
    DataError
        The file holds neither kind of data.
    SettingError
        It has fewer coils than asked for, or does not exist.
    """
    arrays = _donor_arrays(Path(path))
    if "image" in arrays:
        images, finest = arrays["image"], 0.025
    elif {"kspace", "trajectory"} <= set(arrays):
        # few spokes, and a readout that was oversampled: blurred images, the body in the middle
        images, finest = _grid_centre(arrays["kspace"], arrays["trajectory"])[:, 8:-8, 8:-8], 0.09
    else:
        raise DataError(
            "not a coil donor", where="coils.donor", got=sorted(arrays), expected="image, or kspace and trajectory"
        )
    if images.ndim != 3 or not np.iscomplexobj(images) or not np.isfinite(images).all():
        raise DataError(
            "not coil images", where="coils.donor", got=f"{images.dtype} {images.shape}", expected="complex (coil, y, x)"
        )
    if n_coils > len(images):
        raise SettingError("the donor has fewer coils", where="coils.donor", got=n_coils, expected=f"at most {len(images)}")
    smooth = _smooth_maps(_low_resolution(images[: n_coils or len(images)]), finest)
    n_y, n_x = smooth.shape[1:]
    extent = (fov[0] or len(grid.y) * _spacing(grid.y), fov[1] or len(grid.x) * _spacing(grid.x))
    flat = Grid(grid.z[:1], (np.arange(n_y) - n_y // 2) * extent[0] / n_y, (np.arange(n_x) - n_x // 2) * extent[1] / n_x)
    inside = Grid(
        grid.z[:1],
        np.clip(grid.y, flat.y[0], flat.y[-1]),  # no extrapolation by splines
        np.clip(grid.x, flat.x[0], flat.x[-1]),
    )
    maps, _ = _normalised(_interpolate(smooth[:, None], flat, inside))
    return np.repeat(maps, len(grid.z), axis=1), np.ones(grid.shape, dtype=np.float32)


def _donor_arrays(path: Path) -> dict[str, NDArray[Any]]:
    if not path.is_file():
        raise SettingError("no such donor file", where="coils.donor", expected=DONOR)
    try:
        with np.load(path, allow_pickle=False) as donor:
            return {name: np.asarray(donor[name]) for name in donor.files}
    except (OSError, ValueError, EOFError, AttributeError, TypeError, BadZipFile):  # the last but two: one bare array
        raise DataError("not a coil donor", where="coils.donor", got="another file", expected=DONOR) from None


def _spacing(axis: NDArray[np.float64]) -> float:
    return float(axis[1] - axis[0])


def _low_resolution(images: NDArray[np.complexfloating], n: int = 64) -> NDArray[np.complexfloating]:
    """The central ``n`` by ``n`` samples of k-space, as images; coil maps need no more."""
    n_y, n_x = images.shape[1:]
    if n_y <= n or n_x <= n:
        return images
    kspace = np.fft.fftshift(np.fft.fft2(np.fft.ifftshift(images, axes=(1, 2))), axes=(1, 2))
    y, x = n_y // 2 - n // 2, n_x // 2 - n // 2
    crop = np.fft.ifftshift(kspace[:, y : y + n, x : x + n], axes=(1, 2))
    return np.asarray(np.fft.fftshift(np.fft.ifft2(crop), axes=(1, 2)))


def _smooth_maps(images: NDArray[np.complexfloating], finest: float) -> NDArray[np.complex128]:
    """``G(image_c conj(v)) / G(|v|^2)`` with the dominant virtual coil ``v``; wider and wider Gaussians fill the air."""
    flat = images.reshape(len(images), -1).astype(np.complex128)
    virtual = np.linalg.svd(flat @ flat.conj().T)[0][:, 0].conj() @ flat
    reference = virtual.reshape(images.shape[1:])
    # where the virtual coil is dark its phase is noise; the weight below keeps such pixels out
    power = (np.abs(images) ** 2).sum(0)
    weight = (power > 0.02 * np.percentile(power, 98)).astype(float)
    unit = weight * np.exp(-1j * np.angle(reference)) / np.sqrt(power + 1e-3 * power.max())
    result = np.zeros(images.shape, dtype=np.complex128)
    covered = np.zeros(images.shape[1:])
    for sigma_share in (finest, 2.5 * finest, 0.25, 0.5):
        sigma = sigma_share * images.shape[-1]
        mass = ndimage.gaussian_filter(weight, sigma, mode="nearest", truncate=5.0)
        share = np.clip(mass / 0.35, 0.0, 1.0) * (1.0 - covered) if sigma_share < 0.5 else 1.0 - covered
        for coil, image in enumerate(images):
            product = image * unit
            low = ndimage.gaussian_filter(product.real, sigma, mode="nearest", truncate=5.0) + 1j * ndimage.gaussian_filter(
                product.imag, sigma, mode="nearest", truncate=5.0
            )
            result[coil] += share * low / np.maximum(mass, 1e-9)
        covered = covered + share
    smoothing = max(0.03, 0.6 * finest) * images.shape[-1]
    for part in (result.real, result.imag):
        part[:] = ndimage.gaussian_filter(part, (0, smoothing, smoothing), mode="nearest")
    return result


def _grid_centre(
    kspace: NDArray[np.complexfloating], trajectory: NDArray[np.complexfloating], n: int = 64
) -> NDArray[np.complex128]:
    """Low-resolution coil images from the central disc of radial data: ramp-weighted adjoint Fourier sum, Hann window."""
    if trajectory.shape != kspace.shape[1:]:
        raise DataError(
            "trajectory and k-space differ", where="coils.donor", got=trajectory.shape, expected=kspace.shape[1:]
        )
    cycles = trajectory * kspace.shape[-1]  # cycles per field of view
    radius = np.abs(cycles)
    limit = 14.0
    weight = np.where(radius < limit, np.maximum(radius, 0.25) * (0.5 + 0.5 * np.cos(np.pi * radius / limit)), 0.0)
    keep = weight > 0
    position = (np.arange(n) - n // 2) / n
    along_x = np.exp(2j * np.pi * np.outer(cycles[keep].real, position))
    along_y = np.exp(2j * np.pi * np.outer(cycles[keep].imag, position))
    samples = kspace[:, keep] * weight[keep]
    return np.einsum("cs,sy,sx->cyx", samples, along_y, along_x, optimize=True)


def random_noise_covariance(n_coils: int, rng: np.random.Generator, correlation: float = 0.25) -> NDArray[np.complex128]:
    """Covariance of the receiver noise: unequal channels, correlated neighbours with phases; mean variance 1.

    Returns
    -------
    complex128 ``(coil, coil)``, Hermitian positive definite: ``E[n_i conj(n_j)]``.
    """
    index = np.arange(n_coils)
    ring = np.abs(index[:, None] - index[None])
    ring = np.minimum(ring, n_coils - ring)
    phases = np.exp(2j * np.pi * rng.random(n_coils))
    gains = rng.uniform(0.75, 1.30, n_coils)
    covariance = correlation**ring * np.outer(gains * phases, (gains * phases).conj())
    # correlation ** ring on a circle is positive definite only up to rounding for short rings: a small diagonal
    # makes it safe
    covariance = covariance + 0.05 * np.eye(n_coils)
    return covariance / np.trace(covariance).real * n_coils
