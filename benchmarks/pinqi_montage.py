"""One picture: T1 maps of all methods above their errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from recon_core.metrics import nrmse

LONGEST = 3.0  # s, top of the scale
LARGEST_ERROR = 0.5  # s


def montage(maps: Mapping[str, np.ndarray], path: Path, title: str) -> None:
    """Write the picture.

    Parameters
    ----------
    maps
        ``truth`` and one entry per method, T1 in s ``(y, x)``, and ``brain``, bool ``(y, x)``.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    truth, brain = maps["truth"], maps["brain"]
    names = ["truth", *(name for name in maps if name not in ("truth", "brain"))]
    figure, axes = pyplot.subplots(2, len(names), figsize=(2.0 * len(names) + 0.8, 4.6), squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        inside = np.where(brain, maps[name], 0.0)
        top = axes[0, column].imshow(inside, cmap="viridis", vmin=0, vmax=LONGEST, origin="lower")
        error = np.where(brain, np.abs(maps[name] - truth), 0.0)
        bottom = axes[1, column].imshow(error, cmap="magma", vmin=0, vmax=LARGEST_ERROR, origin="lower")
        axes[0, column].set_title(name, fontsize=8)
        if name != "truth":
            axes[1, column].set_title(f"nRMSE {nrmse(maps[name], truth, brain):.3f}", fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.colorbar(top, ax=list(axes[0]), shrink=0.9, label="T1 in s")
    figure.colorbar(bottom, ax=list(axes[1]), shrink=0.9, label="error in s")
    figure.suptitle(f"T1, {title}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
