"""Do the echoes of a series belong to their times and to each other? Maps of those that do not look sound and are wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from scipy.ndimage import binary_closing, label, uniform_filter

from recon_core.errors import DataError
from recon_core.maps.echo_delay import echo_delay
from recon_core.maps.echoes import least_rms
from recon_core.maps.field import FieldMaps, correct_bipolar, fit_field
from recon_core.maps.saturation import strong_signal

Tensor = torch.Tensor

MOST_GROWTH = 1.1
"""Of the signal from the first to the last echo: signals decay, and noise or a short range of times hardly makes them grow."""

LEAST_POWER = 4.0
"""Power of the object over that of the noise below which nothing grows or decays."""

MIRRORED = -0.3
"""Correlation of what is asymmetric in two neighbouring echoes below which one of them is mirrored: 0.95 and more in simulated heads and in
one of spheres, however symmetric, and -0.6 to -0.95 where one is mirrored; noise takes both towards 0."""

MOST_RESIDUAL = 0.25
"""rad, of half the voxels: tissue leaves some hundredths, alternating readouts that nobody corrected 0.4 and more."""

TIMES_NOISE = 3.0
"""... and so many times what the noise leaves."""

LEAST_SIGNAL = 3.0
"""RMS of a voxel's echoes over the noise of a real number (which alone gives 1.4) below which its phases tell nothing; of more than
six echoes see `least_rms`."""

LEAST_AROUND = 2.4
"""... of which those that touch have so much on average are dim tissue or fluid, no void: noise alone has 1.4 (up to 2.4 where unfolding
makes it 1.7 times as loud), and over a voxel and its neighbours hardly scatters."""

LEAST_HOLE = 8
"""Voxels that hang together; fewer of them may be chance, and count little by their weights."""

WHOLE_TURNS = (0, 1, -1)
"""Periods that the centre frequency may be away from where `correct_bipolar` takes it to be; tried while the phases do not fit."""

REMEDY = "Check the echo times' order in the header, and the flag ACQ_IS_REVERSE of alternating readouts (or map_bipolar)"


@dataclass(frozen=True)
class AgreedField:
    """The field, of echoes whose alternating readouts are corrected, and what was done."""

    field: FieldMaps
    residual: float  # rad, median in the mask
    notes: tuple[str, ...]
    known: Tensor  # bool (z, y, x): the mask without what `known_field` leaves out


def check_decay(images: Tensor, echo_times: Sequence[float], noise_std: float | None, where: str) -> None:
    """Refuse a series whose signal grows with the echo time, as with times in the wrong order.

    A straight line through the logarithm of the object's RMS, noise taken off.

    Parameters
    ----------
    images
        ``(echo, z, y, x)``.
    echo_times
        s, one for each.
    noise_std
        SD of the noise of one real number; ``None`` where it is not known.

    Raises
    ------
    DataError
        It grows by more than `MOST_GROWTH`.
    """
    inside, floor = strong_signal(images), 2 * (noise_std or 0.0) ** 2
    if not bool(inside.any()):
        return  # all zero
    squares = torch.stack([image[inside].abs().double().square().mean() for image in images])
    if float(squares.mean()) < LEAST_POWER * floor:
        return  # nothing but noise
    squares = (squares - floor).clamp_min(1e-3 * float(squares.max()))
    t = torch.tensor(echo_times, dtype=torch.float64, device=images.device)
    from_mean = t - t.mean()
    slope = float((from_mean * squares.log() / 2).sum() / from_mean.square().sum())
    growth = math.exp(slope * float(t.max() - t.min()))
    if growth > MOST_GROWTH:
        raise DataError(
            "the signal grows with the echo time",
            where=where,
            got=f"{growth:.2f} times from {1e3 * float(t.min()):g} to {1e3 * float(t.max()):g} ms",
            expected="a decay",
            remedy="Check the order of the echo times in the header against the contrast counter",
        )


def check_direction(images: Tensor, echo_times: Sequence[float], backwards: Sequence[bool], where: str) -> None:
    """Refuse a series of which some echoes are mirrored along the readout: their samples run against the flag ``ACQ_IS_REVERSE``.

    What is asymmetric about the centre of the field of view, ``|S(x)| - |S(-x)|``, has the same sign in neighbouring echoes, and the
    opposite one where either is mirrored. One change of sign alone may be of the object (its brighter side decays faster), where there are
    more echoes than two and all of them were read alike.

    Parameters
    ----------
    images
        ``(echo, z, y, x)``; the readout is the last axis.
    echo_times
        s, one for each.
    backwards
        Which echoes were read backwards; empty where that is not known.

    Raises
    ------
    DataError
        The correlation of the asymmetric parts is below `MIRRORED`.
    """
    order = sorted(range(len(images)), key=echo_times.__getitem__)
    alike = {(i, j): _correlation(_asymmetry(images[i].abs()), _asymmetry(images[j].abs())) for i, j in pairwise(order)}
    wrong = [pair for pair, value in alike.items() if value < MIRRORED]
    if len(wrong) == 1 and len(images) > 2 and not (backwards and backwards[wrong[0][0]] != backwards[wrong[0][1]]):
        return
    for i, j in wrong:
        raise DataError(
            "echoes are mirrored along the readout",
            where=where,
            got=f"{1e3 * echo_times[j]:g} ms is brighter where {1e3 * echo_times[i]:g} ms is darker (correlation {alike[i, j]:.2f})",
            expected="the flag ACQ_IS_REVERSE on the readouts whose samples run backwards, and on no other",
            remedy="Correct the flag (readouts that were put in order already must not have it). If the object is like that (its brighter "
            "side decays faster), map_direction = tell makes the maps; maps = none sends the images alone",
        )


def _asymmetry(magnitude: Tensor) -> Tensor:
    """``m(x) - m(-x)`` about the pixel ``n // 2`` of the last axis."""
    return magnitude - magnitude.flip(-1).roll(1 - magnitude.shape[-1] % 2, -1)


