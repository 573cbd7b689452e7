"""Symmetric systems of a few unknowns, one for each pixel, by unrolled elimination.

A matrix is *packed*: a list (or the first axis of a tensor) of its lower triangle by rows, ``(0,0) (1,0) (1,1) (2,0) ...``, each
entry one contiguous array over the pixels. Every operation runs over all pixels at once, and a pixel's result does not depend on
the other pixels: batched library routines need many times longer for matrices of 3 x 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Tensor = torch.Tensor


def at(i: int, j: int) -> int:
    """Position of entry ``(i, j)`` in a packed symmetric matrix."""
    i, j = max(i, j), min(i, j)
    return i * (i + 1) // 2 + j


def cholesky(matrix: Sequence[Tensor], n: int, floors: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Packed lower factor ``L`` of a symmetric matrix of ``n`` rows; its diagonal holds the *inverse* pivots.

    The inverse is 0 where a pivot does not exceed its floor: ``floors[j]``, or, by default, what is lost in rounding. Then the
    matrix is singular or indefinite there, and `substitute` leaves that unknown at 0.
    """
    factor = list(matrix)
    for j in range(n):
        pivot = matrix[at(j, j)]
        least = pivot * (4 * torch.finfo(pivot.dtype).eps) if floors is None else floors[j]
        for k in range(j):
            pivot = pivot - factor[at(j, k)].square()
        inverse = torch.where(pivot > least, pivot.clamp_min(0).rsqrt(), 0.0)
        factor[at(j, j)] = inverse
        for i in range(j + 1, n):
            entry = matrix[at(i, j)]
            for k in range(j):
                entry = entry - factor[at(i, k)] * factor[at(j, k)]
            factor[at(i, j)] = entry * inverse
    return factor


def substitute(factor: Sequence[Tensor], right: Sequence[Tensor]) -> list[Tensor]:
    """``(L L^T)^-1 b`` with the factor of `cholesky`."""
    n, x = len(right), list(right)
    for i in range(n):
        for k in range(i):
            x[i] = x[i] - factor[at(i, k)] * x[k]
        x[i] = x[i] * factor[at(i, i)]
    for i in reversed(range(n)):
        for k in range(i + 1, n):
            x[i] = x[i] - factor[at(k, i)] * x[k]
        x[i] = x[i] * factor[at(i, i)]
    return x


def quadratic(packed: Sequence[Tensor] | Tensor, x: Sequence[Tensor] | Tensor) -> Tensor:
    """``x^T M x``, ``(*pixels)``."""
    total = torch.zeros_like(x[0])
    for i in range(len(x)):
        for j in range(i + 1):
            total = total + packed[at(i, j)] * x[i] * x[j] * (1 if i == j else 2)
    return total
