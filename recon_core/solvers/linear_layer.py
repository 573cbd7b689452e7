"""The linear subproblem of PINQI as a differentiable layer: regularised least squares by CG, its gradient by one more CG.

The solution ``x*`` of ``H x = b`` with ``H = A^H A + sum_i lambda_i`` and ``b = A^H k + sum_i lambda_i x_i`` is *not* differentiated
through the steps of the solver. Whatever an input changes, it changes through the residual at the solution,

    r = A^H k - A^H A x* + sum_i lambda_i (x_i - x*),        dx* = H^-1 dr,

so the backward pass is ``g = H^-1 dL/dx*`` (Eq. 16, the same CG) followed by the ordinary chain rule for ``r`` with ``x*`` held
fixed, which is Eq. 17 and 18: ``lambda_i g`` for ``x_i``, ``Re <x_i - x*, g>`` for ``lambda_i``, ``A g`` for ``k``, and for coil maps
whatever the operator says about the gradient of ``normal``. Any operator, any number of terms and any broadcasting of the lambdas
are thereby covered by one function, and no step of the iteration is kept in memory.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from recon_core.errors import DataError, NumericalError, SettingError
from recon_core.operators.linear import LinearOperator
from recon_core.solvers.cg import CGResult, conjugate_gradient

Tensor = torch.Tensor
Regulariser = tuple[Tensor | float, Tensor]
"""``(lambda_i, x_i)``; ``lambda_i`` is real, not negative and broadcasts to ``x_i``."""

WHERE = "linear layer"
KNOWN_BY_RECURSION = 16.0
"""Machine epsilons: CG's recursion falls below that where the residual itself no longer does, which has to be computed to be known."""


class UntrustedGradient(UserWarning):
    """A gradient came from a solution, or from a backward solve, that did not reach its tolerance."""


@dataclass(frozen=True)
class LinearSettings:
    """When CG ends, forwards and backwards.

    Attributes
    ----------
    tolerance
        Of the residual, relative to the norm of the right-hand side of each sample: multiplying data and images by any factor
        changes neither the steps nor the relative error. (The authors' code stops at an absolute 1e-4 of images that peak near 1.)
        The error of ``x*`` is at most ``tolerance |b| / smallest lambda``; single precision cannot do better than some 1e-6, and what asks
        for more is reported as not converged.
    max_iterations
        Steps of CG.
    backward_tolerance, backward_max_iterations
        The same for the gradient; ``None``: as forwards. The relative error of a gradient is of the order of both
        tolerances (Pedregosa 2016).
    n_batch_axes
        How many leading axes of the images number independent systems: 1 for ``(batch, state, x, y)``; with `CartesianSense`
        1 makes each state a system of its own and 0 the whole slice one.
    """

    tolerance: float = 1e-5
    max_iterations: int = 100
    backward_tolerance: float | None = None
    backward_max_iterations: int | None = None
    n_batch_axes: int = 1

    def __post_init__(self) -> None:
        counts = (self.max_iterations, self.backward_max_iterations or 1)
        tolerances = (self.tolerance, self.backward_tolerance or self.tolerance)
        if min(counts) < 1 or not all(0 < t < 1 for t in tolerances) or self.n_batch_axes < 0:
            raise SettingError("out of range", where=WHERE, got=self, expected="at least one step, tolerances in (0, 1)")


@dataclass
class LinearReport:
    """How well each system was solved; the ``gradient_`` fields are ``None`` until a backward pass has run.

    Attributes
    ----------
    iterations, residual, converged
        Of the solution, per sample: steps, ``|b - H x| / |b|`` (by CG's recursion, as long as that is known to hold), and whether that is
        within tolerance.
    gradient_iterations, gradient_residual, gradient_converged
        Of the last backward pass.
    """

    iterations: Tensor
    residual: Tensor
    converged: Tensor
    gradient_iterations: Tensor | None = None
    gradient_residual: Tensor | None = None
    gradient_converged: Tensor | None = None

    @property
    def all_converged(self) -> bool:
        """Whether every sample's solution is within tolerance."""
        return bool(self.converged.all())

    @property
    def gradient_trusted(self) -> Tensor | None:
        """Per sample: the gradient was solved for within tolerance, at a solution within tolerance; ``None`` before backward."""
        return None if self.gradient_converged is None else self.converged & self.gradient_converged


