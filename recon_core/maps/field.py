"""Field map from complex multi-echo images: weighted fit of the phase across echoes, phase offset, alternating readouts.

Model: the phase of echo ``j`` is ``offset + 2 pi f TE_j``; the phase grows with the echo time where ``f`` is positive (Hz). The
offset (coils, pulse) is free in every voxel. Echoes that are read in alternating directions have in addition ``+-(a + b x)``
along the readout, which `correct_bipolar` removes first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch.nn import functional

from recon_core.errors import DataError
from recon_core.maps.echoes import checked_echoes, closest_step
from recon_core.maps.unwrap import unwrap_phase
from recon_core.types import ParameterMap

Tensor = torch.Tensor

TURN = 2 * math.pi
MAX_STEPS, TOLERANCE = 30, 1e-5  # of Gauss-Newton; rad at the last echo
SUSPICIOUS = 2.0  # times what the noise leaves: chance seldom leaves more ...
HARMLESS = 0.15  # rad; ... and so much the field's spread inside a voxel may
SEARCH_PER_CYCLE = 8  # points of the search for the ramp between odd and even echoes
STANDS_OUT, FEWEST_NEIGHBOURS = 0.25, 6  # of the field's period; neighbours whose median counts
MOST_PASSES, VOXELS_AT_ONCE = 5, 2**17
AS_GOOD, BY_CHANCE = 1.001, 9.0  # times the squared residual; chi-squared more: one in 400 voxels
MOST_CYCLES = 4.0  # of that ramp across the volume: a readout shifted by four samples


@dataclass(frozen=True)
class FieldMaps:
    """float32 ``(z, y, x)``, zero outside ``valid`` = the mask.

    Attributes
    ----------
    field, field_sd
        Frequency and its standard deviation (NaN nowhere; 0 outside), Hz. The field is unwrapped.
    phase_offset
        Phase at TE = 0, rad, in ``(-pi, pi]``.
    residual
        Root of the weighted mean square of the phase residual, rad: large where the model fails (vessels, edges, wrong wraps).
    weights
        ``(z, y, x)``, of background removal and dipole inversion, any scale, 0 outside: 1 / SD under *one* noise for all voxels,
        less where the residual is more than `SUSPICIOUS` times what that noise leaves and more than `HARMLESS`. (A voxel's own
        residual has few degrees of freedom: 1 / SD from it alone would trust the voxels that fit by chance.)
    """

    field: ParameterMap
    field_sd: ParameterMap
    phase_offset: ParameterMap
    residual: ParameterMap
    weights: Tensor

    @property
    def maps(self) -> tuple[ParameterMap, ...]:
        """All four."""
        return self.field, self.field_sd, self.phase_offset, self.residual


def fit_field(
    images: Tensor,
    echo_times: Sequence[float],
    mask: Tensor,
    *,
    noise_std: float | None = None,
    unwrap: bool = True,
) -> FieldMaps:
    """``min sum_j |S_j|^2 |e^{i arg S_j} - e^{i (offset + 2 pi f TE_j)}|^2`` in every voxel.

    Start: the phase step between the echoes that are nearest in time, of all pairs that are equally near, unwrapped in space; each
    further echo is put within half a turn of what the echoes so far predict. Then Gauss-Newton on the complex residual, which needs no
    wraps. Two unknowns: its systems are solved in closed form. Voxels that stand out from their neighbours are fitted once more from
    the neighbours' median (`_agree_with_neighbours`).

    Parameters
    ----------
    images
        Complex ``(echo, z, y, x)``, any order. Never edited.
    echo_times
        s; two echoes or more, any spacing.
    mask
        bool ``(z, y, x)``: where to fit and to unwrap.
    noise_std
        SD of the noise of one real number, images' unit. ``None``: from each voxel's residual (two echoes leave none: the SD is
        then 1 / |S| up to a factor).
    unwrap
        ``False`` leaves the field within half a period of the shortest step.

    Notes
    -----
    Equally spaced echoes know the field only modulo one over the spacing: unwrapping settles it up to whole periods of each
    connected part, whose median is put within half a period of 0 (centre frequency).

    Raises
    ------
    DataError
        Real images, wrong axes, echo times that are missing, equal or not positive, an empty mask, no signal in it.

    References
    ----------
    Liu et al., Magn. Reson. Med. 69 (2013) 467, Eq. 5; Kressler et al., IEEE Trans. Med. Imaging 29 (2010) 273.
    """
    if not images.is_complex():
        raise DataError(
            "images must be complex", where="field map", got=str(images.dtype), expected="complex (echo, z, y, x)"
        )
    echoes = checked_echoes(images, echo_times, mask, where="field map", least=2)
    inside, times = echoes.mask, echoes.times
    data = echoes.images[:, inside]
    energy = data.abs().square().sum(0)
    if not float(energy.max()) > 0:
        raise DataError("no signal in the mask", where="field map")
    tiny = torch.finfo(energy.dtype).tiny
    weights = data.abs().square() / energy.clamp_min(tiny)
    t = torch.tensor(times, dtype=energy.dtype, device=data.device)
    step, apart, first = closest_step(data, times)
    turn = step.angle()
    if unwrap:
        turn = unwrap_phase(_spread(turn, inside), inside, quality=_spread(step.abs(), inside))[inside]
    field, offset = _temporal(data, weights, t, turn / apart, first)
    field, offset, residual = _gauss_newton(data, weights, t, field, offset)
    freedom = len(times) - 2
    noise = noise_std**2 if noise_std is not None else _noise_power(energy, weights, residual, freedom)
    if unwrap:
        _agree_with_neighbours(
            data, weights, t, (field, offset, residual), inside, TURN / apart, noise / energy.clamp_min(tiny)
        )

    column = t[:, None]
    spread = (weights * column * column).sum(0) - (weights * column).sum(0).square()
    squares = (weights * residual.square()).sum(0)
    if noise_std is not None:
        variance = noise_std**2 / energy.clamp_min(tiny)
    elif freedom > 0:
        variance = squares / freedom
    else:
        variance = 1 / energy.clamp_min(tiny)
    sd = (variance / spread.clamp_min(tiny)).sqrt()

    def full(name: str, values: Tensor, unit: str) -> ParameterMap:
        finite = torch.where(torch.isfinite(values), values, 0.0)
        return ParameterMap(name, _spread(finite, inside).float(), unit, inside)

    return FieldMaps(
        full("field", field / TURN, "Hz"),
        full("field_SD", sd / TURN, "Hz"),
        full("phase_offset", torch.polar(torch.ones_like(offset), offset).angle(), "rad"),
        full("phase_residual", squares.sqrt(), "rad"),
        _spread(_weights(energy, spread, squares, noise, freedom), inside).float(),
    )


def _noise_power(energy: Tensor, weights: Tensor, residual: Tensor, freedom: int) -> float:
    """Noise variance of one real number by the voxels' residuals, the median over them; 0 where nothing is left over."""
    return float(((weights * residual.square()).sum(0) * energy / freedom).median()) if freedom > 0 else 0.0


