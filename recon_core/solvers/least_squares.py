"""Nonlinear least squares for every pixel at once: Levenberg-Marquardt with small closed-form systems."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recon_core.errors import DataError, SettingError
from recon_core.signal_models import SignalModel
from recon_core.solvers.normal_equations import normal_equations, packed_curvature, real_rows
from recon_core.solvers.small_systems import at, cholesky, quadratic, substitute

Tensor = torch.Tensor

CHUNK_CPU, CHUNK_DEVICE = (
    1 << 16,
    1 << 20,
)  # pixels at a time: fits a core's cache; fills a device without filling its memory
FIRST_DAMPING, LEAST_DAMPING, MOST_DAMPING = 1e-2, 1e-7, 1e8
PAD = 64  # pixels come in multiples: no remainder for scalar code, whose last bit differs from the vector code's
NEWTON_AFTER = 6  # steps; most pixels have arrived by then, and the rest have large residuals, where Gauss-Newton is slow
NEARLY_UNDAMPED = 0.1  # a step under more damping than this is short because it is damped, not because it has arrived
ROUNDING = 4.0  # a residual is known to this many machine epsilons of itself and of the signal


@dataclass(frozen=True)
class LeastSquaresFit:
    """The minimiser of every pixel, and how far it is to be believed.

    Attributes
    ----------
    parameters
        ``(parameter, *pixels)``, dtype of the data's real part, inside the bounds.
    residual
        ``sum_i |q_i(p) - y_i|^2``, ``(*pixels)``, without the regularisation.
    covariance
        ``(parameter, parameter, *pixels)``: of the estimator under noise in the data (see `levenberg_marquardt`). NaN where a
        parameter is at a bound or where there are no degrees of freedom to estimate the noise from; infinite or NaN where the
        data do not determine the parameters.
    converged
        bool ``(*pixels)``. A pixel whose steps ran out, or that diverged, is ``False``.
    at_bound
        bool ``(parameter, *pixels)``: the parameter ended on its bound and the objective pushes it outwards.
    iterations
        int32 ``(*pixels)``: steps tried.
    """

    parameters: Tensor
    residual: Tensor
    covariance: Tensor
    converged: Tensor
    at_bound: Tensor
    iterations: Tensor


@torch.no_grad()
def levenberg_marquardt(
    model: SignalModel,
    data: Tensor,
    initial: Tensor,
    *,
    regularisation: Tensor | float = 0.0,
    reference: Tensor | None = None,
    lower: Tensor | None = None,
    upper: Tensor | None = None,
    noise_std: float | None = None,
    max_iterations: int = 50,
    tolerance: float = 1e-5,
    system_dtype: torch.dtype | None = None,
    chunk: int | None = None,
    statistics: bool = True,
) -> LeastSquaresFit:
    """Minimise ``sum_i |q_i(p) - y_i|^2 + sum_j lambda_j (p_j - p_reg_j)^2`` in each pixel, ``lower <= p <= upper``.

    Each pixel has its own damping, its own acceptance of steps and its own end: its result does not depend on the pixels that
    happen to be in the same call. A finished pixel is left as it is; when half of a chunk has finished, the rest is gathered.

    Steps solve ``(H + mu D) d = -g`` with ``H = Re J^H J + lambda``, ``g = Re J^H (q - y) + lambda (p - p_reg)`` and
    ``D = diag H`` (Marquardt's scaling: no parameter's unit matters) by an unrolled Cholesky; ``mu`` follows Nielsen's rule.
    Pixels that have not arrived after a few steps have large residuals (a strong regulariser that contradicts the data), where
    Gauss-Newton creeps: they get the full Hessian, with the model's curvature, wherever that is positive definite.
    Bounds are kept by projection, not by a transformation of the parameters (whose gradient vanishes far out, so that a bad
    start never returns): a parameter on its bound that the gradient pushes outwards is held for the step, the others move
    freely, and the step is cut at the box. At a solution the free parameters therefore satisfy ``g = 0`` *exactly* in the
    caller's variables, as implicit differentiation wants it.

    A pixel has converged when a nearly undamped step changes the predicted signal by less than ``tolerance`` times the
    signal, ``d^T H d <= tolerance^2 (|y|^2 + sum lambda p_reg^2)``; the step is still taken.

    Parameters
    ----------
    model
        Signal model; defines ``parameter`` and ``state``.
    data
        ``y``, ``(state, *pixels)``, complex64 or float32 as the model's signal (complex128 or float64 work in double).
    initial
        Start, real ``(parameter, *pixels)``; put inside the bounds first.
    regularisation, reference
        ``lambda >= 0``, a number or a tensor that broadcasts to ``(parameter, *pixels)``, and ``p_reg``, of that shape
        (zero if ``None``). Units: ``data^2 / parameter^2``.
    lower, upper
        Broadcast to ``(parameter, *pixels)`` (say ``(parameter, 1)`` for pixels in one axis); infinite where open.
    noise_std
        Known SD of the noise of one real number: of a real sample, or of the real (and of the imaginary) part of a complex
        one. ``None``: estimated in each pixel from its residual, ``residual / (rows - parameters)``.
    max_iterations, tolerance
        End of the iteration, per pixel.
    system_dtype
        ``torch.float64`` sums and solves the small systems in double; ``None``: as the data.
    chunk
        Pixels at a time; ``None`` chooses by device. Does not change the result.
    statistics
        ``False`` skips the residual and the covariance (both NaN then), which cost as much as a step.

    Returns
    -------
    LeastSquaresFit
        Covariance: ``s^2 H^-1 (Re J^H J) H^-1`` with the noise variance ``s^2``; without regularisation ``s^2 (J^T J)^-1``.

    Raises
    ------
    DataError
        Shapes that do not fit, data or a start that is not finite, complex data for a real model or the reverse.
    SettingError
        A tolerance, a number of iterations, a weight or bounds that make no sense.

    Notes
    -----
    No gradient flows through it. At the solution ``dp* = -(d^2F/dp^2)^-1 (d^2F/dp da) da`` for any input ``a`` (PINQI Eq. 9), so
    a differentiable layer needs only this function's tensors, which are never edited, ``parameters``, ``at_bound`` (entries
    without a derivative) and ``d^2F/dp^2 / 2 = Re J^H J + lambda + model.curvature(p, q(p) - y)``.

    References
    ----------
    Marquardt, SIAM J. Appl. Math. 11 (1963) 431; Nielsen, IMM-REP-1999-05, Eq. (2.21); Bertsekas, SIAM J. Control Optim. 20
    (1982) 221 (held bounds). PINQI, Eq. (13) and (14); there by L-BFGS over the whole batch.
    """
    problem = _checked(model, data, initial, max_iterations, tolerance, chunk, noise_std)
    pixels = data.shape[1:]
    shape = (problem.n_parameters, *pixels)
    real = initial.to(problem.dtype)

    def spread(value: Tensor | float | None, default: float) -> Tensor:
        tensor = torch.as_tensor(default if value is None else value, dtype=problem.dtype, device=data.device)
        try:
            return tensor.expand(shape).reshape(problem.n_parameters, -1)
        except RuntimeError:
            raise DataError(
                "shapes do not fit", where="least squares", got=tuple(tensor.shape), expected=f"to broadcast to {shape}"
            ) from None

    weight = spread(regularisation, 0.0)
    inputs = _Inputs(
        data.reshape(data.shape[0], -1),
        weight,
        spread(reference, 0.0),
        spread(lower, -torch.inf),
        spread(upper, torch.inf),
    )
    if not bool(torch.isfinite(weight).all() & (weight >= 0).all() & torch.isfinite(inputs.reference).all()):
        raise SettingError("regularisation must be finite and not negative", where="least squares")
    if not bool((inputs.lower <= inputs.upper).all()):
        raise SettingError("a lower bound is above the upper one", where="least squares")
    start = real.reshape(problem.n_parameters, -1)
    largest = chunk or (CHUNK_CPU if data.device.type == "cpu" else CHUNK_DEVICE)
    settings = _Settings(max_iterations, tolerance, noise_std, system_dtype or problem.dtype, statistics)
    n = start.shape[1]
    parts = []
    for i in range(0, n, largest):
        index = _padded(torch.arange(i, min(i + largest, n), device=data.device))
        found = _solve(model, inputs.select(index), start[:, index], settings)
        parts.append([field[..., : min(largest, n - i)] for field in found])
    if not parts:
        parts.append(list(_solve(model, inputs, start, settings)))
    joined = [field[0] if len(parts) == 1 else torch.cat(field, dim=-1) for field in zip(*parts, strict=True)]
    p, residual, covariance, converged, at_bound, iterations = joined
    return LeastSquaresFit(
        p.reshape(shape),
        residual.reshape(pixels),
        covariance.reshape(problem.n_parameters, *shape),
        converged.reshape(pixels),
        at_bound.reshape(shape),
        iterations.reshape(pixels),
    )


@dataclass(frozen=True)
class _Problem:
    n_parameters: int
    dtype: torch.dtype


@dataclass(frozen=True)
class _Settings:
    max_iterations: int
    tolerance: float
    noise_std: float | None
    system_dtype: torch.dtype
    statistics: bool


@dataclass(frozen=True)
class _Inputs:
    """What stays fixed for a set of pixels; all ``(..., pixel)``."""

    data: Tensor
    weight: Tensor
    reference: Tensor
    lower: Tensor
    upper: Tensor

    def select(self, index: slice | Tensor) -> _Inputs:
        return _Inputs(*(t[:, index].contiguous() for t in (self.data, self.weight, self.reference, self.lower, self.upper)))


@dataclass
class _State:
    """Where the iteration stands; the normal equations belong to ``p``. Lists of ``(pixel,)`` keep every entry contiguous."""

    p: Tensor
    cost: Tensor
    gradient: Tensor
    hessian: Tensor
    curvature: Tensor
    damping: Tensor
    growth: Tensor

    def select(self, index: Tensor) -> _State:
        return _State(*(t[..., index] for t in vars(self).values()))


def _checked(
    model: SignalModel,
    data: Tensor,
    initial: Tensor,
    max_iterations: int,
    tolerance: float,
    chunk: int | None,
    noise_std: float | None,
) -> _Problem:
    where, names = "least squares", model.parameter_names
    if data.ndim < 1 or data.shape[0] != model.n_states:
        raise DataError("number of states", where=where, got=tuple(data.shape), expected=f"({model.n_states}, *pixels)")
    if tuple(initial.shape) != (len(names), *data.shape[1:]):
        raise DataError(
            "start has the wrong shape", where=where, got=tuple(initial.shape), expected=(len(names), *data.shape[1:])
        )
    if data.is_complex() != model.is_complex or initial.is_complex() or not (data.is_complex() or data.is_floating_point()):
        raise DataError(
            "wrong kind of numbers",
            where=where,
            got=f"data {data.dtype}, start {initial.dtype}",
            expected=f"{'complex' if model.is_complex else 'real'} data, real start",
        )
    if not bool(torch.isfinite(data).all() & torch.isfinite(initial).all()):
        raise DataError("not finite", where=where, expected="finite data and a finite start")
    if max_iterations < 1 or not 0 < tolerance < 1 or (chunk is not None and chunk < 1):
        raise SettingError(
            "out of range", where=where, got=f"{max_iterations} iterations, tolerance {tolerance}, chunk {chunk}"
        )
    if noise_std is not None and not noise_std > 0:
        raise SettingError("noise SD must be above zero", where=where, got=noise_std)
    return _Problem(len(names), torch.float64 if data.dtype in (torch.float64, torch.complex128) else torch.float32)


def _solve(model: SignalModel, inputs: _Inputs, initial: Tensor, settings: _Settings) -> tuple[Tensor, ...]:
    """One chunk: all of `LeastSquaresFit`, with one pixel axis."""
    state = _begin(model, inputs, initial, settings)
    n, device = initial.shape[1], initial.device
    final = _State(*(t.clone() for t in vars(state).values()))
    converged = torch.zeros(n, dtype=torch.bool, device=device)
    iterations = torch.zeros(n, dtype=torch.int32, device=device)
    where = torch.arange(n, device=device)  # the pixels that are still in ``state``
    active = torch.isfinite(state.cost)
    now = inputs
    size = real_rows(now.data).to(settings.system_dtype).square().sum(dim=(0, -1)) + (
        now.weight * now.reference.square()
    ).sum(0)
    for iteration in range(settings.max_iterations):
        left = int(active.sum())
        if left == 0:
            break
        if 2 * left <= active.numel() > PAD:
            _put(final, state, where)
            keep = _padded(active.nonzero()[:, 0])
            state, now, where, size, active = state.select(keep), now.select(keep), where[keep], size[keep], active[keep]
        iterations[where] += active
        if iteration == NEWTON_AFTER:
            residual = model.signal(state.p) - now.data
            state.curvature = packed_curvature(model, state.p, residual, settings.system_dtype)
        state, arrived, lost = _step(model, now, state, active, size, settings, newton=iteration >= NEWTON_AFTER)
        converged[where] |= arrived
        active = active & ~arrived & ~lost
    _put(final, state, where)
    held = _held(final.p, final.gradient, inputs)
    dtype = initial.dtype
    if settings.statistics:
        residual, covariance = _statistics(inputs, final, held, settings)
    else:
        residual = torch.full_like(final.cost, torch.nan)
        covariance = residual.expand(len(final.p), len(final.p), n)
    return final.p, residual.to(dtype), covariance.to(dtype), converged, held, iterations


def _padded(index: Tensor) -> Tensor:
    """``index``, filled up with its first entry to a multiple of ``PAD``: twins compute and write the same values."""
    return torch.cat((index, index[:1].expand(-len(index) % PAD)))


def _put(into: _State, state: _State, where: Tensor) -> None:
    for target, source in zip(vars(into).values(), vars(state).values(), strict=True):
        target[..., where] = source


def _begin(model: SignalModel, inputs: _Inputs, initial: Tensor, settings: _Settings) -> _State:
    p = torch.minimum(torch.maximum(initial, inputs.lower), inputs.upper)
    equations = _equations(model, inputs, p, settings, newton=False)
    return _State(p, *equations, torch.full_like(equations[0], FIRST_DAMPING), torch.full_like(equations[0], 2.0))


def _step(
    model: SignalModel, inputs: _Inputs, state: _State, active: Tensor, size: Tensor, settings: _Settings, newton: bool
) -> tuple[_State, Tensor, Tensor]:
    """One trial in every pixel: the new state, which pixels have arrived and which have given up.

    ``size`` is ``|y|^2 + sum lambda p_reg^2``, ``(pixel,)``.
    """
    held = _held(state.p, state.gradient, inputs)
    step, matrix = _damped_step(state, held, newton)
    trial = torch.minimum(torch.maximum(state.p + step.to(state.p.dtype), inputs.lower), inputs.upper)
    step = (trial - state.p).to(settings.system_dtype)  # as it was rounded and cut
    curved = quadratic(state.hessian, step)
    predicted = -2 * (state.gradient * step).sum(0) - (quadratic(matrix, step) if newton else curved)
    cost, gradient, hessian, curvature = _equations(model, inputs, trial, settings, newton=newton)

    resolution = ROUNDING * torch.finfo(state.p.dtype).eps * (state.cost + (state.cost * size).sqrt())
    unresolved = predicted <= resolution  # too small a gain to be seen in the cost: believe the quadratic model
    ratio = torch.where(unresolved, 1.0, (state.cost - cost) / predicted)
    accepted = active & torch.isfinite(cost) & (cost <= state.cost + torch.where(unresolved, resolution, 0.0)) & (ratio > 0)
    arrived = (
        active & (curved <= settings.tolerance**2 * size) & (state.damping <= NEARLY_UNDAMPED) & (accepted | unresolved)
    )

    shrunk = state.damping * (1 - (2 * ratio - 1) ** 3).clamp(0.1, 1.0)
    damping = torch.where(accepted, shrunk.clamp_min(LEAST_DAMPING), state.damping * state.growth)
    growth = torch.where(accepted, torch.full_like(state.growth, 2.0), state.growth * 2)
    lost = active & ~accepted & (damping > MOST_DAMPING)
    return (
        _State(
            torch.where(accepted, trial, state.p),
            torch.where(accepted, cost, state.cost),
            torch.where(accepted, gradient, state.gradient),
            torch.where(accepted, hessian, state.hessian),
            torch.where(accepted, curvature, state.curvature),
            torch.where(active, damping, state.damping),
            torch.where(active, growth, state.growth),
        ),
        arrived,
        lost,
    )


def _equations(
    model: SignalModel, inputs: _Inputs, p: Tensor, settings: _Settings, *, newton: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cost, half its gradient, ``Re J^H J + lambda`` and the curvature, which is 0 unless ``newton``."""
    linearised = model.signal_and_jacobian(p)
    dtype = settings.system_dtype
    cost, gradient, hessian = normal_equations(linearised, inputs.data, p, inputs.weight, inputs.reference, dtype)
    curvature = packed_curvature(model, p, linearised[0] - inputs.data, dtype) if newton else torch.zeros_like(hessian)
    return cost, gradient, hessian, curvature


