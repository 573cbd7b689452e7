"""A scan that broke off: what of it can be reconstructed, and what is missing for the rest.

Nobody knows what would have come. An image counts as there when it has nearly as many lines as the fullest one; slices and states that
have fewer are left out. What is left has to hold the centre of k-space, and, where nothing unfolds missing lines, all lines between the
outermost ones.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.errors import IncompleteScan, SortError
from gadgets.readouts import Headers
from gadgets.sorted_scan import SortedScan
from gadgets.sorting import sort_readouts
from gadgets.wire.header import MrdHeader
from recon_core.sampling.coverage import missing_lines

ENOUGH = 0.75
"""Lines of an image over those of the fullest one. Sampling masks differ by less from image to image, beats of a gated scan by more."""

CENTRE = 16
"""The centre is this part of k-space to either side of DC, and one line at least."""


def sort_cut_scan(
    headers: Headers,
    header: MrdHeader,
    settings: AcquisitionSettings,
    unmeasured: NDArray[np.int64] | None = None,
    *,
    unfolds: bool,
) -> SortedScan:
    """`sort_readouts` for a scan without its end.

    Parameters
    ----------
    headers, header, settings, unmeasured
        As there; ``settings.incomplete`` is ``drop``, whatever it says.
    unfolds
        Whether the method can do without lines between others.

    Raises
    ------
    IncompleteScan
        What is there makes no image; says what is missing.
    """
    fraction = settings.min_line_fraction if settings.cardiac_phases else max(settings.min_line_fraction, ENOUGH)
    try:
        wanted = replace(settings, incomplete="drop", min_line_fraction=fraction)
        scan = sort_readouts(headers, header, wanted, unmeasured)
    except SortError as error:
        raise IncompleteScan(
            f"too little of the scan came: {error.what}", where=error.where, got=error.got, expected=error.expected
        ) from error
    for slice_index in range(scan.n_slices):
        _require_usable(scan, slice_index, unfolds=unfolds)
    return scan


def _require_usable(scan: SortedScan, slice_index: int, *, unfolds: bool) -> None:
    n2, n1 = scan.grid
    own = scan.imaging.take(scan.imaging.slice == slice_index)
    mask = np.zeros((scan.n_states, n2, n1), bool)
    mask[own.state, own.k2, own.k1] = True
    middle = np.ix_(range(scan.n_states), *(_middle(n) for n in (n2, n1)))
    without = ~mask[middle].any(axis=(1, 2))
    if without.any():
        state = int(np.argmax(without))
        raise IncompleteScan(
            "the scan broke off before the centre of k-space",
            where=scan.name(slice_index, state),
            got=f"{int(mask[state].sum())} of {n2 * n1} lines",
            remedy="The scan has to be repeated",
        )
    missing, total = (0, 0) if unfolds else missing_lines(torch.from_numpy(mask))
    if missing:
        raise IncompleteScan(
            f"{missing} of {total} lines are missing between others: the images would be aliased",
            where=scan.name(slice_index),
            remedy="A chain that unfolds them may do: --config",
        )


def _middle(n: int) -> range:
    reach = max(1, n // CENTRE)
    return range(max(0, n // 2 - reach), min(n, n // 2 + reach + 1))
