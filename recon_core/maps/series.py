"""What all maps of a reconstructed series share: their result, and the noise that a pixel of the final images has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from recon_core.types import ImageSeries, ParameterMap, ScanInfo, Tensor


@dataclass(frozen=True)
class SeriesMaps:
    """Maps of one slice or slab, what the operator has to know, and figures of merit.

    ``images`` replaces the series that the maps were made of, for instance by a combination of its states; ``None`` leaves it.
    """

    maps: tuple[ParameterMap, ...]
    notes: tuple[str, ...]
    quality: dict[str, float] = field(default_factory=dict)
    images: tuple[ImageSeries, ...] | None = None


@dataclass(frozen=True)
class ImageNoise:
    """Standard deviation of one real number of an unregularised image, in its unit, and whether it was measured."""

    std: float
    measured: bool

    @property
    def source(self) -> str:
        """In words, for a map's comment."""
        return "measured noise" if self.measured else "noise of outer k-space"


def image_noise(
    noise_std: float, counts: Tensor, scan: ScanInfo, *, measured: bool, readout_shares: Sequence[float] = (1.0,)
) -> ImageNoise:
    """Noise of an image on the console's matrix, had it been unfolded without loss.

    ``noise_std / sqrt(2) * sqrt(R mean(1 / counts) / readout share)``: an orthonormal FFT keeps the noise of a complex sample, and a
    state with one sample for ``R`` positions has ``sqrt(R)`` times as much; the mean square over states counts. What an asymmetric
    echo left out is completed from the rest, as lines are. Interpolation keeps it, a coarser matrix averages it down.

    Parameters
    ----------
    noise_std
        Of one complex sample with ``counts`` 1, see ``KSpace.noise_std``.
    counts
        float32 ``(state, k2, k1)``.
    scan
        Encoded and console's matrix.
    measured
        Whether ``noise_std`` comes from a noise measurement.
    readout_shares
        For each state (or one for all) the part of the readout that was measured, above 0.
    """
    sampled = counts > 0
    n_sampled = sampled.sum(dim=(1, 2)).double().clamp_min(1.0)
    averaged = torch.where(sampled, 1 / counts.double().clamp_min(1e-9), 0.0).sum(dim=(1, 2)) / n_sampled
    shares = torch.tensor(readout_shares, dtype=torch.float64, device=counts.device)
    per_state = counts[0].numel() / n_sampled * averaged / shares
    kept = 1.0
    for n, fov, recon_n, recon_fov in zip(scan.matrix, scan.fov, scan.recon_matrix, scan.recon_fov, strict=True):
        kept *= min(1.0, round(recon_n * fov / recon_fov) / n) if n > 1 else 1.0
    return ImageNoise(noise_std / math.sqrt(2) * math.sqrt(float(per_state.mean()) * kept), measured)
