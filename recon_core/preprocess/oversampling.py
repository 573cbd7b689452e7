"""From the encoded grid to the grid that the console expects: phase oversampling away, pixels interpolated."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recon_core.errors import DataError
from recon_core.fourier import fft_centred, ifft_centred, resize_centred

Tensor = torch.Tensor

AXES = {"z": -3, "y": -2, "x": -1}


def to_recon_matrix(
    image: Tensor,
    matrix: Sequence[int],
    fov: Sequence[float],
    recon_matrix: Sequence[int],
    recon_fov: Sequence[float],
) -> Tensor:
    """Resample images from the encoded to the reconstructed matrix.

    Along each axis the image is first Fourier interpolated (zero-filled or cropped in centred k-space) to the reconstructed
    pixel size, ``n = round(recon_matrix * fov / recon_fov)`` pixels over the encoded field of view, and then cropped (or
    padded) about ``n // 2``. In this order the interpolation sees the periodic image that was measured, and no ringing
    enters from cropped edges. Pixel values are kept: a constant image stays that constant.

    Parameters
    ----------
    image
        complex64 or float32 ``(..., z, y, x)``; magnitudes stay real.
    matrix, recon_matrix
        ``(z, y, x)``.
    fov, recon_fov
        ``(z, y, x)`` in m.

    Returns
    -------
    The same dtype, ``(..., *recon_matrix)``; ``image`` itself where nothing is to be done.

    Raises
    ------
    DataError
        ``matrix`` is not the image's, a size is not positive, or partitions are asked of a 2D image.
    """
    for name, given in (("matrix", matrix), ("fov", fov), ("recon_matrix", recon_matrix), ("recon_fov", recon_fov)):
        if len(given) != 3 or not all(math.isfinite(v) and v > 0 for v in given):
            raise DataError("not a positive (z, y, x)", where=name, got=tuple(given), remedy="Check the header's encoding")
    if image.ndim < 3 or tuple(image.shape[-3:]) != tuple(matrix):
        raise DataError("image is not on the encoded grid", got=tuple(image.shape), expected=f"(..., {tuple(matrix)})")
    if matrix[0] == 1 and recon_matrix[0] != 1:
        raise DataError("a 2D image has one partition", where="recon_matrix", got=tuple(recon_matrix), expected="(1, y, x)")

    out = image
    for i, axis in enumerate(AXES.values()):
        if matrix[i] == 1 and recon_matrix[i] == 1:
            continue  # a 2D slice: its two thicknesses may differ in the header, and there is nothing to resample
        n = max(1, round(recon_matrix[i] * fov[i] / recon_fov[i]))
        out = resize_centred(_interpolate(out, axis, n), axis, recon_matrix[i])
    return out.contiguous()


def _interpolate(image: Tensor, axis: int, n: int) -> Tensor:
    old = int(image.shape[axis])
    if n == old:
        return image
    # orthonormal transforms of different lengths: values scale with 1 / sqrt(length)
    out = ifft_centred(resize_centred(fft_centred(image, axis), axis, n), axis) * math.sqrt(n / old)
    return out if image.is_complex() else out.real