def solve_linear(
    operator: LinearOperator,
    rhs: Tensor,
    regularisers: Sequence[Regulariser] = (),
    *,
    initial: Tensor | None = None,
    settings: LinearSettings | None = None,
) -> tuple[Tensor, LinearReport]:
    """``argmin_x |A x - k|^2 + sum_i lambda_i |x - x_i|^2``, differentiable in everything on the right.

    Parameters
    ----------
    operator
        ``A``. If its ``normal`` is differentiable in tensors that it holds (`BatchedSense`: coil maps), they get their gradient. An
        attribute ``requires_grad = False`` promises that there are none and saves one ``normal``.
    rhs
        ``A^H k``, in the operator's image layout, e.g. ``operator.adjoint(operator.enter_data(kspace))``: made once for all
        iterations of an unrolled network. Through it gradients go on to ``k`` and to the coil maps in ``A^H``.
    regularisers
        Pairs ``(lambda_i, x_i)``: a number or a real tensor that broadcasts to the image (scalar, ``(batch, 1, 1, 1)``, a map
        per pixel), and an image of the shape of ``rhs``. With none, or with weights of zero, ``H`` may be singular: then the solution
        is the one nearest to ``initial``, and a gradient means little.
    initial
        First guess (zero if ``None``); no gradient, as the solution does not depend on it. With few iterations and no
        regulariser this is early-stopped CG, and the report says that it has not converged.
    settings
        Tolerances and numbers of steps.

    Returns
    -------
    x, report
        The solution, of the shape and dtype of ``rhs``, and how well every sample was solved.

    Warns
    -----
    UntrustedGradient
        In the backward pass, when it or the solution that it belongs to did not reach the tolerance. The gradient is still
        returned; ``report.gradient_trusted`` says for which samples it is good.

    Raises
    ------
    DataError
        Shapes or kinds of numbers that do not fit.
    SettingError
        A weight that is negative or not finite.
    NumericalError
        Values that are not finite. (A gradient that is not finite is passed on as NaN, with the warning.)

    References
    ----------
    PINQI, Eq. (12) and (15)-(18). The authors' code stops CG for the whole batch at once and gives no gradient to ``k``.
    """
    settings = settings or LinearSettings()
    if initial is not None and (initial.shape != rhs.shape or initial.dtype != rhs.dtype):
        raise DataError(
            "the first guess does not fit",
            where=WHERE,
            got=f"{tuple(initial.shape)} {initial.dtype}",
            expected=tuple(rhs.shape),
        )
    terms = [_checked(weight, image, rhs) for weight, image in regularisers]
    with torch.no_grad():
        diagonal = sum((weight for weight, _ in terms), start=rhs.new_zeros((), dtype=rhs.real.dtype))
        right = rhs.resolve_conj()
        for weight, image in terms:
            right = right + weight * image
        hessian = _hessian(operator, diagonal)
        found = _solved(hessian, right, initial, settings.tolerance, settings.max_iterations, settings.n_batch_axes)
    if not bool(torch.isfinite(found.residual).all()):
        raise NumericalError("not finite", where=WHERE, got="values in the data or images that are not finite or overflow")
    report = LinearReport(found.iterations, found.residual, found.converged)
    if not torch.is_grad_enabled():
        return found.solution, report
    residual = _residual(operator, rhs, terms, found.solution)
    if not residual.requires_grad:
        return found.solution, report
    return _Attached.apply(residual, found.solution, hessian, settings, report), report


