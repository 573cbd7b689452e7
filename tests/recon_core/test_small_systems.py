"""Unrolled elimination against torch.linalg, and where it must refuse."""

from __future__ import annotations

import pytest
import torch

from recon_core.solvers.small_systems import at, cholesky, quadratic, substitute

F64 = torch.float64


def packed(matrices: torch.Tensor) -> list[torch.Tensor]:
    """``(pixel, n, n)`` to a list of the lower triangle."""
    n = matrices.shape[-1]
    return [matrices[:, i, j] for i in range(n) for j in range(i + 1)]


def definite(n: int, n_pixels: int = 20) -> torch.Tensor:
    a = torch.randn(n_pixels, n, n, generator=torch.Generator().manual_seed(n), dtype=F64)
    return a @ a.mT + 0.1 * torch.eye(n, dtype=F64)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_solves_and_measures(n: int) -> None:
    m = definite(n)
    b = torch.randn(20, n, generator=torch.Generator().manual_seed(9), dtype=F64)
    x = torch.stack(substitute(cholesky(packed(m), n), list(b.unbind(1))), dim=1)
    torch.testing.assert_close(x, torch.linalg.solve(m, b), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(quadratic(packed(m), b.unbind(1)), torch.einsum("pi,pij,pj->p", b, m, b))


def test_every_entry_has_one_place() -> None:
    assert [at(i, j) for i in range(4) for j in range(i + 1)] == list(range(10)) and at(1, 3) == at(3, 1)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_singular_and_indefinite_pixels_are_refused_alone(value: float) -> None:
    m = definite(3, 2)
    m[0] = torch.diag(torch.tensor([1.0, value, 2.0], dtype=F64))
    factor = cholesky(packed(m), 3)
    assert [float(factor[at(i, i)][0]) > 0 for i in range(3)] == [True, False, True]
    assert all(float(factor[at(i, i)][1]) > 0 for i in range(3))
    x = substitute(factor, [torch.ones(2, dtype=F64)] * 3)
    assert [float(entry[0]) for entry in x] == pytest.approx([1.0, 0.0, 0.5])


def test_a_floor_decides_what_is_too_ill() -> None:
    """The second pivot of this matrix is 0.01."""
    m = torch.tensor([[[1.0, 1.0], [1.0, 1.01]]], dtype=F64)
    for floor, kept in ((0.009, True), (0.011, False)):
        factor = cholesky(packed(m), 2, [torch.zeros(1, dtype=F64), torch.full((1,), floor, dtype=F64)])
        assert (float(factor[at(1, 1)]) > 0) is kept
