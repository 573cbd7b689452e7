"""Do the images of an inversion recovery come in the order of their times? A list of times that was sorted, or in which two are exchanged,
gives a T1 that is wrong wherever it can be fitted at all.

With the second and third of eight MOLLI times exchanged, a third of the pixels is empty, and T1 is a tenth too short in the others. So
it is asked how much less the same times leave in another order: any two of them exchanged, all of them sorted, and the order in which
the signal itself rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from recon_core.maps.saturation import FEWEST_PIXELS, MOST_WRONG
from recon_core.maps.t1 import T1Maps

Tensor = torch.Tensor

FEWEST_TIMES = 5
"""Three parameters leave two numbers, by which an order can be told."""

MOST_EXCHANGED = 16
"""Times, of which any two may be exchanged; of more that would take seconds."""

MOST_ASKED = 500
"""Pixels, of all parts of the object."""

LEAST_EXPLAINED = 0.3
"""Part of what the recovery leaves, in the mean over pixels, that another order of the times has to explain. Good scans and measured series
show up to 0.02, images of another gain or place up to 0.13 (0.4 where one is half as bright), orders that make T1 wrong 0.46 and more
(`benchmarks.molli_gains`)."""

GRID, SHORTEST, LONGEST = 40, 0.03, 6.0
"""Apparent T1 that are tried, from and to in s; a tenth apart, which leaves less than noise does."""


@dataclass(frozen=True)
class TimesOrder:
    """Another order of the times that explains the images better.

    Attributes
    ----------
    stated, better
        Time of each image in s: as it was stated, and in the other order.
    explained
        By how much what the recovery leaves is smaller with it, as a part, in the mean over pixels.
    t1_quartile
        Relative error of T1 that follows and that a quarter of the pixels exceed; infinite where so many have no T1.
    """

    stated: tuple[float, ...]
    better: tuple[float, ...]
    explained: float
    t1_quartile: float

    @property
    def forbids_map(self) -> bool:
        """Whether T1 is too wrong to be shown."""
        return self.t1_quartile > MOST_WRONG

    @property
    def note(self) -> str:
        """What the operator has to know."""
        moved = [a for a, b in zip(self.stated, self.better, strict=True) if a != b]
        how = f"in the order {', '.join(f'{t:g}' for t in self.better)} s"
        if len(moved) == 2:
            how = f"with {min(moved):g} and {max(moved):g} s exchanged"
        size = f"by about {100 * self.t1_quartile:.0f} % or more" if math.isfinite(self.t1_quartile) else "has none at all"
        return (
            f"the images fit the times far better {how}: T1 is wrong, a quarter of the pixels {size} (times in another order than the "
            "images)"
        )


def order_of_times(
    images: Tensor, times: Sequence[float], inside: Tensor, fit: Callable[[Tensor, Sequence[float]], T1Maps]
) -> TimesOrder | None:
    """The order of the times that explains the images much better than the stated one, if there is any.

    Parameters
    ----------
    images
        ``(state, z, y, x)``, complex where the states share their phase, or magnitudes.
    times
        One for each state, s, in the stated order.
    inside
        bool ``(z, y, x)``: pixels with signal, those without a T1 included.
    fit
        T1 of images ``(state, z, y, x)`` at such times.

    Returns
    -------
    TimesOrder
        ``None`` where no other order is likely, or too few pixels or times can tell.
    """
    stated = tuple(float(t) for t in times)
    pixels = inside.flatten().nonzero()[:, 0]
    if len(pixels) < FEWEST_PIXELS or len(set(stated)) < FEWEST_TIMES:
        return None
    asked = images.flatten(1)[:, pixels[:: -(-len(pixels) // MOST_ASKED)]]
    explained, better = best_order(asked, stated)
    if explained <= LEAST_EXPLAINED:
        return None
    as_stated, right = (fit(asked[:, None, None], order).t1 for order in (stated, better))
    error = torch.where(as_stated.valid, as_stated.data / right.data - 1, torch.inf).abs()[right.valid].sort().values
    return TimesOrder(stated, better, explained, float(error[3 * len(error) // 4]) if len(error) else 0.0)


def best_order(series: Tensor, stated: tuple[float, ...]) -> tuple[float, tuple[float, ...]]:
    """Which other order of the times leaves least of ``(state, pixel)``, and by how much less that is than the stated one leaves."""
    data = series.to(torch.complex128 if series.is_complex() else torch.float64)
    axes = _axes(sorted(stated), signed=data.is_complex())

    def left_by(order: Sequence[float]) -> Tensor:
        return _left(data[sorted(range(len(order)), key=order.__getitem__)], axes)

    left = left_by(stated)
    total = float(left.sum())
    orders = set(_orders(data, stated)) - {stated}
    if not total > 0 or not orders:
        return 0.0, stated
    return max((float((left - left_by(order)).sum()) / total, order) for order in orders)


def _orders(data: Tensor, stated: tuple[float, ...]) -> Iterator[tuple[float, ...]]:
    for i, j in combinations(range(len(stated)), 2) if len(stated) <= MOST_EXCHANGED else ():
        order = list(stated)
        order[i], order[j] = order[j], order[i]
        yield tuple(order)
    rising = sorted(stated)
    yield tuple(rising)
    along = (data * data[int(data.abs().sum(1).argmax())].conj()).real.sum(1)  # of an inverted one it falls
    for direction in (along, -along):
        rank = direction.argsort().argsort().tolist()
        yield tuple(rising[r] for r in rank)


def _axes(rising: Sequence[float], *, signed: bool) -> Tensor:
    """``(zero crossing, T1*, 2, state)``: orthonormal axes of ``A - B exp(-t / T1*)``, of magnitudes for each zero crossing."""
    times = torch.tensor(rising, dtype=torch.float64)
    apparent = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), GRID, dtype=torch.float64)
    decay = torch.exp(-times / apparent[:, None])
    decay = decay - decay.mean(1, keepdim=True)
    decay = decay / torch.linalg.vector_norm(decay, dim=1, keepdim=True).clamp_min(1e-12)
    axes = torch.stack((torch.full_like(decay, len(times) ** -0.5), decay), dim=1)
    n_negative = torch.arange(1 if signed else len(times))
    return axes * torch.where(torch.arange(len(times)) < n_negative[:, None], -1.0, 1.0)[:, None, None]


def _left(rising: Tensor, axes: Tensor) -> Tensor:
    """``(pixel,)``: what the recovery leaves of ``(state, pixel)`` by rising times, at the best of the zero crossings and T1*."""
    along = axes.flatten(0, 2).to(rising) @ rising
    energy = along.abs().square().unflatten(0, (-1, 2)).sum(1).amax(0)
    return (rising.abs().square().sum(0) - energy).clamp_min(0).sqrt()
