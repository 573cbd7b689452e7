"""The brain in magnitude images: bright tissue, cut off from the scalp by an opening, its largest part, holes filled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage

from recon_core.errors import DataError
from recon_core.maps.field_checks import checked_mask
from recon_core.maps.finite_differences import relative_steps
from recon_core.maps.r2star import R2StarMaps
from recon_core.maps.spherical_mean import inner_distance
from recon_core.settings import setting

Tensor = torch.Tensor


SHADING_SIGMA = 0.012
"""m, of the smoothing that tells receive shading from anatomy: wider than the skull and most sulci."""

MOST_SHADING = 25.0
"""Brightest over darkest place that shading is taken out of; beyond, dark is air."""

UNEVEN = 1.8
"""Shading inside the head, 95th over 5th percentile, from which on it is taken out first: 1.2 to 1.5 in simulated heads without."""

EARLY_TRAIN = 0.010
"""s; a train that ends before shows bone, whose R2* is some 250 1/s, nearly as bright as brain."""

LATE_ENOUGH = 0.020
"""s, by which bone has gone. Three simulated heads of two echoes (2.0 and 5.4 ms): 1400 to 1900 voxels of bone in the mask, 140 to 260 with
echoes continued to here (0.3 % of the brain)."""

LEAST_SPACING = 0.0025
"""s, of the echoes that are foretold."""


@dataclass(frozen=True)
class BrainMaskSettings:
    """How a brain is told from scalp, skull and air."""

    opening: float = setting(0.006, "What is thinner than twice this is not brain", unit="m", low=0.0, high=0.02)
    closing: float = setting(0.004, "Clefts narrower than twice this belong to the brain", unit="m", low=0.0, high=0.02)
    threshold: float = setting(
        0.0, "Least magnitude, as a part of the 99.9th percentile; 0 chooses (Otsu)", low=0.0, high=1.0
    )
    min_volume: float = setting(5e-5, "A smaller part is not a brain", unit="m^3", low=0.0, high=0.01)


def brain_mask(magnitude: Tensor, voxel: Sequence[float], *, settings: BrainMaskSettings | None = None) -> Tensor:
    """Brain (or phantom) from magnitude images.

    Root mean square over the echoes, a threshold between its two classes (Otsu), erosion by ``opening``, the largest part that
    is left, grown back by as much within the bright tissue, then closed and filled. Where the head is unevenly bright
    (`UNEVEN`: a surface coil, an array without normalisation), the threshold is that of the image over its shading.

    Parameters
    ----------
    magnitude
        Real or complex ``(echo, z, y, x)`` or ``(z, y, x)``, any unit.
    voxel
        ``(z, y, x)`` in m.

    Returns
    -------
    Tensor
        bool ``(z, y, x)``.

    Raises
    ------
    DataError
        No brain is found; values are not finite; wrong axes.
    """
    s = settings or BrainMaskSettings()
    relative_steps(voxel)
    image = _combined(magnitude, "brain mask")
    values = image.cpu().numpy()
    top = float(np.quantile(values, 0.999))
    if not top > 0:
        raise _no_brain(0.0, s.min_volume, "the images are empty")
    bright, largest = _without_shading(values, top, voxel, s) if s.threshold == 0 else (None, None)
    if bright is None or largest is None:
        level = s.threshold * top if s.threshold > 0 else otsu(np.minimum(values, top))
        bright = torch.from_numpy(values > level)
        largest = _largest_core(bright, voxel, s.opening)
    if largest is None:
        raise _no_brain(0.0, s.min_volume, "nothing bright is thick enough")
    grown = _dilated(largest, voxel, s.opening + max(voxel) / 2)
    mask = _closed(grown & bright, voxel, s.closing)
    mask = torch.from_numpy(np.asarray(ndimage.binary_fill_holes(mask.numpy())))
    volume = int(mask.sum()) * math.prod(voxel)
    if volume < s.min_volume:
        raise _no_brain(volume, s.min_volume, "the largest bright part is too small")
    return mask.to(magnitude.device)


def with_later_echoes(images: Tensor, echo_times: Sequence[float], found: R2StarMaps) -> Tensor:
    """Magnitudes of a train that ends early, and those that its decay foretells up to `LATE_ENOUGH`: bone is dark in these.

    Parameters
    ----------
    images
        ``(echo, z, y, x)``, real or complex.
    echo_times
        s, two or more, in any order.
    found
        R2* and its standard deviation, of which twice is taken off: noise makes no brain dark. Where R2* is not valid the last echo goes
        on undiminished.

    Returns
    -------
    Tensor
        The images' magnitudes as they are where the last echo is not before `EARLY_TRAIN`.
    """
    first, last = min(echo_times), max(echo_times)
    if last >= EARLY_TRAIN:
        return images.abs()
    spacing = max((last - first) / (len(echo_times) - 1), LEAST_SPACING)
    least = found.r2star.data - 2 * found.r2star_sd.data
    step = torch.exp(-spacing * torch.where(found.r2star.valid, least, 0.0).clamp_min(0.0))
    train = [*images.abs()]
    latest = train[echo_times.index(last)]
    for _ in range(math.ceil((LATE_ENOUGH - last) / spacing)):
        latest = latest * step
        train.append(latest)
    return torch.stack(train)


def object_mask(magnitude: Tensor, *, fraction: float = 0.1) -> Tensor:
    """Everything with signal: root mean square over the echoes at least ``fraction`` of its 99.9th percentile; for phantoms and patches.

    Parameters and axes as `brain_mask`; parts need not hang together, holes stay.

    Raises
    ------
    DataError
        Nothing has signal; wrong axes; values are not finite.
    """
    image = _combined(magnitude, "object mask")
    top = float(np.quantile(image.cpu().numpy(), 0.999))
    if not top > 0:
        raise DataError("no signal", where="object mask", remedy="Check that the images show an object.")
    return image >= fraction * top


def given_mask(mask: Tensor, shape: Sequence[int], where: str = "given mask") -> Tensor:
    """A mask that somebody made, as bool.

    Parameters
    ----------
    mask
        ``(z, y, x)``: bool, or numbers that are 0 or 1.
    shape
        Of the images: the console's matrix.

    Raises
    ------
    DataError
        Another shape, other values (a probability is no mask), nothing inside.
    """
    if tuple(mask.shape) != tuple(shape):
        turned = " (z, y, x), not (x, y, z)" if tuple(mask.shape[::-1]) == tuple(shape) else " (z, y, x)"
        raise DataError(
            "mask and images do not fit",
            where=where,
            got=" x ".join(map(str, mask.shape)) or "a number",
            expected=" x ".join(map(str, shape)) + turned,
            remedy="It lies on the console's matrix, as the images that are sent",
        )
    if mask.dtype != torch.bool and (mask.is_complex() or not bool(((mask == 0) | (mask == 1)).all())):
        raise DataError("not a mask", where=where, got=f"values of {mask.dtype}", expected="bool, or 0 and 1")
    return checked_mask(mask, shape, where)


def _combined(magnitude: Tensor, where: str) -> Tensor:
    """Root mean square over the echoes, float32 ``(z, y, x)``."""
    if magnitude.ndim not in (3, 4) or 0 in magnitude.shape:
        raise DataError("wrong axes", where=where, got=tuple(magnitude.shape), expected="(echo, z, y, x) or (z, y, x)")
    image = magnitude.abs().float()
    if image.ndim == 4:
        image = image.square().mean(0).sqrt()
    if not bool(torch.isfinite(image).all()):
        raise DataError("magnitude is not finite", where=where)
    return image


def otsu(values: np.ndarray, bins: int = 256) -> float:
    """The threshold that separates the values into two classes with the least variance inside them.

    References
    ----------
    Otsu, IEEE Trans. Syst. Man Cybern. 9 (1979) 62, Eq. 18.
    """
    counts, edges = np.histogram(values, bins)
    middle = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    total, above = below[-1], below[-1] - below
    sums = np.cumsum(counts * middle)
    with np.errstate(invalid="ignore", divide="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2 / total**2
    return float(edges[1:][int(np.argmax(np.nan_to_num(between)))])


def _without_shading(
    values: np.ndarray, top: float, voxel: Sequence[float], settings: BrainMaskSettings
) -> tuple[Tensor | None, Tensor | None]:
    """Bright tissue of the image over its shading, and its largest core; ``None`` where the head is evenly bright.

    The shading is the smoothed image, each voxel weighted by its signal; of voxels that stand out from air in the logarithm, where
    shading does not matter. What the first smoothing left, where the image is steep, the second finds.
    """
    even = np.minimum(values, top)
    stands_out = even > math.exp(otsu(np.log(np.maximum(even, 1e-3 * top))))
    shading = np.ones_like(even)
    for _ in range(2):
        signal = even * stands_out
        shading *= _smooth(signal * even, voxel) / np.maximum(_smooth(signal, voxel), 1e-6 * float(signal.max()))
        shading = np.maximum(shading, shading.max() / MOST_SHADING)
        even = np.minimum(values, top) / shading
    bright = torch.from_numpy(even > otsu(even))
    core = _largest_core(bright, voxel, settings.opening)
    if core is None:
        return None, None
    low, high = np.quantile(shading[core.numpy()], (0.05, 0.95))
    return (bright, core) if high > UNEVEN * low else (None, None)


def _smooth(image: np.ndarray, voxel: Sequence[float]) -> np.ndarray:
    """Nearly Gaussian, SD `SHADING_SIGMA`, nothing outside: three running means."""
    widths = [2 * round(SHADING_SIGMA / side) + 1 for side in voxel]
    for _ in range(3):
        image = ndimage.uniform_filter(image, widths, mode="constant")
    return image


def _largest_core(bright: Tensor, voxel: Sequence[float], opening: float) -> Tensor | None:
    """The largest part of what is deeper in the bright tissue than ``opening``; ``None``: nothing is."""
    parts, n = ndimage.label((inner_distance(bright, voxel) > opening).numpy())
    if n == 0:
        return None
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return torch.from_numpy(parts == int(np.argmax(sizes)))


def _dilated(mask: Tensor, voxel: Sequence[float], radius: float) -> Tensor:
    distance = ndimage.distance_transform_edt(~mask.numpy(), sampling=tuple(voxel))
    return torch.from_numpy(np.asarray(distance <= radius))


def _closed(mask: Tensor, voxel: Sequence[float], radius: float) -> Tensor:
    if radius <= 0:
        return mask
    margin = [math.ceil(radius / side) + 1 for side in voxel]
    padded = torch.from_numpy(np.pad(mask.numpy(), [(m, m) for m in margin]))
    dilated = _dilated(padded, voxel, radius)
    closed = inner_distance(dilated, voxel) > radius
    crop = tuple(slice(m, m + n) for m, n in zip(margin, mask.shape, strict=True))
    return mask | closed[crop]


def _no_brain(volume: float, least: float, why: str) -> DataError:
    return DataError(
        "no brain found",
        where="brain mask",
        got=f"{volume * 1e6:.3g} ml: {why}",
        expected=f"at least {least * 1e6:.3g} ml of connected tissue",
        remedy="Check that the images show a head, or give a mask (map_mask_file).",
    )
