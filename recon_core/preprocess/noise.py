"""Noise covariance and prewhitening.

Conventions: the covariance of a *complex* sample, ``C = E[(n - mean)(n - mean)^H]``, estimated with ``1 / (N - 1)``;
whitening multiplies coils by ``scale * L^-1`` with ``C = L L^H``. The scale is Gadgetron's: whitened imaging noise has unit
standard deviation in its real and in its imaginary part, so ``sqrt(E|n|^2)`` of a complex sample is ``WHITENED_NOISE_STD``.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import torch

from recon_core.errors import DataError

Tensor = torch.Tensor

WHITENED_NOISE_STD = math.sqrt(2.0)
"""``KSpace.noise_std`` after prewhitening: the SD of one complex sample that was measured once."""

RELATIVE_BANDWIDTH = 0.793
"""Noise bandwidth of the receiver's filter in the noise scan, as a part of 1 / dwell time (Siemens; Gadgetron's default)."""

SAMPLES_PER_COIL = 2
"""Fewest noise samples per coil. The inverse of a covariance of c coils from N samples comes out N / (N - c) too large."""

DEAD_LEVEL = 1e-6
"""A channel whose variance is below this part of the median of all channels has no receiver behind it."""

SINGULAR_LEVEL = 1e-6
"""Smallest acceptable eigenvalue of the noise *correlation* matrix: below it, channels are linear combinations of others."""


def noise_covariance(samples: Tensor | np.ndarray) -> Tensor:
    """Covariance of receiver noise between coils.

    ``C = sum_i (n_i - mean)(n_i - mean)^H / (N - 1)``; the mean (a receiver's DC offset is not noise) is taken over all N
    samples of all readouts.

    Parameters
    ----------
    samples
        complex ``(readout, coil, sample)``, noise only, without the samples that the scanner marks to be discarded.

    Returns
    -------
    complex128 ``(coil, coil)``, Hermitian, in squared units of the samples.

    Raises
    ------
    DataError
        Wrong shape, samples that are not finite, or fewer than ``SAMPLES_PER_COIL`` samples for each coil.
    """
    noise = torch.as_tensor(samples)
    if noise.ndim != 3 or not noise.is_complex():
        raise DataError(
            "noise samples have the wrong form",
            where="noise covariance",
            got=f"{noise.dtype} {tuple(noise.shape)}",
            expected="complex (readout, coil, sample)",
        )
    n_readouts, n_coils, n_samples = noise.shape
    total = n_readouts * n_samples
    if total < max(2, SAMPLES_PER_COIL * n_coils):
        raise DataError(
            "too few noise samples",
            where="noise covariance",
            got=f"{total} samples for {n_coils} coils",
            expected=f"at least {SAMPLES_PER_COIL} for each coil",
            remedy="Acquire a longer noise scan or reconstruct without prewhitening",
        )
    # readout by readout: the double-precision copy of a whole noise scan would be twice its size
    total_sum = torch.zeros(n_coils, dtype=torch.complex128, device=noise.device)
    for readout in noise:
        total_sum += readout.to(torch.complex128).sum(dim=-1)
    mean = (total_sum / total)[:, None]
    covariance = torch.zeros(n_coils, n_coils, dtype=torch.complex128, device=noise.device)
    for readout in noise:
        centred = readout.to(torch.complex128) - mean
        covariance += centred @ centred.mH
    covariance /= total - 1
    if not torch.isfinite(torch.view_as_real(covariance)).all():
        raise DataError("noise samples are not finite", where="noise covariance", remedy="Check the noise scan")
    return 0.5 * (covariance + covariance.mH)


def dead_channels(covariance: Tensor) -> tuple[int, ...]:
    """Channels without noise: unplugged or switched off. Pass them to :func:`whitening_matrix` as ``silent``."""
    variance = covariance.diagonal().real
    # the median of the channels that have any: half of an array may be switched off
    alive = variance[variance > 0]
    if not len(alive):
        return tuple(range(len(variance)))
    return tuple(int(i) for i in torch.nonzero(variance <= DEAD_LEVEL * alive.median())[:, 0])


def whitening_scale(dwell_time: float, noise_dwell_time: float, relative_bandwidth: float = RELATIVE_BANDWIDTH) -> float:
    """``sqrt(2 * dwell_time / noise_dwell_time * relative_bandwidth)``.

    Noise power is proportional to the sampling bandwidth ``1 / dwell_time``; the factor 2 makes the real and the imaginary
    part each have unit variance.
    """
    for name, value in (
        ("dwell_time", dwell_time),
        ("noise_dwell_time", noise_dwell_time),
        ("relative_bandwidth", relative_bandwidth),
    ):
        if not (math.isfinite(value) and value > 0):
            raise DataError(
                "not a positive number", where=f"prewhitening, {name}", got=value, expected="seconds, or a ratio, > 0"
            )
    return math.sqrt(2.0 * dwell_time / noise_dwell_time * relative_bandwidth)


def whitening_matrix(
    covariance: Tensor,
    *,
    dwell_time: float,
    noise_dwell_time: float,
    relative_bandwidth: float = RELATIVE_BANDWIDTH,
    silent: Collection[int] = (),
) -> Tensor:
    """The matrix ``W`` with which ``W @ samples`` has white noise of SD ``WHITENED_NOISE_STD`` per complex sample.

    ``W = whitening_scale(...) * L^-1`` with ``C = L L^H``.

    Parameters
    ----------
    covariance
        complex ``(coil, coil)`` from :func:`noise_covariance`.
    dwell_time, noise_dwell_time
        Time between two samples of the imaging and of the noise readouts, s.
    relative_bandwidth
        Equivalent noise bandwidth of the noise scan as a part of ``1 / noise_dwell_time``.
    silent
        Channels to leave out; their rows and columns are zero, so the number of channels stays.

    Returns
    -------
    complex64 ``(coil, coil)``, lower triangular.

    Raises
    ------
    DataError
        A channel is dead, or is a linear combination of others (both name the channels); a dwell time is not positive.
    """
    if covariance.ndim != 2 or covariance.shape[0] != covariance.shape[1]:
        raise DataError("not a covariance", where="prewhitening", got=tuple(covariance.shape), expected="(coil, coil)")
    scale = whitening_scale(dwell_time, noise_dwell_time, relative_bandwidth)
    n_coils = covariance.shape[0]
    live = [i for i in range(n_coils) if i not in set(silent)]
    dead = sorted(set(dead_channels(covariance)) - set(silent))
    if dead or not live:
        raise DataError(
            "channels without noise",
            where="prewhitening",
            got=f"channels {dead or list(range(n_coils))}",
            expected="noise in every channel",
            remedy="Leave these channels out, or check the coil's connection",
        )
    cov = covariance[live][:, live].to(torch.complex128)
    sd = cov.diagonal().real.sqrt()
    correlation = cov / (sd[:, None] * sd[None, :])
    # in units of each channel's own noise: channels may differ in gain by orders of magnitude and still be sound
    values, vectors = torch.linalg.eigh(correlation)
    if values[0] < SINGULAR_LEVEL:
        worst = vectors[:, 0].abs()
        named = [live[i] for i in torch.nonzero(worst > 0.3 * worst.max())[:, 0].tolist()]
        raise DataError(
            "noise of these channels is linearly dependent",
            where="prewhitening",
            got=f"channels {named}, smallest eigenvalue of the correlation {float(values[0]):.1e}",
            expected=f"at least {SINGULAR_LEVEL:.0e}",
            remedy="Leave one of them out, or acquire more noise samples",
        )
    inverse = torch.linalg.inv(torch.linalg.cholesky(correlation)) / sd[None, :]
    matrix = torch.zeros(n_coils, n_coils, dtype=torch.complex64, device=covariance.device)
    index = torch.tensor(live, device=covariance.device)
    matrix[index[:, None], index[None, :]] = (scale * inverse).to(torch.complex64)
    return matrix
