"""How far a T1 map is from the truth: the figures of the paper's tables."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from recon_core.errors import DataError
from recon_core.metrics import nrmse, ssim

WINDOW = 7
LONGEST_T1 = 10.0  # s: a rate at or below a tenth is shown and judged as this


def t1_from_rate(rate: NDArray[np.floating]) -> NDArray[np.float64]:
    """T1 in s, at most `LONGEST_T1`; also for rates that are zero or negative."""
    return 1 / np.maximum(np.asarray(rate, np.float64), 1 / LONGEST_T1)


def t1_figures(t1: NDArray[np.floating], truth: NDArray[np.floating], tissue: NDArray[np.bool_]) -> dict[str, float]:
    """nRMSE, mean absolute error (s) and SSIM of a T1 map inside tissue.

    SSIM has 7 x 7 uniform windows and counts only windows that lie inside the tissue.

    Parameters
    ----------
    t1, truth
        s, ``(y, x)``.
    tissue
        bool ``(y, x)``.

    Raises
    ------
    DataError
        No tissue, or none that holds a window.

    References
    ----------
    PINQI, section IV-A and Fig. 5.
    """
    inner = binary_erosion(tissue, np.ones((WINDOW, WINDOW)))
    if not inner.any():
        raise DataError("no window lies inside the tissue", where="T1 figures")
    truth = np.where(tissue, truth, 0.0)  # the dynamic range is that of the tissue
    t1 = np.where(tissue, t1, 0.0)
    return {
        "nrmse": nrmse(t1, truth, tissue),
        "mae": float(np.abs(t1 - truth)[tissue].mean()),
        "ssim": ssim(t1, truth, inner, window=WINDOW),
    }
