"""Settings of an exported multi-echo sequence, and its times and limits as it will be played (`gadgets.pulseq`)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recon_core.errors import ReconError, SettingError

ADC_RASTER = 100e-9


class SequenceError(ReconError):
    """A sequence that no scanner could play, or pypulseq is not installed."""


@dataclass(frozen=True)
class SequenceSettings:
    """Of the sequence; SI units. The defaults are the paper's where a whole echo leaves time for it.

    Attributes
    ----------
    matrix_x, fov
        Readout samples before oversampling; field of view ``(z, y, x)`` in m.
    echo_times
        s, one per echo of the mask; moved to the raster, see :class:`SequenceFacts`.
    repetition_time, flip_angle
        s and rad.
    dwell, oversampling
        s per ADC sample; ADC samples per readout position.
    slab_thickness
        m; ``None``: the field of view along z.
    dummies, noise_readouts
        Excitations without readouts before the first shot; readouts without excitation before those.
    max_grad_mt_m, max_slew_t_m_s
        Of one axis; what the axes reach together is in :class:`SequenceFacts`.
    """

    matrix_x: int = 256
    fov: tuple[float, float, float] = (0.16, 0.206, 0.256)
    echo_times: tuple[float, ...] = tuple(0.004 + 0.003384 * n for n in range(10))
    repetition_time: float = 0.04
    flip_angle: float = math.radians(15.0)
    dwell: float = 8e-6
    oversampling: int = 1
    slab_thickness: float | None = None
    rf_duration: float = 1e-3
    rf_time_bandwidth: float = 4.0
    rf_spoiling_increment: float = math.radians(117.0)
    spoiling_cycles: float = 2.0  # of phase across a voxel, along x
    dummies: int = 80  # of 40 ms: a T1 of 1 s is then within 1 % of its steady state
    noise_readouts: int = 16
    max_grad_mt_m: float = 32.0
    max_slew_t_m_s: float = 130.0
    field_strength: float = 3.0
    name: str = "laro_mgre"

    def __post_init__(self) -> None:
        above_0 = ("fov", "echo_times", "repetition_time", "flip_angle", "dwell", "rf_duration", "slab_thickness",
                   "max_grad_mt_m", "max_slew_t_m_s", "field_strength")  # fmt: skip
        for name in above_0:
            value = getattr(self, name)
            numbers = value if isinstance(value, tuple) else () if value is None else (value,)
            if value == () or not all(math.isfinite(v) and v > 0 for v in numbers):
                raise SettingError("must be above 0", where=f"sequence.{name}", got=value, expected="finite numbers above 0")
        for name in ("dummies", "noise_readouts"):
            if getattr(self, name) < 0:
                raise SettingError("must be 0 or more", where=f"sequence.{name}", got=getattr(self, name))
        if any(b <= a for a, b in zip(self.echo_times, self.echo_times[1:], strict=False)):
            raise SettingError("echo times do not rise", where="sequence.echo_times", got=self.echo_times)
        if self.matrix_x < 2 or self.oversampling < 1 or (self.matrix_x * self.oversampling) % 4:
            raise SettingError(
                "samples must be divisible by 4", where="sequence.matrix_x", got=self.matrix_x * self.oversampling
            )
        if abs(self.dwell / ADC_RASTER - round(self.dwell / ADC_RASTER)) > 1e-6:
            raise SettingError("off the raster", where="sequence.dwell", got=self.dwell, expected="a multiple of 100 ns")

    @property
    def n_adc(self) -> int:
        return self.matrix_x * self.oversampling


@dataclass(frozen=True)
class SequenceFacts:
    """What was written.

    Attributes
    ----------
    echo_times, repetition_time
        As played, on the raster, s; an echo time is that of k0 = 0.
    n_readouts, duration
        Imaging readouts; length of the whole scan, s.
    max_grad, max_slew
        Largest vector sum over the three axes, mT/m and T/m/s: what a rotated slab may ask of one physical axis.
    """

    echo_times: tuple[float, ...]
    repetition_time: float
    n_readouts: int
    duration: float
    max_grad: float
    max_slew: float
