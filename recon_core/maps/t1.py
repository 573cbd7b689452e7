"""T1 maps from images at several inversion or saturation times, with the error of every pixel.

A pixel that cannot be believed is *marked*: ``valid`` is ``False`` and all its values are 0. That happens where there is no
signal, where the fit did not converge or ended on a bound, where its result is implausible, and where the data do not
determine T1 (its standard deviation is a large part of it). Nothing is filled in or smoothed.

Starts are not guessed: for each T1 of a grid the amplitudes follow by linear least squares (variable projection), and the best
T1 starts the fit. Golub & Pereyra, SIAM J. Numer. Anal. 10 (1973) 413; Barral et al., MRM 64 (2010) 1057 (inversion recovery).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from recon_core.errors import DataError, SettingError
from recon_core.settings import setting
from recon_core.signal_models import SaturationRecovery, ThreeParameterRecovery, look_locker_t1, relaxation_time
from recon_core.solvers.least_squares import LeastSquaresFit, levenberg_marquardt
from recon_core.types import ParameterMap

Tensor = torch.Tensor

GRID = 48  # T1 values of the search, 12 % apart over the default range: well inside the fit's basin
SEARCH_VALUES = 1 << 22  # numbers of one search block, 16 MiB in float32
APPARENT_FACTOR = 4.0  # T1* is at most this much shorter than T1; a train that drives it faster leaves no signal
INDISTINCT = 4.0  # two sign patterns this few noise variances apart are equally likely; T1s this many SD apart are different
ROUNDING_VARIANCE = 1e-12  # of single precision, relative to the signal: what noiseless data are known to
MOST_INVERTED = 4.0  # B/A without a driving readout: 2 after a perfect inversion, and room for the noise of A


@dataclass(frozen=True)
class T1Settings:
    """What makes a pixel believable, and when the fit ends."""

    t1_min: float = setting(0.05, "Shortest plausible T1", unit="s", low=0.001, high=1.0)
    t1_max: float = setting(6.0, "Longest plausible T1", unit="s", low=1.0, high=60.0)
    signal_floor: float = setting(
        0.02, "A pixel with less than this part of the series' 99.9th percentile has no signal", low=0.0, high=1.0
    )
    min_snr: float = setting(
        3.0, "Least RMS of a pixel's series over its noise, known or from the fit", low=0.0, high=1000.0
    )
    max_relative_sd: float = setting(0.3, "Largest standard deviation of T1, as a part of T1", low=0.001, high=10.0)
    max_iterations: int = setting(50, "Steps of the fit per pixel", low=1, high=1000)


@dataclass(frozen=True)
class T1Maps:
    """All float32 ``(z, y, x)``, with one common ``valid``; values are 0 where it is ``False``.

    Attributes
    ----------
    t1, t1_sd
        T1 and its standard deviation in s.
    m0
        Magnitude of the equilibrium magnetisation in the images' unit.
    residual
        Standard deviation of the data about the fit in the images' unit: ``sqrt(sum |q - y|^2 / degrees of freedom)``.
    m0_phase
        Phase of M0 in rad; ``None`` for magnitude images.
    parameters
        ``(A, B, R)`` of ``A - B exp(-TI R)``, float32 ``(parameter, z, y, x)``, images' unit and 1/s; ``None`` for a saturation recovery.
    """

    t1: ParameterMap
    t1_sd: ParameterMap
    m0: ParameterMap
    residual: ParameterMap
    m0_phase: ParameterMap | None = None
    parameters: Tensor | None = None

    @property
    def maps(self) -> tuple[ParameterMap, ...]:
        """All maps that exist."""
        found = (self.t1, self.t1_sd, self.m0, self.residual, self.m0_phase)
        return tuple(m for m in found if m is not None)


def molli_t1(
    images: Tensor,
    inversion_times: Sequence[float],
    *,
    noise_std: float | None = None,
    settings: T1Settings | None = None,
) -> T1Maps:
    """T1 from MOLLI or another Look-Locker series: fit ``A - B exp(-TI/T1*)``, then ``T1 = T1* (B/A - 1)``.

    *Complex images* (phase-sensitive): the reference of each pixel is the axis of its series in the complex plane,
    ``arg(sum_i y_i^2) / 2``, which uses every image and does not care whether the last one has recovered; the sign along it is
    the sign of the magnetisation, up to one common sign that the fit absorbs. States must share one phase.

    *Magnitude images*: the sign is lost, so every position of the zero crossing is tried (the first 0, 1, ... images negative).
    The two best positions of the grid search are fitted and the smaller residual wins among those that physics allows:
    ``A < B < 5 A``, T1* up to four times shorter than T1. Where both fit equally well with different T1 the pixel is marked (two samples
    before a recovered rest fit exactly with either sign: short T1 needs complex images or earlier times).

    Parameters
    ----------
    images
        ``(state, z, y, x)``: complex, or real and not negative. Any order of times. Never edited.
    inversion_times
        One per state, s. MOLLI: of each image, heart beats included.
    noise_std
        SD of the noise of one real number in the images' unit (real part, or magnitude far above noise), if known. ``None``:
        from each pixel's own residual.
    settings
        Limits; the defaults if ``None``.

    Returns
    -------
    T1Maps
        M0 is ``B - A``, the equilibrium magnetisation if the inversion was perfect.

    Raises
    ------
    DataError
        Wrong axes, a count of times other than of states, fewer than 4 different times (3 for complex images of known noise),
        values that are not finite, negative magnitudes.
    SettingError
        Limits or a noise SD that make no sense.

    Notes
    -----
    An imperfect inversion (efficiency e) shortens T1 by about the factor e, magnetisation transfer and the readout's flip angle
    do more: MOLLI's known systematic errors are not corrected here. Magnitudes below about 3 SD of noise are Rician, which bends
    series near the zero crossing. Eight (five) magnitudes of pure noise pass all checks in 8 % (11 %) of pixels, complex ones in
    under 1 %; with ``noise_std`` none do: give it, or complex images, where air must stay empty.

    References
    ----------
    Messroghli et al., MRM 52 (2004) 141; Deichmann & Haase, J. Magn. Reson. 96 (1992) 608; Xue et al., MRM 69 (2013) 1408
    (phase-sensitive reference).
    """
    return _three_parameter(images, inversion_times, noise_std, settings or T1Settings(), look_locker=True)


def inversion_recovery_t1(
    images: Tensor,
    inversion_times: Sequence[float],
    *,
    noise_std: float | None = None,
    settings: T1Settings | None = None,
) -> T1Maps:
    """T1 from inversion recovery with one readout per inversion: ``A - B exp(-TI/T1)``, any inversion efficiency.

    Everything else as in `molli_t1`, with ``A < B < 4 A`` and without the Look-Locker correction. M0 is ``A``: too large by the
    factor ``1 + e exp(-TR/T1)`` where a short repetition time leaves no full recovery (90 degree readout, efficiency e); T1 is
    right all the same, because B is free.

    References
    ----------
    Barral et al., MRM 64 (2010) 1057.
    """
    return _three_parameter(images, inversion_times, noise_std, settings or T1Settings(), look_locker=False)


def saturation_recovery_t1(
    images: Tensor,
    saturation_times: Sequence[float],
    *,
    noise_std: float | None = None,
    settings: T1Settings | None = None,
) -> T1Maps:
    """T1 from saturation recovery: ``M0 (1 - exp(-tau/T1))`` (PINQI, Eq. 19), unregularised, in each pixel.

    Parameters
    ----------
    images
        ``(state, z, y, x)``: complex (complex M0, all states in one phase), or real and not negative.
    saturation_times
        ``tau``, one per state, s.
    noise_std, settings
        As in `molli_t1`.

    Raises
    ------
    DataError
        As `molli_t1`; the least numbers of different times are 2 for complex images, 3 for magnitudes (2 with known noise).
    """
    limits = _checked_settings(settings or T1Settings(), noise_std)
    series = _Series.read(images, saturation_times, noise_std, limits, where="saturation-recovery T1")
    series.need(2 if images.is_complex() or noise_std is not None else 3)
    model = SaturationRecovery(series.times, is_complex=images.is_complex())
    rates = _rates(limits.t1_min, limits.t1_max, images.device)
    start = _saturation_start(series.data, series.times, rates)
    fit = _fit(model, series.data, start, rates, series, limits)
    t1, t1_sd = relaxation_time(fit.parameters[-1], fit.covariance[-1, -1])
    assert t1_sd is not None
    if images.is_complex():
        m0 = torch.complex(fit.parameters[0], fit.parameters[1])
        return series.maps(t1, t1_sd, m0.abs(), fit, 2 * len(series.times), _believable(fit, m0.abs() > 0), m0.angle())
    return series.maps(t1, t1_sd, fit.parameters[0], fit, len(series.times), _believable(fit, fit.parameters[0] > 0), None)


@dataclass(frozen=True)
class _Series:
    """The pixels with signal, scaled so that the largest value is 1; times ascending."""

    data: Tensor  # (state, pixel)
    times: tuple[float, ...]
    has_signal: Tensor  # (z, y, x)
    scale: float
    noise_std: float | None
    settings: T1Settings
    where: str

    @classmethod
    def read(
        cls, images: Tensor, times: Sequence[float], noise_std: float | None, settings: T1Settings, *, where: str
    ) -> _Series:
        if images.ndim != 4 or 0 in images.shape:
            raise DataError("images have the wrong axes", where=where, got=tuple(images.shape), expected="(state, z, y, x)")
        if len(times) != images.shape[0]:
            raise DataError(
                "count of times and of images differ",
                where=where,
                got=f"{len(times)} times, {images.shape[0]} images",
                remedy="Check the times in the header.",
            )
        if wrong := [t for t in times if not (math.isfinite(t) and t >= 0)]:
            raise DataError("not a time", where=where, got=wrong[0], expected="finite and not negative, in s")
        if not bool(torch.isfinite(images).all()):
            raise DataError("images are not finite", where=where, got=f"{int((~torch.isfinite(images)).sum())} such values")
        if not images.is_complex() and bool((images < 0).any()):
            raise DataError("magnitudes are negative", where=where, remedy="Pass complex images where the sign is known.")
        order = sorted(range(len(times)), key=lambda i: times[i])
        data = images[order].to(torch.complex64 if images.is_complex() else torch.float32)
        scale = float(data.abs().max()) or 1.0
        data = data / scale
        noise = None if noise_std is None else noise_std / scale
        strength = data.abs().square().mean(0).sqrt()
        floor = settings.signal_floor * _percentile(strength, 0.999)
        if noise is not None:
            floor = max(floor, settings.min_snr * noise)
        has_signal = (strength > floor) & (strength > 0)
        return cls(data[:, has_signal], tuple(float(times[i]) for i in order), has_signal, scale, noise, settings, where)

    def need(self, least: int) -> None:
        if (n := len(set(self.times))) < least:
            raise DataError("too few different times", where=self.where, got=n, expected=f"at least {least}")

    def maps(
        self,
        t1: Tensor,
        t1_sd: Tensor,
        m0: Tensor,
        fit: LeastSquaresFit,
        n_rows: int,
        believable: Tensor,
        phase: Tensor | None,
    ) -> T1Maps:
        limits = self.settings
        plausible = (t1 >= limits.t1_min) & (t1 <= limits.t1_max) & (t1_sd <= limits.max_relative_sd * t1)
        residual = (fit.residual / max(n_rows - len(fit.parameters), 1)).sqrt()
        # with lost signs noise fits itself: what gives it away is a residual nearly as large as the signal
        clear = self.data.abs().square().mean(0).sqrt() >= limits.min_snr * residual
        good = believable & plausible & clear & torch.isfinite(m0)  # NaN compares False
        valid = torch.zeros_like(self.has_signal)
        valid[self.has_signal] = good

        def full(name: str, values: Tensor, unit: str, comment: str = "") -> ParameterMap:
            image = torch.zeros(self.has_signal.shape, dtype=torch.float32, device=t1.device)
            image[self.has_signal] = torch.where(good, values, 0.0).to(torch.float32)
            return ParameterMap(name, image, unit, valid, comment)

        return T1Maps(
            full("T1", t1, "s"),
            full("T1_SD", t1_sd, "s", "noise known" if self.noise_std is not None else "noise from the fit's residual"),
            full("M0", m0 * self.scale, "1"),
            full("T1_residual", residual * self.scale, "1"),
            None if phase is None else full("M0_phase", phase, "rad"),
        )


def _three_parameter(
    images: Tensor, times: Sequence[float], noise_std: float | None, settings: T1Settings, *, look_locker: bool
) -> T1Maps:
    limits = _checked_settings(settings, noise_std)
    series = _Series.read(images, times, noise_std, limits, where="MOLLI T1" if look_locker else "inversion-recovery T1")
    series.need(3 if images.is_complex() and noise_std is not None else 4)
    model = ThreeParameterRecovery(series.times)
    rates = _rates(limits.t1_min / (APPARENT_FACTOR if look_locker else 1), limits.t1_max, images.device)
    if images.is_complex():
        axis = series.data.square().sum(0).angle() / 2
        data, candidates = (series.data * torch.polar(torch.ones_like(axis), -axis)).real, 1
        signs = torch.ones(1, len(series.times), device=images.device)
    else:
        axis, data, candidates = None, series.data, 2
        # row k: the first k images are negative; all negative is all positive with A < 0
        signs = 1 - 2 * torch.ones(len(series.times), len(series.times), device=images.device).tril(-1)
    basis = torch.stack([torch.ones(GRID, len(series.times)).double(), -_decays(series.times, rates)], dim=-1)  # (g, s, 2)
    which, best = _crossings(data, signs, basis, candidates)

    found: list[_Candidate] = []
    for k, g in zip(which, best, strict=True):
        signed = data * signs[k].T
        amplitudes = torch.einsum("nps,sn->pn", torch.linalg.pinv(basis).float().to(data.device)[g], signed)
        if axis is not None:  # the axis has no direction: let the recovered magnetisation be positive
            flip = torch.where(amplitudes[0] < 0, -1.0, 1.0)
            signed, amplitudes = signed * flip, amplitudes * flip
            axis = axis + torch.where(flip < 0, math.pi, 0.0)
        fit = _fit(model, signed, torch.cat((amplitudes, rates[g][None])), rates, series, limits)
        a, b, _ = fit.parameters
        inverted = (a > 0) & (b > a) & (b < a * (1 + APPARENT_FACTOR if look_locker else MOST_INVERTED))
        if look_locker:
            t1, t1_sd = look_locker_t1(fit.parameters, fit.covariance)
        else:
            t1, t1_sd = relaxation_time(fit.parameters[2], fit.covariance[2, 2])
        assert t1_sd is not None
        found.append(_Candidate(t1, t1_sd, b - a if look_locker else a, fit, _believable(fit, inverted)))
    c = found[0] if len(found) == 1 else _better(found[0], found[1], series)
    phase = None if axis is None else torch.remainder(axis + math.pi, 2 * math.pi) - math.pi
    maps = series.maps(c.t1, c.t1_sd, c.m0, c.fit, len(series.times), c.believable, phase)
    parameters = torch.zeros((3, *series.has_signal.shape), dtype=torch.float32, device=data.device)
    unit = torch.tensor([series.scale, series.scale, 1.0], device=data.device)
    parameters[:, series.has_signal] = c.fit.parameters.float() * unit[:, None]
    return replace(maps, parameters=parameters)


@dataclass(frozen=True)
class _Candidate:
    """The fit of one sign pattern, ``(pixel,)``."""

    t1: Tensor
    t1_sd: Tensor
    m0: Tensor
    fit: LeastSquaresFit
    believable: Tensor


def _better(first: _Candidate, second: _Candidate, series: _Series) -> _Candidate:
    """In each pixel the smaller residual among the believable; none where noise cannot tell two that say different T1.

    Where a sample lies within noise of the zero crossing the two are close: the variance between them adds to T1's.
    """
    costs = [torch.where(c.believable, c.fit.residual, torch.inf) for c in (first, second)]
    take = costs[1] < costs[0]

    def mixed(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(take, b, a)

    fit = LeastSquaresFit(**{name: mixed(value, getattr(second.fit, name)) for name, value in vars(first.fit).items()})
    freedom = max(len(series.times) - len(fit.parameters), 1)
    variance = fit.residual / freedom if series.noise_std is None else torch.full_like(fit.residual, series.noise_std**2)
    variance = variance + ROUNDING_VARIANCE * series.data.square().mean(0)
    both = first.believable & second.believable
    lead = torch.where(both, (costs[0] - costs[1]).abs() / variance, torch.inf)
    apart = (first.t1 - second.t1).abs()
    ambiguous = both & (lead < INDISTINCT) & (apart > INDISTINCT * torch.maximum(first.t1_sd, second.t1_sd))
    doubt = torch.sigmoid(-lead / 2)  # probability of the other pattern, from the ratio of the likelihoods
    between = torch.where(both, doubt * (1 - doubt) * apart.square(), 0.0)
    return _Candidate(
        mixed(first.t1, second.t1),
        (mixed(first.t1_sd, second.t1_sd).square() + between).sqrt(),
        mixed(first.m0, second.m0),
        fit,
        mixed(first.believable, second.believable) & ~ambiguous,
    )


def _believable(fit: LeastSquaresFit, physical: Tensor) -> Tensor:
    return fit.converged & ~fit.at_bound.any(0) & physical


def _fit(
    model: SaturationRecovery | ThreeParameterRecovery,
    data: Tensor,
    start: Tensor,
    rates: Tensor,
    series: _Series,
    settings: T1Settings,
) -> LeastSquaresFit:
    open_end = torch.full((len(start) - 1, 1), torch.inf, device=data.device)
    return levenberg_marquardt(
        model,
        data,
        start,
        lower=torch.cat((-open_end, rates.min().reshape(1, 1))),
        upper=torch.cat((open_end, rates.max().reshape(1, 1))),
        noise_std=series.noise_std,
        max_iterations=settings.max_iterations,
    )


def _rates(shortest: float, longest: float, device: torch.device) -> Tensor:
    """``(g,)`` in 1/s, in equal ratios."""
    return 1 / torch.logspace(math.log10(shortest), math.log10(longest), GRID, device=device)


def _decays(times: Sequence[float], rates: Tensor) -> Tensor:
    """``exp(-t R)``, float64 on the CPU, ``(g, s)``."""
    return torch.exp(-rates.double().cpu()[:, None] * torch.tensor(times, dtype=torch.float64))


def _blocks(n_pixels: int, values_per_pixel: int, search: Callable[[slice], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    step = max(1, SEARCH_VALUES // values_per_pixel)
    parts = [search(slice(i, i + step)) for i in range(0, max(n_pixels, 1), step)]
    first, second = zip(*parts, strict=True)
    return torch.cat(first, dim=-1), torch.cat(second, dim=-1)


def _crossings(data: Tensor, signs: Tensor, basis: Tensor, candidates: int) -> tuple[Tensor, Tensor]:
    """The best sign patterns and for each its best grid point, both ``(candidate, pixel)``.

    The data explained by a basis is ``|Q^T (s y)|^2`` with its orthonormal form Q; ``Q^T s`` is prepared for all grid points and
    patterns, so that the whole search is one matrix product.
    """
    q = torch.linalg.qr(basis).Q.permute(2, 0, 1)  # (2, g, s)
    n_patterns = len(signs)
    matrix = (signs.double().cpu()[:, None, None, :] * q).float().to(data.device).reshape(-1, data.shape[0])

    def search(block: slice) -> tuple[Tensor, Tensor]:
        explained = (matrix @ data[:, block]).square_().reshape(n_patterns, 2, GRID, -1).sum(1)
        value, grid = explained.max(dim=1)  # (pattern, pixel)
        patterns = value.topk(min(candidates, n_patterns), dim=0).indices
        return patterns, grid.gather(0, patterns)

    return _blocks(data.shape[1], len(matrix), search)


def _saturation_start(data: Tensor, times: Sequence[float], rates: Tensor) -> Tensor:
    """``(parameter, pixel)``: the best grid point and its amplitude."""
    weights = 1 - _decays(times, rates)
    weights = (weights / weights.square().sum(1, keepdim=True)).float().to(data.device)  # w / |w|^2
    norms = 1 / weights.square().sum(1)  # |w|^2
    rows = torch.view_as_real(data) if data.is_complex() else data[..., None]

    def search(block: slice) -> tuple[Tensor, Tensor]:
        amplitude = torch.einsum("gs,snc->cgn", weights, rows[:, block])
        grid = (amplitude.square().sum(0) * norms[:, None]).argmax(0)
        return amplitude.gather(1, grid.expand(len(amplitude), 1, -1))[:, 0], rates[grid][None]

    return torch.cat(_blocks(data.shape[1], 2 * GRID, search))


def _percentile(values: Tensor, fraction: float) -> float:
    flat = values.flatten()
    return float(flat.kthvalue(max(1, math.ceil(fraction * flat.numel()))).values)


def _checked_settings(settings: T1Settings, noise_std: float | None) -> T1Settings:
    if not 0 < settings.t1_min < settings.t1_max:
        raise SettingError("T1 limits", where="T1 map", got=f"{settings.t1_min} to {settings.t1_max} s")
    if noise_std is not None and not (math.isfinite(noise_std) and noise_std > 0):
        raise SettingError("noise SD must be above zero", where="T1 map", got=noise_std)
    return settings
