"""Is the scan complete, plausible and affordable? Errors, drops and notes; the rules are stated in `gadgets.sorting`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.errors import SortError
from gadgets.readouts import SKIP_FLAGS, Headers, ReadoutGeometry, readout_name
from gadgets.sorted_scan import STATE_COUNTERS, Placement, place_name
from gadgets.wire.dtypes import Flag
from gadgets.wire.header import Encoding, Limit

COMPLEX_BYTES = 8
MAX_EXPANSION = 128
"""K-space over sampled bytes: acceleration, partial Fourier and short readouts together stay far below."""

MAX_INTERPOLATION = 8
"""Further growth of images that the console may ask for."""

MAX_FINER = 16
"""Pixels per encoded pixel along one axis: zero-filling beyond that costs seconds and shows nothing."""

SMALL_BYTES = 64 << 20
"""Always granted, whatever was sampled."""

MOVED = 1e-2
"""mm; slice positions of one slice that differ by more are worth a note."""

OTHER_DWELL = 1.1
"""Longest over shortest dwell time; beyond, noise differs by more than 5 %."""

LEAST_APART = 20.0
"""mm; slabs that differ by less may be one that follows a patient's motion."""

MOST_TURNED = 20.0
"""degrees; a slice that follows a patient's motion turns by less, another orientation differs by more."""

TURNED = 0.2
"""degrees; directions of one slice that differ by more are worth a note."""


@dataclass
class SortLog:
    """What is said about the scan while it is sorted."""

    skipped: dict[str, int]
    notes: list[str]

    def skip(self, reason: str, n: int) -> None:
        if n:
            self.skipped[reason] = self.skipped.get(reason, 0) + int(n)


