"""Losses that more than one method trains with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

Tensor = torch.Tensor

LEAST_POWER = 1e-4
"""Signal below a hundredth of the brightest has no logarithm worth fitting."""


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


def channel_ssim(images: Tensor, truth: Tensor, *, window: int = 11, sigma: float = 1.5) -> Tensor:
    """Mean structural similarity of real and imaginary parts, each plane of its own; dynamic range 1.

    Gaussian window, zeros around the planes, ``c1 = 0.01^2``, ``c2 = 0.03^2``.

    Parameters
    ----------
    images, truth
        complex ``(..., z, y)``, the same shape.

    References
    ----------
    LARO, Eq. 9 (there with square windows of 10; the authors' code has these).
    """
    a, b = (torch.view_as_real(part).movedim(-1, -3).flatten(0, -3)[:, None] for part in (images, truth))
    offsets = torch.arange(window, dtype=a.dtype, device=a.device) - window // 2
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    n = len(a)
    means = torch.cat((a, b, a * a, b * b, a * b))
    means = functional.conv2d(means, kernel[None, None, :, None], padding=(window // 2, 0))
    means = functional.conv2d(means, kernel[None, None, None, :], padding=(0, window // 2))
    mean_a, mean_b, aa, bb, ab = means.split(n)
    c1, c2 = 0.01**2, 0.03**2
    variance = aa - mean_a**2 + bb - mean_b**2
    found = (2 * mean_a * mean_b + c1) * (2 * (ab - mean_a * mean_b) + c2)
    return (found / ((mean_a**2 + mean_b**2 + c1) * (variance + c2))).mean()


def decay_error(images: Tensor, truth: Tensor, echo_times: Sequence[float], inside: Tensor) -> Tensor:
    """Mean absolute error of the decay rate inside, times the length of the echo train: without unit.

    Rates are slopes of ``log |s|`` over time, weighted by the truth's ``|s|^2`` (what the noise of a logarithm asks for), for estimate and
    truth alike. A loss of images alone sees a fault of a dim late echo as a small one; R2* does not.

    Parameters
    ----------
    images, truth
        complex ``(plane, echo, z, y)``; the brightest tissue near 1.
    echo_times
        s.
    inside
        bool ``(plane, 1, z, y)``.
    """
    times = torch.tensor(echo_times, dtype=truth.real.dtype, device=truth.device)[None, :, None, None]
    weight = truth.abs().square() + LEAST_POWER
    away = times - (weight * times).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    slopes = weight * away / (weight * away.square()).sum(1, keepdim=True)
    logarithms = [0.5 * torch.log(x.real.square() + x.imag.square() + LEAST_POWER) for x in (images, truth)]
    error = (slopes * (logarithms[0] - logarithms[1])).sum(1, keepdim=True).abs()
    return (error * inside).sum() / inside.sum().clamp_min(1) * (times.max() - times.min())
