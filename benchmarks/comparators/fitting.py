"""What the neural comparators share: the data term in parts, positions of pixels and states, and one loop of Adam.

The data term ``|A x - b|^2 / 2`` is a sum over readout columns (the readout is transformed already) and over states. A stochastic
step on a few of them has the right expectation and a fraction of the cost. Its gradient with respect to the *image*,
``A^H A x - A^H b``, is formed by hand; autograd only carries it into the network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from recon_core.operators.cartesian import CartesianSense
from recon_core.problem import Problem, pose
from recon_core.settings import setting
from recon_core.training.loop import LoopSettings
from recon_core.types import ImageSeries, KSpace, Report, Result, ScanInfo

Tensor = torch.Tensor

LAST_RATE = 0.05
"""Learning rate at the end, as a part of the first (cosine)."""


@dataclass(frozen=True)
class FitSettings:
    """How long and how fast; a comparator adds its sizes and changes a default."""

    iterations: int = setting(400, "stochastic steps", low=1, high=100000)
    learning_rate: float = setting(4e-3, "of Adam", low=1e-6, high=1.0)
    seed: int = setting(0, "of initial values", low=0, high=2**31)


@dataclass(frozen=True)
class Part:
    """Some states and readout columns of a problem.

    ``states``, ``columns`` int64; ``rhs`` ``A^H b`` in the operator's working layout.
    """

    states: Tensor
    columns: Tensor
    operator: CartesianSense
    rhs: Tensor

    def residual(self, images: Tensor) -> Tensor:
        """``A^H A x - A^H b`` for working images, without a graph."""
        with torch.no_grad():
            return self.operator.normal(images.detach()) - self.rhs


def split(problem: Problem, kspace: KSpace, *, column_groups: int = 1, state_groups: int = 1) -> list[Part]:
    """A problem as a sum: every ``n``-th column or state belongs to one part. Sampled positions weigh alike (no averages)."""
    weights = kspace.mask.to(kspace.counts.dtype)
    operator = problem.operator.with_weights(weights)
    n_states, n_x = kspace.n_states, kspace.data.shape[-1]
    rhs = operator.project(kspace.data, problem.scale)
    parts = []
    for state_group in range(min(state_groups, n_states)):
        states = torch.arange(state_group, n_states, min(state_groups, n_states), device=rhs.device)
        for column_group in range(min(column_groups, n_x)):
            step = min(column_groups, n_x)
            columns = torch.arange(column_group, n_x, step, device=rhs.device)
            some = operator.with_weights(weights[states]).with_columns(slice(column_group, None, step))
            parts.append(Part(states, columns, some, rhs[states][:, columns].contiguous()))
    return parts


def pixel_positions(kspace: KSpace, columns: Tensor) -> Tensor:
    """``(y, x)`` from -1 to 1 of the centred pixels of some columns, float32 ``(y * column, 2)``.

    Raises
    ------
    ValueError
        A 3D slab: the comparators are for slices.
    """
    if kspace.is_3d:
        raise ValueError("the comparators reconstruct slices, not slabs")
    n_y, n_x = kspace.data.shape[-2:]
    y = 2 * (torch.arange(n_y, device=columns.device) + 0.5) / n_y - 1
    x = 2 * (columns + 0.5) / n_x - 1
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).reshape(-1, 2).float()


def state_positions(scan: ScanInfo, n_states: int) -> tuple[Tensor, bool]:
    """Where each state lies from 0 to 1, and whether that axis is a circle.

    Cardiac phases go round; contrasts are ordered by inversion time (rank, not time: the paper's normalised state index).
    """
    times = scan.inversion_times
    if len(times) == n_states:
        rank = torch.tensor(times, dtype=torch.float64).argsort().argsort()
        return (rank / max(1, n_states - 1)).float(), False
    return torch.arange(n_states).float() / n_states, True


def temporal_order(scan: ScanInfo, n_states: int) -> Tensor:
    """The states sorted along their axis, int64."""
    return state_positions(scan, n_states)[0].argsort()


def descend(
    parts: list[Part],
    render: Callable[[Part], Tensor],
    groups: Sequence[Mapping[str, object]],
    settings: FitSettings,
    report: Report,
    name: str,
    penalty: Callable[[Tensor, Part], Tensor] | None = None,
) -> list[float]:
    """Adam on ``|A x - b|^2 / (2 n) + penalty(x)``, one part drawn at a time (each once before any twice).

    Parameters
    ----------
    render
        Part to centred images, complex64 ``(state, z, y, column)``, with a graph.
    groups
        Adam's, the rate where the settings' does not hold.
    penalty
        Of those images; mean values, so that its weight does not depend on the matrix.

    Returns
    -------
    Relative size of the gradient's residual ``|A^H (A x - b)| / |A^H b|`` of each iteration.
    """
    optimiser = torch.optim.Adam([dict(group) for group in groups], lr=settings.learning_rate, eps=1e-15)
    schedule = LoopSettings(max(1, settings.iterations - 1), warmup_steps=0, final_rate=LAST_RATE)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule.rate)
    generator = torch.Generator().manual_seed(settings.seed)
    order: list[int] = []
    history = []
    for iteration in range(settings.iterations):
        if not order:
            order = torch.randperm(len(parts), generator=generator).tolist()
        part = parts[order.pop()]
        optimiser.zero_grad(set_to_none=True)
        images = render(part)
        working = part.operator.enter_image(images)
        residual = part.residual(working)
        history.append(float(residual.norm() / part.rhs.norm().clamp_min(1e-30)))
        losses: list[Tensor] = [working]
        gradients: list[Tensor | None] = [residual / residual.numel()]
        if penalty is not None:
            losses.append(penalty(images, part))
            gradients.append(None)
        torch.autograd.backward(losses, gradients)
        optimiser.step()
        rates.step()
        report.progress((iteration + 1) / settings.iterations, name)
    return history


def render_all(parts: list[Part], render: Callable[[Part], Tensor], n_states: int, shape: tuple[int, ...]) -> Tensor:
    """All parts put together: centred complex64 ``(state, z, y, x)``."""
    out = torch.zeros((n_states, *shape), dtype=torch.complex64, device=parts[0].rhs.device)
    with torch.no_grad():
        for part in parts:
            out[part.states[:, None], :, :, part.columns[None, :]] = render(part).permute(0, 3, 1, 2)
    return out


def finish(
    problem: Problem, kspace: KSpace, parts: list[Part], render: Callable[[Part], Tensor], history: list[float]
) -> Result:
    """The images of all parts in measured units, with the iterations and the residual's course."""
    images = render_all(parts, render, kspace.n_states, tuple(kspace.data.shape[2:]))
    return Result(
        images=(ImageSeries("image", (images * problem.scale).to(torch.complex64)),),
        quality={"iterations": float(len(history)), "residual": history[-1]},
        extras={"residual_history": history},
    )


def start(kspace: KSpace, scan: ScanInfo, report: Report, seed: int) -> Problem:
    """The scaled problem, and the random numbers of the networks' initial values."""
    torch.manual_seed(seed)
    return pose(kspace, f"slice {scan.slice_index}", report)
