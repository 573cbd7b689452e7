"""One cell as a picture: truth and every method, region of interest, error x5 and the course of one line over the states."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from benchmarks.cell import Array, Cell

ERROR_GAIN = 5.0
PROFILE_ROWS = 6
"""Pixels by which each state is drawn in the profile."""


def montage(cell: Cell, answers: Mapping[str, Array], path: Path) -> None:
    """Write ``path`` (PNG). Rows: whole image, region of interest, its error x5, x-t profile through its middle."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, rows, columns = np.nonzero(cell.roi)
    part = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    middle = (rows.min() + rows.max()) // 2
    order = np.argsort(cell.times) if cell.times else np.arange(len(cell.images))
    state = int(order[len(order) // 3])
    truth = np.abs(cell.images[:, 0])
    peak = float(np.percentile(truth, 99.8))
    shown = {"truth": truth, **{name: np.abs(images[:, 0]) for name, images in answers.items()}}
    figure, axes = pyplot.subplots(4, len(shown), figsize=(2.1 * len(shown), 8.2), squeeze=False)
    for column, (name, images) in enumerate(shown.items()):
        panels = [
            images[state] / peak,
            images[state][part] / peak,
            ERROR_GAIN * np.abs(images - truth)[state][part] / peak,
            np.repeat(images[order, middle, part[1]], PROFILE_ROWS, axis=0) / peak,
        ]
        for row, panel in enumerate(panels):
            axes[row, column].imshow(
                panel, cmap="inferno" if row == 2 else "gray", vmin=0, vmax=1, aspect="auto" if row == 3 else "equal"
            )
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
        axes[0, column].set_title(name.replace("moe_dqinr:", "moe "), fontsize=8)
    for row, text in enumerate(("image", "region", f"error x{ERROR_GAIN:g}", "states down, x across")):
        axes[row, 0].set_ylabel(text, fontsize=8)
    figure.suptitle(f"{cell.name} ({cell.origin})", fontsize=9)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
