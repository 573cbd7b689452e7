"""The MRD header: a tolerant reader of the fields that a reconstruction needs. SI units inside.

Any ``<version>`` is accepted, unknown elements are ignored, a missing field stays ``None`` (never a made-up default).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limit:
    """One encoding limit: inclusive ``minimum`` and ``maximum``, and the counter value of the k-space centre."""

    minimum: int
    maximum: int
    center: int


@dataclass(frozen=True)
class Encoding:
    """One ``<encoding>``. Matrices and fields of view are ``(z, y, x)``; fields of view in m.

    ``limits`` is keyed by the counter's field name in the acquisition header's ``idx`` (``kspace_encode_step_1``,
    ``kspace_encode_step_2``, ``average``, ``slice``, ``contrast``, ``phase``, ``repetition``, ``set``, ``segment``) plus
    ``kspace_encode_step_0``; only those that the header has.
    """

    trajectory: str
    encoded_matrix: tuple[int, int, int]
    encoded_fov: tuple[float, float, float]
    recon_matrix: tuple[int, int, int]
    recon_fov: tuple[float, float, float]
    limits: Mapping[str, Limit] = field(default_factory=dict)
    acceleration: tuple[int, int] | None = None  # (kspace_encode_step_1, kspace_encode_step_2)
    calibration_mode: str | None = None


@dataclass(frozen=True)
class MrdHeader:
    """What the header says. Times in s, angles in rad, frequencies in Hz, field strength in T.

    Nothing here identifies a patient; ``text`` is the whole document and must never be logged.
    """

    encodings: tuple[Encoding, ...]
    text: str = field(repr=False, default="")
    measurement_id: str | None = None
    noise_dependency: str | None = None  # measurement id of the dependency of type Noise
    protocol_name: str | None = None
    patient_position: str | None = None
    field_strength: float | None = None
    h1_frequency: float | None = None
    receiver_channels: int | None = None
    relative_noise_bandwidth: float | None = None
    repetition_times: tuple[float, ...] = ()
    echo_times: tuple[float, ...] = ()
    inversion_times: tuple[float, ...] = ()
    flip_angles: tuple[float, ...] = ()
    user_long: Mapping[str, int] = field(default_factory=dict)
    user_double: Mapping[str, float] = field(default_factory=dict)
    user_string: Mapping[str, str] = field(default_factory=dict)


def parse_header(text: str) -> MrdHeader:
    """Read an MRD header (implemented by the wire helper)."""
    raise NotImplementedError
