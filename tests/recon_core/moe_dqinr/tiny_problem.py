"""A small problem in double precision, and the paper's forward model written out with NumPy's conventions on the full 2D k-space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from recon_core.methods.moe_dqinr.configurations import TINY, HashGridShape, MlpShape
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.objective import Objective, make_objective
from recon_core.problem import Problem, pose
from recon_core.types import KSpace, Report
from tests.recon_core.small_series import SmallSeries, small_series

NOISE = 0.02

MIDDLE = replace(
    TINY,
    grid=HashGridShape(levels=6, log2_size=12, base=4, growth=1.6, init_scale=0.1),
    background=MlpShape(width=24, depth=2),
    expert=MlpShape(width=24, depth=2),
    n_experts=5,
)
"""Large enough to learn something in a second."""


def tiny_series(shape: tuple[int, int, int] = (1, 12, 10), n_states: int = 4) -> SmallSeries:
    """Double precision data of 3 coils, rectangular matrix."""
    series = small_series(shape, n_states, 3, noise=NOISE, keep=0.4, n_acs=4)
    kspace = series.kspace
    assert kspace.coil_maps is not None
    doubled = replace(kspace, data=kspace.data.to(torch.complex128), coil_maps=kspace.coil_maps.to(torch.complex128))
    return replace(series, kspace=doubled)


def tiny_problem(series: SmallSeries, held_out: float = 0.0) -> tuple[Problem, Objective]:
    problem = pose(series.kspace, "test", Report())
    return problem, make_objective(problem, series.kspace, held_out, seed=3)


def tiny_field(problem: Problem, seed: int = 0, **options: object) -> MoeField:
    """Float64 field of the ``TINY`` configuration on the problem's grid."""
    generator = torch.Generator().manual_seed(seed)
    n_states, *spatial = problem.operator.image_shape
    configuration = options.pop("configuration", TINY)
    return MoeField(configuration, n_states, tuple(spatial), generator=generator, dtype=torch.float64, **options)  # type: ignore[arg-type]


def explicit_loss(images: torch.Tensor, kspace: KSpace, scale: float) -> torch.Tensor:
    """Eq. 22-23 on the 2D k-space: centred images ``(state, y, x)``, 2D FFTs of coil images, squared differences at samples.

    The measured hybrid data are transformed along x first, so this is the paper's sum over (k0, k1), not over (x, k1).
    """
    assert kspace.coil_maps is not None

    def transform(array: torch.Tensor, axes: tuple[int, ...]) -> torch.Tensor:
        return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(array, dim=axes), dim=axes, norm="ortho"), dim=axes)

    predicted = transform(images[:, None] * kspace.coil_maps[:, 0], (-2, -1))
    measured = transform(kspace.data[:, :, 0], (-1,)) / scale
    difference = (predicted - measured) * (kspace.counts[:, 0] > 0)[:, None, :, None]
    return torch.view_as_real(difference).square().sum()


def centred(working: torch.Tensor) -> torch.Tensor:
    """Working images ``(state, x, 1, y)`` to centred ``(state, y, x)``."""
    return torch.fft.fftshift(working[:, :, 0], dim=-1).transpose(-1, -2)


def low_rank_series(n_states: int, n_x: int, n_y: int, rank: int, seed: int = 0) -> torch.Tensor:
    """Complex working images ``(state, x, 1, y)`` of a given rank, smooth in space, magnitudes of about 1."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(0, 1, n_x), np.linspace(0, 1, n_y), indexing="ij")
    waves = [np.exp(2j * np.pi * (rng.uniform(-1, 1) * x + rng.uniform(-1, 1) * y)) for _ in range(rank)]
    courses = rng.standard_normal((n_states, rank)) / np.sqrt(rank)
    series = np.einsum("qr,rxy->qxy", courses, np.stack(waves))
    return torch.from_numpy(np.fft.ifftshift(series, axes=-1)[:, :, None].copy())
