"""What every method does at its door: check the k-space, scale it once, build the acquisition operator, know the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from recon_core.errors import CalibrationError, DataError
from recon_core.fourier import ifft_centred
from recon_core.operators.cartesian import CartesianSense
from recon_core.types import K1, K2, KSpace, Report

Tensor = torch.Tensor

PEAK = 0.999
"""The quantile of the coil-combined calibration image that becomes 1."""

LOUDEST = 1.33
"""A noise scan may say so many times what outer k-space shows, where signal comes on top: few samples, and noise bandwidths that differ by
12 %. Good T1 scans show 0.47 to 0.75 (`benchmarks.t1_checks`)."""

FAR_TOO_LOUD = 3.0
"""... and so many times where no maps are made: the regularisation by it is ten times too strong, up to a black image."""

QUIETEST = 3.0
"""... and outer k-space that holds nothing but noise may be so many times louder than the noise scan. Good scans show 0.95 to 1.23
(`benchmarks.t1_checks`), and up to 1.7 where signal passes for white: four coils, an SNR of 200, partial Fourier."""

WHITE, LARGELY_WHITE, FAR_TOO_QUIET = 0.85, 0.75, 20.0
"""Geometric over arithmetic mean of the eigenvalues of the covariance between coils, above which samples are noise that was whitened: 0.86
to 1.00 at an SNR of up to 100. Signal in outer k-space is shared by neighbouring coils: 0.80 to 0.91 where both together are half as loud
again as noise, at most 0.64 where they are 4 times louder, so that the second value serves where noise seems more than 20 times louder than
measured."""

FEWEST_COILS = 4
"""Below which signal may look white: two coils on either side."""

AIR = 0.1
"""Part of the readout positions, those with least energy, that are asked for noise."""

ROUNDING = 1e-6
"""Of the largest sample: what simulated data without noise have instead."""

MOST_WEIGHT = 2.0
"""Averages count by their number up to this many times the typical one: more would slow every solver (condition number)."""


@dataclass(frozen=True)
class Problem:
    """``min |A x - b|^2`` in scaled units, in the operator's working layout.

    Attributes
    ----------
    operator
        ``A = W F S`` with ``W = sqrt(counts / typical count)``.
    rhs
        ``A^H b``, working images.
    scale
        Measured units per scaled unit; results are multiplied with it on the way out.
    noise
        Standard deviation of a complex sample of the weighted, scaled data.
    noise_measured
        False when ``noise`` had to be estimated from the outer k-space.
    """

    operator: CartesianSense
    rhs: Tensor
    scale: float
    noise: float
    noise_measured: bool

    def state(self, index: int) -> Problem:
        """One of the states by itself, in the same units."""
        operator = self.operator.with_weights(self.operator.weights[index : index + 1])
        return replace(self, operator=operator, rhs=self.rhs[index : index + 1])

    def leave(self, images: Tensor) -> Tensor:
        """Working images to centred ``(state, z, y, x)`` in measured units, complex64."""
        return (self.operator.leave_image(images) * self.scale).to(torch.complex64)


def check_kspace(kspace: KSpace, where: str) -> None:
    """Raise ``DataError`` unless shapes fit, something was sampled and every value is finite."""
    data, counts = kspace.data, kspace.counts
    if data.ndim != 5 or not data.is_complex():
        raise DataError(
            "not a k-space",
            where=where,
            got=f"{tuple(data.shape)} {data.dtype}",
            expected="complex (state, coil, k2, k1, x)",
        )
    expected = (data.shape[0], data.shape[2], data.shape[3])
    if tuple(counts.shape) != expected:
        raise DataError("counts do not fit the k-space", where=where, got=tuple(counts.shape), expected=expected)
    if not bool((counts > 0).any()):
        raise DataError(
            "nothing was sampled", where=where, remedy="Check the encoding limits and the acceleration in the header"
        )
    finite = all(bool(torch.isfinite(torch.view_as_real(state)).all()) for state in data)
    if not finite or not bool(torch.isfinite(counts).all()):
        raise DataError("k-space holds values that are not finite", where=where)
    empty = (counts <= 0).flatten(1).all(dim=1).nonzero().flatten().tolist()
    if empty:
        raise DataError(
            "states without any sample", where=where, got=f"states {empty}", remedy="Check which counter makes the states"
        )


def check_maps(kspace: KSpace, where: str) -> Tensor:
    """The coil maps, or a typed error when they are missing, do not fit, or are not usable."""
    maps = kspace.coil_maps
    if maps is None:
        raise CalibrationError(
            "this method needs coil maps", where=where, remedy="Acquire calibration lines or estimate maps first"
        )
    expected = tuple(kspace.data.shape[1:])
    if tuple(maps.shape) != expected:
        raise DataError("coil maps do not fit the k-space", where=where, got=tuple(maps.shape), expected=expected)
    if not bool(torch.isfinite(torch.view_as_real(maps)).all()):
        raise DataError("coil maps hold values that are not finite", where=where)
    if not bool((maps != 0).any()):
        raise CalibrationError("coil maps are zero everywhere", where=where, remedy="Check the calibration lines")
    return maps


@dataclass(frozen=True)
class Door:
    """What all states of a slice or slab decide together.

    Attributes
    ----------
    scale
        Measured units per scaled unit, see ``signal_scale``; 0 when all samples are zero.
    typical
        Median count of the sampled positions.
    noise
        Standard deviation of a complex sample with ``counts`` 1, in measured units.
    noise_measured
        False when it had to be estimated from the outer k-space.
    """

    scale: float
    typical: float
    noise: float
    noise_measured: bool


def door(kspace: KSpace) -> Door:
    """Of a part of the states this is what the whole says: a part by itself would be scaled and weighed otherwise."""
    whole = kspace.all_states
    noise, measured = noise_of(whole)
    return Door(signal_scale(whole), float(whole.counts[whole.counts > 0].median()), noise, measured)


def noise_of(kspace: KSpace) -> tuple[float, bool]:
    """Standard deviation of a complex sample with ``counts`` 1, and whether it was measured (else from the outer k-space)."""
    measured = kspace.noise_std is not None and kspace.noise_std > 0
    return (float(kspace.noise_std or 0.0) if measured else outer_noise(kspace)), measured


def pose(kspace: KSpace, where: str, report: Report) -> Problem:
    """Check, scale and weigh one slice or slab, or a part of its states (``KSpace.part``).

    Raises
    ------
    DataError
        Shapes do not fit, nothing (or a whole state not) sampled, values that are not finite.
    CalibrationError
        No usable coil maps.
    """
    check_kspace(kspace.all_states, where)
    maps = check_maps(kspace, where)
    common = door(kspace)
    scale = common.scale
    if scale == 0:
        report.warn("all samples are zero")
        scale = 1.0
    weights = (kspace.counts / common.typical).clamp(0, MOST_WEIGHT).sqrt()
    operator = CartesianSense(maps, weights)
    rhs = operator.project(kspace.data, scale)
    return Problem(operator, rhs, scale, common.noise / math.sqrt(common.typical) / scale, common.noise_measured)


def signal_scale(kspace: KSpace) -> float:
    """99.9th percentile of the coil-combined magnitude images of the calibration lines, all states together.

    State by state where the states hold those lines themselves: in the mean over inversion times the signs cancel. Separate
    calibration lines come next, as bright as the brightest state where both were sampled (a reference scan may have another flip angle),
    and without any the zero-filled images.
    """
    centre = kspace.acs_mask if kspace.acs_mask is not None else kspace.mask.all(0)
    source, window, gain = kspace.data, None, 1.0
    # positions that all states share by chance, far out, show no object
    if bool(centre[centre.shape[0] // 2, centre.shape[1] // 2]) and bool(kspace.mask[:, centre].all()):
        window = centre[:, :, None]
    elif kspace.acs is not None:
        source, gain = kspace.acs[None], _gain_over_calibration(kspace, kspace.acs, centre)
    # squares of raw data in volts underflow in float32
    peak = max(float(state.abs().max()) for state in source)
    if peak == 0:
        return 0.0
    maps = None if kspace.coil_maps is None else kspace.coil_maps.conj()
    parts = []
    for state in source:
        images = ifft_centred(state / peak if window is None else state / peak * window, (K2, K1))
        if maps is None:
            parts.append(torch.linalg.vector_norm(torch.view_as_real(images), dim=(0, -1)))
        else:
            parts.append((maps * images).sum(0).abs())
    magnitude = torch.stack(parts).flatten()
    quantile = float(magnitude.kthvalue(max(1, math.ceil(PEAK * magnitude.numel()))).values)
    # an object smaller than a thousandth of the image
    return gain * peak * (quantile if quantile > 0 else float(magnitude.max()))


def _gain_over_calibration(kspace: KSpace, acs: Tensor, acs_mask: Tensor) -> float:
    """How many times brighter the brightest state is than the calibration lines, RMS over positions of both; 1 where there are none."""
    largest = float(acs.abs().max())
    gains = [0.0]
    for data, mask in zip(kspace.data, kspace.mask, strict=True):
        both = mask & acs_mask
        own, reference = (
            float((k[:, both].abs().double() / largest).square().sum()) if largest > 0 else 0.0 for k in (data, acs)
        )
        gains.append(math.sqrt(own / reference) if reference > 0 else 0.0)
    return max(gains) or 1.0


def outer_noise(kspace: KSpace) -> float:
    """Noise of one complex sample (``counts`` = 1), estimated where there is least signal.

    The outer quarter of the sampled positions, all readout positions: for complex Gaussian noise ``|n|^2`` is exponential, so
    its lowest tenth ends at ``-ln(0.9) sigma^2``; the tenth hardly sees what signal remains. Biased upwards if at all.
    """
    power = _outer_power(kspace)
    heard = power > 0  # channels without a receiver are silent
    return math.sqrt(float(power[heard].mean())) if bool(heard.any()) else 0.0


def noise_scan_excess(kspace: KSpace) -> float:
    """How many times louder the noise measurement is than the outer k-space of the images shows; 0 without a measurement, or without noise.

    Noise adds to signal, so outer k-space is never the quieter of the two: above `LOUDEST` the measurement does not belong to the images.
    The loudest coil counts, as channels without a receiver are silent; an asymmetric echo leaves its share of the noise.
    """
    outer = float(_outer_power(kspace).max())
    if not kspace.noise_std or not outer > 0:
        return 0.0
    return kspace.noise_std * math.sqrt(kspace.readout_share / outer)


def noise_scan_lack(kspace: KSpace) -> float:
    """How many times quieter the noise measurement is than the outer k-space of the images; 0 where signal may be what is louder.

    Asked are the readout positions with least energy, where there is no object. Noise of the right covariance is white after whitening,
    however wrong its scale is, and signal is not (`WHITE`).
    """
    if not kspace.noise_std or not bool(kspace.mask.any()):
        return 0.0
    samples = _outer_samples(kspace)  # (position, x, coil)
    power = samples.abs().double().square().mean((0, 2))
    quiet = samples[:, power.argsort()[: max(1, int(AIR * len(power)))]].flatten(0, 1).to(torch.complex128)
    quiet = quiet[:, (quiet != 0).any(0)]  # channels without a receiver are silent
    if quiet.shape[1] < FEWEST_COILS or len(quiet) <= quiet.shape[1] or not bool(torch.isfinite(quiet.abs()).all()):
        return 0.0
    variances = torch.linalg.eigvalsh(quiet.mH @ quiet / len(quiet))
    level = math.sqrt(float(variances.mean()))
    if level <= ROUNDING * float(kspace.data.abs().max()) or not float(variances[0]) > 0:
        return 0.0
    lack = level / (kspace.noise_std * math.sqrt(kspace.readout_share))
    white = float(variances.log().mean().exp() / variances.mean())
    return lack if white > (WHITE if lack < FAR_TOO_QUIET else LARGELY_WHITE) else 0.0


def _outer_power(kspace: KSpace) -> Tensor:
    """Noise variance of each coil, float64 ``(coil,)``; see `outer_noise`."""
    # one variance per coil: without prewhitening coils differ
    per_coil = _outer_samples(kspace).abs().double().square().flatten(0, 1)
    return per_coil.kthvalue(max(1, per_coil.shape[0] // 10), dim=0).values / -math.log(0.9)


def _outer_samples(kspace: KSpace) -> Tensor:
    """The outer quarter of the sampled positions as if sampled once, ``(position, x, coil)``."""
    counts = kspace.counts
    k2 = (torch.arange(counts.shape[1], device=counts.device) - counts.shape[1] // 2) / max(1, counts.shape[1] // 2)
    k1 = (torch.arange(counts.shape[2], device=counts.device) - counts.shape[2] // 2) / max(1, counts.shape[2] // 2)
    distance = torch.maximum(k2.abs()[:, None], k1.abs()[None, :]).expand(counts.shape)
    sampled = counts > 0
    far = sampled & (distance >= upper_quartile(distance[sampled]))
    return kspace.data.movedim(1, -1)[far] * counts[far].sqrt()[:, None, None]


def upper_quartile(values: Tensor) -> Tensor:
    """The first value at or above it; `torch.quantile` takes 16 million values at most."""
    return values.float().kthvalue(math.ceil(0.75 * (values.numel() - 1)) + 1).values
