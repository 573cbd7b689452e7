"""Which readouts calibrate the coils: flagged ones, or else the fully sampled centre of k-space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.sorted_scan import Placement

FEWEST_LINES = 4
"""A centre that is narrower than this (in a direction that is encoded) says nothing about coils."""

ENOUGH_LINES = 12
"""A centre that all states share is taken if it is at least this wide, even if some states have more."""

Block = tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class CalibrationLines:
    """Calibration readouts of one slice.

    Attributes
    ----------
    placement
        Their places; positions may repeat.
    complete_states
        States (-1: none that is reconstructed) that alone fill every calibrated position.
    """

    placement: Placement
    complete_states: tuple[int, ...]

    def states_of_lines(self, n_states: int, grid: tuple[int, int]) -> NDArray[np.bool_] | None:
        """``(state, k2, k1)``: in which states a position was measured; ``None`` where a state alone has all of them."""
        if self.complete_states:
            return None
        measured = np.zeros((n_states, *grid), bool)
        own = self.placement.take(self.placement.state >= 0)
        measured[own.state, own.k2, own.k1] = True
        return measured


def calibration_lines(
    imaging: Placement, calibration: Placement, slice_index: int, grid: tuple[int, int], settings: AcquisitionSettings
) -> CalibrationLines | None:
    """The calibration readouts of the slice at position ``slice_index``.

    Flagged readouts if there are any; those of a separate scan alone where images hold such lines as well. Otherwise the
    imaging readouts in a contiguous block about DC (grown greedily, at most ``settings.calibration_extent`` in each
    direction) whose every position is sampled in all states; when that block has fewer than `ENOUGH_LINES` lines in an
    encoded direction, in at least one state: such a block mixes the states' contrasts. ``None`` when that block has fewer
    than `FEWEST_LINES` lines in an encoded direction.
    """
    flagged = calibration.take(calibration.slice == slice_index)
    own = imaging.take(imaging.slice == slice_index)
    if len(flagged):
        flagged = _of_one_scan(flagged, own, grid)
        return CalibrationLines(flagged, _complete_states(flagged, grid))
    block = _shared_centre(own, grid, settings.calibration_extent)
    if block is None:
        sampled = np.zeros(grid, bool)
        sampled[own.k2, own.k1] = True
        block = sampled_centre(sampled, settings.calibration_extent)
    if block is None:
        return None
    (z0, z1), (y0, y1) = block
    if any(n > 1 and stop - start < min(n, FEWEST_LINES) for n, (start, stop) in zip(grid, block, strict=True)):
        return None
    centre = own.take((own.k2 >= z0) & (own.k2 < z1) & (own.k1 >= y0) & (own.k1 < y1))
    return CalibrationLines(centre, _complete_states(centre, grid))


def _of_one_scan(flagged: Placement, imaging: Placement, grid: tuple[int, int]) -> Placement:
    """Without the images' own lines where a scan of its own, for calibration alone, has all positions and some of theirs in their state.

    Such a scan may have another flip angle, phase or scale: a mean of both is a step in k-space that no coil has.
    """
    alone = ~np.isin(flagged.rows, imaging.rows)
    position = flagged.k2.astype(np.int64) * grid[1] + flagged.k1
    place = flagged.state.astype(np.int64) * (grid[0] * grid[1]) + position
    twice = bool(np.isin(place[alone], place[~alone]).any())
    return flagged.take(alone) if twice and bool(np.isin(position, position[alone]).all()) else flagged


def sampled_centre(sampled: NDArray[np.bool_], largest: int) -> Block | None:
    """The block about DC in which everything is sampled, as ``((k2 start, stop), (k1 start, stop))``.

    Grows from DC by a row or a column at a time, each side in turn, as long as the new one is complete. ``None`` when DC
    itself is not sampled.
    """
    z, y = (n // 2 for n in sampled.shape)
    if not sampled[z, y]:
        return None
    lo, hi = [z, y], [z + 1, y + 1]
    growing = True
    while growing:
        growing = False
        for axis in (0, 1):
            for side in (lo, hi):
                if hi[axis] - lo[axis] >= largest:
                    continue
                new = side[axis] - 1 if side is lo else side[axis]
                if not 0 <= new < sampled.shape[axis]:
                    continue
                other = slice(lo[1 - axis], hi[1 - axis])
                edge = sampled[new, other] if axis == 0 else sampled[other, new]
                if edge.all():
                    side[axis] = new if side is lo else new + 1
                    growing = True
    return (lo[0], hi[0]), (lo[1], hi[1])


def _shared_centre(own: Placement, grid: tuple[int, int], largest: int) -> Block | None:
    """The block that every state samples, if it is wide enough."""
    states = np.unique(own.state)
    n_sampled = np.zeros(grid, np.int64)
    for state in states:
        sampled = np.zeros(grid, bool)
        sampled[own.k2[own.state == state], own.k1[own.state == state]] = True
        n_sampled += sampled
    block = sampled_centre(n_sampled == len(states), largest)
    if block is None or any(stop - start < min(n, ENOUGH_LINES) for n, (start, stop) in zip(grid, block, strict=True)):
        return None
    return block


def calibration_notes(
    imaging: Placement,
    calibration: Placement,
    slices: Sequence[int],
    grid: tuple[int, int],
    settings: AcquisitionSettings,
    *,
    recovers: bool = False,
) -> list[str]:
    """What the operator should know about the calibration of this scan; ``recovers``: its states differ in contrast."""
    found = [calibration_lines(imaging, calibration, s, grid, settings) for s in range(len(slices))]
    notes = []
    without = [slices[s] for s, lines in enumerate(found) if lines is None]
    if without:
        notes.append(f"{len(without)} slices have no calibration lines and no sampled centre, the first: slice {without[0]}")
    mixed = [slices[s] for s, lines in enumerate(found) if lines is not None and not lines.complete_states]
    if mixed and settings.calibration == "strongest":
        notes.append(
            f"no state alone has all calibration lines in {len(mixed)} slices, the first: slice {mixed[0]}; the mean of all "
            "states is used there"
        )
    elif mixed and recovers:
        notes.append(
            f"the calibration lines of {len(mixed)} slices come from states of different contrast, as no state alone has them, the first: "
            f"slice {mixed[0]}; coil maps, and T1 with them, may be wrong"
        )
    notes += _without_centre(imaging, calibration, slices, grid, settings)
    return notes


def _without_centre(
    imaging: Placement, calibration: Placement, slices: Sequence[int], grid: tuple[int, int], settings: AcquisitionSettings
) -> list[str]:
    """Images that lack the line through the centre of k-space, though lines that are flagged for calibration alone have it."""
    if settings.calibration_in_image:
        return []
    centre = tuple(n // 2 for n in grid)

    def at_centre(lines: Placement) -> set[tuple[int, int]]:
        chosen = (lines.k2 == centre[0]) & (lines.k1 == centre[1])
        return set(zip(lines.slice[chosen].tolist(), lines.state[chosen].tolist(), strict=True))

    lacking = sorted(at_centre(calibration) - at_centre(imaging))
    lacking = [(s, q) for s, q in lacking if q >= 0]
    if not lacking:
        return []
    return [
        f"{len(lacking)} images lack the centre of k-space, which lines flagged for calibration alone have, the first: slice "
        f"{slices[lacking[0][0]]}; calibration_in_image = True uses them"
    ]


def _complete_states(placement: Placement, grid: tuple[int, int]) -> tuple[int, ...]:
    n2, n1 = grid
    linear = placement.k2.astype(np.int64) * n1 + placement.k1
    states, state = np.unique(placement.state, return_inverse=True)
    pairs = np.unique(state * (n2 * n1) + linear)
    per_state = np.bincount(pairs // (n2 * n1), minlength=len(states))
    return tuple(states[per_state == len(np.unique(linear))].tolist())
