"""The nonlinear layer: every gradient of every model, bounds, singular pixels, independence, parity with the published solver."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.operators.batched_sense import BatchedSense
from recon_core.signal_models import InversionRecovery, MultiEcho, SaturationRecovery, SignalModel, ThreeParameterRecovery
from recon_core.solvers.lbfgs import LBFGSSettings
from recon_core.solvers.linear_layer import LinearSettings, UntrustedGradient, solve_linear
from recon_core.solvers.nonlinear_layer import NonlinearReport, NonlinearSettings, solve_nonlinear

Tensor = torch.Tensor
F64 = torch.float64
SATURATION = SaturationRecovery((0.5, 1.0, 1.5, 2.0, 8.0))
MODELS: dict[str, SignalModel] = {
    "saturation": SATURATION,
    "saturation, real": SaturationRecovery((0.5, 1.0, 1.5, 2.0, 8.0), is_complex=False),
    "inversion": InversionRecovery((0.1, 0.5, 1.0, 2.0, 4.0)),
    "inversion, real": InversionRecovery((0.1, 0.5, 1.0, 2.0, 4.0), is_complex=False, efficiency=0.9),
    "three parameters": ThreeParameterRecovery((0.1, 0.18, 1.1, 2.1, 3.1)),
    "multi-echo": MultiEcho((0.002, 0.006, 0.010, 0.014, 0.018)),
}
EXACT = NonlinearSettings(tolerance=1e-11, max_iterations=300)
PUBLISHED_BOUNDS = ((-2.0, -2.0, -1.0), (3.0, 2.0, 10.0))  # of the authors' code


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def true_parameters(model: SignalModel, *shape: int, seed: int = 0) -> Tensor:
    """``(batch, parameter, *pixels)`` for ``shape = (batch, *pixels)``."""
    u = torch.rand((4, *shape), generator=generator(seed), dtype=F64)
    if isinstance(model, MultiEcho):
        rows = [u[0] + 0.3, u[1] - 0.2, 5 + 60 * u[2], 60 * (u[3] - 0.5)]
    elif isinstance(model, ThreeParameterRecovery):
        rows = [0.4 + u[0], (0.4 + u[0]) * (1.6 + 0.5 * u[1]), 1 / (0.2 + 1.6 * u[2])]
    else:
        rows = [0.4 + u[0], u[1] - 0.5, 1 / (0.3 + 2.5 * u[2])]
        if not model.is_complex:
            del rows[1]
    return torch.stack(rows, dim=1)


def images(model: SignalModel, parameters: Tensor, noise: float, seed: int = 1) -> Tensor:
    """``(batch, state, *pixels)``."""
    y = model.signal(parameters.movedim(1, 0)).movedim(0, 1)
    return y + noise * torch.randn(y.shape, generator=generator(seed), dtype=y.dtype)


def unit_weights(model: SignalModel) -> Tensor:
    """Weights of comparable effect on every parameter: rates and frequencies of a multi-echo series are tens, not ones."""
    units = (1.0, 1.0, 1e-4, 1e-4) if isinstance(model, MultiEcho) else (1.0,) * len(model.parameter_names)
    return torch.tensor(units, dtype=F64).reshape(-1, 1, 1)


def case(model: SignalModel, *shape: int) -> tuple[Tensor, Tensor]:
    """Data far from the model and a prior far from the truth: what Gauss-Newton neglects must count."""
    p = true_parameters(model, *shape)
    prior = p * (1 + 0.2 * torch.randn(p.shape, generator=generator(2), dtype=F64))
    return images(model, p, 0.1), prior


def single(*shape: int, seed: int = 0, noise: float = 0.02) -> tuple[Tensor, Tensor]:
    """Saturation recovery in the production dtype: images and a prior 10 % off."""
    p = true_parameters(SATURATION, *shape, seed=seed)
    prior = p * (1 + 0.1 * torch.randn(p.shape, generator=generator(seed + 7), dtype=F64))
    return images(SATURATION, p, noise, seed + 5).to(torch.complex64), prior.float()


def gradients(
    *tensors: Tensor, model: SignalModel = SATURATION, upstream: Tensor | None = None, **options: Any
) -> tuple[Tensor, NonlinearReport, list[Tensor]]:
    """Parameters, report and the gradients to data, prior and weight."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    p, report = solve_nonlinear(model, *leaves, **options)
    p.backward(torch.ones_like(p) if upstream is None else upstream)
    found = [leaf.grad for leaf in leaves]
    assert all(g is not None for g in found)
    return p.detach(), report, [g for g in found if g is not None]


