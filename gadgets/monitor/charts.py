"""Curves and heat maps as SVG: sharp at every size, in the page's own colours, readable without colour.

Only numbers and our own words get into them, and those are escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

WIDTH, HEIGHT = 640, 280
LEFT, RIGHT, TOP, BOTTOM = 82, 16, 14, 44
MAX_CELLS = 4096
MAX_DRAWN = 400  # points of a curve

VIRIDIS = ("440154", "482878", "3e4989", "31688e", "26828e", "1f9e89", "35b779", "6ece58", "b5de2b", "fde725")
"""Ten steps of the map that the picture files use, evenly spaced."""


@dataclass(frozen=True)
class Curve:
    """Points of one line; ``style`` is its class in the style sheet (``a`` or ``b``)."""

    name: str
    points: Sequence[Sequence[float]]
    style: str


def curves(title: str, x_label: str, y_label: str, lines: Sequence[Curve]) -> Markup:
    """Curves over one axis; the ordinate is logarithmic if all values are positive and span more than a factor of three."""
    lines = [Curve(line.name, _drawable(line.points), line.style) for line in lines]
    lines = [line for line in lines if line.points]
    if not lines:
        return Markup("")
    ys = [point[1] for line in lines for point in line.points]
    xs = [point[0] for line in lines for point in line.points]
    logarithmic = min(ys) > 0 and max(ys) > 3 * min(ys)
    x, y = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT), _Scale(min(ys), max(ys), HEIGHT - BOTTOM, TOP, logarithmic)
    parts = [_grid(x, y)]
    for line in lines:
        path = " ".join(f"{x(point[0]):.1f},{y(point[1]):.1f}" for point in line.points)
        parts.append(Markup('<polyline class="curve {}" points="{}"></polyline>').format(line.style, path))
        if len(line.points) <= 40:
            dots = (
                Markup('<circle class="dot {}" cx="{}" cy="{}" r="3"></circle>').format(
                    line.style, f"{x(point[0]):.1f}", f"{y(point[1]):.1f}"
                )
                for point in line.points
            )
            parts.extend(dots)
    parts.append(_axes(x_label, y_label))
    last = ", ".join(f"{line.name} {line.points[0][1]:.3g} to {line.points[-1][1]:.3g}" for line in lines)
    return _svg(f"{title}: {last}", WIDTH, HEIGHT, parts)


def heat_map(title: str, rows_label: str, columns_label: str, weights: Sequence[Sequence[float]]) -> Markup:
    """Weights between 0 and 1 as cells with a colour bar; ``weights`` is ``(column, row)``, as the router's are (state, expert)."""
    n_columns, n_rows = len(weights), len(weights[0]) if weights else 0
    if not n_rows or n_columns * n_rows > MAX_CELLS:
        return Markup("")
    cell = max(9, min(34, 520 // n_columns))
    tall = max(cell, 18) if n_rows < 12 else cell
    width, height = LEFT + n_columns * cell + 84, TOP + n_rows * tall + BOTTOM
    parts = [
        Markup('<rect x="{}" y="{}" width="{}" height="{}" fill="#{}"><title>{}</title></rect>').format(
            LEFT + c * cell,
            TOP + r * tall,
            cell,
            tall,
            _colour(value),
            f"{columns_label} {c}, {rows_label} {r}: {value:.2f}",
        )
        for c, column in enumerate(weights)
        for r, value in enumerate(column)
    ]
    for r in range(0, n_rows, max(1, math.ceil(14 / tall))):
        parts.append(_text(LEFT - 8, TOP + (r + 0.5) * tall + 4, str(r), "end"))
    for c in range(0, n_columns, max(1, math.ceil(26 / cell))):
        parts.append(_text(LEFT + (c + 0.5) * cell, height - BOTTOM + 16, str(c), "middle"))
    parts.append(_text(LEFT + n_columns * cell / 2, height - 8, columns_label, "middle"))
    parts.append(_side(rows_label, TOP + n_rows * tall / 2))
    parts += _colour_bar(LEFT + n_columns * cell + 18, TOP, n_rows * tall)
    return _svg(f"{title}: {n_rows} rows ({rows_label}), {n_columns} columns ({columns_label})", width, height, parts)


class _Scale:
    def __init__(self, low: float, high: float, start: float, end: float, logarithmic: bool = False) -> None:
        self.logarithmic = logarithmic
        if logarithmic:
            low, high = math.log10(low), math.log10(high)
        if high <= low:
            low, high = low - 0.5, high + 0.5
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.logarithmic else value
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round numbers inside."""
        if self.logarithmic:
            found = [m * 10.0**p for p in range(math.floor(self.low), math.ceil(self.high) + 1) for m in (1, 2, 5)]
            inside = [tick for tick in found if self.low - 1e-9 <= math.log10(tick) <= self.high + 1e-9]
            return inside[:: max(1, math.ceil(len(inside) / 6))]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (self.high - self.low) / (m * step) <= 6)
        return [n * step for n in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def _drawable(points: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    good = [(float(p[0]), float(p[1])) for p in points if len(p) >= 2 and math.isfinite(p[0]) and math.isfinite(p[1])]
    if len(good) <= MAX_DRAWN:
        return good
    step = math.ceil(len(good) / MAX_DRAWN)
    return [*good[:-1:step], good[-1]]


def _grid(x: _Scale, y: _Scale) -> Markup:
    parts = [Markup("")]
    for tick in y.ticks():
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"></line>').format(
                LEFT, WIDTH - RIGHT, _at(y, tick), _at(y, tick)
            )
        )
        parts.append(_text(LEFT - 8, y(tick) + 4, f"{tick:.4g}", "end"))
    for tick in x.ticks():
        parts.append(_text(x(tick), HEIGHT - BOTTOM + 18, f"{tick:.4g}", "middle"))
    return Markup("").join(parts)


def _at(scale: _Scale, value: float) -> str:
    return f"{scale(value):.1f}"


def _axes(x_label: str, y_label: str) -> Markup:
    frame = Markup('<path class="axis" d="M{} {}V{}H{}"></path>').format(LEFT, TOP, HEIGHT - BOTTOM, WIDTH - RIGHT)
    return (
        frame
        + _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label, "middle")
        + _side(y_label, (TOP + HEIGHT - BOTTOM) / 2)
    )


def _side(words: str, y: float) -> Markup:
    return Markup('<text class="label" text-anchor="middle" transform="translate(14 {}) rotate(-90)">{}</text>').format(
        f"{y:.1f}", words
    )


def _text(x: float, y: float, words: str, anchor: str) -> Markup:
    return Markup('<text class="label" x="{}" y="{}" text-anchor="{}">{}</text>').format(
        f"{x:.1f}", f"{y:.1f}", anchor, words
    )


def _colour_bar(x: float, y: float, height: float) -> list[Markup]:
    steps = 40
    parts = [
        Markup('<rect x="{}" y="{}" width="14" height="{}" fill="#{}"></rect>').format(
            x, f"{y + height * (1 - (n + 1) / steps):.2f}", f"{height / steps + 0.5:.2f}", _colour((n + 0.5) / steps)
        )
        for n in range(steps)
    ]
    return [*parts, *(_text(x + 20, y + height * (1 - value) + 4, f"{value:g}", "start") for value in (0, 0.5, 1))]


def _colour(value: float) -> str:
    place = min(1.0, max(0.0, value if math.isfinite(value) else 0.0)) * (len(VIRIDIS) - 1)
    first = min(int(place), len(VIRIDIS) - 2)
    low, high = (bytes.fromhex(VIRIDIS[first + n]) for n in (0, 1))
    return bytes(round(a + (b - a) * (place - first)) for a, b in zip(low, high, strict=True)).hex()


def _svg(words: str, width: float, height: float, parts: Sequence[Markup]) -> Markup:
    head = Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}" width="{}" height="{}">').format(
        words, width, height, width, height
    )
    return head + Markup("").join(parts) + Markup("</svg>")
