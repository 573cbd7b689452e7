"""Seeded random numbers and smooth random fields for batches of synthetic samples.

Every sample has its own generator, so a sample depends on its seed alone: not on the batch it is in, nor on how many others were
drawn before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

Tensor = torch.Tensor


def sample_seed(*key: int | str) -> int:
    """A 63-bit seed from any key, the same on every machine.

    A digest, not a sum: neighbouring keys give unrelated seeds, and keys that differ anywhere share none.
    """
    text = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


class Draws:
    """Random numbers for a batch, one independent stream per sample.

    Parameters
    ----------
    seeds
        One per sample.
    device
        Where the numbers are wanted. They are drawn on the CPU, so that all devices see the same anatomies; only
        :meth:`noise` draws on the device.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._seeds = tuple(seeds)
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __len__(self) -> int:
        return len(self._generators)

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """float32 ``(sample, *shape)``, uniform in ``[low, high)``."""
        return self._stack([torch.rand(shape, generator=g) for g in self._generators]) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        """float32 ``(sample, *shape)``, standard normal."""
        return self._stack([torch.randn(shape, generator=g) for g in self._generators])

    def flip(self, probability: float, *shape: int) -> Tensor:
        """bool ``(sample, *shape)``."""
        return self.uniform(0.0, 1.0, *shape) < probability

    def numpy(self) -> list[np.random.Generator]:
        """A NumPy generator per sample, each seeded from its sample's stream."""
        return [np.random.default_rng(int(torch.randint(2**62, (1,), generator=g))) for g in self._generators]

    def noise(self, *shape: int, offset: int = 0) -> Tensor:
        """complex64 ``(sample, *shape)`` of unit variance (real and imaginary part together), drawn on the device itself.

        The stream differs between kinds of devices; ``offset`` picks another stream of the same samples.
        """
        out = torch.empty(len(self), *shape, dtype=torch.complex64, device=self.device)
        for row, seed in zip(out, self._seeds, strict=True):
            generator = torch.Generator(self.device).manual_seed(sample_seed(seed, "noise", offset))
            torch.randn(shape, generator=generator, dtype=torch.complex64, device=self.device, out=row)
        return out

    def _stack(self, parts: list[Tensor]) -> Tensor:
        return torch.stack(parts).to(self.device, non_blocking=True)


def grid(n: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Coordinates ``(y, x)`` of the pixels of an ``n`` by ``n`` plane in [-1, 1], each ``(n, n)``."""
    axis = (torch.arange(n, device=device, dtype=torch.float32) + 0.5) * (2 / n) - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return y, x


def smooth_field(draws: Draws, n: int, cells: int, n_fields: int = 1) -> Tensor:
    """Low-pass noise: a coarse grid of normal numbers, interpolated bicubically.

    Parameters
    ----------
    n
        Pixels along each side.
    cells
        Nodes of the coarse grid along each side: the field varies over ``1 / cells`` of the plane.

    Returns
    -------
    float32 ``(sample, field, n, n)``, zero mean, variance about a half to one.
    """
    coarse = draws.normal(n_fields, cells, cells)
    return functional.interpolate(coarse, size=(n, n), mode="bicubic", align_corners=True)


def polynomial(draws: Draws, n: int, strengths: Sequence[float]) -> Tensor:
    """2D polynomial ``sum_ij c_ij y^i x^j`` with ``c_ij`` uniform within ``sqrt(s_i s_j)``, coordinates in [-1, 1].

    Parameters
    ----------
    strengths
        ``s_0, s_1, ...``: one per power.

    Returns
    -------
    float32 ``(sample, n, n)``
    """
    order = len(strengths)
    scale = torch.tensor(strengths, device=draws.device).sqrt()
    coefficients = draws.uniform(-1.0, 1.0, order, order) * scale[:, None] * scale
    axis = grid(n, draws.device)[1][0]
    powers = torch.stack([axis**k for k in range(order)])  # (power, n)
    return torch.einsum("bij,iy,jx->byx", coefficients, powers, powers)


def gaussian_blur(images: Tensor, sigma: Tensor, width: int = 5) -> Tensor:
    """Separable Gaussian of ``width`` taps, one ``sigma`` (pixels) per sample, borders repeated.

    Parameters
    ----------
    images
        float ``(sample, channel, y, x)``.
    sigma
        ``(sample,)``, positive.
    """
    n_samples, n_channels = images.shape[:2]
    offsets = torch.arange(width, device=images.device, dtype=images.dtype) - width // 2
    kernel = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(n_channels, 0)[:, None, None]
    half = width // 2
    planes = functional.pad(images.flatten(0, 1)[None], (half, half, half, half), mode="replicate")
    groups = n_samples * n_channels
    planes = functional.conv2d(planes, kernel, groups=groups)
    planes = functional.conv2d(planes, kernel.mT, groups=groups)
    return planes.reshape(images.shape)
