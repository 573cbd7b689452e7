"""Settings of a simulated scan, and what each kind of scan chooses by default. SI units; angles in degrees, as
consoles show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from recon_core.errors import SettingError
from recon_core.settings import parse_settings, setting
from recon_core.simulation.signal import molli_inversion_times

KINDS = ("cine", "molli", "satrec", "mgre")

PHANTOMS = ("auto", "tubes")

LONGEST_DELAY = 100.0  # s; everything has recovered long before: what is longer is in ms

MASKS = ("full", "uniform", "random", "golden", "vista", "poisson")


@dataclass(frozen=True)
class ScanSettings:
    """Everything that shapes a simulated scan. A kind ignores the fields of other kinds (`USED_BY`); `settings_for` refuses them."""

    seed: int = setting(0, "anatomy, coils, masks and noise; the same seed gives the same file", low=0, high=2**31)
    phantom: str = setting("auto", "auto: the kind's own anatomy; tubes: nine tubes of known T1 (satrec)", choices=PHANTOMS)
    # what is encoded
    matrix_x: int = setting(192, "readout matrix after oversampling is removed", low=16, high=1024)
    matrix_y: int = setting(192, "phase-encoding (k1) matrix", low=16, high=1024)
    partitions: int = setting(1, "k2 matrix; above 1 the scan is three-dimensional", low=1, high=256)
    fov_x: float = setting(0.34, "field of view along the readout, without oversampling", unit="m", low=0.05, high=1.0)
    fov_y: float = setting(0.34, "field of view along k1", unit="m", low=0.05, high=1.0)
    slices: int = setting(1, "slices of a 2D scan, acquired interleaved", low=1, high=64)
    slice_thickness: float = setting(0.008, "thickness of a slice or partition", unit="m", low=0.0005, high=0.05)
    slice_gap: float = setting(0.002, "gap between slices", unit="m", low=0.0, high=0.1)
    states: int = setting(12, "cardiac phases (cine) or echoes (mgre)", low=1, high=256)
    oversampling: int = setting(2, "readout oversampling", low=1, high=4)
    # coils and noise
    coils: int = setting(8, "receive coils", low=1, high=128)
    donor: str = setting(
        "", "an .npz with measured coil images or radial k-space whose coil maps are used instead of wire loops"
    )
    snr: float = setting(40.0, "mean tissue signal over noise of a fully sampled image; 0 is noise-free", low=0.0, high=1e6)
    noise_readouts: int = setting(64, "readouts of the noise scan at the beginning; 0 leaves it out", low=0, high=4096)
    # what is sampled
    mask: str = setting("full", "sampling pattern", choices=MASKS)
    acceleration: float = setting(
        1.0,
        "positions that the sequence reaches over acquired ones, embedded calibration included (uniform: on top)",
        low=1.0,
        high=64.0,
    )
    interleaved: bool = setting(False, "shift the uniform pattern from state to state")
    elliptical: bool = setting(False, "leave out the corners of (k2, k1)")
    calibration: str = setting(
        "embedded", "calibration lines in the image, separately before it, or none", choices=("embedded", "separate", "none")
    )
    acs: int = setting(16, "calibration lines along k1", low=0, high=256)
    acs_partitions: int = setting(12, "calibration lines along k2 (3D)", low=0, high=256)
    partial_fourier: float = setting(1.0, "share of k1 that is acquired", low=0.5, high=1.0)
    asymmetric_echo: float = setting(1.0, "share of the readout that is acquired", low=0.55, high=1.0)
    averages: int = setting(1, "averages", low=1, high=64)
    repetitions: int = setting(1, "repetitions of the whole scan", low=1, high=256)
    segments: int = setting(0, "segments; 0 chooses", low=0, high=1024)
    # sequence
    field_strength: float = setting(1.5, "B0", unit="T", low=0.05, high=11.7)
    repetition_time: float = setting(
        0.0036, "time between readouts of a train, or between excitations", unit="s", low=1e-4, high=10.0
    )
    echo_time: float = setting(0.0018, "echo time; the first one of several", unit="s", low=0.0, high=1.0)
    echo_spacing: float = setting(0.003384, "distance of echoes (mgre)", unit="s", low=1e-4, high=0.1)
    flip_angle: float = setting(50.0, "flip angle", unit="deg", low=0.1, high=180.0)
    scheme: str = setting("5,3", "images per inversion (molli)")
    pause_beats: int = setting(3, "heartbeats between inversions (molli)", low=0, high=20)
    b_over_a: float = setting(1.9, "B/A of the Look-Locker recovery (molli)", low=1.01, high=2.0)
    delays: str = setting("0.5,1,1.5,2,8", "saturation delays (satrec), s, separated by commas")
    saturation_left: float = setting(
        0.0, "part of M0 that the saturation leaves (satrec); -1: an inversion", low=-1.0, high=0.9
    )
    saturation_slope: float = setting(
        0.0,
        "by how much more of M0 it leaves at the last edge of k1's field of view than in the middle (satrec)",
        low=-0.9,
        high=0.9,
    )
    pulses_before_centre: int = setting(
        0,
        "readout pulses between the delay and the centre of k-space (satrec), of flip_angle and repetition_time",
        low=0,
        high=1000,
    )
    rr: float = setting(0.9, "time between heartbeats", unit="s", low=0.3, high=3.0)
    retro_gated: bool = setting(False, "cine: raw phases vary from beat to beat and have to be re-binned")
    arrhythmia: bool = setting(False, "every seventh beat of a retro-gated cine is premature")
    lines_per_segment: int = setting(8, "lines per raw phase (retro-gated)", low=1, high=64)
    bipolar: bool = setting(False, "odd echoes are read backwards (mgre)")
    readout_bandwidth: float = setting(900.0, "bandwidth per pixel", unit="Hz", low=20.0, high=5000.0)
    # what comes along
    waveforms: bool = setting(True, "write an electrocardiogram")
    orientation: str = setting("axial", "image plane", choices=("axial", "sagittal", "coronal", "oblique"))
    offset_read: float = setting(0.0, "centre of the volume along the readout direction", unit="m", low=-0.5, high=0.5)
    offset_phase: float = setting(0.0, "along the phase direction", unit="m", low=-0.5, high=0.5)
    offset_slice: float = setting(0.0, "along the slice direction", unit="m", low=-0.5, high=0.5)
    state_counter: str = setting(
        "auto", "counter that holds the state", choices=("auto", "phase", "set", "contrast", "repetition")
    )

    @property
    def is_3d(self) -> bool:
        return self.partitions > 1

    def integer_acceleration(self) -> int:
        """The acceleration of a uniform mask."""
        if self.acceleration != int(self.acceleration):
            raise SettingError(
                "not an integer", where="simulate.acceleration", got=self.acceleration, expected="1, 2, 3, ... for uniform"
            )
        return int(self.acceleration)


DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cine": {},
    "molli": {
        "matrix_x": 160,
        "matrix_y": 160,
        "repetition_time": 0.0027,
        "echo_time": 0.0011,
        "flip_angle": 35.0,
        "rr": 1.0,
    },
    "satrec": {
        "fov_x": 0.23,
        "fov_y": 0.23,
        "field_strength": 3.0,
        "repetition_time": 0.006,
        "echo_time": 0.003,
        "flip_angle": 6.0,
        "readout_bandwidth": 300.0,
        "acs": 8,
        "waveforms": False,
    },
    "mgre": {
        "matrix_x": 96,
        "matrix_y": 96,
        "partitions": 24,
        "fov_x": 0.23,
        "fov_y": 0.23,
        "slice_thickness": 0.003,
        "states": 6,
        "field_strength": 3.0,
        "repetition_time": 0.035,
        "echo_time": 0.001972,
        "flip_angle": 15.0,
        "readout_bandwidth": 500.0,
        "waveforms": False,
    },
}

USED_BY: Mapping[str, tuple[str, ...]] = {
    "partitions": ("mgre",),
    "acs_partitions": ("mgre",),
    "elliptical": ("mgre",),
    "states": ("cine", "mgre"),
    "segments": ("cine", "satrec", "mgre"),
    "echo_spacing": ("mgre",),
    "bipolar": ("mgre",),
    "scheme": ("molli",),
    "pause_beats": ("molli",),
    "b_over_a": ("molli",),
    "phantom": ("satrec",),
    "delays": ("satrec",),
    "saturation_left": ("satrec",),
    "saturation_slope": ("satrec",),
    "pulses_before_centre": ("satrec",),
    "retro_gated": ("cine",),
    "arrhythmia": ("cine",),
    "lines_per_segment": ("cine",),
}
"""The kinds that a setting says something to; one that is not here, to all."""

STATE_COUNTERS = {"cine": "phase", "molli": "set", "satrec": "set", "mgre": "contrast"}


def settings_for(kind: str, values: Mapping[str, Any] | None = None) -> ScanSettings:
    """Defaults of ``kind`` with ``values`` (typed or text) on top; what contradicts itself, or would do nothing, is refused.

    Raises
    ------
    SettingError
        An unknown kind or setting, a value out of range, a contradiction, or a value of another kind of scan.
    """
    if kind not in KINDS:
        raise SettingError("unknown kind of scan", where="simulate", got=kind, expected=", ".join(KINDS))
    s = parse_settings(ScanSettings, {**DEFAULTS[kind], **(values or {})}, where=f"simulate.{kind}")
    check(kind, s)
    without = parse_settings(ScanSettings, DEFAULTS[kind])
    for name in values or {}:
        if getattr(s, name) != getattr(without, name) and (needed := _does_nothing(kind, s, name)):
            raise SettingError("does nothing here", where=f"simulate.{kind}.{name}", got=getattr(s, name), expected=needed)
    return s


def _does_nothing(kind: str, s: ScanSettings, name: str) -> str:
    """What a setting needs that this scan has not; empty where it has its effect."""
    if kind not in (kinds := USED_BY.get(name, KINDS)):
        return f"only of {' or '.join(kinds)}"
    if name == "elliptical" and not s.is_3d:
        return "only with partitions"
    if name == "interleaved" and (s.mask != "uniform" or s.is_3d):
        return "only of slices with mask=uniform"
    if name == "lines_per_segment" and not s.retro_gated:
        return "only with retro_gated"
    if name == "segments" and s.retro_gated:
        return "lines_per_segment of a retro-gated scan"
    if name == "rr" and kind in ("satrec", "mgre") and not s.waveforms:
        return "only with waveforms"
    return ""


def check(kind: str, s: ScanSettings) -> None:
    """Refuse settings that contradict each other.

    Raises
    ------
    SettingError
    """

    def refuse(name: str, got: object, expected: str) -> None:
        raise SettingError("contradiction", where=f"simulate.{kind}.{name}", got=got, expected=expected)

    if kind not in KINDS:
        raise SettingError("unknown kind of scan", where="simulate", got=kind, expected=", ".join(KINDS))
    if s.is_3d and kind != "mgre":
        refuse("partitions", s.partitions, "1: only mgre is simulated in 3D")
    if s.is_3d and s.slices > 1:
        refuse("slices", s.slices, "1 for a 3D scan; partitions=1 makes slices")
    if s.retro_gated and kind != "cine":
        refuse("retro_gated", True, "false: only cine is gated")
    if s.phantom == "tubes" and kind != "satrec":
        refuse("phantom", s.phantom, "auto: tubes are for satrec")
    if s.arrhythmia and not s.retro_gated:
        refuse("arrhythmia", True, "false without retro_gated")
    if s.bipolar and kind != "mgre":
        refuse("bipolar", True, "false: only mgre has several echoes")
    if s.bipolar and s.asymmetric_echo < 1.0:
        refuse("asymmetric_echo", s.asymmetric_echo, "1 for bipolar readouts: reversed ones would miss the other side")
    if s.matrix_x % 2 or s.matrix_y % 2 or (s.is_3d and s.partitions % 2):
        refuse("matrix", (s.matrix_x, s.matrix_y, s.partitions), "even numbers")
    if kind == "mgre" and s.repetition_time < s.echo_time + s.states * s.echo_spacing:
        refuse(
            "repetition_time",
            s.repetition_time,
            f"at least {s.echo_time + s.states * s.echo_spacing:.4f} s for {s.states} echoes",
        )
    if s.mask == "full" and s.acceleration != 1.0:
        refuse("acceleration", s.acceleration, "1 for the full mask; choose another mask")
    if s.retro_gated and s.state_counter not in ("auto", "phase"):
        refuse("state_counter", s.state_counter, "phase for a retro-gated scan")
    counter = STATE_COUNTERS[kind] if s.state_counter == "auto" else s.state_counter
    if counter == "repetition" and s.repetitions > 1:
        refuse("repetitions", s.repetitions, "1 when the state is the repetition")
    times_of(s, kind)


def times_of(s: ScanSettings, kind: str) -> tuple[float, ...]:
    """Inversion times, saturation delays or echo times in s, one per state (for cine: the cardiac phases, 0 to 1)."""
    if kind == "molli":
        return molli_inversion_times(_scheme(s.scheme), rr=s.rr)
    if kind == "satrec":
        try:
            delays = tuple(float(v) for v in s.delays.split(","))
        except ValueError:
            raise SettingError(
                "not a list of numbers", where="simulate.delays", got=repr(s.delays), expected="0.5,1,8"
            ) from None
        if not all(0 < delay <= LONGEST_DELAY for delay in delays):
            expected = f"above 0, up to {LONGEST_DELAY:g} s"
            raise SettingError("not delays", where="simulate.delays", got=repr(s.delays), expected=expected)
        return delays
    if kind == "mgre":
        return tuple(s.echo_time + i * s.echo_spacing for i in range(s.states))
    return tuple(i / s.states for i in range(s.states))


def _scheme(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(v) for v in text.split(","))
    except ValueError:
        raise SettingError("not a MOLLI scheme", where="simulate.scheme", got=repr(text), expected="5,3 or 4,3,2") from None
