"""A small object with texture, smooth phase, known smooth coil maps: truth for the coil map and partial Fourier tests."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recon_core.fourier import fft_centred, resize_centred

Tensor = torch.Tensor


def positions(shape: Sequence[int]) -> list[Tensor]:
    """Coordinates of the pixels, -1/2 to 1/2, one array for each axis."""
    axes = [(torch.arange(n, dtype=torch.float64) - n // 2) / n for n in shape]
    return list(torch.meshgrid(*axes, indexing="ij"))


def phantom(shape: Sequence[int], seed: int = 0, n_details: int = 25) -> Tensor:
    """complex64: an ellipse (ellipsoid) with random ellipses inside, times a smooth phase; zero outside."""
    g = torch.Generator().manual_seed(seed)
    r = positions(shape)
    radii = (0.44, 0.42, 0.36)[-len(shape) :]
    image = (torch.stack([(c / a) ** 2 for c, a in zip(r, radii, strict=True)]).sum(0) < 1).double()
    for _ in range(n_details):
        centre = (torch.rand(len(shape), generator=g) - 0.5) * 0.5
        size = torch.rand(len(shape), generator=g) * 0.09 + 0.015
        inside = torch.stack([((c - m) / a) ** 2 for c, m, a in zip(r, centre, size, strict=True)]).sum(0) < 1
        image = image + inside * (torch.rand(1, generator=g) - 0.45) * image
    phase = 6 * r[-1] + 6 * r[-2] ** 2
    return (image.clamp_min(0) * torch.exp(1j * phase)).to(torch.complex64)


def smooth_maps(n_coils: int, shape: Sequence[int]) -> Tensor:
    """complex64 ``(coil, *shape)``, unit root sum of squares: loops around the object with their own phases."""
    r = positions(shape)
    y, x = r[-2], r[-1]
    maps = []
    for c in range(n_coils):
        angle = 2 * math.pi * c / n_coils
        squared = (x - 0.6 * math.cos(angle)) ** 2 + (y - 0.6 * math.sin(angle)) ** 2 + 0.15**2
        if len(r) == 3:
            squared = squared + (0.6 * (r[0] - 0.4 * (-1) ** c)) ** 2
        phase = angle + 1.5 * (x * math.cos(angle + 0.5) + y * math.sin(angle - 0.4))
        maps.append(squared**-0.75 * torch.exp(1j * phase))
    stacked = torch.stack(maps)
    return (stacked / torch.linalg.vector_norm(stacked, dim=0)).to(torch.complex64)


def calibration_block(coil_images: Tensor, sides: Sequence[int]) -> Tensor:
    """The centre of the k-space of ``(coil, *shape)``."""
    block = fft_centred(coil_images, tuple(range(1, coil_images.ndim)))
    for i, n in enumerate(sides):
        block = resize_centred(block, i + 1, n)
    return block


def combination_error(maps: Tensor, coil_images: Tensor) -> float:
    """``||S S^H I - I|| / ||I||``: what a fully sampled reconstruction with these maps cannot explain."""
    combined = (maps.conj() * coil_images).sum(dim=0)
    return float((maps * combined - coil_images).norm() / coil_images.norm())
