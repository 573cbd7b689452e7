"""Collaborative filtering of an image series: similar patches of all states are stacked, decorrelated and thresholded together.

Locally low rank uses that few time courses live in a block. Tissue also repeats itself elsewhere in the image and is smooth or
edged within a patch: a group of ``K`` similar patches with ``P`` pixels and ``Q`` states is an array ``(K, P, Q)`` that is sparse
after a Haar transform along K, a cosine transform along P and the group's own principal components along Q.

References
----------
Dabov et al., IEEE Trans. Image Process. 16 (2007) 2080 (grouping, hard threshold, aggregation with the inverse number of
coefficients); Bustin et al., Magn. Reson. Med. 81 (2019) 102 (patches grouped over contrasts inside a reconstruction).
Deviation from both: principal components over states, fixed transforms over patch and group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from recon_core.errors import DataError

Tensor = torch.Tensor

CPU_GROUPS, ACCELERATOR_GROUPS = 512, 1 << 16
"""Groups that are transformed at a time: on the CPU they stay in the cache."""

GUIDE_COMPONENTS = 4
"""Patches are compared in so many principal images of the series; the rest is mostly noise."""


@dataclass(frozen=True)
class PatchSettings:
    """Patches of ``side`` x ``side`` pixels; each reference patch on a grid of ``stride`` is joined by the ``group`` - 1 most
    similar ones that are at most ``reach`` pixels away."""

    side: int = 4
    stride: int = 2
    group: int = 8
    reach: int = 6


class PatchGroups:
    """Which patches belong together, found in a guide series.

    Parameters
    ----------
    guide
        complex ``(state, row, column)``. Images wrap around at their borders.

    Raises
    ------
    DataError
        The group is not a power of two, or patches are larger than the image.
    """

    def __init__(self, guide: Tensor, settings: PatchSettings) -> None:
        side, group = settings.side, settings.group
        n_rows, n_columns = guide.shape[-2:]
        if group < 1 or group & (group - 1):
            raise DataError("a group needs a power of two of patches", where="collaborative filter", got=group)
        if side < 1 or side > min(n_rows, n_columns):
            raise DataError(
                "patches do not fit the image", where="collaborative filter", got=side, expected=(n_rows, n_columns)
            )
        reach = min(settings.reach, (min(n_rows, n_columns) - 1) // 2)
        n_candidates = (2 * reach + 1) ** 2
        while group > n_candidates:
            group //= 2
        self.settings, self.group, self.shape = settings, group, (n_rows, n_columns)
        device = guide.device
        images = principal_images(guide, GUIDE_COMPONENTS)
        rows = torch.arange(0, n_rows, settings.stride, device=device)
        columns = torch.arange(0, n_columns, settings.stride, device=device)
        steps = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
        distances = torch.stack([_patch_distance(images, step, side)[rows][:, columns].flatten() for step in steps], 1)
        # a patch is its own first partner, whatever rounding says
        distances[:, steps.index((0, 0))] = -1.0
        chosen = distances.topk(group, dim=1, largest=False).indices
        moves = torch.tensor(steps, device=device)[chosen]  # (reference, partner, 2)
        row, column = (axis.reshape(-1, 1) for axis in torch.meshgrid(rows, columns, indexing="ij"))
        inside = torch.arange(side, device=device)
        patch_rows = ((row + moves[..., 0])[:, :, None, None] + inside[:, None]) % n_rows
        patch_columns = ((column + moves[..., 1])[:, :, None, None] + inside[None, :]) % n_columns
        self.pixels = (patch_rows * n_columns + patch_columns).reshape(len(row), group * side * side)
        self.transform = _group_transform(group, side).to(device)

    def filter(self, images: Tensor, sigma: float, threshold: float) -> Tensor:
        """Hard-threshold all groups at ``threshold * sigma`` and put the patches back, weighted by how sparse their group was.

        Parameters
        ----------
        images
            complex ``(state, row, column)``.
        sigma
            Standard deviation of a complex pixel's noise, ``sqrt(E|n|^2)``.

        Returns
        -------
        Tensor
            Same shape and dtype.
        """
        n_states = images.shape[0]
        pixels = images.reshape(n_states, -1).T.contiguous()  # (pixel, state)
        total = torch.zeros_like(pixels)
        weight = torch.zeros(pixels.shape[0], dtype=pixels.real.dtype, device=images.device)
        at_a_time = CPU_GROUPS if images.device.type == "cpu" else ACCELERATOR_GROUPS
        for index in self.pixels.split(at_a_time):
            filtered, sparsity = self._filter_groups(pixels[index], sigma * threshold)
            where = index.reshape(-1)
            total.index_add_(0, where, filtered.reshape(-1, n_states))
            weight.index_add_(0, where, sparsity[:, None].expand(index.shape).reshape(-1))
        return (total / weight[:, None]).T.reshape(images.shape)

    def _filter_groups(self, groups: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Thresholded groups ``(group, patch pixel, state)`` times their weight, and the weights."""
        _, vectors = torch.linalg.eigh(groups.mH @ groups)  # strongest last
        decorrelated = groups @ vectors
        # real transform on real and imaginary parts together
        parts = torch.view_as_real(decorrelated).flatten(-2)
        transformed = torch.matmul(self.transform, parts).unflatten(-1, (-1, 2))
        keep = transformed.square().sum(-1) > level * level
        keep[:, 0, -1] = True  # the mean of the strongest component
        weight = 1.0 / keep.sum((1, 2)).to(parts.dtype)
        # the weight rides along: a scalar per group commutes with the transforms
        kept = (transformed * (keep * weight[:, None, None])[..., None]).flatten(-2)
        back = torch.matmul(self.transform.T, kept).unflatten(-1, (-1, 2)).contiguous()
        return torch.view_as_complex(back) @ vectors.mH, weight


def principal_images(series: Tensor, most: int) -> Tensor:
    """The strongest ``most`` principal images ``(component, row, column)`` of ``(state, row, column)``, scaled by their strength."""
    flat = series.reshape(series.shape[0], -1)
    _, vectors = torch.linalg.eigh(flat @ flat.mH)
    strongest = vectors[:, -min(most, series.shape[0]) :]
    return (strongest.mH @ flat).reshape(-1, *series.shape[1:])


def _patch_distance(images: Tensor, step: tuple[int, int], side: int) -> Tensor:
    """Squared distance of the patch at every pixel to the patch that is ``step`` away, ``(row, column)``."""
    moved = torch.roll(images, (-step[0], -step[1]), (1, 2))
    difference = torch.view_as_real(images - moved).square().sum((0, -1))
    padded = torch.nn.functional.pad(difference[None, None], (0, side - 1, 0, side - 1), mode="circular")
    return torch.nn.functional.avg_pool2d(padded, side, 1)[0, 0]


@cache
def _group_transform(group: int, side: int) -> Tensor:
    """Orthonormal Haar (over patches) x cosine (over both patch axes) as one matrix of side ``group * side^2``."""
    haar = torch.ones(1, 1)
    while haar.shape[0] < group:
        fine = torch.kron(torch.eye(haar.shape[0]), torch.tensor([[1.0, -1.0]]))
        haar = torch.cat([torch.kron(haar, torch.tensor([[1.0, 1.0]])), fine]) / math.sqrt(2)
    k = torch.arange(side, dtype=torch.float64)
    cosine = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / side) * math.sqrt(2 / side)
    cosine[0] /= math.sqrt(2)
    return torch.kron(haar.double(), torch.kron(cosine, cosine)).float()
