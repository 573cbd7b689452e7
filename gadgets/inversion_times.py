"""Where the inversion time of every image comes from: the console's setting, the header, or the readouts. Never a guess.

1. The setting ``inversion_times``: one per image in the order of the series, ms, separated by commas. Of a saturation they are its delays.
2. The header: user parameters ``InversionTime_ms_0``, ``_1``, ... up to the first gap, or else the TI list. It must have one
   value for every value of one counter (contrast, set, repetition or phase), or one for every image. Of a scan with missing images: one
   for every value that the encoding limits announce. Not a TI list that belongs to a saturation (setting ``preparation``).
3. The readouts, where an inversion recovery's heartbeats decide (MOLLI): ``user_int[5]`` numbers the inversions, ``user_int[4]``
   is the first image's time after its inversion in ms, and the acquisition time stamps tell how much later the others came. It is what
   Gadgetron's MOLLI chain expects of a scanner. Used when asked for, or when the header has TIs that do not fit the images and the
   readouts number several inversions (the two fields mean other things in other sequences).

Times that contradict the time stamps of images of one inversion are used, and it is said.
Where none of them fits there are no times, and a T1 chain refuses the scan with an error that says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.readouts import Headers
from gadgets.sorted_scan import SATURATION_PREFIX, is_saturation_prepared, numbered_times, times_by_counter
from gadgets.wire.header import Limit, MrdHeader
from recon_core.errors import SettingError

States = tuple[Mapping[str, int], ...]
Times = tuple[tuple[float, ...], ...]

PREFIX = "InversionTime_ms_"
SAME = 1e-3  # s; two lists that differ by more contradict each other
LONGEST = 60.0  # s after an inversion; beyond that a counter or a time stamp means something else
FIRST_TIME, INVERSION = 4, 5  # in ``user_int``
MOST_APART = 0.04  # of the longest time; T1 is off by half as much where heartbeats were others (MOLLI 5(3)3)
FEWEST_STEPS = 3  # from image to image of an inversion: two may agree with time stamps by chance
UNLIKE = 1.5  # times and stamps that differ by this factor are no copies of each other


def inversion_times(
    header: MrdHeader,
    states: States,
    source: Headers,
    settings: AcquisitionSettings,
    limits: Mapping[str, Limit] | None = None,
) -> tuple[Times, tuple[str, ...]]:
    """The inversion time of each image in s, ``(slice, state)``, and notes; an empty tuple for each slice where there are none.

    Parameters
    ----------
    header
        The MRD header.
    states
        The counters of each state.
    source
        ``(slice, state)``: acquisition headers of the readouts nearest to the k-space centre.
    settings
        ``inversion_times`` and ``inversion_time_source``.
    limits
        Of the encoding; they tell which times images have when others are missing.

    Raises
    ------
    SettingError
        The setting is no list of times, or has another number of them than there are images.
    """
    times, notes = _found_times(header, states, source, settings, limits)
    contradiction = _stamps_note(times, source, settings.tick)
    return times, (*notes, contradiction) if contradiction else notes


def _found_times(
    header: MrdHeader,
    states: States,
    source: Headers,
    settings: AcquisitionSettings,
    limits: Mapping[str, Limit] | None,
) -> tuple[Times, tuple[str, ...]]:
    n_slices = len(source)
    if settings.inversion_times:
        stated = () if is_saturation_prepared(header, settings) else stated_times(settings, len(states))
        return (stated,) * n_slices, ()
    listed = () if is_saturation_prepared(header, settings) else numbered_times(header, PREFIX) or header.inversion_times
    of_header = times_by_counter(listed, states, limits)
    asked = settings.inversion_time_source == "readouts"
    if settings.inversion_time_source == "header" or (
        not asked and (not listed or len(set(of_header)) > 1 or len(states) < 3)
    ):
        return (of_header,) * n_slices, ()
    of_readouts = tuple(_from_readouts(row, settings.tick) for row in source)
    several = all(np.ptp(row["user_int"][:, INVERSION]) > 0 for row in source)
    if not all(of_readouts) or not (asked or several):
        if asked:
            return ((),) * n_slices, ("the readouts hold no inversion times (user_int 4 and 5)",)
        return (of_header,) * n_slices, ()
    first = ", ".join(f"{1e3 * t:.0f}" for t in of_readouts[0])
    return of_readouts, (f"inversion times from the readouts' user values and time stamps, first slice: {first} ms",)


def _stamps_note(times: Times, source: Headers, tick: float) -> str:
    """What is to be said of images of one inversion that were read at other distances in time than their inversion times have; or nothing.

    Nominal heartbeats in a header are a common cause. Nothing is said where stamps and times are no copies of each other at all: images
    with an inversion each, or stamps of another unit.
    """
    worst, told = MOST_APART, ""
    for row, of_slice in zip(source, times, strict=True):
        if len(of_slice) != len(row):
            continue
        stamps = row["acquisition_time_stamp"].astype(np.int64) * tick
        order = np.argsort(stamps, kind="stable")
        stated, read = np.diff(np.asarray(of_slice)[order]), np.diff(stamps[order])
        follows = stated > 0  # a time that is not longer than the one before belongs to the next inversion
        if follows.sum() < FEWEST_STEPS or ((read < stated / UNLIKE) | (read > stated * UNLIKE))[follows].any():
            continue
        inversion = np.cumsum(~follows)
        for number in np.unique(inversion[follows]):
            own = follows & (inversion == number)
            by_times, by_stamps = float(stated[own].sum()), float(read[own].sum())
            apart = abs(by_times - by_stamps) / max(of_slice)
            if apart > worst:
                worst = apart
                told = (
                    f"images of one inversion are {by_times:.2f} s apart by their inversion times and {by_stamps:.2f} s by the readouts' "
                    "time stamps: T1 is wrong if the times are of nominal heartbeats (settings inversion_times, inversion_time_source)"
                )
    return told


def times_notes(header: MrdHeader, settings: AcquisitionSettings, used: Times, n_states: int) -> tuple[str, ...]:
    """What is to be said of the header's times of its preparation: two lists that contradict each other, or one that fits no images.

    Parameters
    ----------
    used
        Times of that preparation, ``(slice, state)``: empty ones where none fit.
    """
    saturated = is_saturation_prepared(header, settings)
    kind, prefix = ("saturation", SATURATION_PREFIX) if saturated else ("inversion", PREFIX)
    numbered, listed = numbered_times(header, prefix), header.inversion_times
    if settings.inversion_times:
        return ()
    if len(numbered) == len(listed) and any(abs(a - b) > SAME for a, b in zip(numbered, listed, strict=True)):
        return (
            f"the header has two lists of {kind} times that differ: user parameters {prefix}... {_in_ms(numbered)}, which are used, and "
            f"TI {_in_ms(listed)}; T1 is wrong if the TI list is right",
        )
    n_times = len(numbered or listed)
    if saturated and n_times > 1 and not any(used):
        return (f"the header has {n_times} saturation times for {n_states} images: none of them is used",)
    return ()


def _in_ms(times: tuple[float, ...]) -> str:
    return ", ".join(f"{1e3 * t:g}" for t in times) + " ms"


def stated_times(settings: AcquisitionSettings, n_states: int) -> tuple[float, ...]:
    """The setting ``inversion_times`` in s, one for each state: of a saturation they are its delays.

    Raises
    ------
    SettingError
        No list of times, as many as there are states, up to a minute.
    """
    text, where = settings.inversion_times, "acquisition.inversion_times"
    try:
        times = tuple(float(part) * 1e-3 for part in text.replace(";", ",").split(",") if part.strip())
    except ValueError:
        raise SettingError(
            "not a list of times", where=where, got=repr(text[:80]), expected="ms, with commas between"
        ) from None
    if len(times) != n_states:
        raise SettingError("count of times and of images differ", where=where, got=len(times), expected=n_states)
    if wrong := [t for t in times if not (math.isfinite(t) and 0 <= t <= LONGEST)]:
        raise SettingError("not an inversion time", where=where, got=f"{1e3 * wrong[0]:g} ms", expected="0 to 60000 ms")
    return times


def _from_readouts(row: Headers, tick: float) -> tuple[float, ...]:
    """Times of one slice's images in s; empty where the values cannot be that."""
    first = row["user_int"][:, FIRST_TIME].astype(np.float64) * 1e-3
    inversion = row["user_int"][:, INVERSION]
    stamps = row["acquisition_time_stamp"].astype(np.int64)
    times = np.empty(len(row))
    for number in np.unique(inversion):
        own = inversion == number
        if np.ptp(first[own]) > 0:  # one inversion has one first time
            return ()
        times[own] = first[own] + (stamps[own] - stamps[own].min()) * tick
    if (first <= 0).any() or (times > LONGEST).any() or len(np.unique(times)) < min(3, len(times)):
        return ()
    return tuple(times.tolist())
