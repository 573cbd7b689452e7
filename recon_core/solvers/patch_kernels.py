"""The collaborative filter's arithmetic, compiled for the CPU: a group of patches stays in the first cache from gathering to adding.

As tensor operations every step of `recon_core.solvers.collaborative` goes through memory, and its transforms are one matrix product of
all positions; here they are separable. Compiled by Numba at the first call (seconds), then read from a folder: beside this file if that
can be written, else in the user's cache (``NUMBA_CACHE_DIR`` chooses another).

Arrays of a group of K patches with P pixels and n channels (real and imaginary parts of Q = n / 2 states) are looked at as
(patch, pixel and channel), (pixel, patch and channel) or (channel, pixel and patch): what is mixed comes first, rows are long.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

HALF = np.float32(math.sqrt(0.5))


def _compiled(function: Any) -> Any:
    # sums in any order, but a value that is not finite stays one
    fast = {"reassoc", "contract", "arcp", "nsz"}
    options: dict[str, Any] = {"nogil": True, "fastmath": fast, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # no folder that can be written: every process compiles for itself
        return njit(**options)(function)


@_compiled
def _mix(matrix: Array, source: Array, target: Array) -> None:
    """``target = matrix @ source`` for a small matrix and long rows."""
    n, width = source.shape
    for row in range(matrix.shape[0]):
        first = matrix[row, 0]
        for x in range(width):
            target[row, x] = first * source[0, x]
        for column in range(1, n):
            factor = matrix[row, column]
            for x in range(width):
                target[row, x] += factor * source[column, x]


@_compiled
def _mix_pairs(matrix: Array, source: Array, target: Array) -> None:
    """The same for an even number of rows, two at a time: half the loads and stores of the target."""
    n, width = source.shape
    for row in range(n):
        for x in range(width):
            target[row, x] = 0
        for column in range(0, n, 2):
            one, two = matrix[row, column], matrix[row, column + 1]
            for x in range(width):
                target[row, x] += one * source[column, x] + two * source[column + 1, x]


@_compiled
def _haar(rows: Array, scratch: Array) -> None:
    """Haar transform along the rows' number, in place; coarse coefficients first."""
    length, width = rows.shape
    while length > 1:
        half = length // 2
        for k in range(half):
            for x in range(width):
                one, two = rows[2 * k, x], rows[2 * k + 1, x]
                scratch[k, x] = (one + two) * HALF
                scratch[half + k, x] = (one - two) * HALF
        for k in range(length):
            for x in range(width):
                rows[k, x] = scratch[k, x]
        length = half


@_compiled
def _inverse_haar(rows: Array, scratch: Array) -> None:
    n, width = rows.shape
    length = 2
    while length <= n:
        half = length // 2
        for k in range(half):
            for x in range(width):
                mean, difference = rows[k, x], rows[half + k, x]
                scratch[2 * k, x] = (mean + difference) * HALF
                scratch[2 * k + 1, x] = (mean - difference) * HALF
        for k in range(length):
            for x in range(width):
                rows[k, x] = scratch[k, x]
        length *= 2


@_compiled
def _gather(pixels: Array, corners: Array, side: int, patches: Array) -> None:
    """Patches ``(patch, pixel and channel)`` that begin at ``corners``; the image wraps around."""
    n_rows, n_columns, n = pixels.shape
    for k in range(len(corners)):
        top, left = corners[k] // n_columns, corners[k] % n_columns
        for i in range(side):
            row = (top + i) % n_rows
            if left + side <= n_columns:
                line = pixels[row, left : left + side].reshape(side * n)
                for x in range(side * n):
                    patches[k, i * side * n + x] = line[x]
            else:
                for j in range(side):
                    pixel = pixels[row, (left + j) % n_columns]
                    for m in range(n):
                        patches[k, (i * side + j) * n + m] = pixel[m]


@_compiled
def _gather_channels(pixels: Array, corners: Array, side: int, channels: Array) -> None:
    """The same as ``(channel, patch and pixel)``."""
    n_rows, n_columns, n = pixels.shape
    for k in range(len(corners)):
        top, left = corners[k] // n_columns, corners[k] % n_columns
        for i in range(side):
            row = (top + i) % n_rows
            for j in range(side):
                pixel = pixels[row, (left + j) % n_columns]
                for m in range(n):
                    channels[m, (k * side + i) * side + j] = pixel[m]


@_compiled
def _add(patches: Array, weight: float, corners: Array, side: int, total: Array, weights: Array) -> None:
    """Put patches back where `_gather` found them."""
    n_rows, n_columns, n = total.shape
    for k in range(len(corners)):
        top, left = corners[k] // n_columns, corners[k] % n_columns
        for i in range(side):
            row = (top + i) % n_rows
            for j in range(side):
                weights[row, (left + j) % n_columns] += weight
            if left + side <= n_columns:
                line = total[row, left : left + side].reshape(side * n)
                for x in range(side * n):
                    line[x] += patches[k, i * side * n + x]
            else:
                for j in range(side):
                    pixel = total[row, (left + j) % n_columns]
                    for m in range(n):
                        pixel[m] += patches[k, (i * side + j) * n + m]


@_compiled
def _exchange(source: Array, n: int, target: Array) -> None:
    """``(patch, pixel and channel)`` to ``(pixel, patch and channel)``, or back."""
    for i in range(target.shape[0]):
        for k in range(source.shape[0]):
            for m in range(n):
                target[i, k * n + m] = source[k, i * n + m]


