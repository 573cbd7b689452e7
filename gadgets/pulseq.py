"""A Pulseq ``.seq`` of a complete 3D multi-echo gradient-echo scan that plays a sampling mask, with its MRD header.

RF-spoiled, slab-selective, unipolar readouts; between two readouts the flyback on x and, with it, the phase-encoding blips
that move k1 and k2 to the next echo's position (LARO, Fig. 2b). Axes: x is the readout, y is k1, z is k2. Position ``i`` of
``n`` is ``(i - n // 2) / fov``; sample ``n // 2`` of the readout is k0 = 0, and its time after the pulse is the echo time.

Labels: LIN = k1, PAR = k2, ECO = echo, all from 0; NOISE marks the readouts before the first pulse, from which the noise between coils is
measured; TRID marks the repeated modules for interpreters that want them. The header is needed because converters take the matrix
from the protocol, which knows nothing of the sequence. Its encoding limits are those of the full grid: a mask need not reach the
edge. It names the mask, so that the server can compare what was sampled.
"""

from __future__ import annotations

import importlib
import math
import os
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from gadgets.pulseq_header import header_text
from gadgets.pulseq_settings import SequenceError, SequenceFacts, SequenceSettings
from recon_core.errors import SettingError
from recon_core.sampling.mask_files import SamplingMask
from recon_core.sampling.ordering import IntArray
from recon_core.simulation.signal import GYROMAGNETIC_RATIO

RASTER = 10e-6
"""s, of gradients and block durations."""

IMAGING_MODULE, DUMMY_MODULE, NOISE_MODULE = 1, 2, 3  # TRID
LONGEST_ENCODING = 3e-3
"""s; encoding gradients are stretched to the time there is, up to this: slow ramps are quiet."""


@dataclass(frozen=True)
class _Pulse:
    rf: Any
    slab: Any
    duration: float  # s, of the block
    after_centre: float  # s, from the centre of the pulse to the end of the block
    refocus: float  # 1/m: undoes what the slab's gradient adds after the centre of the pulse


@dataclass(frozen=True)
class _Readout:
    gradient: Any
    adc: Any
    duration: float  # s, of the block
    to_centre: float  # s, from the start of the block to k0 = 0
    area_to_centre: float  # 1/m, until then


@dataclass
class _Events:
    """Gradients of one repetition; those that scale carry the largest area that occurs."""

    pulse: list[Any]
    readout: Any
    adc: Any
    x_before: Any
    x_between: list[Any]
    x_after: Any
    y: list[Any]  # before the first echo, between echoes, after the last
    z: list[Any]
    slab_refocus: float  # 1/m
    durations: list[float]  # of the encoding blocks, s
    trailing: float
    echo_times: tuple[float, ...]


def write_sequence(
    path: str | Path,
    mask: SamplingMask,
    settings: SequenceSettings,
    *,
    mask_name: str | None = None,
    pulseq_1_4: bool = False,
) -> SequenceFacts:
    """Write ``path`` (``.seq``) and beside it ``<stem>.mrd.xml``, the MRD header of the scan.

    Parameters
    ----------
    mask_name
        Under which the header names the mask (the name of its file on the server); ``None``: the sequence's own file name.
    pulseq_1_4
        Write version 1.4.1 of the file format, for interpreters that do not read 1.5.

    Raises
    ------
    SequenceError
        pypulseq is missing, the gradients do not fit into the times, or pypulseq's own timing check fails.
    SettingError
        A mask without order, or with another number of echoes than echo times.
    """
    path = Path(path)
    sequence, facts = make_sequence(mask, settings)
    fine, report = sequence.check_timing()
    if not fine:
        raise SequenceError("the timing check fails", where=path.name, got=f"{len(report)} errors, first: {report[0]}")
    # both files whole, or neither: a header of another sequence would be believed
    parts = path.with_name(f".{path.stem}.part.seq"), path.with_name(f".{path.stem}.part.mrd.xml")
    try:
        sequence.write(str(parts[0]), check_timing=False, v141_compat=pulseq_1_4)
        parts[1].write_text(header_text(mask, settings, facts, mask_name or path.stem), encoding="utf-8")
        os.replace(parts[0], path)
        os.replace(parts[1], path.with_suffix(".mrd.xml"))
    finally:
        for part in parts:
            part.unlink(missing_ok=True)
    return facts


