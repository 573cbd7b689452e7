"""Small multi-coil series with known truth; encoded by NumPy's FFT in double precision, not by the code under test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from recon_core.types import KSpace, ScanInfo


@dataclass(frozen=True)
class SmallSeries:
    """``images`` complex128 (state, z, y, x), ``kspace`` with true maps and noise level, ``scan``."""

    images: NDArray[np.complex128]
    kspace: KSpace
    scan: ScanInfo

    def error(self, images: torch.Tensor) -> float:
        """Complex relative error."""
        return float(np.linalg.norm(images.numpy() - self.images) / np.linalg.norm(self.images))


def centred_fft(array: NDArray[np.complexfloating], axes: tuple[int, ...]) -> NDArray[np.complex128]:
    shifted = np.fft.fftn(np.fft.ifftshift(array, axes=axes), axes=axes, norm="ortho")
    return np.asarray(np.fft.fftshift(shifted, axes=axes), dtype=np.complex128)


def recovery_images(
    shape: tuple[int, int, int], n_states: int, rng: np.random.Generator, *, last_differs: bool = False
) -> NDArray[np.complex128]:
    """Smooth object with two inner compartments that recover after inversion at different rates: rank two."""
    z, y, x = np.meshgrid(*[(np.arange(n) - n // 2) / max(1, n / 2) for n in shape], indexing="ij")
    depth = 0.3 * z**2
    body = ((y / 0.8) ** 2 + (x / 0.7) ** 2 + depth < 1).astype(float)
    inner = (((y - 0.15) / 0.35) ** 2 + ((x + 0.1) / 0.3) ** 2 + depth < 1).astype(float)
    texture = 1 + 0.3 * gaussian_filter(rng.standard_normal(shape), (0, 1.0, 1.0))
    density, fast = body * texture, inner * 0.9
    times = np.geomspace(0.1, 3, n_states)
    curves = (1 - 2 * np.exp(-times / 1.2), 1 - 2 * np.exp(-times / 0.35))
    phase = np.exp(1j * (0.7 * x - 0.4 * y + 0.5 * x * y))
    images = np.stack([(density * (1 - fast) * a + density * fast * b) * phase for a, b in zip(*curves, strict=True)])
    return images / np.abs(images).max()


def small_series(
    shape: tuple[int, int, int] = (1, 32, 30),
    n_states: int = 6,
    n_coils: int = 4,
    *,
    noise: float = 0.01,
    keep: float = 0.3,
    n_acs: int = 8,
    seed: int = 1,
) -> SmallSeries:
    """Every state keeps the centre and a share ``keep`` of the other phase encodings, drawn anew for each state."""
    rng = np.random.default_rng(seed)
    images = recovery_images(shape, n_states, rng)
    maps = coil_maps(shape, n_coils, rng)
    full = centred_fft(images[:, None] * maps, (-3, -2))
    full = full + noise * (rng.standard_normal(full.shape) + 1j * rng.standard_normal(full.shape)) / np.sqrt(2)
    acs = np.zeros(shape[:2], bool)
    k2, k1 = (slice(n // 2 - min(n, n_acs) // 2, n // 2 - min(n, n_acs) // 2 + min(n, n_acs)) for n in shape[:2])
    acs[k2, k1] = True
    mask = (rng.random((n_states, *shape[:2])) < keep) | acs
    data = (full * mask[:, None, :, :, None]).astype(np.complex64)
    kspace = KSpace(
        torch.from_numpy(data),
        torch.from_numpy(mask.astype(np.float32)),
        acs=torch.from_numpy(data[-1] * acs[None, :, :, None]),
        acs_mask=torch.from_numpy(acs),
        coil_maps=torch.from_numpy(maps.astype(np.complex64)),
        noise_std=noise,
    )
    fov = (0.005 * shape[0], 0.3, 0.3)
    return SmallSeries(images, kspace, ScanInfo(shape, fov, shape, fov))


def coil_maps(shape: tuple[int, int, int], n_coils: int, rng: np.random.Generator) -> NDArray[np.complex128]:
    """Loops around the object, unit root sum of squares, ``(coil, z, y, x)``."""
    _, y, x = np.meshgrid(*[(np.arange(n) - n // 2) / max(1, n / 2) for n in shape], indexing="ij")
    maps = []
    for angle in 2 * np.pi * (np.arange(n_coils) + 0.1) / n_coils:
        distance = (y - 1.2 * np.sin(angle)) ** 2 + (x - 1.2 * np.cos(angle)) ** 2
        maps.append(np.exp(1j * (rng.uniform(0, 6) + 0.5 * x * np.cos(angle) + 0.5 * y)) / (distance + 0.3))
    stack = np.stack(maps)
    return np.asarray(stack / np.sqrt(np.sum(np.abs(stack) ** 2, axis=0)))
