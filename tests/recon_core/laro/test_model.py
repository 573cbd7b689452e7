"""The planes' operator, temporal fusion, both networks and their gradients."""

from __future__ import annotations

import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.methods.laro.model import LEAST_SQUARES_WEIGHT, Laro, LaroSettings, TemporalFusion
from recon_core.operators.planes import Planes
from recon_core.solvers.linear_layer import LinearSettings, solve_linear

SMALL = LaroSettings(channels=4, features=(4, 4), unrolls=2)


def problem(n_planes: int = 2, n_echoes: int = 3, axes: tuple[int, ...] = (-2, -1)) -> tuple[Planes, torch.Tensor]:
    """Double precision, everything random; odd and even sizes."""
    g = torch.Generator().manual_seed(1)
    maps = torch.randn(n_planes, 4, 6, 9, dtype=torch.complex128, generator=g)
    maps = maps / maps.abs().square().sum(1, keepdim=True).sqrt()
    mask = (torch.rand(n_echoes, 6 if -2 in axes else 1, 9, generator=g) < 0.5).double()
    images = torch.randn(n_planes, n_echoes, 6, 9, dtype=torch.complex128, generator=g)
    return Planes(maps, mask, axes), images


@pytest.mark.parametrize("axes", [(-2, -1), (-1,)])
def test_normal_is_the_adjoint_of_the_sampled_forward(axes: tuple[int, ...]) -> None:
    operator, x = problem(axes=axes)
    y = torch.randn_like(x)
    with torch.no_grad():
        assert torch.allclose(operator.adjoint(operator.forward(x)), operator.normal(x))
    assert torch.allclose(operator.adjoint(operator.forward(x)), operator.normal(x.requires_grad_()))
    left = (operator.normal(x) * y.conj()).sum()
    assert torch.allclose(left, (x * operator.normal(y).conj()).sum())


def test_the_gradient_reaches_positions_that_were_not_sampled() -> None:
    operator, x = problem()
    sampling = operator.sampling.clone().requires_grad_()
    learned = Planes(operator._maps, sampling)
    solution = exact(learned, learned.adjoint(operator.forward(x)))
    (gradient,) = torch.autograd.grad((solution - x).abs().square().sum(), sampling)
    assert (gradient[sampling == 0] != 0).all()
    # against differences: one sample more or less of an unsampled position
    place = tuple((sampling == 0).nonzero()[0].tolist())
    values = []
    for step in (-1e-4, 1e-4):
        moved = sampling.detach().clone()
        moved[place] += step
        changed = Planes(operator._maps, moved)
        with torch.no_grad():
            found = exact(changed, changed.adjoint(operator.forward(x)))
            values.append(float((found - x).abs().square().sum()))
    expected = (values[1] - values[0]) / 2e-4
    assert float(gradient[place]) == pytest.approx(expected, rel=1e-4)


def exact(operator: Planes, rhs: torch.Tensor) -> torch.Tensor:

    settings = LinearSettings(1e-10, 500, n_batch_axes=2)
    return solve_linear(operator, rhs, [(LEAST_SQUARES_WEIGHT, torch.zeros_like(rhs))], settings=settings)[0]


def test_fusion_sees_earlier_echoes_only_or_all() -> None:
    torch.manual_seed(0)
    images = torch.randn(1, 4, 2, 8, 8)
    changed = images.clone()
    changed[:, 2] += torch.randn(1, 2, 8, 8)
    for recurrent, direction, moved in (
        (True, "forward", [False, False, True, True]),
        (True, "both", [True] * 4),
        (False, "both", [False, False, True, False]),
    ):
        fusion = TemporalFusion(4, recurrent=recurrent, direction=direction)
        difference = (fusion(images) - fusion(changed)).abs().amax((0, 2, 3, 4)) > 1e-6
        assert difference.tolist() == moved, (recurrent, direction)


@pytest.mark.parametrize("direction", ["forward", "both"])
def test_fusion_is_equation_8(direction: str) -> None:
    torch.manual_seed(1)
    fusion = TemporalFusion(4, recurrent=True, direction=direction)
    images = torch.randn(1, 4, 2, 6, 7)

    def states(order: list[int]) -> dict[int, torch.Tensor]:
        found: dict[int, torch.Tensor] = {}
        past = torch.zeros(1, 4, 6, 7)
        for j in order:
            from_state = fusion.norm_state(fusion.from_state(past)) if found else past
            found[j] = past = (fusion.norm_image(fusion.from_image(images[:, j])) + from_state).clamp_min(0)
        return found

    onwards, back = states([0, 1, 2, 3]), states([3, 2, 1, 0])
    expected = torch.stack([onwards[j] + (back[j] if direction == "both" else 0) for j in range(4)], dim=1)
    torch.testing.assert_close(fusion(images), expected)


