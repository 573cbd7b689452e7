"""Susceptibility where it was measured: consoles that interpolate images get the map of the measured voxels, interpolated.

Zero-filled images hold nothing new, but neighbours that share their noise: it would be taken for less than it is, the penalty would weigh
less against four times as many voxels, and thresholds in voxels would mean something else.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from recon_core.maps.r2star import R2StarMaps
from recon_core.maps.regrid import map_on_recon_matrix
from recon_core.preprocess.oversampling import to_recon_matrix
from recon_core.types import ParameterMap, ScanInfo, Tensor

FINER = 1.25
"""Console's voxels for each measured one along an axis, from which on they count as interpolated: even sizes are not worth it."""


def measured_grid(scan: ScanInfo) -> ScanInfo:
    """The scan with the console's field of view in voxels as large as they were measured; ``scan`` itself where nothing is interpolated."""
    matrix = tuple(
        min(recon_n, max(1, round(n * recon_fov / fov))) if recon_n * fov > FINER * n * recon_fov and n > 1 else recon_n
        for n, fov, recon_n, recon_fov in zip(scan.matrix, scan.fov, scan.recon_matrix, scan.recon_fov, strict=True)
    )
    return scan if matrix == scan.recon_matrix else replace(scan, recon_matrix=(matrix[0], matrix[1], matrix[2]))


def images_between(images: Tensor, of: ScanInfo, to: ScanInfo) -> Tensor:
    """``(echo, z, y, x)`` of one console matrix on that of the other, by Fourier transform."""
    move = (of.recon_matrix, of.recon_fov, to.recon_matrix, to.recon_fov)
    return torch.stack([to_recon_matrix(image, *move) for image in images])


def map_between(parameter: ParameterMap, of: ScanInfo, to: ScanInfo) -> ParameterMap:
    """One map, linearly between valid neighbours (`map_on_recon_matrix`)."""
    return map_on_recon_matrix(parameter, replace(to, matrix=of.recon_matrix, fov=of.recon_fov))


def mask_between(mask: Tensor, of: ScanInfo, to: ScanInfo) -> Tensor:
    """bool ``(z, y, x)``: where at least half is inside."""
    return map_between(ParameterMap("mask", mask.float(), "1", mask), of, to).valid


def decay_between(found: R2StarMaps, of: ScanInfo, to: ScanInfo) -> R2StarMaps:
    """R2*, its standard deviation and S0."""
    return R2StarMaps(*(map_between(m, of, to) for m in found.maps))
