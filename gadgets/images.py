"""Results -> MRD image messages: geometry, counters, series, pixel codes, windows and attributes in both key families.

One series index stands for one (meaning, matrix, pixel type, number of states): a client that meets two matrix sizes in one
series aborts. Scaling and window are fixed by the first slice that is sent and hold for the whole series, so the first image
leaves as soon as its slice is done and the slices of a stack still look alike. For that the first slice should be a typical
one: `sending_order` begins in the middle of the stack.

Source: ISMRMRD ``doc/mrd_image_data.md``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gadgets.geometry import Geometry
from gadgets.handlers import PREVIEW_SERIES
from gadgets.image_attributes import (
    COMPLEX,
    MAGNITUDE,
    PHASE,
    Place,
    Series,
    Stamp,
    beyond_comment,
    image_attributes,
    image_header,
    map_comment,
    read_stamp,
    saturation_comment,
)
from gadgets.meta import write_meta
from gadgets.sorted_scan import SortedScan
from gadgets.windows import (
    PHASE_SCALING,
    PHASE_UNITS_PER_RADIAN,
    PHASE_WINDOW,
    USUAL_BITS,
    magnitude_scaling,
    magnitude_window,
    map_display,
    percentile_window,
)
from gadgets.wire import codec
from gadgets.wire.events import Image
from gadgets.wire.header import MrdHeader
from recon_core.errors import DataError, NumericalError, SettingError
from recon_core.settings import setting
from recon_core.types import ImageSeries, ParameterMap, Result, ScanInfo

Comments = tuple[str, ...]

DEFAULT_BITS = USUAL_BITS
MAX_IMAGE_INDEX = 65535
MAX_CLIPPED = 1e-3
"""Fraction of a slice's pixels that may be clipped by the scale of its series before a new series is begun."""


@dataclass(frozen=True)
class OutputSettings:
    """Which images are sent, and in which pixels.

    ``auto`` asks the header: a console that converts MRD images into DICOM states its ``BitsStored`` and gets integers with
    an integer window; a Gadgetron client or a file gets float32, unscaled, as from Gadgetron's own default chain.
    """

    magnitude: bool = setting(True, "send magnitude images")
    phase: bool = setting(False, "send phase images (float32: rad; uint16: 0..4095 for -pi..pi)")
    complex: bool = setting(False, "send complex images (complex64, unscaled)")
    pixel_type: str = setting(
        "auto",
        "pixels of magnitude and phase; auto: uint16 if the header has BitsStored, else float32",
        choices=("auto", "uint16", "float32"),
    )
    map_pixel_type: str = setting("uint16", "pixels of maps, in console units when float32", choices=("uint16", "float32"))
    bits_stored: int = setting(0, "bits of integer pixels; 0: BitsStored of the header, else 12", low=0, high=16)
    preview: str = setting(
        "auto",
        "images sent ahead of the final ones; auto: those that the method makes; off: none; or the name of a quick chain",
    )
    preview_iterations: int = setting(3, "most iterations of a quick chain's preview", low=1, high=100)


