"""Spherical mean values: harmonic functions equal theirs, which tells background fields from local ones.

References
----------
Schweser et al., NeuroImage 54 (2011) 2789 (SHARP); Li & Leigh, J. Magn. Reson. 148 (2001) 442.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage

from recon_core.errors import SettingError
from recon_core.maps.dipole_kernel import convolve_spectrum, padded_shape

Tensor = torch.Tensor


class SphericalMean:
    """Mean over the voxels whose centres lie within ``radius``, as a convolution; self-adjoint.

    Parameters
    ----------
    shape, voxel
        Of the volume ``(z, y, x)`` and in m.
    radius
        m; at least one voxel of the longest side.
    like
        Gives dtype and device.

    Raises
    ------
    SettingError
        The sphere holds one voxel only, or does not fit the volume.
    """

    def __init__(self, shape: Sequence[int], voxel: Sequence[float], radius: float, like: Tensor) -> None:
        half = [int(radius / side + 1e-6) for side in voxel]
        if min(half) < 1 or any(2 * h + 1 > n for h, n in zip(half, shape, strict=True)):
            raise SettingError(
                "radius of the spherical mean does not fit the volume",
                where="spherical mean",
                got=f"{radius * 1e3:.3g} mm in {tuple(shape)} voxels",
                expected="at least one voxel, at most half of the shortest side",
            )
        self.shape = tuple(shape)
        self.radius = radius
        self.padded = padded_shape(shape, 0.0) if max(half) <= 16 else tuple(n + h for n, h in zip(shape, half, strict=True))
        axes = [
            torch.arange(-h, h + 1, dtype=like.dtype, device=like.device) * side for h, side in zip(half, voxel, strict=True)
        ]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        sphere = ((z**2 + y**2 + x**2) <= (radius * (1 + 1e-6)) ** 2).to(like.dtype)
        kernel = like.new_zeros(self.padded)
        kernel[: sphere.shape[0], : sphere.shape[1], : sphere.shape[2]] = sphere / sphere.sum()
        kernel = torch.roll(kernel, [-h for h in half], dims=(0, 1, 2))
        self.spectrum = torch.fft.rfftn(kernel).real.clone()  # real: the sphere is even

    def mean(self, x: Tensor) -> Tensor:
        """``S x``, zero outside the volume."""
        return self._apply(x, self.spectrum)

    def forward(self, x: Tensor) -> Tensor:
        """``x - S x``: takes a harmonic function to zero wherever the sphere fits."""
        return self._apply(x, 1 - self.spectrum)

    def adjoint(self, y: Tensor) -> Tensor:
        """Equal to ``forward``."""
        return self.forward(y)

    def normal(self, x: Tensor) -> Tensor:
        """``(1 - S)^T (1 - S) x``."""
        return self.adjoint(self.forward(x))

    def deconvolve(self, x: Tensor, threshold: float) -> Tensor:
        """``(1 - S)^-1 x`` where the spectrum of ``1 - S`` exceeds ``threshold``, else 0."""
        inverse = 1 - self.spectrum
        return self._apply(x, torch.where(inverse.abs() > threshold, 1 / inverse, 0.0))

    def _apply(self, x: Tensor, spectrum: Tensor) -> Tensor:
        z, y, x_ = self.shape
        return convolve_spectrum(x, spectrum, self.padded)[:z, :y, :x_]


def inner_distance(mask: Tensor, voxel: Sequence[float]) -> Tensor:
    """Distance in m from each voxel's centre inside ``mask`` to the nearest one outside (or beyond the volume); 0 outside.

    Exact Euclidean, on the CPU; float32 ``(z, y, x)`` on the mask's device.
    """
    inside = np.pad(mask.detach().cpu().numpy(), 1)
    distance = ndimage.distance_transform_edt(inside, sampling=tuple(voxel))[1:-1, 1:-1, 1:-1]
    return torch.from_numpy(np.ascontiguousarray(distance, dtype=np.float32)).to(mask.device)
