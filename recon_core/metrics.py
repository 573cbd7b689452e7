"""How far images are from the truth: normalised error, peak signal-to-noise ratio, structural similarity, high frequencies.

Images are compared by magnitude, maps by value; everything is computed in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import convolve, uniform_filter

from recon_core.errors import DataError

HFEN_SIDE, HFEN_SIGMA = 15, 1.5
"""Side and width in pixels of the Laplacian of Gaussian: the definition's, and that of nearly every paper that quotes HFEN."""


def nrmse(images: ArrayLike, truth: ArrayLike, support: ArrayLike | None = None) -> float:
    """``|  |images| - |truth|  | / | truth |`` (2-norms) over the pixels of ``support``.

    Parameters
    ----------
    images, truth
        Same shape, real or complex; compared by magnitude.
    support
        bool, broadcast against them; all pixels if ``None``.

    Raises
    ------
    DataError
        Shapes differ, or the truth is zero.
    """
    a, b = _magnitudes(images, truth)
    inside = _support(support, b.shape)
    norm = float(np.linalg.norm(b[inside]))
    if norm == 0:
        raise DataError("the truth is zero", where="nRMSE")
    return float(np.linalg.norm((a - b)[inside])) / norm


def psnr(images: ArrayLike, truth: ArrayLike, support: ArrayLike | None = None) -> float:
    """``20 log10(max |truth| / rms error)`` in dB over the pixels of ``support``; infinite for equal images."""
    a, b = _magnitudes(images, truth)
    inside = _support(support, b.shape)
    error = float(np.sqrt(np.mean((a - b)[inside] ** 2)))
    peak = float(b.max())
    if peak == 0:
        raise DataError("the truth is zero", where="PSNR")
    return float("inf") if error == 0 else 20 * float(np.log10(peak / error))


def ssim(images: ArrayLike, truth: ArrayLike, support: ArrayLike | None = None, *, window: int = 7) -> float:
    """Mean structural similarity of the planes of the last two axes, dynamic range the truth's maximum.

    Uniform ``window`` x ``window`` means with sample covariances, K1 = 0.01, K2 = 0.03, borders of half a window left out when
    no ``support`` is given: the definition (and the default) of scikit-image.

    References
    ----------
    Wang et al., IEEE Trans. Image Process. 13 (2004) 600, eq 13.
    """
    a, b = _magnitudes(images, truth)
    if min(a.shape[-2:]) < window:
        raise DataError("images are smaller than the window", where="SSIM", got=a.shape[-2:], expected=f">= {window}")
    peak = float(b.max())
    if peak == 0:
        raise DataError("the truth is zero", where="SSIM")
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    size = (1,) * (a.ndim - 2) + (window, window)
    unbiased = window**2 / (window**2 - 1)
    mean_a, mean_b = uniform_filter(a, size), uniform_filter(b, size)
    var_a = unbiased * (uniform_filter(a * a, size) - mean_a**2)
    var_b = unbiased * (uniform_filter(b * b, size) - mean_b**2)
    cov = unbiased * (uniform_filter(a * b, size) - mean_a * mean_b)
    similarity = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    if support is not None:
        return float(similarity[_support(support, b.shape)].mean())
    edge = (window - 1) // 2
    return float(similarity[..., edge : a.shape[-2] - edge, edge : a.shape[-1] - edge].mean())


def laplacian_of_gaussian(side: int = HFEN_SIDE, sigma: float = HFEN_SIGMA) -> NDArray[np.float64]:
    """Rotationally symmetric kernel ``(r^2 - 2 sigma^2) / sigma^4 g(r)`` with ``sum g = 1``, shifted to sum zero. ``(side, side)``."""
    axis = np.arange(side) - (side - 1) / 2
    squares = axis[:, None] ** 2 + axis[None] ** 2
    gauss = np.exp(-squares / (2 * sigma**2))
    kernel = gauss / gauss.sum() * (squares - 2 * sigma**2) / sigma**4
    return np.asarray(kernel - kernel.mean())


def hfen(images: ArrayLike, truth: ArrayLike, support: ArrayLike | None = None) -> float:
    """High-frequency error norm: ``| LoG(|images|) - LoG(|truth|) | / | LoG(|truth|) |`` over the pixels of ``support``.

    ``LoG`` filters the planes of the last two axes of the *whole* images with :func:`laplacian_of_gaussian` (15 x 15, 1.5 pixels),
    edges repeated; the support only chooses which filtered pixels count, so its border adds no edge.

    Raises
    ------
    DataError
        Shapes differ, or the truth has no high frequencies in the support.

    References
    ----------
    Ravishankar & Bresler, IEEE Trans. Med. Imaging 30 (2011) 1028, section V.
    """
    a, b = _magnitudes(images, truth)
    inside = _support(support, b.shape)
    kernel = laplacian_of_gaussian().reshape((1,) * (a.ndim - 2) + (HFEN_SIDE, HFEN_SIDE))
    # the filter is linear: one pass for the error, one for the truth
    error, reference = (convolve(part, kernel, mode="nearest")[inside] for part in (a - b, b))
    norm = float(np.linalg.norm(reference))
    if norm <= 1e-12 * float(np.linalg.norm(b[inside])):  # a constant leaves rounding errors
        raise DataError("the truth has no high frequencies", where="HFEN")
    return float(np.linalg.norm(error)) / norm


def map_nmse(values: ArrayLike, truth: ArrayLike, support: ArrayLike | None = None) -> float:
    """Normalised mean squared error of a parameter map, ``sum (values - truth)^2 / sum truth^2`` over ``support``.

    Signed values, any unit. A pixel that a fit has marked as not to be believed holds 0 and counts with its full error.

    Raises
    ------
    DataError
        Shapes differ, or the truth is zero in the support.
    """
    a, b = (np.asarray(part, dtype=np.float64) for part in (values, truth))
    if a.shape != b.shape:
        raise DataError("map and truth do not fit", where="metrics", got=a.shape, expected=b.shape)
    inside = _support(support, b.shape)
    energy = float(np.sum(b[inside] ** 2))
    if energy == 0:
        raise DataError("the truth is zero", where="map NMSE")
    return float(np.sum((a - b)[inside] ** 2)) / energy


def _magnitudes(images: ArrayLike, truth: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.abs(np.asarray(images)).astype(np.float64), np.abs(np.asarray(truth)).astype(np.float64)
    if a.shape != b.shape or a.ndim < 2:
        raise DataError("images and truth do not fit", where="metrics", got=a.shape, expected=b.shape)
    return a, b


def _support(support: ArrayLike | None, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    if support is None:
        return np.ones(shape, bool)
    inside = np.broadcast_to(np.asarray(support, bool), shape)
    if not inside.any():
        raise DataError("the support is empty", where="metrics")
    return inside
