"""Readout headers -> the place of each readout in k-space. Vectorised: no loop over readouts.

Rules (beyond the MRD specification, where writers differ)
----------------------------------------------------------
* ``k1 = counter + n1 // 2 - centre``; the centre is the header's ``center``, or ``n1 // 2`` without limits. k2 likewise.
* A counter outside the header's limits is an error. Inside the limits but outside the matrix (some converters write a
  matrix one line short): dropped and counted, an error if that concerns more than a tenth of the imaging readouts.
  Without limits any counter outside the matrix is an error.
* Siemens readouts carry the centre line and partition in ``idx.user[5]`` and ``[6]``. If that is one non-zero value which
  differs from the header's centre, a note says so; see the setting ``centre_source``.
* Averages, and readouts of the same place that come twice, are averaged with counts; segments are merged. Readouts that hold nothing but
  zeros are left out, where others of the image hold something (`gadgets.sample_checks`).
* The states are the product of the values of all counters of the state axis; two that only go together count as one.
  A (slice, state) without lines, or with far fewer than the fullest one, is an error (or is dropped, setting
  ``incomplete``). So is a slice, contrast or set that the limits announce and that never came; phases and repetitions that
  never came are only noted, because retro-gated cines and
  scans that the operator ends early have them. Readouts that count from 1 where the limits count from 0 (or the other way round) lack
  nothing: as many values came as were announced.
* States of a 3D scan that lie half a slab apart are an error: slabs are told apart by the slice counter alone. So are readouts of one
  slice in different directions; small turns (prospective motion correction) are noted.
* A 3D matrix of which one partition alone was encoded is an error: some converters count the slices of a 2D scan there.
* Fewer lines than the header's limits and acceleration promise are noted, not refused: prospective sampling masks do that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

import numpy as np
from numpy.typing import NDArray

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.calibration import calibration_notes
from gadgets.errors import SortError
from gadgets.gating import cardiac_phases
from gadgets.geometry import read_geometry
from gadgets.inversion_times import inversion_times, stated_times, times_notes
from gadgets.readouts import (
    SKIP_FLAGS,
    Headers,
    Kind,
    ReadoutGeometry,
    check_channels,
    chosen_encoding,
    flag_mask,
    readout_geometry,
    readout_name,
)
from gadgets.scan_checks import (
    COMPLEX_BYTES,
    SortLog,
    announced,
    complete,
    counted_alike,
    dwell_note,
    lines_note,
    moving_note,
    one_orientation,
    one_place,
    polarity_note,
    repeats_note,
    several_partitions,
    too_large,
)
from gadgets.sorted_scan import (
    STATE_COUNTERS,
    Placement,
    SortedScan,
    echo_times,
    echoes_are_sets,
    is_saturation_prepared,
    saturation_list,
    times_by_counter,
)
from gadgets.wire.header import Encoding, Limit, MrdHeader

MAX_FRACTION_OUTSIDE = 0.1
FEWEST_TOGETHER = 4
"""Readouts of each value, of counters that go together: those that count the readouts themselves are no states."""


def sort_readouts(
    headers: Headers,
    header: MrdHeader,
    settings: AcquisitionSettings | None = None,
    unmeasured: NDArray[np.int64] | None = None,
) -> SortedScan:
    """Give every readout its slice, state and k-space position.

    Parameters
    ----------
    headers
        All acquisition headers of the scan in arrival order (``ReadoutIndex.headers``); not modified.
    header
        The MRD header.
    settings
        Default settings when ``None``.
    unmeasured
        Arrival numbers of readouts that hold nothing: they are left out (`gadgets.sample_checks.unmeasured`).

    Raises
    ------
    SortError
        Readouts that do not fit the header, by the rules at the top of this file; nothing to reconstruct.
    """
    settings = settings or AcquisitionSettings()
    encoding = chosen_encoding(header, settings)
    readouts = readout_geometry(headers, header, settings)
    log = SortLog({}, [])
    if unmeasured is not None and len(unmeasured):
        readouts = _without(readouts, unmeasured, log)
    kind = readouts.kind
    n_channels = _channels(headers, header, kind, log)
    _count_skipped(headers, kind, log)
    candidates, is_calibration = _images_and_calibration(kind, settings, log)
    k2, k1, inside = _phase_encoding(headers, candidates, encoding, settings, log)
    counters = _counters(headers, candidates, settings, log)
    rows = _image_rows(headers, header, candidates, inside, counters, settings, log)
    encoding = counted_alike(encoding, counters, rows, settings, log)

    axes = _state_axes(counters, rows, settings, log)
    slices, slice_of, states, state_of = _labels(counters, rows, axes, settings, log)
    imaging = Placement(*(a.astype(np.int32) for a in (rows, slice_of, state_of, k2[rows], k1[rows])))
    imaging, slices, states = complete(imaging, slices, states, encoding, settings, log)
    calibration = _calibration(counters, is_calibration & inside_grid(k2, k1, encoding), slices, states, k2, k1, log)
    announced(encoding, slices, states, settings, log)
    sampled = int(headers["number_of_samples"][rows].astype(np.int64).sum()) * n_channels * COMPLEX_BYTES
    too_large(encoding, readouts.n_x, len(states), n_channels, sampled, settings)
    several_partitions(imaging, encoding)
    lines_note(imaging, slices, states, encoding, bool(settings.cardiac_phases), log)
    repeats_note(imaging, counters, encoding, settings, log)

    source = _source_headers(headers, imaging, (len(slices), len(states)), encoding)
    one_place(source, slices, states, encoding)
    geometry = tuple(read_geometry(head) for head in source[:, 0])
    log.notes.extend(dict.fromkeys(note for g in geometry for note in g.notes))
    moving_note(headers, imaging, slices, log)
    one_orientation(headers, imaging, source, slices, states, log)
    dwell_note(headers, imaging, states, log)
    polarity_note(readouts, imaging, slices, states, log)
    if echoes_are_sets(header, states):
        log.notes.append(
            f"{len(states)} sets of one contrast and {len(states)} echo times in the header: the sets are taken for echoes"
        )
    saturations = saturation_list(header, settings)
    recovers = len(set(saturations or header.inversion_times)) > 1
    grid = encoding.encoded_matrix[:2]
    log.notes.extend(calibration_notes(imaging, calibration, slices, grid, settings, recovers=recovers))
    inversions, told = inversion_times(header, states, source, settings, encoding.limits)
    stated = settings.inversion_times and is_saturation_prepared(header, settings)
    saturation_times = (
        stated_times(settings, len(states)) if stated else times_by_counter(saturations, states, encoding.limits)
    )
    log.notes.extend((*told, *times_notes(header, settings, (saturation_times,), len(states))))
    return SortedScan(
        header=header,
        settings=settings,
        encoding=encoding,
        n_readouts=len(headers),
        n_channels=n_channels,
        grid=grid,
        slices=slices,
        states=states,
        imaging=imaging,
        calibration=calibration,
        noise_rows=np.flatnonzero(kind == Kind.NOISE).astype(np.int32),
        skipped=log.skipped,
        notes=tuple(log.notes),
        readouts=readouts,
        geometry=geometry,
        source_headers=source,
        echo_times=echo_times(header, states, encoding.limits.get("contrast")),
        inversion_times=inversions,
        saturation_times=saturation_times,
    )


def _without(readouts: ReadoutGeometry, unmeasured: NDArray[np.int64], log: SortLog) -> ReadoutGeometry:
    kind = readouts.kind.copy()
    kind[unmeasured] = Kind.SKIPPED
    log.skip("nothing but zeros", len(unmeasured))
    log.notes.append(
        f"{len(unmeasured)} of {int(readouts.is_image.sum())} readouts hold nothing but zeros: they count as not measured"
    )
    return replace(readouts, kind=kind)


def inside_grid(k2: NDArray[np.int32], k1: NDArray[np.int32], encoding: Encoding) -> NDArray[np.bool_]:
    """Which positions lie in the encoded matrix."""
    n2, n1, _ = encoding.encoded_matrix
    return (k2 >= 0) & (k2 < n2) & (k1 >= 0) & (k1 < n1)


def _counters(
    headers: Headers, candidates: NDArray[np.intp], settings: AcquisitionSettings, log: SortLog
) -> dict[str, NDArray[np.int32]]:
    """Of all readouts; repetitions that are to be averaged are counted as averages."""
    counters = {name: headers["idx"][name].astype(np.int32) for name in (*STATE_COUNTERS, "slice", "average")}
    repetition = counters["repetition"]
    n = len(np.unique(repetition[candidates]))
    if settings.repetitions == "average" and n > 1:
        counters["average"] += repetition * (int(counters["average"].max()) + 1)
        counters["repetition"] = np.zeros_like(repetition)
        log.notes.append(f"{n} repetitions are averaged, as the setting repetitions asks")
    return counters


def _channels(headers: Headers, header: MrdHeader, kind: NDArray[np.uint8], log: SortLog) -> int:
    """Of all readouts that are used; the header may have announced another number."""
    n_channels = check_channels(headers, kind)
    if header.receiver_channels and n_channels and header.receiver_channels != n_channels:
        log.notes.append(f"the header announces {header.receiver_channels} channels, the readouts have {n_channels}")
    return n_channels


def _count_skipped(headers: Headers, kind: NDArray[np.uint8], log: SortLog) -> None:
    log.skip("other encoding space", int((kind == Kind.OTHER_ENCODING).sum()))
    flags = headers["flags"][kind == Kind.SKIPPED]
    for bit, reason in SKIP_FLAGS.items():  # counted once, under the first reason
        has = (flags & flag_mask(bit)) != 0
        log.skip(reason, int(has.sum()))
        flags = flags[~has]


def _images_and_calibration(
    kind: NDArray[np.uint8], settings: AcquisitionSettings, log: SortLog
) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Rows of readouts that are meant for images, and which readouts are calibration."""
    is_image = (kind == Kind.IMAGING) | (kind == Kind.CALIBRATION_AND_IMAGING)
    is_calibration = (kind == Kind.CALIBRATION) | (kind == Kind.CALIBRATION_AND_IMAGING)
    if settings.calibration_in_image:
        is_image |= is_calibration
    if not is_image.any():
        raise SortError("no imaging readouts", where="scan", got=f"{len(kind)} readouts, {log.skipped or 'none skipped'}")
    return np.flatnonzero(is_image), is_calibration


