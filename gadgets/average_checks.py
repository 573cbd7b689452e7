"""Whether averages belong together. Readouts of one position are averaged as they come.

Where a sequence cycles its phase by 180 degrees and the receiver does not follow, or motion turns it (diffusion), they cancel,
and what is left is dark, or noise that a method makes an image of.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gadgets.buffer import Rows
from gadgets.sorted_scan import SortedScan
from recon_core.types import KSpace

POSITIONS = 4
"""So many repeated positions nearest to the centre of k-space are looked at in each image ..."""

OUTER = 8
"""... and so many readouts farthest from it, whose energy is at least the noise's."""

SIGNAL = 4.0
"""The centre has signal from this many times the outer readouts' energy on: averages of noise do cancel."""

COHERENT = 0.5
"""Part of the averages' energy that their mean must have. With as much signal as that, noise alone leaves three quarters."""


def cancelling(scan: SortedScan, slice_index: int, rows: Rows, kspace: KSpace) -> str:
    """What the operator has to know of averages that cancel each other in a slice; empty for none.

    Parameters
    ----------
    scan, slice_index, rows
        As `gadgets.buffer.assemble` has them.
    kspace
        What it made of them, on the CPU.
    """
    counts = kspace.counts.numpy()
    averaged = np.flatnonzero((counts > 1).any(axis=(1, 2)))
    imaging = scan.imaging.take(scan.imaging.slice == slice_index)
    found = []
    for state in averaged.tolist():
        own = imaging.take(imaging.state == state)
        distance = np.hypot(own.k2 - scan.grid[0] // 2, own.k1 - scan.grid[1] // 2)
        outwards = np.argsort(distance, kind="stable")
        repeated = own.take(outwards[counts[state, own.k2, own.k1][outwards] > 1])
        position = repeated.k2.astype(np.int64) * scan.grid[1] + repeated.k1
        first = np.sort(np.unique(position, return_index=True)[1])[:POSITIONS]
        centre = repeated.take(np.isin(position, position[first]))
        energy, outer = (_energy(rows[chosen]) for chosen in (centre.rows, own.rows[outwards[-OUTER:]]))
        mean = _energy(kspace.data[state].numpy()[:, centre.k2, centre.k1].swapaxes(0, 1))
        if energy.mean() > SIGNAL * np.median(outer) and mean.sum() < COHERENT * energy.sum():
            found.append(float(mean.sum() / energy.sum()))
    if not found:
        return ""
    return (
        f"averages cancel each other in {len(found)} of {len(counts)} images of slice {scan.slices[slice_index]}: at the centre of k-space "
        f"their mean has {100 * min(found):.2g} % of their energy; was the phase cycled and the receiver's not, or did something move? The "
        "images are too dark and wrong"
    )


def _energy(samples: NDArray[np.complex64]) -> NDArray[np.float64]:
    """Of each readout of ``(readout, coil, x)``."""
    return np.square(np.abs(samples), dtype=np.float64).sum(axis=(1, 2))
