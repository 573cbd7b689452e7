"""The order in which a multi-echo scan plays its samples: fan-beam segments, from the centre outwards (LARO, Fig. 2a).

Each echo's samples are split into segments of equal size by their angle to the positive k1 axis; inside a segment they are
sorted by their distance from DC. Excitation ``(segment, rank)`` reads that sample of every echo, so that all echoes follow
similar paths and the phase-encoding gradients between two echoes stay small.

The paper's order keeps the jumps small but promises nothing. With ``max_jump`` the order here is a promise: when the
paper's order breaks it, each echo is matched to the one before inside the segments, with the smallest possible largest
jump; when even that is too large, the error names what can be had.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from recon_core.errors import DataError, SettingError

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

SEGMENTS = 11
"""Fan-beam segments of the paper's prospective scans: 188 samples each."""


@dataclass(frozen=True)
class Order:
    """Which sample each excitation reads at each echo.

    Attributes
    ----------
    positions
        int64 ``(shot, echo, 2)``: ``(k2, k1)`` indices in the order of acquisition; segments one after the other.
    n_segments
        Segments of equal size.
    step
        ``(k2, k1)`` length of a grid step in the unit of ``largest_jump``.
    largest_jump
        Largest distance between two consecutive echoes of a shot.
    largest_step
        The largest distance along ``(k2, k1)`` in grid steps; not necessarily of the same jump.
    matched
        Whether echoes were matched to keep ``max_jump``; otherwise it is the paper's order.
    """

    positions: IntArray
    n_segments: int
    step: tuple[float, float]
    largest_jump: float
    largest_step: tuple[int, int]
    matched: bool

    @property
    def per_segment(self) -> int:
        return len(self.positions) // self.n_segments


