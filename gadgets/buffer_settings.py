"""Settings of the step from readouts to k-space: state axis, cardiac gating, calibration, what to do with incomplete data."""

from __future__ import annotations

from dataclasses import dataclass

from recon_core.settings import setting

TICK = 2.5e-3
"""Seconds per tick of the acquisition and physiology time stamps (Siemens; the MRD format leaves the unit to the vendor)."""


@dataclass(frozen=True)
class AcquisitionSettings:
    """How readouts become k-space. The defaults suit every Cartesian scan whose counters say what they mean."""

    state: str = setting(
        "auto",
        "What makes the images of a series: all counters that vary, one counter (the others must then be constant), or "
        "'single': everything is averaged into one image.",
        choices=("auto", "phase", "contrast", "set", "repetition", "single"),
    )
    repetitions: str = setting(
        "images",
        "Repetitions of the whole scan: 'images' of their own, or 'average' into one series, as averages are (parametric maps need one).",
        choices=("images", "average"),
    )
    encoding_space: int = setting(0, "Which encoding of the header is reconstructed.", low=0, high=15)
    centre_source: str = setting(
        "auto",
        "Which k-space centre counts if the header and the readouts (Siemens: user counters 5 and 6) disagree; 'auto' "
        "believes the header unless only the readouts' centre puts all lines inside the matrix.",
        choices=("auto", "header", "readouts"),
    )
    incomplete: str = setting(
        "error",
        "A slice or state (almost) without lines: 'error' refuses the scan, 'drop' leaves it out and says so.",
        choices=("error", "drop"),
    )
    min_line_fraction: float = setting(
        0.1,
        "A slice and state with fewer lines than this fraction of the fullest one counts as incomplete.",
        low=0.0,
        high=1.0,
    )
    calibration_in_image: bool = setting(
        False, "Use calibration-only readouts of the same encoding as image data too (embedded reference lines)."
    )
    calibration: str = setting(
        "principal",
        "Calibration lines of several states: their principal component (contrast and phase may change, as after an inversion), "
        "their mean, or only the state with the strongest signal. States that do not share the lines are always averaged.",
        choices=("principal", "mean", "strongest"),
    )
    calibration_extent: int = setting(
        48,
        "Without flagged calibration lines: the largest extent of the sampled centre that is used instead, per direction.",
        unit="lines",
        low=4,
        high=512,
    )
    cardiac_phases: int = setting(
        0, "0 uses the phase counter; n > 0 sorts readouts into n cardiac phases by their time stamps.", low=0, high=500
    )
    arrhythmia_rejection: float = setting(
        30.0,
        "Beats whose RR interval deviates by more than this from the median are left out; 0 keeps all.",
        unit="%",
        low=0.0,
        high=95.0,
    )
    physiology_channel: int = setting(0, "Which of the three physiology time stamps is the ECG trigger.", low=0, high=2)
    tick: float = setting(TICK, "Duration of one tick of the time stamps.", unit="s", low=1e-6, high=1.0)
    preparation: str = setting(
        "inversion",
        "Magnetisation preparation that the header's TI list belongs to, where its user parameter MagnetizationPreparation does not say.",
        choices=("inversion", "saturation"),
    )
    inversion_times: str = setting(
        "",
        "Inversion time of each image of the series (of a saturation: its delay), separated by commas; empty: from the header or the "
        "readouts.",
        unit="ms",
    )
    inversion_time_source: str = setting(
        "auto",
        "Inversion times from the header's list, from the readouts (user_int 4 and 5 and time stamps, as Gadgetron's MOLLI chain "
        "expects them), or 'auto': the header's where they fit the images, else the readouts'.",
        choices=("auto", "header", "readouts"),
    )
    sampling_mask: str = setting(
        "auto",
        "Sampling mask that the scan is compared with: 'auto' takes the one that the header names, 'none' compares nothing, else the name "
        "of a mask on the server.",
    )
    max_slice_gib: float = setting(
        64.0, "Largest k-space of one slice or slab that is allocated.", unit="GiB", low=0.001, high=4096.0
    )
