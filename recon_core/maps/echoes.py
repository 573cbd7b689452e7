"""What every map from several echoes needs first: images and echo times that fit, in the order of time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from recon_core.errors import DataError
from recon_core.maps.field_checks import checked_mask

Tensor = torch.Tensor

ALIKE = 0.05
"""Part by which distances of echoes differ that are meant to be equal: rounding, and the raster of gradients."""

ENOUGH = 6
"""Echoes; of a longer train no more signal is asked for in all: its late echoes may be nothing but noise."""


@dataclass(frozen=True)
class Echoes:
    """``images`` ``(echo, z, y, x)`` and ``times`` in s, ascending; ``mask`` bool ``(z, y, x)``."""

    images: Tensor
    times: tuple[float, ...]
    mask: Tensor


def checked_echoes(images: Tensor, times: Sequence[float], mask: Tensor | None, *, where: str, least: int) -> Echoes:
    """Sort by echo time, and refuse what cannot be fitted.

    Raises
    ------
    DataError
        Wrong axes, another count of times than of images, fewer than ``least``, a time that is not above zero or occurs twice,
        values that are not finite.
    """
    if images.ndim != 4 or 0 in images.shape or not (images.is_complex() or images.is_floating_point()):
        raise DataError("images have the wrong axes", where=where, got=tuple(images.shape), expected="(echo, z, y, x)")
    if len(times) != images.shape[0]:
        raise DataError(
            "count of echo times and of images differ",
            where=where,
            got=f"{len(times)} times, {images.shape[0]} images",
            remedy="Check the echo times in the header.",
        )
    if wrong := [t for t in times if not (math.isfinite(t) and t > 0)]:
        raise DataError("not an echo time", where=where, got=wrong[0], expected="finite and above zero, in s")
    if len(set(times)) < len(times):
        raise DataError("an echo time occurs twice", where=where, remedy="Average repeated echoes first.")
    if len(times) < least:
        raise DataError("too few echoes", where=where, got=len(times), expected=f"at least {least}")
    if not bool(torch.isfinite(images).all()):
        raise DataError("images are not finite", where=where)
    inside = torch.ones(images.shape[1:], dtype=torch.bool, device=images.device)
    if mask is not None:
        inside = checked_mask(mask, images.shape[1:], where)
    order = sorted(range(len(times)), key=times.__getitem__)
    ordered = images if order == list(range(len(times))) else images[order]
    return Echoes(ordered, tuple(float(times[i]) for i in order), inside)


def closest_echoes(times: Sequence[float]) -> int:
    """Position of the first of two echoes that are nearest in time, of equally near ones (`ALIKE`) the earliest: there is most signal.

    (By the last digit of their differences alone, it would be any pair of a long train, even one that has long decayed.)
    """
    gaps = [after - before for before, after in pairwise(times)]
    return next(i for i, gap in enumerate(gaps) if gap <= (1 + ALIKE) * min(gaps))


def least_rms(least: float, n_echoes: int) -> float:
    """RMS of a voxel's echoes, noise included, that holds as much signal as `ENOUGH` echoes of RMS ``least``, or all if they are fewer.

    In units of the noise of a real number, which alone has the square 2. An RMS over all echoes falls with every late one that is
    added: R2* of 80 1/s at SNR 10 was lost in 99 % of the voxels of 25 echoes and in none of six.
    """
    signal = least**2 - 2
    return math.sqrt(2 + signal * ENOUGH / n_echoes) if signal > 0 and n_echoes > ENOUGH else least
