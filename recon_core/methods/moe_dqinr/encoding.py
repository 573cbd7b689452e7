"""The multiresolution hash grid on a reconstruction grid that never moves: a fixed sparse interpolation matrix.

A hash grid looks its four corners up anew for every coordinate. Here the coordinates are the pixels of one matrix, so the whole
encoder (Eq. 11) is ``psi = A t`` with a sparse ``A`` known beforehand and ``t`` the table. Only the entries that some pixel
touches are kept (a fifth at the published sizes): the others never reach the image, so nothing changes, Adam and weight decay
included. The price: a table serves one matrix only.

Indexing follows instant-ngp: level scale ``base * growth**l - 1``, position ``r * scale + 1/2``, dense where the level's grid
fits in the table, else ``x xor (y * 2654435761)``, both modulo the level's size.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from recon_core.errors import DataError
from recon_core.methods.moe_dqinr.configurations import HashGridShape

Tensor = torch.Tensor

PRIME = 2654435761
"""Of the spatial hash, for the second axis (the first axis has 1)."""

ALIGNMENT = 8
"""A dense level's size is rounded up to a multiple of this, as in instant-ngp."""


def level_scale(grid: HashGridShape, level: int) -> float:
    """Grid spacings across the unit square."""
    return grid.base * grid.growth**level - 1.0


def level_resolution(grid: HashGridShape, level: int) -> int:
    """Grid lines along one axis."""
    return math.ceil(level_scale(grid, level)) + 1


