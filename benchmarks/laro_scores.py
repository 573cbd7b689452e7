"""Maps from multi-echo images and how far they are from those of the fully sampled scan: the figures of the paper's tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from recon_core.maps.background import v_sharp
from recon_core.maps.dipole import tv_admm
from recon_core.maps.dipole_kernel import ppm_per_hz
from recon_core.maps.field import fit_field
from recon_core.maps.r2star import arlo
from recon_core.metrics import hfen, psnr, ssim
from recon_core.simulation.brain import LABELS
from recon_core.simulation.multi_echo_brain import LESION_LABEL, RADIATION_LABEL, BrainScan

Tensor = torch.Tensor

REGIONS = {
    "GP": (LABELS["pallidum"],),
    "SN": (LABELS["nigra"],),
    "RN": (LABELS["ruber"],),
    "CN": (LABELS["caudate"],),
    "PU": (LABELS["putamen"],),
    "TH": (LABELS["thalamus"],),
    "OR": (RADIATION_LABEL,),
    "CC": (LABELS["grey"],),
}
"""Regions of Table S5 as labels of the simulated heads."""

LEAST_VOXELS = 4


@dataclass(frozen=True)
class Maps:
    """What is compared; ``(z, y, x)``: echo-combined magnitude, R2* (1/s), local field (Hz), susceptibility (ppm) and its region."""

    magnitude: NDArray[np.floating]
    r2star: NDArray[np.floating]
    local: NDArray[np.floating]
    chi: NDArray[np.floating]
    region: NDArray[np.bool_]


def maps_of(images: Tensor, scan: BrainScan) -> Maps:
    """ARLO, complex field fit, V-SHARP and TV-ADMM with their defaults, the true brain mask."""
    brain, times = scan.brain, scan.echo_times
    r2star = arlo(images, times, mask=brain).r2star
    fitted = fit_field(images, times, brain)
    local = v_sharp(fitted.field.data, brain, scan.voxel)
    found = tv_admm(
        local.field * ppm_per_hz(3.0),
        local.mask,
        scan.voxel,
        scan.b0,
        weights=fitted.weights,
    )
    inside = local.mask.numpy()
    return Maps(
        images.abs().square().sum(0).sqrt().numpy(),
        np.where(r2star.valid.numpy(), r2star.data.numpy(), 0),
        local.field.numpy(),
        found.chi.data.numpy(),
        inside,
    )


def scores(found: Maps, truth: Maps, scan: BrainScan) -> dict[str, float]:
    """PSNR (dB) and SSIM of magnitude, R2* and local field; RMSE (%), SSIM and HFEN (%) of the susceptibility.

    ``truth`` are the maps of the fully sampled, noise-free images by the same chain, as the paper's reference is; ``QSM RMSE, truth`` is
    against the simulated susceptibility instead: what the chain of maps itself gets wrong counts there.
    """
    brain, region = scan.brain.numpy(), truth.region & found.region
    figures: dict[str, float] = {}
    for name, a, b, inside in (
        ("magnitude", found.magnitude, truth.magnitude, brain),
        ("r2star", found.r2star, truth.r2star, brain),
        ("local field", _lifted(found.local, truth.local, region), _lifted(truth.local, truth.local, region), region),
    ):
        figures[f"{name} PSNR"] = psnr(a, np.where(inside, b, 0), inside)
        figures[f"{name} SSIM"] = ssim(np.where(inside, a, 0), np.where(inside, b, 0), inside)
    chi = [np.where(region, m.chi - m.chi[region].mean(), 0) for m in (found, truth)]
    figures["QSM RMSE"] = 100 * float(np.linalg.norm(chi[0] - chi[1]) / np.linalg.norm(chi[1]))
    simulated = scan.chi.numpy()
    simulated = np.where(region, simulated - simulated[region].mean(), 0)
    figures["QSM RMSE, truth"] = 100 * float(np.linalg.norm(chi[0] - simulated) / np.linalg.norm(simulated))
    lift = 2 * float(max(np.abs(c).max() for c in chi))  # metrics compare magnitudes
    figures["QSM SSIM"] = ssim(_lifted(chi[0], chi[1], region), _lifted(chi[1], chi[1], region), region)
    figures["QSM HFEN"] = 100 * hfen(chi[0] + lift, chi[1] + lift, region)
    return figures


def _lifted(values: NDArray[np.floating], truth: NDArray[np.floating], inside: NDArray[np.bool_]) -> NDArray[np.floating]:
    """Signed values above zero, so that the dynamic range is the truth's from lowest to highest."""
    return np.where(inside, values - float(truth[inside].min()), 0)


def regional(found: Maps, scan: BrainScan) -> dict[str, float]:
    """Mean susceptibility (ppm) of every region and every lesion of a scan that has voxels enough; minus the mean of the region."""
    labels = scan.labels.numpy()
    means = {}
    for name, members in {**REGIONS, **{f"lesion {n}": (LESION_LABEL + n,) for n in range(8)}}.items():
        inside = np.isin(labels, members) & found.region
        if int(inside.sum()) >= LEAST_VOXELS:
            means[name] = float(found.chi[inside].mean())
    return means


def regression(found: Mapping[str, float], truth: Mapping[str, float]) -> tuple[float, float, int]:
    """Slope and R^2 of the regression of ``found`` on ``truth``, and the number of points they share."""
    names = sorted(set(found) & set(truth))
    if len(names) < 3:
        return float("nan"), float("nan"), len(names)
    a, b = (np.array([values[n] for n in names]) for values in (truth, found))
    slope = float(np.cov(a, b, bias=True)[0, 1] / a.var())
    return slope, float(np.corrcoef(a, b)[0, 1] ** 2), len(names)


def true_regional(scan: BrainScan, region: NDArray[np.bool_]) -> dict[str, float]:
    """The simulated susceptibilities over the same regions, their mean over ``region`` taken off."""
    chi = scan.chi.numpy()
    maps = Maps(chi, chi, chi, chi - float(chi[region].mean()), region)
    return regional(maps, scan)
