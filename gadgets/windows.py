"""Pixel codes and display windows: how values become the integers that consoles store and show.

Consoles keep 12 bits (0..4095) or 16 bits per pixel, apply ``value = code * RescaleSlope + RescaleIntercept`` and read the
window, in *rescaled* values, as integers: a fractional window is cut to 0, 1 or 2. So each quantity gets a display unit
in which integers are fine enough (ms, 1/s, ppb, %), a slope that is the same for every slice and every scan, and an
integer window. Gadgetron states the same scaling the other way round, ``code = value * ScaleRatio + ScaleOffset``, and
its window in codes.

Source: ISMRMRD ``doc/mrd_image_data.md``; Gadgetron's CMR mapping gadgets (T1: 1 ms per code, window 1300/1300); QSMxT's
OpenRecon notes (ppb, code 0 as padding).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from recon_core.errors import DataError

MAX_SAMPLES = 1_000_000
"""Percentiles are taken from at most about this many pixels, evenly strided: windows need no more."""


@dataclass(frozen=True)
class Window:
    """What is shown between black and white; integers, because consoles read them as such."""

    center: int
    width: int

    @property
    def limits(self) -> tuple[float, float]:
        return self.center - self.width / 2, self.center + self.width / 2


@dataclass(frozen=True)
class Scaling:
    """``value = code * slope + intercept`` for codes ``first..last``; ``padding`` marks pixels without a value."""

    slope: float
    intercept: float
    first: int
    last: int
    padding: int | None = None

    @property
    def ratio(self) -> float:
        """Gadgetron's ScaleRatio: codes per unit."""
        return 1.0 / self.slope

    @property
    def offset(self) -> float:
        """Gadgetron's ScaleOffset: the code of the value zero."""
        return 0.0 - self.intercept / self.slope  # not -0.0, which some readers take for text

    def encode(self, values: NDArray[np.floating], valid: NDArray[np.bool_] | None = None) -> tuple[NDArray[np.uint16], int]:
        """Codes of ``values`` (any shape) and how many valid pixels did not fit and were set to the nearest code.

        A value that misses the range by no more than one step is not counted: zero is stored as code 1 where code 0 is
        the padding, and that is no loss of range.
        """
        usable = np.isfinite(values) if valid is None else valid & np.isfinite(values)
        exact = (np.where(usable, values, self.intercept) - self.intercept) * self.ratio
        codes = np.clip(np.rint(exact), self.first, self.last)
        saturated = int(np.count_nonzero(usable & (np.abs(codes - exact) > 1.0 + 1e-6)))
        if self.padding is not None:
            codes = np.where(usable, codes, self.padding)
        return codes.astype(np.uint16), saturated

    def decode(self, codes: NDArray[np.integer]) -> NDArray[np.float32]:
        """Values of ``codes``; the padding code becomes NaN."""
        values = codes.astype(np.float32) * np.float32(self.slope) + np.float32(self.intercept)
        return values if self.padding is None else np.where(codes == self.padding, np.float32(np.nan), values)

    def stored_window(self, window: Window) -> Window:
        """``window`` of values as a window of codes."""
        return Window(round((window.center - self.intercept) * self.ratio), max(1, round(window.width * self.ratio)))


PHASE_SCALING = Scaling(slope=2.0, intercept=-4096.0, first=0, last=4095)
"""Phase images: codes 0..4095 are -pi..pi in steps of pi/2048. The rescaled value is the phase in units of pi/4096 rad, the
convention of Siemens' own phase images that every converter knows (and an integer window fits: 0/8192)."""

PHASE_UNITS_PER_RADIAN = 4096.0 / math.pi
PHASE_WINDOW = Window(0, 8192)


@dataclass(frozen=True)
class MapDisplay:
    """How one quantity is stored and shown.

    Attributes
    ----------
    role
        Gadgetron's name of the quantity (GADGETRON_DataRole), also DICOM's ImageType value 4: capitals, at most 16.
    si_unit
        The unit in which methods deliver it (``ParameterMap.unit``).
    unit, factor
        The console's unit, and how many of it one SI unit is.
    slope
        Console units per code.
    window
        In console units; ``None``: 1st to 99th percentile of the first slice.
    signed
        Codes are centred: the middle code is zero. Otherwise code 0 would be the value 0, and is the padding.
    adaptive
        The slope is doubled (up to 16 times) when the first slice or volume does not fit; a later slice that does not begins a series.
    arbitrary
        The quantity has the images' own unit: slope and factor (a power of 1000, named in the unit) follow the first slice, and
        the window goes from zero to its 99th percentile; a later slice that does not fit begins a series.
    """

    role: str
    si_unit: str
    unit: str
    factor: float
    slope: float
    window: Window | None = None
    signed: bool = False
    adaptive: bool = False
    arbitrary: bool = False

    def scaling(self, bits: int) -> Scaling:
        """Codes ``1 .. 2^bits - 1``; 0 is the padding."""
        middle = 2 ** (bits - 1) if self.signed else 0
        return Scaling(self.slope, 0.0 - self.slope * middle, first=1, last=2**bits - 1, padding=0)


