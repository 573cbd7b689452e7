"""The figures of one reconstruction of one cell."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.cell import Array, Cell, fit_t1
from recon_core.metrics import hfen, map_nmse, nrmse, psnr, ssim
from recon_core.operators.cartesian import CartesianSense

RANK_FLOOR = 0.01
"""Singular values of the series below this part of the largest do not count."""


@dataclass(frozen=True)
class Score:
    """Full frame and (``roi_``) region of interest.

    ``t1_nmse``: map NMSE in the region against the map of the true images; ``t1_percent``: median deviation there. ``residual``:
    RMS of ``A x - b`` over the noise of one sample, in the worst state (about 1 fits the data; far more, they are not
    fitted); ``None`` where the noise is not known. ``rank``: numerical rank of states x pixels.
    """

    psnr: float
    ssim: float
    nrmse: float
    hfen: float
    roi_psnr: float
    roi_ssim: float
    roi_nrmse: float
    roi_hfen: float
    t1_nmse: float | None
    t1_percent: float | None
    residual: float | None
    rank: int
    seconds: float
    iterations: int

    def as_dict(self) -> dict[str, Any]:
        """For the JSON."""
        return asdict(self)


def score(cell: Cell, images: Array, seconds: float, iterations: int) -> Score:
    """All figures; magnitudes, except the residual and T1."""
    figures: dict[str, float] = {}
    for name, metric in {"psnr": psnr, "ssim": ssim, "nrmse": nrmse, "hfen": hfen}.items():
        figures[name] = metric(images, cell.images)
        figures[f"roi_{name}"] = metric(images, cell.images, cell.roi[None])
    t1_nmse, t1_percent = t1_error(cell, images)
    return Score(
        **figures,
        t1_nmse=t1_nmse,
        t1_percent=t1_percent,
        residual=worst_residual(cell, images),
        rank=rank(images),
        seconds=seconds,
        iterations=iterations,
    )


def t1_error(cell: Cell, images: Array) -> tuple[float | None, float | None]:
    """NMSE and median deviation in % of T1 in the region of interest, where the true images give a T1; ``None`` for cines."""
    if not cell.times:
        return None, None
    reference, valid = cell.reference_t1()
    found, _ = fit_t1(cell, images)
    inside = cell.roi & cell.support & valid
    deviation = np.abs(found[inside] / reference[inside] - 1)
    return map_nmse(found, reference, inside), 100 * float(np.median(deviation))


def worst_residual(cell: Cell, images: Array) -> float | None:
    """RMS residual of the worst state over the noise."""
    if not cell.noise_std:
        return None
    operator = CartesianSense(torch.tensor(cell.coil_maps), torch.tensor(cell.mask.astype(np.float32)))
    x = operator.enter_image(torch.tensor(np.ascontiguousarray(images, dtype=np.complex64)))
    residual = operator.forward(x) - operator.enter_data(torch.tensor(cell.kspace))
    power = residual.abs().square().sum(dim=(1, 2, 3, 4)).numpy()
    samples = cell.mask.sum(axis=(1, 2)) * cell.coil_maps.shape[0] * images.shape[-1]
    return float(np.sqrt((power / samples).max())) / cell.noise_std


def rank(images: Array) -> int:
    """Singular values of states x pixels above ``RANK_FLOOR`` of the largest."""
    values = np.linalg.svd(images.reshape(len(images), -1), compute_uv=False)
    return int((values > RANK_FLOOR * values[0]).sum())
