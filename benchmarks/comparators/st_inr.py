"""A joint hash grid over (y, x, t) with a small perceptron, low-rank and temporal total-variation terms (as ST-INR)."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.comparators.fitting import (
    FitSettings,
    Part,
    descend,
    finish,
    pixel_positions,
    split,
    start,
    state_positions,
    temporal_order,
)
from recon_core.settings import setting
from recon_core.types import KSpace, Report, Result, ScanInfo

Tensor = torch.Tensor

NAME = "st_inr"
SUMMARY = "Joint spatio-temporal hash grid, low-rank and temporal total-variation terms"
NEEDS_COIL_MAPS = True

PRIMES = (1, 2654435761, 805459861)
"""Of the spatial hash of Mueller et al., eq 4: x, y and t."""


@dataclass(frozen=True)
class Settings(FitSettings):
    """Sizes, terms and schedule; the publication has 16 levels, 2^24 entries, a perceptron of 128 x 5, 1600 iterations."""

    column_groups: int = setting(8, "parts of the readout; one is used per step", low=1, high=1024)
    levels: int = setting(10, "resolutions of the grid", low=1, high=20)
    features: int = setting(2, "per level", low=1, high=8)
    log2_entries: int = setting(20, "most entries of a level", low=8, high=24)
    base: int = setting(8, "cells of the coarsest level along y and x", low=2, high=64)
    growth: float = setting(1.5, "ratio of successive levels", low=1.05, high=4.0)
    width: int = setting(64, "of the perceptron", low=8, high=512)
    depth: int = setting(2, "hidden layers", low=1, high=8)
    low_rank: float = setting(2e-4, "weight of the nuclear norm, per value", low=0.0, high=10.0)
    temporal_variation: float = setting(2e-3, "weight of the total variation over states, per value", low=0.0, high=10.0)
    learning_rate: float = setting(5e-3, "of Adam, of table and perceptron", low=1e-6, high=1.0)
    weight_decay: float = setting(1e-6, "of the perceptron", low=0.0, high=1.0)


class _Product(torch.autograd.Function):
    """A fixed sparse matrix times a table, with its transpose at hand for the gradient."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, matrix: Tensor, transposed: Tensor) -> Tensor:
        ctx.transposed = transposed
        return matrix @ table

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.transposed @ gradients[0].contiguous(), None, None


def interpolation(points: Tensor, cells: tuple[int, int, int], n_entries: int) -> tuple[Tensor, Tensor]:
    """Trilinear interpolation of a level: entries int64 and weights ``(point, 8)`` for points ``(y, x, t)`` from 0 to 1.

    Entries are numbered row by row where the level fits into ``n_entries``, else hashed.
    """
    size = torch.tensor([n + 1 for n in cells])
    scaled = points * torch.tensor(cells)
    lower = torch.minimum(scaled.floor().long(), size - 2).clamp_min(0)
    share = scaled - lower
    dense = int(size.prod()) <= n_entries
    entries, weights = [], []
    for corner in range(8):
        offset = torch.tensor([corner >> 2 & 1, corner >> 1 & 1, corner & 1])
        y, x, t = (lower + offset).unbind(-1)
        if dense:
            entries.append((y * size[1] + x) * size[2] + t)
        else:
            entries.append((x * PRIMES[0] ^ y * PRIMES[1] ^ t * PRIMES[2]) % n_entries)
        weights.append(torch.where(offset.bool(), share, 1 - share).prod(-1))
    return torch.stack(entries, -1), torch.stack(weights, -1)


