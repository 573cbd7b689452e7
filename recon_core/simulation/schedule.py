"""In which order a simulated sequence acquires its readouts, and when: counters and clock times, one row per readout.

Times are s since the start of the scan. Cardiac sequences wait for R-waves; ``since_trigger`` is the time since the
last one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon_core.errors import SettingError

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]

IMAGING, CALIBRATION_AND_IMAGING, CALIBRATION = 0, 1, 2
"""Values of ``Schedule.calibration``."""


@dataclass(frozen=True)
class Schedule:
    """One entry per readout, in the order of acquisition.

    Attributes
    ----------
    k1, k2, slice, state, average, repetition, segment
        Counters; k1 and k2 count the full grid (DC at ``n // 2``). For retro-gated scans ``state`` is the raw phase
        number of its heartbeat.
    calibration
        ``IMAGING``, ``CALIBRATION_AND_IMAGING`` or ``CALIBRATION`` (not part of the image).
    time, since_trigger
        s.
    cardiac_phase
        0 to 1 between two R-waves; where the heart really is.
    r_waves
        s, times of all R-waves of the scan (not one per readout).
    """

    k1: IntArray
    k2: IntArray
    slice: IntArray
    state: IntArray
    average: IntArray
    repetition: IntArray
    segment: IntArray
    calibration: IntArray
    time: NDArray[np.float64]
    since_trigger: NDArray[np.float64]
    cardiac_phase: NDArray[np.float64]
    r_waves: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.k1)


class _Builder:
    """Collects blocks of readouts; scalars are broadcast over a block."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, NDArray[Any]]] = []

    def add(self, **columns: object) -> None:
        arrays = np.broadcast_arrays(*[np.asarray(c) for c in columns.values()])
        self.blocks.append({name: array.ravel() for name, array in zip(columns, arrays, strict=True)})

    def build(self, r_waves: NDArray[np.float64]) -> Schedule:
        names = [f.name for f in fields(Schedule) if f.name != "r_waves"]
        table = {name: np.concatenate([block[name] for block in self.blocks]) for name in names}
        last = np.searchsorted(r_waves, table["time"], side="right") - 1
        beats = np.append(r_waves, r_waves[-1] + np.diff(r_waves)[-1])
        table["since_trigger"] = table["time"] - r_waves[last]
        table["cardiac_phase"] = table["since_trigger"] / np.diff(beats)[last]
        return Schedule(**{name: _typed(name, table[name]) for name in names}, r_waves=r_waves)


def _typed(name: str, column: NDArray[Any]) -> NDArray[Any]:
    return column.astype(np.float64 if name in ("time", "since_trigger", "cardiac_phase") else np.int64)


def interleaved(n_slices: int) -> list[int]:
    """Slices in the usual order that avoids crosstalk: 0, 2, 4, ..., 1, 3, 5, ..."""
    return [*range(0, n_slices, 2), *range(1, n_slices, 2)]


@dataclass(frozen=True)
class Order:
    """What all sequences share.

    Attributes
    ----------
    mask
        bool ``(state, k2, k1)``: what is acquired for the image.
    acs_mask
        bool ``(k2, k1)``: calibration positions.
    separate
        Calibration lines are acquired before the image and are not part of it.
    calibration_state
        State whose contrast such lines have.
    n_slices, n_averages, n_repetitions, n_segments
        ``n_segments`` 0 lets the sequence choose.
    repetition_time, rr
        s, between two readouts of a train, and between two R-waves.
    """

    mask: BoolArray
    acs_mask: BoolArray
    separate: bool
    calibration_state: int
    n_slices: int
    n_averages: int
    n_repetitions: int
    n_segments: int
    repetition_time: float
    rr: float

    def kind_of(self, k2: IntArray, k1: IntArray) -> IntArray:
        """Calibration marks of imaging lines."""
        embedded = self.acs_mask[k2, k1] & (not self.separate)
        return np.where(embedded, CALIBRATION_AND_IMAGING, IMAGING)

    def calibrate(self, builder: _Builder, clock: float, **counters: int) -> float:
        """Separate calibration lines, one train; returns the time after it."""
        if not self.separate:
            return clock
        k2, k1 = np.nonzero(self.acs_mask)
        time = clock + self.repetition_time * np.arange(len(k1))
        builder.add(
            k1=k1,
            k2=k2,
            time=time,
            state=self.calibration_state,
            calibration=CALIBRATION,
            **_base(**counters),
        )
        return clock + self.repetition_time * (len(k1) + 1)


def _base(**counters: int) -> dict[str, int | float]:
    return {"average": 0, "segment": 0, "since_trigger": 0.0, "cardiac_phase": 0.0, **counters}


def _steady_beats(rr: float, until: float) -> NDArray[np.float64]:
    return np.arange(int(np.ceil(until / rr)) + 2, dtype=np.float64) * rr


def gated_cine(order: Order) -> Schedule:
    """Prospectively gated segmented cine: every heartbeat acquires one segment of lines for all phases.

    Raises
    ------
    SettingError
        So few segments that a segment's lines do not fit into a phase.
    """
    n_states = len(order.mask)
    window = order.rr / n_states
    per_segment = int(window / order.repetition_time + 1e-9)
    most = int(order.mask.sum(axis=(1, 2)).max())
    if per_segment < 1:
        raise SettingError("phases are shorter than TR", where="schedule", got=f"{window:.4f} s", remedy="fewer phases")
    n_segments = order.n_segments or -(-most // per_segment)
    if -(-most // n_segments) > per_segment:
        raise SettingError(
            "a segment does not fit into a cardiac phase",
            where="schedule.segments",
            got=f"{n_segments} segments of {-(-most // n_segments)} lines",
            expected=f"at least {-(-most // per_segment)} segments",
        )
    builder, beat = _Builder(), 0
    for repetition in range(order.n_repetitions):
        for slice_ in interleaved(order.n_slices):
            start = beat * order.rr
            beat += int(np.ceil((order.calibrate(builder, start, slice=slice_, repetition=repetition) - start) / order.rr))
            for average in range(order.n_averages):
                for segment in range(n_segments):
                    for state in range(n_states):
                        k2, k1 = (a[segment::n_segments] for a in np.nonzero(order.mask[state]))
                        if not len(k1):
                            continue
                        time = beat * order.rr + state * window + order.repetition_time * np.arange(len(k1))
                        base = _base(slice=slice_, repetition=repetition, state=state) | {
                            "average": average,
                            "segment": segment,
                        }
                        builder.add(k1=k1, k2=k2, time=time, calibration=order.kind_of(k2, k1), **base)
                    beat += 1
    return builder.build(_steady_beats(order.rr, beat * order.rr))


def retro_gated_cine(
    order: Order, lines_per_segment: int, rng: np.random.Generator, *, arrhythmia: bool = False
) -> Schedule:
    """Retrospectively gated cine: a segment's lines are repeated until the next R-wave, so raw phases vary from beat
    to beat.

    The mask of state 0 is used throughout. Heartbeats vary by 4 %; with ``arrhythmia`` every seventh is premature.
    """
    k2_all, k1_all = np.nonzero(order.mask[0])
    n_segments = -(-len(k1_all) // lines_per_segment)
    builder, r_waves = _Builder(), [0.0]

    def next_beat() -> tuple[float, float]:
        rr = order.rr * float(np.clip(rng.normal(1.0, 0.04), 0.88, 1.12))
        if arrhythmia and len(r_waves) % 7 == 0:
            rr = 0.6 * order.rr
        r_waves.append(r_waves[-1] + rr)
        return r_waves[-2], rr

    for repetition in range(order.n_repetitions):
        for slice_ in interleaved(order.n_slices):
            if order.separate:
                clock = r_waves[-1]
                done = order.calibrate(builder, clock, slice=slice_, repetition=repetition)
                while r_waves[-1] < done:
                    next_beat()
            for average in range(order.n_averages):
                for segment in range(n_segments):
                    start, rr = next_beat()
                    k1, k2 = k1_all[segment::n_segments], k2_all[segment::n_segments]
                    train = order.repetition_time * lines_per_segment
                    for phase in range(int(rr / train)):
                        time = start + phase * train + order.repetition_time * np.arange(len(k1))
                        base = _base(slice=slice_, repetition=repetition, state=phase) | {
                            "average": average,
                            "segment": segment,
                        }
                        builder.add(k1=k1, k2=k2, time=time, calibration=order.kind_of(k2, k1), **base)
    next_beat()
    return builder.build(np.array(r_waves))


def single_shots(order: Order, scheme: tuple[int, ...], pause: int, delay: float) -> Schedule:
    """MOLLI: one whole image per heartbeat, ``delay`` s after its R-wave; ``pause`` beats between inversions.

    An image may last into the next heartbeat, up to where the next image begins.

    Raises
    ------
    SettingError
        The scheme and the number of states differ, or an image lasts longer than a heartbeat: inversion times count those.
    """
    if sum(scheme) != len(order.mask):
        raise SettingError("scheme and states differ", where="schedule", got=sum(scheme), expected=len(order.mask))
    longest = order.repetition_time * int(order.mask.sum(axis=(1, 2)).max())
    if longest > order.rr + 1e-9:
        raise SettingError(
            "an image lasts longer than a heartbeat",
            where="simulate.molli",
            got=f"{longest:.3f} s",
            expected=f"at most {order.rr:g} s",
            remedy="Set acceleration with a mask, repetition_time, matrix_y or rr",
        )
    builder, beat = _Builder(), 0
    for repetition in range(order.n_repetitions):
        for slice_ in interleaved(order.n_slices):
            start = beat * order.rr
            beat += int(np.ceil((order.calibrate(builder, start, slice=slice_, repetition=repetition) - start) / order.rr))
            for average in range(order.n_averages):
                state = 0
                for count in scheme:
                    for _ in range(count):
                        k2, k1 = np.nonzero(order.mask[state])
                        time = beat * order.rr + delay + order.repetition_time * np.arange(len(k1))
                        base = _base(slice=slice_, repetition=repetition, state=state) | {"average": average}
                        builder.add(k1=k1, k2=k2, time=time, calibration=order.kind_of(k2, k1), **base)
                        beat += 1
                        state += 1
                    beat += pause
    return builder.build(_steady_beats(order.rr, beat * order.rr))


def prepared_shots(order: Order, delays: tuple[float, ...]) -> Schedule:
    """Saturation recovery: per delay some shots, each a saturation, the delay and a train of lines from the centre
    outwards."""
    n_segments = order.n_segments or max(1, -(-int(order.mask.sum(axis=(1, 2)).max()) // 24))
    builder, clock = _Builder(), 0.0
    centre = np.array(order.mask.shape[1:]) // 2
    for repetition in range(order.n_repetitions):
        for slice_ in interleaved(order.n_slices):
            clock = order.calibrate(builder, clock, slice=slice_, repetition=repetition)
            for average in range(order.n_averages):
                for state, delay in enumerate(delays):
                    k2, k1 = np.nonzero(order.mask[state])
                    inside_out = np.argsort(np.hypot(k2 - centre[0], k1 - centre[1]), kind="stable")
                    for segment in range(n_segments):
                        shot = inside_out[segment::n_segments]
                        time = clock + delay + order.repetition_time * np.arange(len(shot))
                        base = _base(slice=slice_, repetition=repetition, state=state) | {
                            "average": average,
                            "segment": segment,
                        }
                        builder.add(
                            k1=k1[shot], k2=k2[shot], time=time, calibration=order.kind_of(k2[shot], k1[shot]), **base
                        )
                        clock += delay + order.repetition_time * (len(shot) + 1)
    return builder.build(_steady_beats(order.rr, clock))


def echo_trains(order: Order, echo_times: tuple[float, ...]) -> Schedule:
    """Multi-echo: every excitation reads all echoes, each at the next position of its own mask (phase blips between
    echoes)."""
    positions = [np.nonzero(mask) for mask in order.mask]
    n_excitations = max(len(k1) for _, k1 in positions)
    n_segments = max(1, order.n_segments)
    per_segment = -(-n_excitations // n_segments)
    builder, clock = _Builder(), 0.0
    for repetition in range(order.n_repetitions):
        for slice_ in interleaved(order.n_slices):
            clock = order.calibrate(builder, clock, slice=slice_, repetition=repetition)
            for average in range(order.n_averages):
                k1 = np.full((n_excitations, len(positions)), -1)
                k2 = np.full((n_excitations, len(positions)), -1)
                for echo, (p2, p1) in enumerate(positions):
                    k1[: len(p1), echo], k2[: len(p2), echo] = p1, p2
                excitation, echo_index = np.indices(k1.shape)
                time = clock + excitation * order.repetition_time + np.asarray(echo_times)[echo_index]
                used = k1 >= 0
                builder.add(
                    k1=k1[used],
                    k2=k2[used],
                    time=time[used],
                    state=echo_index[used],
                    segment=excitation[used] // per_segment,
                    calibration=order.kind_of(k2[used], k1[used]),
                    average=average,
                    slice=slice_,
                    repetition=repetition,
                    since_trigger=0.0,
                    cardiac_phase=0.0,
                )
                clock += order.repetition_time * n_excitations
    return builder.build(_steady_beats(order.rr, clock + order.repetition_time))