def make_sequence(mask: SamplingMask, settings: SequenceSettings) -> tuple[Any, SequenceFacts]:
    """The ``pypulseq.Sequence`` and its facts; see :func:`write_sequence`."""
    if mask.order is None:
        raise SettingError("the mask has no order", where="sequence", remedy="make one with: recon mask order")
    if len(mask.mask) != len(settings.echo_times):
        raise SettingError(
            "one echo time per echo", where="sequence.echo_times", got=len(settings.echo_times), expected=len(mask.mask)
        )
    pp = _pypulseq()
    system = pp.Opts(
        max_grad=settings.max_grad_mt_m,
        grad_unit="mT/m",
        max_slew=settings.max_slew_t_m_s,
        slew_unit="T/m/s",
        rf_ringdown_time=30e-6,
        rf_dead_time=100e-6,
        adc_dead_time=10e-6,
        adc_samples_divisor=4,
        B0=settings.field_strength,
    )
    k = _spatial_frequencies(mask.order, mask.mask.shape, settings.fov)
    try:
        events = _events(pp, system, k, settings)
    except (ValueError, AssertionError) as error:
        raise SequenceError(
            "the gradients do not fit",
            where="sequence",
            got=str(error),
            remedy="allow longer echo times, a longer dwell time or a larger field of view, or order with a smaller max_jump",
        ) from None
    sequence = pp.Sequence(system=system)
    _play(pp, sequence, mask.order, k, events, settings)
    repetition_time = _repetition_time(events, pp)
    for key, value in _definitions(mask, settings, events.echo_times, repetition_time).items():
        sequence.set_definition(key, value)
    noise_time = settings.noise_readouts * float(pp.calc_duration(events.readout, events.adc))
    return sequence, SequenceFacts(
        echo_times=events.echo_times,
        repetition_time=repetition_time,
        n_readouts=len(mask.order) * len(mask.mask),
        duration=noise_time + (len(mask.order) + settings.dummies) * repetition_time,
        **dict(zip(("max_grad", "max_slew"), _reached(k, events), strict=True)),
    )


def _pypulseq() -> ModuleType:
    try:
        return importlib.import_module("pypulseq")  # an extra: only who writes sequences needs it
    except ImportError:
        raise SequenceError(
            "pypulseq is not installed", where="sequence", remedy="pip install 'recon-gadgets[sequence]'"
        ) from None


