"""Partial Fourier and asymmetric echo: the part of k-space that was not measured, from the phase of the part that was.

Works on reconstructed images (coil-combined or coil images) on the encoded grid. An image with a slowly varying phase is a
real image times that phase, and the k-space of a real image is conjugate symmetric. The phase comes from the band about the
centre that was measured on both sides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recon_core.errors import DataError
from recon_core.fourier import fft_centred, ifft_centred

Tensor = torch.Tensor
Extent = tuple[int, int]
Extents = tuple[Extent, Extent, Extent]
"""Along z, y and x."""

AXES = (-3, -2, -1)

ASYMMETRY = 0.05
"""Sides that differ by at most this part of the axis count as equal: regular undersampling may end a few lines early."""

EDGE = 0.5
"""Homodyne: part of the symmetric band over which the weight goes from 1 to 2 and to 0."""

FEWEST_BOTH_SIDES = 4
"""Half-width of the narrowest symmetric band from which a phase is taken, in samples."""


def measured_extent(mask: Tensor) -> tuple[Extent, Extent]:
    """First and one past the last sampled index along k2 and k1.

    Parameters
    ----------
    mask
        bool ``(k2, k1)`` or ``(state, k2, k1)``; states share one extent, that of their union.

    Raises
    ------
    DataError
        Nothing is sampled.
    """
    sampled = mask.reshape(-1, *mask.shape[-2:]).any(dim=0)
    if not bool(sampled.any()):
        raise DataError("nothing is sampled", where="partial Fourier")
    k2 = torch.nonzero(sampled.any(dim=1))[:, 0]
    k1 = torch.nonzero(sampled.any(dim=0))[:, 0]
    return (int(k2[0]), int(k2[-1]) + 1), (int(k1[0]), int(k1[-1]) + 1)


def is_partial(extent: Extent, n: int) -> bool:
    """Whether so much of one side of k-space was left out that zero filling loses resolution."""
    before, after = _sides(extent, n)
    return n > 1 and abs(before - after) > max(1.0, ASYMMETRY * n)


def has_phase(extent: Extent, n: int) -> bool:
    """Whether enough is measured on both sides of the centre for the phase that completes the rest."""
    return min(_sides(extent, n)) >= FEWEST_BOTH_SIDES


def partial_axes(extents: Sequence[Extent], shape: Sequence[int]) -> tuple[int, ...]:
    """Axes (-3 for z, -2 for y, -1 for x) that are partial, the one with most missing first."""
    missing = {}
    for axis, extent in zip(AXES, extents, strict=True):
        n = int(shape[axis])
        if is_partial(extent, n):
            before, after = _sides(extent, n)
            missing[axis] = abs(before - after) / n
    return tuple(sorted(missing, key=lambda axis: -missing[axis]))


def complete(image: Tensor, extents: Sequence[Extent], method: str = "pocs") -> Tensor:
    """``zero_fill`` (nothing), ``homodyne`` or ``pocs`` by name; see there. ``image`` itself when no axis is partial."""
    if method == "zero_fill":
        return image
    if method == "homodyne":
        return homodyne(image, extents)
    if method == "pocs":
        return pocs(image, extents)
    raise DataError("no such method", where="partial Fourier", got=method, expected="zero_fill, homodyne or pocs")


def homodyne(image: Tensor, extents: Sequence[Extent]) -> Tensor:
    """Homodyne detection along the axis with most missing.

    ``Re(IFFT(w F image) * exp(-i phase)) * exp(i phase)`` with ``w = 2`` on the samples without a measured mirror, 1 in
    the symmetric band and linear in between, so that ``w(k) + w(-k) = 2``. Direct, but removes what phase the low-resolution
    estimate misses. Other partial axes stay zero-filled: the method is defined for one.

    Parameters
    ----------
    image
        complex64 ``(..., z, y, x)``, zero-filled reconstruction on the encoded grid.
    extents
        For z, y and x: first and one past the last measured index on a k-space axis of the image's length.

    Returns
    -------
    complex64 of the same shape with the image's own phase; ``image`` itself when no axis is partial.

    Raises
    ------
    DataError
        The measured part does not reach past the centre: no phase can be estimated.

    Source: Noll, Nishimura and Macovski, IEEE TMI 10:154 (1991).
    """
    axes = partial_axes(extents, image.shape)
    if not axes:
        return image
    axis = axes[0]
    n = int(image.shape[axis])
    extent = extents[axis]
    half = _half_band(extent, n)
    k = torch.arange(n, device=image.device) - n // 2
    before, after = _sides(extent, n)
    # flat at 1 about the centre: a linear phase shifts the symmetry centre of k-space, and a ramp across the whole band
    # would turn that shift into a wrong brightness
    edge = max(1.0, EDGE * half)
    ramp = 1.0 + torch.sgn(k) * ((k.abs() - (half + 1 - edge)) / edge).clamp(0.0, 1.0)
    if before > after:
        ramp = 2.0 - ramp
    longer = max(before, after)
    ramp = ramp * (k.abs() <= longer) * _inside(extent, n, image.device)
    phase = _phase(image, extents, (axis,))
    kspace = fft_centred(image, axis) * _along(ramp, axis, image.ndim)
    return (ifft_centred(kspace, axis) * phase.conj()).real * phase


def pocs(image: Tensor, extents: Sequence[Extent], n_iterations: int = 6) -> Tensor:
    """Projection onto convex sets along all partial axes together.

    Alternates between the images with the estimated phase, ``m -> Re(m exp(-i phase)) exp(i phase)``, and the images with
    the measured k-space; the last step is the second, so measured samples are kept exactly. Samples whose mirror would lie
    outside the measured extent as well stay zero.

    Parameters, returns and errors as in :func:`homodyne`.

    Source: Haacke, Lindskog and Lin, J Magn Reson 92:126 (1991).
    """
    axes = partial_axes(extents, image.shape)
    if not axes:
        return image
    if n_iterations < 1:
        raise DataError("at least one iteration", where="POCS", got=n_iterations)
    phase = _phase(image, extents, axes)
    measured = torch.ones((), device=image.device)
    wanted = torch.ones((), device=image.device)
    for axis in axes:
        n = int(image.shape[axis])
        extent = extents[axis]
        longer = max(_sides(extent, n))
        k = torch.arange(n, device=image.device) - n // 2
        measured = measured * _along(_inside(extent, n, image.device), axis, image.ndim)
        wanted = wanted * _along((k.abs() <= longer).float(), axis, image.ndim)
    kspace = fft_centred(image, axes)
    data = kspace * measured
    filled = wanted * (1.0 - measured)
    estimate = image
    for _ in range(n_iterations):
        real = (estimate * phase.conj()).real * phase
        estimate = ifft_centred(data + filled * fft_centred(real, axes), axes)
    return estimate


def _sides(extent: Extent, n: int) -> tuple[int, int]:
    """Measured samples before and after the centre. An even axis has one more before it: that one has no mirror at all."""
    start, stop = extent
    if not 0 <= start < stop <= n:
        raise DataError("extent outside the axis", where="partial Fourier", got=extent, expected=f"within 0 to {n}")
    return n // 2 - start, stop - 1 - n // 2


def _half_band(extent: Extent, n: int) -> int:
    half = min(_sides(extent, n))
    if not has_phase(extent, n):
        raise DataError(
            "too little measured on both sides of the centre for a phase estimate",
            where="partial Fourier",
            got=f"samples {extent[0]} to {extent[1]} of {n}",
            expected=f"at least {FEWEST_BOTH_SIDES} on both sides of {n // 2}",
            remedy="Was the scan cut? With partial_fourier = zero_fill it is reconstructed, blurred",
        )
    return half


def _inside(extent: Extent, n: int, device: torch.device) -> Tensor:
    inside = torch.zeros(n, device=device)
    inside[extent[0] : extent[1]] = 1.0
    return inside


def _along(values: Tensor, axis: int, ndim: int) -> Tensor:
    return values.reshape([-1 if a == axis % ndim else 1 for a in range(ndim)])


def _phase(image: Tensor, extents: Sequence[Extent], axes: Sequence[int]) -> Tensor:
    """``exp(i phase)`` of the low-resolution image. A Hann window: a hard edge would ring into the phase."""
    low = fft_centred(image, axes)
    for axis in axes:
        n = int(image.shape[axis])
        half = _half_band(extents[axis], n)
        k = (torch.arange(n, device=image.device) - n // 2).abs()
        window = torch.cos(0.5 * torch.pi * k / (half + 1)).square() * (k <= half)
        low = low * _along(window, axis, image.ndim)
    low = ifft_centred(low, axes)
    return torch.where(low == 0, torch.ones_like(low), torch.sgn(low))
