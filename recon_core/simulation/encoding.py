"""From a finely rendered object to truncated k-space, and the noise of the receivers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from recon_core.simulation.phantoms import Grid

ComplexArray = NDArray[np.complex64]
FloatArray = NDArray[np.float32]

FINE = 2
"""Samples of the rendered object per encoded pixel, along every encoded axis."""


def correlated_noise(covariance: NDArray[np.complex128], shape: tuple[int, int], rng: np.random.Generator) -> ComplexArray:
    """Complex Gaussian noise ``(readout, coil, sample)`` with ``E[n_i conj(n_j)]`` = ``covariance``, white along the
    samples."""
    n_readouts, n_samples = shape
    factor = np.linalg.cholesky(covariance).astype(np.complex64)
    size = (n_readouts, len(covariance), n_samples, 2)
    white = rng.standard_normal(size, dtype=np.float32).view(np.complex64)[..., 0] * np.float32(np.sqrt(0.5))
    return np.asarray(factor @ white, dtype=np.complex64)


def encode(image: ComplexArray, matrix: tuple[int, int, int], oversampling: int, *, three_d: bool) -> ComplexArray:
    """Finely sampled object to k-space ``(..., k2, k1, k0)``: centred, orthonormal with respect to the *encoded* matrix.

    Parameters
    ----------
    image
        complex64 ``(..., z, y, x)``; the last axes cover the field of view with any number of samples.
    matrix
        ``(z, y, x)`` before readout oversampling.
    oversampling
        The readout is sampled that many times more densely (field of view that many times larger).
    three_d
        Encode z; else it is left alone.
    """
    out = image
    if three_d:
        out = _to_kspace(out, -3, matrix[0], 1)
    out = _to_kspace(out, -2, matrix[1], 1)
    return _to_kspace(out, -1, matrix[2] * oversampling, oversampling)


def _to_kspace(image: ComplexArray, axis: int, n_out: int, padding: int) -> ComplexArray:
    n = image.shape[axis]
    n_full = n * padding

    def part(start: int | None, stop: int | None) -> tuple[slice, ...]:
        return tuple(slice(start, stop) if a == axis % image.ndim else slice(None) for a in range(image.ndim))

    # padding and the two shifts are copies of halves (n // 2 samples lie before coordinate 0)
    work = np.zeros([n_full if a == axis % image.ndim else m for a, m in enumerate(image.shape)], dtype=np.complex64)
    work[part(0, n - n // 2)] = image[part(n // 2, None)]
    work[part(n_full - n // 2, None)] = image[part(0, n // 2)]
    spectrum = fft.fft(work, axis=axis, overwrite_x=True)
    kept = np.concatenate([spectrum[part(n_full - n_out // 2, None)], spectrum[part(0, n_out - n_out // 2)]], axis=axis)
    kept *= np.float32(np.sqrt(n_out) / n_full)
    return np.asarray(kept, dtype=np.complex64)


def to_image(kspace: ComplexArray, axes: tuple[int, ...]) -> ComplexArray:
    """Centred orthonormal inverse FFT."""
    shifted = fft.ifftshift(kspace, axes=axes)
    return np.asarray(fft.fftshift(fft.ifftn(shifted, axes=axes, norm="ortho"), axes=axes), dtype=np.complex64)


def pixel_mean(fine: NDArray[np.floating], three_d: bool) -> FloatArray:
    """Mean over an encoded pixel of a map that is rendered ``FINE`` = 2 times finer; weights 1/4, 1/2, 1/4 centre it."""
    out = np.asarray(fine, dtype=np.float32)
    for axis in (-3, -2, -1) if three_d else (-2, -1):
        even, odd = (np.take(out, range(start, out.shape[axis], 2), axis=axis) for start in (0, 1))
        out = 0.5 * even + 0.25 * (odd + np.roll(odd, 1, axis=axis))
    return out


def polynomial_field(grid: Grid, rng: np.random.Generator, strength: float, order: int = 3) -> FloatArray:
    """Random polynomial of the position with zero mean and peak ``strength``."""
    z, y, x = np.meshgrid(*(_unit(a) for a in (grid.z, grid.y, grid.x)), indexing="ij", sparse=True)
    total = np.zeros(grid.shape)
    for i in range(order + 1):
        for j in range(order + 1 - i):
            for k in range(min(2, order + 1 - i - j)):
                total = total + rng.normal() * y**i * x**j * z**k
    total -= total.mean()
    return np.asarray(strength * total / max(float(np.abs(total).max()), 1e-9), dtype=np.float32)


def harmonic_field(grid: Grid, rng: np.random.Generator, strength: float) -> FloatArray:
    """Random solid harmonics of the first three orders with zero mean and peak ``strength``: what magnet and shim leave.

    Sources outside an object make nothing else inside it. (`polynomial_field` is no such field: to a susceptibility map it would be sources
    everywhere.)
    """
    size = max(float(np.abs(a).max()) for a in (grid.z, grid.y, grid.x))
    z, y, x = np.meshgrid(*(a / max(size, 1e-9) for a in (grid.z, grid.y, grid.x)), indexing="ij", sparse=True)
    squares = x**2 + y**2
    terms = (
        x, y, z,
        x * y, y * z, x * z, x**2 - y**2, 2 * z**2 - squares,
        x**3 - 3 * x * y**2, 3 * x**2 * y - y**3, z * (x**2 - y**2), x * y * z,
        x * (4 * z**2 - squares), y * (4 * z**2 - squares), z * (2 * z**2 - 3 * squares),
    )  # fmt: skip
    total = np.zeros(grid.shape)
    for term in terms:
        total = total + rng.normal() * term
    total -= total.mean()
    return np.asarray(strength * total / max(float(np.abs(total).max()), 1e-9), dtype=np.float32)


def _unit(axis: NDArray[np.float64]) -> NDArray[np.float64]:
    return axis / max(float(np.abs(axis).max()), 1e-9)
