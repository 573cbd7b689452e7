"""Time-dependent deep image prior: a point on a helix per state, a small perceptron, a convolutional decoder (as TDDIP)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.comparators.fitting import FitSettings, Part, descend, finish, split, start, state_positions
from recon_core.settings import setting
from recon_core.types import KSpace, Report, Result, ScanInfo

Tensor = torch.Tensor

NAME = "tddip"
SUMMARY = "Time-dependent deep image prior: temporal latent, mapping network, convolutional decoder"
NEEDS_COIL_MAPS = True


@dataclass(frozen=True)
class Settings(FitSettings):
    """Sizes and schedule; the publication has 128 channels and 10000 iterations."""

    states_per_step: int = setting(2, "states that one step uses", low=1, high=64)
    channels: int = setting(24, "of the decoder", low=2, high=256)
    scales: int = setting(4, "doublings of the matrix", low=1, high=7)
    hidden: int = setting(128, "width of the mapping network", low=4, high=2048)


class Network(nn.Module):
    """State positions to complex images."""

    def __init__(self, settings: Settings, shape: tuple[int, int], periodic: bool) -> None:
        super().__init__()
        self.shape, self.periodic = shape, periodic
        factor = 2**settings.scales
        self.seed_shape = (settings.channels // 2, math.ceil(shape[0] / factor), math.ceil(shape[1] / factor))
        self.mapping = nn.Sequential(
            nn.Linear(3, settings.hidden), nn.ReLU(), nn.Linear(settings.hidden, math.prod(self.seed_shape))
        )
        layers: list[nn.Module] = []
        n_in = self.seed_shape[0]
        for _ in range(settings.scales):
            layers += [nn.Upsample(scale_factor=2, mode="nearest"), *_block(n_in, settings.channels)]
            n_in = settings.channels
        self.decoder = nn.Sequential(*layers, *_block(n_in, n_in), nn.Conv2d(n_in, 2, 1))

    def latent(self, states: Tensor) -> Tensor:
        """Points of a helix; of a circle when the states go round; of half a turn when they have two ends. ``(state, 3)``."""
        angle = (2 if self.periodic else 1) * torch.pi * states
        height = torch.zeros_like(states) if self.periodic else 2 * states - 1
        return torch.stack([angle.cos(), angle.sin(), height], dim=-1)

    def forward(self, states: Tensor) -> Tensor:
        """Complex ``(state, 1, y, x)``."""
        seeds = self.mapping(self.latent(states)).reshape(-1, *self.seed_shape)
        planes = self.decoder(seeds)[:, :, : self.shape[0], : self.shape[1]]
        return torch.view_as_complex(planes.movedim(1, -1).contiguous())[:, None]


def _block(n_in: int, n_out: int) -> list[nn.Module]:
    # no normalisation: within an image it would take away the contrasts' amplitudes (22.9 against 26.7 dB on a small cine),
    # across images the states of a step would see one another
    return [nn.Conv2d(n_in, n_out, 3, padding=1), nn.LeakyReLU(0.1)]


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """Fit mapping network and decoder to k-space; complex64 ``(state, z, y, x)``.

    Simpler than the original: fewer channels, one convolution per scale, no batch normalisation, Cartesian data with given maps,
    a few states per step.

    References
    ----------
    Yoo et al., IEEE Trans. Med. Imaging 40 (2021) 3337.
    """
    problem = start(kspace, scan, report, settings.seed)
    positions, periodic = state_positions(scan, kspace.n_states)
    n_z, n_y, n_x = kspace.data.shape[2:]
    if n_z > 1:
        raise ValueError("the comparators reconstruct slices, not slabs")
    device = kspace.data.device
    network, positions = Network(settings, (n_y, n_x), periodic).to(device), positions.to(device)
    parts = split(problem, kspace, state_groups=math.ceil(kspace.n_states / settings.states_per_step))

    def render(part: Part) -> Tensor:
        return network(positions[part.states])

    groups = [{"params": list(network.parameters())}]
    history = descend(parts, render, groups, settings, report, NAME)
    return finish(problem, kspace, parts, render, history)
