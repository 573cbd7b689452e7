"""What tells a good fit from a collapsed one: residual of each state, numerical rank of the series, routing weights.

The loss alone does not: experts that stay alike leave the series near rank two with a loss that looks converged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.objective import Objective

Tensor = torch.Tensor


@dataclass(frozen=True)
class Diagnostics:
    """Of one fitted slice; all on the CPU.

    Attributes
    ----------
    residuals
        float64 ``(state,)``: RMS data residual over the noise's standard deviation; 1.0 at the noise floor, above it where the
        representation cannot follow the data, below it where it follows the noise.
    singular_values
        float64 ``(min(state, pixel),)`` of the Casorati matrix (state x pixel), falling.
    rank
        How many of them stand above the noise.
    routing
        alpha ``(state, expert)``, Eq. 19.
    """

    residuals: Tensor
    singular_values: Tensor
    rank: int
    routing: Tensor


def diagnose(field: MoeField, objective: Objective, images: Tensor) -> Diagnostics:
    """Look at the series that a fit returned, complex working images ``(state, x, z, y)`` in scaled units."""
    values = casorati_singular_values(images)
    return Diagnostics(
        residuals=objective.relative_residuals(images).cpu(),
        singular_values=values,
        rank=numerical_rank(values, images.shape[0], images[0].numel(), objective.noise),
        routing=field.routing().detach().cpu(),
    )


def casorati_singular_values(images: Tensor) -> Tensor:
    """Singular values of the matrix state x pixel, float64, falling; through the small Gram matrix in double precision."""
    matrix = images.reshape(images.shape[0], -1).to(torch.complex128)
    gram = matrix @ matrix.mH if matrix.shape[0] <= matrix.shape[1] else matrix.mH @ matrix
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0).cpu()


def numerical_rank(singular_values: Tensor, n_states: int, n_pixels: int, noise: float) -> int:
    """Singular values above the largest one of pure noise, ``noise (sqrt(pixels) + sqrt(states))`` (Marchenko-Pastur).

    ``noise`` is that of a complex sample, which with orthonormal transforms and coil maps of unit norm is also that of a pixel of
    a fully sampled image. Without noise, what float32 can tell from zero counts.
    """
    rounding = 1e-6 * float(singular_values[0]) if len(singular_values) else 0.0
    threshold = max(noise * (math.sqrt(n_pixels) + math.sqrt(n_states)), rounding)
    return int((singular_values > threshold).sum())
