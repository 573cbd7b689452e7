"""Retrospective cardiac gating: time stamps of readouts -> cardiac phases.

Retro-gated raw data have as many phase counters as fitted into each beat, so the counter is not a cardiac phase. What is
reliable is the time since the last trigger that each readout carries. Here each readout's position within its own RR
interval (0 to 1, stretched linearly) chooses one of ``n`` equal bins.

Beats
-----
With acquisition time stamps the instant of a readout's trigger is ``acquisition stamp - physiology stamp``; readouts of one
beat share it, and the RR interval is the distance to the next trigger. This is independent of the order of arrival. Without
them a beat ends where the physiology stamp falls back, in order of arrival, and the RR interval is estimated from the last
stamp of the beat, the typical step, and the first stamp of the next one.

The interval of the last beat, and of one before a pause in the acquisition, is unknown: the median is used.

Arrhythmia
----------
A beat is rejected with all its readouts if its RR interval deviates from the median by more than ``r`` median, or if
readouts lie later than ``(1 + r)`` median behind its trigger (a long last beat or a missed trigger).

Positions of k-space that no accepted beat filled stay unsampled. No view is shared between phases.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.errors import SortError
from gadgets.readouts import Headers

SHORTEST_RR = 0.15
"""s; two triggers cannot be closer (400 per minute), so differences below it are jitter of one trigger's instant."""

SECONDS_PER_DAY = 86400
PAUSE_WITHOUT_REJECTION = 0.5


@dataclass(frozen=True)
class Gating:
    """Cardiac phases of readouts.

    Attributes
    ----------
    phase
        int32 ``(readout,)``, 0 to n - 1; -1 where the beat was rejected.
    beat
        int32 ``(readout,)``, number of the beat in time.
    rr
        float64 ``(beat,)`` in s, as used for the stretching.
    rejected
        bool ``(beat,)``.
    median_rr
        s.
    """

    phase: NDArray[np.int32]
    beat: NDArray[np.int32]
    rr: NDArray[np.float64]
    rejected: NDArray[np.bool_]
    median_rr: float

    @property
    def n_rejected_readouts(self) -> int:
        return int((self.phase < 0).sum())

    @property
    def note(self) -> str:
        """One sentence for the operator."""
        return (
            f"retro-gating: {len(self.rr)} beats, median RR {1e3 * self.median_rr:.0f} ms, {int(self.rejected.sum())} beats "
            f"({self.n_rejected_readouts} readouts) rejected for arrhythmia"
        )


def cardiac_phases(headers: Headers, settings: AcquisitionSettings) -> Gating:
    """Sort readouts into ``settings.cardiac_phases`` phases.

    Parameters
    ----------
    headers
        The imaging readouts, in arrival order; not modified.
    settings
        ``cardiac_phases``, ``arrhythmia_rejection`` in percent, ``physiology_channel``, ``tick`` in s.

    Raises
    ------
    SortError
        No physiology time stamps, a single beat only (its RR interval is unknown), or all beats rejected.
    """
    n_phases, channel = settings.cardiac_phases, settings.physiology_channel
    if n_phases < 1:
        raise SortError("no cardiac phases asked for", where="gating", got=n_phases, expected="at least 1")
    since_trigger = headers["physiology_time_stamp"][:, channel].astype(np.int64)
    if not since_trigger.any():
        raise SortError(
            "no physiology time stamps",
            where=f"gating, channel {channel}",
            got=f"{len(headers)} readouts with stamp 0",
            expected="ticks since the last trigger",
            remedy="Choose another physiology_channel, or cardiac_phases = 0 to use the phase counter",
        )
    clock = headers["acquisition_time_stamp"].astype(np.int64)
    if (clock != clock[0]).any():
        beat, intervals = _beats_by_clock(clock, since_trigger, settings.tick)
    else:
        beat, intervals = _beats_by_fallback(since_trigger)
    return _phases(beat, intervals, since_trigger, settings)


def _beats_by_clock(
    clock: NDArray[np.int64], since_trigger: NDArray[np.int64], tick: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Beat of each readout, and each beat's RR in ticks (NaN for the last)."""
    gap, day = max(1, round(SHORTEST_RR / tick)), round(SECONDS_PER_DAY / tick)
    if clock.max() - clock.min() > day // 2:  # the clock starts anew at midnight
        clock = np.where(clock < day // 2, clock + day, clock)
    trigger = clock - since_trigger
    order = np.argsort(trigger, kind="stable")
    new = np.diff(trigger[order], prepend=trigger[order[0]]) >= gap
    beat = np.empty(len(clock), np.int64)
    beat[order] = np.cumsum(new)
    instants = trigger[order][np.concatenate(([0], np.flatnonzero(new)))]
    return beat, np.append(np.diff(instants).astype(np.float64), np.nan)


def _beats_by_fallback(since_trigger: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    step = np.diff(since_trigger)
    ends = np.flatnonzero(step < 0)
    beat = np.concatenate(([0], np.cumsum(step < 0)))
    typical = float(np.median(step[step >= 0])) if (step >= 0).any() else 0.0
    # what lies between the last readout of a beat and the first of the next is one step of the sequence
    intervals = since_trigger[ends] + typical - since_trigger[ends + 1]
    return beat, np.append(intervals.astype(np.float64), np.nan)


def _phases(
    beat: NDArray[np.int64], intervals: NDArray[np.float64], since_trigger: NDArray[np.int64], settings: AcquisitionSettings
) -> Gating:
    known = np.isfinite(intervals) & (intervals > 0)
    if not known.any():
        raise SortError(
            "the RR interval is unknown",
            where="gating",
            got="readouts of one heart beat",
            expected="at least two beats",
            remedy="Set cardiac_phases = 0 to use the phase counter",
        )
    median = float(np.median(intervals[known]))
    latest = np.zeros(len(intervals))
    np.maximum.at(latest, beat, since_trigger)
    tolerance = settings.arrhythmia_rejection / 100
    ceiling = (1 + (tolerance or PAUSE_WITHOUT_REJECTION)) * median
    # nothing was acquired at the end of such an interval, so the next known trigger need not be the next one
    silent = intervals - latest > SHORTEST_RR / settings.tick
    paused = ~known | ((intervals > ceiling) & (latest <= ceiling) & silent)
    rr = np.where(paused, median, intervals)
    rejected = np.zeros(len(rr), bool)
    if tolerance:
        rejected = (np.abs(rr - median) > tolerance * median) | (latest > ceiling)
    if rejected.all():
        raise SortError("every heart beat was rejected", where="gating", got=f"{len(rr)} beats", expected="regular beats")
    position = since_trigger / rr[beat]
    phase = np.minimum((position * settings.cardiac_phases).astype(np.int32), settings.cardiac_phases - 1)
    phase[rejected[beat]] = -1
    return Gating(phase, beat.astype(np.int32), rr * settings.tick, rejected, median * settings.tick)
