"""Conjugate gradients against dense solutions; each system of a batch on its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from recon_core.errors import NumericalError
from recon_core.solvers.cg import conjugate_gradient

C128 = torch.complex128


def systems(n_systems: int, n: int, condition: float = 30.0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Hermitian positive definite matrices of known condition number, and right-hand sides."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(n_systems, n, n, dtype=C128, generator=generator))[0]
    values = torch.logspace(0, torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    return (q * values.to(C128)) @ q.mH, torch.randn(n_systems, n, dtype=C128, generator=generator)


def apply(matrices: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: (matrices @ x[..., None])[..., 0]


def test_solves_every_system_of_the_batch() -> None:
    a, b = systems(5, 12)
    found = conjugate_gradient(apply(a), b, max_iterations=60, tolerance=1e-12)
    torch.testing.assert_close(found.solution, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)
    assert found.all_converged and found.residual.shape == (5,) and bool((found.residual <= 1e-12).all())


def test_exact_after_as_many_steps_as_unknowns() -> None:
    a, b = systems(1, 6, condition=5.0)
    found = conjugate_gradient(apply(a), b, max_iterations=6, tolerance=1e-15)
    torch.testing.assert_close(found.solution, torch.linalg.solve(a, b), rtol=1e-9, atol=1e-9)


def test_a_hard_neighbour_changes_nothing() -> None:
    a, b = systems(1, 10, condition=2.0)
    hard, hard_b = systems(1, 10, condition=1e5, seed=1)
    alone = conjugate_gradient(apply(a), b, max_iterations=80, tolerance=1e-6)
    both = conjugate_gradient(apply(torch.cat([a, hard])), torch.cat([b, 1e6 * hard_b]), max_iterations=80, tolerance=1e-6)
    torch.testing.assert_close(both.solution[0], alone.solution[0], rtol=1e-12, atol=1e-12)
    assert int(both.iterations[0]) == int(alone.iterations[0]) < int(both.iterations[1])


def test_says_when_it_has_not_converged() -> None:
    a, b = systems(2, 20, condition=1e4)
    found = conjugate_gradient(apply(a), b, max_iterations=3, tolerance=1e-8)
    assert not found.all_converged and not bool(found.converged.any()) and found.iterations.tolist() == [3, 3]
    true = torch.linalg.vector_norm(b - apply(a)(found.solution), dim=1) / torch.linalg.vector_norm(b, dim=1)
    torch.testing.assert_close(found.residual, true, rtol=1e-9, atol=1e-12)


def test_zero_right_hand_side_gives_zero() -> None:
    a, b = systems(2, 5)
    b[1] = 0
    found = conjugate_gradient(apply(a), b, max_iterations=30, tolerance=1e-10)
    assert float(found.solution[1].abs().max()) == 0 and found.all_converged and int(found.iterations[1]) == 0


def test_starts_where_it_is_told() -> None:
    a, b = systems(2, 8)
    exact = torch.linalg.solve(a, b)
    kept = exact.clone()
    found = conjugate_gradient(apply(a), b, initial=exact, tolerance=1e-10)
    assert found.iterations.tolist() == [0, 0] and torch.equal(exact, kept)


def test_coupled_systems_and_real_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(6, 6, dtype=torch.float64, generator=generator)
    a, b = m @ m.T + torch.eye(6), torch.randn(2, 3, dtype=torch.float64, generator=generator)
    found = conjugate_gradient(lambda x: (a @ x.flatten()).reshape(2, 3), b, tolerance=1e-12, n_batch_axes=0)
    torch.testing.assert_close(found.solution.flatten(), torch.linalg.solve(a, b.flatten()), rtol=1e-8, atol=1e-8)
    assert found.residual.shape == ()


def test_singular_but_consistent_gives_the_least_norm_solution() -> None:
    a = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    b = torch.tensor([[2.0, 3.0, 0.0]], dtype=torch.float64)
    found = conjugate_gradient(lambda x: x @ a, b, tolerance=1e-12)
    torch.testing.assert_close(found.solution, torch.tensor([[1.0, 3.0, 0.0]], dtype=torch.float64))


def test_wrong_operators_are_named() -> None:
    b = torch.ones(1, 3, dtype=torch.float64)
    with pytest.raises(NumericalError, match="positive"):
        conjugate_gradient(lambda x: -x, b)
    with pytest.raises(NumericalError, match="not finite"):
        conjugate_gradient(lambda x: x * float("nan"), b)


def test_reports_every_iteration() -> None:
    a, b = systems(1, 10)
    seen: list[int] = []
    found = conjugate_gradient(apply(a), b, max_iterations=4, tolerance=1e-14, on_iteration=seen.append)
    assert seen == [1, 2, 3, 4] and int(found.iterations.max()) == 4
