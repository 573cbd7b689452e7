"""The unrolled network: exact where it can be, every variant trains, gradients agree with finite differences."""

from __future__ import annotations

import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.methods.pinqi.model import ABLATIONS, Pinqi, PinqiSettings, PositiveValues, Strengths
from recon_core.methods.pinqi.networks import ParameterRange
from recon_core.operators.batched_sense import BatchedSense
from recon_core.signal_models import InversionRecovery, MultiEcho, SaturationRecovery, SignalModel
from recon_core.solvers.linear_layer import LinearSettings, solve_linear
from recon_core.solvers.nonlinear_layer import SOLVERS, NonlinearSettings, solve_nonlinear

Tensor = torch.Tensor
SMALL = {"parameter": {"features": (4, 8), "n_groups": 2}, "image": {"features": (4, 8), "n_groups": 2}}
TIMES = (0.5, 1.0, 2.0, 8.0)


def problem(
    model: SignalModel, truth: Tensor, n_coils: int = 3, sampled: float = 0.6, seed: int = 0
) -> tuple[BatchedSense, Tensor]:
    """Operator and ``A^H A q(truth)``; ``truth`` is ``(batch, parameter, x, y)`` in the operator's layout."""
    generator = torch.Generator().manual_seed(seed)
    batch, _, n_x, n_y = truth.shape
    dtype = torch.complex128 if truth.dtype == torch.float64 else torch.complex64
    maps = torch.randn(batch, n_coils, n_y, n_x, generator=generator, dtype=dtype)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    mask = torch.rand(batch, model.n_states, n_y, generator=generator) < sampled
    mask[..., n_y // 2 - 2 : n_y // 2 + 2] = True
    operator = BatchedSense(maps, mask)
    return operator, operator.normal(model.signal(truth.movedim(1, 0)).movedim(0, 1).to(dtype))


def tissue(batch: int = 1, n: int = 12, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    low, high = torch.tensor([0.6, -0.1, 0.4]), torch.tensor([1.0, 0.1, 1.6])
    span = (high - low)[:, None, None]
    return (torch.rand(batch, 3, n, n, generator=generator) * span + low[:, None, None]).to(dtype)


def network(name: str = "proposed", **changes: object) -> Pinqi:
    torch.manual_seed(11)
    settings = ABLATIONS[name]
    return Pinqi(SaturationRecovery(TIMES), PinqiSettings(**{**vars(settings), **changes}), networks=SMALL)  # type: ignore[arg-type]


def test_without_networks_complete_data_give_the_true_maps() -> None:
    truth = tissue(2)
    model = SaturationRecovery(TIMES)
    operator, rhs = problem(model, truth, sampled=1.0)
    net = Pinqi(model, PinqiSettings(n_iterations=8, image_network="none", parameter_network="none"), networks=SMALL)
    found = net(operator, rhs)
    assert torch.allclose(found.parameters, truth, atol=2e-3)
    assert all(r.all_converged for r in found.linear) and all(r.n_unconverged == 0 for r in found.nonlinear)
    assert torch.allclose(found.images, model.signal(truth.movedim(1, 0)).movedim(0, 1), atol=1e-3)


@pytest.mark.parametrize("sampled", [1.0, 0.6])
@pytest.mark.parametrize(
    ("model", "low", "high", "tolerance"),
    [
        (InversionRecovery((0.1, 0.4, 1.0, 3.0)), (0.6, -0.1, 0.4), (1.0, 0.1, 1.6), (2e-3, 2e-3, 5e-3)),
        (
            MultiEcho((0.003, 0.006, 0.012, 0.02)),
            (0.6, -0.1, 15.0, -15.0),
            (1.0, 0.1, 60.0, 15.0),
            (2e-3, 2e-3, 0.2, 0.1),  # 0.2/s of R2*, 0.1 Hz
        ),
    ],
    ids=["inversion recovery: R1", "multi-echo: R2* and frequency"],
)
def test_without_networks_the_same_code_gives_the_true_maps_of_other_models(
    model: SignalModel, low: tuple[float, ...], high: tuple[float, ...], tolerance: tuple[float, ...], sampled: float
) -> None:
    """Noise-free data, every parameter different in every pixel; begun in the middle of a range, not at the truth."""
    u = torch.rand(2, len(low), 12, 12, generator=torch.Generator().manual_seed(5))
    lowest, highest = (torch.tensor(t)[:, None, None] for t in (low, high))
    truth = lowest + u * (highest - lowest)
    operator, rhs = problem(model, truth, sampled=sampled)
    ranges = tuple(ParameterRange((a + b) / 2, (b - a) / 2) for a, b in zip(low, high, strict=True))
    n = 8 if sampled == 1 else 40
    settings = PinqiSettings(n_iterations=n, image_network="none", parameter_network="none")
    net = Pinqi(model, settings, ranges=ranges, networks=SMALL)
    found = net(operator, rhs)
    largest = (found.parameters - truth).abs().amax((0, 2, 3))
    assert bool((largest < torch.tensor(tolerance)).all()), largest
    assert all(r.all_converged for r in found.linear) and found.nonlinear[-1].n_unconverged == 0
    assert torch.allclose(found.images, model.signal(truth.movedim(1, 0)).movedim(0, 1), atol=2e-3)


class Projections:
    """A linear acquisition that is neither Cartesian nor a Fourier transform: random sums over all pixels, of each state its own."""

    def __init__(self, n_states: int, shape: tuple[int, int], n_samples: int) -> None:
        self.shape = shape
        size = n_states, n_samples, shape[0] * shape[1]
        generator = torch.Generator().manual_seed(4)
        self.rows = torch.randn(size, dtype=torch.complex128, generator=generator) / n_samples**0.5

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("snp,bsp->bsn", self.rows, x.flatten(2))

    def adjoint(self, y: Tensor) -> Tensor:
        return torch.einsum("snp,bsn->bsp", self.rows.conj(), y).unflatten(2, self.shape)

    def normal(self, x: Tensor) -> Tensor:
        return self.adjoint(self.forward(x))


def test_the_same_code_serves_any_linear_acquisition() -> None:
    """Eighty random sums of 64 pixels in each state, ill-conditioned by themselves; and the networks learn through it."""
    truth, model = tissue(2, 8, torch.float64), SaturationRecovery(TIMES)
    operator = Projections(model.n_states, (8, 8), 80)
    signal = model.signal(truth.movedim(1, 0)).movedim(0, 1)
    data = operator.forward(signal)
    tight = {"linear": LinearSettings(tolerance=1e-10, max_iterations=400), "nonlinear": NonlinearSettings(tolerance=1e-9)}
    plain = PinqiSettings(n_iterations=40, image_network="none", parameter_network="none")
    found = Pinqi(model, plain, networks=SMALL, **tight).double()(operator, operator.adjoint(data))  # type: ignore[arg-type]
    assert torch.allclose(found.parameters, truth, atol=5e-3)
    net = network(n_iterations=2).double()
    data.requires_grad_()
    net(operator, operator.adjoint(data)).parameters.square().mean().backward()
    assert data.grad is not None and data.grad.isfinite().all() and float(data.grad.abs().max()) > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_the_published_solver_gives_the_whole_network_the_same_answer() -> None:
    """Levenberg-Marquardt for every pixel and L-BFGS for all, through five iterations and both networks, and backwards."""
    operator, rhs = problem(SaturationRecovery(TIMES), tissue(2, 24))
    found, grads = {}, {}
    for solver in SOLVERS:
        net = network()
        net.nonlinear = NonlinearSettings.of(solver)
        out = net(operator, rhs)
        out.parameters.square().mean().backward()
        found[solver] = out.parameters.detach()
        grads[solver] = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert sum(r.n_unconverged for r in out.nonlinear) < 0.01 * 5 * 2 * 24**2
    assert 0 < float((found["lm"] - found["lbfgs"]).abs().max()) < 1e-4  # not the same solver twice
    assert float((grads["lm"] - grads["lbfgs"]).norm() / grads["lm"].norm()) < 1e-4


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_variant_runs_and_learns_with_all_its_weights(name: str) -> None:
    operator, rhs = problem(SaturationRecovery(TIMES), tissue())
    net = network(name)
    found = net(operator, rhs)
    assert found.parameters.shape == (1, 3, 12, 12) and found.parameters.isfinite().all()
    assert found.predictions[-1] is found.parameters
    found.images.abs().sum().add(sum(p.square().sum() for p in found.predictions)).backward()
    silent = [k for k, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not silent
    # a network whose output were thrown away would have zero gradients
    assert all(float(p.grad.abs().sum()) > 0 for k, p in net.named_parameters() if k.endswith("last.weight"))


@pytest.mark.parametrize(
    ("name", "has", "n_predictions"),
    [
        ("proposed", {"parameter_net", "image_net", "lambda_p", "lambda_y", "lambda_q"}, 6),
        ("a", {"parameter_net", "image_net", "lambda_y"}, 1),
        ("b", {"parameter_net", "lambda_p", "lambda_q"}, 6),
        ("c", {"image_net", "lambda_y", "lambda_q"}, 5),
        ("d", {"parameter_net", "image_net", "lambda_y", "lambda_q"}, 6),
        ("e", {"parameter_net", "image_net", "lambda_p", "lambda_y", "lambda_q", "step_sizes"}, 6),
        ("f", {"parameter_net", "image_net", "lambda_p", "lambda_y", "lambda_q"}, 6),
        ("g1", {"parameter_net", "image_net", "lambda_p", "lambda_y", "lambda_q"}, 2),
        ("g2", {"parameter_net", "image_net", "lambda_p", "lambda_y", "lambda_q"}, 3),
        ("h", {"image_net", "lambda_y"}, 1),
        ("i", {"image_net", "lambda_y"}, 1),
    ],
)
def test_variants_consist_of_what_section_iii_d_says(name: str, has: set[str], n_predictions: int) -> None:
    operator, rhs = problem(SaturationRecovery(TIMES), tissue())
    net = network(name)
    parts = {"parameter_net", "image_net", "lambda_p", "lambda_y", "lambda_q", "step_sizes"}
    assert {p for p in parts if getattr(net, p) is not None} == has
    assert len(net(operator, rhs).predictions) == n_predictions


def test_networks_are_applied_as_often_as_the_variant_says() -> None:
    operator, rhs = problem(SaturationRecovery(TIMES), tissue())
    for name, calls in (("proposed", [5, 6]), ("f", [1, 1]), ("a", [5, 1]), ("g2", [2, 3])):
        net = network(name)
        seen = [0, 0]

        def count(i: int, seen: list[int] = seen) -> object:
            def hook(*_: object) -> None:
                seen[i] += 1

            return hook

        net.image_net.register_forward_hook(count(0))  # type: ignore[union-attr, arg-type]
        net.parameter_net.register_forward_hook(count(1))  # type: ignore[union-attr, arg-type]
        net(operator, rhs)
        assert seen == calls


def test_iterations_are_tagged_as_published() -> None:
    operator, rhs = problem(SaturationRecovery(TIMES), tissue())
    net, tags = network(), []
    net.image_net.register_forward_pre_hook(lambda _, a: tags.append(("y", round(float(a[1]), 6))))  # type: ignore[union-attr]
    net.parameter_net.register_forward_pre_hook(lambda _, a: tags.append(("p", round(float(a[1]), 6))))  # type: ignore[union-attr]
    net(operator, rhs)
    assert tags == [("p", 0.0)] + [t for i in range(1, 6) for t in (("y", i / 5), ("p", 1 + i / 5))]


def test_the_iterations_are_eq_12_and_13_written_out() -> None:
    """Every iteration has its own lambdas, the images see the signal of the fitted parameters, and factors go where they belong."""
    operator, rhs = problem(SaturationRecovery(TIMES), tissue())
    net, factors = network(n_iterations=3), {"image": 3.0, "signal": 0.5, "parameter": 2.0}
    on_q, on_y, on_p = (torch.tensor(values) for values in ((0.2, 0.5, 1.1), (0.9, 0.1, 0.3), (1.0, 4.0, 0.2)))
    for values, lambdas in ((on_q, net.lambda_q), (on_y, net.lambda_y), (on_p, net.lambda_p)):
        lambdas.raw.data = PositiveValues(values.tolist()).raw.data  # type: ignore[union-attr]
    with torch.no_grad():
        found = net(operator, rhs, strengths=Strengths(**factors))  # type: ignore[arg-type]
        y = net.first_images(operator, rhs)
        p = net.predict_parameters(y, 0.0)
        for i in range(3):
            signal = net.model.signal(p.movedim(1, 0)).movedim(0, 1)
            terms = [(0.5 * on_q[i], signal), (3.0 * on_y[i], net.predict_images(y, (i + 1) / 3))]
            y = solve_linear(operator, rhs, terms, initial=y, settings=net.linear)[0]
            prior = net.predict_parameters(y, 1 + (i + 1) / 3)
            p = solve_nonlinear(net.model, y, prior, 2.0 * on_p[i], initial=p, bounds=net.bounds, settings=net.nonlinear)[0]
    torch.testing.assert_close(found.images, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.parameters, p, rtol=1e-4, atol=1e-5)
    for part in net.image_net.unet.last.parameters():  # type: ignore[union-attr]
        part.data.zero_()
    assert torch.equal(net.predict_images(y, 1.0), y)  # the network gives what is to be added


def test_first_lambdas_are_the_published_ones() -> None:
    net = network()
    assert torch.allclose(net.lambda_p(), torch.full((5,), 3.0))  # type: ignore[misc]
    assert torch.allclose(net.lambda_y(), torch.full((5,), 0.1))  # type: ignore[misc]
    assert torch.allclose(net.lambda_q(), 0.1 + 0.05 * torch.arange(1.0, 6.0))  # type: ignore[misc]


def test_the_published_network_in_figures() -> None:
    """Sections III-B and III-D, and the authors' code where the paper is silent."""
    net = Pinqi(SaturationRecovery((0.5, 1.0, 1.5, 2.0, 8.0)))
    assert (net.settings.n_iterations, net.settings.n_gradient_steps) == (5, 5)
    assert net.bounds == ((-2.0, -2.0, -1.0), (2.0, 2.0, 20.0))
    assert net.parameter_net is not None and net.image_net is not None
    assert net.parameter_net.offset.flatten().tolist() == pytest.approx([0.9, 0.0, 0.8])
    assert net.parameter_net.scale.flatten().tolist() == pytest.approx([0.2, 0.1, 0.6])
    for part, groups in ((net.parameter_net, 16), (net.image_net, 8)):
        assert {m.num_groups for m in part.modules() if isinstance(m, torch.nn.GroupNorm)} == {groups}
        assert float(part.unet.last.weight.detach().std()) == pytest.approx(0.05, rel=0.35) and not part.unet.last.bias.any()


def test_first_images_are_two_steps_of_conjugate_gradients() -> None:
    operator, rhs = problem(SaturationRecovery(TIMES), tissue(2))
    found = network().first_images(operator, rhs)
    for i in range(2):  # Hestenes and Stiefel, from A^H k
        x, r = rhs[i : i + 1], None
        single = BatchedSense(operator.coil_maps[i : i + 1], operator.weights[i : i + 1])
        r = x - single.normal(x)
        p = r
        for _ in range(2):
            q = single.normal(p)
            alpha = r.abs().square().sum() / (p.conj() * q).sum().real
            x, new = x + alpha * p, r - alpha * q
            p, r = new + new.abs().square().sum() / r.abs().square().sum() * p, new
        assert torch.allclose(found[i], x[0], atol=1e-4 * float(x.abs().max()))


def test_variant_e_descends_five_times_along_the_gradient_of_its_subproblem() -> None:
    operator, rhs = problem(SaturationRecovery(TIMES), tissue())
    net = network("e", n_iterations=1)
    with torch.no_grad():
        found = net(operator, rhs)
        reference, step, weight = net.predict_parameters(found.images, 2.0), net.step_sizes()[0], net.lambda_p()[0]  # type: ignore[misc]
    p = found.predictions[0].clone()
    for _ in range(5):
        p.requires_grad_()
        misfit = net.model.signal(p.movedim(1, 0)).movedim(0, 1) - found.images
        cost = misfit.abs().square().sum() + weight * (p - reference).square().sum()
        p = (p - step * torch.autograd.grad(cost, p)[0]).detach()
    assert torch.allclose(found.parameters, p, atol=1e-4)
    assert float((found.parameters - found.predictions[0]).abs().max()) > 1e-2


def test_a_sample_does_not_depend_on_its_batch() -> None:
    truth = tissue(3)
    model = SaturationRecovery(TIMES)
    operator, rhs = problem(model, truth)
    net = network()
    together = net(operator, rhs).parameters
    maps, weights = operator._maps.mT, torch.fft.fftshift(operator._weights[:, :, 0, 0], dim=-1)
    for i in range(3):
        alone = net(BatchedSense(maps[i : i + 1], weights[i : i + 1]), rhs[i : i + 1]).parameters
        assert torch.allclose(alone[0], together[i], atol=2e-5)


def test_gradients_agree_with_finite_differences() -> None:
    truth = tissue(dtype=torch.float64, n=8)
    model = SaturationRecovery(TIMES)
    operator, rhs = problem(model, truth)
    tight = {"linear": LinearSettings(tolerance=1e-12, max_iterations=500), "nonlinear": NonlinearSettings(tolerance=1e-9)}
    torch.manual_seed(3)
    net = Pinqi(model, PinqiSettings(n_iterations=2), networks=SMALL, **tight).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("residual_weight"):
                p.fill_(0.5)  # so that the residual branches matter

    def loss() -> Tensor:
        found = net(operator, rhs)
        return (found.parameters - truth).square().mean() + found.images.abs().square().mean()

    loss().backward()
    for chosen in (
        "lambda_p.raw",
        "lambda_q.raw",
        "lambda_y.raw",
        "image_net.unet.last.weight",
        "parameter_net.unet.last.weight",
    ):
        p = dict(net.named_parameters())[chosen]
        step = 1e-5 * torch.randn(p.shape, dtype=p.dtype, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            p += step
            above = loss()
            p -= 2 * step
            below = loss()
            p += step
        slope = float((p.grad * step).sum())  # type: ignore[operator]
        assert slope == pytest.approx(float(above - below) / 2, rel=1e-4), chosen


def test_gradients_reach_coil_maps_and_data() -> None:
    truth = tissue(n=8)
    model = SaturationRecovery(TIMES)
    fixed, _ = problem(model, truth)
    data = fixed.forward(model.signal(truth.movedim(1, 0)).movedim(0, 1)).detach().requires_grad_()
    maps = fixed._maps.mT.clone().requires_grad_()
    operator = BatchedSense(maps, torch.fft.fftshift(fixed._weights[:, :, 0, 0], dim=-1))
    network(n_iterations=2)(operator, operator.adjoint(data)).parameters.square().mean().backward()
    for tensor in (data, maps):
        assert tensor.grad is not None and tensor.grad.isfinite().all() and float(tensor.grad.abs().max()) > 0


def test_recomputed_activations_give_the_same_gradients() -> None:
    operator, rhs = problem(SaturationRecovery(TIMES), tissue())
    grads = []
    for recompute in (False, True):
        net = network(n_iterations=2, recompute=recompute)
        net(operator, rhs).parameters.square().mean().backward()
        grads.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "ranges"),
    [
        (InversionRecovery((0.1, 0.4, 1.0, 3.0)), None),
        (
            MultiEcho((0.003, 0.006, 0.012, 0.02)),
            (ParameterRange(0.9, 0.2), ParameterRange(0.0, 0.1), ParameterRange(25.0, 5.0), ParameterRange(0.0, 5.0)),
        ),
    ],
)
def test_the_same_code_serves_other_signal_models(model: SignalModel, ranges: tuple[ParameterRange, ...] | None) -> None:
    truth = tissue()
    if len(model.parameter_names) != 3:
        truth = torch.cat((truth[:, :2], torch.full_like(truth[:, :1], 25.0), torch.zeros_like(truth[:, :1])), dim=1)
    operator, rhs = problem(model, truth, sampled=1.0)
    net = Pinqi(model, PinqiSettings(n_iterations=2), ranges=ranges, networks=SMALL)
    found = net(operator, rhs)
    assert found.parameters.shape == truth.shape
    # pulled towards an untrained network, but already nearer than it
    assert (found.parameters - truth)[:, :2].abs().mean() < (found.predictions[0] - truth)[:, :2].abs().mean()


@pytest.mark.parametrize(
    "model",
    [InversionRecovery((0.1, 0.4, 1.0, 3.0)), MultiEcho((0.003, 0.006, 0.012, 0.02))],
    ids=["inversion", "multi-echo"],
)
def test_without_networks_complete_data_give_the_true_maps_of_other_signal_models(model: SignalModel) -> None:
    """R1 of an inversion recovery, R2* and frequency of several echoes."""
    truth = tissue(2)
    if isinstance(model, MultiEcho):
        rate, frequency = 10.0 + 40.0 * (truth[:, 2:] - 0.4) / 1.2, 50.0 * truth[:, 1:2]
        truth = torch.cat((truth[:, :2], rate, frequency), dim=1)
    operator, rhs = problem(model, truth, sampled=1.0)
    ranges = tuple(ParameterRange(float(truth[:, i].mean()), 1.0) for i in range(truth.shape[1]))
    settings = PinqiSettings(n_iterations=8, image_network="none", parameter_network="none")
    found = Pinqi(model, settings, ranges=ranges, networks=SMALL)(operator, rhs)
    for i, name in enumerate(model.parameter_names):
        scale = float(truth[:, i].abs().max())
        assert float((found.parameters - truth)[:, i].detach().abs().max()) < 2e-3 * scale, name
    assert all(r.all_converged for r in found.linear) and all(r.n_unconverged == 0 for r in found.nonlinear)


def test_what_does_not_fit_is_refused() -> None:
    operator, rhs = problem(SaturationRecovery(TIMES), tissue())
    with pytest.raises(DataError, match="4 states"):
        network()(operator, rhs[:, :3])
    with pytest.raises(SettingError, match="image_network"):
        PinqiSettings(image_network="twice")
    with pytest.raises(SettingError, match="parameters"):
        PinqiSettings(parameter_network="none", parameter_solver="network")
    with pytest.raises(SettingError, match="range"):
        Pinqi(MultiEcho((0.003, 0.006)))
