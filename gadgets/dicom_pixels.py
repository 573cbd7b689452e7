"""Pixels of one DICOM series: how MRD pixels become 16-bit codes, and what a code means in the real world.

Two statements of the meaning are written. ``RescaleSlope``/``RescaleIntercept`` are what viewers show: ms, 1/s, ppb, in which
an integer window makes sense. ``RealWorldValueMapping`` is what software measures with: exact (two float64) and with coded
unit and quantity. A magnitude has no unit worth showing: a slope of 1e-8 would leave nothing of a window that viewers turn in
steps of one, so its scaling is in the RealWorldValueMapping alone.

Source: DICOM PS3.3 sections C.11.1 (Modality LUT) and C.7.6.16.2.11 (Real World Value Mapping); PS3.16 CID 7180 and 7181.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gadgets.dicom_identity import DicomError
from gadgets.image_attributes import MAGNITUDE, PHASE
from gadgets.meta import read_meta
from gadgets.windows import (
    MAP_DISPLAYS,
    PHASE_SCALING,
    PHASE_UNITS_PER_RADIAN,
    PHASE_WINDOW,
    Scaling,
    Window,
    magnitude_window,
    percentile_window,
)
from gadgets.wire.events import Image

Code = tuple[str, str, str]
"""Value, scheme and meaning."""

PHASE_SERIES = 2000
"""Added to the series index for the phase of complex images, whose magnitude keeps the index."""

LAST_CODE = 2**16 - 1
SAMPLES_PER_IMAGE = 4096
KEPT_SAMPLES = 2_000_000

QUANTITIES: dict[str, Code] = {
    "T1": ("113063", "DCM", "T1"),
    "T2": ("113065", "DCM", "T2"),
    "T2STAR": ("113064", "DCM", "T2*"),
    "R2STAR": ("126395", "DCM", "R2*"),
    "QSM": ("126396", "DCM", "Magnetic Susceptibility"),
    "M0": ("113058", "DCM", "Proton Density"),
    "FREQMAP": ("110807", "DCM", "Field Map MR Signal Intensity"),
    "SNR_MAP": ("113060", "DCM", "Signal to noise"),
}
"""CID 7180, by the role of our maps (GADGETRON_DataRole). Other roles have no code, and none is made up for them."""

MR_SIGNAL: Code = ("110852", "DCM", "MR signal intensity")
STANDARD_DEVIATION: Code = ("386136009", "SCT", "Standard Deviation")
DEVIATION_SUFFIX = "SD"

NO_UNIT: Code = ("1", "UCUM", "no units")
ARBITRARY: Code = ("[arb'U]", "UCUM", "arbitrary unit")
RADIAN: Code = ("rad", "UCUM", "radian")
UNITS: dict[str, tuple[Code, float]] = {
    "ms": (("ms", "UCUM", "millisecond"), 1.0),
    "1/s": (("/s", "UCUM", "/s"), 1.0),
    "ppb": (("ppm", "UCUM", "ppm"), 1e-3),  # CID 7181 has no ppb
    "Hz": (("Hz", "UCUM", "Hertz"), 1.0),
    "%": (("%", "UCUM", "Percent"), 1.0),
    "mrad": (RADIAN, 1e-3),
}
"""CID 7181: the console's unit to the coded one, and how many of the coded one it is."""


@dataclass(frozen=True)
class RealWorld:
    """``value = code * slope + intercept`` in ``unit``, for codes ``first..last``; ``deviation``: of the quantity."""

    slope: float
    intercept: float
    unit: Code
    quantity: Code | None
    deviation: bool = False
    first: int = 0
    last: int = LAST_CODE


