"""What every field map, mask and weight has to be before anything is computed from it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recon_core.errors import DataError

Tensor = torch.Tensor


def checked_mask(mask: Tensor, shape: Sequence[int], where: str) -> Tensor:
    """The mask as bool.

    Raises
    ------
    DataError
        Another shape, or empty.
    """
    if tuple(mask.shape) != tuple(shape):
        raise DataError("mask and volume do not fit", where=where, got=tuple(mask.shape), expected=tuple(shape))
    inside = mask.bool()
    if not bool(inside.any()):
        raise DataError("mask is empty", where=where)
    return inside


def checked_field(local: Tensor, mask: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """The mask as bool and the field with zeros outside it.

    Raises
    ------
    DataError
        Wrong axes, an empty mask, values inside that are not finite.
    """
    if local.ndim != 3 or local.is_complex() or not local.is_floating_point():
        raise DataError("not a field map", where=where, got=f"{local.dtype} {tuple(local.shape)}", expected="real (z, y, x)")
    inside = checked_mask(mask, local.shape, where)
    data = torch.where(inside, local, torch.zeros((), dtype=local.dtype, device=local.device))
    if not bool(torch.isfinite(data).all()):
        raise DataError("field is not finite", where=where, expected="finite values inside the mask")
    return inside, data


def squared_weights(weights: Tensor | None, inside: Tensor, data: Tensor) -> Tensor:
    """``w^2`` with mean 1 inside the mask and 0 outside.

    Raises
    ------
    DataError
        Another shape, negative or not finite, all zero.
    """
    if weights is None:
        return inside.to(data.dtype)
    if weights.shape != data.shape or not bool((torch.isfinite(weights) & (weights >= 0))[inside].all()):
        raise DataError(
            "weights do not fit",
            where="maps",
            got=tuple(weights.shape),
            expected=f"{tuple(data.shape)}, finite, not negative",
        )
    squared = torch.where(inside, weights, 0.0).to(data.dtype).square()
    mean = squared[inside].mean()
    if not float(mean) > 0:
        raise DataError("all weights are zero", where="maps")
    return squared / mean
