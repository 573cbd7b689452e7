"""The nonlinear subproblem of PINQI as a differentiable layer: a fit per pixel, its gradient by one small system per pixel.

Forwards ``p* = argmin F(p)``, ``F(p) = sum_i |q_i(p) - y_i|^2 + sum_j lambda_j (p_j - p_reg_j)^2`` (Eq. 13, 14). Backwards, with
``H = Re J^H J + lambda + sum_i Re conj(q_i - y_i) d^2q_i/dp^2``, half the *exact* Hessian of ``F`` at ``p*``, and
``g = H^-1 dL/dp*`` (Eq. 9; the paper's Fig. 3 finds ``g`` by CG over the whole batch):

    dL/dy = J g,    dL/dp_reg = lambda g,    dL/dlambda = (p_reg - p*) g.

Bounds: `levenberg_marquardt` keeps them by projection, so that at a solution the free parameters satisfy ``dF/dp = 0`` in the
caller's variables, which is what Eq. 9 presupposes. With the published tanh (``solver="lbfgs"``) that holds too, but its slope
vanishes near a bound and pixels that come close do not return.

A parameter that ended on its bound does not move for small changes of the input: its gradient is zero, and the others of its
pixel have the gradient of the problem without it. Where ``H`` is not positive definite (a saddle, no signal) Eq. 9 does not hold:
the pixel's gradient is zero, and it is counted. Of this, and of pixels that did not converge, the backward pass warns.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from recon_core.errors import DataError, SettingError
from recon_core.signal_models import SignalModel
from recon_core.solvers.lbfgs import LBFGSSettings, lbfgs
from recon_core.solvers.least_squares import levenberg_marquardt
from recon_core.solvers.linear_layer import UntrustedGradient
from recon_core.solvers.normal_equations import normal_equations, packed_curvature
from recon_core.solvers.small_systems import at, cholesky, quadratic, substitute

Tensor = torch.Tensor
Bounds = tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]
"""Lower and upper, one number per parameter; infinite where open."""

WHERE = "nonlinear layer"
DOUBT = (
    f"{WHERE}: the gradient of some pixels is not to be trusted: their fit did not converge, or their Hessian is singular and "
    "they got none; the report counts them. Allow more iterations, or raise the weights"
)
"""One text for all counts, so that a training shows it once."""
SOLVERS = ("lm", "lbfgs")
LBFGS_TOLERANCE = (
    1e-3  # of the signal: sums over all pixels in single precision see no further; the default leaves half of them "open"
)
NEAR_BOUND = 1e-2  # part of the range: a tanh creeps towards a bound and never arrives


@dataclass(frozen=True)
class NonlinearSettings:
    """Which solver, when it ends, and how ill a system may be.

    Attributes
    ----------
    solver
        ``"lm"``: Levenberg-Marquardt, every pixel on its own. ``"lbfgs"``: as published, see `lbfgs`.
    max_iterations, tolerance
        Of Levenberg-Marquardt, per pixel; the tolerance also decides which pixels of L-BFGS are called converged: a Newton step
        would change the predicted signal by less than ``tolerance`` times the signal.
    least_pivot
        A pixel has no gradient where elimination of its Hessian leaves of a diagonal entry less than this part of Gauss-Newton's:
        the gradient would be ``1 / least_pivot`` times that of a well-posed pixel. (The authors clip gradients at 1e6.)
    lbfgs
        Settings of the published solver.
    """

    solver: str = "lm"
    max_iterations: int = 50
    tolerance: float = 1e-5
    least_pivot: float = 1e-5
    lbfgs: LBFGSSettings = field(default_factory=LBFGSSettings)

    @classmethod
    def of(cls, solver: str) -> NonlinearSettings:
        """A solver with the tolerance that it can keep in single precision."""
        return cls(solver, tolerance=LBFGS_TOLERANCE) if solver == "lbfgs" else cls(solver)

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            raise SettingError("no such solver", where=WHERE, got=self.solver, expected=f"one of {', '.join(SOLVERS)}")
        if self.max_iterations < 1 or not 0 < self.tolerance < 1 or not 0 < self.least_pivot < 1:
            raise SettingError("out of range", where=WHERE, got=self, expected="at least one step, the others in (0, 1)")


@dataclass
class NonlinearReport:
    """How every pixel ended, ``(batch, *pixels)``.

    Attributes
    ----------
    iterations
        int32: Levenberg-Marquardt's steps, or L-BFGS's evaluations, which all pixels share.
    converged
        bool. Elsewhere the gradient belongs to a point that is not stationary.
    at_bound
        bool ``(batch, parameter, *pixels)``: on a bound and pushed outwards; no gradient.
    singular
        bool, ``None`` until a backward pass has run: the Hessian is not safely positive definite; no gradient in this pixel.
    """

    iterations: Tensor
    converged: Tensor
    at_bound: Tensor
    singular: Tensor | None = None

    @property
    def n_unconverged(self) -> int:
        """Pixels whose fit did not reach the tolerance."""
        return int((~self.converged).sum())

    @property
    def n_singular(self) -> int | None:
        """Pixels without a gradient; ``None`` before backward."""
        return None if self.singular is None else int(self.singular.sum())

    @property
    def gradient_trusted(self) -> Tensor | None:
        """Pixels, ``(batch, *pixels)``, where Eq. 9 holds for every parameter; ``None`` before backward."""
        return None if self.singular is None else self.converged & ~self.singular & ~self.at_bound.any(1)


def solve_nonlinear(
    model: SignalModel,
    data: Tensor,
    prior: Tensor,
    weight: Tensor | float,
    *,
    initial: Tensor | None = None,
    bounds: Bounds | None = None,
    settings: NonlinearSettings | None = None,
) -> tuple[Tensor, NonlinearReport]:
    """``argmin_p sum_i |q_i(p) - y_i|^2 + sum_j lambda_j (p_j - p_reg_j)^2`` in each pixel, differentiable in y, p_reg and lambda.

    Parameters
    ----------
    model
        Signal model; a complex amplitude is two real parameters.
    data
        ``y``, ``(batch, state, *pixels)``, complex or real as the model's signal.
    prior
        ``p_reg``, real ``(batch, parameter, *pixels)``.
    weight
        ``lambda >= 0``, a number or a real tensor that broadcasts to ``prior``: scalar, ``(batch, 1, 1, 1)``, one per parameter.
    initial
        Start, of the shape of ``prior``; ``prior`` if ``None``. No gradient: the minimiser does not depend on it (as long as it
        leads to the same minimum).
    bounds
        Box that the parameters are kept in.
    settings
        Solver and tolerances.

    Returns
    -------
    p, report
        Parameters ``(batch, parameter, *pixels)`` and how every pixel ended.

    Warns
    -----
    UntrustedGradient
        In the backward pass, when a pixel's fit did not converge or its Hessian is singular; the report says where. (A parameter on
        its bound is no reason: its gradient is zero, and that is right.)

    Raises
    ------
    DataError
        Shapes or kinds of numbers that do not fit; values that are not finite.
    SettingError
        Weights or bounds that make no sense.

    References
    ----------
    PINQI, Eq. (4)-(9), (13), (14) and Fig. 3. Deviations: the solver is per pixel; ``g`` is exact instead of from CG.
    """
    settings = settings or NonlinearSettings()
    n_parameters = len(model.parameter_names)
    expected = (*data.shape[:1], n_parameters, *data.shape[2:])
    start = prior if initial is None else initial
    for name, tensor in (("prior", prior), ("start", start)):
        if data.ndim < 2 or tuple(tensor.shape) != expected or tensor.dtype != data.real.dtype:
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise DataError(f"{name} does not fit the data", where=WHERE, got=got, expected=f"{expected} {data.real.dtype}")
    weight = torch.as_tensor(weight, device=data.device).to(prior.dtype)
    try:
        spread = weight.detach().expand(prior.shape)
    except RuntimeError:
        raise DataError(
            "a weight does not fit", where=WHERE, got=tuple(weight.shape), expected=f"to broadcast to {expected}"
        ) from None
    with torch.no_grad():
        problem = _Problem(model, _columns(data).resolve_conj(), _columns(prior), _columns(spread))
        solve = _levenberg_marquardt if settings.solver == "lm" else _lbfgs
        box = None if bounds is None else _box(bounds, prior, n_parameters)
        found, iterations, converged, held = solve(problem, _columns(start), box, settings)
    pixels = (data.shape[0], *data.shape[2:])
    report = NonlinearReport(iterations.reshape(pixels), converged.reshape(pixels), _images(held, prior))
    parameters = _images(found, prior)
    if torch.is_grad_enabled() and (data.requires_grad or prior.requires_grad or weight.requires_grad):
        return _Attached.apply(data, prior, weight, parameters, model, settings, report), report
    return parameters, report


def _box(bounds: Bounds, prior: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Lower and upper as ``(parameter, 1)``."""
    lower, upper = (torch.as_tensor(b, dtype=prior.dtype, device=prior.device) for b in bounds)
    if lower.shape != (n,) or upper.shape != (n,) or not bool((lower < upper).all()):
        raise SettingError("not a box", where=WHERE, got=bounds, expected=f"{n} lower bounds, and {n} upper ones above them")
    return lower[:, None], upper[:, None]


