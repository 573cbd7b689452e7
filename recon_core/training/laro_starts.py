"""Training scans as the chain meets them: sampled once by a mask, with first images of the whole slab (`STARTS`), and every other one
with coil maps that were estimated from its own calibration block.

Since such images are of a whole slab, a training from them cannot draw noise and masks anew for every plane. Here a scan's noise
belongs to the scan, the pattern and the plane; what was made once is held.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from recon_core.coils.estimate import CoilSettings, estimate_coil_maps
from recon_core.errors import CalibrationError
from recon_core.methods.laro.starts import low_rank_or_refined
from recon_core.operators.planes import Planes
from recon_core.problem import pose
from recon_core.simulation.multi_echo_brain import BrainScan, sampled_kspace
from recon_core.simulation.random_fields import sample_seed
from recon_core.simulation.scan_folder import ScanSupply
from recon_core.types import Report

Tensor = torch.Tensor
BoolArray = NDArray[np.bool_]

STARTS = ("llr", "refined")
"""First images that take a whole slab."""


@dataclass(frozen=True)
class MeasuredScan:
    """A scan that was sampled by one mask; arrays ``(..., z, y, x)``, on the CPU.

    Attributes
    ----------
    scan
        The truth, with the coils of the acquisition.
    images
        complex ``(echo, z, y, x)``: what ``maps`` combine from noise-free coil images.
    maps
        complex ``(coil, z, y, x)``: of the reconstruction.
    mask
        float ``(echo, k2, k1)``.
    start
        complex ``(echo, z, y, x)``: first images.
    seed
        Of the noise.
    """

    scan: BrainScan
    images: Tensor
    maps: Tensor
    mask: Tensor
    start: Tensor
    seed: int

    def kspace(self, columns: Tensor, device: torch.device) -> Tensor:
        """Full noisy data of planes, ``(plane, echo, coil, k2, k1)``."""
        true = self.scan.coil_maps[..., columns].movedim(-1, 0).contiguous().to(device)
        images = self.scan.images[..., columns].movedim(-1, 0).contiguous().to(device)
        full = Planes(true, torch.ones(len(self.mask), 1, 1, device=device)).forward(images)
        return full + self.scan.noise_std * self._noise(columns, full.shape[1:]).to(device)

    def _noise(self, columns: Tensor, shape: torch.Size) -> Tensor:
        planes = []
        for column in columns.tolist():
            generator = torch.Generator().manual_seed(sample_seed(self.seed, "plane", column))
            planes.append(torch.randn(shape, dtype=torch.complex64, generator=generator))
        return torch.stack(planes)


class MeasuredScans:
    """A supply of measured scans.

    Parameters
    ----------
    supply
        Of the scans.
    draw
        A mask by pattern and number of the draw, for as many echoes as any scan has; a scan with fewer takes the first.
    acs
        Central block ``(k2, k1)``.
    draws
        How many masks there are of each pattern; scans take them in turn.
    seed
        Of the noise.
    keep
        Measured scans held in memory.
    device
        On which the first images are computed.
    start
        Which first images, one of `STARTS`.
    """

    def __init__(
        self,
        supply: ScanSupply,
        draw: Callable[[str, int], BoolArray],
        *,
        acs: tuple[int, int],
        draws: int,
        seed: int,
        keep: int,
        device: torch.device,
        start: str = "llr",
    ) -> None:
        self._start = start
        self._supply, self._draw, self._acs, self._draws = supply, draw, acs, draws
        self._seed, self._keep, self._device = seed, keep, device
        self._held: OrderedDict[tuple[str, tuple[str, int], str], MeasuredScan] = OrderedDict()

    def measured(self, split: str, index: int, pattern: str) -> MeasuredScan:
        """Scan ``index`` of a split, sampled by its mask of the pattern."""
        scan = self._supply.scan(split, index)
        key = (split, scan.key, pattern)
        if key not in self._held:
            seed = sample_seed(self._seed, "measured", split, *scan.key, pattern)
            mask = torch.from_numpy(self._draw(pattern, scan.key[1] % self._draws)).float()[: len(scan.images)]
            own_maps = scan.key[1] % 2 == 1
            self._held[key] = measure(scan, mask, self._acs, seed, self._device, own_maps=own_maps, start=self._start)
            while len(self._held) > self._keep:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


def measure(
    scan: BrainScan,
    mask: Tensor,
    acs: tuple[int, int],
    seed: int,
    device: torch.device,
    *,
    own_maps: bool,
    start: str = "llr",
) -> MeasuredScan:
    """Sample a scan by a mask ``(echo, k2, k1)`` and make its first images.

    With ``own_maps`` the coil maps are estimated from the calibration block; where that fails the true ones serve.
    """
    bare = MeasuredScan(scan, scan.images, scan.coil_maps, mask, scan.images, seed)
    columns = torch.arange(scan.images.shape[-1])
    full = bare.kspace(columns, device).permute(1, 2, 3, 4, 0)
    kspace = sampled_kspace(full, mask.to(device), acs, scan)
    maps, images = scan.coil_maps.to(device), scan.images.to(device)
    if own_maps:
        try:
            found = estimate_coil_maps(replace(kspace, coil_maps=None), CoilSettings(), Report())
        except CalibrationError:
            found = maps
        inside = torch.linalg.vector_norm(found, dim=0) > 0
        images = images * (found.conj() * maps).sum(0) * inside
        maps = found
    problem = pose(replace(kspace, coil_maps=maps), "training scan", Report())
    first = problem.leave(low_rank_or_refined(start, problem, Report()))
    return MeasuredScan(scan, images.cpu(), maps.cpu(), mask, first.cpu(), seed)
