"""Does a saturation recovery begin at zero? What an incomplete saturation leaves makes every T1 of the scan wrong, and hardly shows.

A fit of M0 and T1 takes most of it up: with 10 % of M0 left, T1 of 0.3 to 1.8 s comes out 5 to 16 % too short, and what remains
unexplained is 2 % of the signal, no more than many a good scan leaves. But it has the same sign in all pixels. So the residual of the
fit is compared with the change that a remainder would make, ``M0 exp(-t R1)``, as far as M0 and T1 cannot imitate it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recon_core.signal_models.saturation_recovery import along_states

Tensor = torch.Tensor

OBJECT = 0.1
"""A pixel belongs to the object if its RMS over the states is at least this part of the 99.9th percentile."""

MOST_LEFT = 0.04
"""Part of M0 left by the saturation above which the operator is told: T1 is then up to 6 % wrong. Good scans show up to 0.01, and 0.03
where noise is 15 % of M0 at 8x."""

NO_SATURATION = 0.3
"""Above this the recovery is none from saturation: other delays, or an inversion."""

FEWEST_PIXELS = 50


def magnetisation_left(images: Tensor, m0: Tensor, t1: Tensor, times: Sequence[float]) -> float | None:
    """Part of M0 with which the recovery begins, 0 after a complete saturation: the median over pixels, to first order.

    ``r_i = M0 (1 - (1 - a) exp(-t_i / T1))``, ``a`` from the residual of the fit with ``a = 0``; a pixel counts by what it tells of ``a``.
    Neither ``M0`` nor ``T1`` has to be exact. An ``a`` that is not small comes out too large by a fifth or, if negative, too near to zero.

    Parameters
    ----------
    images
        ``(state, pixel)``, complex or signed; such as were not drawn towards the recovery.
    m0, t1
        Of the fit, ``(pixel,)``; T1 in s.
    times
        Delays in s.

    Returns
    -------
    ``None`` where fewer than `FEWEST_PIXELS` pixels or than three different delays can tell.
    """
    if t1.numel() < FEWEST_PIXELS or len(set(times)) < 3:
        return None
    amplitude = m0.abs().double()
    along = images * (m0.conj() / m0.abs().clamp_min(torch.finfo(amplitude.dtype).tiny))
    axis = (along.real if along.is_complex() else along).double()
    rate = 1 / t1.double()
    delays = along_states(times, rate)
    decay = torch.exp(-delays * rate)
    recovered, slope = 1 - decay, delays * decay  # derivatives by M0 and (over M0) by the rate
    slope = _without(slope, recovered)
    change = _without(_without(decay, recovered), slope)
    tells = change.square().sum(0)
    left = (change * (axis / amplitude - recovered)).sum(0) / tells
    weight = amplitude.square() * tells
    known = torch.isfinite(left) & torch.isfinite(weight) & (weight > 0)
    if int(known.sum()) < FEWEST_PIXELS:
        return None
    left, order = left[known].sort()
    share = weight[known][order].cumsum(0)
    return float(left[int((share < share[-1] / 2).sum())])


def strong_signal(images: Tensor) -> Tensor:
    """bool ``(*pixels)``: where the RMS over states of ``(state, *pixels)`` is at least `OBJECT` of its 99.9th percentile."""
    strength = images.abs().square().mean(0).sqrt()
    flat = strength.flatten()
    top = float(flat.kthvalue(max(1, math.ceil(0.999 * flat.numel()))).values)
    return (strength >= OBJECT * top) & (strength > 0)


def saturation_note(left: float | None) -> str:
    """What the operator has to know of what the saturation left; empty where that is next to nothing."""
    if left is None or abs(left) <= MOST_LEFT:
        return ""
    wrong, why = ("too short", "incomplete saturation") if left > 0 else ("too long", "inverted magnetisation")
    return (
        f"the recovery seems to begin at {100 * left:.0f} % of M0 and not at zero ({why}, wrong delays, or states of unlike gain): "
        f"T1 is {wrong}"
    )


def _without(vector: Tensor, direction: Tensor) -> Tensor:
    """``vector`` less its part along ``direction``, over the states."""
    return vector - direction * ((vector * direction).sum(0) / direction.square().sum(0).clamp_min(1e-300))
