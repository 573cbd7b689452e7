"""One evaluation of the loss and its gradient into every parameter, with memory bounded by a chunk of pixels.

The chain is short and each link is linear but the MLPs: table -> features -> components c -> images x = m c -> |A x - b|^2. With
``G = dL/dx`` from the operator, ``dL/dc = m^T G`` and ``dL/dm = G c^T`` (real pairs), so autograd only ever sees the MLPs, a
chunk of pixels at a time, and the state heads. What a chunk needs for its gradient is kept, or thrown away and computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from recon_core.methods.moe_dqinr.encoding import SparseProduct
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.objective import Target

Tensor = torch.Tensor

PRECISIONS = ("float32", "tf32", "bfloat16")
"""Of the MLPs' products on a GPU; ``bfloat16`` also on CPUs. Everything else keeps the parameters' precision."""


@contextmanager
def matmul_precision(precision: str) -> Iterator[torch.dtype | None]:
    """Let products of float32 matrices use TF32 inside the block; yields the type to which MLPs cast, ``None`` for no cast."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield torch.bfloat16 if precision == "bfloat16" else None
    finally:
        backend.fp32_precision = before


class Part:
    """Some readout columns of the problem: every ``n_parts``-th from ``index``. One part of one is the whole problem.

    Attributes
    ----------
    objective
        Of these columns.
    product
        Interpolation at their pixels (inside the field's support).
    pixels
        From those pixels' values to the images of these columns.
    """

    def __init__(self, field: MoeField, objective: Target, index: int = 0, n_parts: int = 1) -> None:
        self.n_parts = n_parts
        self.objective: Target
        self.product: SparseProduct
        if n_parts == 1:
            self.objective, self.product, self.pixels = objective, field.encoder.product, field.pixels
        else:
            self.objective = objective.columns(index, n_parts)
            self.pixels, inside = field.pixels.columns(index, n_parts, field.encoder.table.device)
            self.product = field.encoder.product_of(inside)


class _Slope(torch.autograd.Function):
    """Nothing, with a slope of one's own choice."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return values.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return slope, None


def send_back(values: Tensor, slope: Tensor) -> None:
    """``values.backward(slope)``, which has torch import sympy (1.5 s, once in a process) to compare two shapes; here they are alike."""
    nothing: Tensor = _Slope.apply(values, slope)
    nothing.backward()


class Evaluation:
    """Value and gradient of ``factor * sum_q |A_q x_q - b_q|^2`` for one part, added to the parameters' ``.grad``.

    ``factor`` is the number of parts, over Q where the configuration normalises by states.

    Parameters
    ----------
    field, part
        What is differentiated, and where.
    chunk
        Pixels at a time; 0: all at once.
    recompute
        Throw the MLPs' intermediate values away and compute them again, a chunk at a time, for the gradient: a third more
        products, and memory for one chunk only.
    precision
        Type that the MLPs cast to, or ``None``.

    Attributes
    ----------
    images
        The series of the last evaluation, complex ``(state, x, z, y)`` of the part.
    """

    def __init__(self, field: MoeField, part: Part, chunk: int, recompute: bool, precision: torch.dtype | None) -> None:
        self.field, self.part, self.recompute, self.precision = field, part, recompute, precision
        self.chunk = chunk or part.product.n_pixels
        self.factor = part.n_parts / (field.n_states if field.configuration.state_normalised else 1)
        self.images: Tensor

    def __call__(self) -> Tensor:
        """``|A_q x_q - b_q|^2`` of each state, float64, times the number of parts (an estimate of the whole)."""
        field, part = self.field, self.part
        table = field.encoder.table
        features = part.product.forward(table.detach())
        chunks = features.split(self.chunk)
        pieces = [] if self.recompute else [self._forward(chunk) for chunk in chunks]
        if self.recompute:
            with torch.no_grad():
                values = torch.cat([field.components(chunk, self.precision) for chunk in chunks], dim=1)
        else:
            values = torch.cat([out.detach() for _, out in pieces], dim=1)
        mixing = part.objective.mixing(field)
        mixed = mixing.detach() @ values.flatten(1)
        self.images = part.pixels.as_images(mixed.reshape(len(mixing), -1, 2))
        value, gradient = part.objective.value_and_gradient(self.images)
        slope = part.pixels.as_values(gradient).flatten(1) * (2 * self.factor)
        if mixing.requires_grad:
            send_back(mixing, slope @ values.flatten(1).mT)
        slopes = (mixing.detach().mT @ slope).reshape(values.shape).split(self.chunk, dim=1)
        feature_slopes = []
        for index, slope_of_chunk in enumerate(slopes):
            leaf, out = self._forward(chunks[index]) if self.recompute else pieces[index]
            send_back(out, slope_of_chunk)
            assert leaf.grad is not None
            feature_slopes.append(leaf.grad)
        change = part.product.transpose(torch.cat(feature_slopes))
        table.grad = change if table.grad is None else table.grad + change
        return value * part.n_parts

    def _forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        leaf = features.detach().requires_grad_()
        return leaf, self.field.components(leaf, self.precision)


def activation_bytes(field: MoeField, n_pixels: int, precision: torch.dtype | None) -> int:
    """About what the MLPs keep for their gradient: inputs and outputs of every SiLU."""
    size = (precision or field.encoder.table.dtype).itemsize
    hidden = sum(b.n_branches * b.shape.width * b.shape.depth for b in field.image_branches)
    return 2 * hidden * n_pixels * size