class Encoder:
    """Sparse matrices ``(point * level, entry)`` for the points of each part, made once: the grid never changes."""

    def __init__(self, settings: Settings, n_states: int) -> None:
        self.settings = settings
        self.cells = []
        for level in range(settings.levels):
            side = round(settings.base * settings.growth**level)
            self.cells.append((side, side, max(1, min(side, n_states - 1))))
        most = 2**settings.log2_entries
        self.sizes = [min(most, (a + 1) * (b + 1) * (c + 1)) for a, b, c in self.cells]
        self.n_entries = sum(self.sizes)

    def matrices(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The interpolation and its transpose, CSR float32."""
        first, all_entries, all_weights = 0, [], []
        for cells, size in zip(self.cells, self.sizes, strict=True):
            entries, weights = interpolation(points.cpu(), cells, 2**self.settings.log2_entries)
            all_entries.append(entries + first)
            all_weights.append(weights)
            first += size
        entries, values = torch.stack(all_entries, 1), torch.stack(all_weights, 1).float()
        n_rows = entries.shape[0] * entries.shape[1]
        rows = torch.arange(n_rows).repeat_interleave(8)
        index = torch.stack([rows, entries.reshape(-1)])
        found = []
        for order, size in ((index, (n_rows, self.n_entries)), (index.flip(0), (self.n_entries, n_rows))):
            with warnings.catch_warnings():
                # "sparse CSR is in beta state", said once by each process
                warnings.simplefilter("ignore", UserWarning)
                coo = torch.sparse_coo_tensor(order, values.reshape(-1), size, check_invariants=False)
                found.append(coo.to_sparse_csr().to(points.device))
        return found[0], found[1]


class Network(nn.Module):
    """Features of the grid to a complex value."""

    def __init__(self, settings: Settings, encoder: Encoder) -> None:
        super().__init__()
        self.table = nn.Parameter(1e-2 * (2 * torch.rand(encoder.n_entries, settings.features) - 1))
        n_in = settings.levels * settings.features
        layers: list[nn.Module] = []
        for _ in range(settings.depth):
            layers += [nn.Linear(n_in, settings.width), nn.ReLU()]
            n_in = settings.width
        self.body = nn.Sequential(*layers, nn.Linear(n_in, 2))

    def forward(self, matrix: Tensor, transposed: Tensor, n_points: int) -> Tensor:
        """Complex ``(point,)``."""
        features = _Product.apply(self.table, matrix, transposed)
        return torch.view_as_complex(self.body(features.reshape(n_points, -1)).contiguous())


def nuclear_norm(images: Tensor) -> Tensor:
    """Sum of the singular values of states x pixels, over the number of values times its square root: a mean of amplitudes."""
    casorati = images.flatten(1)
    gram = casorati @ casorati.mH
    # a little on the diagonal: the root's slope at zero is infinite
    floor = 1e-8 * gram.diagonal().real.sum()
    squares = torch.linalg.eigvalsh(gram + floor * torch.eye(len(gram), device=gram.device))
    return squares.clamp_min(0).sqrt().sum() / (casorati.numel() ** 0.5 * len(gram) ** 0.5)


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """Fit grid and perceptron to k-space with both terms; complex64 ``(state, z, y, x)``.

    Simpler than the original: fewer and smaller levels, squared instead of relative residuals, coil maps given.

    References
    ----------
    Feng et al., IEEE Trans. Med. Imaging 44 (2025), spatiotemporal implicit neural representation for dynamic MRI (ST-INR);
    Mueller et al., ACM Trans. Graph. 41 (2022) 102 (hash grid).
    """
    problem = start(kspace, scan, report, settings.seed)
    positions, periodic = state_positions(scan, kspace.n_states)
    order = temporal_order(scan, kspace.n_states).to(kspace.data.device)
    encoder = Encoder(settings, kspace.n_states)
    network = Network(settings, encoder).to(kspace.data.device)
    parts = split(problem, kspace, column_groups=settings.column_groups)
    n_y, known = kspace.data.shape[-2], {}
    # a circle's end is not its beginning here, as in the original: its grid has two ends
    position = positions.to(kspace.data.device) * (kspace.n_states / max(1, kspace.n_states - 1) if periodic else 1.0)
    for part in parts:
        pixels = (pixel_positions(kspace, part.columns) + 1) / 2
        t = position[part.states]
        points = torch.cat([pixels.repeat(len(t), 1), t.repeat_interleave(len(pixels))[:, None]], dim=1)
        known[id(part)] = encoder.matrices(points.double())

    def render(part: Part) -> Tensor:
        shape = (len(part.states), 1, n_y, len(part.columns))
        return network(*known[id(part)], shape[0] * shape[2] * shape[3]).reshape(shape)

    def penalty(images: Tensor, part: Part) -> Tensor:
        steps = images[order].diff(dim=0)
        if periodic:
            steps = torch.cat([steps, images[order[:1]] - images[order[-1:]]])
        variation = (torch.view_as_real(steps).square().sum(-1) + 1e-8).sqrt().mean()
        return settings.low_rank * nuclear_norm(images) + settings.temporal_variation * variation

    groups: list[dict[str, object]] = [
        {"params": [network.table]},
        {"params": list(network.body.parameters()), "weight_decay": settings.weight_decay},
    ]
    history = descend(parts, render, groups, settings, report, NAME, penalty)
    return finish(problem, kspace, parts, render, history)
