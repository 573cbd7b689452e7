"""The MRD header and the geometry of a simulated scan: ms, mm and degrees, as MRD wants them."""

from __future__ import annotations

from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from recon_core.simulation.options import STATE_COUNTERS, ScanSettings
from recon_core.simulation.scan import Scan
from recon_core.simulation.signal import GYROMAGNETIC_RATIO

BASE_TICKS = 14_400_000
"""Acquisition time stamp of the start of the scan (2.5 ms ticks since midnight): 10 o'clock, of no particular day."""

NOISE_BANDWIDTH = 0.793
"""Relative receiver noise bandwidth, written to the header; it is Gadgetron's default, too."""


@dataclass(frozen=True)
class Geometry:
    """Position of the volume's centre (LPS, mm) and the directions of the acquisition, right-handed unit vectors."""

    position: NDArray[np.float64]
    read_dir: NDArray[np.float64]
    phase_dir: NDArray[np.float64]
    slice_dir: NDArray[np.float64]

    @classmethod
    def of(cls, s: ScanSettings) -> Geometry:
        """Axial is read to the left, phase to posterior; coronal and sagittal have phase towards the feet."""
        read, phase = {
            "axial": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
            "coronal": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0)),
            "sagittal": ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0)),
            "oblique": ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)),
        }[s.orientation]
        turn = _rotation(0, 35.0) @ _rotation(1, -20.0) @ _rotation(2, 30.0) if s.orientation == "oblique" else np.eye(3)
        read_dir, phase_dir = turn @ np.array(read), turn @ np.array(phase)
        slice_dir = np.cross(read_dir, phase_dir)
        offset = s.offset_read * read_dir + s.offset_phase * phase_dir + s.offset_slice * slice_dir
        return cls(offset * 1e3, read_dir, phase_dir, slice_dir)


def _rotation(axis: int, degrees: float) -> NDArray[np.float64]:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    result = np.eye(3)
    i, j = [a for a in range(3) if a != axis]
    result[i, i] = result[j, j] = c
    result[i, j], result[j, i] = (-s, s) if axis != 1 else (s, -s)
    return result


def matrix_of(s: ScanSettings) -> tuple[int, int, int]:
    """``(z, y, x)`` of the images."""
    return s.partitions, s.matrix_y, s.matrix_x


def counter_of(scan: Scan) -> str:
    """The encoding counter that holds the state."""
    chosen = scan.settings.state_counter
    return STATE_COUNTERS[scan.kind] if chosen == "auto" else chosen


def header_text(scan: Scan) -> str:
    """The MRD header as XML, without ``<version>`` and without anything about a patient."""
    s = scan.settings
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        '<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD" xmlns:xsi="http://www.w3.org/2001/XMLSchema-instance" '
        'xsi:schemaLocation="http://www.ismrm.org/ISMRMRD ismrmrd.xsd">'
        + _tag(
            "measurementInformation",
            _tag("measurementID", f"simulated_{scan.kind}_{s.seed}")
            + _tag("patientPosition", "HFS")
            + _tag("protocolName", f"simulated_{scan.kind}"),
        )
        + _tag(
            "acquisitionSystemInformation",
            _tag("systemVendor", "simulated")
            + _tag("systemFieldStrength_T", s.field_strength)
            + _tag("relativeReceiverNoiseBandwidth", NOISE_BANDWIDTH)
            + _tag("receiverChannels", s.coils)
            + "".join(_tag("coilLabel", _tag("coilNumber", i) + _tag("coilName", f"Loop{i + 1}")) for i in range(s.coils)),
        )
        + _tag("experimentalConditions", _tag("H1resonanceFrequency_Hz", round(GYROMAGNETIC_RATIO * s.field_strength)))
        + _encoding(scan)
        + _sequence(scan)
        + _user_parameters(scan)
        + (_waveform_information() if s.waveforms else "")
        + "</ismrmrdHeader>"
    )


def _tag(name: str, content: object) -> str:
    text = content if isinstance(content, str) and content.startswith("<") else escape(str(content))
    return f"<{name}>{text}</{name}>"


