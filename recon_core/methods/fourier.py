"""Inverse Fourier transform of what was measured; coils combined by root sum of squares."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recon_core.errors import DataError
from recon_core.fourier import ifft_centred
from recon_core.types import COIL, K1, K2, ImageSeries, KSpace, Report, Result, ScanInfo

NAME = "fourier"
SUMMARY = "Inverse Fourier transform, root sum of squares over coils"
NEEDS_COIL_MAPS = False


@dataclass(frozen=True)
class Settings:
    """No choices: zero-filled k-space, magnitude images."""


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """``m = sqrt(sum_c |F^-1 k_c|^2)``, float32 ``(state, z, y, x)``."""
    if not bool(kspace.mask.any()):
        raise DataError("nothing was sampled", where=f"slice {scan.slice_index}")
    images = torch.stack([ifft_centred(state, (K2, K1)).abs().square().sum(dim=0) for state in kspace.data])
    report.progress(1.0)
    return Result(images=(ImageSeries("magnitude", images.sqrt()),))
