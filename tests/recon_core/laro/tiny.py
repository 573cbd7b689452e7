"""A small scan for LARO's tests, simulated once per process."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import torch

from recon_core.operators.planes import Planes
from recon_core.sampling.learned import draw_mask, multilevel_density
from recon_core.sampling.masks import centre_block
from recon_core.simulation.multi_echo_brain import BrainScan, ScanRecipe, simulate
from recon_core.types import KSpace, ScanInfo

RECIPE = ScanRecipe(matrix=(12, 20, 14), voxel=(7.0, 9.0), n_echoes=3, n_coils=4)
SHAPE, N_SAMPLES, ACS = (12, 20), 80, (4, 4)


@cache
def tiny_scan(seed: int = 5) -> BrainScan:
    """12 x 20 x 14 voxels, 3 echoes, 4 coils."""
    return simulate(RECIPE, seed)


def sampled(scan: BrainScan, *, noise: float = 0.005, full: bool = False, seed: int = 0) -> tuple[KSpace, ScanInfo]:
    """K-space of a scan under a mask per echo (R = 3), with its header's facts."""
    n = len(scan.images)
    density = np.repeat(multilevel_density(SHAPE, N_SAMPLES, ACS)[None], n, axis=0)
    mask = torch.ones(n, *SHAPE) if full else torch.from_numpy(draw_mask(density, N_SAMPLES, seed, ACS)).float()
    kspace = Planes(scan.coil_maps.movedim(-1, 0), mask).forward(scan.images.movedim(-1, 0)).permute(1, 2, 3, 4, 0)
    generator = torch.Generator().manual_seed(seed)
    kspace = kspace + noise * torch.randn(kspace.shape, dtype=torch.complex64, generator=generator)
    kspace = kspace * mask[:, None, :, :, None]
    block = torch.from_numpy(centre_block(SHAPE, ACS))
    matrix = (SHAPE[0], SHAPE[1], int(scan.images.shape[-1]))
    fov = (matrix[0] * scan.voxel[0], matrix[1] * scan.voxel[1], matrix[2] * scan.voxel[2])
    info = ScanInfo(matrix, fov, matrix, fov, echo_times=scan.echo_times, field_strength=3.0)
    acs = kspace.mean(0) * block[None, :, :, None]
    return KSpace(kspace, mask, acs=acs, acs_mask=block, coil_maps=scan.coil_maps, noise_std=noise or None), info


def without(kspace: KSpace, echo: int) -> KSpace:
    """The scan with an echo of which nothing was sampled."""
    data, counts = kspace.data.clone(), kspace.counts.clone()
    data[echo], counts[echo] = 0, 0
    return replace(kspace, data=data, counts=counts)
