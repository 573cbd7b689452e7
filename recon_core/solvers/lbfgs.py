"""The published solver of PINQI's nonlinear subproblem: one L-BFGS over all pixels together, bounds by a tanh.

Kept to compare with. `levenberg_marquardt` is the default, because here all pixels share one curvature memory and one line search:
a pixel's answer depends on which pixels are in the same call, and far from the solution many are left unfinished.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from recon_core.errors import SettingError
from recon_core.signal_models import SignalModel

Tensor = torch.Tensor

INSIDE = 1e-3  # a start at a bound, where the tanh has no slope, is moved in by this part of the range
LARGEST = 1e6  # the authors' limit on what leaves the solver; NaN becomes 0


@dataclass(frozen=True)
class LBFGSSettings:
    """The authors' values.

    Attributes
    ----------
    history_size
        Pairs of steps and gradient changes that approximate the curvature.
    max_iterations, runs
        Steps of one run, and how many there are: each starts, without memory, where the last one ended.
    tolerance
        On the largest entry of the gradient and on the change of function or parameters: in effect, until nothing moves.
    """

    history_size: int = 10
    max_iterations: int = 200
    runs: int = 2
    tolerance: float = 1e-15

    def __post_init__(self) -> None:
        if min(self.history_size, self.max_iterations, self.runs) < 1 or not self.tolerance > 0:
            raise SettingError("out of range", where="L-BFGS", got=self, expected="at least 1 each, tolerance above 0")


def lbfgs(
    model: SignalModel,
    data: Tensor,
    initial: Tensor,
    weight: Tensor,
    reference: Tensor,
    bounds: tuple[Tensor, Tensor] | None,
    settings: LBFGSSettings,
) -> tuple[Tensor, int]:
    """``argmin sum |q(p) - y|^2 + sum lambda (p - p_reg)^2``, summed over all pixels.

    Parameters
    ----------
    data
        ``y``, ``(state, *pixels)``.
    initial, weight, reference
        Start, ``lambda`` and ``p_reg``; real, broadcast to ``(parameter, *pixels)``.
    bounds
        Lower and upper bounds that broadcast to ``(parameter, *pixels)``: ``p = centre + half (tanh z)``, solved for ``z``.
        Both finite or both infinite (then ``p = z``).

    Returns
    -------
    parameters, evaluations
        ``(parameter, *pixels)``, and how often function and gradient were computed.

    Raises
    ------
    SettingError
        Only one of a parameter's bounds is finite; a weight that makes no sense.

    References
    ----------
    PINQI, section III (implementation); Liu & Nocedal, Math. Program. 45 (1989) 503. Strong Wolfe line search, first step 1.
    """
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise SettingError("regularisation must be finite and not negative", where="L-BFGS")
    enter, leave = _transformation(bounds)
    free = enter(initial).clone().requires_grad_()
    evaluations = 0

    def closure() -> Tensor:
        nonlocal evaluations
        evaluations += 1
        optimiser.zero_grad()
        with torch.enable_grad():
            p = leave(free)
            misfit = model.signal(p) - data
            rows = torch.view_as_real(misfit) if misfit.is_complex() else misfit
            cost = rows.square().sum() + (weight * (p - reference).square()).sum()
        cost.backward()
        return cost

    for _ in range(settings.runs):
        optimiser = torch.optim.LBFGS(
            [free],
            lr=1.0,
            max_iter=settings.max_iterations,
            tolerance_grad=settings.tolerance,
            tolerance_change=settings.tolerance,
            history_size=settings.history_size,
            line_search_fn="strong_wolfe",
        )
        optimiser.step(closure)
    found = leave(free.detach())
    return torch.nan_to_num(found, nan=0.0).clamp(-LARGEST, LARGEST), evaluations


def _transformation(bounds: tuple[Tensor, Tensor] | None) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``p -> z`` and ``z -> p``."""
    if bounds is None:
        return (lambda p: p), (lambda z: z)
    lower, upper = bounds
    boxed = torch.isfinite(lower) & torch.isfinite(upper)
    if bool((boxed != (torch.isfinite(lower) | torch.isfinite(upper))).any()):
        raise SettingError(
            "a parameter has one bound only",
            where="L-BFGS",
            expected="two or none: a tanh needs both",
            remedy='Use solver="lm"',
        )
    centre = torch.where(boxed, (lower + upper) / 2, 0.0)
    half = torch.where(boxed, (upper - lower) / 2, 1.0)

    def enter(p: Tensor) -> Tensor:
        return torch.where(boxed, torch.atanh(((p - centre) / half).clamp(INSIDE - 1, 1 - INSIDE)), p)

    def leave(z: Tensor) -> Tensor:
        return torch.where(boxed, centre + half * torch.tanh(z), z)

    return enter, leave
