"""Centred, orthonormal Fourier transforms: DC and the image centre sit at ``n // 2``, the adjoint equals the inverse."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from recon_core.errors import DataError

Tensor = torch.Tensor


def fft_centred(x: Tensor, axes: int | Sequence[int]) -> Tensor:
    """Image to k-space.

    ``X[k] = n**-0.5 * sum_j x[j] exp(-2 pi i (j - n//2) (k - n//2) / n)`` along every axis named.

    Parameters
    ----------
    x
        Any shape; real input becomes complex of the same precision.
    axes
        One axis or several, usually counted from the end.

    Raises
    ------
    DataError
        An axis is named twice or does not exist.
    """
    dims = _dims(x, axes)
    return torch.fft.fftshift(torch.fft.fftn(torch.fft.ifftshift(x, dim=dims), dim=dims, norm="ortho"), dim=dims)


def ifft_centred(x: Tensor, axes: int | Sequence[int]) -> Tensor:
    """K-space to image: inverse and adjoint of :func:`fft_centred`."""
    dims = _dims(x, axes)
    return torch.fft.fftshift(torch.fft.ifftn(torch.fft.ifftshift(x, dim=dims), dim=dims, norm="ortho"), dim=dims)


def centre_slice(n: int, n_kept: int) -> slice:
    """The ``n_kept`` samples about ``n // 2`` such that the centre lands on ``n_kept // 2``."""
    if not 0 < n_kept <= n:
        raise DataError("cannot crop about the centre", got=n_kept, expected=f"1 to {n} samples")
    first = n // 2 - n_kept // 2
    return slice(first, first + n_kept)


def resize_centred(x: Tensor, axis: int, n: int) -> Tensor:
    """Crop or zero-fill one axis to ``n`` samples so that the centre stays at ``n // 2``; ``x`` itself when it fits."""
    old = int(x.shape[axis])
    if n == old:
        return x
    if n < old:
        crop = centre_slice(old, n)
        return x.narrow(axis, crop.start, n)
    out = x.new_zeros([n if a == axis % x.ndim else s for a, s in enumerate(x.shape)])
    out.narrow(axis, centre_slice(n, old).start, old).copy_(x)
    return out


def _dims(x: Tensor, axes: int | Sequence[int]) -> tuple[int, ...]:
    named = (axes,) if isinstance(axes, int) else tuple(axes)
    if any(not -x.ndim <= a < x.ndim for a in named):
        raise DataError("no such axis", where="Fourier transform", got=named, expected=f"axes of {x.ndim} dimensions")
    dims = tuple(a % x.ndim for a in named)
    if len(set(dims)) != len(dims):
        raise DataError("an axis is named twice", where="Fourier transform", got=named)
    return dims
