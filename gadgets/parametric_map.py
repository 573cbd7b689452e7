"""Parametric Map objects: a map of a whole slab or stack as one multi-frame object, beside the classic images.

The frames are 16-bit codes with a Real World Value Mapping and not floats: a floating-point map is stored by every archive and
shown by few (Orthanc answers a preview of one with "unsupported media type").

Source: DICOM PS3.3 section A.75.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import highdicom
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from gadgets import __version__
from gadgets.dicom_identity import DicomError, make_uid
from gadgets.dicom_modules import DERIVATION, SeriesPlan
from gadgets.dicom_pixels import STANDARD_DEVIATION

MAP_SERIES = 50
"""Added to the series number of the classic images."""

MOST_COMMENTS = 4000
"""Characters; the images of a slab may each say something of its own."""


def parametric_map(sources: Sequence[Path], plan: SeriesPlan) -> Dataset:
    """The Parametric Map of one map series.

    Parameters
    ----------
    sources
        Its classic MR images, of one matrix.
    plan
        Their series.

    Raises
    ------
    DicomError
        The series is no map, its pixels have no coded unit or several scalings, or several images lie at one place.
    """
    real, where = plan.pixels.real_world, f"series {plan.number}"
    if real is None or not plan.pixels.role:
        raise DicomError("not a map", where=where, expected="pixels with a unit")
    if len(plan.scalings) > 1:
        raise DicomError("images differ in scaling", where=where, expected="one slope and intercept in a series")
    images = sorted((pydicom.dcmread(path) for path in sources), key=lambda d: int(d.InstanceNumber))
    if len({tuple(image.ImagePositionPatient) for image in images}) < len(images):
        raise DicomError("several images at one place", where=where, expected="one of each slice")
    codes = np.stack([image.pixel_array for image in images])
    shift = 2**15 if plan.pixels.signed else 0  # the object holds unsigned codes only
    codes = (codes.astype(np.int32) + shift).astype(np.uint16)
    first = 0 if plan.pixels.signed else real.first
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label=plan.pixels.role[:16],
        lut_explanation=f"{plan.pixels.role} in {real.unit[2]}"[:64],
        unit=Code(*real.unit),
        value_range=(first, real.last + shift),
        slope=real.slope,
        intercept=real.intercept - real.slope * shift,
        quantity_definition=None if real.quantity is None else Code(*real.quantity),
    )
    if real.deviation:
        mapping.QuantityDefinitionSequence.append(highdicom.sr.CodeContentItem(Code(*DERIVATION), Code(*STANDARD_DEVIATION)))
    window = plan.pixels.window
    slope, intercept = plan.pixels.rescale or (1.0, 0.0)
    # a Parametric Map has no Modality LUT: its window is in codes
    center = 2048.0 if window is None else (window.center - intercept) / slope + shift
    width = 4096.0 if window is None else max(1.0, window.width / slope)
    try:
        made = _object(images, codes, mapping, plan, center, width)
    except ValueError as error:  # slices across each other, for one; its texts may repeat what is in the images
        raise DicomError("cannot be made of these images", where=where, got=type(error).__name__) from None
    said = "; ".join(dict.fromkeys(str(image.ImageComments) for image in images if image.get("ImageComments")))
    if said:
        made.ImageComments = said[:MOST_COMMENTS]
    made.Laterality = ""  # type 2C: whether the body part is one of a pair is not known
    return made


def _object(
    images: Sequence[Dataset],
    codes: NDArray[np.uint16],
    mapping: highdicom.pm.RealWorldValueMapping,
    plan: SeriesPlan,
    center: float,
    width: float,
) -> Dataset:
    return highdicom.pm.ParametricMap(
        source_images=images,
        pixel_array=codes,
        series_instance_uid=make_uid("parametric map series", plan.uid),
        series_number=plan.number + MAP_SERIES,
        sop_instance_uid=make_uid("parametric map", plan.uid),
        instance_number=1,
        manufacturer="recon-gadgets",
        manufacturer_model_name="recon-gadgets",
        software_versions=__version__,
        device_serial_number="0",
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[highdicom.VOILUTTransformation(window_center=center, window_width=width)],
        content_description=None,
        content_label="MAP",
        series_description=f"{plan.description} parametric map"[:64],
    )