class Dimming(torch.nn.Module):
    """A denoiser that takes off a part of what it is given, another one in every echo."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.linspace(0.1, 0.4, images.shape[1])[:, None, None] * images


@pytest.mark.parametrize("kind", ["laro", "modl"])
def test_iterations_are_those_of_equation_7(kind: str) -> None:
    """Against dense matrices: ``v = z - D z`` with ``z = x + w``, ``(A^H A + rho) x = A^H b + rho (v - w)``, ``w += x - v``."""
    settings = LaroSettings(
        kind, channels=4, features=(4, 4), unrolls=4, n_echoes=3 * (kind == "modl"), cg_tolerance=1e-12, cg_iterations=200
    )
    network = Laro(settings).double()
    network.denoiser = Dimming()
    operator, truth = problem()
    size = truth[0].numel()  # the planes do not meet: one matrix for each
    rhs = operator.adjoint(operator.forward(truth))
    units = torch.eye(size, dtype=truth.dtype).reshape(size, *truth.shape[1:])
    start = torch.randn_like(truth)
    with torch.no_grad():
        found = network(operator, rhs, start)
        for plane in range(len(truth)):
            one = Planes(operator._maps[plane : plane + 1].expand(size, -1, -1, -1), operator.sampling)
            matrix = one.normal(units).reshape(size, size).T + 0.1 * torch.eye(size)
            x, w = start[plane], torch.zeros_like(truth[plane])
            for images in found:
                z = x + w
                v = z - Dimming()(z[None])[0]
                x = torch.linalg.solve(matrix, (rhs[plane] + 0.1 * (v - w)).reshape(-1)).reshape(x.shape)
                w = torch.zeros_like(w) if kind == "modl" else w + x - v
                torch.testing.assert_close(images[plane], x, rtol=1e-6, atol=1e-8)


def test_the_defaults_are_the_papers() -> None:
    settings = LaroSettings()
    assert (settings.unrolls, settings.channels, settings.fusion) == (10, 64, 1)


@pytest.mark.parametrize("n_echoes", [1, 2, 5])
def test_any_number_of_echoes(n_echoes: int) -> None:
    network = Laro(SMALL)
    operator, images = problem(1, n_echoes)
    operator = Planes(operator._maps.to(torch.complex64), operator.sampling.float())
    rhs = operator.adjoint(operator.forward(images.to(torch.complex64)))
    found = network(operator, rhs, rhs, unrolls=3)
    assert len(found) == 3 and all(f.shape == rhs.shape for f in found)


def test_modl_has_its_number_of_echoes() -> None:
    network = Laro(LaroSettings(kind="modl", features=(6,), n_echoes=3, unrolls=1))
    operator, images = problem(1, 4)
    operator = Planes(operator._maps.to(torch.complex64), operator.sampling.float())
    rhs = operator.adjoint(operator.forward(images.to(torch.complex64)))
    with pytest.raises(DataError, match="number of echoes"):
        network(operator, rhs, rhs)


def test_an_idle_denoiser_leaves_data_consistency_alone() -> None:
    network = Laro(LaroSettings(channels=4, features=(4, 4), unrolls=8, cg_tolerance=1e-8, cg_iterations=200)).double()
    for parameter in network.denoiser.unet.last.parameters():  # type: ignore[union-attr]
        torch.nn.init.zeros_(parameter)
    operator, truth = problem()
    full = Planes(operator._maps, torch.ones(3, 6, 9, dtype=torch.float64))
    rhs = full.adjoint(full.forward(truth))
    with torch.no_grad():
        found = network(full, rhs, torch.zeros_like(rhs))[-1]
    # the fixed point of the iterations fits the data; rho only decides how soon
    assert float((found - truth).norm() / truth.norm()) < 1e-3


def test_the_gradient_of_the_unrolled_network_is_that_of_differences() -> None:
    torch.manual_seed(3)
    settings = LaroSettings(channels=2, features=(2, 2), unrolls=2, cg_tolerance=1e-9, cg_iterations=300)
    network = Laro(settings).double()
    operator, truth = problem(1, 2)
    rhs = operator.adjoint(operator.forward(truth))

    def loss() -> torch.Tensor:
        return (network(operator, rhs, rhs)[-1] - truth).abs().square().mean()

    loss().backward()
    for parameter in (network.log_rho, network.denoiser.fusion.from_state.weight, network.denoiser.unet.last.weight):  # type: ignore[union-attr]
        assert isinstance(parameter, torch.nn.Parameter) and parameter.grad is not None
        flat, gradient = parameter.data.reshape(-1), parameter.grad.reshape(-1)
        place = int(gradient.abs().argmax())
        values = []
        for step in (-1e-5, 1e-5):
            flat[place] += step
            with torch.no_grad():
                values.append(float(loss()))
            flat[place] -= step
        assert float(gradient[place]) == pytest.approx((values[1] - values[0]) / 2e-5, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "unet"}, {"fusion": 2}, {"direction": "back"}, {"unrolls": 0}, {"kind": "modl"}, {"precision": "float8"}],
)
def test_architectures_that_do_not_exist(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingError):
        LaroSettings(**wrong)  # type: ignore[arg-type]
