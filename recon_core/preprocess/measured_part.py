"""Which part of k-space was measured of each state: what partial Fourier completes, what it cannot, and what maps take of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recon_core.fourier import fft_centred, ifft_centred
from recon_core.preprocess.partial_fourier import Extent, Extents, has_phase, is_partial, measured_extent, partial_axes
from recon_core.types import KSpace, ScanInfo, Tensor

Band = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
"""Along z, y and x: lowest and highest spatial frequency, 1/m; infinite where nothing is left out."""

OWN_END, LARGEST_STEP, LEAST_OPPOSITE = 0.1, 4, {True: 6, False: 20}
"""A state is one of partial Fourier by itself where it lacks this part of an axis beyond the others, is sampled in steps of so many lines
at most, and has so many samples on the opposite side (of a plane, of a slab): random patterns leave a side empty by chance."""

ZEROS = (
    "{}: next to nothing was measured on one side of the centre of k-space, too little for partial Fourier: that side stays zero, and "
    "small things are blurred"
)

ZEROS_IN_MAPS = ". Maps may be far off (R2* by a fifth)"

CHANCE_SHARE = 0.5
"""Of the samples of the fullest line: those opposite a side that is empty by chance have less on average."""

LITTLE_SHARE, K_AXES = 0.7, ("k2", "k1", "the readout")

LITTLE = (
    "{:.0f} % of k-space along {}: small things are blurred, and susceptibilities of small regions up to a tenth too low; R2* at edges is "
    "far off (docs/qsm.md)"
)


def extents_of(kspace: KSpace, *, completable: bool = True) -> tuple[Extents, ...]:
    """For each state first and one past the last measured index along z, y and x.

    Undersampled patterns seldom end on the outermost line: an end that is missing no more than twice the largest gap inside the
    pattern counts as measured, and so does a side of a slab opposite which a random pattern has next to nothing either (fewer samples than
    `LEAST_OPPOSITE`). Partial Fourier is what is missing beyond that. Along z and y states share the extent of their union, as
    random patterns end here and there; a state that lacks a large part (`OWN_END`) of one side, and has enough of it for a phase, has
    its own; without ``completable`` also one that has not enough.
    """
    union = _sampled_extents(kspace.mask)

    def of_state(mask: torch.Tensor) -> tuple[Extent, Extent]:
        if not bool(mask.any()):
            return union
        lines = (mask.sum(dim=1), mask.sum(dim=0))
        axes = zip(_sampled_extents(mask[None]), union, lines, strict=True)
        z, y = (_own_or_shared(*of_axis, completable=completable) for of_axis in axes)
        return z, y

    return tuple((*of_state(mask), x) for mask, x in zip(kspace.mask, kspace.readout_extents, strict=True))


def _sampled_extents(mask: torch.Tensor) -> tuple[Extent, Extent]:
    z, y = measured_extent(mask)
    sampled = mask.any(dim=0)
    z, y = _to_edge(z, sampled.any(dim=1)), _to_edge(y, sampled.any(dim=0))
    return _without_chance(z, sampled), _without_chance(y, sampled.T)


def _own_or_shared(own: Extent, shared: Extent, lines: torch.Tensor, *, completable: bool) -> Extent:
    """``lines``: the state's samples at each position of the axis."""
    n, step = len(lines), int(lines.nonzero()[:, 0].diff().max()) if int((lines > 0).sum()) > 1 else 0
    before, after = own[0] - shared[0], shared[1] - own[1]
    centre = n // 2  # the mirror of k is 2 centre - k
    opposite = lines[2 * centre + 1 - own[0] :] if before > after else lines[: max(0, 2 * centre + 1 - own[1])]
    plane = int(lines.max()) <= 1
    lacks = max(before, after) > OWN_END * n and step <= LARGEST_STEP and int(opposite.sum()) >= LEAST_OPPOSITE[plane]
    return own if lacks and is_partial(own, n) and (has_phase(own, n) or not completable) else shared


