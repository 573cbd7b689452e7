"""The Cartesian buffer: sorted readouts and their hybrid-space rows -> ``KSpace``, one slice or slab at a time.

The samples stay in the scan's log on disk. While the scan streams, `ReadoutIndex` collects the headers and
`readout_geometry` tells the per-readout stage how to place the samples. When the scan is complete, `sort_readouts`
finds every readout's place, and `assemble` gathers rows into k-space.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.calibration import CalibrationLines, calibration_lines
from gadgets.readouts import Kind, ReadoutGeometry, ReadoutIndex, classify, readout_geometry
from gadgets.sorted_scan import Placement, SortedScan
from gadgets.sorting import sort_readouts
from recon_core.errors import DataError
from recon_core.preprocess.readout import all_finite
from recon_core.types import KSpace

__all__ = [
    "AcquisitionSettings",
    "Kind",
    "Placement",
    "ReadoutGeometry",
    "ReadoutIndex",
    "SortedScan",
    "assemble",
    "classify",
    "readout_geometry",
    "sort_readouts",
]


class Rows(Protocol):
    """Prepared readouts in arrival order: an array, a memory map, or anything that gathers rows by an index array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(readout, coil, x)``."""
        ...

    def __getitem__(self, rows: NDArray[np.integer], /) -> NDArray[np.complex64]: ...


CHUNK_BYTES = 16 << 20
"""Rows are gathered in pieces of this size, so that k-space itself is the only large copy."""


def assemble(scan: SortedScan, slice_index: int, rows: Rows, *, noise_std: float | None = None) -> KSpace:
    """K-space of one slice or slab.

    Parameters
    ----------
    scan
        From `sort_readouts`.
    slice_index
        Position in ``scan.slices``.
    rows
        complex64 ``(readout, coil, x)`` of *all* readouts in arrival order, made by the per-readout stage; ``x`` is image
        space, cropped to ``scan.n_x``. The coils may be compressed. May be a memory map; not modified.
    noise_std
        Passed through to ``KSpace.noise_std``.

    Returns
    -------
    KSpace
        ``data`` complex64 ``(state, coil, k2, k1, x)``, repeated positions as means; ``counts`` float32
        ``(state, k2, k1)``; ``acs`` complex64 ``(coil, k2, k1, x)`` and ``acs_mask`` from the flagged calibration lines, or
        from the sampled centre if there are none: their principal component over states, or their mean, or the state with the
        strongest signal (setting ``calibration``); ``acs_states`` where they mix the states.

    Raises
    ------
    DataError
        Rows of the wrong shape, NaN or infinite samples (slice, state and readout are named).
    """
    if not 0 <= slice_index < scan.n_slices:
        raise DataError("no such slice", where="buffer", got=slice_index, expected=f"0 to {scan.n_slices - 1}")
    if len(rows.shape) != 3 or rows.shape[0] != scan.n_readouts or rows.shape[2] != scan.n_x or not rows.shape[1]:
        raise DataError(
            "rows have the wrong shape", where="buffer", got=rows.shape, expected=f"({scan.n_readouts}, coils, {scan.n_x})"
        )
    imaging = scan.imaging.take(scan.imaging.slice == slice_index)
    data, counts = _mean(scan, slice_index, rows, imaging)
    acs = acs_mask = acs_states = None
    lines = calibration_lines(scan.imaging, scan.calibration, slice_index, scan.grid, scan.settings)
    if lines is not None:
        if scan.settings.calibration == "principal" and len(lines.complete_states) > 1:
            mean, n_lines = _principal(scan, slice_index, rows, lines)
        else:
            chosen = _chosen_calibration(lines, rows, scan.settings)
            merged = Placement(chosen.rows, chosen.slice, np.zeros_like(chosen.state), chosen.k2, chosen.k1)
            mean, n_lines = _mean(scan, slice_index, rows, merged, calibration=True)
        acs, acs_mask = torch.from_numpy(mean[0]), torch.from_numpy(n_lines[0] > 0)
        measured = lines.states_of_lines(scan.n_states, scan.grid)
        acs_states = None if measured is None else torch.from_numpy(measured)
    return KSpace(
        data=torch.from_numpy(data),
        counts=torch.from_numpy(counts.astype(np.float32)),
        acs=acs,
        acs_mask=acs_mask,
        acs_states=acs_states,
        noise_std=noise_std,
        readout_ranges=readout_ranges(scan.readouts, imaging, scan.n_states),
    )


def readout_ranges(readouts: ReadoutGeometry, imaging: Placement, n_states: int) -> tuple[tuple[int, int], ...]:
    """For each state first and one past the last k0 that *all* its readouts have measured, on the grid that the crop to ``n_x`` leaves.

    The crop by ``n_encoded / n_x`` in image space widens the spacing of k0 by that factor; the extent in k0 stays.
    """
    n, n_x, rows = readouts.n_encoded, readouts.n_x, imaging.rows
    starts, stops = np.zeros(n_states, np.int64), np.full(n_states, n, np.int64)
    np.maximum.at(starts, imaging.state, readouts.k0_start[rows])
    np.minimum.at(stops, imaging.state, readouts.k0_start[rows] + readouts.last[rows] - readouts.first[rows])

    def cropped(start: int, stop: int) -> tuple[int, int]:
        first = 0 if start == 0 else math.ceil((start - n // 2) * n_x / n) + n_x // 2
        last = n_x if stop == n else math.floor((stop - 1 - n // 2) * n_x / n) + n_x // 2 + 1
        return max(first, 0), min(last, n_x)

    return tuple(cropped(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True))


def _mean(
    scan: SortedScan, slice_index: int, rows: Rows, placement: Placement, *, calibration: bool = False
) -> tuple[NDArray[np.complex64], NDArray[np.int64]]:
    """Mean of the rows at each position, ``(state, coil, k2, k1, x)``, and how many there were, ``(state, k2, k1)``."""
    n2, n1 = scan.grid
    n_states = 1 if calibration else scan.n_states
    data = np.zeros((n_states, rows.shape[1], n2, n1, rows.shape[2]), np.complex64)
    linear = (placement.state.astype(np.int64) * n2 + placement.k2) * n1 + placement.k1
    counts = np.bincount(linear, minlength=n_states * n2 * n1)

    # fancy assignment keeps one value per position: the first visit of all positions, then the second, and so on
    order = np.argsort(linear, kind="stable")
    starts = np.concatenate(([0], np.cumsum(counts[counts > 0])))[:-1]
    visit = np.empty(len(linear), np.int64)
    visit[order] = np.arange(len(linear)) - np.repeat(starts, counts[counts > 0])
    by_visit = np.argsort(visit, kind="stable")
    ends = np.cumsum(np.bincount(visit))
    step = max(1, CHUNK_BYTES // max(1, 8 * rows.shape[1] * rows.shape[2]))
    begin = 0
    for n_visit, end in enumerate(ends.tolist()):
        for b in range(begin, end, step):
            part = placement.take(by_visit[b : min(b + step, end)])
            block = rows[part.rows]
            if not all_finite(block):
                _refuse_not_finite(scan, slice_index, block, part, calibration)
            if n_visit:
                data[part.state, :, part.k2, part.k1] += block
            else:
                data[part.state, :, part.k2, part.k1] = block
        begin = end

    repeated = np.flatnonzero(counts > 1)
    for b in range(0, len(repeated), step):
        index = repeated[b : b + step]
        state, k2, k1 = np.unravel_index(index, (n_states, n2, n1))
        data[state, :, k2, k1] *= (1.0 / counts[index]).astype(np.float32)[:, None, None]
    return data, counts.reshape(n_states, n2, n1)


def _principal(
    scan: SortedScan, slice_index: int, rows: Rows, lines: CalibrationLines
) -> tuple[NDArray[np.complex64], NDArray[np.int64]]:
    """The principal component over states of the calibration lines, ``(1, coil, k2, k1, x)``, and where it is.

    With one row of lines per state, ``A``, this is ``v^H A`` for the leading eigenvector ``v`` of ``A A^H``: the combination of
    states with most signal. A plain mean loses signal where states differ in sign or phase (inversion recovery, late echoes);
    for states of equal contrast the two agree.
    """
    n2, n1 = scan.grid
    linear = lines.placement.k2.astype(np.int64) * n1 + lines.placement.k1
    positions = np.unique(linear)
    per_state = []
    for state in lines.complete_states:
        own = np.flatnonzero(lines.placement.state == state)
        part = lines.placement.take(own)
        block = rows[part.rows]
        if not all_finite(block):
            _refuse_not_finite(scan, slice_index, block, part, True)
        where = np.searchsorted(positions, linear[own])
        total = np.zeros((len(positions), *block.shape[1:]), np.complex64)
        np.add.at(total, where, block)
        per_state.append(total / np.bincount(where, minlength=len(positions)).astype(np.float32)[:, None, None])
    flat = np.stack([block.ravel() for block in per_state])
    wide = flat.astype(np.complex128)  # squares of finite samples may be infinite in single precision
    _, vectors = np.linalg.eigh(wide @ wide.conj().T)
    leading = vectors[:, -1] * np.exp(-1j * np.angle(vectors[np.argmax(np.abs(vectors[:, -1])), -1]))
    combined = np.zeros((1, rows.shape[1], n2, n1, rows.shape[2]), np.complex64)
    k2, k1 = np.divmod(positions, n1)
    combined[0, :, k2, k1] = np.tensordot(leading.conj().astype(np.complex64), np.stack(per_state), axes=1)
    counts = np.zeros((1, n2, n1), np.int64)
    counts[0, k2, k1] = 1
    return combined, counts


def _chosen_calibration(lines: CalibrationLines, rows: Rows, settings: AcquisitionSettings) -> Placement:
    if settings.calibration != "strongest" or not lines.complete_states:
        return lines.placement

    def energy(state: int) -> float:
        own = rows[lines.placement.rows[lines.placement.state == state]]
        return float(np.vdot(own, own).real) / len(own)

    strongest = max(lines.complete_states, key=energy)
    return lines.placement.take(lines.placement.state == strongest)


def _refuse_not_finite(
    scan: SortedScan, slice_index: int, block: NDArray[np.complex64], part: Placement, calibration: bool
) -> None:
    i = int(np.argmin(np.isfinite(block).all(axis=(1, 2))))
    raise DataError(
        "samples are NaN or infinite",
        where=scan.name(slice_index, None if calibration else int(part.state[i])),
        got=f"{int((~np.isfinite(block[i])).sum())} of {block[i].size} samples of readout {int(part.rows[i])}",
    )