class ImageWriter:
    """Turns the results of one scan into image messages, slice by slice, in any order of slices.

    Parameters
    ----------
    header
        For ``BitsStored`` and the field strength.
    chain
        Name of the chain, part of every series description.
    settings
        What to send.
    first_series
        The first image series index; further series count up from it.
    fallback_of
        The chain that failed and for which these images stand in; said in every image.
    preview_of
        The chain whose final images follow; said in every image.
    changed
        Settings that the operator chose differently from the chain's own; said in every image.
    cut
        How the scan broke off, if it did; said in every image.

    Raises
    ------
    SettingError
        ``bits_stored`` that is neither 0 nor 8..16.
    """

    def __init__(
        self,
        header: MrdHeader,
        chain: str,
        settings: OutputSettings | None = None,
        *,
        first_series: int = 1,
        fallback_of: str | None = None,
        preview_of: str | None = None,
        changed: Mapping[str, str] | None = None,
        cut: str = "",
    ) -> None:
        self.header, self.chain, self.settings = header, chain, settings or OutputSettings()
        self.changed, self.cut = dict(changed or {}), cut
        self.fallback_of, self.preview_of = fallback_of, preview_of
        self._first_series = first_series
        self._numbers = _Numbers(first_series)
        self._known: dict[tuple[object, ...], Series] = {}
        self._undecided: set[tuple[object, ...]] = set()  # keys of `_known`: series whose slices so far are all empty
        stated = header.user_long.get("BitsStored")
        if self.settings.bits_stored and not 8 <= self.settings.bits_stored <= 16:
            got = self.settings.bits_stored
            raise SettingError("not a usable number of bits", where="output.bits_stored", got=got, expected="0 or 8 to 16")
        usable = stated if stated is not None and 8 <= stated <= 16 else None
        self.bits = self.settings.bits_stored or usable or DEFAULT_BITS
        integers = stated is not None if self.settings.pixel_type == "auto" else self.settings.pixel_type == "uint16"
        self.pixel_type = np.dtype("<u2") if integers else np.dtype("<f4")

    def for_fallback(self, chain: str) -> ImageWriter:
        """A writer for another chain's images of the same scan. The two share one count of series, so they never collide."""
        other = ImageWriter(self.header, chain, self.settings, fallback_of=self.chain, changed=self.changed, cut=self.cut)
        other._numbers = self._numbers
        return other

    def for_previews(self, chain: str, *, beside: ImageWriter | None = None) -> ImageWriter:
        """A writer for quick images of the same scan by ``chain``.

        Its series count from 1000 above these, so whether there are previews changes nothing about the final images.
        ``beside`` is another writer of previews, with which it shares the count.
        """
        first = PREVIEW_SERIES + self._first_series
        other = ImageWriter(
            self.header, chain, self.settings, first_series=first, preview_of=self.chain, changed=self.changed, cut=self.cut
        )
        if beside is not None:
            other._numbers = beside._numbers
        return other

    def events(
        self,
        result: Result,
        scan: ScanInfo,
        geometry: Geometry,
        *,
        position: int | None = None,
        stamps: Sequence[Stamp] = (),
    ) -> Iterator[Image]:
        """The images of one slice or slab: magnitude, phase, complex, then the maps.

        Parameters
        ----------
        result
            Image series ``(state, z, y, x)`` and maps ``(z, y, x)``.
        scan
            Matrices, fields of view, times and counters of this slice.
        geometry
            Its place.
        position
            Its place in the stack from 0, which decides on ``image_index``; default: the slice counter.
        stamps
            One per state, or one for all.

        Raises
        ------
        DataError
            Arrays that do not fit the header's matrices, a map in a wrong unit, or nothing to send.
        NumericalError
            An image with values that are not finite (in a map they are pixels without a value).
        """
        place = Place(
            scan=scan,
            geometry=geometry,
            position=scan.slice_index if position is None else position,
            stamps=stamps or (Stamp(),),
            comments=(*self._standing(), *self._chosen(), *result.notes, *geometry.notes),
            quality=tuple(f"{name}={value:.4g}" for name, value in result.quality.items()),
            preview_of=self.preview_of,
        )
        sent = 0
        parts = [self._images(s, place) for s in result.images] + [self._map(m, place) for m in result.maps]
        for image in itertools.chain.from_iterable(parts):
            sent += 1
            yield image
        if not sent:
            raise DataError("nothing to send", where=f"slice {place.position}", expected="an image series or a map")

    def messages(
        self,
        result: Result,
        scan: ScanInfo,
        geometry: Geometry,
        *,
        position: int | None = None,
        stamps: Sequence[Stamp] = (),
    ) -> Iterator[bytes]:
        """`events`, encoded for the wire."""
        for image in self.events(result, scan, geometry, position=position, stamps=stamps):
            yield codec.image(image.header, image.attributes, image.data)

    def images(self, sorted_scan: SortedScan, position: int, result: Result) -> Iterator[bytes]:
        """The messages of slice number ``position`` of a sorted scan, which knows its geometry and time stamps."""
        stamps = [read_stamp(header) for header in sorted_scan.source_headers[position]]
        scan, geometry = sorted_scan.scan_info(position), sorted_scan.geometry[position]
        yield from self.messages(result, scan, geometry, position=position, stamps=stamps)

    def _images(self, series: ImageSeries, place: Place) -> Iterator[Image]:
        data = _array(series.data)
        where = f"image series {series.name}"
        if data.ndim != 4 or 0 in data.shape:
            raise DataError("not an image series", where=where, got=data.shape, expected="(state, z, y, x)")
        if not np.isfinite(data).all():
            bad = int(np.count_nonzero(~np.isfinite(data)))
            raise NumericalError(f"{bad} of {data.size} pixels are not finite", where=where, expected="numbers")
        complex_data = np.iscomplexobj(data)
        wanted = self.settings
        comments: Comments = (series.comment,)
        if not complex_data and (wanted.phase or wanted.complex):
            comments += ("only the magnitude exists",)
        if wanted.magnitude or not complex_data:
            yield from self._magnitude(series.name, np.abs(data) if complex_data else data, comments, place)
        if wanted.phase and complex_data:
            yield from self._phase(series.name, np.angle(data), comments, place)
        if wanted.complex and complex_data:
            data = data.astype(np.complex64, copy=False)
            label = self._label(series.name, "complex")
            chosen = self._series("complex", series.name, data.shape, data.dtype, lambda n: Series(n, label, COMPLEX))
            yield from self._emit(chosen, data, comments, place)

    def _magnitude(self, name: str, data: NDArray[Any], comments: Comments, place: Place) -> Iterator[Image]:
        label = self._label(name, "")
        if self.pixel_type.kind == "f":
            pixels: NDArray[Any] = data.astype(np.float32, copy=False)

            def begin(number: int) -> Series:
                return Series(number, label, MAGNITUDE, window=magnitude_window(pixels))

            chosen = self._series("magnitude", name, pixels.shape, pixels.dtype, begin, empty=not pixels.any())
        else:

            def begin_scaled(number: int) -> Series:
                scaling = magnitude_scaling(data, self.bits)
                window = magnitude_window(scaling.encode(data)[0])
                return Series(number, label, MAGNITUDE, scaling=scaling, window=window, stored_window=window)

            chosen = self._series("magnitude", name, data.shape, self.pixel_type, begin_scaled, empty=not data.any())
            assert chosen.scaling is not None
            pixels, saturated = chosen.scaling.encode(data)
            if saturated > MAX_CLIPPED * pixels.size:
                # cutting off anatomy is worse than a second series: go on with a coarser scale
                chosen = self._series("magnitude", name, data.shape, self.pixel_type, begin_scaled, fresh=True)
                assert chosen.scaling is not None
                pixels, saturated = chosen.scaling.encode(data)
                comments += ("brighter than the slices before: new series with its own scale",)
            comments += saturation_comment(saturated, pixels.size)
        yield from self._emit(chosen, pixels, comments, place)

    def _phase(self, name: str, radians: NDArray[Any], comments: Comments, place: Place) -> Iterator[Image]:
        label = self._label(name, "phase")
        if self.pixel_type.kind == "f":
            pixels: NDArray[Any] = radians.astype(np.float32, copy=False)
            chosen = self._series("phase", name, pixels.shape, pixels.dtype, lambda n: Series(n, label, PHASE))
            comments += ("rad",)
        else:
            # pi and -pi are the same phase: wrapping, not clipping, is exact
            units = radians * (PHASE_UNITS_PER_RADIAN * PHASE_SCALING.ratio) + PHASE_SCALING.offset
            pixels = (np.rint(units).astype(np.int64) % (PHASE_SCALING.last + 1)).astype(np.uint16)
            stored = PHASE_SCALING.stored_window(PHASE_WINDOW)

            def begin(number: int) -> Series:
                return Series(number, label, PHASE, PHASE_SCALING, PHASE_WINDOW, stored)

            chosen = self._series("phase", name, pixels.shape, pixels.dtype, begin)
            comments += ("rescaled value in pi/4096 rad",)
        yield from self._emit(chosen, pixels, comments, place)

    def _map(self, parameter: ParameterMap, place: Place) -> Iterator[Image]:
        values, valid = _array(parameter.data), _array(parameter.valid).astype(bool)
        where = f"map {parameter.name}"
        if values.ndim != 3 or valid.shape != values.shape or np.iscomplexobj(values):
            raise DataError("not a map", where=where, got=(values.shape, valid.shape), expected="real (z, y, x), twice")
        broken = int(np.count_nonzero(valid & ~np.isfinite(values)))
        valid = valid & np.isfinite(values)
        stored_as = np.dtype("<u2" if self.settings.map_pixel_type == "uint16" else "<f4")
        bits = self.bits if stored_as.kind == "u" else DEFAULT_BITS

        def begin(number: int) -> Series:
            display = map_display(parameter.name, parameter.unit, values[valid], self.header.field_strength, bits)
            window = display.window or percentile_window(values[valid] * display.factor)
            label = self._label(display.role, "")
            if stored_as.kind == "f":
                return Series(number, label, MAGNITUDE, window=window, stored_window=window, display=display)
            scaling = display.scaling(self.bits)
            stored = None if window is None else scaling.stored_window(window)
            return Series(number, label, MAGNITUDE, scaling, window, stored, display)

        frame = np.empty((1, *values.shape), stored_as)
        chosen = self._series("map", parameter.name, frame.shape, stored_as, begin, empty=not valid.any())
        display, scaling = chosen.display, chosen.scaling
        assert display is not None
        shown = np.where(valid, values, 0.0) * display.factor
        told: Comments = ()
        if scaling is None:
            frame[0] = shown
        else:
            frame[0], beyond = scaling.encode(shown, valid)
            if (display.adaptive or display.arbitrary) and beyond > MAX_CLIPPED * valid.sum():
                wider = map_display(parameter.name, parameter.unit, values[valid], self.header.field_strength, bits)
                if wider.slope / wider.factor > display.slope / display.factor:
                    chosen = self._series("map", parameter.name, frame.shape, stored_as, begin, fresh=True)
                    display, scaling = chosen.display, chosen.scaling
                    assert display is not None and scaling is not None
                    frame[0], beyond = scaling.encode(np.where(valid, values, 0.0) * display.factor, valid)
                    told = ("larger values than the slices before: new series with its own scale",)
            told += beyond_comment(beyond, int(valid.sum()), display, scaling)
        comments: Comments = (map_comment(display, scaling), parameter.comment, *told)
        if broken:
            comments += (f"{broken} values were not finite",)
        yield from self._emit(chosen, frame, comments, place)

    def _series(
        self,
        kind: str,
        name: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        begin: Callable[[int], Series],
        *,
        fresh: bool = False,
        empty: bool = False,
    ) -> Series:
        """The series of images of this meaning, ``(state, z, y, x)`` and pixel type; begun if they are its first.

        An ``empty`` slice shows nothing that could decide on scale and window: the first one that does gives them to the series.
        """
        key = (kind, name, shape, dtype.str)
        if fresh or key not in self._known:
            self._known[key] = begin(self._numbers.take())
            if empty:
                self._undecided.add(key)
        elif key in self._undecided and not empty:
            before = self._known[key]
            self._known[key] = replace(begin(before.number), used=before.used)
            self._undecided.remove(key)
        chosen = self._known[key]
        if len(chosen.used) + shape[0] > MAX_IMAGE_INDEX:
            chosen = self._known[key] = begin(self._numbers.take())
        return chosen

    def _emit(self, series: Series, frames: NDArray[Any], comments: Comments, place: Place) -> Iterator[Image]:
        if series.display is None and len(frames) < len(place.scan.state_counters):
            place = replace(place, scan=_without_states(place.scan))
        for state, pixels in enumerate(frames):
            index = place.position * len(frames) + state + 1
            if index in series.used or index > MAX_IMAGE_INDEX:
                index = _free(series.used)
            series.used.add(index)
            text = write_meta(image_attributes(series, self.chain, pixels, state, index, comments, place))
            header = image_header(series, pixels, state, index, place)
            header["attribute_string_len"] = len(text)
            yield Image(offset=0, header=header, attributes=text, data=np.ascontiguousarray(pixels[np.newaxis]))

    def _label(self, name: str, suffix: str) -> str:
        chain = self.preview_of or self.chain
        if self.fallback_of is not None:
            chain += f"_instead_of_{self.fallback_of}"
        unnamed = (self.chain, "image", "images", "magnitude", "preview")
        parts = [chain, "" if name.lower() in unnamed else name, suffix, "INCOMPLETE" if self.cut else ""]
        parts.append("PREVIEW" if self.preview_of is not None else "")
        return "_".join(part for part in parts if part)

    def _chosen(self) -> tuple[str, ...]:
        """What the operator chose differently: one comment, as long as one may be."""
        return (", ".join(f"{name}={value}" for name, value in self.changed.items()),) if self.changed else ()

    def _standing(self) -> tuple[str, ...]:
        """What these images are when they are not the ones that were asked for."""
        said = (f"incomplete: {self.cut}",) if self.cut else ()
        if self.preview_of is not None:
            return (*said, f"preview by {self.chain}: the final images of {self.preview_of} follow")
        return said if self.fallback_of is None else (*said, f"{self.fallback_of} failed: image from {self.chain} instead")


