"""The modules of a classic MR Image object, filled in from an MRD image header, its attributes and the scan's identity.

Source: DICOM PS3.3 sections C.7.2 to C.7.6 (patient to pixels), C.8.3.1 (MR Image), C.7.6.16.2.11 (Real World Value Mapping).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage
from pydicom.valuerep import DSfloat

from gadgets import __version__
from gadgets.dicom_identity import DicomError, Identity, text_value
from gadgets.dicom_pixels import STANDARD_DEVIATION, Code, Meta, PixelPlan, RealWorld, Stated, first, moment, number
from gadgets.geometry import image_position_patient, orthonormal_directions, pixel_spacing
from gadgets.image_attributes import MAKER, PHASE, SATURATION_TIME

IMAGE_TYPES = {PHASE: "P", 3: "R", 4: "I"}
"""MRD's ``image_type`` and the third value of ImageType, where it is no magnitude."""

MAP_TYPES = {"T1": "T1 MAP", "T2": "T2 MAP", "M0": "DENSITY MAP"}
"""Third value of ImageType, as far as the standard has a word (PS3.3 section C.8.3.1.1.1)."""

DERIVATION: Code = ("121401", "DCM", "Derivation")

SEQUENCES = (("epi", "EP"), ("ep2d", "EP"), ("spin", "SE"), ("tse", "SE"), ("grad", "GR"), ("gre", "GR"), ("flash", "GR"))
"""What the free text of the header's sequence type may contain, and DICOM's ScanningSequence."""
STEADY_STATE = ("ssfp", "trufi", "fiesta", "balanced")


@dataclass(frozen=True)
class SeriesPlan:
    """What all objects of one DICOM series share.

    ``scalings`` has the pixels of images by what they state, with ``pixels`` first; ``moments`` are repetition and phase of all images,
    in order.
    """

    number: int
    uid: str
    study_uid: str
    frame_of_reference: str
    description: str
    pixels: PixelPlan
    scalings: Mapping[Stated, PixelPlan]
    moments: tuple[tuple[int, int], ...]
    n_contrasts: int
    used: set[int] = field(default_factory=set)

    @property
    def folder(self) -> str:
        """A folder's name: the number and the chain's label; nothing of the patient is in either."""
        return re.sub(r"[^A-Za-z0-9_-]+", "_", f"{self.number:04d}_{self.description}")[:80].rstrip("_")


