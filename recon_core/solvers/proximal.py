"""Accelerated proximal gradient (FISTA with restart)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from recon_core.batches import batch
from recon_core.errors import NumericalError

Tensor = torch.Tensor

BLOCK = 1 << 20
"""Elements of the differences that exist at a time, where only their inner products are asked for."""


@dataclass(frozen=True)
class ProximalResult:
    """``change`` is ``|x_n - x_(n-1)| / |x_n|`` at the last step; ``restarts`` how often the momentum was dropped."""

    solution: Tensor
    iterations: int
    change: float
    converged: bool
    restarts: int


def proximal_gradient(
    gradient: Callable[[Tensor], Tensor],
    prox: Callable[[Tensor, int], Tensor],
    initial: Tensor,
    *,
    step: float,
    max_iterations: int,
    tolerance: float = 0.0,
    min_iterations: int = 0,
    on_iteration: Callable[[int], None] | None = None,
) -> ProximalResult:
    """FISTA with adaptive restart for ``min f(x) + g(x)``.

    ``z = y - step grad f(y)``, ``x = prox(z, n)``, ``y = x + (t - 1) / t' (x - x_old)``. When the last step points against
    the momentum, ``Re <y - x, x - x_old> > 0``, the momentum is dropped (gradient scheme of O'Donoghue & Candes).

    Parameters
    ----------
    gradient
        ``grad f``, Lipschitz with a constant of at most ``1 / step``; gives a new array, which is edited.
    prox
        ``prox(z, iteration)`` of ``step * g``; sees the iteration's number (from 0) so that block grids may move. May edit ``z``.
    initial
        First guess; never edited.
    tolerance
        Stop when the relative change falls below it, after ``min_iterations`` (of a continuation) at the earliest; 0 runs all
        iterations.

    Raises
    ------
    NumericalError
        The iterates are not finite any more.

    References
    ----------
    Beck & Teboulle, SIAM J. Imaging Sci. 2 (2009) 183, eqs 4.1-4.3; O'Donoghue & Candes, Found. Comput. Math. 15 (2015) 715,
    section 3.2.
    """
    x = y = initial
    t, change, restarts, done = 1.0, math.inf, 0, 0
    for iteration in range(max_iterations):
        # three arrays of the unknowns' size are held: x, y, and what becomes z and then the new x
        new = prox(gradient(y).mul_(-step).add_(y), iteration)
        against, moved = _against_and_moved(y, new, x)
        size = _norm(new)
        if not math.isfinite(size):
            raise NumericalError("not finite", where="proximal gradient", got=f"iteration {iteration + 1}")
        change = moved / size if size > 0 else 0.0
        restarts += against
        t_new = 1.0 if against else (1 + math.sqrt(1 + 4 * t * t)) / 2
        # without momentum y is the new x; the first step is such a one, so that what was given is never edited
        y = new if against or t == 1 else x.sub_(new).mul_((1 - t) / t_new).add_(new)
        t = t_new
        x, done = new, iteration + 1
        if on_iteration is not None:
            on_iteration(done)
        if change <= tolerance and done >= min_iterations:
            break
    return ProximalResult(x, done, change, change <= tolerance, restarts)


def _against_and_moved(y: Tensor, new: Tensor, x: Tensor) -> tuple[bool, float]:
    """Whether ``Re <y - new, new - x> > 0``, and ``|new - x|``; a block at a time."""
    inner, square = 0.0, 0.0
    for parts in zip(*(_reals(a).split(batch(BLOCK)) for a in (y, new, x)), strict=True):
        moved = parts[1] - parts[2]
        inner += float(torch.dot(parts[0] - parts[1], moved))
        square += _norm(moved) ** 2
    return inner > 0, math.sqrt(square)


def _reals(a: Tensor) -> Tensor:
    return (torch.view_as_real(a) if a.is_complex() else a).reshape(-1)


def _norm(a: Tensor) -> float:
    # the norm of the complex type takes hypot of every element: 14 ms instead of 0.3 for 9 x 192^2
    return float(torch.linalg.vector_norm(torch.view_as_real(a) if a.is_complex() else a))
