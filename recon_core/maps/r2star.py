"""R2* and S0 from multi-echo magnitudes or complex images, with the standard deviation of every voxel.

Two ways: `arlo` (closed form, fast) and `nonlinear_r2star` (maximum likelihood, complex data or magnitudes with their Rician
mean). A voxel that cannot be believed is marked: ``valid`` is ``False`` and all its values are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.errors import DataError, SettingError
from recon_core.maps.echoes import checked_echoes, closest_echoes, least_rms
from recon_core.maps.magnitude_decay import MagnitudeDecay
from recon_core.settings import setting
from recon_core.signal_models.multi_echo import MultiEcho
from recon_core.solvers.least_squares import levenberg_marquardt
from recon_core.types import ParameterMap

Tensor = torch.Tensor


@dataclass(frozen=True)
class R2StarSettings:
    """What makes a voxel believable, and when the fit ends."""

    r2star_max: float = setting(500.0, "Largest plausible R2*", unit="1/s", low=1.0, high=10000.0)
    signal_floor: float = setting(0.02, "Least RMS of a voxel over that of the 99.9th percentile", low=0.0, high=1.0)
    min_snr: float = setting(
        3.0, "Least RMS of a voxel's echoes (of six or fewer) over the noise, where that is known", low=0.0, high=1000.0
    )
    max_iterations: int = setting(50, "Steps of the nonlinear fit per voxel", low=1, high=1000)


@dataclass(frozen=True)
class R2StarMaps:
    """R2* and its standard deviation in 1/s, S0 in the images' unit: float32 ``(z, y, x)`` with one common ``valid``."""

    r2star: ParameterMap
    r2star_sd: ParameterMap
    s0: ParameterMap

    @property
    def maps(self) -> tuple[ParameterMap, ...]:
        """All three."""
        return self.r2star, self.r2star_sd, self.s0


def arlo(
    images: Tensor,
    echo_times: Sequence[float],
    *,
    mask: Tensor | None = None,
    noise_std: float | None = None,
    settings: R2StarSettings | None = None,
) -> R2StarMaps:
    """R2* by auto-regression on linear operations: ``int s dt = T2* (s_i - s_(i+2))`` over all triplets of echoes.

    The integral is that of the parabola through three echoes, ``S_i``; with ``d_i = s_i - s_(i+2)`` and ``c_i`` a sixth of the
    triplet's length ``T2* = sum S_i (S_i + c_i d_i) / sum d_i (S_i + c_i d_i)``. For equal spacing that is Simpson's rule and the
    paper's Eq. 8; the parabola through unequally spaced echoes is our extension. Its systematic error grows with the spacing over
    T2*: below 0.2 % with the equal and unequal echoes of the tests, up to 140 1/s.

    Parameters
    ----------
    images
        ``(echo, z, y, x)``; complex ones by their magnitude. Any order of echoes. Never edited.
    echo_times
        s, three or more.
    mask
        bool ``(z, y, x)``; everywhere if ``None``.
    noise_std
        SD of the noise of one real number, images' unit, for the SD map and the least signal. ``None``: from each voxel's residual.

    Returns
    -------
    R2StarMaps
        The SD is first-order propagation of the noise through the formula.

    Raises
    ------
    DataError
        Wrong axes, echo times missing, equal or not positive, fewer than three, values that are not finite.
    SettingError
        A noise SD that is not above zero.

    References
    ----------
    Pei et al., Magn. Reson. Med. 73 (2015) 843, Eqs. 5-8.
    """
    limits = _checked_settings(settings, noise_std)
    series = _Series.read(images.abs(), echo_times, mask, noise_std, limits, where="ARLO", least=3)
    s, t = series.data, series.times
    combos = _triplets(t).to(s)  # (triplet, (integral, difference), echo)
    sixth = torch.tensor([(t[i + 2] - t[i]) / 6 for i in range(len(t) - 2)]).to(s)
    integral, drop = (torch.tensordot(combos[:, k], s, dims=1) for k in (0, 1))
    instrument = integral + sixth[:, None] * drop
    below = (drop * instrument).sum(0)
    t2star = (integral * instrument).sum(0) / below
    rate = 1 / t2star
    decay = torch.exp(-torch.tensor(t).to(s)[:, None] * rate)
    s0 = (decay * s).sum(0) / decay.square().sum(0)
    noise = series.noise_variance((s - s0 * decay).square().sum(0), 2)
    # d T2* = sum_i instrument_i (dS_i - T2* dd_i) / below, and the triplets share echoes
    response = torch.einsum("tp,te->ep", instrument, combos[:, 0]) - t2star * torch.einsum(
        "tp,te->ep", instrument, combos[:, 1]
    )
    sd = noise.sqrt() * torch.linalg.vector_norm(response, dim=0) / below.abs() * rate.square()
    return series.maps(rate, sd, s0, torch.ones_like(rate, dtype=torch.bool), "ARLO")