def fan_beam_order(
    mask: NDArray[np.bool_],
    n_segments: int = SEGMENTS,
    *,
    step: tuple[float, float] = (1.0, 1.0),
    max_jump: float | None = None,
) -> Order:
    """Order the samples of a mask for acquisition.

    Parameters
    ----------
    mask
        bool ``(echo, k2, k1)``, the same number of samples in every echo.
    n_segments
        Segments of equal size; must divide the number of samples.
    step
        Length of a grid step along ``(k2, k1)``: angles, distances and jumps are measured with it. (1, 1) measures in grid
        steps, ``1 / fov`` in 1/m.
    max_jump
        Largest distance allowed between consecutive echoes of one shot, in the unit of ``step``; ``None``: any.

    Raises
    ------
    DataError
        Echoes with different numbers of samples, or an empty mask.
    SettingError
        Segments that do not divide the samples, a ``max_jump`` that is no distance or that no order inside the segments can keep.
    """
    if max_jump is not None and not (math.isfinite(max_jump) and max_jump >= 0):
        raise SettingError("not a distance", where="mask.max_jump", got=max_jump, expected="a finite number, 0 or more")
    n_echoes, per_segment = _counts(mask, n_segments)
    scale = np.asarray(step, np.float64)
    centre = np.array([mask.shape[1] // 2, mask.shape[2] // 2])
    echoes = []
    for echo in mask:
        samples = np.argwhere(echo)
        away = (samples - centre) * scale
        angle = np.arctan2(away[:, 0], away[:, 1]) % (2 * np.pi)
        distance = np.hypot(away[:, 0], away[:, 1])
        # DC has no angle; ties are broken by distance, so that the order is the same on every machine
        fan = np.lexsort((distance, angle)).reshape(n_segments, per_segment)
        echoes.append(np.stack([samples[part[np.lexsort((angle[part], distance[part]))]] for part in fan]))
    positions = np.stack(echoes, axis=2)  # (segment, rank, echo, 2)
    matched = False
    reached = _largest(positions, scale)
    if max_jump is not None and reached > max_jump:
        positions, matched = _match(positions, scale), True
        reached = _largest(positions, scale)
    if max_jump is not None and reached > max_jump:
        raise SettingError(
            "the echoes' samples lie too far apart",
            where="mask.max_jump",
            got=round(max_jump, 3),
            expected=f"at least {np.ceil(reached * 1e3) / 1e3:g} for this mask and {n_segments} segments",
            remedy="allow a larger jump, use fewer segments, or draw masks that differ less between echoes",
        )
    flat = positions.reshape(-1, n_echoes, 2).astype(np.int64)
    steps = np.abs(np.diff(flat, axis=1)).max(axis=(0, 1), initial=0)
    return Order(flat, n_segments, (float(step[0]), float(step[1])), reached, (int(steps[0]), int(steps[1])), matched)


def jumps(positions: IntArray, step: tuple[float, float] = (1.0, 1.0)) -> FloatArray:
    """Distances between consecutive echoes: float64 ``(..., echo - 1)`` of positions ``(..., echo, 2)``."""
    moved = np.diff(positions, axis=-2) * np.asarray(step, np.float64)
    return np.asarray(np.hypot(moved[..., 0], moved[..., 1]))


def check_order(positions: IntArray, mask: NDArray[np.bool_]) -> None:
    """Refuse an order that does not read every sample of the mask exactly once.

    Raises
    ------
    DataError
        Names the first echo that differs, and how.
    """
    if positions.ndim != 3 or positions.shape[2] != 2 or positions.shape[1] != len(mask):
        raise DataError("wrong shape", where="mask.order", got=positions.shape, expected=f"(shot, {len(mask)}, 2)")
    for echo, wanted in enumerate(mask):
        where = f"mask.order, echo {echo}"
        at = positions[:, echo]
        if (at < 0).any() or (at >= np.array(wanted.shape)).any():
            raise DataError("positions outside the matrix", where=where, expected=f"inside {wanted.shape}")
        times = np.zeros(wanted.shape, np.int64)
        np.add.at(times, (at[:, 0], at[:, 1]), 1)
        if not np.array_equal(times, wanted.astype(np.int64)):
            got = (
                f"{int((wanted & (times == 0)).sum())} samples missing, {int((~wanted & (times > 0)).sum())} not in the mask, "
                f"{int((times > 1).sum())} read more than once"
            )
            raise DataError("the order does not belong to the mask", where=where, got=got, expected="each sample once")


def _counts(mask: NDArray[np.bool_], n_segments: int) -> tuple[int, int]:
    if mask.ndim != 3 or not mask.any():
        raise DataError(
            "no samples to order", where="mask", got=f"shape {mask.shape}", expected="(echo, k2, k1) with samples"
        )
    counts = mask.sum(axis=(1, 2))
    if len(set(counts.tolist())) > 1:
        raise DataError(
            "echoes have different numbers of samples",
            where="mask",
            got=f"{counts.min()} to {counts.max()}",
            expected="one number, since every excitation reads every echo",
        )
    if n_segments < 1 or counts[0] % n_segments:
        fitting = [n for n in range(1, int(counts[0]) + 1) if not counts[0] % n]
        near = sorted(sorted(fitting, key=lambda n: abs(n - n_segments))[:2])
        raise SettingError(
            "segments of unequal size",
            where="mask.segments",
            got=f"{counts[0]} samples in {n_segments} segments",
            expected=f"a number that divides the samples, such as {' or '.join(map(str, near))}",
            remedy="draw the mask for that number of segments",
        )
    return len(mask), int(counts[0]) // n_segments


def _largest(positions: IntArray, scale: FloatArray) -> float:
    found = jumps(positions, (float(scale[0]), float(scale[1])))
    return float(found.max(initial=0.0))


def _match(positions: IntArray, scale: FloatArray) -> IntArray:
    """Reorder each echo inside its group so that the largest jump from the echo before is as small as it can be.

    The first echo keeps the order from the centre outwards, the others follow it from sample to sample.

    Parameters
    ----------
    positions
        ``(group, rank, echo, 2)``
    """
    result = positions.copy()
    for group in result:
        for echo in range(1, group.shape[1]):
            before, after = group[:, echo - 1] * scale, group[:, echo] * scale
            distance = np.hypot(*(before[:, None] - after[None]).transpose(2, 0, 1))
            bound = _bottleneck(distance)
            # among all matchings that keep the bound, the one with the smallest sum of squared jumps
            forbidden = 1.0 + len(distance) * bound**2
            _, partner = linear_sum_assignment(np.where(distance <= bound, distance**2, forbidden))
            group[:, echo] = group[partner, echo]
    return result


def _bottleneck(distance: FloatArray) -> float:
    """The smallest bound under which a perfect matching exists, by bisection over the distances that occur."""
    # every sample has to go somewhere: no bound below the largest of the smallest distances can do
    floor = max(distance.min(axis=0).max(), distance.min(axis=1).max())
    values = np.unique(distance[distance >= floor])
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        graph = csr_array(distance <= values[middle])
        if (maximum_bipartite_matching(graph, perm_type="column") >= 0).all():
            high = middle
        else:
            low = middle + 1
    return float(values[low])