def _spatial_frequencies(order: IntArray, shape: tuple[int, ...], fov: tuple[float, float, float]) -> np.ndarray:
    """``(z, y)`` in 1/m at every readout: float64 ``(shot, echo, 2)``."""
    centre = np.array([shape[1] // 2, shape[2] // 2])
    return np.asarray((order - centre) / np.array(fov[:2]), np.float64)


def _on_raster(seconds: float) -> float:
    # what floating point adds decides nothing: equal spacings of half a step more stay equal
    return round(round(seconds / RASTER, 6)) * RASTER


def _up_to_raster(seconds: float) -> float:
    return math.ceil(seconds / RASTER - 1e-6) * RASTER


def _require_strength(amplitude: float, s: SequenceSettings, what: str, remedy: str) -> None:
    """Of a gradient that has to have this amplitude (Hz/m), however long it takes."""
    needed = amplitude / GYROMAGNETIC_RATIO * 1e3
    if needed > s.max_grad_mt_m:
        raise SequenceError(
            f"the {what} gradient is too strong",
            where="sequence",
            got=f"{needed:.1f} mT/m",
            expected=f"at most {s.max_grad_mt_m:g} mT/m",
            remedy=remedy,
        )


def _excitation(pp: ModuleType, system: Any, s: SequenceSettings) -> _Pulse:
    bandwidth = s.rf_time_bandwidth / s.rf_duration
    _require_strength(bandwidth / (s.slab_thickness or s.fov[0]), s, "slab", "excite a thicker slab")
    rf, slab, _ = pp.make_sinc_pulse(
        flip_angle=s.flip_angle,
        duration=s.rf_duration,
        slice_thickness=s.slab_thickness or s.fov[0],
        time_bw_product=s.rf_time_bandwidth,
        apodization=0.5,
        return_gz=True,
        delay=system.rf_dead_time,
        use="excitation",
        system=system,
    )
    centre = rf.delay + pp.calc_rf_center(rf)[0]
    duration = _up_to_raster(pp.calc_duration(rf, slab))
    ramp_down = slab.delay + slab.rise_time + slab.flat_time
    refocus = -slab.amplitude * (ramp_down - centre + 0.5 * slab.fall_time)
    return _Pulse(rf, slab, duration, duration - centre, refocus)


def _readout(pp: ModuleType, system: Any, s: SequenceSettings) -> _Readout:
    n = s.n_adc
    flat = _up_to_raster(n * s.dwell)
    amplitude = 1.0 / (s.fov[2] * s.oversampling * s.dwell)
    _require_strength(amplitude, s, "readout", "allow a longer dwell time or a larger field of view along the readout")
    gradient = pp.make_trapezoid("x", amplitude=amplitude, flat_time=flat, system=system)
    adc = pp.make_adc(n, dwell=s.dwell, delay=gradient.rise_time, system=system)
    duration = _up_to_raster(max(pp.calc_duration(gradient), gradient.rise_time + n * s.dwell + system.adc_dead_time))
    # pypulseq and MRD place sample i in the middle of its dwell time
    to_centre = gradient.rise_time + (n // 2 + 0.5) * s.dwell
    area_to_centre = gradient.amplitude * (0.5 * gradient.rise_time + (n // 2 + 0.5) * s.dwell)
    return _Readout(gradient, adc, duration, to_centre, area_to_centre)


def _largest_moves(k: np.ndarray, refocus: float) -> tuple[list[float], list[float]]:
    """Largest areas along y and z, 1/m, before the first echo, between echoes and after the last."""
    moves = np.abs(np.diff(k, axis=1, prepend=0.0)).max(axis=0)
    moves[0, 0] += abs(refocus)
    z, y = np.concatenate([moves, np.abs(k[:, -1]).max(axis=0)[None]]).T.tolist()
    return y, z


def _events(pp: ModuleType, system: Any, k: np.ndarray, s: SequenceSettings) -> _Events:
    pulse, readout = _excitation(pp, system, s), _readout(pp, system, s)
    before = _on_raster(s.echo_times[0] - pulse.after_centre - readout.to_centre)
    first = pulse.after_centre + before + readout.to_centre
    gaps = [_on_raster(b - a - readout.duration) for a, b in pairwise(s.echo_times)]
    durations = [before, *gaps]
    echo_times = tuple(float(t) for t in first + np.concatenate([[0.0], np.cumsum(np.array(gaps) + readout.duration)]))

    whole = readout.gradient.area
    spoiler = s.spoiling_cycles * s.matrix_x / s.fov[2] - (whole - readout.area_to_centre)
    areas_x = [-readout.area_to_centre, *[-whole] * len(gaps), spoiler]
    areas_y, areas_z = _largest_moves(k, pulse.refocus)
    rest = _rest(s, pulse.duration, durations, readout.duration)
    times = [*durations, min(rest, LONGEST_ENCODING)]
    x, y, z = (
        [_lobe(pp, system, axis, area, time, i) for i, (area, time) in enumerate(zip(areas, times, strict=True))]
        for axis, areas in (("x", areas_x), ("y", areas_y), ("z", areas_z))
    )
    return _Events(
        [pulse.rf, pulse.slab, pp.make_delay(pulse.duration)],
        readout.gradient,
        readout.adc,
        x[0],
        x[1:-1],
        x[-1],
        y,
        z,
        pulse.refocus,
        durations,
        rest,
        echo_times,
    )


def _rest(s: SequenceSettings, pulse_time: float, durations: list[float], readout_time: float) -> float:
    """Time from the end of the last readout to the next pulse."""
    used = pulse_time + sum(durations) + len(durations) * readout_time
    rest = _on_raster(s.repetition_time - used)
    if rest <= 0:
        raise SequenceError(
            "the echoes do not fit into TR",
            where="sequence.repetition_time",
            got=f"{s.repetition_time * 1e3:g} ms",
            expected=f"more than {used * 1e3:.2f} ms",
        )
    return rest


def _lobe(pp: ModuleType, system: Any, axis: str, area: float, time: float, number: int) -> Any:
    """A trapezoid of ``area`` (1/m) within ``time``; an area of 0 gets a unit shape, to be scaled to nothing."""
    shortest = pp.calc_duration(pp.make_trapezoid(axis, area=area or 1.0, system=system))
    if time < shortest - 1e-9:
        places = {0: "before the first echo"}
        raise SequenceError(
            f"no time for the encoding {places.get(number, f'after echo {number - 1}')}",
            where=f"sequence, gradient {axis}",
            got=f"{time * 1e3:.2f} ms",
            expected=f"{shortest * 1e3:.2f} ms or more",
            remedy="allow longer echo times or TR, a shorter dwell time, or masks with smaller jumps between echoes",
        )
    return pp.make_trapezoid(axis, area=area or 1.0, duration=min(time, LONGEST_ENCODING), system=system)


def _play(pp: ModuleType, sequence: Any, order: IntArray, k: np.ndarray, events: _Events, s: SequenceSettings) -> None:
    """Add every block: dummies, then the shots."""
    phase = increment = 0.0
    rf, *rest_of_pulse = events.pulse
    delays = [pp.make_delay(t) for t in (*events.durations, events.trailing)]
    n_echoes = order.shape[1]
    _play_noise(pp, sequence, events, s.noise_readouts)
    for shot in range(-s.dummies, len(order)):
        imaging = shot >= 0
        rf.phase_offset = events.adc.phase_offset = phase
        module = [pp.make_label("TRID", "SET", IMAGING_MODULE if imaging else DUMMY_MODULE)]
        if s.noise_readouts and shot == -s.dummies:
            module.append(pp.make_label("NOISE", "SET", 0))
        sequence.add_block(rf, *rest_of_pulse, *module)
        # dummies play the first shot's gradients, so that the steady state is that of the scan
        places, labels = k[max(shot, 0)], order[max(shot, 0)]
        here = np.zeros(2)
        for echo in range(n_echoes):
            move = places[echo] - here
            if echo == 0:
                move = move + np.array([events.slab_refocus, 0.0])
            along_x = events.x_before if echo == 0 else events.x_between[echo - 1]
            sequence.add_block(along_x, *_scaled(pp, events, echo, move), delays[echo])
            here = places[echo]
            if imaging:
                k2, k1 = (int(v) for v in labels[echo])
                counters = (("LIN", k1), ("PAR", k2), ("ECO", echo))
                sequence.add_block(events.readout, events.adc, *(pp.make_label(name, "SET", v) for name, v in counters))
            else:
                sequence.add_block(events.readout)
        sequence.add_block(events.x_after, *_scaled(pp, events, n_echoes, -here), delays[-1])
        increment = (increment + s.rf_spoiling_increment) % (2 * math.pi)
        phase = (phase + increment) % (2 * math.pi)


def _play_noise(pp: ModuleType, sequence: Any, events: _Events, n: int) -> None:
    """Readouts as long as the imaging ones, before anything is excited."""
    whole = pp.make_delay(pp.calc_duration(events.readout, events.adc))
    for number in range(n):
        first = [pp.make_label("TRID", "SET", NOISE_MODULE), pp.make_label("NOISE", "SET", 1)] if number == 0 else []
        sequence.add_block(events.adc, whole, *first)


def _reached(k: np.ndarray, events: _Events) -> tuple[float, float]:
    """Largest gradient (mT/m) and slew rate (T/m/s) of the three axes together, over all shots and encoding blocks."""
    moves = np.diff(k, axis=1, prepend=0.0, append=0.0)
    moves[:, 0, 0] += events.slab_refocus
    largest = np.array([abs(events.readout.amplitude), abs(events.readout.amplitude / events.readout.rise_time)])
    for number, x in enumerate([events.x_before, *events.x_between, events.x_after]):
        total = np.zeros((2, len(k)))
        for lobe, area in (
            (x, np.full(len(k), x.area)),
            (events.y[number], moves[:, number, 1]),
            (events.z[number], moves[:, number, 0]),
        ):
            amplitude = np.abs(area / lobe.area * lobe.amplitude)
            total += np.stack([amplitude, amplitude / min(lobe.rise_time, lobe.fall_time)]) ** 2
        largest = np.maximum(largest, np.sqrt(total).max(axis=1))
    slab = events.pulse[1]
    largest = np.maximum(largest, [abs(slab.amplitude), abs(slab.amplitude / slab.rise_time)])
    return float(largest[0] / GYROMAGNETIC_RATIO * 1e3), float(largest[1] / GYROMAGNETIC_RATIO)


def _scaled(pp: ModuleType, events: _Events, number: int, move: np.ndarray) -> list[Any]:
    """Both phase-encoding gradients; always the same shapes, which differ in amplitude alone."""
    return [
        pp.scale_grad(shape[number], float(area / shape[number].area))
        for shape, area in ((events.y, move[1]), (events.z, move[0]))
    ]


def _repetition_time(events: _Events, pp: ModuleType) -> float:
    readouts = len(events.durations) * pp.calc_duration(events.readout, events.adc)
    return float(pp.calc_duration(*events.pulse) + sum(events.durations) + readouts + events.trailing)


def _definitions(
    mask: SamplingMask, s: SequenceSettings, echo_times: tuple[float, ...], repetition_time: float
) -> dict[str, Any]:
    _, n_k2, n_k1 = mask.mask.shape
    return {
        "Name": s.name,
        "FOV": list(s.fov[::-1]),
        "Matrix": [s.matrix_x, n_k1, n_k2],
        "TE": list(echo_times),
        "TR": repetition_time,
        "FlipAngle": math.degrees(s.flip_angle),
        "ReadoutOversamplingFactor": s.oversampling,
        "kSpaceCenterLine": n_k1 // 2,
        "kSpaceCenterPartition": n_k2 // 2,
        "kSpaceCenterSample": s.n_adc // 2,
        "SliceThickness": s.slab_thickness or s.fov[0],
    }