def _checked(weight: Tensor | float, image: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    if image.shape != rhs.shape or image.is_complex() != rhs.is_complex():
        raise DataError(
            "a regularisation image does not fit",
            where=WHERE,
            got=f"{tuple(image.shape)} {image.dtype}",
            expected=f"{tuple(rhs.shape)} {rhs.dtype}",
        )
    weight = torch.as_tensor(weight, device=rhs.device)
    if (
        weight.is_complex()
        or weight.ndim > rhs.ndim
        or any(w not in (1, n) for w, n in zip(weight.shape[::-1], rhs.shape[::-1], strict=False))
    ):
        raise DataError(
            "a weight does not fit",
            where=WHERE,
            got=f"{tuple(weight.shape)} {weight.dtype}",
            expected=f"real, to broadcast to {tuple(rhs.shape)}",
        )
    lowest = float(weight.detach().min())
    if not (lowest >= 0 and math.isfinite(float(weight.detach().max()))):
        raise SettingError("a weight is negative or not finite", where=WHERE, got=lowest)
    return weight.to(rhs.real.dtype), image


def _hessian(operator: LinearOperator, diagonal: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.addcmul(operator.normal(x), x, diagonal.to(x.dtype))


def _solved(
    hessian: Callable[[Tensor], Tensor],
    right: Tensor,
    initial: Tensor | None,
    tolerance: float,
    steps: int,
    n_batch_axes: int,
) -> CGResult:
    """CG, with a residual that is true for any tolerance."""
    found = conjugate_gradient(
        hessian, right, initial=initial, max_iterations=steps, tolerance=tolerance, n_batch_axes=n_batch_axes
    )
    if tolerance >= KNOWN_BY_RECURSION * torch.finfo(right.dtype).eps:
        return found
    left, size = (t.flatten(n_batch_axes).norm(dim=-1) for t in (right - hessian(found.solution), right))
    residual = left / size.clamp_min(torch.finfo(size.dtype).tiny)  # NaN stays
    return CGResult(found.solution, residual, found.iterations, found.converged & (residual <= tolerance))


def _residual(operator: LinearOperator, rhs: Tensor, terms: Sequence[tuple[Tensor, Tensor]], solution: Tensor) -> Tensor:
    """What depends on the inputs, with ``x*`` held fixed; only its graph is of interest, so terms without one are left out."""
    residual = torch.zeros_like(solution)
    if rhs.requires_grad:
        residual = residual + rhs
    for weight, image in terms:
        if weight.requires_grad or image.requires_grad:
            residual = residual + weight * (image - solution)
    if getattr(operator, "requires_grad", True):
        residual = residual - operator.normal(solution)
    return residual


class _Attached(torch.autograd.Function):
    """The solution, tied to the residual that determines it: ``dx* = H^-1 dr``."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        solution: Tensor,
        hessian: Callable[[Tensor], Tensor],
        settings: LinearSettings,
        report: LinearReport,
    ) -> Tensor:
        ctx.hessian, ctx.settings, ctx.report = hessian, settings, report
        return solution.view_as(solution)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        settings, report = ctx.settings, ctx.report
        finite = torch.isfinite(gradient).flatten(settings.n_batch_axes).all(-1)
        whole = finite.reshape(*finite.shape, *(1,) * (gradient.ndim - finite.ndim))
        found = _solved(
            ctx.hessian,
            torch.where(whole, gradient, 0).resolve_conj(),
            None,
            settings.backward_tolerance or settings.tolerance,
            settings.backward_max_iterations or settings.max_iterations,
            settings.n_batch_axes,
        )
        report.gradient_iterations, report.gradient_converged = found.iterations, found.converged & finite
        report.gradient_residual = torch.where(finite, found.residual, torch.nan)
        if not bool(report.gradient_trusted.all()):
            warnings.warn(_doubt(report), UntrustedGradient, stacklevel=2)
        # what came in broken goes out broken: a zero would look like an answer
        return torch.where(whole, found.solution, torch.nan), None, None, None, None


def _doubt(report: LinearReport) -> str:
    assert report.gradient_residual is not None and report.gradient_trusted is not None
    return (
        f"{WHERE}: gradient of {int((~report.gradient_trusted).sum())} of {report.converged.numel()} samples is not to be trusted: "
        f"largest relative residual {float(report.residual.max()):.1e} forwards, "
        f"{float(report.gradient_residual.max()):.1e} backwards. Allow more iterations, or raise the weights"
    )
