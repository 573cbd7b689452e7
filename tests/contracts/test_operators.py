"""One contract, all operators: adjoint, linearity, fused normal, gradients, the caller's arrays untouched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from recon_core.errors import DataError
from recon_core.fourier import fft_centred
from recon_core.operators.batched_sense import BatchedSense
from recon_core.operators.cartesian import CartesianSense
from recon_core.operators.linear import Composed, LinearOperator, Subspace

C128 = torch.complex128


@dataclass(frozen=True)
class Case:
    name: str
    operator: LinearOperator
    domain: tuple[int, ...]
    codomain: tuple[int, ...]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=C128, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int) -> torch.Tensor:
    values = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return torch.where(values > 0.5, values, 0)


def basis(n_states: int, n_components: int) -> torch.Tensor:
    return torch.linalg.qr(noise(n_states, n_components, seed=3))[0]


CASES = [
    Case("sense 2D", CartesianSense(noise(3, 1, 6, 5), weights(2, 1, 6) > 0), (2, 5, 1, 6), (2, 3, 5, 1, 6)),
    Case("sense 2D odd, weighted", CartesianSense(noise(2, 1, 7, 4), weights(3, 1, 7)), (3, 4, 1, 7), (3, 2, 4, 1, 7)),
    Case("sense 3D", CartesianSense(noise(2, 4, 3, 5), weights(2, 4, 3)), (2, 5, 4, 3), (2, 2, 5, 4, 3)),
    Case("sense one coil", CartesianSense(noise(1, 1, 4, 3), weights(1, 1, 4)), (1, 3, 1, 4), (1, 1, 3, 1, 4)),
    Case("batched sense", BatchedSense(noise(2, 3, 6, 5), weights(2, 4, 6) > 0), (2, 4, 5, 6), (2, 4, 3, 5, 6)),
    Case("batched sense odd, weighted", BatchedSense(noise(3, 2, 7, 4), weights(3, 1, 7)), (3, 1, 4, 7), (3, 1, 2, 4, 7)),
    Case("subspace", Subspace(basis(5, 2)), (2, 3, 4), (5, 3, 4)),
    Case(
        "sense after subspace",
        Composed(CartesianSense(noise(2, 1, 6, 3), weights(4, 1, 6)), Subspace(basis(4, 2))),
        (2, 3, 1, 6),
        (4, 2, 3, 1, 6),
    ),
]

every_operator = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_operator
def test_is_a_linear_operator(case: Case) -> None:
    assert isinstance(case.operator, LinearOperator)
    assert tuple(case.operator.forward(noise(*case.domain)).shape) == case.codomain
    assert tuple(case.operator.adjoint(noise(*case.codomain)).shape) == case.domain


@every_operator
def test_adjoint(case: Case) -> None:
    x, y = noise(*case.domain, seed=1), noise(*case.codomain, seed=2)
    left = torch.vdot(y.flatten(), case.operator.forward(x).flatten())
    right = torch.vdot(case.operator.adjoint(y).flatten(), x.flatten())
    assert abs(left - right) < 1e-12 * float(torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y))


@every_operator
def test_linear(case: Case) -> None:
    a, b = 0.3 - 1.2j, -2.0 + 0.1j
    for function, shape in ((case.operator.forward, case.domain), (case.operator.adjoint, case.codomain)):
        x, y = noise(*shape, seed=1), noise(*shape, seed=2)
        torch.testing.assert_close(function(a * x + b * y), a * function(x) + b * function(y), rtol=1e-12, atol=1e-12)


@every_operator
def test_normal_is_adjoint_after_forward(case: Case) -> None:
    x = noise(*case.domain)
    expected = case.operator.adjoint(case.operator.forward(x))
    torch.testing.assert_close(case.operator.normal(x), expected, rtol=1e-12, atol=1e-12)


@every_operator
def test_gradients(case: Case) -> None:
    functions: list[tuple[Callable[[torch.Tensor], torch.Tensor], tuple[int, ...]]] = [
        (case.operator.forward, case.domain),
        (case.operator.adjoint, case.codomain),
        (case.operator.normal, case.domain),
    ]
    for function, shape in functions:
        assert torch.autograd.gradcheck(function, noise(*shape).requires_grad_(), fast_mode=True)


@every_operator
def test_leaves_its_argument_alone(case: Case) -> None:
    x, y = noise(*case.domain), noise(*case.codomain)
    kept_x, kept_y = x.clone(), y.clone()
    case.operator.normal(x)
    case.operator.forward(x)
    case.operator.adjoint(y)
    assert torch.equal(x, kept_x) and torch.equal(y, kept_y)


@pytest.mark.parametrize("shape", [(1, 6, 5), (4, 7, 3)], ids=["2D", "3D odd"])
def test_sense_is_the_centred_model(shape: tuple[int, int, int]) -> None:
    """The shift-free inside must equal maps, then centred FFT, then mask."""
    maps, image, w = noise(3, *shape), noise(2, *shape, seed=4), weights(2, *shape[:2])
    operator = CartesianSense(maps, w)
    kspace = fft_centred(image[:, None] * maps, (-3, -2))
    inside = operator.forward(operator.enter_image(image))
    torch.testing.assert_close(inside, operator.enter_data(kspace), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.leave_image(operator.enter_image(image)), image)


def test_column_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    maps, w, x = noise(3, 1, 6, 5), weights(2, 1, 6), noise(2, 5, 1, 6)
    whole = CartesianSense(maps, w).normal(x)
    monkeypatch.setattr("recon_core.operators.cartesian.CPU_BLOCK", 3 * 6 * 2)
    torch.testing.assert_close(CartesianSense(maps, w).normal(x), whole, rtol=1e-13, atol=1e-13)


@every_operator
def test_norm_bound_holds(case: Case) -> None:
    if not isinstance(case.operator, CartesianSense):
        return
    x = noise(*case.domain)
    for _ in range(50):
        x = case.operator.normal(x / torch.linalg.vector_norm(x))
    assert float(torch.linalg.vector_norm(x)) <= case.operator.norm_bound * (1 + 1e-9)


def test_misfits_are_named() -> None:
    with pytest.raises(DataError, match="do not fit"):
        CartesianSense(noise(2, 1, 6, 5), weights(2, 1, 5))
    with pytest.raises(DataError, match="do not fit"):
        BatchedSense(noise(2, 3, 6, 5), weights(1, 4, 6))
    with pytest.raises(DataError, match="basis"):
        Subspace(noise(2, 3))