def _held(p: Tensor, gradient: Tensor, inputs: _Inputs) -> Tensor:
    return ((p <= inputs.lower) & (gradient > 0)) | ((p >= inputs.upper) & (gradient < 0))


def _damped_step(state: _State, held: Tensor, newton: bool) -> tuple[Tensor, Tensor]:
    """``-(M + mu D)^-1 g`` for the free parameters, 0 for the held ones, and ``M``: the Hessian or Gauss-Newton's."""
    n = len(state.p)
    gradient = torch.where(held, 0.0, state.gradient)
    matrix = state.hessian
    factor = cholesky(_restricted(matrix, state, held), n)
    if newton:
        full = state.hessian + state.curvature
        of_full = cholesky(_restricted(full, state, held), n)
        definite = torch.stack([of_full[at(i, i)] > 0 for i in range(n)]).all(0)
        factor = [torch.where(definite, a, b) for a, b in zip(of_full, factor, strict=True)]
        matrix = torch.where(definite, full, matrix)
    return torch.stack([-x for x in substitute(factor, list(gradient.unbind(0)))]), matrix


def _restricted(matrix: Tensor, state: _State, held: Tensor) -> list[Tensor]:
    """``M + mu D``, with a unit row for every held parameter."""
    entries = list(matrix.unbind(0))
    n = len(held)
    any_held = bool(held.any())
    for i in range(n):
        scale = state.hessian[at(i, i)]
        # a column of zeros (T1 where M0 is 0) has a zero gradient too: any positive entry leaves that parameter alone
        entries[at(i, i)] = torch.where(scale > 0, entries[at(i, i)] + state.damping * scale, 1.0)
        if any_held:
            entries[at(i, i)] = torch.where(held[i], 1.0, entries[at(i, i)])
            for j in range(i):
                entries[at(i, j)] = torch.where(held[i] | held[j], 0.0, entries[at(i, j)])
    return entries