def _image_rows(
    headers: Headers,
    header: MrdHeader,
    candidates: NDArray[np.intp],
    inside: NDArray[np.bool_],
    counters: dict[str, NDArray[np.int32]],
    settings: AcquisitionSettings,
    log: SortLog,
) -> NDArray[np.intp]:
    """Those of the candidates that lie in the matrix and, where cardiac phases are told anew (in ``counters``), in an accepted beat."""
    if settings.cardiac_phases:
        inside = inside & _gate(headers, candidates, inside, counters, settings, log)
    elif header.user_long.get("RetroGatedImages", 0) > 1:
        log.notes.append(
            f"the header says that {header.user_long['RetroGatedImages']} cardiac phases are to be re-binned "
            f"retrospectively; set cardiac_phases to do so: the phase counter is used"
        )
    rows = candidates[inside[candidates]]
    if not len(rows):
        raise SortError("no imaging readouts are left", where="scan", got=f"skipped: {log.skipped}")
    return rows


def _phase_encoding(
    headers: Headers, rows: NDArray[np.intp], encoding: Encoding, settings: AcquisitionSettings, log: SortLog
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.bool_]]:
    """Grid positions of all readouts, and which lie in the matrix; imaging readouts outside are counted or refused."""
    positions: list[NDArray[np.int32]] = []
    n2, n1, _ = encoding.encoded_matrix
    unlimited = np.zeros(len(headers), bool)
    for name, n, user in (("kspace_encode_step_2", n2, 6), ("kspace_encode_step_1", n1, 5)):
        counter = headers["idx"][name].astype(np.int32)
        limit = encoding.limits.get(name)
        _within_limits(headers, counter, rows, limit, name)
        stated = headers["idx"]["user"][:, user]
        k = counter + n // 2 - _centre(counter[rows], stated[rows], limit, n, name, settings, log)
        if limit is None:
            unlimited |= (k < 0) | (k >= n)
        positions.append(k.astype(np.int32))
    k2, k1 = positions
    inside = inside_grid(k2, k1, encoding)
    outside = ~inside[rows]
    n_outside = int(outside.sum())
    if n_outside and (unlimited[rows].any() or n_outside > MAX_FRACTION_OUTSIDE * len(rows)):
        i = int(rows[np.argmax(outside)])
        raise SortError(
            f"{n_outside} of {len(rows)} imaging readouts lie outside the encoded matrix",
            where=readout_name(headers, i),
            got=f"k2 {k2[i]}, k1 {k1[i]}",
            expected=f"0 to {n2 - 1}, 0 to {n1 - 1}",
            remedy="Check encoded matrix and encoding limits in the header",
        )
    if n_outside:
        log.skip("outside the encoded matrix", n_outside)
        log.notes.append(f"{n_outside} readouts inside the encoding limits but outside the encoded matrix are left out")
    return k2, k1, inside


