"""What all phantoms share: grids, tissues, soft-edged painting and textures that live in the tissue.

Anatomy is defined by continuous functions of position (signed distances and band-limited textures), never by pixels,
so it can
be rendered on any grid. The scan simulator renders it finer than the encoded matrix and truncates k-space; no pixel of the
reconstruction grid exists before the reconstruction does.

Coordinates are metres in the image frame: x along the readout, y along k1, z along k2 or the slice direction; index
``n // 2``
is coordinate 0. Arrays are ``(z, y, x)``. In the unrotated frame +x is the patient's left and +y posterior (LPS).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from recon_core.errors import SettingError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """Positions of the samples of an image, m: ``z``, ``y`` and ``x`` are 1D."""

    z: NDArray[np.float64]
    y: NDArray[np.float64]
    x: NDArray[np.float64]

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.z), len(self.y), len(self.x)

    @property
    def pixel(self) -> float:
        """In-plane sample distance in m (the larger one)."""
        return max(_step(self.y), _step(self.x))


def _step(positions: NDArray[np.float64]) -> float:
    return float(positions[1] - positions[0]) if len(positions) > 1 else 0.0


def centred_axis(n: int, extent: float) -> NDArray[np.float64]:
    """``n`` sample positions over ``extent`` m with coordinate 0 at index ``n // 2``."""
    if n < 1 or not extent > 0:
        raise SettingError(
            "not a grid", where="phantom", got=f"{n} samples over {extent} m", expected="at least 1 over more than 0 m"
        )
    return np.arange(-(n // 2), n - n // 2, dtype=np.float64) * (extent / n)


@dataclass(frozen=True)
class Tissue:
    """Properties of one tissue: proton density (water = 1), relaxation times in s, R2* in 1/s, susceptibility in ppm
    (water = 0)."""

    pd: float
    t1: float
    t2: float
    r2star: float = 30.0
    chi: float = 0.0


@dataclass(frozen=True)
class TissueMaps:
    """Rendered properties, float32 ``(z, y, x)``; ``pd`` is 0 where there is no tissue, and relaxation rates are
    then those of water."""

    pd: FloatArray
    r1: FloatArray
    r2: FloatArray
    r2star: FloatArray
    chi: FloatArray
    labels: NDArray[np.uint8]

    @property
    def t1(self) -> FloatArray:
        return np.asarray(1.0 / self.r1, dtype=np.float32)

    @property
    def t2(self) -> FloatArray:
        return np.asarray(1.0 / self.r2, dtype=np.float32)


class Texture:
    """A periodic random field with zero mean and unit standard deviation, sampled at any position.

    Parameters
    ----------
    rng
        Source of randomness.
    n_dims
        2 or 3 coordinates.
    feature
        Length in m of the smallest structures (half a period of the highest frequency).
    slope
        Amplitude falls as ``f ** -slope`` below that: 0 is grain, 1.5 is clouds.
    """

    def __init__(self, rng: np.random.Generator, n_dims: int, feature: float, slope: float = 1.0, cells: int = 0) -> None:
        n = cells or (256 if n_dims == 2 else 64)
        self.cell = feature / 3.0  # three cells per feature: linear interpolation leaves no visible grid
        frequency = np.sqrt(sum(np.square(f) for f in np.meshgrid(*[np.fft.fftfreq(n)] * n_dims, indexing="ij")))
        envelope = np.exp(-((frequency / 0.17) ** 4)) / np.maximum(frequency, 4.0 / n) ** slope
        envelope[(0,) * n_dims] = 0.0
        field = np.fft.ifftn(np.fft.fftn(rng.standard_normal((n,) * n_dims)) * envelope).real
        self._field = (field / field.std()).astype(np.float32)

    def __call__(self, *positions: NDArray[np.floating]) -> FloatArray:
        """Values at positions in m (as many coordinate arrays as dimensions)."""
        arrays = np.broadcast_arrays(*positions)
        coordinates = np.stack([np.asarray(a / self.cell, dtype=np.float32) for a in arrays])
        return np.asarray(ndimage.map_coordinates(self._field, coordinates, order=1, mode="grid-wrap"), dtype=np.float32)


def soft(distance: NDArray[np.floating], width: float) -> FloatArray:
    """Fraction of a sample inside a region, from the signed distance to its border (negative inside): a ramp of
    ``width`` m."""
    return np.clip(0.5 - np.asarray(distance, dtype=np.float32) / np.float32(width), 0.0, 1.0)


def ellipse(dx: NDArray[np.floating], dy: NDArray[np.floating], a: float, b: float, power: float = 2.0) -> FloatArray:
    """Approximate signed distance to the (super)ellipse with half axes ``a`` and ``b``: exact on the border and to
    first order there."""
    u, v = np.abs(dx) / a, np.abs(dy) / b
    level = (u**power + v**power) ** (1.0 / power)
    slope = np.sqrt((u ** (power - 1) / a) ** 2 + (v ** (power - 1) / b) ** 2) / np.maximum(level, 1e-3) ** (power - 1)
    return np.asarray((level - 1.0) / np.maximum(slope, 1e-3 / max(a, b)), dtype=np.float32)


class Canvas:
    """Tissue painted over tissue on one grid; edges are mixed linearly in proton density and relaxation *rates*."""

    def __init__(self, shape: tuple[int, ...], edge: float) -> None:
        self.edge = edge
        self.fields = {name: np.zeros(shape, dtype=np.float32) for name in ("pd", "r1", "r2", "r2star", "chi")}
        self.fields["r1"][:] = 1.0
        self.fields["r2"][:] = 1.0
        self.labels = np.zeros(shape, dtype=np.uint8)

    def copy(self) -> Canvas:
        """An independent canvas with the same content."""
        other = Canvas.__new__(Canvas)
        other.edge, other.labels = self.edge, self.labels.copy()
        other.fields = {name: field.copy() for name, field in self.fields.items()}
        return other

    def paint(
        self,
        fraction: NDArray[np.floating],
        tissue: Tissue,
        label: int,
        texture: NDArray[np.floating] | float = 0.0,
        rate_texture: NDArray[np.floating] | float = 0.0,
    ) -> None:
        """Cover with ``tissue`` where ``fraction`` is above 0; textures are relative changes of density and of the rates."""
        share = np.asarray(fraction, dtype=np.float32)
        where = np.nonzero(share > 0)
        if not len(where[0]):
            return
        # most organs are small: work in their bounding box
        box = tuple(slice(int(w.min()), int(w.max()) + 1) for w in where)
        part = share[box]
        density_factor = np.clip(1.0 + _boxed(texture, box), 0.2, 1.8)
        rate_factor = np.clip(1.0 + _boxed(rate_texture, box), 0.5, 1.6)
        values = {
            "pd": tissue.pd * density_factor,
            "r1": rate_factor / tissue.t1,
            "r2": rate_factor / tissue.t2,
            "r2star": tissue.r2star * rate_factor,
            "chi": tissue.chi,
        }
        for name, value in values.items():
            field = self.fields[name][box]
            field += part * (value - field)
        self.labels[box][part > 0.5] = label

    def maps(self) -> TissueMaps:
        """The finished maps as ``(z, y, x)``; a 2D canvas becomes one slice."""
        lead = (None,) * (3 - self.labels.ndim)
        return TissueMaps(**{name: field[lead] for name, field in self.fields.items()}, labels=self.labels[lead])


def _boxed(texture: NDArray[np.floating] | float, box: tuple[slice, ...]) -> NDArray[np.floating] | np.float32:
    if isinstance(texture, np.ndarray):
        return np.asarray(texture[box], dtype=np.float32)
    return np.float32(texture)


def stack(slices: list[TissueMaps]) -> TissueMaps:
    """Slices, one below the other along z."""
    names = ("pd", "r1", "r2", "r2star", "chi", "labels")
    return TissueMaps(**{name: np.concatenate([getattr(s, name) for s in slices]) for name in names})