def nonlinear_r2star(
    images: Tensor,
    echo_times: Sequence[float],
    *,
    mask: Tensor | None = None,
    noise_std: float | None = None,
    field: Tensor | None = None,
    settings: R2StarSettings | None = None,
) -> R2StarMaps:
    """R2* by nonlinear least squares in each voxel, started from ARLO.

    *Complex images*: ``M0 exp((-R2* + i 2 pi f) TE)``, all four parameters free; the noise is Gaussian, so this is maximum
    likelihood and has no noise floor. *Magnitudes*: ``S0 exp(-R2* TE)``, or, when ``noise_std`` is known, the mean of the Rice
    distribution about it, which takes the noise floor out.

    Parameters
    ----------
    field
        Start of the frequency in Hz, ``(z, y, x)``, for complex images (`recon_core.maps.field.fit_field`). ``None``: from the phase
        of the two echoes that are nearest in time.
    images, echo_times, mask, noise_std
        As in `arlo`. Two echoes are enough for complex images, three for magnitudes (two with known noise).

    Raises
    ------
    DataError, SettingError
        As `arlo`.

    References
    ----------
    Sijbers et al., IEEE Trans. Med. Imaging 17 (1998) 357 (Rician data); Raya et al., Magn. Reson. Med. 63 (2010) 181 (first moment).
    """
    limits = _checked_settings(settings, noise_std)
    complex_data = images.is_complex()
    least = 2 if complex_data or noise_std is not None else 3
    series = _Series.read(images, echo_times, mask, noise_std, limits, where="nonlinear R2*", least=least)
    data, times = series.data, series.times
    rate, s0 = _log_linear(data.abs(), times)
    if complex_data:
        start_field = series.pick(field) if field is not None else _shortest_step_field(data, times)
        weights = torch.exp(-torch.tensor(times).to(rate)[:, None] * rate)
        turned = data * torch.polar(weights, -2 * math.pi * torch.tensor(times).to(rate)[:, None] * start_field)
        m0 = turned.sum(0) / weights.square().sum(0)
        start = torch.stack((m0.real, m0.imag, rate, start_field))
        inf = math.inf
        low, high = torch.tensor([-inf, -inf, 0.0, -inf]), torch.tensor([inf, inf, limits.r2star_max, inf])
        model: MultiEcho | MagnitudeDecay = MultiEcho(times)
    else:
        start = torch.stack((s0, rate))
        low, high = torch.tensor([0.0, 0.0]), torch.tensor([math.inf, limits.r2star_max])
        model = MagnitudeDecay(times, series.noise_std)
    fit = levenberg_marquardt(
        model,
        data,
        start,
        lower=low[:, None].to(data.device),
        upper=high[:, None].to(data.device),
        noise_std=series.noise_std,
        max_iterations=limits.max_iterations,
    )
    index = 2 if complex_data else 1
    amplitude = torch.linalg.vector_norm(fit.parameters[:2], dim=0) if complex_data else fit.parameters[0]
    sd = fit.covariance[index, index].clamp_min(0).sqrt()
    return series.maps(fit.parameters[index], sd, amplitude, fit.converged & ~fit.at_bound.any(0), "nonlinear fit")