@dataclass(frozen=True)
class PixelPlan:
    """How all pixels of one series are stored.

    Attributes
    ----------
    scaling
        How floating-point pixels are encoded; ``None``: the pixels are codes already.
    rescale
        Slope and intercept for viewers, ``None`` for images without a unit.
    window
        Of rescaled values.
    role
        Which map it is; "" for images.
    phase
        Codes wrap round instead of being clipped: pi and -pi are the same phase.
    """

    bits: int
    signed: bool = False
    scaling: Scaling | None = None
    rescale: tuple[float, float] | None = None
    real_world: RealWorld | None = None
    window: Window | None = None
    padding: int | None = None
    role: str = ""
    phase: bool = False

    def encode(self, pixels: NDArray[Any]) -> NDArray[np.uint16] | NDArray[np.int16]:
        """16-bit codes of one image's pixels (any shape); values that are not finite become the padding, else zero."""
        if self.scaling is None:
            return pixels.astype("<i2" if self.signed else "<u2", copy=False)
        if self.phase:
            units = np.nan_to_num(pixels) * (PHASE_UNITS_PER_RADIAN * self.scaling.ratio) + self.scaling.offset
            wrapped: NDArray[np.uint16] = (np.rint(units).astype(np.int64) % (self.scaling.last + 1)).astype("<u2")
            return wrapped
        values = np.where(np.isfinite(pixels), pixels, 0.0).astype(np.float64)
        # a float map says "no value here" with a zero
        valid = np.isfinite(pixels) & (pixels != 0) if self.padding is not None else None
        return self.scaling.encode(values, valid)[0]


Meta = Mapping[str, tuple[str, ...]]
Stated = tuple[str, ...]
"""What an image says of its scaling."""

_SCALING_KEYS = (
    "RescaleSlope", "RescaleIntercept", "GADGETRON_ScaleRatio", "GADGETRON_ScaleOffset", "PixelPaddingValue", "QuantityUnit",
)  # fmt: skip


