"""Value, gradient and split of the data term against the paper's forward model written out on the 2D k-space."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.methods.moe_dqinr.objective import choose_lines, make_objective
from tests.recon_core.moe_dqinr.tiny_problem import NOISE, centred, explicit_loss, tiny_problem, tiny_series


def some_images(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.complex128, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(1, 12, 10), (1, 9, 12), (1, 7, 5)])
def test_value_and_gradient_are_those_of_eq_23(shape: tuple[int, int, int]) -> None:
    series = tiny_series(shape)
    problem, objective = tiny_problem(series)
    images = some_images(problem.operator.image_shape).requires_grad_()
    loss = explicit_loss(centred(images), series.kspace, problem.scale)
    loss.backward()
    value, gradient = objective.value_and_gradient(images.detach())
    assert float(value.sum()) == pytest.approx(float(loss.detach()), rel=1e-10)
    assert images.grad is not None
    torch.testing.assert_close(2 * gradient, images.grad, rtol=1e-9, atol=1e-10)


def test_truth_leaves_the_noise() -> None:
    series = tiny_series((1, 30, 28))
    problem, objective = tiny_problem(series)
    truth = problem.operator.enter_image(torch.from_numpy(series.images)) / problem.scale
    assert objective.noise == pytest.approx(NOISE / problem.scale)
    # 4 states x about 16 lines x 3 coils x 28 columns = 5,000 samples: 1 % standard deviation
    assert objective.relative_error(truth) == pytest.approx(1.0, abs=0.05)
    residuals = objective.relative_residuals(truth)
    assert residuals.tolist() == pytest.approx([1.0] * 4, abs=0.1)
    # a channel without a receiver changes nothing
    k = series.kspace
    assert k.coil_maps is not None
    silent = replace(
        series,
        kspace=replace(
            k,
            data=torch.cat([k.data, torch.zeros_like(k.data[:, :1])], 1),
            coil_maps=torch.cat([k.coil_maps, torch.zeros_like(k.coil_maps[:1])]),
        ),
    )
    torch.testing.assert_close(tiny_problem(silent)[1].relative_residuals(truth), residuals)


def test_split_is_complete_and_leaves_the_centre() -> None:
    series = tiny_series((1, 40, 10))
    problem, whole = tiny_problem(series)
    _, split = tiny_problem(series, held_out=0.2)
    assert split.held_out is not None
    images = some_images(problem.operator.image_shape)
    value, gradient = whole.value_and_gradient(images)
    parts = [part.value_and_gradient(images) for part in (split, split.held_out)]
    torch.testing.assert_close(parts[0][0] + parts[1][0], value)
    torch.testing.assert_close(parts[0][1] + parts[1][1], gradient)
    torch.testing.assert_close(split.n_samples + split.held_out.n_samples, whole.n_samples)
    kept_out = split.held_out.operator.weights > 0
    assert series.kspace.acs_mask is not None
    assert not bool(kept_out[:, series.kspace.acs_mask].any())
    candidates = (series.kspace.mask & ~series.kspace.acs_mask & ~series.kspace.mask.all(0)).flatten(1).sum(1)
    assert kept_out.flatten(1).sum(1).tolist() == [round(0.2 * int(n)) for n in candidates]


def test_split_depends_on_the_seed_alone() -> None:
    kspace = tiny_series((1, 40, 10)).kspace
    assert torch.equal(choose_lines(kspace, 0.3, 5), choose_lines(kspace, 0.3, 5))
    assert not torch.equal(choose_lines(kspace, 0.3, 5), choose_lines(kspace, 0.3, 6))


def test_nothing_to_hold_out() -> None:
    series = tiny_series((1, 4, 6))  # calibration lines only
    problem, objective = tiny_problem(series, held_out=0.2)
    assert objective.held_out is None
    with pytest.raises(SettingError, match="held-out"):
        make_objective(problem, series.kspace, 0.9)


def test_columns_add_up() -> None:
    problem, objective = tiny_problem(tiny_series((1, 12, 11)))
    images = some_images(problem.operator.image_shape)
    value, gradient = objective.value_and_gradient(images)
    total = torch.zeros_like(value)
    for first in range(3):
        part_value, part_gradient = objective.columns(first, 3).value_and_gradient(images[:, first::3])
        total += part_value
        torch.testing.assert_close(part_gradient, gradient[:, first::3])
    torch.testing.assert_close(total, value)


def test_operator_with_other_weights() -> None:
    series = tiny_series((1, 9, 8))
    problem, _ = tiny_problem(series)
    weights = problem.operator.weights
    torch.testing.assert_close(weights, series.kspace.counts.double())
    images = some_images(problem.operator.image_shape)
    half = problem.operator.with_weights(weights / 2)
    torch.testing.assert_close(half.normal(images), problem.operator.normal(images) / 4)
    torch.testing.assert_close(problem.operator.weights, weights)  # the first one is as it was
    assert half.with_weights(weights[:2]).n_states == 2
    with pytest.raises(DataError, match="weights do not fit"):
        half.with_weights(weights[:, :, :5])