def _statistics(inputs: _Inputs, state: _State, held: Tensor, settings: _Settings) -> tuple[Tensor, Tensor]:
    """Squared data residual ``(pixel,)`` and covariance ``(parameter, parameter, pixel)``, in double: it inverts."""
    n = len(state.p)
    weight = inputs.weight.double()
    pull = (weight * (state.p - inputs.reference).double().square()).sum(0)
    residual = (state.cost.double() - pull).clamp_min(0)
    rows = inputs.data.shape[0] * (2 if inputs.data.is_complex() else 1)
    if settings.noise_std is not None:
        variance = torch.full_like(residual, settings.noise_std**2)
    elif rows > n:
        variance = residual / (rows - n)
    else:
        variance = torch.full_like(residual, torch.nan)
    hessian = list(state.hessian.double().unbind(0))
    factor = cholesky(hessian, n)
    identity = torch.eye(n, dtype=torch.float64, device=residual.device)
    inverse = torch.stack([torch.stack(substitute(factor, [v.expand_as(residual) for v in row])) for row in identity])
    of_data = torch.stack(
        [torch.stack([hessian[at(i, j)] - (weight[i] if i == j else 0) for j in range(n)]) for i in range(n)]
    )
    middle = (of_data[:, :, None] * inverse[None]).sum(1)
    covariance = variance * (inverse[:, :, None] * middle[None]).sum(1)
    singular = torch.stack([factor[at(i, i)] == 0 for i in range(n)]).any(0)
    covariance = torch.where(singular, torch.inf, covariance)
    return residual, torch.where(held.any(0), torch.nan, covariance)
