"""The linear layer against dense algebra: solution, every gradient, the paper's formulas, what it reports."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import pytest
import torch

from recon_core.errors import DataError, NumericalError, SettingError
from recon_core.operators.batched_sense import BatchedSense
from recon_core.operators.cartesian import CartesianSense
from recon_core.operators.linear import LinearOperator
from recon_core.solvers.linear_layer import LinearReport, LinearSettings, UntrustedGradient, solve_linear

Tensor = torch.Tensor
F64, C128 = torch.float64, torch.complex128
N_BATCH, N_STATES, N_COILS, N_Y, N_X = 2, 2, 2, 5, 3
IMAGE = (N_BATCH, N_STATES, N_X, N_Y)
EXACT = LinearSettings(tolerance=1e-13, max_iterations=300)
WEIGHT_SHAPES = {"scalar": (), "per sample": (N_BATCH, 1, 1, 1), "per pixel": (N_X, N_Y), "per everything": IMAGE}


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = C128) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@dataclass
class Inputs:
    """Everything that the solution depends on."""

    maps: Tensor
    kspace: Tensor
    images: tuple[Tensor, Tensor]
    lambdas: tuple[Tensor, Tensor]
    sampling: Tensor

    def operator(self) -> BatchedSense:
        return BatchedSense(self.maps, self.sampling)

    def solve(self, settings: LinearSettings = EXACT) -> tuple[Tensor, LinearReport]:
        operator = self.operator()
        rhs = operator.adjoint(operator.enter_data(self.kspace))
        return solve_linear(operator, rhs, list(zip(self.lambdas, self.images, strict=True)), settings=settings)


def inputs(weight: str = "per sample") -> Inputs:
    return Inputs(
        maps=noise(N_BATCH, N_COILS, N_Y, N_X),
        kspace=noise(N_BATCH, N_STATES, N_COILS, N_Y, N_X, seed=1),
        images=(noise(*IMAGE, seed=2), noise(*IMAGE, seed=3)),
        lambdas=(0.2 + uniform(*WEIGHT_SHAPES[weight], seed=4), 0.1 + uniform(seed=5)),
        sampling=uniform(N_BATCH, N_STATES, N_Y, seed=6) < 0.5,
    )


def dense(operator: LinearOperator, shape: tuple[int, ...]) -> Tensor:
    """``A^H A`` as a matrix, column by column."""
    n = torch.Size(shape).numel()
    return torch.stack([operator.normal(e.reshape(shape)).flatten() for e in torch.eye(n, dtype=C128)], dim=1)


def dense_hessian(given: Inputs) -> Tensor:
    diagonal = (given.lambdas[0] + given.lambdas[1]).expand(IMAGE).flatten()
    return dense(given.operator(), IMAGE) + torch.diag(diagonal).to(C128)


@pytest.mark.parametrize("weight", WEIGHT_SHAPES)
def test_solution_is_the_dense_one(weight: str) -> None:
    given = inputs(weight)
    operator = given.operator()
    rhs = operator.adjoint(operator.enter_data(given.kspace))
    rhs = rhs + given.lambdas[0] * given.images[0] + given.lambdas[1] * given.images[1]
    x, report = given.solve()
    expected = torch.linalg.solve(dense_hessian(given), rhs.flatten()).reshape(IMAGE)
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
    assert report.all_converged and report.residual.shape == (N_BATCH,) and report.gradient_trusted is None


@pytest.mark.parametrize("weight", WEIGHT_SHAPES)
@pytest.mark.parametrize("name", ["kspace", "coil maps", "image 1", "image 2", "lambda 1", "lambda 2"])
def test_gradcheck_of_every_input(name: str, weight: str) -> None:
    given = inputs(weight)
    leaves = {
        "kspace": given.kspace,
        "coil maps": given.maps,
        "image 1": given.images[0],
        "image 2": given.images[1],
        "lambda 1": given.lambdas[0],
        "lambda 2": given.lambdas[1],
    }

    def solution(leaf: Tensor) -> Tensor:
        t = {**leaves, name: leaf}
        images, lambdas = (t["image 1"], t["image 2"]), (t["lambda 1"], t["lambda 2"])
        return Inputs(t["coil maps"], t["kspace"], images, lambdas, given.sampling).solve()[0]

    leaf = leaves[name].clone().requires_grad_()
    assert torch.autograd.gradcheck(solution, leaf, fast_mode=not (name.startswith("lambda") and weight == "per sample"))


def test_gradients_are_the_papers() -> None:
    """Eq. (16)-(18), written out with a dense inverse; torch's complex gradient is twice the paper's dL/dy^H, on both sides."""
    given = inputs()
    leaves = [t.requires_grad_() for t in (given.maps, given.kspace, *given.images, *given.lambdas)]
    x, _ = given.solve()
    upstream = noise(*IMAGE, seed=9)
    x.backward(upstream)
    of_maps, of_kspace, of_image, _, of_lambda, _ = (t.grad for t in leaves)
    with torch.no_grad():
        operator, y = given.operator(), x.detach()
        g = torch.linalg.solve(dense_hessian(given), upstream.flatten()).reshape(IMAGE)
        torch.testing.assert_close(of_image, given.lambdas[0] * g)
        per_sample = ((given.images[0] - y).conj() * g).real.sum(dim=(1, 2, 3), keepdim=True)
        torch.testing.assert_close(of_lambda, per_sample)

        def to_coil_images(data: Tensor) -> Tensor:  # F^H, with the mask applied once
            return torch.fft.ifft(data, norm="ortho")

        data = operator.enter_data(given.kspace)
        first = to_coil_images(data - operator.forward(y)) * g.conj()[:, :, None]
        second = to_coil_images(operator.forward(g)) * y.conj()[:, :, None]
        assert of_maps is not None
        # Eq. (18) is printed without the minus sign of Eq. (9)
        torch.testing.assert_close(of_maps.movedim(-1, -2), (first - second).sum(1))
        leaf = given.kspace.detach().clone().requires_grad_()
    operator.enter_data(leaf).backward(operator.forward(g))
    torch.testing.assert_close(of_kspace, leaf.grad)


@pytest.mark.parametrize("n_batch_axes", [0, 1])
def test_any_operator_gets_its_gradient(n_batch_axes: int) -> None:
    """The operator of one slice knows nothing of this layer: its coil maps are reached through `normal` alone."""
    sampling, prior, kspace = uniform(2, 1, 6) < 0.6, noise(2, 3, 1, 6), noise(2, 3, 1, 6, 3, seed=1)
    settings = LinearSettings(tolerance=1e-13, max_iterations=200, n_batch_axes=n_batch_axes)

    def solution(maps: Tensor, kspace: Tensor, prior: Tensor) -> Tensor:
        operator = CartesianSense(maps, sampling)
        rhs = operator.adjoint(operator.enter_data(kspace))
        return solve_linear(operator, rhs, [(0.3, prior)], settings=settings)[0]

    leaves = [t.requires_grad_() for t in (noise(3, 1, 6, 3, seed=2), kspace, prior)]
    assert torch.autograd.gradcheck(solution, leaves, fast_mode=True)


def test_a_slice_gives_the_same_through_both_operators() -> None:
    """`CartesianSense` as one system is a batch of one."""
    maps, sampling, kspace = noise(3, 6, 4), uniform(2, 6) < 0.6, noise(2, 3, 6, 4, seed=1)
    prior = noise(2, 6, 4, seed=2)
    single, batched = CartesianSense(maps[:, None], sampling[:, None]), BatchedSense(maps[None], sampling[None])
    settings = LinearSettings(tolerance=1e-12, max_iterations=200, n_batch_axes=0)
    rhs = single.adjoint(single.enter_data(kspace[:, :, None]))
    x, report = solve_linear(single, rhs, [(0.2, single.enter_image(prior[:, None]))], settings=settings)
    rhs = batched.adjoint(batched.enter_data(kspace[None]))
    y, _ = solve_linear(batched, rhs, [(0.2, batched.enter_image(prior[None]))], settings=EXACT)
    torch.testing.assert_close(single.leave_image(x)[:, 0], batched.leave_image(y)[0], rtol=1e-9, atol=1e-9)
    assert report.residual.shape == () and report.all_converged


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_changes_neither_steps_nor_relative_error(factor: float) -> None:
    given = inputs()
    x, report = given.solve(LinearSettings(tolerance=1e-5))
    given.kspace, given.images = given.kspace * factor, (given.images[0] * factor, given.images[1] * factor)
    scaled, scaled_report = given.solve(LinearSettings(tolerance=1e-5))
    assert torch.equal(report.iterations, scaled_report.iterations)
    torch.testing.assert_close(scaled / factor, x, rtol=1e-10, atol=1e-12)


def test_a_sample_does_not_depend_on_the_others() -> None:
    given, settings = inputs(), LinearSettings(tolerance=1e-6)
    leaf = given.images[0].requires_grad_()
    x, report = given.solve(settings)
    x[0].abs().square().sum().backward()
    alone = Inputs(
        given.maps[:1],
        given.kspace[:1],
        (given.images[0].detach()[:1].requires_grad_(), given.images[1][:1]),
        (given.lambdas[0][:1], given.lambdas[1]),
        given.sampling[:1],
    )
    x_alone, report_alone = alone.solve(settings)
    x_alone.abs().square().sum().backward()
    assert int(report.iterations[0]) == int(report_alone.iterations[0])
    torch.testing.assert_close(x[:1], x_alone, rtol=1e-12, atol=1e-12)
    assert leaf.grad is not None and alone.images[0].grad is not None
    torch.testing.assert_close(leaf.grad[:1], alone.images[0].grad, rtol=1e-12, atol=1e-12)
    assert float(leaf.grad[1].abs().max()) == 0


def test_gradient_error_follows_the_tolerance() -> None:
    gradients, tolerances = [], (1e-13, 1e-2, 1e-4, 1e-6)
    for tolerance in tolerances:
        given = inputs()
        given.images[0].requires_grad_()
        x, _ = given.solve(LinearSettings(tolerance=tolerance, max_iterations=300))
        x.abs().square().sum().backward()
        assert given.images[0].grad is not None
        gradients.append(given.images[0].grad)
    for tolerance, gradient in zip(tolerances[1:], gradients[1:], strict=True):
        error = torch.linalg.vector_norm(gradient - gradients[0]) / torch.linalg.vector_norm(gradients[0])
        assert float(error) < 20 * tolerance


def test_says_when_forward_ran_out_of_steps() -> None:
    given = inputs()
    given.lambdas = (
        torch.tensor([1e3, 1e-3], dtype=F64).reshape(-1, 1, 1, 1).requires_grad_(),
        torch.tensor(0.0, dtype=F64),
    )
    x, report = given.solve(LinearSettings(tolerance=1e-8, max_iterations=6))
    assert report.converged.tolist() == [True, False] and int(report.iterations[1]) == 6
    with pytest.warns(UntrustedGradient, match="1 of 2 samples"):
        x.abs().square().sum().backward()
    assert report.gradient_trusted is not None and report.gradient_trusted.tolist() == [True, False]
    x, report = given.solve(LinearSettings(tolerance=1e-8, max_iterations=6, backward_max_iterations=500))
    with pytest.warns(UntrustedGradient, match="1 of 2 samples"):
        x.abs().square().sum().backward()
    assert report.gradient_converged is not None and bool(report.gradient_converged.all())
    assert report.gradient_trusted is not None and report.gradient_trusted.tolist() == [True, False]  # of another point


def test_says_when_only_backward_ran_out_of_steps() -> None:
    given = inputs()
    given.images[0].requires_grad_()
    x, report = given.solve(LinearSettings(tolerance=1e-10, max_iterations=300, backward_max_iterations=2))
    assert report.all_converged
    with pytest.warns(UntrustedGradient):
        x.abs().square().sum().backward()
    assert report.gradient_iterations is not None and report.gradient_iterations.tolist() == [2, 2]
    assert report.gradient_trusted is not None and not bool(report.gradient_trusted.any())


def test_the_gradient_may_have_a_tolerance_of_its_own() -> None:
    given = inputs()
    given.images[0].requires_grad_()
    x, report = given.solve(LinearSettings(tolerance=1e-10, max_iterations=300, backward_tolerance=1e-2))
    x.abs().square().sum().backward()
    assert report.gradient_residual is not None and 1e-6 < float(report.gradient_residual.max()) < 1e-2
    assert float(report.residual.max()) < 1e-10 and bool(report.gradient_trusted.all())  # type: ignore[union-attr]


def test_a_broken_gradient_stays_broken() -> None:
    """A training loop looks for NaN to skip a step; zeros would be taken for an answer."""
    given = inputs()
    leaf = given.images[0].requires_grad_()
    x, report = given.solve()
    upstream = noise(*IMAGE)
    upstream[1, 0, 0, 0] = float("nan")
    with pytest.warns(UntrustedGradient, match="1 of 2"):
        x.backward(upstream)
    assert leaf.grad is not None and bool(leaf.grad[1].isnan().all()) and bool(leaf.grad[0].isfinite().all())
    assert report.gradient_trusted is not None and report.gradient_trusted.tolist() == [True, False]


def test_is_silent_when_all_is_well() -> None:
    given = inputs()
    given.images[0].requires_grad_()
    x, report = given.solve()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x.abs().square().sum().backward()
    assert report.gradient_trusted is not None and bool(report.gradient_trusted.all())
    assert report.gradient_residual is not None and float(report.gradient_residual.max()) <= EXACT.tolerance


def test_single_precision() -> None:
    """The production dtype keeps its type and reaches what float32 can."""
    given = inputs()
    x, _ = given.solve()
    single = Inputs(
        given.maps.to(torch.complex64),
        given.kspace.to(torch.complex64),
        (given.images[0].to(torch.complex64).requires_grad_(), given.images[1].to(torch.complex64)),
        (given.lambdas[0].requires_grad_(), given.lambdas[1]),  # a float64 weight does not promote the images
        given.sampling,
    )
    y, report = single.solve(LinearSettings())
    y.abs().square().sum().backward()
    assert y.dtype == torch.complex64 and report.all_converged
    assert single.lambdas[0].grad is not None and single.lambdas[0].grad.dtype == F64
    torch.testing.assert_close(y.to(C128), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("where", ["forwards", "backwards"])
def test_a_tolerance_beyond_single_precision_is_reported_as_missed(where: str) -> None:
    """CG's recursion goes on falling where the residual itself does not: 1e-10 was reported as reached, and the gradient as trusted."""
    given = inputs()
    given.maps, given.kspace = given.maps.to(torch.complex64), given.kspace.to(torch.complex64)
    given.images = (given.images[0].to(torch.complex64).requires_grad_(), given.images[1].to(torch.complex64))
    beyond = {"tolerance": 1e-10} if where == "forwards" else {"tolerance": 1e-5, "backward_tolerance": 1e-10}
    x, report = given.solve(LinearSettings(max_iterations=300, **beyond))  # type: ignore[arg-type]
    with pytest.warns(UntrustedGradient, match="2 of 2 samples"):
        x.abs().square().sum().backward()
    missed = report.residual if where == "forwards" else report.gradient_residual
    assert missed is not None and float(missed.min()) > 1e-8 and float(missed.max()) < 1e-5
    assert report.all_converged == (where == "backwards")
    assert report.gradient_trusted is not None and not bool(report.gradient_trusted.any())