MAP_DISPLAYS = {
    # recommended windows of T1 at 1.5 T; `map_display` has the one for 3 T
    "t1": MapDisplay("T1", "s", "ms", 1e3, 1.0, Window(1300, 1300), adaptive=True),  # fluid at 3 T: beyond 4095 ms
    "t1sd": MapDisplay("T1SD", "s", "ms", 1e3, 1.0, Window(100, 200)),
    "m0": MapDisplay("M0", "1", "", 1.0, 1.0, Window(1000, 2000), arbitrary=True),
    "m0phase": MapDisplay("M0_PHASE", "rad", "mrad", 1e3, 2.0, Window(0, 6283), signed=True),  # -pi to pi
    "t1residual": MapDisplay("T1RESIDUAL", "1", "", 1.0, 1.0, Window(50, 100), arbitrary=True),
    "t2": MapDisplay("T2", "s", "ms", 1e3, 0.1, Window(60, 120)),
    "t2star": MapDisplay("T2STAR", "s", "ms", 1e3, 0.1, Window(40, 80)),
    "r2star": MapDisplay("R2STAR", "1/s", "1/s", 1.0, 0.1, Window(50, 100)),
    "r2starsd": MapDisplay("R2STARSD", "1/s", "1/s", 1.0, 0.1, Window(10, 20)),
    "s0": MapDisplay("S0", "1", "", 1.0, 1.0, Window(1000, 2000), arbitrary=True),
    "chi": MapDisplay("QSM", "ppm", "ppb", 1e3, 0.5, Window(0, 300), signed=True, adaptive=True),
    "chisd": MapDisplay("QSMSD", "ppm", "ppb", 1e3, 0.5, Window(50, 100)),
    "field": MapDisplay("FREQMAP", "Hz", "Hz", 1.0, 0.5, Window(0, 400), signed=True, adaptive=True),
    "localfield": MapDisplay("LOCALFIELD", "Hz", "Hz", 1.0, 0.1, Window(0, 40), signed=True, adaptive=True),
    "brainmask": MapDisplay("BRAINMASK", "1", "", 1.0, 1.0, Window(1, 2)),
    "b1": MapDisplay("B1MAP", "1", "%", 1e2, 0.1, Window(100, 100)),
    "confidence": MapDisplay("CONFIDENCE", "1", "%", 1e2, 0.1, Window(50, 100)),
    "snr": MapDisplay("SNR_MAP", "1", "", 1.0, 0.1, Window(50, 100)),
    "gfactor": MapDisplay("Gfactor", "1", "%", 1e2, 0.1, Window(150, 200)),
}
"""One line per quantity, keyed by `map_key` of the map's name."""

SYNONYMS = {
    "qsm": "chi",
    "susceptibility": "chi",
    "t2s": "t2star",
    "r2s": "r2star",
    "b0": "field",
    "fieldmap": "field",
    "frequency": "field",
    "b1plus": "b1",
    "t1std": "t1sd",
    "r2starstd": "r2starsd",
    "chistd": "chisd",
    "qsmsd": "chisd",
}

USUAL_BITS = 12
T1_WINDOW_3T = Window(1600, 1600)
FIELD_3T = 2.2  # T; above it the longer T1 of 3 T systems is expected

# console unit, factor and sign for quantities that the table does not know
GENERIC_UNITS = {"s": ("ms", 1e3), "ppm": ("ppb", 1e3), "1": ("%", 1e2), "": ("%", 1e2), "rad": ("mrad", 1e3)}


def map_key(name: str) -> str:
    """The table's key for a map's name: ``"R2*"`` and ``"r2_star"`` are ``"r2star"``."""
    plain = "".join(c for c in name.lower().replace("*", "star") if c.isalnum())
    return SYNONYMS.get(plain, plain)


