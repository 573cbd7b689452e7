"""The scan-specific optimisation: Eq. 24 by Adam with two parameter groups, held-out samples, best parameters returned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import field as dataclass_field

import torch

from recon_core.batches import batch
from recon_core.errors import NumericalError, SettingError
from recon_core.methods.moe_dqinr.adam import Adam, Group
from recon_core.methods.moe_dqinr.gradients import PRECISIONS as PRECISIONS
from recon_core.methods.moe_dqinr.gradients import Evaluation, Part, activation_bytes, matmul_precision
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.objective import Target

Tensor = torch.Tensor

SCHEDULES = ("constant", "cosine")

CPU_BYTES = 4 << 30
"""On a CPU, intermediate values up to this many bytes are kept for the gradient, larger ones computed again."""

CUDA_SHARE = 0.5
"""On CUDA, this share of the memory that is free may be kept."""

LEAST_CHUNK = 256
"""Pixels: smaller products are slow everywhere."""

CPU_CHUNK = 1024
"""Pixels at a time on a CPU: a layer of seven experts stays in the cache (measured: 7.1 s for 4096, 6.8 s for 1024, 10.5 s for all)."""

WARM_UP = 3
"""Iterations before a CUDA graph is captured: they make the libraries' plans and work space."""


@dataclass(frozen=True)
class FitSettings:
    """How the parameters are found.

    Attributes
    ----------
    iterations
        850 in the paper (section 3.6).
    lr_image, lr_state
        Initial learning rates of the image-generating group and of router and residual coefficients (section 3.6).
    schedule, lr_end
        The paper says "initial" learning rate and names no schedule. ``cosine`` ends at ``lr_end`` times the start.
    betas, eps
        Adam's; not in the paper, torch's default.
    weight_decay
        lambda_wd of Eq. 24; ``None``: the configuration's.
    chunk, recompute
        Pixels at a time (0: by the device) and whether intermediate values are computed again (``None``: by their size).
    precision
        Of the MLPs' products: one of ``PRECISIONS``.
    cuda_graph
        On CUDA: replay one captured step.
    column_parts
        Each iteration uses every n-th readout column, in random order; 1: all columns, as in the paper.
    report_every
        Iterations between calls of ``on_iteration`` and looks at the held-out samples.
    patience
        Looks without a better held-out error before the fit stops; 0: never stops early.
    seed
        Of the order of column parts.
    """

    iterations: int = 850
    lr_image: float = 1e-3
    lr_state: float = 2e-3
    schedule: str = "constant"
    lr_end: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | None = None
    chunk: int = 0
    recompute: bool | None = None
    precision: str = "float32"
    cuda_graph: bool = True
    column_parts: int = 1
    report_every: int = 10
    patience: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("schedule", self.schedule, SCHEDULES), ("precision", self.precision, PRECISIONS)):
            if value not in known:
                raise SettingError(
                    "unknown value", where=f"fit.{name}", got=repr(value), expected="one of " + ", ".join(known)
                )
        if min(self.iterations, self.report_every, self.column_parts) < 1 or min(self.chunk, self.patience) < 0:
            raise SettingError("iterations, report_every and column_parts start at 1, chunk and patience at 0", where="fit")

    def rate(self, iteration: int) -> float:
        """Factor on both learning rates."""
        if self.schedule == "constant":
            return 1.0
        return self.lr_end + (1 - self.lr_end) * 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))


@dataclass(frozen=True)
class IterationReport:
    """How far the fit is: ``iteration`` are done, ``loss`` is Eq. 23's value, ``held_out`` the relative error on unseen samples."""

    iteration: int
    iterations: int
    loss: float
    held_out: float | None


