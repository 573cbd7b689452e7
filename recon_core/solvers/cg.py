"""Conjugate gradients for many Hermitian positive semi-definite systems at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from recon_core.errors import NumericalError

Tensor = torch.Tensor


@dataclass(frozen=True)
class CGResult:
    """``solution`` and, for every system of the batch, how well it was reached.

    ``residual`` is ``|b - N x| / |b|`` by CG's own recursion, ``iterations`` how many steps were done until it fell below the
    tolerance, both with the batch's shape.
    """

    solution: Tensor
    residual: Tensor
    iterations: Tensor
    converged: Tensor

    @property
    def all_converged(self) -> bool:
        return bool(self.converged.all())


def conjugate_gradient(
    normal: Callable[[Tensor], Tensor],
    rhs: Tensor,
    *,
    initial: Tensor | None = None,
    max_iterations: int = 30,
    tolerance: float = 1e-4,
    n_batch_axes: int = 1,
    on_iteration: Callable[[int], None] | None = None,
) -> CGResult:
    """Solve ``normal(x) = rhs`` for each element of the leading ``n_batch_axes``.

    Every system has its own step lengths and stops on its own: one that reached ``|r| <= tolerance |rhs|`` is left as it is,
    so an easy system is never disturbed by a hard one and a system's answer does not depend on its neighbours. Inner
    products are real (``Re <a, b>``), hence nothing is lost for Hermitian operators and rounding leaves no imaginary drift.

    Parameters
    ----------
    normal
        Hermitian positive semi-definite, same shape in and out, block-diagonal over the batch axes.
    rhs
        real or complex ``(*batch, ...)``; never edited.
    initial
        First guess, zero if ``None``.
    max_iterations, tolerance
        Stop after so many steps, or when all systems are below the relative residual.
    n_batch_axes
        0 for one coupled system.
    on_iteration
        Called after every step with its number, from 1.

    Raises
    ------
    NumericalError
        A value is not finite, or the operator is not positive semi-definite.

    References
    ----------
    Hestenes & Stiefel, J. Res. NBS 49 (1952) 409, algorithm (3:1).
    """
    axes = tuple(range(n_batch_axes, rhs.ndim))
    x = torch.zeros_like(rhs) if initial is None else initial.clone()
    r = rhs.clone() if initial is None else rhs - normal(x)
    p = r.clone()
    target = _inner(rhs, rhs, axes)
    rr = _inner(r, r, axes)
    goal = tolerance**2 * target
    active = rr > goal
    steps = torch.zeros_like(rr, dtype=torch.int64)
    for iteration in range(1, max_iterations + 1):
        if not bool(active.any()):
            break
        q = normal(p)
        curvature = _inner(p, q, axes)
        if not bool(torch.isfinite(curvature).all()):
            raise NumericalError("not finite", where="conjugate gradients", got=f"iteration {iteration}")
        if bool((active & (curvature < 0)).any()):
            raise NumericalError("operator is not positive semi-definite", where="conjugate gradients")
        # a direction without curvature lies in the null space: that system cannot improve
        active = active & (curvature > 0)
        alpha = torch.where(active, rr / curvature, torch.zeros_like(rr))
        x = x + alpha * p
        r = r - alpha * q
        new = _inner(r, r, axes)
        steps += active
        beta = torch.where(active, new / rr, torch.zeros_like(rr))
        p = r + beta * p
        rr = torch.where(active, new, rr)
        active = active & (rr > goal)
        if on_iteration is not None:
            on_iteration(iteration)
    safe = torch.where(target > 0, target, torch.ones_like(target))
    batch = rhs.shape[:n_batch_axes]
    return CGResult(x, (rr / safe).sqrt().reshape(batch), steps.reshape(batch), (rr <= goal).reshape(batch))


def _inner(a: Tensor, b: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``Re <a, b>`` over ``axes``, kept as singletons."""
    if a.is_complex():
        pair = torch.view_as_real(a) * torch.view_as_real(b)
        return pair.sum(dim=(*axes, a.ndim)).reshape(*a.shape[: axes[0]], *(1,) * len(axes)) if axes else pair.sum(-1)
    return (a * b).sum(dim=axes, keepdim=True) if axes else a * b