def line_counts(imaging: Placement, shape: tuple[int, int], encoding: Encoding) -> NDArray[np.int64]:
    """``(slice, state)``: different sampled positions."""
    n2, n1, _ = encoding.encoded_matrix
    group = imaging.slice.astype(np.int64) * shape[1] + imaging.state
    positions = np.unique((group * n2 + imaging.k2) * n1 + imaging.k1)
    return np.bincount(positions // (n2 * n1), minlength=math.prod(shape)).reshape(shape)


def complete(
    imaging: Placement,
    slices: tuple[int, ...],
    states: tuple[Mapping[str, int], ...],
    encoding: Encoding,
    settings: AcquisitionSettings,
    log: SortLog,
) -> tuple[Placement, tuple[int, ...], tuple[Mapping[str, int], ...]]:
    """Refuse or drop slices and states that have (almost) no lines."""
    lines = line_counts(imaging, (len(slices), len(states)), encoding)
    few = lines < max(1.0, settings.min_line_fraction * lines.max())
    if not few.any():
        return imaging, slices, states
    s, q = (int(i) for i in np.argwhere(few)[0])
    if settings.incomplete == "error":
        raise SortError(
            f"{lines[s, q]} of {lines.max()} lines",
            where=place_name(slices[s], states, q),
            expected=f"at least {max(1, math.ceil(settings.min_line_fraction * lines.max()))}",
            remedy="The scan may have been stopped; incomplete = drop leaves such images out",
        )
    keep_slice = ~few.all(axis=1)
    keep_state = ~few[keep_slice].any(axis=0)
    whole = ~few.any(axis=1)  # slices with all their states: a scan that broke off in the last slice has many
    if int(whole.sum()) * len(states) > int(keep_slice.sum()) * int(keep_state.sum()):
        keep_slice, keep_state = whole, np.ones(len(states), bool)
    if not keep_state.any():
        raise SortError("no state is complete in all slices", where="states", got=f"{int(few.sum())} incomplete images")
    keep = keep_slice[imaging.slice] & keep_state[imaging.state]
    log.skip("incomplete slice or state", int((~keep).sum()))
    log.notes.append(
        f"{int((~keep_slice).sum())} slices and {int((~keep_state).sum())} states are left out as incomplete, the first: "
        f"{place_name(slices[s], states, q)}, {lines[s, q]} of {lines.max()} lines"
    )
    kept = imaging.take(keep)
    new_slice, new_state = (np.cumsum(k, dtype=np.int32) - 1 for k in (keep_slice, keep_state))
    kept = Placement(kept.rows, new_slice[kept.slice], new_state[kept.state], kept.k2, kept.k1)
    return (
        kept,
        tuple(v for v, k in zip(slices, keep_slice, strict=True) if k),
        tuple(v for v, k in zip(states, keep_state, strict=True) if k),
    )


def counted_alike(
    encoding: Encoding,
    counters: Mapping[str, NDArray[np.int32]],
    rows: NDArray[np.intp],
    settings: AcquisitionSettings,
    log: SortLog,
) -> Encoding:
    """The encoding with limits that count as the readouts do, where every value that is announced came one higher or one lower.

    Gadgetron takes a counter's limits for its size alone, so converters that count from 1 pass unnoticed there.
    """
    limits = dict(encoding.limits)
    for name in ("slice", *STATE_COUNTERS):
        limit = limits.get(name)
        if limit is None or (name == "phase" and settings.cardiac_phases):
            continue
        present = counters[name][rows]
        by = int(present.min()) - limit.minimum
        n = limit.maximum - limit.minimum + 1
        if abs(by) != 1 or int(present.max()) - limit.maximum != by or len(np.unique(present)) != n:
            continue
        limits[name] = Limit(limit.minimum + by, limit.maximum + by, limit.center + by)
        log.notes.append(
            f"the readouts count {name} from {limit.minimum + by}, the header from {limit.minimum}: the same ones"
        )
    return replace(encoding, limits=limits)


def announced(
    encoding: Encoding,
    slices: tuple[int, ...],
    states: tuple[Mapping[str, int], ...],
    settings: AcquisitionSettings,
    log: SortLog,
) -> None:
    """Slices and states that the limits announce and that never came."""
    for name in ("slice", *STATE_COUNTERS):
        limit = encoding.limits.get(name)
        merged = (name == "phase" and settings.cardiac_phases) or (
            name == "repetition" and settings.repetitions == "average"
        )
        if limit is None or merged or (name != "slice" and name not in states[0]):
            continue
        present = set(slices) if name == "slice" else {s[name] for s in states}
        n_announced = limit.maximum - limit.minimum + 1
        n_missing = n_announced - sum(limit.minimum <= v <= limit.maximum for v in present)
        if n_missing <= 0:
            continue
        first = next(v for v in range(limit.minimum, limit.maximum + 1) if v not in present)
        text = f"{n_missing} of {n_announced} announced {name}s never came, the first: {first}"
        if settings.incomplete == "error" and name in ("slice", "contrast", "set"):
            raise SortError(text, where=f"{name} {first}", got="no lines", remedy="incomplete = drop leaves them out")
        log.notes.append(text)


def too_large(
    encoding: Encoding, n_x: int, n_states: int, n_channels: int, sampled_bytes: int, settings: AcquisitionSettings
) -> None:
    """Refuse k-space and images that no real scan of ``sampled_bytes`` has, before anything of that size is allocated."""
    matrix = (*encoding.encoded_matrix[:2], n_x)
    needed = math.prod((n_states, n_channels, *matrix)) * COMPLEX_BYTES
    what = f"for {n_states} states, {n_channels} channels, matrix {encoding.encoded_matrix}"
    if needed > settings.max_slice_gib * 2**30:
        raise SortError(
            "k-space of one slice is too large",
            where="header",
            got=f"{needed / 2**30:.1f} GiB {what}",
            expected=f"at most {settings.max_slice_gib} GiB",
        )
    refuse_out_of_proportion("k-space of one slice", needed, sampled_bytes, what, MAX_EXPANSION)
    fov = (*encoding.encoded_fov[:2], encoding.encoded_fov[2] * n_x / encoding.encoded_matrix[2])
    image = n_states * n_channels * COMPLEX_BYTES
    for size, extent, recon_size, recon_extent in zip(matrix, fov, encoding.recon_matrix, encoding.recon_fov, strict=True):
        # images are interpolated over the whole encoded field of view before they are cropped
        stretched = recon_size * extent / recon_extent if recon_extent > 0 and extent > 0 and recon_size + size > 2 else 1
        image *= math.ceil(max(recon_size, min(stretched, 2.0**62)))
        if max(recon_size, stretched) > MAX_FINER * size:
            raise SortError(
                "the reconstructed matrix is out of proportion to the encoded one",
                where="header",
                got=f"{recon_size} pixels over {recon_extent * 1e3:g} mm from {size} over {extent * 1e3:g} mm",
                expected=f"at most {MAX_FINER} times finer",
            )
    what = f"for {n_states} states, matrix {encoding.recon_matrix}"
    refuse_out_of_proportion("the reconstructed matrix", image, sampled_bytes, what, MAX_EXPANSION * MAX_INTERPOLATION)


def refuse_out_of_proportion(what: str, needed: int, sampled_bytes: int, given: str, ratio: int) -> None:
    """Memory is given in proportion to what was really received: a few bytes of header must not claim gigabytes.

    Raises
    ------
    SortError
        ``needed`` is more than ``ratio`` times ``sampled_bytes`` and ``SMALL_BYTES``.
    """
    if needed > ratio * sampled_bytes + SMALL_BYTES:
        raise SortError(
            f"{what} is out of proportion to the samples received",
            where="header",
            got=f"{needed / 2**20:.0f} MiB {given} from {sampled_bytes / 2**20:.1f} MiB of samples",
            expected=f"at most {ratio} times as much",
            remedy="Check the matrix sizes in the header",
        )


def several_partitions(imaging: Placement, encoding: Encoding) -> None:
    """Refuse a 3D matrix of which one partition alone was encoded: a 2D scan would become a slab of equal pictures.

    Raises
    ------
    SortError
        All readouts have one k2, and the encoded matrix has several.
    """
    n2 = encoding.encoded_matrix[0]
    if n2 > 1 and not np.ptp(imaging.k2):
        raise SortError(
            "all readouts belong to one partition of a 3D matrix",
            where="header",
            got=f"kspace_encode_step_2 never changes, encoded matrix {encoding.encoded_matrix}",
            expected=f"several of {n2} partitions",
            remedy="A 2D scan has an encoded matrix of z = 1, and its slices the counter slice: correct the header in the conversion",
        )


def lines_note(
    imaging: Placement,
    slices: tuple[int, ...],
    states: tuple[Mapping[str, int], ...],
    encoding: Encoding,
    gated: bool,
    log: SortLog,
) -> None:
    """Say where there are fewer lines than limits and acceleration promise."""
    lines = line_counts(imaging, (len(slices), len(states)), encoding)
    n2, n1, _ = encoding.encoded_matrix
    expected = 1
    for name, n, factor in zip(
        ("kspace_encode_step_2", "kspace_encode_step_1"), (n2, n1), (encoding.acceleration or (1, 1))[::-1], strict=True
    ):
        limit = encoding.limits.get(name)
        if limit is None and n > 1:
            return  # nothing is promised
        extent = 1 if limit is None else limit.maximum - limit.minimum + 1
        expected *= max(1, min(n, extent) // max(1, factor))
    few = lines < expected
    if not few.any():
        return
    s, q = (int(i) for i in np.unravel_index(np.argmin(lines), lines.shape))
    why = "by the cardiac phases" if gated else "by limits and acceleration in the header"
    log.notes.append(
        f"{int(few.sum())} of {few.size} images have fewer lines than expected {why}, the worst: "
        f"{place_name(slices[s], states, q)}, {lines[s, q]} of {expected} lines"
    )


def repeats_note(
    imaging: Placement,
    counters: Mapping[str, NDArray[np.int32]],
    encoding: Encoding,
    settings: AcquisitionSettings,
    log: SortLog,
) -> None:
    """Readouts of the same place and the same average counter: not announced as averages, so worth a note."""
    if settings.cardiac_phases or settings.state == "single":
        return
    n2, n1, _ = encoding.encoded_matrix
    n_states = int(imaging.state.max()) + 1
    place = ((imaging.slice.astype(np.int64) * n_states + imaging.state) * n2 + imaging.k2) * n1 + imaging.k1
    order = np.lexsort((counters["average"][imaging.rows], place))
    place, average = place[order], counters["average"][imaging.rows][order]
    n = int(((np.diff(place) == 0) & (np.diff(average) == 0)).sum())
    if n:
        log.notes.append(f"{n} readouts repeat the counters of another one; repeated positions are averaged")


def moving_note(headers: Headers, imaging: Placement, slices: tuple[int, ...], log: SortLog) -> None:
    """Slices whose readouts do not all have one position, of the slice or of the table."""
    # positions that are not finite are repaired and noted with the geometry
    with np.errstate(invalid="ignore"):  # signalling NaNs
        places = [headers[name][imaging.rows].astype(np.float64) for name in ("position", "patient_table_position")]
    position = np.nan_to_num(np.concatenate(places, axis=1), posinf=0.0, neginf=0.0)
    order = np.argsort(imaging.slice, kind="stable")
    starts = np.searchsorted(imaging.slice[order], np.arange(len(slices)))
    low = np.minimum.reduceat(position[order], starts, axis=0)
    high = np.maximum.reduceat(position[order], starts, axis=0)
    moved = (high - low > MOVED).any(axis=1)
    if moved.any():
        s = int(np.argmax(moved))
        log.notes.append(
            f"{int(moved.sum())} slices change their position or the table's during the scan, the first: slice {slices[s]}; the position "
            "at the k-space centre of the first state is used"
        )


def polarity_note(
    readouts: ReadoutGeometry,
    imaging: Placement,
    slices: tuple[int, ...],
    states: tuple[Mapping[str, int], ...],
    log: SortLog,
) -> None:
    """Images of lines that were read in both directions, as in echo-planar trains: delays and eddy currents shift these against those."""
    shape = (len(slices), len(states))
    image = imaging.slice.astype(np.int64) * shape[1] + imaging.state
    reverse = readouts.reverse[imaging.rows]
    both = np.bincount(image[reverse], minlength=math.prod(shape)) > 0
    both &= np.bincount(image[~reverse], minlength=math.prod(shape)) > 0
    if both.any():
        s, q = np.unravel_index(int(np.argmax(both)), shape)
        n = log.skipped.get(SKIP_FLAGS[Flag.ACQ_IS_PHASECORR_DATA], 0)
        log.notes.append(
            f"{int(both.sum())} of {both.size} images have lines that were read in either direction, the first: "
            f"{place_name(slices[int(s)], states, int(q))}; nothing aligns these with those ({n} phase correction readouts are not used), "
            "so ghosts half a field of view away are likely"
        )


def dwell_note(headers: Headers, imaging: Placement, states: tuple[Mapping[str, int], ...], log: SortLog) -> None:
    """States whose readouts have another bandwidth have another noise, which nothing after the whitening knows of.

    Half the dwell time in all echoes but the first: R2* of 40 1/s is 0.1 % low at an SNR of 100, 3 % at 15, and its SD a quarter too small.
    """
    dwell = np.zeros(len(states))
    dwell[imaging.state] = headers["sample_time_us"][imaging.rows]
    known = dwell[np.isfinite(dwell) & (dwell > 0)]
    if len(known) < len(states) or known.max() <= OTHER_DWELL * known.min():
        return
    low, high = int(known.argmin()), int(known.argmax())
    log.notes.append(
        f"images are read with different bandwidths: dwell time {known[low]:g} us of {place_name(0, states, low)}, {known[high]:g} us of "
        f"{place_name(0, states, high)}; all are taken to be as noisy as the first readout, so that R2* of weak signal is off by some "
        "per cent, and standard deviations by the root of that ratio at most"
    )


def one_place(source: Headers, slices: tuple[int, ...], states: tuple[Mapping[str, int], ...], encoding: Encoding) -> None:
    """Refuse slabs that share a slice counter: the images of all would be sent to the place of one.

    Parameters
    ----------
    source
        ``(slice, state)``: header of the readout nearest to the k-space centre.

    Raises
    ------
    SortError
        States of a 3D scan half a slab apart. (A 2D slice is thin, and may follow the breath by more than that.)
    """
    if encoding.encoded_matrix[0] == 1:
        return
    with np.errstate(invalid="ignore"):
        position = np.nan_to_num(source["position"].astype(np.float64), posinf=0.0, neginf=0.0)
    apart = np.linalg.norm(position - position[:, :1], axis=-1)
    s, q = (int(i) for i in np.unravel_index(np.argmax(apart), apart.shape))
    most = max(500 * encoding.encoded_fov[0], LEAST_APART)
    if apart[s, q] >= most:
        raise SortError(
            "slabs at different places share a slice counter",
            where=place_name(slices[s], states, q),
            got=f"{apart[s, q]:.4g} mm from {place_name(slices[s], states, 0)}",
            expected=f"less than {most:.4g} mm, half a slab",
            remedy="Slabs are told apart by the counter slice, not by set, repetition or contrast: correct it in the conversion",
        )


def one_orientation(
    headers: Headers,
    imaging: Placement,
    source: Headers,
    slices: tuple[int, ...],
    states: tuple[Mapping[str, int], ...],
    log: SortLog,
) -> None:
    """Refuse orientations that share a slice counter, and lines of one image that run in different directions; note small turns.

    Parameters
    ----------
    source
        ``(slice, state)``: header of the readout nearest to the k-space centre; all images of a slice have the directions of its first.

    Raises
    ------
    SortError
        A read, phase or slice direction `MOST_TURNED` or more away from that of the slice's first state. Missing ones are no contradiction.
    """
    turned = np.zeros(len(imaging))
    for name in ("read_dir", "phase_dir", "slice_dir"):
        own, first = _unit(headers[name][imaging.rows]), _unit(source[name][:, 0])[imaging.slice]
        known = own.any(axis=1) & first.any(axis=1)
        chord = np.linalg.norm(own - first, axis=1) / 2  # exact for small angles, which the cosine is not
        turned = np.maximum(turned, np.where(known, 2 * np.degrees(np.arcsin(np.minimum(chord, 1.0))), 0.0))
    i = int(np.argmax(turned))
    where = place_name(slices[imaging.slice[i]], states, int(imaging.state[i]))
    if turned[i] >= MOST_TURNED:
        raise SortError(
            "different orientations share a slice counter",
            where=where,
            got=f"directions turned by {turned[i]:.4g} degrees, most in {readout_name(headers, int(imaging.rows[i]))}",
            expected=f"less than {MOST_TURNED:g}",
            remedy="Orientations are told apart by the counter slice, not by set, repetition or contrast: correct it in the conversion",
        )
    if turned[i] > TURNED:
        log.notes.append(
            f"directions change by up to {turned[i]:.2g} degrees during the scan, most in {where}; those at the k-space centre of the "
            "first state are used"
        )


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float64]:
    """Of length 1; zero for those that are missing or not finite."""
    with np.errstate(invalid="ignore"):  # signalling NaNs
        wide = vectors.astype(np.float64)
    wide = np.where(np.isfinite(wide).all(axis=1, keepdims=True), wide, 0.0)
    length = np.linalg.norm(wide, axis=1, keepdims=True)
    return np.where(length > 1e-6, wide / np.maximum(length, 1e-6), 0.0)