@dataclass(frozen=True)
class FitResult:
    """Outcome of a fit; the field holds the parameters that belong to ``images``.

    Attributes
    ----------
    images
        complex working images ``(state, x, z, y)`` in scaled units.
    losses
        float64 ``(iteration,)``: Eq. 23 *before* each step, all states (scaled up where a step sees a part of the columns).
    penalty
        ``lambda_wd |theta_img|^2`` of Eq. 24 at the end.
    held_out
        ``(iteration, error)``: RMS residual of the samples kept out over the noise's standard deviation.
    iterations, best_iteration
        Steps done, and the number of steps after which the returned parameters were reached.
    """

    images: Tensor
    losses: Tensor
    penalty: float
    held_out: tuple[tuple[int, float], ...]
    iterations: int
    best_iteration: int


def fit(
    field: MoeField,
    objective: Target,
    settings: FitSettings | None = None,
    on_iteration: Callable[[IterationReport], None] | None = None,
) -> FitResult:
    """Minimise Eq. 24 over the parameters of ``field``, in place, from where they are.

    ``L = sum_q |A_q x_q - b_q|^2 (/ Q where the configuration says so) + lambda_wd |theta_img|^2``, the penalty through Adam's
    L2 term. k-space is scaled so that images peak near 1 (``recon_core.problem``); the sum of squares, and with it the strength
    of lambda_wd, depends on that scale, which the paper does not state.

    With samples held out, the parameters with the smallest held-out error are put back at the end.

    Parameters
    ----------
    field
        On the device and in the precision of the objective's operator.
    objective
        ``make_objective(problem, kspace, held_out=...)``.
    on_iteration
        Called every ``report_every`` iterations and after the last; whatever it raises ends the fit.

    Raises
    ------
    NumericalError
        The loss is not finite.
    """
    return _Fit(field, objective, settings or FitSettings(), on_iteration).run()


