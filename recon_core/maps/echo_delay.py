"""Did one echo come at another time than the header says? R2* and field are wrong then, and both fits look sound.

What a straight line through the phases leaves is, in an echo that came ``delta`` late, ``2 pi f delta``: it follows the field from voxel to
voxel. Brightness does not matter, so that a wrong time is told from a wrong gain (`recon_core.maps.echo_gain`). Times that are all shifted
leave nothing, nor do times that are all scaled: the phases cannot tell.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.maps.field import FieldMaps

Tensor = torch.Tensor

FEWEST_ECHOES, FEWEST_VOXELS = 4, 1000
"""A line leaves too little of three echoes to tell which."""

LAG = 3
"""Voxels between which phase and field are compared: eddy currents, which bend phases over the whole volume, hardly differ there."""

LEAST_EXPLAINED = 0.8
"""Part of what follows the field that one echo has to explain."""

LEAST_WRONG = 0.03
"""Relative error of R2* and field from which on the operator is told."""


@dataclass(frozen=True)
class EchoDelay:
    """One echo that came at another time than it should have.

    Attributes
    ----------
    time
        Of the echo as stated, s.
    late
        By how much it came later, s.
    explained
        Part of the squared phases following the field that this takes away.
    error
        Relative error of the field that follows, and nearly that of R2*.
    """

    time: float
    late: float
    explained: float
    error: float

    @property
    def note(self) -> str:
        """What the operator has to know; empty where that is nothing."""
        if self.explained < LEAST_EXPLAINED or abs(self.error) < LEAST_WRONG:
            return ""
        return (
            f"the phases say that the echo of {1e3 * self.time:g} ms was at {1e3 * (self.time + self.late):.1f} ms: if so, R2*, field and "
            f"susceptibility are about {100 * abs(self.error):.0f} % too {'high' if self.error > 0 else 'low'}. Check the "
            "echo times in the header"
        )


def echo_delay(images: Tensor, echo_times: Sequence[float], field: FieldMaps) -> EchoDelay | None:
    """The echo of which another time explains most.

    Parameters
    ----------
    images
        Complex ``(echo, z, y, x)``: what the field was fitted to.
    echo_times
        s, one for each.
    field
        Of `fit_field`.

    Returns
    -------
    EchoDelay
        ``None`` where too few echoes or voxels can tell, or the field is the same everywhere.
    """
    inside = field.field.valid
    if len(echo_times) < FEWEST_ECHOES or int(inside.sum()) < FEWEST_VOXELS:
        return None
    turns, offset = 2 * math.pi * field.field.data, field.phase_offset.data
    left = torch.stack(
        [
            (s * torch.polar(torch.ones_like(turns), -offset - turns * t)).angle()
            for s, t in zip(images, echo_times, strict=True)
        ]
    )
    power = images.abs().square() * inside
    follow, size = torch.zeros(2, len(echo_times), dtype=torch.float64, device=images.device)
    for axis in range(1, 4):
        n = images.shape[axis] - LAG
        if n < 1:
            continue
        first, second = power.narrow(axis, 0, n), power.narrow(axis, LAG, n)
        weight = first * second / (first + second).clamp_min(torch.finfo(first.dtype).tiny)
        apart = (turns.narrow(axis - 1, LAG, n) - turns.narrow(axis - 1, 0, n)).expand_as(weight)
        change = left.narrow(axis, LAG, n) - left.narrow(axis, 0, n)
        total = weight.sum((1, 2, 3), keepdim=True).clamp_min(torch.finfo(first.dtype).tiny)
        apart, change = (v - (weight * v).sum((1, 2, 3), keepdim=True) / total for v in (apart, change))
        follow += (weight * apart * change).sum((1, 2, 3)).double()
        size += (weight * apart.square()).sum((1, 2, 3)).double()
    if not bool((size > 0).all()):
        return None
    return _most(follow / size, size, torch.tensor(echo_times, dtype=torch.float64, device=images.device))


def _most(delays: Tensor, weight: Tensor, t: Tensor) -> EchoDelay | None:
    """``delays`` are what a line leaves of each echo's; s."""
    found = []
    left, _ = _off_the_line(delays, weight, t)
    whole = float((weight * left.square()).sum())
    for echo in range(len(t)):
        others = weight.clone()
        others[echo] = 0
        beyond, _ = _off_the_line(delays, others, t)
        single = torch.zeros_like(delays)
        single[echo] = beyond[echo]
        rest, _ = _off_the_line(delays - single, weight, t)
        _, slope = _off_the_line(single, weight, t)
        scale = 1 / (1 - slope) if slope < 0.9 else math.inf  # delays were found against a field that is as wrong
        explained = 1 - float((weight * rest.square()).sum()) / whole if whole > 0 else 0.0
        found.append(EchoDelay(float(t[echo]), scale * float(beyond[echo]), explained, scale - 1))
    return max(found, key=lambda delay: delay.explained)


def _off_the_line(values: Tensor, weight: Tensor, t: Tensor) -> tuple[Tensor, float]:
    """What a weighted straight line leaves, and its slope."""
    total = weight.sum()
    mean_t, mean = (weight * t).sum() / total, (weight * values).sum() / total
    slope = (weight * (t - mean_t) * (values - mean)).sum() / (weight * (t - mean_t).square()).sum()
    return values - mean - slope * (t - mean_t), float(slope)
