"""One coordinate network for everything: Fourier features of (y, x, t) into a single multilayer perceptron (as FMLP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.comparators.fitting import FitSettings, Part, descend, finish, pixel_positions, split, start, state_positions
from recon_core.settings import setting
from recon_core.types import KSpace, Report, Result, ScanInfo

Tensor = torch.Tensor

NAME = "fmlp"
SUMMARY = "Monolithic coordinate network with Fourier features"
NEEDS_COIL_MAPS = True


@dataclass(frozen=True)
class Settings(FitSettings):
    """Sizes and schedule; the publication trains 512 wide, 7 deep, thousands of iterations."""

    iterations: int = setting(600, "stochastic steps", low=1, high=100000)
    column_groups: int = setting(16, "parts of the readout; one is used per step", low=1, high=1024)
    width: int = setting(128, "of the perceptron", low=8, high=1024)
    depth: int = setting(4, "hidden layers", low=1, high=12)
    spatial_features: int = setting(256, "random spatial frequencies", low=1, high=2048)
    spatial_scale: float = setting(12.0, "their standard deviation, cycles per half field of view", low=0.1, high=200.0)
    temporal_harmonics: int = setting(4, "sine and cosine pairs of the state axis", low=1, high=64)


class Network(nn.Module):
    """``(y, x, t)`` to a complex value."""

    def __init__(self, settings: Settings, periodic: bool) -> None:
        super().__init__()
        self.periodic = periodic
        self.frequencies = nn.Parameter(
            settings.spatial_scale * torch.randn(2, settings.spatial_features), requires_grad=False
        )
        self.harmonics = settings.temporal_harmonics
        # the first layer is linear in its input: spatial and temporal features enter separately, and their sum costs nothing
        self.spatial = nn.Linear(2 * settings.spatial_features, settings.width)
        self.temporal = nn.Linear(2 * settings.temporal_harmonics + 1, settings.width)
        layers: list[nn.Module] = []
        for _ in range(settings.depth - 1):
            layers += [nn.Linear(settings.width, settings.width), nn.ReLU()]
        self.body = nn.Sequential(nn.ReLU(), *layers)
        self.head = nn.Linear(settings.width, 2)

    def forward(self, pixels: Tensor, states: Tensor) -> Tensor:
        """Pixels ``(pixel, 2)`` and states ``(state,)`` to complex ``(state, pixel)``."""
        phase = torch.pi * pixels @ self.frequencies
        spatial = self.spatial(torch.cat([phase.sin(), phase.cos()], dim=-1))
        # once round for a circle, half a turn for an axis with two ends
        turn = (
            (2 if self.periodic else 1)
            * torch.pi
            * states[:, None]
            * torch.arange(1, self.harmonics + 1, device=states.device)
        )
        ramp = torch.zeros_like(states) if self.periodic else 2 * states - 1
        temporal = self.temporal(torch.cat([turn.sin(), turn.cos(), ramp[:, None]], dim=-1))
        return torch.view_as_complex(self.head(self.body(spatial[None] + temporal[:, None])).contiguous())


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """Fit the network to k-space alone; complex64 ``(state, z, y, x)``.

    Simpler than the original: smaller, no coil network (maps are given), stochastic over readout columns.

    References
    ----------
    Kunz, Ruschke & Heckel, arXiv:2308.14588 (FMLP); Tancik et al., NeurIPS 2020 (Fourier features).
    """
    problem = start(kspace, scan, report, settings.seed)
    positions, periodic = state_positions(scan, kspace.n_states)
    device = kspace.data.device
    network, positions = Network(settings, periodic).to(device), positions.to(device)
    parts = split(problem, kspace, column_groups=settings.column_groups)
    n_y = kspace.data.shape[-2]

    def render(part: Part) -> Tensor:
        values = network(pixel_positions(kspace, part.columns), positions[part.states])
        return values.reshape(len(part.states), 1, n_y, len(part.columns))

    groups = [{"params": [p for p in network.parameters() if p.requires_grad]}]
    history = descend(parts, render, groups, settings, report, NAME)
    return finish(problem, kspace, parts, render, history)