def _space(name: str, matrix: tuple[int, int, int], fov_mm: tuple[float, float, float]) -> str:
    sizes = "".join(_tag(axis, n) for axis, n in zip("xyz", matrix[::-1], strict=True))
    extents = "".join(_tag(axis, round(v, 6)) for axis, v in zip("xyz", fov_mm[::-1], strict=True))
    return _tag(name, _tag("matrixSize", sizes) + _tag("fieldOfView_mm", extents))


def _encoding(scan: Scan) -> str:
    s, p = scan.settings, scan.plan
    z, y, x = matrix_of(s)
    fov = (s.slice_thickness * s.partitions * 1e3, s.fov_y * 1e3, s.fov_x * 1e3)
    n_samples = x * s.oversampling - scan.first_sample
    limits = {
        "kspace_encoding_step_0": (n_samples - 1, x * s.oversampling // 2 - scan.first_sample),
        # partial Fourier: counters start at the first line that is acquired, the centre tells how far in it lies
        "kspace_encoding_step_1": (y - 1 - scan.first_line, y // 2 - scan.first_line),
        "kspace_encoding_step_2": (z - 1, z // 2),
        "average": (s.averages - 1, 0),
        "slice": (s.slices - 1, 0),
        "contrast": (0, 0),
        "phase": (0, 0),
        "repetition": (s.repetitions - 1, 0),
        "set": (0, 0),
        "segment": (int(p.segment.max()), 0),
    }
    limits[counter_of(scan)] = (int(p.state.max()), 0)
    written = "".join(
        _tag(name, _tag("minimum", 0) + _tag("maximum", highest) + _tag("center", centre))
        for name, (highest, centre) in limits.items()
    )
    parallel = ""
    if s.mask != "full" or s.calibration != "none":
        factors = _tag("kspace_encoding_step_1", max(1, round(s.acceleration))) + _tag("kspace_encoding_step_2", 1)
        mode = {"embedded": "embedded", "separate": "separate", "none": "other"}[s.calibration]
        parallel = _tag("parallelImaging", _tag("accelerationFactor", factors) + _tag("calibrationMode", mode))
    return _tag(
        "encoding",
        _space("encodedSpace", (z, y, x * s.oversampling), (fov[0], fov[1], fov[2] * s.oversampling))
        + _space("reconSpace", (z, y, x), fov)
        + _tag("encodingLimits", written)
        + _tag("trajectory", "cartesian")
        + parallel,
    )


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 6)


def _sequence(scan: Scan) -> str:
    s = scan.settings
    echo_times = scan.truth.states if scan.kind == "mgre" else (s.echo_time,)
    inversions = scan.truth.states if scan.kind in ("molli", "satrec") else ()
    kinds = {"cine": "TrueFISP", "molli": "TrueFISP", "satrec": "Flash", "mgre": "Flash"}
    return _tag(
        "sequenceParameters",
        _tag("TR", _ms(s.repetition_time))
        + "".join(_tag("TE", _ms(t)) for t in echo_times)
        + "".join(_tag("TI", _ms(t)) for t in inversions)
        + _tag("flipAngle_deg", s.flip_angle)
        + _tag("sequence_type", kinds[scan.kind]),
    )


def _user_parameters(scan: Scan) -> str:
    s = scan.settings
    items = []
    if s.retro_gated:
        items.append(_tag("userParameterLong", _tag("name", "RetroGatedImages") + _tag("value", s.states)))
    preparation = {"molli": "inversion", "satrec": "saturation"}.get(scan.kind)
    if preparation:
        items.append(_tag("userParameterString", _tag("name", "MagnetizationPreparation") + _tag("value", preparation)))
    return _tag("userParameters", "".join(items)) if items else ""


def _waveform_information() -> str:
    trigger = _tag("userParameterLong", _tag("name", "TriggerChannel") + _tag("value", 4))
    return _tag(
        "waveformInformation",
        _tag("waveformName", "ECG") + _tag("waveformType", "ecg") + _tag("userParameters", trigger),
    )
