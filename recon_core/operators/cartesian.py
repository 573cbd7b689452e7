"""Multi-coil Cartesian acquisition in hybrid space: coil maps, phase-encoding FFT, sampling weights.

The readout is complete and already transformed, so every readout position ``x`` is a problem of its own and only the FFTs over
k1 (and k2) remain. Inside, arrays are *shift-free* and ordered for the transform:

    working image  ``(state, x, z, y)``          image centre at index 0 of z and y (``ifftshift`` done once, at the door)
    working data   ``(state, coil, x, k2, k1)``  DC at index 0 of k2 and k1

y is contiguous, so the FFT runs along memory. ``CartesianSense.enter_image`` and ``leave_image`` convert.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from recon_core.batches import batch
from recon_core.errors import DataError

Tensor = torch.Tensor

# elements of one block of coil images on the CPU: 4 MB of complex64 stays in the cache between multiplication and FFT.
# Measured on 9 states x 8 coils x 192^2: 10 ms for one normal against 43 ms for the whole array at once.
CPU_BLOCK = 1 << 19
ACCELERATOR_BLOCK = 1 << 27


class CartesianSense:
    """``A = W F S``: multiply with coil maps, centred orthonormal FFT over the phase encodings, weight the samples.

    Parameters
    ----------
    coil_maps
        complex ``(coil, z, y, x)``, centred.
    weights
        real ``(state, k2, k1)``, centred: 0 where nothing was sampled, else the factor on residuals; a boolean mask, or
        ``sqrt(counts)`` when averages are to count by their lower noise.

    Raises
    ------
    DataError
        The shapes do not fit together.
    """

    def __init__(self, coil_maps: Tensor, weights: Tensor) -> None:
        if coil_maps.ndim != 4 or weights.ndim != 3 or tuple(weights.shape[1:]) != tuple(coil_maps.shape[1:3]):
            raise DataError(
                "coil maps and sampling do not fit",
                where="Cartesian operator",
                got=f"maps {tuple(coil_maps.shape)}, weights {tuple(weights.shape)}",
                expected="(coil, z, y, x) and (state, k2, k1) with z = k2 and y = k1",
            )
        # (coil, x, z, y), y contiguous
        self._maps = torch.fft.ifftshift(coil_maps, dim=(-3, -2)).movedim(-1, 1).contiguous()
        self._maps_conj = self._maps.conj().resolve_conj()
        self._set_weights(weights)
        self._plan()

    def _set_weights(self, weights: Tensor) -> None:
        shifted = torch.fft.ifftshift(weights, dim=(-2, -1)).to(self._maps.real.dtype)
        self._weights = shifted[:, None, None]  # (state, 1 coil, 1 x, k2, k1)
        self._weights_squared = self._weights**2

    def _plan(self) -> None:
        # a singleton axis needs no transform
        self._axes = tuple(axis for axis in (-2, -1) if self._maps.shape[axis] > 1) or (-1,)
        n_coils, n_x = self._maps.shape[:2]
        block = CPU_BLOCK if self._maps.device.type == "cpu" else ACCELERATOR_BLOCK
        step = max(1, batch(block) // (n_coils * self._maps[0, 0].numel()))
        self._columns = [slice(first, min(first + step, n_x)) for first in range(0, n_x, step)]

    def with_weights(self, weights: Tensor) -> CartesianSense:
        """The same coil maps with other weights, ``(state, k2, k1)``, centred: some of the samples, or other states.

        Raises
        ------
        DataError
            The weights do not fit the maps.
        """
        expected = tuple(self._weights.shape[-2:])
        if weights.ndim != 3 or tuple(weights.shape[1:]) != expected:
            raise DataError("weights do not fit", where="Cartesian operator", got=tuple(weights.shape), expected=expected)
        other = copy.copy(self)
        other._set_weights(weights)
        return other

    def with_columns(self, columns: slice) -> CartesianSense:
        """The operator of some readout positions only: columns are independent, so an objective is a sum over them."""
        other = copy.copy(self)
        other._maps = self._maps[:, columns].contiguous()
        other._maps_conj = self._maps_conj[:, columns].contiguous()
        other._plan()
        return other

    @property
    def weights(self) -> Tensor:
        """Centred ``(state, k2, k1)``, as given."""
        return torch.fft.fftshift(self._weights[:, 0, 0], dim=(-2, -1))

    @property
    def n_coils(self) -> int:
        return int(self._maps.shape[0])

    @property
    def n_states(self) -> int:
        return int(self._weights.shape[0])

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of a working image, ``(state, x, z, y)``."""
        return (self.n_states, *self._maps.shape[1:])

    @property
    def norm_bound(self) -> float:
        """Upper bound of the largest eigenvalue of ``normal``: largest weight squared times largest ``sum_c |s_c|^2``.

        Nearly reached where a state is fully sampled at the largest weight, hence no power iteration.
        """
        largest_map = float(self._maps.abs().square().sum(0).max())
        return float(self._weights_squared.max()) * largest_map

    def enter_image(self, image: Tensor) -> Tensor:
        """Centred ``(state, z, y, x)`` to the working layout."""
        return torch.fft.ifftshift(image, dim=(-3, -2)).movedim(-1, -3).contiguous()

    def leave_image(self, image: Tensor) -> Tensor:
        """Working layout to centred ``(state, z, y, x)``."""
        return torch.fft.fftshift(image, dim=(-2, -1)).movedim(-3, -1).contiguous()

    def enter_data(self, kspace: Tensor) -> Tensor:
        """Centred hybrid ``(state, coil, k2, k1, x)`` to *weighted* working data, the ``b`` of ``|A x - b|^2``."""
        return torch.fft.ifftshift(kspace, dim=(-3, -2)).movedim(-1, -3) * self._weights

    def forward(self, x: Tensor) -> Tensor:
        """Working images to weighted working data."""
        return torch.fft.fftn(x[:, None] * self._maps, dim=self._axes, norm="ortho") * self._weights

    def adjoint(self, y: Tensor) -> Tensor:
        """Weighted working data to working images."""
        return (torch.fft.ifftn(y * self._weights, dim=self._axes, norm="ortho") * self._maps_conj).sum(1)

    def project(self, kspace: Tensor, scale: float) -> Tensor:
        """``A^H b`` for centred hybrid data divided by ``scale``: state by state, so that no second k-space is ever held."""
        images = []
        for data, weights in zip(kspace, self._weights_squared, strict=True):
            y = torch.fft.ifftshift(data, dim=(-3, -2)).movedim(-1, -3) * (weights / scale)
            images.append((torch.fft.ifftn(y, dim=self._axes, norm="ortho") * self._maps_conj).sum(0))
        return torch.stack(images)

    def normal(self, x: Tensor) -> Tensor:
        """``S^H F^H W^2 F S x``, a few columns at a time so that the coil images never leave the cache.

        Operators act on the states one by one: ``x`` must have all of them.
        """
        weights = self._weights_squared
        if any(t.requires_grad for t in (x, self._maps, weights)):
            return torch.stack([torch.cat(list(self._normal_parts(image, w))) for image, w in zip(x, weights, strict=True)])
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for image, w, into in zip(x, weights, out, strict=True):
            for columns, part in zip(self._columns, self._normal_parts(image, w), strict=True):
                into[columns] = part
        return out

    def _normal_parts(self, image: Tensor, weights: Tensor) -> Iterator[Tensor]:
        for columns in self._columns:
            y = torch.fft.fftn(image[columns] * self._maps[:, columns], dim=self._axes)
            # in place where autograd need not look back
            y = y * weights if y.requires_grad else y.mul_(weights)
            y = torch.fft.ifftn(y, dim=self._axes)
            y = y * self._maps_conj[:, columns] if y.requires_grad else y.mul_(self._maps_conj[:, columns])
            yield y.sum(0)