def _within_limits(
    headers: Headers, counter: NDArray[np.int32], rows: NDArray[np.intp], limit: Limit | None, name: str
) -> None:
    if limit is None:
        return
    values = counter[rows]
    bad = (values < limit.minimum) | (values > limit.maximum)
    if bad.any():
        i = int(rows[np.argmax(bad)])
        raise SortError(
            f"{name} is outside the header's encoding limits",
            where=readout_name(headers, i),
            got=int(counter[i]),
            expected=f"{limit.minimum} to {limit.maximum}",
        )


def _centre(
    counter: NDArray[np.int32],
    stated: NDArray[np.uint16],
    limit: Limit | None,
    n: int,
    name: str,
    settings: AcquisitionSettings,
    log: SortLog,
) -> int:
    """The counter value of DC, by the rules at the top of this file."""
    of_header = n // 2 if limit is None else limit.center
    of_readouts = int(stated[0]) if stated[0] and (stated == stated[0]).all() else of_header
    if of_readouts == of_header:
        return of_header

    def n_outside(centre: int) -> int:
        k = counter + (n // 2 - centre)
        return int(((k < 0) | (k >= n)).sum())

    believe = settings.centre_source == "readouts"
    if settings.centre_source == "auto":
        believe = n_outside(of_header) > 0 and n_outside(of_readouts) == 0
    chosen = of_readouts if believe else of_header
    log.notes.append(
        f"{name}: k-space centre is {of_header} by the header and {of_readouts} by the readouts' user counter; "
        f"{chosen} is used"
    )
    return chosen


def _gate(
    headers: Headers,
    candidates: NDArray[np.intp],
    inside: NDArray[np.bool_],
    counters: dict[str, NDArray[np.int32]],
    settings: AcquisitionSettings,
    log: SortLog,
) -> NDArray[np.bool_]:
    """Replace the phase counter by the cardiac phase; True for readouts of accepted beats."""
    rows = candidates[inside[candidates]]
    if not len(rows):
        return inside
    gating = cardiac_phases(headers[rows], settings)
    phase = np.full(len(headers), -1, np.int32)
    phase[rows] = gating.phase
    counters["phase"] = phase
    log.skip("arrhythmia", gating.n_rejected_readouts)
    log.notes.append(gating.note)
    accepted: NDArray[np.bool_] = phase >= 0
    return accepted


def _state_axes(
    counters: Mapping[str, NDArray[np.int32]], rows: NDArray[np.intp], settings: AcquisitionSettings, log: SortLog
) -> tuple[str, ...]:
    """The counters that make the state axis. What a named axis does not contain has to be constant."""
    if settings.state == "auto":
        return STATE_COUNTERS
    varying = [n for n in STATE_COUNTERS if np.ptp(counters[n][rows]) > 0 and n != settings.state]
    if settings.state == "single":
        if varying:
            log.notes.append(f"everything is averaged into one image over {', '.join(varying)}, as the setting state asks")
        return tuple(n for n in STATE_COUNTERS if n not in varying)
    if varying:
        raise SortError(
            f"other counters than {settings.state} vary",
            where="states",
            got=", ".join(f"{n}: {len(np.unique(counters[n][rows]))} values" for n in varying),
            expected="constant ones",
            remedy="Use state = auto to make them states, or single to average all",
        )
    return STATE_COUNTERS


def _labels(
    counters: Mapping[str, NDArray[np.int32]],
    rows: NDArray[np.intp],
    axes: Sequence[str],
    settings: AcquisitionSettings,
    log: SortLog,
) -> tuple[tuple[int, ...], NDArray[np.int64], tuple[Mapping[str, int], ...], NDArray[np.int64]]:
    slice_values, slice_of = np.unique(counters["slice"][rows], return_inverse=True)
    values: list[list[int]] = []
    inverses: list[NDArray[np.int64]] = []
    for name in axes:
        if name == "phase" and settings.cardiac_phases:  # a cardiac phase that no readout fell into must not vanish
            values.append(list(range(settings.cardiac_phases)))
            inverses.append(counters[name][rows].astype(np.int64))
        else:
            found, inverse = np.unique(counters[name][rows], return_inverse=True)
            values.append(found.tolist())
            inverses.append(inverse)
    together = _counting_together(axes, values, inverses, log)
    leading = [i for i in range(len(axes)) if i not in together]
    # more combinations than readouts: some are certainly empty, and a hostile header must not make us list them
    n_combinations = math.prod([len(slice_values), *(len(values[i]) for i in leading)])
    if n_combinations > len(rows):
        sizes = ", ".join(f"{len(v)} {n}s" for n, v in zip(axes, values, strict=True) if len(v) > 1)
        raise SortError(
            "slices and states without lines",
            where="states",
            got=f"{len(rows)} readouts for {len(slice_values)} slices and {sizes}",
            expected=f"at least one for each of {n_combinations}",
            remedy="Check the counters, or choose the state axis by the setting state",
        )
    state_of = np.zeros(len(rows), np.int64)
    for i in leading:
        state_of = state_of * len(values[i]) + inverses[i]
    states: list[Mapping[str, int]] = []
    for combination in product(*(range(len(values[i])) for i in leading)):
        at = dict(zip(leading, combination, strict=True))
        at |= {i: int(partner[at[leader]]) for i, (leader, partner) in together.items()}
        states.append({name: values[i][at[i]] for i, name in enumerate(axes)})
    return tuple(slice_values.tolist()), slice_of, tuple(states), state_of


def _counting_together(
    axes: Sequence[str], values: list[list[int]], inverses: list[NDArray[np.int64]], log: SortLog
) -> dict[int, tuple[int, NDArray[np.int64]]]:
    """Counters that only repeat what an earlier one says, by position in ``axes``: that one, and their value for each of its values.

    Some sequences count the delay as set and as repetition: two such counters make no product.
    """
    found: dict[int, tuple[int, NDArray[np.int64]]] = {}
    for i in range(len(axes)):
        for leader in range(i):
            n = len(values[i])
            if leader in found or len(values[leader]) != n or not 2 <= n <= len(inverses[i]) // FEWEST_TOGETHER:
                continue
            pairs = np.unique(inverses[leader] * n + inverses[i])
            if len(pairs) == n and len(np.unique(pairs % n)) == n and len(np.unique(pairs // n)) == n:
                found[i] = (leader, pairs % n)
                log.notes.append(f"the counters {axes[leader]} and {axes[i]} go together: {n} states, not {n * n}")
                break
    return found


def _calibration(
    counters: Mapping[str, NDArray[np.int32]],
    chosen: NDArray[np.bool_],
    slices: tuple[int, ...],
    states: tuple[Mapping[str, int], ...],
    k2: NDArray[np.int32],
    k1: NDArray[np.int32],
    log: SortLog,
) -> Placement:
    rows = np.flatnonzero(chosen)
    slice_counter = counters["slice"][rows]
    position = np.minimum(np.searchsorted(slices, slice_counter), len(slices) - 1)
    known = np.asarray(slices)[position] == slice_counter
    log.skip("calibration of a slice without images", int((~known).sum()))
    rows, position = rows[known], position[known]
    axes = tuple(states[0])
    state = np.full(len(rows), -1, np.int32)
    if len(rows):
        found, inverse = np.unique(np.stack([counters[n][rows] for n in axes], axis=1), axis=0, return_inverse=True)
        numbers = {tuple(s[n] for n in axes): q for q, s in enumerate(states)}
        state = np.array([numbers.get(tuple(v), -1) for v in found.tolist()], np.int32)[inverse.ravel()]
    return Placement(*(a.astype(np.int32) for a in (rows, position, state, k2[rows], k1[rows])))


def _source_headers(headers: Headers, imaging: Placement, shape: tuple[int, int], encoding: Encoding) -> Headers:
    """``(slice, state)``: header of the readout nearest to the k-space centre, the earliest of equals."""
    n2, n1, _ = encoding.encoded_matrix
    distance = np.hypot((imaging.k2 - n2 // 2) / n2, (imaging.k1 - n1 // 2) / n1)
    group = imaging.slice.astype(np.int64) * shape[1] + imaging.state
    order = np.lexsort((distance, group))  # stable, so arrival order decides among equals
    _, first = np.unique(group[order], return_index=True)
    source: Headers = headers[imaging.rows[order[first]]].reshape(shape)
    return source