def _correlation(one: Tensor, two: Tensor) -> float:
    a, b = one.double().flatten(), two.double().flatten()
    energy = float(a @ a) * float(b @ b)
    return float(a @ b) / math.sqrt(energy) if energy > 0 else 0.0


def agreed_field(
    images: Tensor,
    echo_times: Sequence[float],
    mask: Tensor,
    noise_std: float | None,
    *,
    backwards: Sequence[bool],
) -> AgreedField:
    """The field of echoes whose phases lie on a straight line, where need be after the correction of alternating readouts.

    Parameters
    ----------
    images, echo_times, mask, noise_std
        As in `fit_field`; the readout is the last axis.
    backwards
        Which echoes were read backwards; empty where that is not known. It is not guessed from the phases: a constant and a ramp
        on every second echo also make mirrored echoes and wrong echo times look better, and leave their maps wrong.

    Raises
    ------
    DataError
        As `fit_field`; phases that lie on no straight line (three echoes or more).
    """
    mixed = len(set(backwards)) == 2
    correctable = mixed and len(echo_times) >= 3
    notes: tuple[str, ...] = ()
    if mixed and not correctable:
        notes = ("alternating readouts need three echoes to be corrected: the field is off by a ramp",)
    corrected = images
    for turns in WHOLE_TURNS if correctable else (0,):
        if correctable:
            corrected, _, slope = correct_bipolar(images, echo_times, mask, backwards=backwards, turns=turns)
            notes = (f"alternating readouts: phase corrected by {slope:.2f} rad across the readout",)
        field = fit_field(corrected, echo_times, mask, noise_std=noise_std)
        residual, most = _residual(field, corrected, noise_std)
        if residual <= most:
            delay = echo_delay(corrected, echo_times, field)
            if delay is not None and delay.note:
                notes = (*notes, delay.note)
            return AgreedField(field, residual, notes, known_field(field, corrected, noise_std))
    raise DataError(
        "the phases of the echoes lie on no straight line: R2* may be wrong as well",
        where="field map",
        got=f"{residual:.2f} rad off (median)",
        expected=f"at most {most:.2f}",
        remedy=REMEDY,
    )


def known_field(field: FieldMaps, images: Tensor, noise_std: float | None) -> Tensor:
    """Where in the mask the echoes know a field: bool ``(z, y, x)``.

    Left out are places of `LEAST_HOLE` voxels or more (that touch) without signal, or whose phases lie on no straight line: the void
    around metal, air or blood, where the phase turns by more than a voxel or an echo can follow. Every background removal would spread
    their field over the rest. Dim fluid is no such place: few of its voxels are much above noise, but all of them together are.

    Parameters
    ----------
    field
        Of `fit_field`.
    images, noise_std
        What it was fitted to.
    """
    inside = field.residual.valid
    energy = images[:, inside].abs().square().sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    noise = noise_std or 0.0
    believed = (TIMES_NOISE * noise * (max(0, len(images) - 2) / energy).sqrt()).clamp_min(MOST_RESIDUAL)
    everywhere = torch.zeros(inside.shape, dtype=energy.dtype, device=inside.device)
    everywhere[inside] = energy / len(images)
    lost = _void(everywhere, inside, noise, len(images))
    lost[inside] |= field.residual.data[inside] > believed
    touching = np.ones((3, 3, 3), bool)
    parts, n = label(lost.cpu().numpy(), touching)
    large = np.bincount(parts.ravel(), minlength=n + 1) >= LEAST_HOLE
    large[0] = False
    # a voxel in between fits by chance
    holes = binary_closing(np.pad(large[parts], 1), touching)[1:-1, 1:-1, 1:-1]
    return inside & ~torch.from_numpy(holes).to(inside.device)


def _void(power: Tensor, inside: Tensor, noise: float, n_echoes: int) -> Tensor:
    """Voxels ``(z, y, x)`` inside whose ``power``, mean over the echoes, is no more than noise, by itself and with those that touch it."""
    faint, alone = (least_rms(LEAST_SIGNAL, n_echoes) * noise) ** 2, (LEAST_AROUND * noise) ** 2
    low = inside & (power < faint)
    part, sums = (uniform_filter(v.double().cpu().numpy(), 3, mode="constant") for v in (low, power * low))
    return low & torch.from_numpy(np.asarray(sums < alone * part)).to(low.device)


def _residual(field: FieldMaps, images: Tensor, noise_std: float | None) -> tuple[float, float]:
    """Median phase residual in the mask and the most that is believed, rad; two echoes leave none."""
    inside = field.residual.valid
    left = float(field.residual.data[inside].median())
    freedom = len(images) - 2
    energy = images[:, inside].abs().square().sum(0).clamp_min(torch.finfo(torch.float32).tiny)
    by_noise = 0.0 if noise_std is None else noise_std * float((freedom / energy).sqrt().median())
    return left, max(MOST_RESIDUAL, TIMES_NOISE * by_noise)
