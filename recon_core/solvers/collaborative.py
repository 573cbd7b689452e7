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
from torch.nn import functional

from recon_core.batches import batch
from recon_core.errors import DataError
from recon_core.solvers import compiled

Tensor = torch.Tensor

CPU_GROUPS, ACCELERATOR_GROUPS = 512, 1 << 16
"""Groups that are transformed at a time: on the CPU they stay in the cache."""

CPU_PRODUCTS = 1 << 23
"""Products between states of the groups transformed at a time, in each part: 64 MB. Reached with more than 128 states."""

CPU_PARTS = 4
"""Parts of a plane that threads may take; each sums for itself, so that the result does not depend on how many threads there are."""

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
    support
        bool ``(row, column)``: patches that touch none of it are no references, so that air costs nothing. Pixels that no patch
        covers stay what they are.

    Raises
    ------
    DataError
        The group is not a power of two, or patches are larger than the image.
    """

    def __init__(self, guide: Tensor, settings: PatchSettings, support: Tensor | None = None) -> None:
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
        steps = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
        distances = _patch_distances(principal_images(guide, GUIDE_COMPONENTS), steps, settings)
        # a patch is its own first partner, whatever rounding says
        distances[:, steps.index((0, 0))] = -1.0
        rows = torch.arange(0, n_rows, settings.stride, device=device)
        columns = torch.arange(0, n_columns, settings.stride, device=device)
        row, column = (axis.reshape(-1, 1) for axis in torch.meshgrid(rows, columns, indexing="ij"))
        if support is not None:
            wanted = _patches_touching(support, side)[row[:, 0], column[:, 0]]
            row, column, distances = row[wanted], column[wanted], distances[wanted]
        chosen = distances.topk(group, dim=1, largest=False).indices
        moves = torch.tensor(steps, device=device)[chosen]  # (reference, partner, 2)
        # where each patch begins: of all its pixels, a slab's groups would be larger than its images
        self.corners = ((row + moves[..., 0]) % n_rows * n_columns + (column + moves[..., 1]) % n_columns).int()
        self.transform = _group_transform(group, side).to(device)
        self.cosine = _cosine_transform(side).float()

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

        Raises
        ------
        DataError
            Images of another matrix than the guide's.
        """
        if images.ndim != 3 or tuple(images.shape[1:]) != self.shape:
            raise DataError(
                "images do not fit the groups", where="collaborative filter", got=tuple(images.shape), expected=self.shape
            )
        if images.device.type == "cpu" and images.dtype == torch.complex64 and compiled.is_there():
            total, weight, pixels = self._filter_compiled(images, sigma * threshold)
        else:
            total, weight, pixels = self._filter_tensors(images, sigma * threshold)
        covered = (weight > 0)[:, None]
        found = torch.where(covered, total / weight.clamp(min=torch.finfo(weight.dtype).tiny)[:, None], pixels).T
        n_states = len(images)
        return torch.complex(found[:n_states], found[n_states:]).reshape(images.shape)

    def _filter_compiled(self, images: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of all weighted patches and of their weights, and the images' ``(pixel, Re or Im of a state)``."""
        pixels = _real_pixels(images)
        grid = pixels.reshape(*self.shape, -1)
        parts = self.corners.tensor_split(CPU_PARTS)
        steps = _cpu_groups(len(images))

        def of(corners: Tensor) -> tuple[Tensor, Tensor]:
            total, weight = torch.zeros_like(grid), torch.zeros(self.shape)
            for some in corners.split(steps):
                products = torch.zeros(len(some), len(images), len(images), 2)
                compiled.grams(grid, some, self.settings.side, products)
                _, vectors = torch.linalg.eigh(torch.view_as_complex(products))
                compiled.filter_groups(grid, some, vectors.contiguous(), self.cosine, level, total, weight)
            return total, weight

        sums = compiled.side_by_side(of, parts)
        total, weight = sums[0]
        for other, its_weight in sums[1:]:
            total += other
            weight += its_weight
        return total.reshape(pixels.shape), weight.reshape(-1), pixels

    def _filter_tensors(self, images: Tensor, level: float) -> tuple[Tensor, Tensor, Tensor]:
        """The same as tensor operations, for any device."""
        pixels = _real_pixels(images)
        n_channels = pixels.shape[1]
        total = torch.zeros_like(pixels)
        weight = torch.zeros(pixels.shape[0], dtype=pixels.dtype, device=images.device)
        at_a_time = _cpu_groups(len(images)) if images.device.type == "cpu" else batch(ACCELERATOR_GROUPS)
        for corners in self.corners.split(at_a_time):
            index = self._pixels(corners)
            filtered, sparsity = self._filter_groups(pixels[index].mT.contiguous(), level)
            where = index.reshape(-1)
            total.index_add_(0, where, filtered.mT.reshape(-1, n_channels))
            weight.index_add_(0, where, sparsity[:, None].expand(index.shape).reshape(-1))
        return total, weight, pixels

    def _pixels(self, corners: Tensor) -> Tensor:
        """Of patches ``(group, partner)`` that begin at ``corners``: ``(group, partner * pixel)``."""
        n_rows, n_columns = self.shape
        inside = torch.arange(self.settings.side, device=corners.device)
        rows = (corners[..., None] // n_columns + inside) % n_rows
        columns = (corners[..., None] % n_columns + inside) % n_columns
        return (rows[..., :, None] * n_columns + columns[..., None, :]).flatten(1)

    def _filter_groups(self, groups: Tensor, level: float) -> tuple[Tensor, Tensor]:
        """Thresholded groups times their weight, and the weights.

        ``groups`` are real, ``(group, Re of all states and then Im, patch pixel)``: complex products are written as real ones, so that
        the transform of all groups is a single matrix product.
        """
        n_states = groups.shape[1] // 2
        products = groups @ groups.mT
        same = products[:, :n_states, :n_states] + products[:, n_states:, n_states:]
        mixed = products[:, :n_states, n_states:] - products[:, n_states:, :n_states]
        # eigenvectors of sum_p conj(g_q) g_r, strongest last; components are g @ vectors
        _, vectors = torch.linalg.eigh(torch.complex(same, mixed))
        real, imaginary = vectors.real.mT, vectors.imag.mT
        turn = torch.cat([torch.cat([real, -imaginary], 2), torch.cat([imaginary, real], 2)], 1)
        decorrelated = turn @ groups
        transformed = torch.matmul(decorrelated, self.transform.T)
        keep = transformed[:, :n_states].square() + transformed[:, n_states:].square() > level * level
        keep[:, -1, 0] = True  # the mean of the strongest component
        weight = 1.0 / keep.sum((1, 2)).to(groups.dtype)
        # the weight rides along: a scalar per group commutes with the transforms
        kept = transformed * (keep * weight[:, None, None]).repeat(1, 2, 1)
        return turn.mT @ torch.matmul(kept, self.transform), weight


def _cpu_groups(n_states: int) -> int:
    return max(1, min(batch(CPU_GROUPS), batch(CPU_PRODUCTS) // n_states**2))


def principal_images(series: Tensor, most: int) -> Tensor:
    """The strongest ``most`` principal images ``(component, row, column)`` of ``(state, row, column)``, scaled by their strength."""
    flat = series.reshape(series.shape[0], -1)
    _, vectors = torch.linalg.eigh(flat @ flat.mH)
    strongest = vectors[:, -min(most, series.shape[0]) :]
    return (strongest.mH @ flat).reshape(-1, *series.shape[1:])


def _patch_distances(images: Tensor, steps: list[tuple[int, int]], settings: PatchSettings) -> Tensor:
    """Mean squared distance of the reference patches to the patches that are ``steps`` away, ``(reference, step)``."""
    side, stride = settings.side, settings.stride
    n_rows, n_columns = images.shape[1:]
    reach = max(abs(dy) for dy, _ in steps)
    near = torch.cat([images.real, images.imag])
    far = functional.pad(near[None], (reach, reach, reach, reach), mode="circular")[0]
    found = []
    for dy, dx in steps:
        rows, columns = reach + dy, reach + dx
        difference = (near - far[:, rows : rows + n_rows, columns : columns + n_columns]).square_().sum(0)
        padded = functional.pad(difference[None, None], (0, side - 1, 0, side - 1), mode="circular")
        found.append(functional.avg_pool2d(padded, side, stride)[0, 0].flatten())
    return torch.stack(found, 1)


def _real_pixels(images: Tensor) -> Tensor:
    """``(state, row, column)`` complex to ``(pixel, Re of all states and then Im)``."""
    flat = images.reshape(len(images), -1)
    return torch.cat([flat.real, flat.imag]).T.contiguous()


def _patches_touching(support: Tensor, side: int) -> Tensor:
    """Bool ``(row, column)``: whether the patch that begins there touches the support."""
    padded = functional.pad(support[None, None].float(), (0, side - 1, 0, side - 1), mode="circular")
    return functional.max_pool2d(padded, side, 1)[0, 0] > 0


def _cosine_transform(side: int) -> Tensor:
    """Orthonormal, float64 ``(coefficient, pixel)``."""
    k = torch.arange(side, dtype=torch.float64)
    cosine = torch.cos(math.pi * (k[None] + 0.5) * k[:, None] / side) * math.sqrt(2 / side)
    cosine[0] /= math.sqrt(2)
    return cosine


@cache
def _group_transform(group: int, side: int) -> Tensor:
    """Orthonormal Haar (over patches) x cosine (over both patch axes) as one matrix of side ``group * side^2``."""
    haar = torch.ones(1, 1)
    while haar.shape[0] < group:
        fine = torch.kron(torch.eye(haar.shape[0]), torch.tensor([[1.0, -1.0]]))
        haar = torch.cat([torch.kron(haar, torch.tensor([[1.0, 1.0]])), fine]) / math.sqrt(2)
    cosine = _cosine_transform(side)
    return torch.kron(haar.double(), torch.kron(cosine, cosine)).float()
