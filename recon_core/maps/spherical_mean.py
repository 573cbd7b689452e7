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

    Weights make up for what thick voxels leave of a sphere (`_as_round`): without them a harmonic field would not equal its mean.

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
        sphere = _as_round(half, voxel, radius).to(like.device, like.dtype)
        kernel = like.new_zeros(self.padded)
        kernel[: sphere.shape[0], : sphere.shape[1], : sphere.shape[2]] = sphere
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


def _as_round(half: Sequence[int], voxel: Sequence[float], radius: float) -> Tensor:
    """Weights of the voxels within ``radius``, sum 1, with equal second moments along all axes; float64 ``(z, y, x)``.

    A harmonic function of second degree, such as ``z^2 - x^2``, equals its mean over a sphere because ``<z^2> = <x^2>``. Few voxels 3 mm
    thick within 6 mm have ``<z^2> = 5.5`` and ``<x^2> = 7.6 mm^2``: V-SHARP left 2 % of a background field instead of 0.3 %. The weights
    are nearest to equal ones, ``1 + sum_i a_i (x_i^2 - <x_i^2>)``; with equal sides they are equal.
    """
    axes = [torch.arange(-h, h + 1, dtype=torch.float64) * (side / radius) for h, side in zip(half, voxel, strict=True)]
    squares = torch.stack(torch.meshgrid(*axes, indexing="ij")).square_()
    equal = (squares.sum(0) <= (1 + 1e-6) ** 2).double()
    equal /= equal.sum()
    moments = (equal * squares).sum((1, 2, 3))
    if float(moments.max() - moments.min()) < 1e-9:
        return equal
    about = squares - moments[:, None, None, None]
    covariance = torch.einsum("zyx,izyx,jzyx->ij", equal, about, about)
    pairs = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float64)
    share = pairs.mT @ torch.linalg.solve(pairs @ covariance @ pairs.mT, -pairs @ moments)
    return equal * (1 + torch.tensordot(share, about, dims=1))


def inner_distance(mask: Tensor, voxel: Sequence[float]) -> Tensor:
    """Distance in m from each voxel's centre inside ``mask`` to the nearest one outside (or beyond the volume); 0 outside.

    Exact Euclidean, on the CPU; float32 ``(z, y, x)`` on the mask's device.
    """
    inside = np.pad(mask.detach().cpu().numpy(), 1)
    distance = ndimage.distance_transform_edt(inside, sampling=tuple(voxel))[1:-1, 1:-1, 1:-1]
    return torch.from_numpy(np.ascontiguousarray(distance, dtype=np.float32)).to(mask.device)