def sending_order(n_slices: int, *, scaled: bool) -> tuple[int, ...]:
    """Positions in the stack in the order in which their images leave.

    Unscaled (float32) images go as acquired: clients write them to a file as they come. Where the first slice fixes the scale of
    the whole series (``scaled``), the middle one goes first: it is the brightest, and its scale and window fit the others.
    ``image_index`` follows the position either way.
    """
    if not scaled:
        return tuple(range(n_slices))
    middle = n_slices // 2
    return (middle, *(n for n in range(n_slices) if n != middle))


def _without_states(scan: ScanInfo) -> ScanInfo:
    """For images that combine states: they have no state's counters and times."""
    return replace(scan, state_counters=(), echo_times=(), inversion_times=(), saturation_times=())


def _free(used: set[int]) -> int:
    """The number of an image whose own is taken: one that comes again (live repetitions) goes behind, while there is room."""
    behind = max(used, default=0) + 1
    return behind if behind <= MAX_IMAGE_INDEX else next(n for n in range(1, MAX_IMAGE_INDEX + 1) if n not in used)


class _Numbers:
    """Counts series indices; shared by a writer and its fallback."""

    def __init__(self, first: int) -> None:
        self.upcoming = first

    def take(self) -> int:
        self.upcoming += 1
        return self.upcoming - 1


def _array(data: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    # .numpy() shares memory: nothing here writes into it
    return data.detach().cpu().numpy() if isinstance(data, torch.Tensor) else np.asarray(data)
