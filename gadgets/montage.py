"""PNG montages of MRD images: one picture per series, in the window and the units that the images themselves carry.

Nothing about the patient is written on them: only the chain's label, the scaling and the counters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gadgets.errors import MalformedText
from gadgets.image_attributes import PLANES_KEY
from gadgets.image_file import image_groups, read_images
from gadgets.meta import read_meta
from gadgets.wire.events import Image

MAX_TILES = 48
"""A picture shows at most so many planes, evenly chosen, first and last included."""

TILE_INCHES = 2.2
COUNTERS = (("slice", "slice"), ("contrast", "contrast"), ("phase", "phase"), ("set", "set"), ("repetition", "rep"))
COLOUR_MAPS = {"QSM": "gray", "FREQMAP": "RdBu_r"}


@dataclass(frozen=True)
class _Look:
    """How one series is drawn. ``limits`` is what black and white stand for, in ``unit``."""

    title: str
    caption: str
    unit: str
    limits: tuple[float, float]
    colour_map: str
    colour_bar: bool


def write_montages(source: Path | str | Iterable[Image], out_dir: Path | str, *, group: str | None = None) -> list[Path]:
    """One PNG per image series; returns the files in order.

    Parameters
    ----------
    source
        An image file, or images.
    out_dir
        Created if need be; files are called ``[<group>_]series<index>_<label>.png``.
    group
        Which group of the file; ``None``: all.

    Raises
    ------
    ImageFileError
        The file cannot be read or holds no such group.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for prefix, images in _runs(source, group):
        by_series: dict[int, list[Image]] = {}
        for image in images:
            by_series.setdefault(int(image.header["image_series_index"]), []).append(image)
        for number, series in sorted(by_series.items()):
            series.sort(key=lambda image: int(image.header["image_index"]))
            metas = [_meta(image) for image in series]
            label = _first(metas[0], "SequenceDescriptionAdditional", "GADGETRON_SeqDescription").strip("_")
            name = "_".join(part for part in (prefix, f"series{number:03d}", label) if part)
            path = folder / f"{re.sub('[^A-Za-z0-9_.-]+', '-', name)}.png"
            _draw(series, spokesman(series) or series[0], label or f"series {number}", path)
            written.append(path)
    return written


