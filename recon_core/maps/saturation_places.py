"""Does the recovery from saturation begin alike everywhere? Parts of the object, and what is to be said of those that differ.

Where coil maps are the cause, T1 is wrong there indeed, but by another size and sign than follow from the remainder
(`benchmarks.t1_checks`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor

MOST_PER_SIDE = 4
"""The object is divided into at most so many rows, and each of them into as many parts."""

FEWEST_IN_PART = 100
"""Pixels, below which there are fewer parts."""

WORTH_A_WORD = 0.06
"""Error of T1, beyond doubt, of a part that the operator is told. Good scans show up to 0.03, where coil maps are right
(`benchmarks.t1_checks`)."""


@dataclass(frozen=True)
class Place:
    """What the saturation left in one part of the object.

    Attributes
    ----------
    n_pixels
        Of the part.
    left, doubt
        Part of M0 that is left, and two standard errors of it.
    t1_error
        Relative error of T1 that follows, median.
    """

    n_pixels: int
    left: float
    doubt: float
    t1_error: float

    @property
    def sure_error(self) -> float:
        """The size of the error that is beyond doubt."""
        return abs(self.t1_error) * max(0.0, 1 - self.doubt / abs(self.left)) if self.left else 0.0


def parts(inside: Tensor) -> list[Tensor]:
    """Numbers of the pixels of each part, of equal size; none where the object is too small to be divided.

    Parameters
    ----------
    inside
        bool ``(..., y, x)``; pixels are counted in the order of its true ones.
    """
    y, x = inside.nonzero()[:, -2:].T
    per_side = min(MOST_PER_SIDE, int((len(y) / FEWEST_IN_PART) ** 0.5))
    if per_side < 2:
        return []
    rows = torch.argsort(y, stable=True).tensor_split(per_side)
    return [part for row in rows for part in row[torch.argsort(x[row], stable=True)].tensor_split(per_side)]


def note_of_places(places: Sequence[Place]) -> str:
    """What the operator has to know of parts in which T1 is wrong; empty where there are none.

    The size is a lower bound: bad coil maps make T1 more wrong than a remainder would (`benchmarks.t1_checks`).
    """
    wrong = [place for place in places if place.sure_error > WORTH_A_WORD]
    if not wrong:
        return ""
    share = sum(place.n_pixels for place in wrong) / sum(place.n_pixels for place in places)
    worst = max(place.sure_error for place in wrong)
    low, high = (pick(place.left for place in places) for pick in (min, max))
    return (
        f"T1 is wrong in {100 * share:.0f} % of the object, by {100 * worst:.0f} % and more in places: the recovery seems to begin at "
        f"{round(100 * low)} to {round(100 * high)} % of M0 from place to place (a saturation that follows B1, coil maps of too few "
        "calibration lines, motion, or a spike in k-space)"
    )
