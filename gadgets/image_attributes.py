"""Header and attributes of one outgoing image: what it is, where it lies, how its pixels are to be read and shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gadgets.geometry import Geometry, field_of_view_mm
from gadgets.meta import MetaValue, both_families, direction_texts
from gadgets.windows import PHASE_UNITS_PER_RADIAN, MapDisplay, Scaling, Window
from gadgets.wire.dtypes import DATA_TYPE_CODES, IMAGE_HEADER

if TYPE_CHECKING:  # it imports torch, which the client of `recon replay` does without
    from recon_core.types import ScanInfo

MAGNITUDE, PHASE, COMPLEX = 1, 2, 5
"""``image_type`` of the MRD header. Maps are MAGNITUDE with DataRole Quantitative: consoles reject or alter the others."""

STATE_COUNTERS = ("average", "contrast", "phase", "repetition", "set")
MAKER = "recon-gadgets"
"""The first entry of ``ImageProcessingHistory``."""

SATURATION_TIME = "GADGETRON_TS"  # ms
PREVIEW_KEY = "ReconPreview"
"""Attribute of images that others of the same scan will replace; its value is the chain of those."""

PLANES_KEY = "ReconPlanes"
"""Attribute of a slab of which only some planes are kept, for the monitor's page: their numbers."""

MAX_COMMENT = 200  # characters of one comment: consoles join all of them into one DICOM text
MAX_COMMENTS = 1000  # characters of all comments together


@dataclass(frozen=True)
class Stamp:
    """What an image takes over from the readouts that it was made of (one representative readout per state)."""

    measurement_uid: int = 0
    acquisition_time_stamp: int = 0
    physiology_time_stamp: tuple[int, int, int] = (0, 0, 0)
    user_int: tuple[int, ...] = (0,) * 8
    user_float: tuple[float, ...] = (0.0,) * 8


def read_stamp(header: Any) -> Stamp:
    """The stamp of an acquisition header (element of an ``ACQUISITION_HEADER`` array)."""
    first, second, third = (int(t) for t in header["physiology_time_stamp"])
    return Stamp(
        measurement_uid=int(header["measurement_uid"]),
        acquisition_time_stamp=int(header["acquisition_time_stamp"]),
        physiology_time_stamp=(first, second, third),
        user_int=tuple(int(v) for v in header["user_int"]),
        user_float=tuple(float(v) for v in header["user_float"]),
    )


@dataclass(frozen=True)
class Place:
    """What all images of one slice or slab share; ``position`` is its place in the stack from 0.

    ``preview_of`` is the chain whose final images follow, ``None`` for final images.
    """

    scan: ScanInfo
    geometry: Geometry
    position: int
    stamps: Sequence[Stamp] = (Stamp(),)
    comments: tuple[str, ...] = ()
    quality: tuple[str, ...] = ()
    preview_of: str | None = None


@dataclass(frozen=True)
class Series:
    """What all images of one series index share. ``window`` is in rescaled values, ``stored_window`` in codes."""

    number: int
    label: str
    image_type: int
    scaling: Scaling | None = None
    window: Window | None = None
    stored_window: Window | None = None
    display: MapDisplay | None = None
    used: set[int] = field(default_factory=set)


def image_header(series: Series, pixels: NDArray[Any], state: int, index: int, place: Place) -> np.void:
    """The MRD header of one image.

    Parameters
    ----------
    pixels
        ``(z, y, x)``.
    state, index
        The image's state, and its one-based number in the series.
    """
    head = np.zeros(1, IMAGE_HEADER)
    stamp = place.stamps[min(state, len(place.stamps) - 1)]
    head["version"], head["channels"], head["image_type"] = 1, 1, series.image_type
    head["data_type"] = DATA_TYPE_CODES[pixels.dtype]
    head["image_index"], head["image_series_index"] = index, series.number
    head["matrix_size"] = pixels.shape[::-1]
    head["field_of_view"] = field_of_view_mm(place.scan, pixels.shape)
    head["position"] = place.geometry.position
    head["read_dir"] = place.geometry.read_dir
    head["phase_dir"] = place.geometry.phase_dir
    head["slice_dir"] = place.geometry.slice_dir
    head["patient_table_position"] = place.geometry.table_position
    head["slice"] = place.scan.slice_index
    if series.display is None:  # a map belongs to all states
        counters = place.scan.state_counters
        own = counters[state] if state < len(counters) else {"contrast": state}
        for name in STATE_COUNTERS:
            head[name] = own.get(name, 0)
    head["measurement_uid"] = stamp.measurement_uid
    head["acquisition_time_stamp"] = stamp.acquisition_time_stamp
    head["physiology_time_stamp"] = stamp.physiology_time_stamp
    head["user_int"], head["user_float"] = stamp.user_int, stamp.user_float
    chosen: np.void = head[0]
    return chosen


