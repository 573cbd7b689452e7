"""Is one image of an inversion recovery brighter or darker than the others say? T1 is wrong then, and three parameters take much of it up.

With the first of eight MOLLI images 20 % darker T1 is 7 % too short in all tissue. (Of a saturation recovery, whose fit has two
parameters, `recon_core.maps.saturation` asks for more than that.) What the fit leaves has one sign in all pixels, and so they are asked
together: by how much does each image alone have to be brighter, and how much of what the fit leaves does that explain?

A time that is wrong looks alike, and so do those of a whole inversion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.maps.recovery_residual import RecoveryResidual
from recon_core.maps.saturation import FEWEST_PIXELS, MEDIAN_TO_MEAN, MOST_WRONG, weighted_median

Tensor = torch.Tensor

FEWEST_TIMES = 6
"""Three parameters leave three numbers to tell one image from the others."""

LEAST_EXPLAINED = 0.2
"""Part of what the fit leaves, in the mean over pixels, that one image has to explain. Good scans and measured series show up to 0.06;
where one of eight images is 10 % brighter or darker it is 0.5 and more (`benchmarks.molli_gains`)."""

LEAST_GAIN = 0.05
"""Beyond doubt. Tissue that exchanges magnetisation with an invisible pool recovers faster at first, which looks like some per cent."""

MOST_ASKED = 4000
"""Pixels, of all parts of the object."""

LEAST_WRONG = 0.02
"""Error of T1 that a quarter of the pixels exceed, from which on the operator is told."""


@dataclass(frozen=True)
class StateGain:
    """One image that is brighter or darker than the others say.

    Attributes
    ----------
    time
        Of the image, in s.
    size, doubt
        Part by which it is brighter, and two standard errors of it; to first order.
    explained
        By how much it makes what the fit leaves smaller, as a part of it, in the mean over pixels.
    t1_quartile
        Relative error of T1 that follows and that a quarter of the pixels exceed.
    """

    time: float
    size: float
    doubt: float
    explained: float
    t1_quartile: float

    @property
    def matters(self) -> bool:
        """Whether the operator has to know."""
        sure = abs(self.size) - self.doubt > LEAST_GAIN
        return sure and self.explained > LEAST_EXPLAINED and self.t1_quartile > LEAST_WRONG

    @property
    def forbids_map(self) -> bool:
        """Whether T1 is too wrong to be shown."""
        return self.matters and self.t1_quartile > MOST_WRONG

    @property
    def note(self) -> str:
        """What the operator has to know; empty where that is nothing."""
        if not self.matters:
            return ""
        how = "brighter" if self.size > 0 else "darker"
        return (
            f"the image of {self.time:g} s seems to be {100 * abs(self.size):.0f} % {how} than the others say: T1 is wrong, a quarter of "
            f"the pixels by about {100 * self.t1_quartile:.0f} % or more (receiver gain or scaling of that image, or wrong times of "
            "it or of its inversion)"
        )


def state_gain(
    images: Tensor, phase: Tensor | None, parameters: Tensor, times: Sequence[float], inside: Tensor
) -> StateGain | None:
    """The image of which another gain explains most of what the fit leaves.

    Parameters
    ----------
    images, phase, parameters, times, inside
        As in `recon_core.maps.state_motion.moved_state`.

    Returns
    -------
    StateGain
        ``None`` where too few pixels or times can tell.
    """
    if int(inside.sum()) < FEWEST_PIXELS or len(set(times)) < FEWEST_TIMES:
        return None
    step = -(-int(inside.sum()) // MOST_ASKED)
    asked = torch.zeros_like(inside)
    asked[tuple(inside.nonzero()[::step].T)] = True
    fitted = RecoveryResidual.of(images, phase, parameters[:, ::step], times, asked)
    left = torch.linalg.vector_norm(fitted.residual, dim=0)
    found = [f for state, time in enumerate(times) if (f := _gain(fitted, left, state, float(time))) is not None]
    return max(found, key=lambda gain: gain.explained, default=None)


def _gain(fitted: RecoveryResidual, left: Tensor, state: int, time: float) -> StateGain | None:
    signal = fitted.signal[state]
    beyond = -torch.einsum("spn,pn->sn", fitted.jacobian, fitted.estimate[:, state])
    beyond[state] += 1
    beyond = beyond * signal  # what no parameter can imitate of an image that is twice as bright
    weight = beyond.square().sum(0)
    sizes = (beyond * fitted.residual).sum(0) / weight
    error = (fitted.t1_change[state] * signal).abs()
    known = torch.isfinite(sizes) & torch.isfinite(error) & (weight > 0)
    if int(known.sum()) < FEWEST_PIXELS:
        return None
    size, spread = weighted_median(sizes[known], weight[known])
    n_equal = float(weight[known].sum().square() / weight[known].square().sum())
    # lengths and not squares: single pixels with artefacts must not decide
    shorter = left - torch.linalg.vector_norm(fitted.residual - size * beyond, dim=0)
    total = float(left[known].sum())
    quartile = error[known].sort().values[3 * int(known.sum()) // 4]
    return StateGain(
        time,
        size,
        2 * MEDIAN_TO_MEAN * spread / math.sqrt(n_equal),
        float(shorter[known].sum()) / total if total > 0 else 0.0,
        abs(size) * float(quartile),
    )
