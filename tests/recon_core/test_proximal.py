"""Proximal gradient on problems with known minima; the largest eigenvalue against dense algebra."""

from __future__ import annotations

import pytest
import torch

from recon_core.errors import NumericalError
from recon_core.solvers.proximal import proximal_gradient

F64 = torch.float64


def soft(x: torch.Tensor, threshold: float) -> torch.Tensor:
    return x.sign() * (x.abs() - threshold).clamp_min(0)


def test_soft_thresholding_of_an_orthogonal_problem_is_one_step() -> None:
    b = torch.tensor([3.0, -0.2, 0.5, -2.0], dtype=F64)
    found = proximal_gradient(
        lambda x: x - b, lambda z, _: soft(z, 0.4), torch.zeros(4, dtype=F64), step=1.0, max_iterations=1
    )
    torch.testing.assert_close(found.solution, soft(b, 0.4))


def lasso(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(30, 50, dtype=F64, generator=generator)
    truth = torch.zeros(50, dtype=F64)
    truth[[3, 17, 40]] = torch.tensor([1.0, -2.0, 1.5], dtype=F64)
    return a, a @ truth


def test_lasso_meets_the_optimality_conditions() -> None:
    a, b = lasso()
    weight = 0.5
    step = 1 / float(torch.linalg.matrix_norm(a, 2) ** 2)
    found = proximal_gradient(
        lambda x: a.T @ (a @ x - b),
        lambda z, _: soft(z, weight * step),
        torch.zeros(50, dtype=F64),
        step=step,
        max_iterations=3000,
    )
    gradient = a.T @ (a @ found.solution - b)
    on = found.solution.abs() > 1e-8
    torch.testing.assert_close(gradient[on], -weight * found.solution[on].sign(), rtol=0, atol=1e-6)
    assert float(gradient[~on].abs().max()) <= weight + 1e-6 and on.nonzero().flatten().tolist() == [3, 17, 40]


def test_momentum_beats_plain_steps() -> None:
    curvature = torch.logspace(-4, 0, 40, dtype=F64)
    start = torch.ones(40, dtype=F64)
    found = proximal_gradient(lambda x: curvature * x, lambda z, _: z, start, step=1.0, max_iterations=200)
    plain = (1 - curvature) ** 200
    assert float((curvature * found.solution**2).sum()) < 0.05 * float((curvature * plain**2).sum())
    assert bool((start == 1).all())


def test_momentum_is_dropped_when_it_overshoots() -> None:
    """Without restarts the momentum's ripples keep the cost of a strongly convex problem far above this."""
    curvature = torch.logspace(-2, 0, 40, dtype=F64)
    found = proximal_gradient(
        lambda x: curvature * x, lambda z, _: z, torch.ones(40, dtype=F64), step=1.0, max_iterations=300
    )
    assert found.restarts > 0
    assert float((curvature * found.solution**2).sum()) < 1e-12


def test_stops_when_nothing_changes_and_counts() -> None:
    b = torch.ones(3, dtype=F64)
    seen: list[int] = []
    found = proximal_gradient(
        lambda x: x - b, lambda z, _: z, b * 0, step=1.0, max_iterations=50, tolerance=1e-9, on_iteration=seen.append
    )
    assert found.converged and found.iterations == len(seen) < 5
    later = proximal_gradient(
        lambda x: x - b, lambda z, _: z, b * 0, step=1.0, max_iterations=50, tolerance=1e-9, min_iterations=20
    )
    assert later.converged and later.iterations == 20


def test_divergence_is_an_error() -> None:
    with pytest.raises(NumericalError, match="not finite"):
        proximal_gradient(lambda x: 10 * x, lambda z, _: z, torch.ones(2), step=1e10, max_iterations=100)
