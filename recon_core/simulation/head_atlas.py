"""Heads drawn from average tissue maps: every draw decides anew what the maps call likely."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch.nn import functional

from recon_core.simulation.anatomy import CLASSES, Plane, check_split, draw_plane, with_vessels_and_lesions
from recon_core.simulation.random_fields import Draws, smooth_field
from recon_core.simulation.volume_files import read_volume

Tensor = torch.Tensor

PACKED = "mni152_tissue.npz"


@dataclass(frozen=True)
class AtlasVolume:
    """Average tissue maps of many registered heads.

    Attributes
    ----------
    grey, white, brain
        uint8 ``(z, y, x)``: probability times 255.
    voxel
        Edge of a voxel in mm.
    origin
        ``(z, y, x)`` in mm of the first voxel's centre, MNI coordinates (y to the front, z upwards).
    """

    grey: NDArray[np.uint8]
    white: NDArray[np.uint8]
    brain: NDArray[np.uint8]
    voxel: float
    origin: tuple[float, float, float]


def packed_atlas() -> AtlasVolume:
    """The tissue maps that ship with the package: ICBM 152 symmetric 2009a at 1.5 mm.

    Source and notice: ``recon_core/simulation/data/mni152_tissue.NOTICE``.
    """
    with resources.as_file(resources.files("recon_core.simulation") / "data" / PACKED) as path:
        return load_atlas(path)


def load_atlas(path: str | Path) -> AtlasVolume:
    """An `AtlasVolume` from the file that `pack_atlas` wrote."""
    with np.load(path, allow_pickle=False) as file:
        z, y, x = (float(v) for v in file["origin"])
        return AtlasVolume(file["grey"], file["white"], file["brain"], float(file["voxel"]), (z, y, x))


def atlas_from_folder(folder: str | Path) -> AtlasVolume:
    """The 1 mm maps as the `nilearn` package ships them: ``mni_icbm152_{gm,wm,t1}_tal_nlin_sym_09a_converted.nii.gz``.

    Parameters
    ----------
    folder
        The folder ``nilearn/datasets/data`` of an installation.
    """
    maps = {
        name: np.asarray(read_volume(Path(folder) / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"), np.uint8)
        for name in ("gm", "wm", "t1")
    }
    brain = np.where(maps["t1"] > 0, 255, 0).astype(np.uint8)  # the template is stripped of its skull
    return AtlasVolume(maps["gm"], maps["wm"], brain, 1.0, (-72.0, -134.0, -98.0))


def pack_atlas(volume: AtlasVolume, path: str | Path, voxel: float = 1.5) -> None:
    """Write ``volume`` at a coarser ``voxel`` (mm), cropped to the brain: the file that ships, about a megabyte."""
    zoom = volume.voxel / voxel
    coarse = {}
    for name in ("grey", "white", "brain"):
        smooth = ndimage.gaussian_filter(getattr(volume, name).astype(np.float32), 0.4 * (1 / zoom))
        coarse[name] = np.clip(np.rint(ndimage.zoom(smooth, zoom, order=1, grid_mode=True, mode="nearest")), 0, 255)
    where = np.argwhere(coarse["brain"] > 0)
    low, high = np.maximum(where.min(0) - 2, 0), where.max(0) + 3
    crop = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    # the first voxel's centre moves because voxels, not their centres, share their outer faces
    origin = np.asarray(volume.origin) + (voxel - volume.voxel) / 2 + low * voxel
    arrays = {name: data[crop].astype(np.uint8) for name, data in coarse.items()}
    np.savez_compressed(path, allow_pickle=False, **arrays, voxel=np.float64(voxel), origin=origin.astype(np.float64))


# Slabs along z in mm (MNI): held-out ones, and the distance that training keeps from them. The highest is the vertex.
HELD_OUT = {"test": ((-20.0, -15.0), (6.0, 11.0), (32.0, 37.0), (54.0, 58.0)), "validation": ((-7.0, -3.0), (19.0, 23.0))}
GUARD = 2.5  # mm: more than a voxel, so that interpolation never reaches across
AXIAL_RANGE = (-26.0, 68.0)


def slabs(split: str) -> tuple[tuple[float, float], ...]:
    """The intervals along z in mm that a split may see; no two splits share any, nor come nearer than `GUARD`."""
    check_split(split)
    if split != "train":
        return HELD_OUT[split]
    taken = sorted(slab for group in HELD_OUT.values() for slab in group)
    edges = [AXIAL_RANGE[0], *(e for a, b in taken for e in (a - GUARD, b + GUARD)), AXIAL_RANGE[1]]
    return tuple((a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b - a > 1.0)


MARGIN = 40.0  # mm of air around the brain, for the shells


@dataclass(frozen=True)
class _Prepared:
    """Maps with air around them: float32 ``(1, (grey, white, distance from the brain in mm), z, y, x)``, and where they are."""

    stack: Tensor
    origin: tuple[float, float, float]
    voxel: float
    middle: tuple[float, float]


def _prepared(volume: AtlasVolume) -> _Prepared:
    pad = int(MARGIN / volume.voxel)
    grey, white, brain = (np.pad(v, pad) for v in (volume.grey, volume.white, volume.brain))
    inside = brain >= 128
    outwards = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    stack = np.stack((grey / 255.0, white / 255.0, outwards * volume.voxel)).astype(np.float32)
    z, y, x = (o - pad * volume.voxel for o in volume.origin)
    _, at_y, at_x = np.nonzero(inside)
    middle = (y + volume.voxel * (at_y.min() + at_y.max()) / 2, x + volume.voxel * (at_x.min() + at_x.max()) / 2)
    return _Prepared(torch.from_numpy(stack)[None], (z, y, x), volume.voxel, (float(middle[0]), float(middle[1])))


@cache
def _packed() -> _Prepared:
    return _prepared(packed_atlas())


class HeadAtlas:
    """Heads drawn from average tissue maps.

    The maps say how likely grey matter is at a place; every draw decides it anew: smooth random fields are added to the
    logarithms of the three probabilities and the sum is sharpened, so that each draw has its own gyri, in a plane of its own,
    smoothly deformed. Skull, marrow, muscle, fat, skin and dura are shells around the brain with thicknesses of their own.

    Parameters
    ----------
    volume
        The maps; the packed ones by default.
    device
        Where slices are made.
    """

    def __init__(self, volume: AtlasVolume | None = None, device: torch.device | str = "cpu") -> None:
        prepared = _packed() if volume is None else _prepared(volume)
        self._stack = prepared.stack.to(device)
        self._origin, self._voxel, self._middle = prepared.origin, prepared.voxel, prepared.middle
        self.name = f"mni152 at {prepared.voxel:g} mm"

    def fractions(self, draws: Draws, n: int, split: str) -> Tensor:
        """float32 ``(sample, class, n, n)``, see `Anatomy`."""
        plane = draw_plane(draws, n)
        z = self._height(draws, n, split)
        maps = self._sample(z, plane)
        grey, white, distance = maps.unbind(1)
        inner = self._tissues(draws, n, grey, white)
        edge = 0.35 * plane.pixel[:, None, None]
        brain = torch.sigmoid(-distance / edge)
        out = grey.new_zeros(len(draws), len(CLASSES), n, n)
        out[:, :3] = inner * brain[:, None]
        self._add_shells(draws, out, distance, edge, plane, z)
        return with_vessels_and_lesions(draws, out, plane)

    def _height(self, draws: Draws, n: int, split: str) -> Tensor:
        """``(sample, n, n)``: a surface that bends within one slab of the split."""
        bounds = torch.tensor(slabs(split), device=draws.device)
        widths = bounds[:, 1] - bounds[:, 0]
        edges = torch.cumsum(widths, 0)
        position = draws.uniform(0.0, 1.0, 1) * edges[-1]
        slab = torch.searchsorted(edges, position, right=True).clamp(max=len(edges) - 1)[:, 0]
        low, high = bounds[slab].unbind(1)
        z = low + position[:, 0] - (edges - widths)[slab]
        surface = z[:, None, None] + 1.5 * smooth_field(draws, n, 4)[:, 0]
        return torch.clamp(surface, low[:, None, None], high[:, None, None])

    def _sample(self, z: Tensor, plane: Plane) -> Tensor:
        """``(sample, map, n, n)``: the maps at the plane's points, trilinear."""
        points = []
        for position, origin, size in zip(
            (plane.x + self._middle[1], plane.y + self._middle[0], z),
            reversed(self._origin),
            reversed(self._stack.shape[2:]),
            strict=True,
        ):
            points.append((position - origin) / self._voxel * (2 / (size - 1)) - 1)
        where = torch.stack(points, dim=-1)[None]
        return functional.grid_sample(self._stack, where, padding_mode="border", align_corners=True)[0].movedim(0, 1)

    @staticmethod
    def _tissues(draws: Draws, n: int, grey: Tensor, white: Tensor) -> Tensor:
        """``(sample, (csf, grey, white), n, n)``: one draw of the anatomy, edges about a pixel wide."""
        likely = torch.stack((1.05 - grey - white, grey, white), dim=1).clamp(min=0.01)
        noise = 0.55 * smooth_field(draws, n, 36, 3) + 0.45 * smooth_field(draws, n, 72, 3)
        return torch.softmax(4.0 * (likely.log() + noise), dim=1)

    @staticmethod
    def _add_shells(draws: Draws, out: Tensor, distance: Tensor, edge: Tensor, plane: Plane, z: Tensor) -> None:
        """Fluid, dura, inner table, marrow, outer table, muscle, fat, skin: shells of random thickness around the brain."""
        n = out.shape[-1]
        wave = 0.35 * smooth_field(draws, n, 9, 4)
        temple = torch.sigmoid((plane.x.abs() - 48) / 4) * torch.sigmoid((8 - z) / 8)
        thickness = [
            ("csf", draws.uniform(0.3, 3.5, 1, 1)),
            ("dura", draws.uniform(0.5, 1.5, 1, 1)),
            ("", draws.uniform(1.0, 2.5, 1, 1)),
            ("marrow", draws.uniform(0.5, 4.0, 1, 1) * (1 + wave[:, 0]).clamp(min=0.1)),
            ("", draws.uniform(1.0, 2.0, 1, 1)),
            (
                "muscle",
                (draws.uniform(0.0, 1.5, 1, 1) + draws.uniform(0.0, 12.0, 1, 1) * temple) * (1 + wave[:, 1]).clamp(min=0.2),
            ),
            ("fat2", draws.uniform(0.0, 2.0, 1, 1) * (1 + wave[:, 2]).clamp(min=0.1)),
            ("fat", draws.uniform(1.0, 6.0, 1, 1) * (1 + wave[:, 3]).clamp(min=0.1)),
            ("skin", draws.uniform(1.2, 2.4, 1, 1)),
        ]
        inner = torch.zeros_like(distance)
        outside = torch.sigmoid(distance / edge)
        for tissue, width in thickness:
            inner = inner + width
            beyond = torch.sigmoid((distance - inner) / edge)
            if tissue:
                out[:, CLASSES.index(tissue)] += (outside - beyond).clamp(min=0)
            outside = beyond
