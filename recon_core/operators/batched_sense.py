"""Multi-coil Cartesian acquisition of many 2D samples at once, differentiable in images, data *and coil maps*.

What a network needs: a batch of samples that each have their own coil maps and their own sampling in every state (training), or
one slice (reconstruction), by the same code. The readout is complete and already transformed, so only the FFT over k1 remains.

    working image  ``(batch, state, x, y)``          centred
    working data   ``(batch, state, coil, x, k1)``   DC at index 0 of k1

Images stay centred. ``F^H W^2 F`` is a circular convolution along y, which commutes with the circular shift that separates a
centred from an uncentred transform; the shift is left as a linear phase over k1 that `BatchedSense.enter_data` gives the data
once. Hence networks, masks of tissue and the solver see the same images and nothing is shifted in the loop. y is last because the
FFT then runs along memory: half the time of a transform along the other axis.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from recon_core.errors import DataError
from recon_core.operators.cartesian import ACCELERATOR_BLOCK, CPU_BLOCK

Tensor = torch.Tensor
Block = tuple[slice, slice, slice]


class BatchedSense:
    """``A = W F S`` for each sample: multiply with its coil maps, orthonormal FFT over k1, weight the samples of each state.

    Parameters
    ----------
    coil_maps
        complex ``(batch, coil, y, x)``, centred. Gradients reach it through `forward`, `adjoint` and `normal` (PINQI, Eq. 18).
    weights
        real or bool ``(batch, state, k1)``, centred: 0 where nothing was sampled, else the factor on residuals, as in
        `CartesianSense`. No gradient.

    Raises
    ------
    DataError
        The shapes do not fit together, or the maps are not complex.
    """

    def __init__(self, coil_maps: Tensor, weights: Tensor) -> None:
        fits = coil_maps.ndim == 4 and weights.ndim == 3 and coil_maps.is_complex()
        if not fits or (coil_maps.shape[0], coil_maps.shape[2]) != (weights.shape[0], weights.shape[2]):
            raise DataError(
                "coil maps and sampling do not fit",
                where="batched Cartesian operator",
                got=f"maps {tuple(coil_maps.shape)} {coil_maps.dtype}, weights {tuple(weights.shape)}",
                expected="complex (batch, coil, y, x) and (batch, state, k1) with y = k1",
            )
        self._maps = coil_maps.movedim(-1, -2).contiguous()  # (batch, coil, x, y)
        self._maps_conj = self._maps.detach().conj().resolve_conj()
        shifted = torch.fft.ifftshift(weights.detach(), dim=-1).to(coil_maps.real.dtype)
        self._weights = shifted[:, :, None, None]  # (batch, state, 1 coil, 1 x, k1)
        self._weights_squared = self._weights**2
        self._blocks = self._split(CPU_BLOCK if coil_maps.device.type == "cpu" else ACCELERATOR_BLOCK)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of a working image, ``(batch, state, x, y)``."""
        return (*self._weights.shape[:2], *self._maps.shape[2:])

    @property
    def weights(self) -> Tensor:
        """The weights as they were given, ``(batch, state, k1)``, centred, in the maps' real dtype."""
        return torch.fft.fftshift(self._weights[:, :, 0, 0], dim=-1)

    @property
    def coil_maps(self) -> Tensor:
        """The maps as they were given, ``(batch, coil, y, x)``."""
        return self._maps.movedim(-1, -2)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient with respect to the coil maps is wanted."""
        return self._maps.requires_grad

    def enter_image(self, image: Tensor) -> Tensor:
        """Centred ``(batch, state, y, x)`` to the working layout."""
        return image.movedim(-1, -2).contiguous()

    def leave_image(self, image: Tensor) -> Tensor:
        """Working layout to centred ``(batch, state, y, x)``."""
        return image.movedim(-1, -2).contiguous()

    def enter_data(self, kspace: Tensor) -> Tensor:
        """Centred hybrid ``(batch, state, coil, k1, x)`` to *weighted* working data, the ``b`` of ``|A x - b|^2``."""
        n = kspace.shape[-2]
        frequency = torch.arange(n, device=kspace.device, dtype=self._weights.dtype)
        turns = (frequency * (n // 2)) % n  # exact, so that the phase of a high frequency is not lost in rounding
        ramp = torch.polar(torch.ones_like(turns), turns * (-2 * math.pi / n))
        return torch.fft.ifftshift(kspace, dim=-2).movedim(-1, -2) * (ramp * self._weights)

    def forward(self, x: Tensor) -> Tensor:
        """Working images to weighted working data."""
        return torch.fft.fft(x[:, :, None] * self._maps[:, None], norm="ortho") * self._weights

    def adjoint(self, y: Tensor) -> Tensor:
        """Weighted working data to working images."""
        return (torch.fft.ifft(y * self._weights, norm="ortho") * self._maps.conj()[:, None]).sum(2)

    def normal(self, x: Tensor) -> Tensor:
        """``S^H F^H W^2 F S x`` in blocks that fit the cache; differentiable by closed formulas that keep no coil image."""
        if tuple(x.shape) != self.image_shape:
            raise DataError("wrong shape", where="batched Cartesian operator", got=tuple(x.shape), expected=self.image_shape)
        return _Normal.apply(x, self._maps, self) if torch.is_grad_enabled() else self._apply_normal(x)

    def _split(self, largest: int) -> list[Block]:
        """Slices of samples, states and columns whose coil images have about ``largest`` elements."""
        n_coils = self._maps.shape[1]
        n_samples, n_states, n_x, n_y = self.image_shape
        columns = max(1, min(n_x, largest // max(1, n_coils * n_y)))
        states = max(1, min(n_states, largest // max(1, n_coils * n_y * columns)))
        samples = max(1, min(n_samples, largest // max(1, n_coils * n_y * columns * states)))
        return [
            (slice(b, b + samples), slice(s, s + states), slice(c, c + columns))
            for b in range(0, n_samples, samples)
            for s in range(0, n_states, states)
            for c in range(0, n_x, columns)
        ]

    def _filtered(self, image: Tensor, block: Block) -> Tensor:
        """``F^H W^2 F S x`` of one block, ``(batch, state, coil, x, y)``."""
        samples, states, columns = block
        coil_images = image[samples, states, None, columns] * self._maps[samples, None, :, columns]
        spectrum = torch.fft.fft(coil_images).mul_(self._weights_squared[samples, states])
        return torch.fft.ifft(spectrum)

    @torch.no_grad()
    def _apply_normal(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        for block in self._blocks:
            samples, states, columns = block
            combined = self._filtered(x, block).mul_(self._maps_conj[samples, None, :, columns])
            out[samples, states, columns] = combined.sum(2)
        return out

    @torch.no_grad()
    def _maps_gradient(self, left: Tensor, right: Tensor) -> Tensor:
        """Gradient of ``Re <left, A^H A right>`` with respect to the maps, summed over states, ``(batch, coil, x, y)``.

        ``conj(right) N (c left) + conj(left) N (c right)`` with ``N = F^H W^2 F``: the two terms of PINQI, Eq. (18).
        """
        gradient = torch.zeros_like(self._maps)
        for block in self._blocks:
            samples, states, columns = block
            terms = self._filtered(left, block).mul_(right[samples, states, None, columns].conj())
            terms += self._filtered(right, block).mul_(left[samples, states, None, columns].conj())
            gradient[samples, :, columns] += terms.sum(1)
        return gradient


class _Normal(torch.autograd.Function):
    """``A^H A x``: self-adjoint in ``x``, quadratic in the maps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, maps: Tensor, operator: BatchedSense) -> Tensor:
        ctx.save_for_backward(x if maps.requires_grad else None)
        ctx.operator = operator
        return operator._apply_normal(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        of_x = ctx.operator._apply_normal(gradient) if ctx.needs_input_grad[0] else None
        of_maps = ctx.operator._maps_gradient(gradient, x) if ctx.needs_input_grad[1] else None
        return of_x, of_maps, None
