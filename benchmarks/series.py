"""The series on which the classical methods are compared: multi-coil, multi-state, undersampled, with known truth.

``inversion_recovery``  9 inversion times of ellipses with texture in proton density and T1
``cine``                12 frames of a beating, textured ventricle that shortens and thickens
``from_images``         any magnitude series (a measured one, say) times simulated coils: semi-measured
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

Array = NDArray[np.complexfloating]


@dataclass(frozen=True)
class Series:
    """One experiment.

    ``images`` (state, z, y, x), ``coil_maps`` (coil, z, y, x), ``kspace`` (state, coil, k2, k1, x) hybrid and zero where not
    sampled, ``mask`` (state, k2, k1), ``noise_std`` of one complex sample, ``support`` (z, y, x) the object.
    """

    name: str
    images: Array
    coil_maps: Array
    kspace: Array
    mask: NDArray[np.bool_]
    acs_mask: NDArray[np.bool_]
    noise_std: float
    support: NDArray[np.bool_]


def grid(n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y and x from -1 to 1."""
    axis = (np.arange(n) - n // 2) / (n / 2)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def texture(rng: np.random.Generator, n: int, strength: float) -> NDArray[np.float64]:
    """A random factor around one with structure from 1 to 8 pixels."""
    field = sum(gaussian_filter(rng.standard_normal((n, n)), s, mode="wrap") * s for s in (0.7, 1.5, 3.0, 8.0))
    return 1 + strength * np.asarray(field) / np.std(field)


def coils(n: int, n_coils: int, rng: np.random.Generator) -> NDArray[np.complex128]:
    """Loops around the object: 1 / (distance^2 + a) with a smooth phase, unit root-sum-of-squares. ``(coil, 1, y, x)``."""
    y, x = grid(n)
    maps = []
    for angle in 2 * np.pi * (np.arange(n_coils) + 0.2 * rng.standard_normal(n_coils)) / n_coils:
        cy, cx = 1.15 * np.sin(angle), 1.15 * np.cos(angle)
        phase = (
            rng.uniform(0, 2 * np.pi) + rng.normal(0, 0.7) * x + rng.normal(0, 0.7) * y + np.arctan2(y - 2 * cy, x - 2 * cx)
        )
        maps.append(np.exp(1j * phase) / ((y - cy) ** 2 + (x - cx) ** 2 + 0.35))
    stack = np.stack(maps)
    return (stack / np.sqrt(np.sum(np.abs(stack) ** 2, axis=0)))[:, None]


def inversion_recovery(n: int, rng: np.random.Generator, n_states: int = 9) -> NDArray[np.complex128]:
    """``m0 (1 - 2 exp(-TI / T1))`` on ellipses with texture. ``(state, 1, y, x)``."""
    y, x = grid(n)
    m0, t1 = np.zeros((n, n)), np.full((n, n), 1.0)
    ellipses = [(0.0, 0.0, 0.82, 0.68, 0.7, 1.1), (0.0, 0.0, 0.72, 0.58, 0.8, 0.85)]
    for _ in range(12):
        r, a = rng.uniform(0, 0.42), rng.uniform(0, 2 * np.pi)
        half = rng.uniform(0.04, 0.16, 2)
        ellipses.append(
            (1.1 * r * np.sin(a), r * np.cos(a), half[0], half[1], rng.uniform(0.4, 1.0), rng.uniform(0.25, 2.2))
        )
    for cy, cx, ry, rx, density, value in ellipses:
        inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        m0[inside], t1[inside] = density, value
    m0, t1 = m0 * texture(rng, n, 0.08), t1 * np.clip(texture(rng, n, 0.06), 0.5, 2)
    phase = np.exp(1j * (0.8 * x + 0.5 * y**2 + 0.4 * np.sin(2 * x * y)))
    times = np.geomspace(0.1, 3.0, n_states)
    return np.stack([m0 * (1 - 2 * np.exp(-ti / t1)) * phase for ti in times])[:, None]


def cine(n: int, rng: np.random.Generator, n_states: int = 12) -> NDArray[np.complex128]:
    """A textured chest with a ventricle whose wall moves and twists: not low rank globally. ``(state, 1, y, x)``."""
    y, x = grid(n)
    body = ((y / 0.72) ** 2 + (x / 0.88) ** 2 < 1).astype(float) * 0.55 * texture(rng, n, 0.15)
    lung = (((y + 0.05) / 0.5) ** 2 + ((x - 0.45) / 0.3) ** 2 < 1) | (((y + 0.05) / 0.5) ** 2 + ((x + 0.5) / 0.25) ** 2 < 1)
    body[lung] *= 0.15
    wall = texture(rng, n, 0.2)
    phase = np.exp(1j * (0.6 * x - 0.7 * y + 0.5 * x * y))
    frames = []
    for t in np.arange(n_states) / n_states:
        squeeze = 0.5 * (1 - np.cos(2 * np.pi * t))
        cy, cx = 0.05 + 0.03 * squeeze, 0.08 - 0.02 * squeeze
        r_in, r_out = 0.23 - 0.09 * squeeze, 0.34 - 0.04 * squeeze
        r, a = np.hypot(y - cy, x - cx), np.arctan2(y - cy, x - cx) + 0.15 * squeeze
        # the wall's texture moves with the tissue: sample it in material coordinates
        material = np.clip((r - r_in) / (r_out - r_in), 0, 1) * 0.11 + 0.23
        iy = ((material * np.sin(a) + 1) * n / 2).astype(int) % n
        ix = ((material * np.cos(a) + 1) * n / 2).astype(int) % n
        edge = 1.5 / n
        in_wall = 1 / (1 + np.exp((r - r_out) / edge))
        in_blood = 1 / (1 + np.exp((r - r_in) / edge))
        frame = body * (1 - in_wall) + in_wall * (
            (1 - in_blood) * 0.45 * wall[iy, ix] + in_blood * (1 - 0.1 * np.sin(2 * np.pi * t))
        )
        frames.append(frame * phase)
    return np.stack(frames)[:, None]


def masks(
    n: int, n_states: int, n_lines: int, n_acs: int, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """``n_acs`` centre lines in every state, plus ``n_lines`` drawn anew for each with a density that falls outwards."""
    acs = np.zeros((1, n), bool)
    acs[0, n // 2 - n_acs // 2 : n // 2 - n_acs // 2 + n_acs] = True
    mask = np.repeat(acs[None], n_states, axis=0)
    density = (1 - np.abs(np.arange(n) - n // 2) / (n / 2) * 0.85) ** 1.5
    density[acs[0]] = 0
    for state in range(n_states):
        mask[state, 0, rng.choice(n, n_lines, replace=False, p=density / density.sum())] = True
    return mask, acs


def centred_fft(array: Array, axis: int) -> Array:
    """Centred, orthonormal FFT in double precision (the truth must not share our own FFT code)."""
    return np.fft.fftshift(np.fft.fft(np.fft.ifftshift(array, axes=axis), axis=axis, norm="ortho"), axes=axis)


def from_images(
    name: str, images: Array, n_lines: int, n_acs: int, noise: float, rng: np.random.Generator, n_coils: int = 8
) -> Series:
    """Coils, transform, noise and mask for ``images (state, 1, y, x)``; ``noise`` is relative to the 99.9th percentile."""
    images = images / np.percentile(np.abs(images), 99.9)
    n = images.shape[-1]
    maps = coils(n, n_coils, rng)
    full = centred_fft(images[:, None] * maps, -2)
    full = full + noise * (rng.standard_normal(full.shape) + 1j * rng.standard_normal(full.shape)) / np.sqrt(2)
    mask, acs = masks(images.shape[-2], len(images), n_lines, n_acs, rng)
    support = gaussian_filter((np.abs(images).max(0) > 0.05).astype(float), (0, 1, 1)) > 0.5
    return Series(
        name,
        images.astype(np.complex64),
        maps.astype(np.complex64),
        (full * mask[:, None, :, :, None]).astype(np.complex64),
        mask,
        acs,
        noise,
        support,
    )