def _weights(energy: Tensor, spread: Tensor, squares: Tensor, noise: float, freedom: int) -> Tensor:
    weights = (energy * spread.clamp_min(0)).sqrt()
    if freedom < 1:
        return weights
    expected = SUSPICIOUS * (noise * freedom / energy.clamp_min(torch.finfo(energy.dtype).tiny)).sqrt()
    return weights / (squares.sqrt() / expected.clamp_min(HARMLESS)).clamp_min(1.0)


def correct_bipolar(
    images: Tensor,
    echo_times: Sequence[float],
    mask: Tensor,
    *,
    backwards: Sequence[bool] | None = None,
    turns: int = 0,
    readout_axis: int = -1,
) -> tuple[Tensor, float, float]:
    """Take the phase between forward and backward readouts out: ``theta(x) = a + b x`` on the echoes of one direction.

    Two echoes of one direction, such as the first and the third, give the field's phase, unwrapped in space; what one of the
    other direction, best between them, deviates from the straight line through them is ``theta`` modulo a turn. The ramp is found by
    the peak of ``|sum w exp(i (theta - b x))|``, which knows no wraps, and polished by weighted least squares. The field's whole
    turns between the two echoes go into ``a``: it is right when the centre frequency is within half a period of their distance, or
    ``turns`` periods away from that.

    Parameters
    ----------
    images
        Complex ``(echo, z, y, x)``, three echoes or more; those read backwards already turned round.
    mask
        bool ``(z, y, x)``.
    backwards
        Which echoes were read backwards, in the given order; ``None``: every second in order of time.
    turns
        Whole turns more between the two echoes. With equal spacing it makes no difference to the field but its own whole turns.
    readout_axis
        Of one image.

    Returns
    -------
    images, a, b
        New images in the given order; rad, and rad over the whole readout.

    Raises
    ------
    DataError
        As `fit_field`; fewer than three echoes, or all of one direction.

    References
    ----------
    Li et al., Magn. Reson. Med. 73 (2015) 1543 (linear phase between bipolar echoes); Lu et al., ibid. 60 (2008) 198.
    """
    if not images.is_complex():
        raise DataError("images must be complex", where="bipolar correction", got=str(images.dtype))
    echoes = checked_echoes(images, echo_times, mask, where="bipolar correction", least=3)
    inside, times = echoes.mask, echoes.times
    order = sorted(range(len(times)), key=echo_times.__getitem__)
    reverse = [k % 2 == 1 if backwards is None else bool(backwards[i]) for k, i in enumerate(order)]
    one, other, two = _one_between_two(times, reverse)
    first, middle, last = echoes.images[one], echoes.images[other], echoes.images[two]
    between = last * first.conj()
    phase = unwrap_phase(between.angle(), inside, quality=between.abs()) + TURN * turns
    share = (times[other] - times[one]) / (times[two] - times[one])
    deviation = middle * first.conj() * torch.polar(torch.ones_like(phase), -share * phase)
    n = images.shape[1:][readout_axis]
    shape = [1, 1, 1]
    shape[readout_axis] = n
    position = (
        ((torch.arange(n, device=images.device, dtype=phase.dtype) - n // 2) / n).reshape(shape).expand(images.shape[1:])
    )
    x, signal = position[inside], deviation[inside]
    slope = _ramp(signal, x)
    turned = signal * torch.polar(torch.ones_like(x), -slope * x)
    constant = float(turned.sum().angle())
    weight = signal.abs()
    rest = (turned * torch.polar(torch.ones_like(x), torch.full_like(x, -constant))).angle()
    centre = (weight * x).sum() / weight.sum()
    more = float((weight * (x - centre) * rest).sum() / (weight * (x - centre).square()).sum().clamp_min(1e-30))
    constant += float((weight * rest).sum() / weight.sum()) - more * float(centre)
    slope += more
    correction = torch.polar(torch.ones_like(position), -(constant + slope * position))
    corrected = images.clone()
    for k, i in enumerate(order):
        if reverse[k] == reverse[other]:
            corrected[i] *= correction
    return corrected, constant, slope


def _one_between_two(times: Sequence[float], reverse: Sequence[bool]) -> tuple[int, int, int]:
    """An echo between two of the other direction, as near in time as there are; else one before or after two."""
    choices = []
    for j in range(len(times)):
        others = sorted((i for i in range(len(times)) if reverse[i] != reverse[j]), key=lambda i: abs(i - j))
        before, after = [i for i in others if i < j][:1], [i for i in others if i > j][:1]
        pair = [*before, *after] if before and after else sorted(others[:2])
        if len(pair) == 2:
            choices.append((pair[0], j, pair[1]))
    if not choices:
        raise DataError("all echoes are read in one direction", where="bipolar correction", expected="both directions")

    def quality(choice: tuple[int, int, int]) -> tuple[bool, int]:
        extent = max(times[i] for i in choice) - min(times[i] for i in choice)
        # in tenths of a millisecond: of those that differ by rounding alone the earliest
        return not choice[0] < choice[1] < choice[2], round(1e4 * extent)

    return min(choices, key=quality)


def _ramp(signal: Tensor, x: Tensor) -> float:
    """Slope in rad per unit of ``x`` with the largest coherent sum."""
    candidates = torch.arange(-MOST_CYCLES, MOST_CYCLES + 1e-9, 1 / SEARCH_PER_CYCLE, dtype=x.dtype) * TURN
    # voxels share few positions: add them up first
    levels, which = torch.unique(x, return_inverse=True)
    sums = torch.zeros(len(levels), dtype=signal.dtype, device=signal.device).index_add_(0, which, signal)
    angles = -candidates.to(x.device)[:, None] * levels
    coherent = (torch.polar(torch.ones_like(angles), angles) * sums).sum(1).abs()
    return float(candidates[int(coherent.argmax())])


def _spread(values: Tensor, inside: Tensor) -> Tensor:
    out = torch.zeros(inside.shape, dtype=values.dtype, device=values.device)
    out[inside] = values
    return out


def _temporal(data: Tensor, weights: Tensor, t: Tensor, field: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Weighted straight line through the phases, each echo unwrapped to what those before predict; rad/s and rad."""
    n = len(t)
    order = [first, first + 1, *range(first + 2, n), *range(first - 1, -1, -1)]
    offset = data[first].angle() - field * t[first]
    total = mean_t = mean_p = torch.zeros_like(field)
    s_tt = s_tp = torch.zeros_like(field)
    for count, j in enumerate(order):
        predicted = offset + field * t[j]
        phase = predicted + (data[j] * torch.polar(torch.ones_like(predicted), -predicted)).angle()
        w = weights[j]
        new_total = (total + w).clamp_min(torch.finfo(w.dtype).tiny)
        dt, dp = t[j] - mean_t, phase - mean_p
        mean_t, mean_p = mean_t + w / new_total * dt, mean_p + w / new_total * dp
        s_tt, s_tp = s_tt + w * dt * (t[j] - mean_t), s_tp + w * dt * (phase - mean_p)
        total = new_total
        if count > 1:  # until then the start, which may stand on more pairs of echoes, is the better one
            field = torch.where(s_tt > 0, s_tp / s_tt.clamp_min(torch.finfo(w.dtype).tiny), field)
            offset = mean_p - field * mean_t
    return field, offset


def _agree_with_neighbours(
    data: Tensor,
    weights: Tensor,
    t: Tensor,
    fitted: tuple[Tensor, Tensor, Tensor],
    inside: Tensor,
    period: float,
    variance: Tensor,
) -> None:
    """Fit voxels that stand out from their neighbours once more, from the median of these; what fits as well but for chance stays.

    Noise in the start can put a single voxel a whole period off, which the echoes cannot tell where they are equally spaced, or into a
    neighbouring minimum; sphere means of background removal spread such a voxel over the brain.

    Parameters
    ----------
    fitted
        Field (rad/s), offset (rad) and phase residual ``(echo, voxel)`` of the voxels of ``inside``; edited in place.
    period
        Of the field, rad/s: what the shortest step cannot tell.
    variance
        Of the phase of a whole voxel, rad^2.
    """
    field, offset, residual = fitted
    for _ in range(MOST_PASSES):
        odd, median = _outstanding(field, inside, STANDS_OUT * period)
        if not len(odd):
            break
        chosen, share = data[:, odd], weights[:, odd]
        angles = -median * t[:, None]
        start = (share * chosen * torch.polar(torch.ones_like(angles), angles)).sum(0).angle()
        new_field, new_offset, new_residual = _gauss_newton(chosen, share, t, median, start)
        old, new = ((share * r.square()).sum(0) for r in (residual[:, odd], new_residual))
        nearer = (new_field - median).abs() < (field[odd] - median).abs() - STANDS_OUT * period
        own = old / max(1, len(t) - 2)  # motion, aliasing, several species: more than the noise
        chance = torch.maximum(variance[odd], own)
        better = nearer & (new <= AS_GOOD * old + BY_CHANCE * chance)
        kept = odd[better]
        if not len(kept):
            break
        field[kept], offset[kept], residual[:, kept] = new_field[better], new_offset[better], new_residual[:, better]


def _outstanding(field: Tensor, inside: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Voxels, as numbers among those of the mask, that differ by more than ``least`` from the median of their up to 26 neighbours in
    it, and that median."""
    full = torch.full(inside.shape, math.nan, dtype=field.dtype, device=field.device)
    full[inside] = field
    suspect = torch.zeros_like(inside)
    for axis in range(3):
        n = inside.shape[axis]
        steep = full.diff(dim=axis).abs() > least  # False beside the mask
        suspect.narrow(axis, 0, n - 1).logical_or_(steep)
        suspect.narrow(axis, 1, n - 1).logical_or_(steep)
    around = torch.tensor([d for d in product((-1, 0, 1), repeat=3) if any(d)], device=field.device)
    padded = functional.pad(full[None, None], (1,) * 6, value=math.nan)[0, 0]
    places, median = suspect.nonzero(), full[suspect]
    for part in torch.arange(len(median), device=field.device).split(VOXELS_AT_ONCE):
        z, y, x = (places[part][:, None] + around + 1).unbind(-1)
        values = padded[z, y, x]
        enough = torch.isfinite(values).sum(1) >= FEWEST_NEIGHBOURS
        median[part] = torch.where(enough, values.nanmedian(dim=1).values, median[part])
    far = (full[suspect] - median).abs() > least
    numbers = (inside.flatten().cumsum(0) - 1).reshape(inside.shape)
    return numbers[suspect][far], median[far]


def _gauss_newton(data: Tensor, weights: Tensor, t: Tensor, field: Tensor, offset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both parameters, and the phase residual ``(echo, voxel)``."""
    times = t[:, None]
    sum_t = (weights * times).sum(0)
    spread = ((weights * times * times).sum(0) - sum_t.square()).clamp_min(torch.finfo(field.dtype).tiny)
    for _ in range(MAX_STEPS):
        residual = _residual(data, times, field, offset)
        pull = weights * residual.sin()
        mean, slope = pull.sum(0), (pull * times).sum(0)
        more = (slope - sum_t * mean) / spread
        field, offset = field + more, offset + mean - more * sum_t
        if float(more.abs().max()) * float(t[-1]) < TOLERANCE:
            break
    return field, offset, _residual(data, times, field, offset)


def _residual(data: Tensor, times: Tensor, field: Tensor, offset: Tensor) -> Tensor:
    predicted = offset + field * times
    return (data * torch.polar(torch.ones_like(predicted), -predicted)).angle()
