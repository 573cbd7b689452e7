"""The loss's gradient in every parameter, and fits on small problems with known truth."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from recon_core.errors import NumericalError, SettingError
from recon_core.methods.moe_dqinr.configurations import TINY
from recon_core.methods.moe_dqinr.diagnostics import casorati_singular_values, diagnose, numerical_rank
from recon_core.methods.moe_dqinr.fit import CPU_CHUNK, FitSettings, IterationReport, fit, memory_plan
from recon_core.methods.moe_dqinr.gradients import Evaluation, Part, activation_bytes
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.objective import Objective, make_objective
from recon_core.problem import pose
from recon_core.types import Report
from tests.recon_core.moe_dqinr.tiny_problem import (
    MIDDLE,
    centred,
    explicit_loss,
    low_rank_series,
    tiny_field,
    tiny_problem,
    tiny_series,
)
from tests.recon_core.small_series import small_series


def gradients(
    field: MoeField, objective: Objective, chunk: int = 0, recompute: bool = False, n_parts: int = 1
) -> list[torch.Tensor]:
    """Of every parameter, summed over parts and divided by their number (each part is scaled up)."""
    field.zero_grad()
    for index in range(n_parts):
        Evaluation(field, Part(field, objective, index, n_parts), chunk, recompute, None)()
    return [p.grad.clone() / n_parts for p in field.parameters() if p.grad is not None]


@pytest.mark.parametrize("variant", ["full", "residual_only", "no_residual"])
@pytest.mark.parametrize("shape", [(1, 12, 10), (1, 9, 12)])
def test_gradient_through_the_paper_s_forward_model(variant: str, shape: tuple[int, int, int]) -> None:
    series = tiny_series(shape)
    problem, objective = tiny_problem(series)
    field = tiny_field(problem, variant=variant)
    loss = explicit_loss(centred(field()), series.kspace, problem.scale)
    expected = torch.autograd.grad(loss, list(field.parameters()))
    for found, wanted in zip(gradients(field, objective), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9 * float(wanted.abs().max()) + 1e-12)


def test_gradient_against_finite_differences() -> None:
    series = tiny_series()
    problem, objective = tiny_problem(series)
    field = tiny_field(problem)
    found = gradients(field, objective)
    generator = torch.Generator().manual_seed(9)
    for parameter, slope in zip(field.parameters(), found, strict=True):
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                parameter.add_(direction, alpha=step)
                values.append(float(explicit_loss(centred(field()), series.kspace, problem.scale)))
                parameter.add_(direction, alpha=-step)
        assert float((slope * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("chunk", "recompute", "n_parts"), [(17, False, 1), (17, True, 1), (0, True, 1), (0, False, 3), (13, True, 4)]
)
def test_chunks_and_parts_change_nothing(chunk: int, recompute: bool, n_parts: int) -> None:
    problem, objective = tiny_problem(tiny_series((1, 9, 11)))
    support = torch.rand((11, 1, 9), generator=torch.Generator().manual_seed(1)) > 0.3
    for cut in (None, support):
        field = tiny_field(problem, support=cut)
        whole = gradients(field, objective)
        for found, wanted in zip(gradients(field, objective, chunk, recompute, n_parts), whole, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_state_normalised_divides_the_data_term() -> None:
    problem, objective = tiny_problem(tiny_series())
    plain = gradients(tiny_field(problem), objective)
    normalised = gradients(tiny_field(problem, configuration=replace(TINY, state_normalised=True)), objective)
    for a, b in zip(plain, normalised, strict=True):
        torch.testing.assert_close(a / 4, b)


def test_one_adam_step_of_eq_24() -> None:
    """The first step of Adam is ``lr g / (|g| + eps)`` with g of Eq. 24: data slope + 2 lambda theta, for the image group only."""
    problem, objective = tiny_problem(tiny_series())
    field = tiny_field(problem)
    decay = 0.7
    slopes = gradients(field, objective)
    before = [p.detach().clone() for p in field.parameters()]
    image_group = {id(p) for p in field.image_parameters()}
    fit(field, objective, FitSettings(iterations=1, weight_decay=decay, eps=1e-3))
    for parameter, start, slope in zip(field.parameters(), before, slopes, strict=True):
        in_image = id(parameter) in image_group
        g = slope + 2 * decay * start if in_image else slope
        step = (1e-3 if in_image else 2e-3) * g / (g.abs() + 1e-3)
        torch.testing.assert_close(parameter.detach(), start - step, rtol=1e-9, atol=1e-12)


def test_decay_leaves_the_state_group_alone() -> None:
    problem, objective = tiny_problem(tiny_series())
    nothing = replace(
        objective,
        rhs=torch.zeros_like(objective.rhs),
        operator=objective.operator.with_weights(objective.operator.weights * 0),
    )
    field = tiny_field(problem)
    image, state = [[p.detach().clone() for p in group] for group in (field.image_parameters(), field.state_parameters())]
    fit(field, nothing, FitSettings(iterations=20, weight_decay=1.0))
    for parameter, old in zip(field.image_parameters(), image, strict=True):
        # numbers below the learning rate only jump across zero
        assert float(parameter.detach().norm()) < float(old.norm())
    assert all(torch.equal(p.detach(), old) for p, old in zip(field.state_parameters(), state, strict=True))


def test_same_seed_same_bits() -> None:
    problem, objective = tiny_problem(tiny_series(), held_out=0.2)
    settings = FitSettings(iterations=12, column_parts=3, chunk=32, report_every=4)
    first, again = (fit(tiny_field(problem), objective, settings) for _ in range(2))
    assert torch.equal(first.images, again.images) and torch.equal(first.losses, again.losses)
    other = fit(tiny_field(problem, seed=1), objective, settings)
    assert not torch.equal(first.images, other.images)


def small_fit(held_out: float = 0.0) -> tuple[Objective, MoeField]:
    problem, objective = tiny_problem(tiny_series((1, 24, 20)), held_out)
    return objective, tiny_field(problem, configuration=MIDDLE)


SCHEDULED = FitSettings(iterations=300, schedule="cosine", lr_image=1e-2, lr_state=1e-2)


@pytest.mark.parametrize("settings", [SCHEDULED, replace(SCHEDULED, iterations=400, column_parts=4)], ids=["whole", "parts"])
def test_fit_reaches_the_noise_floor(settings: FitSettings) -> None:
    objective, field = small_fit()
    result = fit(field, objective, settings)
    assert result.iterations == result.best_iteration == settings.iterations == len(result.losses)
    assert float(result.losses[-20:].mean()) < 0.03 * float(result.losses[0])
    found = diagnose(field, objective, result.images)
    assert found.residuals.shape == (4,) and 0.6 < float(found.residuals.min()) <= float(found.residuals.max()) < 1.3
    assert found.routing.shape == (4, 5) and 1 <= found.rank <= 4
    assert objective.relative_error(result.images) == pytest.approx(float(found.residuals.square().mean().sqrt()), rel=0.05)
    torch.testing.assert_close(result.images, field.images())
    images = sum(float(p.detach().square().sum()) for p in field.image_parameters())
    assert result.penalty == pytest.approx(1e-4 * images, rel=1e-9)


def test_held_out_returns_the_best() -> None:
    settings = FitSettings(iterations=120, report_every=10, patience=2, lr_image=2e-2)
    objective, field = small_fit(held_out=0.2)
    seen: list[IterationReport] = []
    result = fit(field, objective, settings, seen.append)
    errors = dict(result.held_out)
    assert [r.iteration for r in seen] == list(errors) and [r.held_out for r in seen] == list(errors.values())
    assert errors[result.best_iteration] == min(errors.values())
    assert objective.held_out is not None
    assert objective.held_out.relative_error(result.images) == pytest.approx(min(errors.values()), rel=1e-6)
    torch.testing.assert_close(result.images, field.images())
    # two looks without a better one end the fit
    assert result.iterations == settings.iterations or result.iterations == result.best_iteration + 20


def test_one_state() -> None:
    problem, objective = tiny_problem(tiny_series((1, 12, 10), n_states=1))
    result = fit(tiny_field(problem), objective, FitSettings(iterations=60, lr_image=1e-2))
    assert result.images.shape == (1, 10, 1, 12)
    assert float(result.losses[-1]) < 0.5 * float(result.losses[0])


def test_bfloat16_loss_stays_close() -> None:
    series = small_series((1, 12, 10), 4, 3)
    problem = pose(series.kspace, "test", Report())
    objective = make_objective(problem, series.kspace)
    values, slopes = [], []
    for precision in (None, torch.bfloat16):
        field = tiny_field(problem, configuration=MIDDLE).float()
        values.append(float(Evaluation(field, Part(field, objective), 0, False, precision)().sum()))
        slopes.append(torch.cat([p.grad.flatten() for p in field.parameters() if p.grad is not None]))
    assert 0 < abs(values[1] / values[0] - 1) < 0.01
    # 8 bits in every product
    assert float((slopes[1] - slopes[0]).norm() / slopes[0].norm()) < 0.03


def test_not_finite_is_an_error() -> None:
    problem, objective = tiny_problem(tiny_series())
    field = tiny_field(problem)
    with torch.no_grad():
        field.encoder.table[0] = float("nan")
    with pytest.raises(NumericalError, match="not finite"):
        fit(field, objective, FitSettings(iterations=2, report_every=1))


def test_settings_are_checked() -> None:
    with pytest.raises(SettingError, match="cosine"):
        FitSettings(schedule="linear")
    with pytest.raises(SettingError, match="start at 1"):
        FitSettings(iterations=0)
    assert FitSettings(schedule="cosine", iterations=100).rate(0) == 1.0
    assert FitSettings(schedule="cosine", iterations=100).rate(100) == pytest.approx(0.01)


def test_activations_are_counted() -> None:
    field = MoeField(TINY, 3, (6, 1, 6))
    # background 8 x 1, three experts 8 x 2, two residual 4 x 1: 8 + 48 + 8 hidden values; in and out of SiLU, 4 bytes, 36 pixels
    assert activation_bytes(field, 36, None) == 2 * 64 * 36 * 4


def test_memory_plan() -> None:
    field = MoeField(TINY, 3, (6, 1, 6))
    assert memory_plan(field, 36, FitSettings(), None) == (CPU_CHUNK, False)
    assert memory_plan(field, 36, FitSettings(chunk=7, recompute=True), None) == (7, True)
    # 64 hidden values, in and out, 4 bytes: 4 GiB are reached at 8,388,608 pixels; half of the bytes in half precision
    assert memory_plan(field, 8_388_609, FitSettings(), None) == (CPU_CHUNK, True)
    assert memory_plan(field, 8_388_609, FitSettings(), torch.bfloat16) == (CPU_CHUNK, False)


def test_rank_is_counted_above_the_noise() -> None:
    series = low_rank_series(6, 30, 28, 3)
    generator = torch.Generator().manual_seed(2)
    noise = 0.01 * torch.randn(series.shape, dtype=torch.complex128, generator=generator)
    values = casorati_singular_values(series + noise)
    assert numerical_rank(values, 6, 840, 0.01) == 3
    assert numerical_rank(values, 6, 840, 0.0) == 6
    assert numerical_rank(casorati_singular_values(series), 6, 840, 0.0) == 3
    torch.testing.assert_close(values, torch.linalg.svdvals((series + noise).flatten(1)))