@_compiled
def _threshold(channels: Array, level_squared: float) -> int:
    """Set coefficients whose square is not above the level to zero, in place; returns how many were kept.

    The mean of the last (strongest) component is always kept.
    """
    n_states = channels.shape[0] // 2
    strongest = channels[n_states - 1, 0], channels[2 * n_states - 1, 0]
    kept = np.float32(0)
    for q in range(n_states):
        real, imaginary = channels[q], channels[n_states + q]
        for x in range(channels.shape[1]):
            keep = np.float32(1) if real[x] * real[x] + imaginary[x] * imaginary[x] > level_squared else np.float32(0)
            kept += keep
            real[x] *= keep
            imaginary[x] *= keep
    if not strongest[0] * strongest[0] + strongest[1] * strongest[1] > level_squared:
        channels[n_states - 1, 0], channels[2 * n_states - 1, 0] = strongest
        kept += np.float32(1)
    return int(kept)


@_compiled
def _turn(vectors: Array, turn: Array) -> None:
    """``g @ vectors`` as a real matrix ``(component, channel)``, real parts before imaginary ones on both axes."""
    n_states = len(vectors)
    for c in range(n_states):
        for q in range(n_states):
            real, imaginary = vectors[q, c, 0], vectors[q, c, 1]
            turn[c, q] = turn[n_states + c, n_states + q] = real
            turn[c, n_states + q], turn[n_states + c, q] = -imaginary, imaginary


@_compiled
def grams(pixels: Array, corners: Array, side: int, products: Array) -> None:
    """Lower triangle of ``sum conj(g_q) g_r`` over each group's pixels.

    Parameters
    ----------
    pixels
        float32 ``(row, column, channel)``: real parts of all states, then imaginary ones.
    corners
        int32 ``(group, patch)``: number of the pixel where each patch begins.
    products
        float32 ``(group, state, state, 2)``: is filled, the last axis holding real and imaginary part.
    """
    n = pixels.shape[2]
    n_states, n_patches, n_pixels = n // 2, corners.shape[1], side * side
    channels = np.empty((n, n_patches * n_pixels), np.float32)
    for g in range(len(corners)):
        _gather_channels(pixels, corners[g], side, channels)
        for q in range(n_states):
            for r in range(q + 1):
                real, imaginary = np.float32(0), np.float32(0)
                for x in range(n_patches * n_pixels):
                    real += channels[q, x] * channels[r, x] + channels[n_states + q, x] * channels[n_states + r, x]
                    imaginary += channels[q, x] * channels[n_states + r, x] - channels[n_states + q, x] * channels[r, x]
                products[g, q, r, 0], products[g, q, r, 1] = real, imaginary


@_compiled
def filter_groups(
    pixels: Array, corners: Array, vectors: Array, cosine: Array, level: float, total: Array, weights: Array
) -> None:
    """Transform, threshold and put back all groups, weighted by the inverse number of coefficients kept.

    Parameters
    ----------
    pixels, corners
        As of `grams`.
    vectors
        float32 ``(group, state, component, 2)``: each group's orthonormal principal components, strongest last; real and imaginary part.
    cosine
        float32 ``(side, side)``: orthonormal cosine transform of one axis of a patch.
    level
        Of the threshold.
    total, weights
        float32, like ``pixels`` and ``(row, column)``: added to.
    """
    n_groups, n_patches = corners.shape
    n = pixels.shape[2]
    side = cosine.shape[0]
    n_pixels = side * side
    size = n * n_patches * n_pixels
    one, two = np.empty(size, np.float32), np.empty(size, np.float32)
    patches_1, patches_2 = one.reshape(n_patches, n_pixels * n), two.reshape(n_patches, n_pixels * n)
    planes_1, planes_2 = one.reshape(n_pixels, n_patches * n), two.reshape(n_pixels, n_patches * n)
    lines_1, lines_2 = one.reshape(side, side * n_patches * n), two.reshape(side, side * n_patches * n)
    together_2 = two.reshape(n_pixels * n_patches, n)
    channels_1, channels_2 = one.reshape(n, n_pixels * n_patches), two.reshape(n, n_pixels * n_patches)
    turn = np.empty((n, n), np.float32)
    level_squared = np.float32(level * level)
    for g in range(n_groups):
        _gather(pixels, corners[g], side, patches_1)
        _haar(patches_1, patches_2)
        _exchange(patches_1, n, planes_2)
        _mix(cosine, lines_2, lines_1)
        for i in range(side):
            _mix(cosine, planes_1[i * side : (i + 1) * side], planes_2[i * side : (i + 1) * side])
        for m in range(n):
            for x in range(n_pixels * n_patches):
                channels_1[m, x] = together_2[x, m]
        _turn(vectors[g], turn)
        _mix_pairs(turn, channels_1, channels_2)
        weight = np.float32(1) / np.float32(_threshold(channels_2, level_squared))
        _mix_pairs(turn.T, channels_2, channels_1)
        for m in range(n):
            for x in range(n_pixels * n_patches):
                together_2[x, m] = channels_1[m, x] * weight
        for i in range(side):
            _mix(cosine.T, planes_2[i * side : (i + 1) * side], planes_1[i * side : (i + 1) * side])
        _mix(cosine.T, lines_1, lines_2)
        _exchange(planes_2, n, patches_1)
        _inverse_haar(patches_1, patches_2)
        _add(patches_1, weight, corners[g], side, total, weights)
