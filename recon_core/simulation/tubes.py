"""The nine-tube phantom on which PINQI was tested, and how far a T1 map of it is from what is in the tubes.

T1 as in the reference row of Table I. The paper gives neither T2 nor arrangement: T2 is that of watery gels (a saturation-recovery
signal without spin echoes does not depend on it), and the tubes stand upright in air, on two rings around one in the middle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from recon_core.errors import DataError
from recon_core.simulation.phantoms import Canvas, Grid, Tissue, TissueMaps, ellipse, soft

TABLE_I = (0.28, 0.38, 0.39, 0.45, 0.59, 0.60, 1.15, 1.42, 1.76)
"""T1 in s, the fully sampled reference with 18 delays."""

PUBLISHED = (0.29, 0.37, 0.42, 0.46, 0.60, 0.59, 1.10, 1.47, 1.76)
"""T1 in s that the published PINQI finds at 8x; its RMS deviation is 35 ms."""

LABELS: Mapping[str, int] = MappingProxyType({"background": 0, **{f"tube {i + 1}": i + 1 for i in range(len(TABLE_I))}})

RADIUS = 0.013  # m, inner
DISTANCE = 0.047  # m, of the eight outer tubes from the middle
RIM = 2  # pixels of a tube's edge that its mean leaves out: partial volume and Gibbs ringing

PROTOCOL: Mapping[str, Any] = MappingProxyType(
    {
        "phantom": "tubes",
        "matrix_x": 192,
        "matrix_y": 192,
        "fov_x": 0.192,
        "fov_y": 0.192,
        "slice_thickness": 0.008,
        "flip_angle": 6.0,
        "delays": "0.5,1,1.5,2,8",
        "mask": "random",
        "acceleration": 8.0,
        "acs": 8,
    }
)
"""Settings of a ``satrec`` scan as in the paper: 1 x 1 x 8 mm, 192 x 192, five delays, 24 random lines of which 8 are central."""


class TubePhantom:
    """Nine tubes; ``t1`` in s, one each, tube 1 in the middle and the others counted clockwise from the top."""

    def __init__(self, t1: tuple[float, ...] = TABLE_I) -> None:
        if len(t1) != len(TABLE_I):
            raise DataError("not nine tubes", where="tube phantom", got=len(t1), expected=len(TABLE_I))
        self.tissues = [Tissue(0.95, value, 0.12, r2star=10.0) for value in t1]

    def maps(self, grid: Grid) -> TissueMaps:
        """Tissue maps on a grid of any spacing; the tubes run along z."""
        x = np.broadcast_to(grid.x[None, None, :], grid.shape).astype(np.float32)
        y = np.broadcast_to(grid.y[None, :, None], grid.shape).astype(np.float32)
        canvas = Canvas(grid.shape, edge=grid.pixel)
        for i, tissue in enumerate(self.tissues):
            angle = 2 * np.pi * (i - 1) / (len(self.tissues) - 1)
            far = DISTANCE if i else 0.0
            distance = ellipse(x - far * np.sin(angle), y + far * np.cos(angle), RADIUS, RADIUS)
            canvas.paint(soft(distance, canvas.edge), tissue, i + 1)
        return canvas.maps()


@dataclass(frozen=True)
class TubeReport:
    """One entry per tube.

    Attributes
    ----------
    reference, mean, sd
        T1 in s: what is in the tube, mean and standard deviation over its believed pixels (NaN where there are none).
    valid
        Part of the tube's pixels whose T1 is believed.
    """

    reference: NDArray[np.float64]
    mean: NDArray[np.float64]
    sd: NDArray[np.float64]
    valid: NDArray[np.float64]

    @property
    def deviation(self) -> NDArray[np.float64]:
        """Mean minus reference, s."""
        return np.asarray(self.mean - self.reference)

    @property
    def relative(self) -> NDArray[np.float64]:
        """Deviation as a part of the reference."""
        return np.asarray(self.deviation / self.reference)

    @property
    def rms_deviation(self) -> float:
        """Root mean square over the tubes, s; NaN if a tube has no believed pixel."""
        return float(np.sqrt(np.mean(np.square(self.deviation))))


def compare_tubes(
    t1: NDArray[np.floating],
    labels: NDArray[np.integer],
    valid: NDArray[np.bool_] | None = None,
    reference: tuple[float, ...] = TABLE_I,
) -> TubeReport:
    """Tube means of a T1 map against what is in the tubes.

    Parameters
    ----------
    t1
        s, ``(y, x)`` or ``(z, y, x)``; 0 where there is no believable value.
    labels
        As the truth of the simulated scan has them, of the same shape; `LABELS`.
    valid
        Pixels that may be believed; those above 0 if ``None``.

    Raises
    ------
    DataError
        Shapes differ, or a tube is missing.
    """
    if t1.shape != labels.shape or (valid is not None and valid.shape != t1.shape):
        raise DataError("map and labels do not fit", where="tubes", got=t1.shape, expected=labels.shape)
    believed = t1 > 0 if valid is None else valid
    disc = ndimage.generate_binary_structure(2, 1).reshape((1,) * (t1.ndim - 2) + (3, 3))
    rows = []
    for number, value in enumerate(reference, 1):
        tube = ndimage.binary_erosion(labels == number, disc, iterations=RIM)
        if not tube.any():
            raise DataError("a tube is missing", where="tubes", got=f"no pixels of tube {number} inside its rim")
        inside = np.asarray(t1, np.float64)[tube & believed]
        found = (inside.mean(), inside.std()) if len(inside) else (np.nan, np.nan)
        rows.append((value, *found, len(inside) / int(tube.sum())))
    return TubeReport(*np.array(rows).T)
