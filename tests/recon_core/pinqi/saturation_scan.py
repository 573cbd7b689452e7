"""Small saturation-recovery scans with known maps, encoded by NumPy's FFT, and weights whose answer is known without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from recon_core.methods.pinqi.model import Pinqi, PinqiSettings
from recon_core.methods.pinqi.weights import TrainedPinqi, load_weights, save_weights
from recon_core.signal_models import SaturationRecovery
from recon_core.types import KSpace, ScanInfo
from tests.recon_core.small_series import centred_fft, coil_maps

TIMES = (0.5, 1.0, 2.0, 8.0)
PHYSICS_ALONE = PinqiSettings(n_iterations=3, image_network="none", parameter_network="none")
"""No networks: Eq. 12 and 13 in turn with the signal model as the only tie, so a well-posed scan has its true maps as the answer."""


@dataclass(frozen=True)
class SaturationScan:
    """``t1`` (s) and complex ``m0``, ``(y, x)``; ``body`` bool; k-space with true coil maps."""

    t1: NDArray[np.float64]
    m0: NDArray[np.complex128]
    body: NDArray[np.bool_]
    kspace: KSpace
    scan: ScanInfo


def saturation_scan(
    shape: tuple[int, int] = (27, 24),
    times: tuple[float, ...] = TIMES,
    *,
    n_coils: int = 4,
    noise: float = 1e-4,
    keep: float = 1.0,
    scale: float = 1.0,
    seed: int = 1,
    noise_seed: int = 2,
    left: float = 0.0,
    slope: float = 0.0,
) -> SaturationScan:
    """A body of two tissues; every state keeps eight central lines and a share of the others.

    ``left`` is the part of M0 that is not saturated, by ``slope`` larger at the last edge of y.
    """
    rng = np.random.default_rng(seed)
    y, x = np.meshgrid(*[(np.arange(n) - n // 2) / (n / 2) for n in shape], indexing="ij")
    body = (y / 0.8) ** 2 + (x / 0.7) ** 2 < 1
    inner = ((y - 0.1) / 0.4) ** 2 + ((x + 0.1) / 0.35) ** 2 < 1
    t1 = np.where(inner, 0.8, 1.4) + 0.1 * x
    m0 = body * np.where(inner, 0.9, 0.7) * np.exp(1j * (0.5 * x - 0.3 * y))
    images = np.stack([m0 * (1 - (1 - left - slope * y) * np.exp(-t / t1)) for t in times])[:, None]
    maps = coil_maps((1, *shape), n_coils, rng) if n_coils > 1 else np.ones((1, 1, *shape), complex)
    full = centred_fft(images[:, None] * maps, (-3, -2))
    centre = np.abs(np.arange(shape[0]) - shape[0] // 2) < 4
    mask = (rng.random((len(times), shape[0])) < keep) | centre
    rng = np.random.default_rng(noise_seed)
    full = full + noise * (rng.standard_normal(full.shape) + 1j * rng.standard_normal(full.shape)) / np.sqrt(2)
    data = (scale * full * mask[:, None, None, :, None]).astype(np.complex64)
    kspace = KSpace(
        torch.from_numpy(data),
        torch.from_numpy(mask[:, None].astype(np.float32)),
        acs=torch.from_numpy(data.mean(0) * centre[None, None, :, None]),
        acs_mask=torch.from_numpy(centre[None]),
        coil_maps=torch.from_numpy(maps.astype(np.complex64)),
        noise_std=scale * noise if noise else None,
    )
    place = ((1, *shape), (0.008, 0.23, 0.23))
    return SaturationScan(t1, m0 * scale, body, kspace, ScanInfo(*place, *place, saturation_times=times))


def save_network(
    folder: Path, name: str = "small", settings: PinqiSettings = PHYSICS_ALONE, times: tuple[float, ...] = TIMES
) -> Path:
    """Weights as training leaves them, of a network with its initial values."""
    torch.manual_seed(0)
    return save_weights(folder, name, Pinqi(SaturationRecovery(times), settings), times, {"amplitude": 0.9, "seed": 0})


def saved_network(folder: Path, settings: PinqiSettings = PHYSICS_ALONE, times: tuple[float, ...] = TIMES) -> TrainedPinqi:
    """The same, written and read."""
    return load_weights(save_network(folder, settings=settings, times=times))