def shared_modules(plan: SeriesPlan, identity: Identity) -> Dataset:
    """Patient, study, series, frame of reference and equipment."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = MRImageStorage
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.Modality = "MR"
    empty = (
        "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID", "AccessionNumber",
        "ReferringPhysicianName", "Manufacturer", "PatientPosition", "PositionReferenceIndicator", "Laterality",
    )  # fmt: skip
    for keyword in empty:
        setattr(dataset, keyword, "")
    for module in (identity.patient, identity.study, identity.equipment, identity.series):
        for keyword, value in module.items():
            setattr(dataset, keyword, value)
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = plan.study_uid, plan.uid
    dataset.FrameOfReferenceUID = plan.frame_of_reference
    dataset.SeriesNumber = plan.number
    # the chain's label first: viewers cut long descriptions off at the end
    scan = identity.series.get("SeriesDescription") or identity.series.get("ProtocolName", "")
    dataset.SeriesDescription = text_value(64)(f"{plan.description} {scan}")
    maker = Dataset()
    maker.Manufacturer, maker.SoftwareVersions = MAKER, __version__
    maker.PurposeOfReferenceCodeSequence = Sequence([_coded(("109102", "DCM", "Processing Equipment"))])
    dataset.ContributingEquipmentSequence = Sequence([maker])
    return dataset


def acquisition_module(
    dataset: Dataset, header: Any, meta: Meta, plan: SeriesPlan, identity: Identity, *, planes: int
) -> None:
    """The MR Image module, without pixels."""
    mrd, role = identity.mrd, plan.pixels.role
    kind = IMAGE_TYPES.get(int(header["image_type"]), "M")
    flavour = first(meta, "ImageTypeValue4").upper()
    dataset.ImageType = (
        ["DERIVED", "PRIMARY", MAP_TYPES.get(role, "OTHER"), role[:16]] if role else ["ORIGINAL", "PRIMARY", kind]
    )
    if not role and re.fullmatch(r"[A-Z0-9_ ]{1,16}", flavour):
        dataset.ImageType = ["ORIGINAL", "PRIMARY", kind, flavour]
    dataset.BurnedInAnnotation, dataset.LossyImageCompression = "NO", "00"

    said = identity.sequence_type.lower()
    inversion = number(meta, "InversionTime", "GADGETRON_TI")
    scanning = next((code for word, code in SEQUENCES if word in said), "GR" if _steady(said) else "RM")
    dataset.ScanningSequence = ["IR", scanning] if inversion is not None else scanning
    dataset.SequenceVariant = "SS" if _steady(said) else "NONE"
    dataset.ScanOptions, dataset.EchoTrainLength = None, None
    volume = planes > 1 or (mrd is not None and mrd.encodings[0].encoded_matrix[0] > 1)
    dataset.MRAcquisitionType = "3D" if volume else "2D"

    contrast = int(header["contrast"])
    echo = number(meta, "EchoTime", "GADGETRON_TE")
    if mrd is not None:
        # of several echoes our own images name theirs, and one that names none was made of all of them
        ours = MAKER in meta.get("ImageProcessingHistory", ())
        if echo is None and not role and contrast < len(mrd.echo_times) and not (ours and len(mrd.echo_times) > 1):
            echo = 1e3 * mrd.echo_times[contrast]
        if mrd.field_strength is not None:
            dataset.MagneticFieldStrength = _ds(mrd.field_strength)
        if mrd.h1_frequency is not None:
            dataset.ImagingFrequency = _ds(mrd.h1_frequency / 1e6)
        if mrd.flip_angles:
            dataset.FlipAngle = _ds(np.degrees(mrd.flip_angles[0]))
    dataset.RepetitionTime = _ds(1e3 * mrd.repetition_times[0]) if mrd is not None and mrd.repetition_times else None
    dataset.EchoTime = None if echo is None else _ds(echo)
    if inversion is not None:
        dataset.InversionTime = _ds(inversion)
    if plan.n_contrasts > 1 and not role:
        dataset.EchoNumbers = contrast + 1
    if len(plan.moments) > 1:
        dataset.TemporalPositionIdentifier = plan.moments.index(moment(header)) + 1
        dataset.NumberOfTemporalPositions = len(plan.moments)


def image_comment(meta: Meta) -> str:
    """What the image says of itself, and the delay after a saturation, for which classic MR images have no attribute."""
    said = list(dict.fromkeys(meta.get("ImageComments", ()) or meta.get("GADGETRON_ImageComment", ())))
    delay = number(meta, SATURATION_TIME)
    if delay is not None:
        said.insert(1, f"{delay:g} ms after saturation")
    return "; ".join(said)


def _steady(said: str) -> bool:
    return any(word in said for word in STEADY_STATE)


def plane_module(dataset: Dataset, header: Any, meta: Meta, z: int) -> None:
    """Image Plane module: where this plane lies. An image that was turned says so in its attributes."""
    turned = header.copy()
    for key, name in (("ImageRowDir", "read_dir"), ("ImageColumnDir", "phase_dir"), ("ImageSliceDir", "slice_dir")):
        direction = _direction(meta.get(key, ()))
        if direction is not None:
            turned[name] = direction
    read, phase, normal = orthonormal_directions(turned["read_dir"], turned["phase_dir"], turned["slice_dir"])[0]
    turned["read_dir"], turned["phase_dir"], turned["slice_dir"] = read, phase, normal
    if not (turned["field_of_view"] > 0).all() or not np.isfinite(turned["field_of_view"]).all():
        where = f"series {int(header['image_series_index'])}"
        raise DicomError("no usable field of view", where=where, got=header["field_of_view"].tolist(), expected="mm")
    position = image_position_patient(turned, z)
    if not np.isfinite(position).all():
        where = f"series {int(header['image_series_index'])}"
        raise DicomError("no usable position", where=where, got=header["position"].tolist(), expected="mm")
    dataset.ImagePositionPatient = [_ds(v) for v in position]
    dataset.ImageOrientationPatient = [_ds(v) for v in (*read, *phase)]
    dataset.PixelSpacing = [_ds(v) for v in pixel_spacing(turned)]
    thickness = float(turned["field_of_view"][2]) / int(turned["matrix_size"][2])
    dataset.SliceThickness = _ds(thickness)
    if int(turned["matrix_size"][2]) > 1:
        dataset.SpacingBetweenSlices = _ds(thickness)


def _direction(texts: tuple[str, ...]) -> tuple[float, ...] | None:
    try:
        found = tuple(float(text) for text in texts)
    except ValueError:
        return None
    return found if len(found) == 3 and np.isfinite(found).all() and any(found) else None


def pixel_modules(dataset: Dataset, codes: NDArray[Any], plan: PixelPlan) -> None:
    """Image Pixel, VOI LUT, Modality LUT and Real World Value Mapping."""
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.Rows, dataset.Columns = codes.shape
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, plan.bits, plan.bits - 1
    dataset.PixelRepresentation = int(plan.signed)
    if plan.padding is not None:
        dataset.add_new("PixelPaddingValue", "SS" if plan.signed else "US", plan.padding)
    if plan.window is not None:
        dataset.WindowCenter, dataset.WindowWidth = _ds(plan.window.center), _ds(plan.window.width)
    if plan.rescale is not None:
        dataset.RescaleSlope, dataset.RescaleIntercept = (_ds(v) for v in plan.rescale)
        dataset.RescaleType = "US"  # the only word for MR (PS3.3 section C.7.6.16.2.9b); the unit is in the mapping below
    if plan.real_world is not None:
        dataset.RealWorldValueMappingSequence = Sequence([_mapping(plan.real_world, plan)])
    dataset.add_new("PixelData", "OW", np.ascontiguousarray(codes).tobytes())


def _mapping(real: RealWorld, plan: PixelPlan) -> Dataset:
    item = Dataset()
    vr, lowest = ("SS", -(2**15)) if plan.signed else ("US", real.first)
    item.add_new("RealWorldValueFirstValueMapped", vr, lowest)
    item.add_new("RealWorldValueLastValueMapped", vr, real.last)
    item.RealWorldValueSlope, item.RealWorldValueIntercept = float(real.slope), float(real.intercept)
    item.LUTLabel = (plan.role or "SIGNAL")[:16]
    item.LUTExplanation = f"{plan.role or 'signal'} in {real.unit[2]}"[:64]
    item.MeasurementUnitsCodeSequence = Sequence([_coded(real.unit)])
    if real.quantity is not None:
        named = [_named(("246205007", "SCT", "Quantity"), real.quantity)]
        if real.deviation:
            named.append(_named(DERIVATION, STANDARD_DEVIATION))
        item.QuantityDefinitionSequence = Sequence(named)
    return item


def _named(concept: Code, value: Code) -> Dataset:
    item = Dataset()
    item.ValueType = "CODE"
    item.ConceptNameCodeSequence = Sequence([_coded(concept)])
    item.ConceptCodeSequence = Sequence([_coded(value)])
    return item


def _coded(code: Code) -> Dataset:
    item = Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = code
    return item


def _ds(value: Any) -> DSfloat:
    """A decimal string of at most 16 characters."""
    return DSfloat(float(value), auto_format=True)
