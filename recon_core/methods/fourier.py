"""Inverse Fourier transform of what was measured; coils combined by root sum of squares or adaptively."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recon_core.coils.estimate import estimate_coil_maps
from recon_core.fourier import ifft_centred
from recon_core.problem import check_kspace, check_maps
from recon_core.settings import setting
from recon_core.types import K1, K2, ImageSeries, KSpace, Report, Result, ScanInfo

NAME = "fourier"
SUMMARY = "Inverse Fourier transform, zero-filled, coils combined"
NEEDS_COIL_MAPS = False


@dataclass(frozen=True)
class Settings:
    """How the coils are combined."""

    combine: str = setting(
        "rss",
        "rss: root sum of squares, magnitude only; adaptive: with coil maps (estimated if need be), keeps the phase",
        choices=("rss", "adaptive"),
    )


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """Combine the coil images ``m_c = F^-1 k_c`` of every state.

    ``rss``: ``sqrt(sum_c |m_c|^2)``, float32 ``(state, z, y, x)``. ``adaptive``: ``sum_c conj(s_c) m_c``, complex64, with coil
    maps ``s`` of unit root sum of squares (Roemer et al., Magn. Reson. Med. 16 (1990) 192, eq 32, for white noise). Linear, so
    the only scale is the data's own.

    Raises
    ------
    DataError
        Nothing sampled, shapes that do not fit, values that are not finite.
    CalibrationError
        ``adaptive`` without coil maps or usable calibration lines.
    """
    where = f"slice {scan.slice_index}"
    check_kspace(kspace, where)
    adaptive = settings.combine == "adaptive"
    if adaptive and kspace.coil_maps is None:
        maps = estimate_coil_maps(kspace, report=report)
    elif adaptive:
        maps = check_maps(kspace, where)
    images = []
    for index, state in enumerate(kspace.data):
        # state by state: the coil images of a whole series would double the memory
        coil_images = ifft_centred(state, (K2, K1))
        if adaptive:
            images.append((maps.conj() * coil_images).sum(0))
        else:
            images.append(torch.linalg.vector_norm(torch.view_as_real(coil_images), dim=(0, -1)))
        report.progress((index + 1) / kspace.n_states)
    name = "image" if adaptive else "magnitude"
    return Result(images=(ImageSeries(name, torch.stack(images)),))