def map_display(
    name: str, unit: str, values: NDArray[np.floating], field_strength: float | None, bits: int = USUAL_BITS
) -> MapDisplay:
    """How a map is stored and shown.

    Parameters
    ----------
    name, unit
        The map's name and SI unit.
    values
        Its believable pixels in SI units, any shape; they decide on the scaling of unknown quantities and on whether an
        adaptive one has to be widened.
    field_strength
        T; only the window of T1 depends on it, and an unknown one is shown as at 1.5 T.
    bits
        Of the codes. More than the usual 12 hold more at the same step; with fewer every quantity is adaptive.

    Raises
    ------
    DataError
        A known quantity in a unit that is not the one methods have to deliver it in.
    """
    known = MAP_DISPLAYS.get(map_key(name))
    display = _generic_display(name, unit, values, bits) if known is None else known
    if display.si_unit != unit and not (display.si_unit == "1" and unit == ""):
        raise DataError("map in an unexpected unit", where=f"map {name}", got=repr(unit), expected=repr(display.si_unit))
    if display.role == "T1" and field_strength is not None and field_strength > FIELD_3T:
        display = replace(display, window=T1_WINDOW_3T)
    if display.arbitrary:
        return _own_unit(display, values, bits)
    if (display.adaptive or bits < USUAL_BITS) and values.size:
        # the percentile: a few wild pixels at an edge must not cost everybody else's resolution
        peak = _percentiles(np.abs(values), (99.9,))[0] * display.factor
        slope, last = display.slope, 2 ** (bits - 1 if display.signed else bits) - 1
        while peak > slope * last and slope < 16 * display.slope:
            slope *= 2
        display = replace(display, slope=slope, adaptive=True)
    return display


def _own_unit(display: MapDisplay, values: NDArray[np.floating], bits: int) -> MapDisplay:
    """The images' own unit, or thousandths or thousands of it: the peak lies between 100 and 100 000, where integers are fine
    enough for a window. The slope is a power of two that leaves later slices at least twice as much room."""
    peak = _percentiles(np.abs(values), (99.9,))[0] if values.size else 0.0
    if not (math.isfinite(peak) and peak > 0):
        return display
    power = -math.floor((math.log10(peak) - 2) / 3) if not 100 <= peak < 1e5 else 0
    factor = 1000.0**power
    top = _percentiles(values, (99.0,))[0] * factor
    return replace(
        display,
        unit="" if power == 0 else f"1e{-3 * power}",
        factor=factor,
        slope=2.0 ** math.ceil(math.log2(2 * peak * factor / (2**bits - 1))),
        window=integer_window(0.0, top),
    )


def _generic_display(name: str, unit: str, values: NDArray[np.floating], bits: int) -> MapDisplay:
    shown, factor = GENERIC_UNITS.get(unit, (unit, 1.0))
    low, high = (float(values.min()) * factor, float(values.max()) * factor) if values.size else (0.0, 1.0)
    signed = low < 0
    peak = max(abs(low), abs(high)) * (2 if signed else 1)
    # a power of ten, with at least a factor of two left for the slices to come
    slope = 10.0 ** math.ceil(math.log10(2 * peak / (2**bits - 1))) if peak > 0 else 1.0
    role = "".join(c for c in name.upper().replace("*", "STAR") if c.isalnum() or c == "_")[:16]
    return MapDisplay(role or "MAP", unit, shown, factor, slope, signed=signed)


def integer_window(low: float, high: float) -> Window | None:
    """The integer window that reaches from ``low`` to ``high``; ``None`` where integers are too coarse (under 16 steps)."""
    if not (math.isfinite(low) and math.isfinite(high)) or high - low < 16 or max(abs(low), abs(high)) > 2**30:
        return None
    return Window(round((low + high) / 2), round(high - low))


def percentile_window(values: NDArray[np.number], low: float = 1.0, high: float = 99.0) -> Window | None:
    """Window from the percentiles of all values that are not zero (background and padding are), or ``None``."""
    inside = values[values != 0]
    if inside.size == 0:
        return None
    bottom, top = _percentiles(inside, (low, high))
    return integer_window(bottom, top)


def magnitude_window(values: NDArray[np.number]) -> Window | None:
    """Window for a magnitude: from zero, which is black everywhere, to the 99.5th percentile of what is not zero."""
    inside = values[values > 0]
    return integer_window(0.0, _percentiles(inside, (99.5,))[0]) if inside.size else None


def magnitude_scaling(values: NDArray[np.floating], bits: int) -> Scaling:
    """A scaling for a whole magnitude series from its first slice (all states).

    The slope is the power of two that puts the peak between a quarter and a half of the code range: later slices may be
    at least twice as bright before a pixel saturates, and a slice in the same power-of-two range gives the same slope, so
    it hardly matters which one comes first. The peak is the maximum or, where single pixels stick out, twice the 99.9th
    percentile.
    """
    peak = float(values.max()) if values.size else 0.0
    if peak > 0:
        reference = _percentiles(values, (99.9,))[0]
        peak = min(peak, 2 * reference) if reference > 0 else peak
    last = 2**bits - 1
    slope = 2.0 ** math.ceil(math.log2(2 * peak / last)) if peak > 0 else 1.0
    return Scaling(slope, 0.0, first=0, last=last)


def _percentiles(values: NDArray[np.number], ranks: tuple[float, ...]) -> list[float]:
    flat = values.reshape(-1)
    flat = flat[:: max(1, flat.size // MAX_SAMPLES)]
    return [float(p) for p in np.percentile(flat, ranks)]