@dataclass(frozen=True)
class _Series:
    """The voxels with signal, echoes ascending, scaled so that the largest magnitude is 1."""

    data: Tensor  # (echo, voxel)
    times: tuple[float, ...]
    has_signal: Tensor  # (z, y, x)
    scale: float
    noise_std: float | None
    settings: R2StarSettings

    @classmethod
    def read(
        cls,
        images: Tensor,
        times: Sequence[float],
        mask: Tensor | None,
        noise_std: float | None,
        settings: R2StarSettings,
        *,
        where: str,
        least: int,
    ) -> _Series:
        echoes = checked_echoes(images, times, mask, where=where, least=least)
        scale = float(echoes.images.abs().max()) or 1.0
        strength = echoes.images.abs().square().mean(0).sqrt() / scale
        inside = strength[echoes.mask]
        rank = max(1, min(inside.numel(), round(0.999 * inside.numel())))
        floor = settings.signal_floor * float(inside.kthvalue(rank).values)
        noise = None if noise_std is None else noise_std / scale
        if noise is not None:
            floor = max(floor, least_rms(settings.min_snr, len(times)) * noise)
        has_signal = echoes.mask & (strength > floor)
        return cls(echoes.images[:, has_signal] / scale, echoes.times, has_signal, scale, noise, settings)

    def pick(self, values: Tensor) -> Tensor:
        if values.shape != self.has_signal.shape:
            raise DataError(
                "field does not fit", where="R2*", got=tuple(values.shape), expected=tuple(self.has_signal.shape)
            )
        return values[self.has_signal].to(self.data.real.dtype)

    def noise_variance(self, residual: Tensor, n_parameters: int) -> Tensor:
        if self.noise_std is not None:
            return torch.full_like(residual, self.noise_std**2)
        return residual / (len(self.times) - n_parameters)

    def maps(self, rate: Tensor, sd: Tensor, s0: Tensor, believable: Tensor, method: str) -> R2StarMaps:
        good = (
            believable & (rate > 0) & (rate < self.settings.r2star_max) & torch.isfinite(sd) & torch.isfinite(s0) & (s0 > 0)
        )
        valid = torch.zeros_like(self.has_signal)
        valid[self.has_signal] = good

        def full(name: str, values: Tensor, unit: str, comment: str) -> ParameterMap:
            image = torch.zeros(self.has_signal.shape, dtype=torch.float32, device=values.device)
            image[self.has_signal] = torch.where(good, values, 0.0).float()
            return ParameterMap(name, image, unit, valid, comment)

        noise = "noise known" if self.noise_std is not None else "noise from the fit's residual"
        return R2StarMaps(
            full("R2star", rate, "1/s", method),
            full("R2star_SD", sd, "1/s", noise),
            full("S0", s0 * self.scale, "1", method),
        )


def _checked_settings(settings: R2StarSettings | None, noise_std: float | None) -> R2StarSettings:
    if noise_std is not None and not (math.isfinite(noise_std) and noise_std > 0):
        raise SettingError("noise SD must be above zero", where="R2*", got=noise_std)
    return settings or R2StarSettings()


def _triplets(times: Sequence[float]) -> Tensor:
    """float64 ``(triplet, 2, echo)``: weights of the integral of the parabola through three echoes, and first minus last."""
    n = len(times)
    out = torch.zeros(n - 2, 2, n, dtype=torch.float64)
    for i in range(n - 2):
        a, b = times[i + 1] - times[i], times[i + 2] - times[i + 1]
        whole = a + b
        out[i, 0, i : i + 3] = torch.tensor([2 - b / a, whole * whole / (a * b), 2 - a / b], dtype=torch.float64) * (
            whole / 6
        )
        out[i, 1, i], out[i, 1, i + 2] = 1.0, -1.0
    return out


def _log_linear(magnitude: Tensor, times: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Start: straight line through the logarithms, weighted with the squared signal; rate at least 0.1 1/s, and S0."""
    t = torch.tensor(times).to(magnitude)[:, None]
    weight = magnitude.square()
    logs = magnitude.clamp_min(1e-6).log()
    total = weight.sum(0)
    mean_t, mean_log = (weight * t).sum(0) / total, (weight * logs).sum(0) / total
    slope = (weight * (t - mean_t) * (logs - mean_log)).sum(0) / (weight * (t - mean_t).square()).sum(0).clamp_min(1e-30)
    rate = (-slope).clamp(0.1, 1000.0)
    return rate, torch.exp(mean_log + rate * mean_t)


def _shortest_step_field(data: Tensor, times: Sequence[float]) -> Tensor:
    i = closest_echoes(times)
    return (data[i + 1] * data[i].conj()).angle() / (2 * math.pi * (times[i + 1] - times[i]))