@pytest.mark.parametrize("name", ["data", "prior", "weight"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
def test_gradcheck_of_every_input(model: SignalModel, name: str) -> None:
    data, prior = case(model, 2, 1, 2)
    leaves = {"data": data, "prior": prior, "weight": torch.tensor(0.3, dtype=F64)}

    def solution(leaf: Tensor) -> Tensor:
        t = {**leaves, name: leaf}
        p, report = solve_nonlinear(model, t["data"], t["prior"], t["weight"] * unit_weights(model), settings=EXACT)
        assert report.n_unconverged == 0
        return p

    assert torch.autograd.gradcheck(solution, leaves[name].clone().requires_grad_(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("shape", [(), (2, 1, 1, 1), (3, 1, 1), (2, 3, 2, 2)], ids=str)
def test_a_weight_may_broadcast(shape: tuple[int, ...]) -> None:
    data, prior = case(SATURATION, 2, 2, 2)
    weight = 0.2 + torch.rand(shape, generator=generator(3), dtype=F64)

    def solution(weight: Tensor) -> Tensor:
        return solve_nonlinear(SATURATION, data, prior, weight, settings=EXACT)[0]

    assert torch.autograd.gradcheck(solution, weight.requires_grad_(), atol=1e-6, rtol=1e-4)


def test_data_alone_and_prior_alone_are_the_limits() -> None:
    p = true_parameters(SATURATION, 1, 5, 4)
    data = images(SATURATION, p, 0.0)
    found, _ = solve_nonlinear(SATURATION, data, p * 1.2, 0.0, settings=EXACT)
    torch.testing.assert_close(found, p, rtol=1e-7, atol=1e-9)
    found, _ = solve_nonlinear(SATURATION, data, p * 1.2, 1e8, settings=EXACT)
    torch.testing.assert_close(found, p * 1.2, rtol=1e-6, atol=1e-7)


def test_a_pixel_does_not_depend_on_the_others() -> None:
    data, prior = single(3, 16, 16)
    data[1, :, 3, 4] *= 1e4  # an absurd neighbour
    data[2, :, 5, 5] = 0
    p, report, of_data = gradients(data, prior, torch.tensor(0.5), bounds=PUBLISHED_BOUNDS)
    alone, _, of_alone = gradients(data[:1], prior[:1], torch.tensor(0.5), bounds=PUBLISHED_BOUNDS)
    assert (
        torch.equal(p[:1], alone) and torch.equal(of_data[0][:1], of_alone[0]) and torch.equal(of_data[1][:1], of_alone[1])
    )
    assert report.iterations.shape == (3, 16, 16)


def test_a_parameter_on_its_bound_stays_and_the_others_move() -> None:
    """R1 at its upper bound: no gradient to it, and M0's is that of the problem in which R1 is fixed."""
    p = true_parameters(SATURATION, 1, 2, 2)
    p[:, 2, 0] = 20.0  # both pixels of the first row, far above the bound
    data, prior = images(SATURATION, p, 0.02), p.clone()
    bounds = ((-2.0, -2.0, -1.0), (3.0, 2.0, 10.0))
    upstream = torch.randn(p.shape, generator=generator(4), dtype=F64)
    weight = torch.tensor(0.4, dtype=F64)
    found, report, of = gradients(data, prior, weight, upstream=upstream, bounds=bounds, settings=EXACT)
    assert report.at_bound[0, 2].tolist() == [[True, True], [False, False]] and int(report.at_bound.any(1).sum()) == 2
    assert bool((found[0, 2, 0] == 10).all()) and float(of[1][0, 2, 0].abs().max()) == 0
    assert report.gradient_trusted is not None and report.gradient_trusted[0].tolist() == [[False, False], [True, True]]

    def solution(data: Tensor, prior: Tensor, weight: Tensor) -> Tensor:
        return solve_nonlinear(SATURATION, data, prior, weight, bounds=bounds, settings=EXACT)[0]

    leaves = [t.clone().requires_grad_() for t in (data, prior, weight)]
    assert torch.autograd.gradcheck(solution, leaves, atol=1e-6, rtol=1e-4)


def test_pixels_without_signal_get_no_gradient_and_are_counted() -> None:
    """Without a prior nothing determines the rate where M0 is 0."""
    data, prior = single(1, 4, 4)
    data[0, :, 1, 2] = 0
    start = prior.clone()
    start[0, :2, 1, 2] = 0
    with pytest.warns(UntrustedGradient, match="nonlinear layer: the gradient of some pixels"):
        _, report, of = gradients(data, prior, torch.tensor(0.0), initial=start)
    assert report.n_unconverged == 0 or report.n_singular  # the warning is about the singular one
    assert report.singular is not None and report.n_singular == 1 and bool(report.singular[0, 1, 2])
    assert float(of[0][0, :, 1, 2].abs().max()) == 0 and all(
        bool(torch.isfinite(torch.view_as_real(of[0])).all()) for _ in of
    )
    clean = single(1, 4, 4)[0]
    _, whole, of_clean = gradients(clean, prior, torch.tensor(0.0), initial=start)
    others = ~report.singular[0]
    assert whole.n_singular == 0 and torch.equal(of[0][0][:, others], of_clean[0][0][:, others])


def test_away_from_a_minimum_the_hessian_is_not_trusted() -> None:
    """One step from a start on the wrong side: indefinite in some pixels, unconverged in all of them."""
    data, prior = single(1, 24, 24, noise=0.1)
    start = torch.tensor([-0.5, 0.5, -0.5]).reshape(1, 3, 1, 1).expand_as(prior)
    settings = NonlinearSettings(max_iterations=1)
    with pytest.warns(UntrustedGradient):
        _, report, of = gradients(data, prior, torch.tensor(0.0), initial=start, settings=settings)
    assert report.singular is not None and report.n_singular is not None and report.n_singular > 10
    assert report.n_unconverged > 500 and int(report.iterations.max()) == 1
    assert float(of[0].abs().sum(1)[report.singular].max()) == 0
    assert report.gradient_trusted is not None and not bool((report.gradient_trusted & report.singular).any())


def test_how_ill_a_system_may_be_is_a_setting() -> None:
    data, prior = single(1, 8, 8)
    upstream = torch.ones_like(prior)
    _, sound, of_sound = gradients(data, prior, torch.tensor(0.0), upstream=upstream)
    with pytest.warns(UntrustedGradient):
        _, strict, of = gradients(
            data, prior, torch.tensor(0.0), upstream=upstream, settings=NonlinearSettings(least_pivot=0.5)
        )
    assert sound.n_singular == 0 and strict.singular is not None and int(strict.singular.sum()) > 32
    assert float(of_sound[0].abs().sum(1).min()) > 0 and float(of[0].abs().sum(1)[strict.singular].max()) == 0


def test_says_when_a_fit_ran_out_of_steps_and_is_silent_otherwise() -> None:
    """A well-posed pixel that is not at its minimum has a gradient, of another point."""
    data, prior = single(1, 8, 8)
    with pytest.warns(UntrustedGradient, match="did not converge"):
        _, report, of = gradients(
            data, 1.3 * prior, torch.tensor(0.5), settings=NonlinearSettings(max_iterations=1, tolerance=1e-7)
        )
    assert report.n_unconverged > 32 and report.n_singular == 0 and float(of[0].abs().min()) > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, fine, _ = gradients(data, 1.3 * prior, torch.tensor(0.5), bounds=((-2.0, -2.0, -1.0), (3.0, 2.0, 0.6)))
        solve_nonlinear(
            SATURATION, data, prior, 0.5, settings=NonlinearSettings(max_iterations=1)
        )  # nobody asks for a gradient
    assert fine.n_unconverged == 0 and bool(fine.at_bound.any())  # a bound is no reason to doubt


def test_reports_without_backward() -> None:
    data, prior = single(2, 4, 4)
    p, report = solve_nonlinear(SATURATION, data, prior, 1.0)
    assert not p.requires_grad and report.n_unconverged == 0 and not bool(report.at_bound.any())
    assert report.n_singular is None and report.gradient_trusted is None
    with torch.no_grad():
        again, _ = solve_nonlinear(SATURATION, data.clone().requires_grad_(), prior, 1.0)
    assert torch.equal(again, p) and not again.requires_grad


def test_leaves_its_arguments_alone() -> None:
    data, prior = single(1, 5, 5)
    start = prior * 1.1
    kept = [t.clone() for t in (data, prior, start)]
    gradients(data, prior, torch.tensor(0.3), initial=start, bounds=PUBLISHED_BOUNDS)
    assert all(torch.equal(a, b) for a, b in zip((data, prior, start), kept, strict=True))


@pytest.mark.parametrize("weight", [3.0, 0.05])
def test_both_solvers_find_the_same_minimum_and_gradient(weight: float) -> None:
    """Against the double-precision minimum; the published solver is further from it, and says where it is unfinished."""
    data, prior = single(1, 48, 48)
    w = torch.tensor(weight)
    exact, _, of_exact = gradients(
        data.to(torch.complex128), prior.double(), w.double(), bounds=PUBLISHED_BOUNDS, settings=EXACT
    )
    errors = {}
    for solver, tolerance in (("lm", 2e-5), ("lbfgs", 5e-3)):
        settings = NonlinearSettings(solver=solver)
        p, report, of = gradients(data, prior, w, bounds=PUBLISHED_BOUNDS, settings=settings)
        errors[solver] = float((p - exact).square().mean().sqrt())
        assert float((p - exact).abs().max()) < tolerance
        for found, expected in zip(of, of_exact, strict=True):
            difference = torch.linalg.vector_norm(found - expected) / torch.linalg.vector_norm(expected)
            assert float(difference) < tolerance
        far = (p - exact).abs().amax(1) > 1e-3
        assert not bool((far & report.converged).any())
    assert errors["lm"] < errors["lbfgs"]


def test_the_published_solver_depends_on_neighbours() -> None:
    """Why it is not the default: the reason that the issue gives, held as a fact."""
    data, prior = single(2, 12, 12)
    data[1] *= 30
    settings = NonlinearSettings(solver="lbfgs", lbfgs=LBFGSSettings(max_iterations=10, runs=1))
    together, _ = solve_nonlinear(SATURATION, data, prior, 0.05, settings=settings)
    alone, _ = solve_nonlinear(SATURATION, data[:1], prior[:1], 0.05, settings=settings)
    assert float((together[:1] - alone).abs().max()) > 1e-3


def test_the_published_solver_keeps_the_bounds() -> None:
    data, prior = single(1, 8, 8)
    bounds = ((-2.0, -2.0, -1.0), (3.0, 2.0, 0.5))
    settings = NonlinearSettings(solver="lbfgs")
    p, report, of = gradients(data, prior, torch.tensor(0.05), bounds=bounds, settings=settings)
    reference, _ = solve_nonlinear(SATURATION, data, prior, 0.05, bounds=bounds)
    assert bool((p[:, 2] <= 0.5).all()) and int(report.at_bound.any(1).sum()) > 16
    # with bounds in the way it leaves pixels unfinished by some per cent
    assert float((p - reference).abs().max()) < 0.1 and bool(torch.isfinite(of[1]).all())
    assert float(of[1][:, 2][report.at_bound[:, 2]].abs().max()) == 0
    with pytest.raises(SettingError, match="one bound only"):
        solve_nonlinear(SATURATION, data, prior, 0.05, bounds=((-2.0, -2.0, -1.0), (3.0, 2.0, math.inf)), settings=settings)
    unbounded, _ = solve_nonlinear(SATURATION, data, prior, 3.0, settings=settings)
    torch.testing.assert_close(unbounded, solve_nonlinear(SATURATION, data, prior, 3.0)[0], rtol=2e-3, atol=2e-3)


def test_one_iteration_of_the_network_without_its_networks() -> None:
    """Both layers in a row, as PINQI alternates them: gradients of all three weights, both priors and the first parameters."""
    truth = true_parameters(SATURATION, 2, 3, 4)
    maps = torch.randn(2, 3, 4, 3, generator=generator(11), dtype=torch.complex128)
    operator = BatchedSense(maps, torch.rand(2, 5, 4, generator=generator(12)) < 0.6)
    rhs = operator.normal(images(SATURATION, truth, 0.02))
    draw = [0.1 * torch.randn(truth.shape, generator=generator(13 + i), dtype=F64) for i in range(2)]
    linear = LinearSettings(tolerance=1e-13, max_iterations=200)

    def iteration(p: Tensor, y_reg: Tensor, p_reg: Tensor, lambdas: Tensor) -> Tensor:
        y_q = SATURATION.signal(p.movedim(1, 0)).movedim(0, 1)
        y, report = solve_linear(operator, rhs, [(lambdas[0], y_q), (lambdas[1], y_reg)], settings=linear)
        found, _ = solve_nonlinear(SATURATION, y, p_reg, lambdas[2], initial=p.detach(), settings=EXACT)
        assert report.all_converged
        return found

    inputs = (truth + draw[0], images(SATURATION, truth, 0.1), truth + draw[1], torch.tensor([0.2, 0.3, 0.5], dtype=F64))
    leaves = [t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(iteration, leaves, atol=1e-6, rtol=1e-4, fast_mode=True)


def test_mixed_precision_does_not_reach_the_solvers() -> None:
    """The networks around them may run in bfloat16; solutions and gradients stay bit for bit what they are."""
    data, prior = single(1, 24, 24)
    maps = torch.randn(1, 3, 24, 24, generator=generator(11), dtype=torch.complex64)
    operator = BatchedSense(maps, torch.rand(1, 5, 24, generator=generator(12)) < 0.6)
    results = []
    for enabled in (False, True):
        leaves = [t.clone().requires_grad_() for t in (data, prior)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, _ = solve_linear(operator, operator.normal(data), [(0.3, leaves[0])])
            p, _ = solve_nonlinear(SATURATION, y, leaves[1], 0.5)
            p.square().sum().backward()
        results.append((p.detach(), *(leaf.grad for leaf in leaves)))
    for plain, mixed in zip(*results, strict=True):
        assert plain is not None and mixed is not None and torch.equal(plain, mixed)


def test_misfits_are_named() -> None:
    data, prior = single(2, 3, 3)
    with pytest.raises(DataError, match="prior does not fit"):
        solve_nonlinear(SATURATION, data, prior[:, :2], 1.0)
    with pytest.raises(DataError, match="prior does not fit"):
        solve_nonlinear(SATURATION, data, prior.double(), 1.0)
    with pytest.raises(DataError, match="start does not fit"):
        solve_nonlinear(SATURATION, data, prior, 1.0, initial=prior[:1])
    with pytest.raises(DataError, match="weight does not fit"):
        solve_nonlinear(SATURATION, data, prior, torch.ones(4, 1, 1, 1))
    with pytest.raises(DataError, match="number of states"):
        solve_nonlinear(SATURATION, data[:, :4], prior, 1.0)
    with pytest.raises(DataError, match="not finite"):
        solve_nonlinear(SATURATION, data * math.nan, prior, 1.0)
    for bounds in (((0.0, 0.0), (1.0, 1.0)), ((1.0, 1.0, 1.0), (0.0, 2.0, 2.0))):
        with pytest.raises(SettingError, match="not a box"):
            solve_nonlinear(SATURATION, data, prior, 1.0, bounds=bounds)
    for solver in ("lm", "lbfgs"):
        with pytest.raises(SettingError, match="must be finite and not negative"):
            solve_nonlinear(SATURATION, data, prior, -1.0, settings=NonlinearSettings(solver=solver))
    with pytest.raises(SettingError, match="no such solver"):
        NonlinearSettings(solver="newton")
    with pytest.raises(SettingError, match="out of range"):
        NonlinearSettings(least_pivot=0.0)
    with pytest.raises(SettingError, match="out of range"):
        LBFGSSettings(history_size=0)