def test_first_guess_saves_steps_and_changes_nothing_else() -> None:
    given = inputs()
    cold, report = given.solve()
    operator, images = given.operator(), given.images[0].clone().requires_grad_()
    rhs = operator.adjoint(operator.enter_data(given.kspace))
    terms = [(given.lambdas[0], images), (given.lambdas[1], given.images[1])]
    kept = [t.clone() for t in (cold, rhs, given.images[1])]
    warm, warm_report = solve_linear(operator, rhs, terms, initial=cold, settings=LinearSettings(tolerance=1e-8))
    warm.abs().square().sum().backward()
    assert warm_report.iterations.tolist() == [0, 0] and int(report.iterations.min()) > 3
    for now, before in zip((cold, rhs, given.images[1]), kept, strict=True):
        assert torch.equal(now, before)


def test_memory_does_not_grow_with_the_steps() -> None:
    sizes = []
    for tolerance in (1e-2, 1e-12):
        given = inputs()
        kept: list[int] = []
        given.images[0].requires_grad_()

        def remember(t: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
            _, report = given.solve(LinearSettings(tolerance=tolerance, max_iterations=300))
        sizes.append((int(report.iterations.max()), sum(kept)))
    assert sizes[0][0] < sizes[1][0] and sizes[0][1] == sizes[1][1]


def test_without_regulariser_it_is_early_stopped_cg() -> None:
    """PINQI's first images: two steps from ``A^H k``, no gradient."""
    given = inputs()
    operator = given.operator()
    rhs = operator.adjoint(operator.enter_data(given.kspace))
    with torch.no_grad():
        x, report = solve_linear(operator, rhs, initial=rhs, settings=LinearSettings(max_iterations=2))
    assert report.iterations.tolist() == [2, 2] and not x.requires_grad
    before, after = (torch.linalg.vector_norm(operator.normal(t) - rhs) for t in (rhs, x))
    assert float(after) < float(before)


def test_misfits_are_named() -> None:
    given = inputs()
    operator, rhs = given.operator(), given.images[0]
    with pytest.raises(DataError, match="image does not fit"):
        solve_linear(operator, rhs, [(0.1, rhs[:1])])
    with pytest.raises(DataError, match="weight does not fit"):
        solve_linear(operator, rhs, [(torch.ones(3), rhs)])
    with pytest.raises(DataError, match="weight does not fit"):
        solve_linear(operator, rhs, [(torch.ones((), dtype=C128), rhs)])
    with pytest.raises(DataError, match="first guess"):
        solve_linear(operator, rhs, [(0.1, rhs)], initial=rhs[:, :1])
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(SettingError, match="negative or not finite"):
            solve_linear(operator, rhs, [(weight, rhs)])
    for wrong in ({"tolerance": 0.0}, {"max_iterations": 0}, {"backward_tolerance": 2.0}, {"n_batch_axes": -1}):
        with pytest.raises(SettingError, match="out of range"):
            LinearSettings(**wrong)
    with pytest.raises(NumericalError, match="not finite"):
        solve_linear(operator, rhs * float("nan"), [(0.1, rhs)])