def level_entries(grid: HashGridShape, level: int) -> int:
    """Entries of a level in the full table."""
    wanted = level_resolution(grid, level) ** 2
    return min(-(-wanted // ALIGNMENT) * ALIGNMENT, 2**grid.log2_size)


def working_coordinates(height: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """Eq. 10 for every pixel in working order: float64 ``(x * height + y, 2)``, first the x, then the y coordinate.

    Working images are ``(x, z, y)`` with the image centre at index 0 of y (``CartesianSense``): working row k is row
    ``(k + height // 2) mod height`` of the centred image, which Eq. 10 counts from its edge.
    """
    x = torch.arange(width, device=device, dtype=torch.float64) / max(1, width - 1)
    row = (torch.arange(height, device=device) + height // 2) % height
    y = row.to(torch.float64) / max(1, height - 1)
    return torch.stack([x.repeat_interleave(height), y.repeat(width)], dim=1)


def corners(grid: HashGridShape, level: int, coordinates: Tensor) -> tuple[Tensor, Tensor]:
    """Entries (int64) and bilinear weights (float64) of one level, both ``(pixel, 4)``, entries within the level."""
    position = coordinates * level_scale(grid, level) + 0.5
    lower = position.floor()
    fraction = position - lower
    lower = lower.to(torch.int64)
    size, resolution = level_entries(grid, level), level_resolution(grid, level)
    dense = resolution**2 <= size
    entries, weights = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = lower[:, 0] + dx, lower[:, 1] + dy
            entries.append((x + y * resolution if dense else x ^ (y * PRIME)) % size)
            wx = fraction[:, 0] if dx else 1 - fraction[:, 0]
            wy = fraction[:, 1] if dy else 1 - fraction[:, 1]
            weights.append(wx * wy)
    return torch.stack(entries, dim=1), torch.stack(weights, dim=1)


@dataclass(frozen=True)
class Interpolation:
    """The matrix ``A`` in working order, compact.

    Row ``pixel * levels + level`` has four elements: ``columns`` int64 and ``weights`` float64, ``(pixel, level, 4)``. Columns
    are compact: ``touched[level]`` entries of each level, level after level. ``entries`` int64 ``(compact,)`` are the indices
    that those have in the full table's level.
    """

    columns: Tensor
    weights: Tensor
    touched: tuple[int, ...]
    entries: Tensor

    @property
    def n_entries(self) -> int:
        return sum(self.touched)


@lru_cache(maxsize=4)
def interpolation(grid: HashGridShape, height: int, width: int, device: torch.device) -> Interpolation:
    """The interpolation of a reconstruction grid; kept for the next slice of the same size."""
    coordinates = working_coordinates(height, width, device)
    columns, weights, touched, entries = [], [], [], []
    first = 0
    for level in range(grid.levels):
        entry, weight = corners(grid, level, coordinates)
        found, compact = torch.unique(entry, return_inverse=True)
        columns.append(compact + first)
        weights.append(weight)
        touched.append(len(found))
        entries.append(found)
        first += len(found)
    return Interpolation(torch.stack(columns, dim=1), torch.stack(weights, dim=1), tuple(touched), torch.cat(entries))


class SparseProduct:
    """``A`` and ``A^T`` for some pixels, ready to be multiplied: always the same sums in the same order, no atomics.

    On the CPU both are CSR products. On an accelerator, where the library's sparse products may differ in their last bits from
    run to run, both are gathers: ``A`` has four elements in every row, and rows of ``A^T`` are grouped by their number of
    elements, padded to powers of two.

    Parameters
    ----------
    plan
        Of the whole grid.
    n_features
        Features of one level.
    dtype
        Of the products.
    pixels
        int64, the pixels whose rows are kept, in this order; all if ``None``.
    gather
        Which of the two forms; ``None``: by the device.
    """

    def __init__(
        self,
        plan: Interpolation,
        n_features: int,
        dtype: torch.dtype,
        pixels: Tensor | None = None,
        gather: bool | None = None,
    ) -> None:
        columns = plan.columns if pixels is None else plan.columns[pixels]
        weights = (plan.weights if pixels is None else plan.weights[pixels]).to(dtype)
        self.n_pixels, self.n_levels = int(columns.shape[0]), int(columns.shape[1])
        self.n_features, self.n_entries = n_features, plan.n_entries
        rows = self.n_pixels * self.n_levels
        flat_columns, flat_weights = columns.reshape(rows, 4), weights.reshape(rows, 4)
        if dtype.is_complex or rows * 4 >= 2**31:
            raise DataError("not a size for an encoding", where="hash grid", got=f"{rows} rows of {dtype}")
        # stable: elements of one row of the transpose stay in pixel order
        order = torch.argsort(flat_columns.reshape(-1), stable=True)
        counts = torch.bincount(flat_columns.reshape(-1), minlength=self.n_entries)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        source, weight = torch.div(order, 4, rounding_mode="floor"), flat_weights.reshape(-1)[order]
        self._forward: Callable[[Tensor], Tensor]
        self._transpose: Callable[[Tensor], Tensor]
        if columns.device.type == "cpu" and not gather:
            crow = torch.arange(0, 4 * rows + 1, 4)
            # element order within a row is free, and sorted columns are what the library expects
            sorted_columns, within = flat_columns.sort(dim=1)
            matrix = _csr(
                crow, sorted_columns.reshape(-1), flat_weights.gather(1, within).reshape(-1), (rows, self.n_entries)
            )
            transposed = _csr(starts, source, weight, (self.n_entries, rows))
            self._forward, self._transpose = matrix.matmul, transposed.matmul
        else:
            buckets = _buckets(counts, starts, source, weight)
            self._forward = lambda table: (table[flat_columns] * flat_weights[..., None]).sum(1)
            self._transpose = lambda rows: _gather_transposed(buckets, rows, self.n_entries)

    def forward(self, table: Tensor) -> Tensor:
        """``(compact, feature)`` to features ``(pixel, level * feature)``."""
        return self._forward(table).reshape(self.n_pixels, self.n_levels * self.n_features)

    def transpose(self, gradient: Tensor) -> Tensor:
        """Adjoint of ``forward``: ``(pixel, level * feature)`` to ``(compact, feature)``."""
        return self._transpose(gradient.reshape(self.n_pixels * self.n_levels, self.n_features))


Bucket = tuple[Tensor, Tensor, Tensor]


def _csr(starts: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        # "sparse CSR is in beta state", said once by each process
        warnings.simplefilter("ignore", UserWarning)
        # 32-bit indices halve what a product has to read
        return torch.sparse_csr_tensor(starts.to(torch.int32), columns.to(torch.int32), values, size, check_invariants=False)


def _buckets(counts: Tensor, starts: Tensor, source: Tensor, weight: Tensor) -> list[Bucket]:
    """Rows of ``A^T`` by their number of elements: entries, and sources and weights padded to a power of two."""
    buckets: list[Bucket] = []
    most = int(counts.max()) if counts.numel() else 0
    low, high = 0, 4
    while low < most:
        entries = ((counts > low) & (counts <= high)).nonzero()[:, 0]
        if len(entries):
            place = torch.arange(min(high, most), device=counts.device)
            inside = place < counts[entries, None]
            element = torch.where(inside, starts[entries, None] + place, starts[entries, None])
            buckets.append((entries, source[element], weight[element] * inside))
        low, high = high, 2 * high
    return buckets


def _gather_transposed(buckets: list[Bucket], rows: Tensor, n_entries: int) -> Tensor:
    out = rows.new_zeros(n_entries, rows.shape[1])
    for entries, source, weight in buckets:
        # every entry is in one bucket: an assignment, not a sum
        out.index_copy_(0, entries, (rows[source] * weight[..., None]).sum(1))
    return out


class _Encode(torch.autograd.Function):
    """``A t`` with the precomputed transpose as its gradient."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, product: SparseProduct) -> Tensor:
        ctx.product = product
        return product.forward(table)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.product.transpose(gradients[0].contiguous()), None


class HashGrid(torch.nn.Module):
    """The spatial encoder Phi_xi of Eq. 11 on one reconstruction grid.

    Parameters
    ----------
    grid
        Levels, sizes, initial scale.
    height, width
        Pixels along y and x.
    generator
        On the CPU, so that every device starts from the same numbers.
    pixels
        int64, the working pixels that are wanted; all if ``None``.
    """

    def __init__(
        self,
        grid: HashGridShape,
        height: int,
        width: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        pixels: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.pixels = pixels
        self.grid, self.height, self.width = grid, height, width
        n_entries = interpolation(grid, height, width, torch.device(device)).n_entries
        start = torch.empty(n_entries, grid.features, dtype=dtype)
        start.uniform_(-grid.init_scale, grid.init_scale, generator=generator)
        self.table = torch.nn.Parameter(start.to(device))
        self._product: SparseProduct | None = None
        self._product_for: tuple[torch.device, torch.dtype] | None = None

    @property
    def product(self) -> SparseProduct:
        """The interpolation of all wanted pixels on the table's device."""
        wanted = (self.table.device, self.table.dtype)
        if self._product is None or self._product_for != wanted:
            self._product, self._product_for = self.product_of(self.pixels), wanted
        return self._product

    def product_of(self, pixels: Tensor | None) -> SparseProduct:
        """The interpolation at some pixels (working order)."""
        plan = interpolation(self.grid, self.height, self.width, self.table.device)
        pixels = None if pixels is None else pixels.to(self.table.device)
        return SparseProduct(plan, self.grid.features, self.table.dtype, pixels)

    def forward(self) -> Tensor:
        """Features ``(pixel, level * feature)`` of the wanted pixels, working order."""
        features: Tensor = _Encode.apply(self.table, self.product)
        return features