def image_attributes(
    series: Series, chain: str, pixels: NDArray[Any], state: int, index: int, comments: Sequence[str], place: Place
) -> dict[str, MetaValue]:
    """The attributes of one image, in both key families."""
    said = _comments((chain, *comments, *place.comments))
    meta: dict[str, MetaValue] = {
        "DataRole": "Image",
        "ImageComments": said,
        "ImageComment": said,
        "ImageProcessingHistory": [MAKER, chain],
        "SequenceDescriptionAdditional": series.label,
        "SeriesDescriptionAdditional": series.label,
        "GADGETRON_SeqDescription": f"_{series.label}",
        "GADGETRON_ImageNumber": index,
        "ImageRowDir": direction_texts(place.geometry.read_dir),
        "ImageColumnDir": direction_texts(place.geometry.phase_dir),
        "ImageSliceDir": direction_texts(place.geometry.slice_dir),
        # 1: the console takes over the source slice's geometry; a slab is placed by its own header
        "Keep_image_geometry": 0 if len(pixels) > 1 else 1,
        "ReconQuality": place.quality,
        **_scaling_keys(series),
    }
    if series.display is not None:
        role = series.display.role
        meta |= {
            "DataRole": "Quantitative",
            "GADGETRON_DataRole": role,
            "ImageType": role.upper(),
            "ImageTypeValue4": role.upper(),
            "QuantityName": role,
            "QuantityUnit": series.display.unit,
            "Skip_processing_after_recon": 1,
            "Use_dedicated_scaling_factor": 1,
        }
    else:
        times = {
            "EchoTime": place.scan.echo_times,
            "InversionTime": place.scan.inversion_times,
            SATURATION_TIME: place.scan.saturation_times,
        }
        meta |= {key: round(1e3 * per_state[state], 6) for key, per_state in times.items() if state < len(per_state)}
    if place.preview_of is not None:
        # the fourth value of DICOM's ImageType, where a viewer looks for what an image is
        meta |= {PREVIEW_KEY: place.preview_of, "ImageTypeValue4": "PREVIEW"}
    return both_families(meta)


def is_preview(attributes: str) -> bool:
    """Whether an image's attributes say that final images follow it."""
    return f"<name>{PREVIEW_KEY}</name>" in attributes


def map_comment(display: MapDisplay, scaling: Scaling | None) -> str:
    """Gadgetron's way to state a scaling, for example ``T1_x1_1ms``: codes per unit, then units per code."""
    slope = 1.0 if scaling is None else scaling.slope
    unit = display.unit.removeprefix("1") if display.unit.startswith("1/") else display.unit
    times = "x" if unit[:1].isdigit() else ""  # 2 and 1e-3 are 2x1e-3, which is no 21e-3
    return f"{display.role}_x{1 / slope:g}_{slope:g}{times}{unit}"


def saturation_comment(count: int, total: int) -> tuple[str, ...]:
    """A word about clipped pixels, if there are any."""
    return (f"{count} of {total} pixels saturated",) if count else ()


def beyond_comment(count: int, total: int, display: MapDisplay, scaling: Scaling) -> tuple[str, ...]:
    """The same of a map, where a clipped pixel shows a value that it does not have."""
    low, high = (code * scaling.slope + scaling.intercept for code in (scaling.first, scaling.last))
    limits = f"{low:g} to {high:g} {display.unit}".rstrip()
    return (f"{count} of {total} pixels lie outside {limits} and show its end",) if count else ()


def _comments(texts: Sequence[str]) -> list[str]:
    kept: list[str] = []
    for text in (text[:MAX_COMMENT] for text in texts):
        if text and text not in kept and sum(map(len, kept)) + len(text) <= MAX_COMMENTS:
            kept.append(text)
    return kept


def _scaling_keys(series: Series) -> dict[str, MetaValue]:
    """Rescale and window for the console (rescaled values), ratio and window for Gadgetron (codes)."""
    keys: dict[str, MetaValue] = {}
    scaling = series.scaling
    if scaling is not None:
        per_unit = PHASE_UNITS_PER_RADIAN if series.image_type == PHASE else 1.0  # Gadgetron's phase is in rad
        keys |= {"GADGETRON_ScaleRatio": scaling.ratio * per_unit, "GADGETRON_ScaleOffset": scaling.offset}
        # a magnitude has arbitrary units: its window is in codes, which a tiny slope would round away
        if series.display is not None or series.image_type == PHASE:
            keys |= {"RescaleSlope": scaling.slope, "RescaleIntercept": scaling.intercept}
        if scaling.padding is not None:
            keys["PixelPaddingValue"] = scaling.padding
    if series.window is not None:
        stored = series.stored_window or series.window
        keys |= {"WindowCenter": series.window.center, "WindowWidth": series.window.width}
        keys |= {"GADGETRON_WindowCenter": stored.center, "GADGETRON_WindowWidth": stored.width}
    return keys
