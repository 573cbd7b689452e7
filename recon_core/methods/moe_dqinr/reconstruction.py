"""MoE-dqINR as a method: a plan of stages, each of which leaves what the next one and the operator need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from recon_core.errors import DataError, NumericalError
from recon_core.methods import cg_sense, llr
from recon_core.methods.moe_dqinr.diagnostics import casorati_singular_values, diagnose, numerical_rank
from recon_core.methods.moe_dqinr.fit import FitResult, IterationReport, fit
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.objective import Objective, make_objective
from recon_core.methods.moe_dqinr.settings import Plan, Settings, plan_for
from recon_core.methods.moe_dqinr.warm_start import prefit
from recon_core.problem import Problem, pose
from recon_core.solvers.refinement import consistent, refine
from recon_core.types import ImageSeries, KSpace, Report, Result, ScanInfo

Tensor = torch.Tensor

NAME = "moe_dqinr"
SUMMARY = "Scan-specific mixture-of-experts implicit neural representation"
NEEDS_COIL_MAPS = True
SUPPORTS_3D = False
ROUNDING = 5e-3
"""Hard thresholds flip with the last bit; a tenth of the error that the images have anyway."""

REHEARSAL = {"warm_start": "false", "iterations": "2"}
"""What a worker's rehearsal runs: every import and plan, no time spent on a fit."""

ROUNDING_NOISE = 1e-6
"""Data without noise still have float32's; residuals are measured in units of the noise."""

POLISH_WEIGHT, POLISH_ITERATIONS = 0.03, 10
"""Conjugate gradients from the network's images before the refinement: ``|Ex - y|^2 + 0.03 |x - x_network|^2``."""

SUPPORT_LEVEL = 0.03
"""Pixels below this (peak 1) in every state of the first estimate are air."""

SINGLE_STATE_ITERATIONS = 30
"""Of the conjugate gradients that stand in for ``llr`` where there is one state."""

FAR_FROM_DATA, FAR_FROM_SIGNAL = 3.0, 0.03
"""A state whose residual is so many times the noise, and beyond the noise more than this part of its data (as a root mean square), is
reported: the images do not explain what was measured. With little noise, errors of the coil maps alone are many times as large."""

LEAST_EXPLAINED = 0.5
"""Part of the energy of all data beyond the noise that images must explain to be images: a fit that ended far too soon, or went astray."""

CLEARLY_BETTER = 0.9
"""Part of the low-rank image's error on held-out lines that the network's has to stay below. Less of a lead is none: the low-rank image
in whose place it comes knows those lines as well, and the refined images were worse in nearly all series
(``test_a_network_that_is_hardly_better_is_no_start``)."""


@dataclass
class _Stages:
    """Progress over stages of known weight, monotone from 0 to 1."""

    report: Report
    weights: dict[str, float]
    done: float = 0.0

    def start(self, name: str) -> Callable[[float], None]:
        first, share = self.done, self.weights[name] / sum(self.weights.values())
        self.done = first + share

        def advance(part: float) -> None:
            self.report.progress(first + share * min(1.0, part), name)

        advance(0.0)
        return advance


