"""Losses that more than one method trains with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def weighted_mse(images: Tensor, truth: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """``mean(w |x - t|^2)`` over all elements, a complex one counting as two real ones.

    Parameters
    ----------
    images, truth
        Same shape, real or complex.
    weight
        Real, broadcasts to them.
    """
    difference = images - truth
    if difference.is_complex():
        return (weight * (difference.real.square() + difference.imag.square())).mean() / 2
    return (weight * difference.square()).mean()


def deep_supervision(
    predictions: Sequence[Tensor], truth: Tensor, weight: Tensor | float, *, first: float, others: float
) -> Tensor:
    """`weighted_mse` of the last prediction, plus small parts of those of the earlier ones.

    Parameters
    ----------
    predictions
        In order of the iterations, the last one counting in full.
    first, others
        Factors of the first prediction, and of those between it and the last.

    References
    ----------
    Wang et al., Training deeper convolutional networks with deep supervision, arXiv:1505.02496; PINQI, section III-B.
    """
    total = weighted_mse(predictions[-1], truth, weight)
    for i, prediction in enumerate(predictions[:-1]):
        factor = first if i == 0 else others
        if factor:
            total = total + factor * weighted_mse(prediction, truth, weight)
    return total
