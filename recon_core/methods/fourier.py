"""Inverse Fourier transform of what was measured; coils combined by root sum of squares or adaptively."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recon_core.coils.estimate import estimate_coil_maps
from recon_core.fourier import ifft_centred
from recon_core.problem import check_kspace, check_maps
from recon_core.sampling.coverage import missing_lines
from recon_core.settings import setting
from recon_core.types import K1, K2, ImageSeries, KSpace, Report, Result, ScanInfo

NAME = "fourier"
SUMMARY = "Inverse Fourier transform, zero-filled, coils combined"
NEEDS_COIL_MAPS = False
SEPARABLE = True

COILS_AT_ONCE = 4
"""Images of so many coils stay in the cache between transform and sum: four times faster than all 32 of 256 x 256 at once."""

SMALLEST, LARGEST = 1e-24, 1e36
"""Largest energy of a pixel up to which, and from which on, float32 does not hold the squares of all pixels."""


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
    check_kspace(kspace.all_states, where)
    adaptive = settings.combine == "adaptive"
    if adaptive and kspace.coil_maps is None:
        maps = estimate_coil_maps(kspace, report=report)
    elif adaptive:
        maps = check_maps(kspace, where)
    images = []
    for index, state in enumerate(kspace.data):
        # state by state: the coil images of a whole series would double the memory
        if adaptive:
            images.append((maps.conj() * ifft_centred(state, (K2, K1))).sum(0))
        else:
            images.append(root_sum_of_squares(state))
        report.progress((index + 1) / kspace.n_states)
    name = "image" if adaptive else "magnitude"
    notes = _aliasing(kspace.all_states.mask)
    for note in notes:
        report.warn(note)
    return Result(images=(ImageSeries(name, torch.stack(images)),), notes=notes)


def _aliasing(mask: torch.Tensor) -> tuple[str, ...]:
    """What the operator has to know when lines are missing inside the measured part of k-space."""
    missing, total = missing_lines(mask)
    if not missing:
        return ()
    return (f"fourier: {missing} of {total} lines are missing, the images are aliased; choose a chain that unfolds them",)


def needs_coil_maps(settings: Settings) -> bool:
    """Whether the maps should be estimated beforehand, so that partial Fourier and the console's grid work on combined images."""
    return settings.combine == "adaptive"


def root_sum_of_squares(kspace: torch.Tensor) -> torch.Tensor:
    """``sqrt(sum_c |F^-1 k_c|^2)`` of one state ``(coil, k2, k1, x)``; float32 ``(z, y, x)``.

    Where DC lies in k-space only changes the phase of the image, which the magnitude drops: no shift before the transform.
    The transform runs along memory, on a copy with x outermost.
    """
    energy = _energy(kspace)
    largest = float(energy.max())
    if SMALLEST < largest < LARGEST:
        return _as_image(energy)
    # squares that do not fit float32
    peak = float(kspace.abs().max())
    return _as_image(energy) if peak == 0 else _as_image(_energy(kspace / peak)) * peak


def _as_image(energy: torch.Tensor) -> torch.Tensor:
    return torch.fft.fftshift(energy.sqrt_().movedim(0, -1), dim=(K2, K1))


def _energy(kspace: torch.Tensor) -> torch.Tensor:
    """Sum of the squares of all coil images of one state, float32 ``(x, z, y)``, uncentred."""
    n2, n1, n_x = kspace.shape[K2:]
    axes = (-2, -1) if n2 > 1 else (-1,)
    energy = torch.zeros((n_x, n2, n1), dtype=torch.float32, device=kspace.device)
    for start in range(0, len(kspace), COILS_AT_ONCE):
        block = kspace[start : start + COILS_AT_ONCE].movedim(-1, 1).contiguous()
        for image in torch.view_as_real(torch.fft.ifftn(block, dim=axes, norm="ortho")):
            energy.addcmul_(image[..., 0], image[..., 0]).addcmul_(image[..., 1], image[..., 1])
    return energy
