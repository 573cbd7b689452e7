"""Measured magnitude series that a benchmark may turn into semi-measured k-space: kidney, T1 phantom, brain.

No measured cine is in the repository: ``benchmarks/datasets.py`` reads those of CMRxRecon and OCMR, which a site has to fetch.

Magnitudes have lost the sign of the magnetisation, so a series made of them directly would have kinks at every zero crossing that
no scanner delivers. :func:`restore_polarity` gives the sign back, by the recovery that fits best.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.ndimage import binary_closing, gaussian_filter, label

DATA = Path(__file__).parent.parent / "tests" / "data"
NAMES = ("kidney 0", "kidney 1", "phantom", "brain")
T1_STAR_GRID = np.geomspace(0.08, 4.0, 40)
"""Apparent T1 in s that the polarity is searched over."""

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Measured:
    """``images`` real, signed ``(state, y, x)``; ``times`` in s; ``support`` and ``roi`` bool ``(y, x)``; ``pixel`` in m.

    ``look_locker`` is False where every image had an inversion of its own.
    """

    name: str
    images: FloatArray
    times: tuple[float, ...]
    support: BoolArray
    roi: BoolArray
    pixel: float
    look_locker: bool


def restore_polarity(magnitudes: FloatArray, times: FloatArray, smoothing: float = 1.0) -> FloatArray:
    """Signed series from magnitudes of an inversion recovery.

    For each number of inverted images (the earliest ones), ``A - B exp(-TI / T1*)`` is fitted by linear least squares for each
    T1* of a grid. The misfit, averaged over a Gaussian of ``smoothing`` pixels so that single pixels near the zero crossing do
    not flip by noise, decides.

    Parameters
    ----------
    magnitudes
        ``(state, y, x)``, not negative, any order of times.
    times
        s, one per state.

    Returns
    -------
    float64 ``(state, y, x)``, the magnitudes with their signs.
    """
    order = np.argsort(times)
    ordered, t = magnitudes[order].reshape(len(times), -1), np.asarray(times)[order]
    projectors = []
    for t1_star in T1_STAR_GRID:
        basis, _ = np.linalg.qr(np.stack([np.ones_like(t), np.exp(-t / t1_star)], axis=1))
        projectors.append(np.eye(len(t)) - basis @ basis.T)
    costs = []
    patterns = [np.where(np.arange(len(t)) < n, -1.0, 1.0) for n in range(len(t))]
    for signs in patterns:
        signed = ordered * signs[:, None]
        best = np.min([(signed * (p @ signed)).sum(0) for p in projectors], axis=0)
        costs.append(gaussian_filter(best.reshape(magnitudes.shape[1:]), smoothing))
    chosen = np.argmin(costs, axis=0)
    signed = ordered.reshape(magnitudes.shape) * np.stack(patterns)[chosen].transpose(2, 0, 1)
    # all positive and all negative fit alike: a recovery rises
    signed = np.where((chosen == 0) & (gaussian_filter(signed[-1] - signed[0], smoothing) < 0), -signed, signed)
    result = np.empty_like(signed)
    result[order] = signed
    return result


def measured(name: str) -> Measured:
    """One of ``NAMES``, polarity restored, at its own matrix.

    Raises
    ------
    KeyError
        There is no such series.
    """
    if name.startswith("kidney"):
        return _kidney(int(name.split()[1]))
    return {"phantom": _phantom, "brain": _brain}[name]()


def _body(images: FloatArray, level: float) -> BoolArray:
    """Where the brightest image of each pixel is above ``level`` of the 99th percentile, smoothed."""
    peak = np.abs(images).max(0)
    return np.asarray(gaussian_filter((peak > level * np.percentile(peak, 99)).astype(float), 1.5) > 0.5)


def _kidney(index: int) -> Measured:
    with np.load(DATA / "molli" / "kidney_molli.npz") as file:
        magnitudes = file["image"][index].astype(np.float64)
        times = file["inversion_time_ms"] / 1000
        pixel = float(file["pixel_spacing_mm"][0]) / 1000
    roi = np.zeros(magnitudes.shape[1:], bool)
    roi[70:190, 50:215] = True  # both kidneys, psoas and spine
    images = restore_polarity(magnitudes, times)
    return Measured(f"kidney {index}", images, tuple(times.tolist()), _body(images, 0.06), roi, pixel, True)


def _phantom() -> Measured:
    """Its file holds pixels divided by their own largest value: outside the phantom that is noise of full size, set to 0 here."""
    mat = loadmat(DATA / "molli" / "myomapnet_phantom.mat")
    series = mat["MOLLIT1wTI"][0, 0].astype(np.float64)
    inside = (mat["MOLLIoffLineT1Map"][0] > 0.05) & (mat["MOLLIoffLineT1Map"][0] < 3.0)
    regions, _ = label(inside)
    inside = binary_closing(regions == np.argmax(np.bincount(regions.ravel())[1:]) + 1, iterations=3)
    times = series[5:, 80, 80]
    # a soft edge: pixels that the mask cuts would ring
    images = restore_polarity(series[:5], times) * gaussian_filter(inside.astype(float), 0.7)
    return Measured("phantom", images, tuple(times.tolist()), inside, inside, 0.002, True)


def _brain() -> Measured:
    mat = loadmat(DATA / "brain-inversion-recovery" / "IR_demo.mat")
    magnitudes, times = mat["IRdata"].transpose(2, 0, 1).astype(np.float64), mat["TI"][:, 0] / 1000
    images = restore_polarity(magnitudes, times)
    return Measured("brain", images, tuple(times.tolist()), _body(images, 0.06), mat["Mask"] > 0, 0.0017, False)
