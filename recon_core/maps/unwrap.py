"""Phase unwrapping in three dimensions.

`unwrap_phase` follows the most reliable path: of all ways to connect the voxels of the mask it takes the tree with the least
roughness, and adds along it the turns that bring neighbours within half a turn. That is the order in which region merging by
quality works (Abdul-Rahman et al.), written as a minimum spanning tree; the result differs from the input by whole turns
exactly.

References
----------
Abdul-Rahman et al., Appl. Opt. 46 (2007) 6623.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree

from recon_core.errors import DataError
from recon_core.maps.field_checks import checked_mask

Tensor = torch.Tensor

TURN = 2 * math.pi
LEAST_COST = 1e-6  # a sparse graph takes an edge of weight 0 for no edge


def unwrap_phase(phase: Tensor, mask: Tensor, *, quality: Tensor | None = None) -> Tensor:
    """Phase without jumps, ``phase + 2 pi n``, ``n`` whole; zero outside the mask.

    Each connected part of the mask is unwrapped on its own; whole turns then put its median within half a turn of 0. (What
    turns lie between parts that do not touch, the phase does not say.)

    Parameters
    ----------
    phase
        rad, real ``(z, y, x)``; wrapped or not.
    mask
        bool ``(z, y, x)``.
    quality
        Not negative, say the magnitude: paths through high values are preferred. ``None``: by smoothness of the phase alone.

    Returns
    -------
    Tensor
        dtype and device of ``phase``. The tree is grown on the CPU.

    Raises
    ------
    DataError
        Shapes that do not fit, an empty mask, values inside it that are not finite.
    """
    inside, data, weight = _checked(phase, mask, quality)
    numbers = np.full(inside.shape, -1, dtype=np.int32)
    places = np.flatnonzero(inside)
    numbers.ravel()[places] = np.arange(len(places), dtype=np.int32)
    first, second, cost = _edges(data, weight, numbers)
    graph = coo_array((cost, (first, second)), shape=(len(places), len(places))).tocsr()
    del first, second, cost
    tree = minimum_spanning_tree(graph)
    n_parts, part = connected_components(tree, directed=False)
    values = data.ravel()[places]
    turns = _turns(tree, values, n_parts, part)
    result = values + TURN * turns
    result -= TURN * np.rint(_medians(result, part, n_parts) / TURN)[part]
    full = np.zeros(data.shape)
    full.ravel()[places] = result
    return torch.from_numpy(full).to(phase.device, phase.dtype)


def _checked(
    phase: Tensor, mask: Tensor, quality: Tensor | None
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64] | None]:
    where = "phase unwrapping"
    if phase.ndim != 3 or phase.is_complex() or not phase.is_floating_point():
        raise DataError(
            "not a phase", where=where, got=f"{phase.dtype} {tuple(phase.shape)}", expected="real (z, y, x), rad"
        )
    inside = checked_mask(mask, phase.shape, where).cpu().numpy()
    data = phase.detach().cpu().double().numpy()
    if not np.isfinite(data[inside]).all():
        raise DataError("phase is not finite", where=where)
    if quality is None:
        return inside, data, None
    weight = quality.detach().cpu().double().numpy()
    if weight.shape != data.shape or not (np.isfinite(weight[inside]) & (weight[inside] >= 0)).all():
        raise DataError(
            "quality does not fit", where=where, got=weight.shape, expected=f"{data.shape}, finite, not negative"
        )
    return inside, data, weight


def _wrapped(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(x - TURN * np.rint(x / TURN))


def _edges(
    data: NDArray[np.float64], weight: NDArray[np.float64] | None, numbers: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """Neighbours in the mask and the cost of going from one to the other: roughness of both, over their quality."""
    rough = _roughness(data, numbers >= 0)
    largest = 1.0 if weight is None else max(float(weight[numbers >= 0].max()), 1e-30)
    firsts, seconds, costs = [], [], []
    for axis in range(3):
        low = tuple(slice(None, -1) if a == axis else slice(None) for a in range(3))
        high = tuple(slice(1, None) if a == axis else slice(None) for a in range(3))
        both = (numbers[low] >= 0) & (numbers[high] >= 0)
        cost = rough[low][both] + rough[high][both]
        if weight is not None:
            cost = cost / np.maximum(np.minimum(weight[low][both], weight[high][both]) / largest, 1e-3)
        firsts.append(numbers[low][both])
        seconds.append(numbers[high][both])
        costs.append((cost + LEAST_COST).astype(np.float32))
    return np.concatenate(firsts), np.concatenate(seconds), np.concatenate(costs)


def _roughness(data: NDArray[np.float64], inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Root of the squared second differences along the axes, wrapped; a missing neighbour counts as the worst."""
    squares = np.zeros_like(data)
    for axis in range(3):
        worst = np.full(data.shape, math.pi**2)
        if data.shape[axis] > 2:
            before, here, after = (
                tuple(part if a == axis else slice(None) for a in range(3))
                for part in (slice(None, -2), slice(1, -1), slice(2, None))
            )
            bend = _wrapped(data[before] - data[here]) - _wrapped(data[here] - data[after])
            worst[here] = np.where(inside[before] & inside[after], bend**2, math.pi**2)
        squares += worst
    return np.sqrt(squares)


def _turns(tree: object, values: NDArray[np.float64], n_parts: int, part: NDArray[np.int32]) -> NDArray[np.float64]:
    """Whole turns of every voxel against its part's first one: sums along the tree, by doubling the distance walked."""
    parent = np.arange(len(values))
    symmetric = tree + tree.T  # type: ignore[attr-defined]
    _, roots = np.unique(part, return_index=True)
    for root in roots[np.bincount(part, minlength=n_parts) > 1]:
        order, before = breadth_first_order(symmetric, int(root), directed=False, return_predecessors=True)
        parent[order[1:]] = before[order[1:]]
    turns = -np.rint((values - values[parent]) / TURN)
    while True:
        further = parent[parent]
        if np.array_equal(further, parent):
            return np.asarray(turns)
        turns += turns[parent]
        parent = further


def _medians(values: NDArray[np.float64], part: NDArray[np.int32], n_parts: int) -> NDArray[np.float64]:
    order = np.lexsort((values, part))
    counts = np.bincount(part, minlength=n_parts)
    starts = np.cumsum(counts) - counts
    return np.asarray(values[order][starts + counts // 2])
