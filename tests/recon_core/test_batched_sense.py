"""The operator for batches: the centred model, equality with the operator for one slice, gradients to the coil maps."""

from __future__ import annotations

import pytest
import torch

from recon_core.errors import DataError
from recon_core.fourier import fft_centred
from recon_core.operators.batched_sense import BatchedSense
from recon_core.operators.cartesian import CartesianSense

C128 = torch.complex128


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=C128, generator=torch.Generator().manual_seed(seed))


def weights(*shape: int) -> torch.Tensor:
    values = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    return torch.where(values > 0.4, values, 0)


@pytest.mark.parametrize("n_y", [6, 7])
def test_is_the_centred_model(n_y: int) -> None:
    """Maps, then centred FFT, then weights; with the phase of the uncentred transform in the data alone."""
    maps, image, w = noise(2, 3, n_y, 5), noise(2, 4, n_y, 5, seed=1), weights(2, 4, n_y)
    operator = BatchedSense(maps, w)
    kspace = fft_centred(image[:, :, None] * maps[:, None], -2)
    inside = operator.forward(operator.enter_image(image))
    torch.testing.assert_close(inside, operator.enter_data(kspace), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(operator.leave_image(operator.enter_image(image)), image)


@pytest.mark.parametrize("n_y", [6, 7])
def test_a_sample_is_the_slice_of_the_cartesian_operator(n_y: int) -> None:
    maps, image, w = noise(2, 3, n_y, 5), noise(2, 4, n_y, 5, seed=1), weights(2, 4, n_y)
    kspace = noise(2, 4, 3, n_y, 5, seed=2)
    batched = BatchedSense(maps, w)
    normal = batched.leave_image(batched.normal(batched.enter_image(image)))
    projected = batched.leave_image(batched.adjoint(batched.enter_data(kspace)))
    for b in range(2):
        single = CartesianSense(maps[b, :, None], w[b][:, None])
        expected = single.leave_image(single.normal(single.enter_image(image[b][:, None])))[:, 0]
        torch.testing.assert_close(normal[b], expected, rtol=1e-12, atol=1e-12)
        expected = single.leave_image(single.project(kspace[b][:, :, None], 1.0))[:, 0]
        torch.testing.assert_close(projected[b], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("part", ["forward", "adjoint", "normal"])
def test_gradient_to_the_coil_maps(part: str) -> None:
    w = weights(2, 2, 5)
    argument = noise(2, 2, 3, 4, 5, seed=1) if part == "adjoint" else noise(2, 2, 4, 5, seed=1)

    def function(maps: torch.Tensor, argument: torch.Tensor) -> torch.Tensor:
        applied: torch.Tensor = getattr(BatchedSense(maps, w), part)(argument)
        return applied

    assert torch.autograd.gradcheck(function, (noise(2, 3, 5, 4).requires_grad_(), argument.requires_grad_()))


@pytest.mark.parametrize("largest", [1, 3 * 6 * 2, 3 * 6 * 5 * 3, 3 * 6 * 5 * 4 * 2])
def test_blocks_do_not_change_the_answer(monkeypatch: pytest.MonkeyPatch, largest: int) -> None:
    """Blocks of columns, of states and of samples, neither of which divides its axis."""
    maps, w, x, g = noise(3, 3, 6, 5), weights(3, 4, 6), noise(3, 4, 5, 6), noise(3, 4, 5, 6, seed=1)
    answers = []
    for block in (1 << 30, largest):
        monkeypatch.setattr("recon_core.operators.batched_sense.CPU_BLOCK", block)
        leaf = maps.clone().requires_grad_()
        normal = BatchedSense(leaf, w).normal(x)
        normal.backward(g)
        assert leaf.grad is not None
        answers.append((normal.detach(), leaf.grad))
    for whole, parts in zip(*answers, strict=True):
        torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)


def test_keeps_no_coil_image_for_the_gradient() -> None:
    """Training would need their memory once per iteration of the network."""
    operator = BatchedSense(noise(2, 3, 6, 5).requires_grad_(), weights(2, 4, 6))
    image = noise(2, 4, 5, 6).requires_grad_()
    kept: list[int] = []

    def remember(t: torch.Tensor) -> torch.Tensor:
        kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        operator.normal(image)
    assert sum(kept) == image.numel()


def test_an_image_of_another_batch_is_named() -> None:
    with pytest.raises(DataError, match="wrong shape"):
        BatchedSense(noise(2, 3, 6, 5), weights(2, 4, 6)).normal(noise(1, 4, 5, 6))