def notes_of_short_sides(extents: Sequence[Extents], own: Sequence[Extents], scan: ScanInfo, maps: str) -> tuple[str, ...]:
    """Words on images that lack so much of one side of k-space that it stays zero beside others that have it (``own`` is less than
    ``extents``), and on maps of images that were measured by little more than half."""
    notes = []
    if left := [str(number) for number, (used, less) in enumerate(zip(extents, own, strict=True)) if used != less]:
        which = f"image{'s' if len(left) > 1 else ''} {', '.join(left)}"
        notes.append(ZEROS.format(which) + (ZEROS_IN_MAPS if maps != "none" else ""))
    if maps in ("r2star", "qsm"):
        shares = {
            name: min(stop - start for start, stop in of_axis) / n
            for name, n, of_axis in zip(K_AXES, scan.matrix, zip(*extents, strict=True), strict=True)
            if any(is_partial(extent, n) for extent in of_axis)
        }
        notes += [LITTLE.format(100 * share, name) for name, share in shares.items() if share < LITTLE_SHARE]
    return tuple(notes)


def completed_band(extents: Sequence[Extents], scan: ScanInfo) -> Band | None:
    """What was measured of images whose other part is completed, for their field; ``None`` where nothing is, or not of all alike.

    The phase that completes an image is a smooth one, and wrong where its own is not, by the more the later the echo: susceptibilities come
    out too low. Zeros at the same places in all echoes hardly touch the differences of their phases (docs/qsm.md).
    """
    axes = partial_axes(extents[0], scan.matrix)
    if not axes or len(set(extents)) > 1:
        return None
    band = []
    for axis, (start, stop) in zip((-3, -2, -1), extents[0], strict=True):
        edges = (edge - 0.5 - scan.matrix[axis] // 2 for edge in (start, stop))
        low, high = (edge / scan.fov[axis] for edge in edges)
        band.append((low, high) if axis in axes else (-math.inf, math.inf))
    return band[0], band[1], band[2]


def in_band(images: Tensor, band: Band, scan: ScanInfo) -> Tensor:
    """Images ``(..., z, y, x)`` of the console's matrix with zeros outside a band of k-space. (POCS keeps what lies inside.)"""
    axes = tuple(axis for axis, (low, _) in zip((-3, -2, -1), band, strict=True) if low > -math.inf)
    kspace = fft_centred(images, axes)
    for axis in axes:
        n, fov, (low, high) = scan.recon_matrix[axis], scan.recon_fov[axis], band[axis]
        k = (torch.arange(n, device=images.device) - n // 2) / fov
        kspace *= ((k > low) & (k < high)).reshape([n if a == axis else 1 for a in (-3, -2, -1)])
    return ifft_centred(kspace, axes)


def _without_chance(extent: Extent, sampled: torch.Tensor) -> Extent:
    """The whole axis where a side of a slab was left empty by chance: next to nothing was sampled opposite, either.

    ``sampled``: bool ``(axis, other axis)``.
    """
    n, n_other = sampled.shape
    if n_other == 1 or not is_partial(extent, n):
        return extent
    start, stop = extent
    lines = sampled.sum(dim=1)
    opposite = lines[n // 2 * 2 + 1 - start :] if start > n - stop else lines[: max(0, n // 2 * 2 + 1 - stop)]
    found, dense = int(opposite.sum()), CHANCE_SHARE * len(opposite) * int(lines.max())
    return (0, n) if found < min(LEAST_OPPOSITE[False], dense) else extent


def _to_edge(extent: Extent, sampled: torch.Tensor) -> Extent:
    lines = sampled.nonzero()[:, 0]
    gap = int(lines.diff().max()) if len(lines) > 1 else 1
    n, tolerance = len(sampled), 2 * gap if gap > 1 else 0
    start, stop = extent
    return (0 if start <= tolerance else start), (n if n - stop <= tolerance else stop)