def memory_plan(field: MoeField, n_pixels: int, settings: FitSettings, precision: torch.dtype | None) -> tuple[int, bool]:
    """Pixels at a time (0: all) and whether intermediate values are computed again, by the device's memory unless set."""
    device = field.encoder.table.device
    on_cuda = device.type == "cuda"
    budget = batch(round(CUDA_SHARE * torch.cuda.mem_get_info(device)[0]) if on_cuda else CPU_BYTES)
    needed = activation_bytes(field, n_pixels, precision)
    recompute = needed > budget if settings.recompute is None else settings.recompute
    if settings.chunk:
        return settings.chunk, recompute
    if not on_cuda:
        return max(LEAST_CHUNK, batch(CPU_CHUNK)), recompute
    if not recompute:
        return 0, False
    # as many pixels as fit, in chunks of equal size; twice as many chunks as would just do
    n_chunks = 2 * max(1, -(-needed // max(1, budget)))
    return max(LEAST_CHUNK, -(-n_pixels // n_chunks)), True


@dataclass
class _Best:
    error: float = math.inf
    iteration: int = 0
    looks_since: int = 0
    parameters: list[Tensor] = dataclass_field(default_factory=list)


class _Fit:
    def __init__(
        self,
        field: MoeField,
        objective: Target,
        settings: FitSettings,
        on_iteration: Callable[[IterationReport], None] | None,
    ) -> None:
        self.field, self.objective, self.settings, self.on_iteration = field, objective, settings, on_iteration
        self.device = field.encoder.table.device
        self.on_cuda = self.device.type == "cuda"
        self.decay = field.configuration.weight_decay if settings.weight_decay is None else settings.weight_decay
        self.precision = torch.bfloat16 if settings.precision == "bfloat16" else None
        n_parts = min(settings.column_parts, field.spatial_shape[0])
        parts = [Part(field, objective, index, n_parts) for index in range(n_parts)]
        self.chunk, recompute = memory_plan(field, parts[0].product.n_pixels, settings, self.precision)
        self.evaluations = [Evaluation(field, part, self.chunk, recompute, self.precision) for part in parts]
        self.optimiser = self._adam()
        self.graph: torch.cuda.CUDAGraph | None = None
        self.losses = torch.zeros(settings.iterations, dtype=torch.float64, device=self.device)
        self.value = torch.zeros(objective.n_rows, dtype=torch.float64, device=self.device)
        self.best = _Best()
        self.held_out: list[tuple[int, float]] = []

    def _adam(self) -> Adam:
        s, field = self.settings, self.field

        def rate(value: float) -> float | Tensor:
            # a captured graph reads its learning rates from memory
            return torch.tensor(value, device=self.device) if self.on_cuda else value

        groups = [
            # d/dtheta of lambda |theta|^2 is 2 lambda theta; Adam adds weight_decay * theta
            Group(field.image_parameters(), rate(s.lr_image), weight_decay=2 * self.decay),
            Group(field.state_parameters(), rate(s.lr_state)),
        ]
        return Adam(groups, betas=s.betas, eps=s.eps, captured=self.on_cuda)

    def run(self) -> FitResult:
        s, done = self.settings, 0
        order = torch.Generator().manual_seed(s.seed)
        queue: list[int] = []
        with matmul_precision(s.precision):
            for iteration in range(s.iterations):
                queue = queue or torch.randperm(len(self.evaluations), generator=order).tolist()
                self._set_rates(s.rate(iteration))
                self._step(self.evaluations[queue.pop()], iteration)
                self.losses[iteration] = self.value.sum()
                done = iteration + 1
                if (done % s.report_every == 0 or done == s.iterations) and not self._look(done):
                    break
            return self._result(done)

    def _set_rates(self, factor: float) -> None:
        starts = (self.settings.lr_image, self.settings.lr_state)
        for group, start in zip(self.optimiser.groups, starts, strict=False):
            if isinstance(group.rate, Tensor):
                group.rate.fill_(start * factor)
            else:
                group.rate = start * factor

    def _plain_step(self, evaluation: Evaluation) -> None:
        self.optimiser.forget_gradients()
        self.value.copy_(evaluation())
        self.optimiser.step()

    def _step(self, evaluation: Evaluation, iteration: int) -> None:
        captures = self.on_cuda and self.settings.cuda_graph and len(self.evaluations) == 1
        if not captures:
            return self._plain_step(evaluation)
        if iteration < WARM_UP:
            # capture wants its warm-up on a side stream
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._plain_step(evaluation)
            torch.cuda.current_stream().wait_stream(side)
            return None
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.optimiser.forget_gradients()
            with torch.cuda.graph(self.graph):
                self._plain_step(evaluation)
        self.graph.replay()
        return None

    def _look(self, done: int) -> bool:
        """Check, report, remember the best; False when the fit should stop."""
        loss = float(self.losses[done - 1])
        if not math.isfinite(loss):
            raise NumericalError("the loss is not finite", where="moe_dqinr fit", got=f"iteration {done}")
        error = None
        if self.objective.held_out is not None:
            # images after this step: those of the evaluation are one step older
            error = self.objective.held_out.relative_error(self._images())
            self.held_out.append((done, error))
            self._remember(error, done)
        if self.on_iteration is not None:
            self.on_iteration(IterationReport(done, self.settings.iterations, loss, error))
        return not (self.settings.patience and self.best.looks_since >= self.settings.patience)

    def _remember(self, error: float, done: int) -> None:
        if error < self.best.error:
            kept = [p.detach().clone() for p in self.field.parameters()]
            self.best = _Best(error, done, 0, kept)
        else:
            self.best.looks_since += 1

    def _images(self) -> Tensor:
        return self.field.images(self.chunk, self.precision)

    def _result(self, done: int) -> FitResult:
        best_iteration = done
        if self.best.parameters:
            best_iteration = self.best.iteration
            with torch.no_grad():
                for parameter, kept in zip(self.field.parameters(), self.best.parameters, strict=True):
                    parameter.copy_(kept)
        self.optimiser.forget_gradients()
        images = self._images()
        if not bool(torch.isfinite(torch.view_as_real(images)).all()):
            raise NumericalError("images are not finite", where="moe_dqinr fit", got=f"iteration {best_iteration}")
        penalty = self.decay * sum(float(p.detach().double().square().sum()) for p in self.field.image_parameters())
        return FitResult(images, self.losses[:done].cpu(), penalty, tuple(self.held_out), done, best_iteration)