@dataclass
class Survey:
    """What has to be known about a whole series before its first pixel is written.

    ``metas`` has one image's attributes for each scaling that images with something on them state.
    """

    image: Image
    first_meta: Meta
    metas: dict[Stated, Meta] = field(default_factory=dict)
    n_images: int = 0
    low: float = math.inf
    high: float = -math.inf
    samples: list[NDArray[np.float64]] = field(default_factory=list)
    moments: set[tuple[int, int]] = field(default_factory=set)
    contrasts: set[int] = field(default_factory=set)
    digest: Any = field(default_factory=hashlib.sha256)

    @property
    def meta(self) -> Meta:
        """Attributes that stand for the series: of the first image that shows anything. An empty one knows no scale yet."""
        return next(iter(self.metas.values()), self.first_meta)

    def add(self, image: Image) -> None:
        """Take one more image into account."""
        self.n_images += 1
        self.moments.add(moment(image.header))
        meta = read_meta(image.attributes)
        stated = stated_scaling(meta)
        if stated not in self.metas and not _is_empty(image, meta):
            self.metas[stated] = meta
        self.contrasts.add(int(image.header["contrast"]))
        self.digest.update(image.header.tobytes() + image.attributes.encode() + np.ascontiguousarray(image.data).tobytes())
        finite = image.data[np.isfinite(image.data)].astype(np.float64)
        if finite.size:
            self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
            if sum(map(len, self.samples)) < KEPT_SAMPLES:
                self.samples.append(finite[:: max(1, finite.size // SAMPLES_PER_IMAGE)])


def first(meta: Meta, *keys: str) -> str:
    """The first value of the first of ``keys`` that has one; else ""."""
    for key in keys:
        if meta.get(key, ("",))[0]:
            return meta[key][0]
    return ""


def number(meta: Meta, *keys: str) -> float | None:
    """As `first`, as a finite number; ``None`` where it is none."""
    try:
        value = float(first(meta, *keys))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def moment(header: Any) -> tuple[int, int]:
    """Where an image stands in time: repetition, and phase within it."""
    return int(header["repetition"]), int(header["phase"])


def stated_scaling(meta: Meta) -> Stated:
    """Equal for images whose pixels mean the same."""
    return tuple(first(meta, key) for key in _SCALING_KEYS)


def _is_empty(image: Image, meta: Meta) -> bool:
    """Whether nothing but pixels without a value, or zeros, is in it."""
    nothing = number(meta, "PixelPaddingValue") if image.data.dtype.kind in "iu" else None
    if nothing is None and number(meta, "RescaleIntercept") and image.data.dtype.kind in "iu":
        return False
    return not (image.data != (nothing or 0)).any()


def parts(images: Iterable[Image]) -> Iterator[Image]:
    """The images with real pixels; a complex one comes as magnitude and, in a series of its own, phase.

    Raises
    ------
    DicomError
        An image with several channels (coils or colours).
    """
    for image in images:
        if int(image.data.shape[0]) != 1:
            where = f"series {int(image.header['image_series_index'])}"
            raise DicomError("not a single-channel image", where=where, got=f"{image.data.shape[0]} channels", expected=1)
        if image.data.dtype.kind != "c":
            yield image
            continue
        magnitude, phase = image.header.copy(), image.header.copy()
        magnitude["image_type"], phase["image_type"] = MAGNITUDE, PHASE
        phase["image_series_index"] = int(phase["image_series_index"]) + PHASE_SERIES
        yield Image(image.offset, magnitude, image.attributes, np.abs(image.data))
        yield Image(image.offset, phase, image.attributes, np.angle(np.asarray(image.data, np.complex64)))


def survey(images: Iterable[Image]) -> dict[int, Survey]:
    """One survey for every series index."""
    found: dict[int, Survey] = {}
    for image in parts(images):
        index = int(image.header["image_series_index"])
        if index not in found:
            found[index] = Survey(image, read_meta(image.attributes))
        found[index].add(image)
    return found


def plan_pixels(seen: Survey) -> dict[Stated, PixelPlan]:
    """How the pixels of a series are stored, from what was seen of it: the first plan holds for the series, the others for
    images that state another scaling than its first."""
    stated = seen.metas or {stated_scaling(seen.first_meta): seen.first_meta}
    return {key: _plan(replace(seen, metas={key: meta})) for key, meta in stated.items()}


def _plan(seen: Survey) -> PixelPlan:
    kind, width = seen.image.data.dtype.kind, seen.image.data.dtype.itemsize
    quantitative = "Quantitative" in seen.meta.get("DataRole", ())
    role = first(seen.meta, "GADGETRON_DataRole", "QuantityName").upper() if quantitative else ""
    phase = int(seen.image.header["image_type"]) == PHASE
    if kind in "iu" and width <= 2:
        return _codes_plan(seen, role, phase)
    if phase and not role:
        mapping = _phase_mapping(PHASE_SCALING.slope, PHASE_SCALING.intercept, PHASE_SCALING.last)
        rescale = (PHASE_SCALING.slope, PHASE_SCALING.intercept)
        return PixelPlan(12, scaling=PHASE_SCALING, rescale=rescale, real_world=mapping, window=PHASE_WINDOW, phase=True)
    if role:
        return _float_map_plan(seen, role)
    scaling = _fitting_scaling(seen, 0.0, None)
    codes = np.concatenate(seen.samples or [np.zeros(1)]) / scaling.slope + scaling.offset
    window = percentile_window(codes) if seen.low < 0 else magnitude_window(codes)
    return PixelPlan(16, scaling=scaling, real_world=_signal(scaling.slope, scaling.intercept), window=window)


def _codes_plan(seen: Survey, role: str, phase: bool) -> PixelPlan:
    """Pixels that are 16-bit codes already; the attributes say what they mean."""
    meta, signed = seen.meta, seen.image.data.dtype.kind == "i"
    slope, intercept = number(meta, "RescaleSlope"), number(meta, "RescaleIntercept")
    ratio, offset = number(meta, "GADGETRON_ScaleRatio"), number(meta, "GADGETRON_ScaleOffset")
    stated = _meta_window(meta, "WindowCenter", "WindowWidth")
    padding = number(meta, "PixelPaddingValue")
    bits = 16 if signed or seen.high > 4095 else 12
    last = 2**15 - 1 if signed else 2**bits - 1
    common: dict[str, Any] = {"bits": bits, "signed": signed, "role": role, "window": stated}
    if padding is not None and (-(2**15) if signed else 0) <= padding <= last:
        common["padding"] = int(padding)
    if role and slope is None and ratio:  # Gadgetron's own maps: codes per unit
        slope, intercept = 1 / ratio, 0.0 - (offset or 0.0) / ratio
        common["window"] = None  # Gadgetron's is in codes
    if slope:
        base = intercept or 0.0
        mapping = _phase_mapping(slope, base, last) if phase and not role else _map_mapping(meta, role, slope, base, last)
        if common.get("padding") == 0:
            mapping = replace(mapping, first=1)  # what has no value is not mapped to one
        return PixelPlan(**common, rescale=(slope, base), real_world=mapping)
    if ratio:
        return PixelPlan(**common, real_world=_signal(1 / ratio, 0.0 - (offset or 0.0) / ratio, last))
    return PixelPlan(**common)


def _float_map_plan(seen: Survey, role: str) -> PixelPlan:
    """A map in console units: 65535 codes in the step that consoles use for it, coarser only where it would not fit."""
    known = {display.role.upper(): display for display in MAP_DISPLAYS.values()}.get(role)
    step = known.slope if known is not None and not known.arbitrary else None
    scaling = _fitting_scaling(seen, 1.0, step, signed=known is not None and known.signed)
    rescale = (scaling.slope, scaling.intercept)
    window = _meta_window(seen.meta, "WindowCenter", "WindowWidth")
    mapping = replace(_map_mapping(seen.meta, role, *rescale, LAST_CODE), first=scaling.first)
    return PixelPlan(16, scaling=scaling, rescale=rescale, real_world=mapping, window=window, padding=0, role=role)


def _fitting_scaling(seen: Survey, reserved: float, step: float | None, *, signed: bool = False) -> Scaling:
    """A scale that holds every pixel of the series: nothing is clipped. Slopes are ``step`` times a power of two."""
    signed = signed or seen.low < 0
    span = max(abs(seen.low), abs(seen.high)) if math.isfinite(seen.low) else 0.0
    room = (2**15 - 1 if signed else LAST_CODE) - reserved
    slope = step or 1.0
    if span > 0 and (step is None or span > slope * room):
        slope *= 2.0 ** math.ceil(math.log2(span / (room * slope)))
    middle = 2**15 if signed else 0
    return Scaling(slope, 0.0 - slope * middle, first=int(reserved), last=LAST_CODE, padding=0 if reserved else None)


def _signal(slope: float, intercept: float, last: int = LAST_CODE) -> RealWorld:
    return RealWorld(slope, intercept, ARBITRARY, MR_SIGNAL, last=last)


def _phase_mapping(slope: float, intercept: float, last: int) -> RealWorld:
    return RealWorld(slope / PHASE_UNITS_PER_RADIAN, intercept / PHASE_UNITS_PER_RADIAN, RADIAN, None, last=last)


def _map_mapping(meta: Meta, role: str, slope: float, intercept: float, last: int) -> RealWorld:
    unit = first(meta, "QuantityUnit")
    known = {display.role.upper(): display for display in MAP_DISPLAYS.values()}.get(role)
    if not unit and known is not None:
        unit = known.unit
    arbitrary = (known is not None and known.arbitrary) or (unit not in UNITS and unit != "")
    # a power of 1000 in place of a unit: of the images' own, in which they are measured as well
    code, factor = (ARBITRARY, _power(unit)) if arbitrary else UNITS.get(unit, (NO_UNIT, 1.0))
    plain = role.removesuffix(DEVIATION_SUFFIX)
    deviation = plain != role and plain in QUANTITIES
    quantity = QUANTITIES.get(plain if deviation else role)
    return RealWorld(slope * factor, intercept * factor, code, quantity, deviation, last=last)


def _power(unit: str) -> float:
    try:
        power = float(unit)
    except ValueError:
        return 1.0
    return power if math.isfinite(power) and power > 0 else 1.0


def _meta_window(meta: Meta, center: str, width: str) -> Window | None:
    c, w = number(meta, center), number(meta, width)
    return None if c is None or w is None or w < 1 else Window(round(c), round(w))