def _columns(t: Tensor) -> Tensor:
    """``(batch, axis, *pixels)`` to ``(axis, pixel)``."""
    return t.movedim(1, 0).flatten(1)


def _images(t: Tensor, like: Tensor) -> Tensor:
    """``(axis, pixel)`` back to ``(batch, axis, *pixels)``."""
    return t.reshape(t.shape[0], like.shape[0], *like.shape[2:]).movedim(0, 1)


class _Attached(torch.autograd.Function):
    """The solution, tied to what determines it by Eq. (9)."""

    @staticmethod
    def forward(
        ctx: Any,
        data: Tensor,
        prior: Tensor,
        weight: Tensor,
        parameters: Tensor,
        model: SignalModel,
        settings: NonlinearSettings,
        report: NonlinearReport,
    ) -> Tensor:
        ctx.save_for_backward(data, prior, weight, parameters)
        ctx.model, ctx.settings, ctx.report = model, settings, report
        return parameters.view_as(parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        data, prior, weight, parameters = ctx.saved_tensors
        problem = _Problem(ctx.model, _columns(data).resolve_conj(), _columns(prior), _columns(weight.expand(prior.shape)))
        p, held = _columns(parameters), _columns(ctx.report.at_bound)
        direction, jacobian, singular = problem.implicit(p, _columns(gradient), held, ctx.settings.least_pivot)
        ctx.report.singular = singular.reshape(ctx.report.converged.shape)
        if bool((ctx.report.singular | ~ctx.report.converged).any()):
            warnings.warn(DOUBT, UntrustedGradient, stacklevel=2)
        of_data = of_prior = of_weight = None
        if ctx.needs_input_grad[0]:
            of_data = _images((jacobian * direction).sum(1), data)
        if ctx.needs_input_grad[1]:
            of_prior = _images(problem.weight * direction, prior)
        if ctx.needs_input_grad[2]:
            of_weight = _images((problem.prior - p) * direction, prior).sum_to_size(weight.shape)
        return (of_data, of_prior, of_weight, *(None,) * 4)


@dataclass(frozen=True)
class _Problem:
    """``F`` of all pixels in one axis: ``data`` is ``(state, pixel)``, the others ``(parameter, pixel)``."""

    model: SignalModel
    data: Tensor
    prior: Tensor
    weight: Tensor

    def implicit(self, p: Tensor, right: Tensor, held: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
        """``H^-1 right`` over the parameters that are not held, ``dq/dp``, and where ``H`` is not safely positive definite."""
        linearised = self.model.signal_and_jacobian(p)
        _, _, gauss_newton = normal_equations(linearised, self.data, p, self.weight, self.prior, p.dtype)
        hessian = gauss_newton + packed_curvature(self.model, p, linearised[0] - self.data, p.dtype)
        direction, singular = _solve_free(hessian, gauss_newton, right, held, least)
        return direction, linearised[1], singular


def _solve_free(hessian: Tensor, scale: Tensor, right: Tensor, held: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """``H^-1 right`` with held unknowns at 0, ``(parameter, pixel)``; 0 and ``True`` in pixels with a pivot below its floor."""
    n = len(right)
    entries, floors = list(hessian.unbind(0)), []
    for i in range(n):
        diagonal = scale[at(i, i)]
        entries[at(i, i)] = torch.where(held[i], 1.0, entries[at(i, i)])
        floors.append(torch.where(held[i], 0.0, least * diagonal))
        for j in range(i):
            entries[at(i, j)] = torch.where(held[i] | held[j], 0.0, entries[at(i, j)])
    factor = cholesky(entries, n, floors)
    singular = torch.stack([~(factor[at(i, i)] > 0) for i in range(n)]).any(0)
    solution = torch.stack(substitute(factor, list(torch.where(held, 0.0, right).unbind(0))))
    return torch.where(singular, 0.0, solution), singular


def _levenberg_marquardt(
    problem: _Problem, initial: Tensor, box: tuple[Tensor, Tensor] | None, settings: NonlinearSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parameters, iterations, converged, at a bound."""
    lower, upper = box or (None, None)
    fit = levenberg_marquardt(
        problem.model,
        problem.data,
        initial,
        regularisation=problem.weight,
        reference=problem.prior,
        lower=lower,
        upper=upper,
        max_iterations=settings.max_iterations,
        tolerance=settings.tolerance,
        statistics=False,
    )
    return fit.parameters, fit.iterations, fit.converged, fit.at_bound


def _lbfgs(
    problem: _Problem, initial: Tensor, box: tuple[Tensor, Tensor] | None, settings: NonlinearSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same. A parameter near a bound is held if the objective still falls towards it by more than the tolerance."""
    p, n_evaluations = lbfgs(problem.model, problem.data, initial, problem.weight, problem.prior, box, settings.lbfgs)
    linearised = problem.model.signal_and_jacobian(p)
    _, gradient, hessian = normal_equations(linearised, problem.data, p, problem.weight, problem.prior, p.dtype)
    size = problem.data.abs().square().sum(0) + (problem.weight * problem.prior.square()).sum(0)
    small = settings.tolerance**2 * size
    held = torch.zeros_like(p, dtype=torch.bool)
    if box is not None:
        near = NEAR_BOUND * (box[1] - box[0])
        pushed = torch.where(gradient > 0, p - box[0] <= near, box[1] - p <= near)
        diagonal = torch.stack([hessian[at(i, i)] for i in range(len(p))])
        held = pushed & (gradient.square() > small * diagonal)
    step, singular = _solve_free(hessian, hessian, gradient, held, settings.least_pivot)
    converged = (quadratic(hessian, step) <= small) & ~singular
    return p, torch.full_like(converged, n_evaluations, dtype=torch.int32), converged, held