class _Within(Report):
    """What another method says of itself while it is one of the stages: progress only, warnings are about images that are not sent."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self._advance = advance

    def progress(self, fraction: float, message: str = "") -> None:
        self._advance(fraction)


@dataclass
class _Work:
    """What the stages hand on."""

    problem: Problem
    objective: Objective
    plan: Plan
    stages: _Stages
    order: Tensor
    notes: list[str] = field(default_factory=list)
    quality: dict[str, float] = field(default_factory=dict)
    extras: dict[str, np.ndarray] = field(default_factory=dict)


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """Images of one slice from a representation that was fitted to nothing but its own k-space; complex64 ``(state, z, y, x)``.

    ``paper``: Eq. 1-24 as published, 850 iterations from random parameters. ``default`` and ``cpu``: the network starts from a
    low-rank image and is fitted to all lines but a few; a refinement (collaborative filter in turn with data consistency)
    starts from its images if they predict those lines clearly better than a low-rank image does, else from ``llr`` of all lines.
    ``benchmarks/moe_dqinr.py`` shows what each part adds.

    States must be in the order that the paper wants: frames in time, contrasts by inversion time. Where the header has
    inversion times, states are sorted by them for the network.

    ``extras``: ``routing_weights`` (state, expert) and ``residual_coefficients`` (state, L) in the network's order of states,
    ``loss``, ``held_out`` (n, 2: iteration and error over noise), ``residual_per_state`` (1: noise floor; in the order of the
    images), ``singular_values``.

    Raises
    ------
    DataError, CalibrationError
        See ``recon_core.problem.pose``; also for a 3D slab, which the paper's coordinate (x, y) does not describe.
    NumericalError
        The fit left finite numbers, or its images explain less than half of the data.
    """
    where = f"slice {scan.slice_index}"
    if kspace.is_3d:
        raise DataError(
            "moe_dqinr represents single slices", where=where, got=f"a slab of {kspace.data.shape[-3]}", remedy="Use llr"
        )
    order = order_in_time(scan, kspace.n_states)
    kspace = in_order(kspace, order)
    plan = plan_for(settings, kspace.data.device.type)
    problem = pose(kspace, where, report)
    problem = replace(problem, noise=max(problem.noise, ROUNDING_NOISE))
    objective = make_objective(problem, kspace, plan.held_out, settings.seed)
    work = _Work(problem, objective, plan, _Stages(report, _weights(plan)), order)
    if not bool((problem.rhs != 0).any()):
        report.progress(1.0)
        return Result(images=(ImageSeries("image", problem.leave(torch.zeros_like(problem.rhs))),))
    images = None
    if plan.network:
        # a start for the network, or what it is measured by
        first = _first_estimate(work) if plan.prefit is not None or plan.refinement is not None else None
        images = _network(work, settings, first)
    if plan.refinement is not None:
        images = _refinement(work, _start(work, images))
    assert images is not None
    _judge(work, images, report)
    report.progress(1.0)
    back = torch.argsort(order).to(images.device)
    return Result(
        images=(ImageSeries("image", problem.leave(images[back])),),
        quality=work.quality,
        notes=tuple(work.notes),
        extras=work.extras,
    )


def order_in_time(scan: ScanInfo, n_states: int) -> Tensor:
    """Which state comes first, second, ...: by inversion (or saturation) time where there are some, else as acquired."""
    times = scan.inversion_times or scan.saturation_times
    if len(times) != n_states:
        return torch.arange(n_states)
    return torch.argsort(torch.tensor(times, dtype=torch.float64), stable=True)


def in_order(kspace: KSpace, order: Tensor) -> KSpace:
    """The k-space with its states in this order."""
    if bool((order == torch.arange(len(order))).all()):
        return kspace
    order = order.to(kspace.data.device)
    return kspace.in_order(order)


def _weights(plan: Plan) -> dict[str, float]:
    """Rough shares of the time, for the progress that the operator sees."""
    shares: dict[str, float] = {}
    if plan.network:
        shares |= {"first estimate": 0.1, "warm start": 0.3, "network": 0.15} if plan.prefit else {"network": 0.2}
    if plan.refinement is not None:
        if plan.network:
            shares.setdefault("first estimate", 0.1)
        shares |= {"low-rank image": 0.1, "refinement": 0.4}
    return shares


def _low_rank(problem: Problem, advance: Callable[[float], None]) -> Tensor:
    """``llr`` of a posed problem (``cg_sense`` of a single state): working images."""
    report = _Within(advance)
    if problem.operator.n_states == 1:
        weight = cg_sense.tikhonov_weight(problem.noise, 1.0)
        return cg_sense.solve(problem, weight, SINGLE_STATE_ITERATIONS, 1e-3, report).solution
    return llr.estimate(problem, llr.Settings(), report).solution


def _first_estimate(work: _Work) -> Tensor:
    """The low-rank image of the lines that the network may see."""
    advance = work.stages.start("first estimate")
    first = _low_rank(work.objective.posed(work.problem), advance)
    advance(1.0)
    if work.objective.held_out is not None:
        work.quality["first_estimate_held_out"] = work.objective.held_out.relative_error(first)
    return first


def _network(work: _Work, settings: Settings, first: Tensor | None) -> Tensor:
    """Fit the representation; its working images."""
    plan, operator = work.plan, work.problem.operator
    support = None
    if plan.support and first is not None:
        support = first.abs().amax(0) > SUPPORT_LEVEL
        support = support if bool(support.any()) else None
    moe = MoeField(
        plan.configuration,
        work.objective.n_rows,
        operator.image_shape[1:],
        settings.variant,
        torch.Generator().manual_seed(settings.seed),
        work.problem.rhs.device,
        support=support,
    )
    if plan.prefit is not None and first is not None and settings.variant != "residual_only":
        advance = work.stages.start("warm start")
        prefit(moe, first, plan.prefit, on_iteration=_advancing(advance))
    advance = work.stages.start("network")
    fitted = fit(moe, work.objective, plan.fit, _advancing(advance))
    _keep(work, moe, fitted)
    return fitted.images


def _advancing(advance: Callable[[float], None]) -> Callable[[IterationReport], None]:
    return lambda now: advance(now.iteration / now.iterations)


def _keep(work: _Work, moe: MoeField, fitted: FitResult) -> None:
    found = diagnose(moe, work.objective, fitted.images)
    work.quality |= {
        "network_iterations": float(fitted.iterations),
        "network_residual": float(found.residuals.mean()),
        "network_residual_worst": float(found.residuals.max()),
        "network_rank": float(found.rank),
    }
    if fitted.held_out:
        work.quality["network_held_out"] = min(error for _, error in fitted.held_out)
        work.extras["held_out"] = np.array(fitted.held_out, dtype=np.float64)
    if moe.router is not None:
        work.extras["routing_weights"] = found.routing.numpy()
    if moe.residual is not None:
        work.extras["residual_coefficients"] = moe.residual_coefficients().detach().cpu().numpy()
    work.extras["loss"] = fitted.losses.numpy()


def _start(work: _Work, network: Tensor | None) -> Tensor:
    """Where the refinement starts: the network's images, polished, if they predict the held-out lines clearly better than the
    low-rank image of the same lines does; else the low-rank image of all lines."""
    problem, seen = work.problem, work.objective
    if network is not None and seen.held_out is not None:
        polished = consistent(seen.operator, seen.rhs, network, POLISH_WEIGHT, POLISH_ITERATIONS)
        error = seen.held_out.relative_error(polished)
        better = error < CLEARLY_BETTER * work.quality["first_estimate_held_out"]
        work.quality |= {"network_estimate_held_out": error, "started_from_network": float(better)}
        if better:
            return consistent(problem.operator, problem.rhs, network, POLISH_WEIGHT, POLISH_ITERATIONS)
    advance = work.stages.start("low-rank image")
    if problem.operator.n_states == 1:
        work.notes.append(f"{NAME}: only one state, started from {cg_sense.NAME}")
    start = _low_rank(problem, advance)
    advance(1.0)
    return start


def _refinement(work: _Work, start: Tensor) -> Tensor:
    """Collaborative filter in turn with data consistency, and the part of the start that the answer keeps."""
    settings, problem = work.plan.refinement, work.problem
    assert settings is not None
    advance = work.stages.start("refinement")
    refined = refine(
        problem.operator,
        problem.rhs,
        problem.noise,
        start,
        settings,
        lambda iteration, _: advance((iteration + 1) / settings.iterations),
    )
    part = settings.part_of_start(problem.noise)
    work.quality |= {"refine_iterations": float(settings.iterations), "part_of_start": part}
    return torch.lerp(refined, start, part)


def _judge(work: _Work, images: Tensor, report: Report) -> None:
    """Residual of each state against the noise floor and the rank of the series, of the images that leave."""
    fidelity = _fidelity(work, images)
    residuals = fidelity.residuals
    if not bool(torch.isfinite(residuals).all()):
        raise NumericalError("residuals are not finite", where=NAME)
    explained = fidelity.explained
    if float(residuals.max()) > FAR_FROM_DATA and explained < LEAST_EXPLAINED:
        raise NumericalError(
            "the images do not explain the data",
            where=NAME,
            got=f"{100 * max(0.0, explained):.0f} % of their energy beyond the noise",
            expected=f"at least {100 * LEAST_EXPLAINED:.0f} %",
            remedy="More iterations, or another preset",
        )
    singular = casorati_singular_values(images)
    # the network's order is not the scanner's
    back = torch.argsort(work.order)
    acquired = residuals[back]
    work.extras["residual_per_state"] = acquired.numpy()
    work.extras["singular_values"] = singular.numpy()
    work.quality |= {
        "residual": float(residuals.mean()),
        "residual_worst": float(residuals.max()),
        "rank": float(numerical_rank(singular, len(images), images[0].numel(), work.problem.noise)),
        "noise": work.problem.noise,
    }
    far = torch.where(fidelity.unexplained[back] > FAR_FROM_SIGNAL, acquired, 0.0)
    worst = int(far.argmax())
    if float(far[worst]) > FAR_FROM_DATA:
        text = f"{NAME}: state {worst} explains its data to {float(far[worst]):.1f} times the noise only"
        work.notes.append(text)
        report.warn(text)


@dataclass(frozen=True)
class _Fidelity:
    """Energies of all samples of each state, those that were fitted and those that were held out; float64 ``(state,)``, on the CPU."""

    residual: Tensor
    data: Tensor
    noise: Tensor

    @property
    def residuals(self) -> Tensor:
        """Root mean square over the noise: 1 at the noise floor."""
        return (self.residual / self.noise).sqrt()

    @property
    def unexplained(self) -> Tensor:
        """Root mean square of what the images leave, without the noise, as a part of the data's."""
        signal = (self.data - self.noise).clamp_min(torch.finfo(torch.float64).tiny)
        return ((self.residual - self.noise).clamp_min(0.0) / signal).sqrt()

    @property
    def explained(self) -> float:
        """Part of the energy of all states, without the noise, that the images have; negative where they are worse than none."""
        signal = float((self.data - self.noise).sum())
        return 1.0 - float((self.residual - self.noise).sum()) / signal if signal > 0 else 1.0


def _fidelity(work: _Work, images: Tensor) -> _Fidelity:
    parts = [part for part in (work.objective, work.objective.held_out) if part is not None]
    residual = torch.stack([part.value_and_gradient(images)[0] for part in parts]).sum(0)
    data = torch.stack([part.energy.sum(1) for part in parts]).sum(0)
    n_samples = torch.stack([part.n_samples for part in parts]).sum(0).clamp_min(1)
    return _Fidelity(residual.cpu(), data.cpu(), (n_samples * work.problem.noise**2).cpu())
