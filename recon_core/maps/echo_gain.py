"""Is one echo brighter or darker than the others say? R2* is wrong then, and the fit takes much of it up.

With the third of four echoes 30 % brighter R2* is 20 to 50 % too low, and looks as good as any. What a straight line through the logarithms
leaves has one sign in all voxels, and so they are asked together: by how much does each echo alone deviate from the line through the
others, and how much of what the line through all leaves does that explain?

A wrong echo time looks alike. (`recon_core.maps.state_gain` asks the same of an inversion recovery.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.maps.saturation import strong_signal, weighted_median
from recon_core.types import ParameterMap

Tensor = torch.Tensor

FEWEST_ECHOES, FEWEST_VOXELS, MOST_ASKED = 4, 200, 20_000
"""Two parameters and a gain leave nothing of three echoes that could tell which."""

LEAST_OVER_NOISE = 5.0
"""Of every echo of a voxel over the noise of a real number: below, magnitudes are lifted by it."""

LEAST_GAIN, LEAST_EXPLAINED = 0.06, 0.15
"""Simulated heads (1.5 to 7 T, 4 to 10 echoes, SNR 12 to 140, fat) have gains up to 0.02 that explain 0.003 at most. Myelin water, 12 % of
half of the voxels, explains up to 0.21 by a gain of 0.02; fields that bend within voxels make the first echo up to 0.1 darker, which
explains 0.07. Echoes that are 10 % brighter or darker explain 0.18 to 0.5."""

LEAST_WRONG = 0.03
"""Error of R2* from which on the operator is told."""


@dataclass(frozen=True)
class EchoGain:
    """One echo that is brighter or darker than the others say.

    Attributes
    ----------
    time
        Of the echo, in s.
    size
        Natural logarithm of the factor by which it is brighter.
    explained
        By how much that makes what the line leaves smaller, as a part of it, in the mean over voxels.
    r2star_error
        Relative error of R2* that follows, median over voxels.
    """

    time: float
    size: float
    explained: float
    r2star_error: float

    @property
    def note(self) -> str:
        """What the operator has to know; empty where that is nothing."""
        if abs(self.size) < LEAST_GAIN or self.explained < LEAST_EXPLAINED or abs(self.r2star_error) < LEAST_WRONG:
            return ""
        how, low = "brighter" if self.size > 0 else "darker", "low" if self.r2star_error < 0 else "high"
        return (
            f"the echo of {1e3 * self.time:g} ms is {100 * abs(math.expm1(self.size)):.0f} % {how} than the others say: if that is its "
            f"scaling or receiver gain, R2* is about {100 * abs(self.r2star_error):.0f} % too {low}; a wrong echo time looks alike"
        )


def echo_gain(images: Tensor, echo_times: Sequence[float], noise_std: float | None, r2star: ParameterMap) -> EchoGain | None:
    """The echo of which another gain explains most.

    Parameters
    ----------
    images
        ``(echo, z, y, x)``, complex or magnitudes.
    echo_times
        s, one for each.
    noise_std
        SD of the noise of one real number, images' unit; ``None`` where there is none.
    r2star
        As it was fitted: how wrong that is, is told.

    Returns
    -------
    EchoGain
        ``None`` where too few echoes or voxels can tell.
    """
    if len(echo_times) < FEWEST_ECHOES:
        return None
    magnitude = images.abs()
    clear = strong_signal(images) & r2star.valid & (magnitude.amin(0) > LEAST_OVER_NOISE * (noise_std or 0.0))
    n_clear = int(clear.sum())
    if n_clear < FEWEST_VOXELS:
        return None
    step = -(-n_clear // MOST_ASKED)
    signal, fitted = magnitude[:, clear][:, ::step].double(), r2star.data[clear][::step].double()
    logs, weight = signal.log(), signal.square() / signal.square().sum(0)  # the noise of a logarithm goes with 1 / signal
    t = torch.tensor(echo_times, dtype=torch.float64, device=images.device)[:, None]
    left, _ = _off_the_line(logs, weight, t)
    length = (weight * left.square()).sum(0).sqrt()
    found = []
    for echo in range(len(echo_times)):
        others = weight.clone()
        others[echo] = 0
        beyond, _ = _off_the_line(logs, others, t)
        size, _ = weighted_median(beyond[echo], weight[echo])
        corrected = logs.clone()
        corrected[echo] -= size
        rest, true = _off_the_line(corrected, weight, t)
        shorter = length - (weight * rest.square()).sum(0).sqrt()
        decays = true > 1.0
        error = float((fitted / true - 1)[decays].median()) if bool(decays.any()) else 0.0
        total = float(length.sum())
        found.append(EchoGain(echo_times[echo], size, float(shorter.sum()) / total if total > 0 else 0.0, error))
    return max(found, key=lambda gain: gain.explained)


def _off_the_line(logs: Tensor, weight: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """What a weighted straight line leaves of ``(echo, voxel)``, and its rate of decay."""
    total = weight.sum(0)
    mean_t, mean = (weight * t).sum(0) / total, (weight * logs).sum(0) / total
    slope = (weight * (t - mean_t) * (logs - mean)).sum(0) / (weight * (t - mean_t).square()).sum(0)
    return logs - mean - slope * (t - mean_t), -slope