def write_thumbnail(image: Image, path: Path, pixels: int = 128) -> None:
    """The middle plane of one image as a small PNG, in the window that it carries and with square pixels.

    Raises
    ------
    OSError
        The file cannot be written.
    """
    from matplotlib import colormaps
    from matplotlib.image import imsave

    values = display_values(image)
    look = _look(image, _meta(image), "", values)
    plane = values[len(values) // 2]
    # square pixels, as many as asked for: a viewer stretches nothing
    extent = [float(image.header["field_of_view"][axis]) or 1.0 for axis in (1, 0)]
    shape = [max(1, round(pixels * length / max(extent))) for length in extent]
    y, x = (np.arange(n) * plane.shape[axis] // n for axis, n in enumerate(shape))
    colours = colormaps[look.colour_map].with_extremes(bad="black")
    imsave(path, plane[np.ix_(y, x)], vmin=look.limits[0], vmax=look.limits[1], cmap=colours, format="png")


@dataclass(frozen=True)
class Caption:
    """What one series is, in words."""

    label: str
    quantity: str
    unit: str
    window: str
    is_map: bool


def caption(image: Image) -> Caption:
    """What an image says of its series: label, quantity and unit of a map, and what black and white stand for."""
    meta = _meta(image)
    number = int(image.header["image_series_index"])
    label = _first(meta, "SequenceDescriptionAdditional", "GADGETRON_SeqDescription").strip("_") or f"series {number}"
    quantity, unit = _first(meta, "QuantityName"), _first(meta, "QuantityUnit")
    center, width = _number(meta, "WindowCenter", math.nan), _number(meta, "WindowWidth", math.nan)
    window = f"{center - width / 2:g} to {center + width / 2:g}" if width > 0 else ""
    return Caption(label, quantity, unit, window, bool(quantity))


def display_values(image: Image) -> NDArray[np.float32]:
    """What a viewer shows: ``(z, y, x)`` of the first channel, magnitude if complex, rescaled, padding as NaN."""
    meta = _meta(image)
    pixels = image.data[0]
    values = np.abs(pixels).astype(np.float32)
    if not np.iscomplexobj(pixels):
        values = pixels.astype(np.float32) * _number(meta, "RescaleSlope", 1.0) + _number(meta, "RescaleIntercept", 0.0)
    if "PixelPaddingValue" in meta:
        values[pixels == int(_number(meta, "PixelPaddingValue", 0))] = np.nan
    return values


def spokesman(images: Iterable[Image]) -> Image | None:
    """The image whose scale and window stand for a series: the first on which there is anything. An empty map has neither."""
    first = None
    for image in images:
        first = image if first is None else first
        values = display_values(image)
        if (np.isfinite(values) & (values != 0)).any():
            return image
    return first


def _draw(series: Sequence[Image], spoken: Image, label: str, path: Path) -> None:
    # imported here: matplotlib takes half a second, and who only wants the words should not wait for it
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    planes = [(n, z) for n, image in enumerate(series) for z in range(image.data.shape[1])]
    if len(planes) > MAX_TILES:
        planes = [planes[i] for i in np.unique(np.linspace(0, len(planes) - 1, MAX_TILES).round().astype(int))]
    shown = {n: display_values(series[n]) for n in {n for n, _ in planes}}
    tiles = np.stack([shown[n][z] for n, z in planes])
    look = _look(spoken, _meta(spoken), label, tiles)

    dx, dy = (float(series[0].header["field_of_view"][i]) / tiles.shape[2 - i] or 1.0 for i in (0, 1))
    height, width = tiles.shape[1] * dy, tiles.shape[2] * dx
    columns = max(1, min(len(tiles), round(math.sqrt(1.5 * len(tiles) * height / width))))
    rows = -(-len(tiles) // columns)
    sheet = np.full((rows * tiles.shape[1], columns * tiles.shape[2]), np.nan, np.float32)
    for n, tile in enumerate(tiles):
        r, c = divmod(n, columns)
        sheet[r * tile.shape[0] : (r + 1) * tile.shape[0], c * tile.shape[1] : (c + 1) * tile.shape[1]] = tile

    scale = TILE_INCHES * (2 if len(tiles) == 1 else 1) / max(height, width)
    size = (max(columns * width * scale, 3.6) + (1.1 if look.colour_bar else 0.2), rows * height * scale + 0.75)
    figure = Figure(figsize=size, layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    drawn = axes.imshow(
        sheet, cmap=look.colour_map, vmin=look.limits[0], vmax=look.limits[1], aspect=dy / dx, interpolation="nearest"
    )
    axes.set_axis_off()
    # plain text: a dollar sign in a label of another program is no formula
    axes.set_title(f"{look.title}\n{look.caption}", color="white", fontsize=9, parse_math=False)
    if len(tiles) > 1:
        for n, (text, _) in enumerate(zip(_tile_labels(series, planes), tiles, strict=True)):
            r, c = divmod(n, columns)
            axes.text(c * tiles.shape[2], r * tiles.shape[1], text, color="yellow", fontsize=6, va="top", ha="left")
    if look.colour_bar:
        bar = figure.colorbar(drawn, ax=axes, shrink=0.9)
        bar.set_label(look.unit, color="white", parse_math=False)
        bar.ax.tick_params(colors="white", labelsize=7)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _look(image: Image, meta: dict[str, tuple[str, ...]], label: str, tiles: NDArray[np.float32]) -> _Look:
    quantity, unit = _first(meta, "QuantityName"), _first(meta, "QuantityUnit")
    center, width = _number(meta, "WindowCenter", math.nan), _number(meta, "WindowWidth", math.nan)
    if math.isfinite(center) and width > 0:
        limits, window = (center - width / 2, center + width / 2), f"window {center:g}/{width:g}"
    else:
        inside = tiles[np.isfinite(tiles) & (tiles != 0)]
        low, high = np.percentile(inside, (1, 99.5)) if inside.size else (0.0, 1.0)
        low = min(low, 0.0)  # without a window, zero is black
        limits, window = (float(low), float(max(high, low + 1e-12))), f"shown {low:.3g} to {high:.3g}"
    if quantity:
        slope = _number(meta, "RescaleSlope", 1.0)
        caption = f"{quantity}, {slope:g} {unit} per code, {window}" if "RescaleSlope" in meta else f"{quantity}, {window}"
        return _Look(label, caption, f"{quantity} [{unit}]" if unit else quantity, limits, _colours(quantity), True)
    ratio, offset = _number(meta, "GADGETRON_ScaleRatio", math.nan), _number(meta, "GADGETRON_ScaleOffset", 0.0)
    pixels = f"{image.data.dtype}"
    if math.isfinite(ratio):
        pixels += f" = value x {ratio:.4g}" + (f" + {offset:g}" if offset else "")
    return _Look(label, f"{pixels}, {window}", "", limits, "gray", False)


def _colours(quantity: str) -> str:
    return COLOUR_MAPS.get(quantity, "viridis")


def _tile_labels(series: Sequence[Image], planes: Sequence[tuple[int, int]]) -> list[str]:
    """The counters that differ between the tiles, and the plane of a slab."""
    varying = [(key, word) for key, word in COUNTERS if len({int(image.header[key]) for image in series}) > 1]
    labels = []
    for n, z in planes:
        words = [f"{word} {int(series[n].header[key])}" for key, word in varying]
        if series[n].data.shape[1] > 1:
            kept = _meta(series[n]).get(PLANES_KEY, ())
            words.append(f"z {kept[z] if z < len(kept) else z}")
        labels.append(" ".join(words))
    return labels


def _runs(source: Path | str | Iterable[Image], group: str | None) -> Iterator[tuple[str, Iterable[Image]]]:
    if not isinstance(source, Path | str):
        yield "", source
        return
    for name in [group] if group is not None else image_groups(source):
        yield "" if name == "images" else name, read_images(source, name)


def _meta(image: Image) -> dict[str, tuple[str, ...]]:
    try:
        return read_meta(image.attributes)
    except MalformedText:
        return {}  # another program's attributes are no reason not to show its image


def _first(meta: dict[str, tuple[str, ...]], *keys: str) -> str:
    return next((meta[key][0] for key in keys if meta.get(key)), "")


def _number(meta: dict[str, tuple[str, ...]], key: str, missing: float) -> float:
    try:
        return float(_first(meta, key))
    except ValueError:
        return missing
