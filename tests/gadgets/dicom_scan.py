"""An MRD image file of known content, and the header that goes with it, for the DICOM tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gadgets.geometry import Geometry
from gadgets.image_file import ImageFile
from gadgets.images import ImageWriter, OutputSettings
from gadgets.wire.events import Image
from gadgets.wire.header import parse_header
from recon_core.types import ImageSeries, ParameterMap, Result, ScanInfo

PATIENT = "Väšková^Zuzana"
PATIENT_ID = "ID-4711-secret"
GEOMETRY = Geometry((10.5, -20.25, 30.0), (0.6, 0.8, 0.0), (0.0, 0.0, 1.0), (0.8, -0.6, 0.0))
SPAN = {
    "T1": (0.2, 3.0),
    "T1SD": (0.01, 0.3),
    "R2*": (5.0, 300.0),
    "chi": (-1.9, 1.9),  # beyond +-1023 ppb: the first slice with values decides on the step
    "M0": (1e-6, 5e-5),
    "field": (-90.0, 90.0),
}
UNIT = {"T1": "s", "T1SD": "s", "R2*": "1/s", "chi": "ppm", "M0": "1", "field": "Hz"}


@dataclass
class Scan:
    """Images ``(slice, state, z, y, x)`` (complex) and maps ``(slice, z, y, x)`` in SI units; zero where a map has no value."""

    images: NDArray[np.complex64]
    maps: dict[str, NDArray[np.float32]]
    header: str
    events: list[Image]

    def write(self, path: Path, group: str = "images") -> Path:
        with ImageFile(path, group) as file:
            for event in self.events:
                file.append(event)
        return path


def header_text(
    matrix: tuple[int, int, int], *, name: str = PATIENT, study_uid: str = "1.2.840.99.1", bits: int | None = 12
) -> str:
    z, y, x = matrix
    space = f"<matrixSize><x>{x}</x><y>{y}</y><z>{z}</z></matrixSize><fieldOfView_mm><x>300</x><y>120</y><z>{6 * z}</z></fieldOfView_mm>"
    stored = "" if bits is None else (
        f"<userParameters><userParameterLong><name>BitsStored</name><value>{bits}</value></userParameterLong></userParameters>"
    )  # fmt: skip
    return (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        f"<subjectInformation><patientName>{name}</patientName><patientWeight_kg>61.5</patientWeight_kg>"
        f"<patientID>{PATIENT_ID}</patientID><patientBirthdate>1970-02-03</patientBirthdate><patientGender>F</patientGender>"
        "</subjectInformation><studyInformation><studyDate>2026-01-02</studyDate><studyTime>10:11:12</studyTime>"
        f"<studyID>7</studyID><accessionNumber>A77</accessionNumber><studyInstanceUID>{study_uid}</studyInstanceUID>"
        "</studyInformation><measurementInformation><measurementID>m_1</measurementID><patientPosition>HFS</patientPosition>"
        "<initialSeriesNumber>3</initialSeriesNumber><protocolName>cine_sax</protocolName></measurementInformation>"
        "<acquisitionSystemInformation><systemVendor>Vendor</systemVendor><systemFieldStrength_T>2.89</systemFieldStrength_T>"
        "</acquisitionSystemInformation><experimentalConditions><H1resonanceFrequency_Hz>123200000</H1resonanceFrequency_Hz>"
        f"</experimentalConditions><encoding><encodedSpace>{space}</encodedSpace><reconSpace>{space}</reconSpace><encodingLimits/>"
        "<trajectory>cartesian</trajectory></encoding><sequenceParameters><TR>3.1</TR><TE>1.5</TE><flipAngle_deg>30</flipAngle_deg>"
        f"<sequence_type>Flash</sequence_type></sequenceParameters>{stored}</ismrmrdHeader>"
    )


def scan(
    *, integers: bool = True, planes: int = 1, slices: int = 2, states: int = 2, seed: int = 0, preview: bool = False,
    maps: tuple[str, ...] = tuple(SPAN), asked: str = "llr_t1", times: str = "inversion_times", empty: int = 0,
) -> Scan:  # fmt: skip
    """A smooth disc in a dark field, with another brightness in each state, and maps inside it; where another chain was ``asked``
    for, ``llr_t1`` stood in for it. In the first ``empty`` slices no map has a value.
    """
    rng = np.random.default_rng(seed)
    matrix = (planes, 24, 40)
    y, x = np.meshgrid(np.linspace(-1, 1, 24), np.linspace(-1, 1, 40), indexing="ij")
    inside = np.broadcast_to((x - 0.2) ** 2 + y**2 < 0.5, matrix)
    text = header_text(matrix, bits=12 if integers else None)
    pixels = "uint16" if integers else "float32"
    writer = ImageWriter(parse_header(text), asked, OutputSettings(phase=True, pixel_type=pixels, map_pixel_type=pixels))
    if asked != "llr_t1":
        writer = writer.for_fallback("llr_t1")
    if preview:
        writer = writer.for_previews("llr_t1")
    fov = (0.006 * planes, 0.12, 0.3)
    images, truth, events = [], {name: [] for name in maps}, []
    for position in range(slices):
        shade = (1 + 0.3 * x)[None, None] * np.arange(1, states + 1).reshape(-1, 1, 1, 1) * np.exp(1j * 3 * (x + y))
        data = (2e-6 * shade * inside + 1e-8 * rng.normal(size=(states, *matrix))).astype(np.complex64)
        found = []
        for name in maps:
            low, high = SPAN[name]
            valid = inside & (position >= empty)
            values = np.where(valid, rng.uniform(low, high, matrix), 0.0).astype(np.float32)
            found.append(ParameterMap(name, torch.from_numpy(values), UNIT[name], torch.from_numpy(valid)))
            truth[name].append(values)
        info = ScanInfo(
            matrix, fov, matrix, fov, slice_index=position, state_counters=tuple({"phase": s} for s in range(states)),
            **{times: tuple(0.1 + 0.08 * s for s in range(states))},
        )  # fmt: skip
        centre = (10.5 + 6.4 * position, -20.25 - 4.8 * position, 30.0)  # 8 mm along the slice direction
        place = Geometry(centre, GEOMETRY.read_dir, GEOMETRY.phase_dir, GEOMETRY.slice_dir)
        result = Result((ImageSeries("image", torch.from_numpy(data)),), tuple(found))
        events += list(writer.events(result, info, place, position=position))
        images.append(data)
    return Scan(np.stack(images), {n: np.stack(v) for n, v in truth.items()}, text, events)
