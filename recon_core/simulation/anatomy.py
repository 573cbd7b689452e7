"""Axial slices of heads as fractions of tissue classes, an endless supply of them, for training and testing.

Two sources share one interface: `head_atlas.HeadAtlas`, average tissue maps of which every draw makes another head, and
`brainweb.LabelledHeads`, segmented heads. Training, validation and test never share a place: an atlas is cut into slabs, heads into groups.

The classes are BrainWeb's, with lesions added. What is left to one is air or cortical bone and gives no signal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from recon_core.errors import SettingError
from recon_core.simulation.random_fields import Draws, grid, smooth_field

Tensor = torch.Tensor

CLASSES = ("csf", "grey", "white", "fat", "muscle", "skin", "vessel", "fat2", "dura", "marrow", "lesion")
SPLITS = ("train", "validation", "test")


class Anatomy(Protocol):
    """A source of slices."""

    name: str

    def fractions(self, draws: Draws, n: int, split: str) -> Tensor:
        """float32 ``(sample, class, n, n)`` in [0, 1], classes as in `CLASSES`, sum at most 1."""


def check_split(split: str) -> None:
    """Raise `SettingError` unless ``split`` is one of `SPLITS`."""
    if split not in SPLITS:
        raise SettingError("unknown split", where="anatomy", got=split, expected=", ".join(SPLITS))


@dataclass(frozen=True)
class Plane:
    """Where the pixels of every sample lie in the head.

    Attributes
    ----------
    y, x
        float32 ``(sample, n, n)`` in mm from the middle of the head; y to the front, x to the right.
    pixel
        float32 ``(sample,)``: size of a pixel in mm.
    """

    y: Tensor
    x: Tensor
    pixel: Tensor


def straight_plane(n_samples: int, n: int, extent: float, device: torch.device | str = "cpu") -> Plane:
    """The middle of the head upright, as it is, in a field of view of ``extent`` (mm)."""
    y, x = (axis.expand(n_samples, n, n) * extent / 2 for axis in grid(n, device))
    return Plane(y, x, torch.full((n_samples,), extent / n, device=device))


def draw_plane(draws: Draws, n: int, *, extent: tuple[float, float] = (185.0, 245.0), warp: float = 1.0) -> Plane:
    """Rotation within 10 degrees, shear within 5, shift within 5 %, either flip, field of view in ``extent`` (mm), smooth warp.

    Parameters
    ----------
    warp
        Strength of the smooth deformation: 1 is about 3 mm over a quarter of the head and 1 mm over a tenth.
    """
    y, x = grid(n, draws.device)
    fov = draws.uniform(*extent, 1, 1)
    angle = torch.deg2rad(draws.uniform(-10.0, 10.0, 1, 1))
    shear = torch.tan(torch.deg2rad(draws.uniform(-5.0, 5.0, 1, 1)))
    shift = draws.uniform(-0.05, 0.05, 2, 1, 1) * fov[:, None]
    sign = torch.where(draws.flip(0.5, 2, 1, 1), -1.0, 1.0)
    half = fov / 2
    v, u = y * half * sign[:, 0], x * half * sign[:, 1]
    along_y = torch.cos(angle) * v + torch.sin(angle) * (u + shear * v) + shift[:, 0]
    along_x = torch.cos(angle) * (u + shear * v) - torch.sin(angle) * v + shift[:, 1]
    if warp:
        bend = 3.0 * smooth_field(draws, n, 5, 2) + 1.0 * smooth_field(draws, n, 12, 2)
        along_y, along_x = along_y + warp * bend[:, 0], along_x + warp * bend[:, 1]
    return Plane(along_y, along_x, fov[:, 0, 0] / n)


def with_vessels_and_lesions(
    draws: Draws, fractions: Tensor, plane: Plane, n_vessels: int = 14, n_lesions: int = 4
) -> Tensor:
    """Add round vessels, a net of thin ones, and in every second sample lesions, each taking its share from what was there.

    Parameters
    ----------
    fractions
        float32 ``(sample, class, n, n)``; not edited.
    """
    n = fractions.shape[-1]
    head = fractions[:, :3].sum(1)
    edge = 0.35 * plane.pixel[:, None, None, None]
    discs = _discs(draws, plane, n_vessels, radius=(0.5, 2.5), extent=(85.0, 65.0), edge=edge)
    ridge = smooth_field(draws, n, 14, 2)
    net = torch.exp(-((ridge[:, 0] / 0.07) ** 2)) * torch.sigmoid((ridge[:, 1] - 0.5) * 8)
    vessel = torch.maximum(discs.amax(1), 0.8 * net) * head
    radius = (1.5, 6.0)
    blobs = _discs(
        draws, plane, n_lesions, radius=radius, extent=(60.0, 45.0), edge=edge, rough=smooth_field(draws, n, 24)[:, :1]
    )
    some = draws.flip(0.5, 1, 1, 1) & draws.flip(0.5, n_lesions, 1, 1)
    white = fractions[:, CLASSES.index("white")]
    lesion = (blobs * some).amax(1) * (0.2 + 0.8 * white) * head
    for name, share in (("lesion", lesion), ("vessel", vessel)):
        fractions = fractions * (1 - share[:, None])
        fractions[:, CLASSES.index(name)] += share
    return fractions


def _discs(
    draws: Draws,
    plane: Plane,
    n_discs: int,
    *,
    radius: tuple[float, float],
    extent: tuple[float, float],
    edge: Tensor,
    rough: Tensor | None = None,
) -> Tensor:
    """``(sample, disc, n, n)`` soft ellipses at random places within ``extent`` (y, x; mm)."""
    centre = draws.uniform(-1.0, 1.0, 2, n_discs, 1, 1)
    size = draws.uniform(*radius, 2, n_discs, 1, 1)
    dy = (plane.y[:, None] - extent[0] * centre[:, 0]) / size[:, 0]
    dx = (plane.x[:, None] - extent[1] * centre[:, 1]) / size[:, 1]
    level = 1 - torch.sqrt(dy**2 + dx**2) + (0.0 if rough is None else 0.3 * rough)
    return torch.sigmoid(level * size.amin(1) / edge)
