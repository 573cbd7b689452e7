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
from pydicom.dataset import Dataset
from pydicom.sr.coding import Code

from gadgets import __version__
from gadgets.dicom_identity import DicomError, make_uid
from gadgets.dicom_modules import SeriesPlan

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
        The series is no map, or its pixels have no coded unit.
    """
    real = plan.pixels.real_world
    if real is None or not plan.pixels.role:
        raise DicomError("not a map", where=f"series {plan.number}", expected="pixels with a unit")
    images = sorted((pydicom.dcmread(path) for path in sources), key=lambda d: int(d.InstanceNumber))
    mapping = highdicom.pm.RealWorldValueMapping(
        lut_label=plan.pixels.role[:16],
        lut_explanation=f"{plan.pixels.role} in {real.unit[2]}"[:64],
        unit=Code(*real.unit),
        value_range=(real.first, real.last),
        slope=real.slope,
        intercept=real.intercept,
        quantity_definition=None if real.quantity is None else Code(*real.quantity),
    )
    window = plan.pixels.window
    slope, intercept = plan.pixels.rescale or (1.0, 0.0)
    # a Parametric Map has no Modality LUT: its window is in codes
    center = 2048.0 if window is None else (window.center - intercept) / slope
    width = 4096.0 if window is None else max(1.0, window.width / slope)
    made = highdicom.pm.ParametricMap(
        source_images=images,
        pixel_array=np.stack([image.pixel_array for image in images]),
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
    said = "; ".join(dict.fromkeys(str(image.ImageComments) for image in images if image.get("ImageComments")))
    if said:
        made.ImageComments = said[:MOST_COMMENTS]
    made.Laterality = ""  # type 2C: whether the body part is one of a pair is not known
    return made
