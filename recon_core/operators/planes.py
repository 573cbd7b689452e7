"""Many multi-coil Cartesian problems in a plane at once, differentiable in images, data *and sampling*.

With the readout transformed, every readout position of a 3D scan is a 2D problem over (k2, k1) of its own: LARO's slices. In a 2D
scan the plane is (x, y) and only y is encoded.

    images  ``(plane, echo, z, y)``   centred
    data    ``(plane, echo, coil, k2, k1)``   centred

``A^H A`` is a circular convolution between two multiplications with the maps, so it commutes with the shift between centred and
uncentred transforms: images and maps stay centred, and no shift is done in `Planes.normal`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recon_core.errors import DataError
from recon_core.fourier import fft_centred, ifft_centred
from recon_core.operators.cartesian import ACCELERATOR_BLOCK, CPU_BLOCK

Tensor = torch.Tensor


class Planes:
    """``A = sqrt(U) F S``, with ``A^H A = S^H F^H U F S`` and ``A^H b = S^H F^H U k``: linear in the sampling ``U``.

    Parameters
    ----------
    coil_maps
        complex ``(plane, coil, z, y)``, centred.
    sampling
        real ``(echo, k2, k1)``, centred: 0 where nothing was sampled, else the weight of a sample's squared residual (the number of
        its averages). Gradients reach it: being linear, they also reach positions that were not sampled, as Eq. 6 of LARO needs.
        k2 or k1 may be 1: the same for all.
    axes
        Encoded axes; the last one alone for a 2D scan.

    Raises
    ------
    DataError
        The shapes do not fit together.
    """

    def __init__(self, coil_maps: Tensor, sampling: Tensor, axes: Sequence[int] = (-2, -1)) -> None:
        fits = coil_maps.ndim == 4 and sampling.ndim == 3 and coil_maps.is_complex()
        if not fits or any(s not in (1, n) for s, n in zip(sampling.shape[1:], coil_maps.shape[2:], strict=True)):
            raise DataError(
                "coil maps and sampling do not fit",
                where="planes",
                got=f"maps {tuple(coil_maps.shape)}, sampling {tuple(sampling.shape)}",
                expected="complex (plane, coil, z, y) and (echo, k2, k1)",
            )
        self._axes = tuple(axes)
        self._maps = coil_maps.contiguous()
        self._maps_conj = self._maps.conj().resolve_conj()
        self._sampling = sampling[:, None].to(coil_maps.real.dtype)  # (echo, 1 coil, k2, k1)
        self._shifted = torch.fft.ifftshift(self._sampling, dim=self._axes)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient with respect to the sampling is wanted."""
        return self._sampling.requires_grad

    @property
    def sampling(self) -> Tensor:
        """As it was given, ``(echo, k2, k1)``."""
        return self._sampling[:, 0]

    def forward(self, images: Tensor) -> Tensor:
        """``F S x`` at *all* positions, ``(plane, echo, coil, k2, k1)``: what a full scan would measure."""
        return fft_centred(images[:, :, None] * self._maps[:, None], self._axes)

    def adjoint(self, kspace: Tensor) -> Tensor:
        """``S^H F^H U k`` of full data, ``(plane, echo, z, y)``."""
        return (ifft_centred(kspace * self._sampling, self._axes) * self._maps_conj[:, None]).sum(2)

    def normal(self, x: Tensor) -> Tensor:
        """``S^H F^H U F S x``; without gradients in blocks that fit the cache."""
        if torch.is_grad_enabled() and (x.requires_grad or self.requires_grad):
            return self._normal(x, self._maps, self._maps_conj)
        per_plane = x.shape[1] * self._maps[0].numel()
        block = max(1, (CPU_BLOCK if x.device.type == "cpu" else ACCELERATOR_BLOCK) // per_plane)
        parts = [slice(first, first + block) for first in range(0, len(x), block)]
        found = [self._normal(x[p], self._maps[p], self._maps_conj[p]) for p in parts]
        return found[0] if len(found) == 1 else torch.cat(found)

    def _normal(self, x: Tensor, maps: Tensor, maps_conj: Tensor) -> Tensor:
        spectrum = torch.fft.fftn(x[:, :, None] * maps[:, None], dim=self._axes) * self._shifted
        return (torch.fft.ifftn(spectrum, dim=self._axes) * maps_conj[:, None]).sum(2)
