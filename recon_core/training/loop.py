"""A training loop that can be stopped at any moment and resumed to the same bits.

What is learned, from what and against what comes as a `Task`; the loop brings AdamW with groups, linear warm-up and cosine decay,
clipping, skipped outliers, a time limit, checkpoints, a CSV log and validation. Everything that a step depends on is a
function of its number (data, learning rate) or in the checkpoint (weights, optimiser, moving average, random generators).
"""

from __future__ import annotations

import logging
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from recon_core.errors import NumericalError, SettingError
from recon_core.training.checkpoint import (
    WeightError,
    load_into,
    optimizer_tensors,
    random_state,
    read_pair,
    restore_optimizer,
    restore_random_state,
    write_pair,
)
from recon_core.training.log import TrainingLog

Tensor = torch.Tensor
log = logging.getLogger(__name__)
CHECKPOINT = "checkpoint"
LOG = "log.csv"
Figure = float | Callable[[], float]
"""For the log; what only the backward pass knows is asked for after it."""

LONGEST_STREAK = 50  # skipped steps in a row: by then the training has diverged


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that learn at the same pace.

    Attributes
    ----------
    learning_rate
        The schedule's peak.
    weight_decay
        AdamW's, decoupled.
    """

    name: str
    parameters: list[nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Validation:
    """Figures by name, and images for the eye: float arrays ``(y, x)`` or ``(y, x, 3)`` in [0, 1], ready to become PNGs."""

    figures: Mapping[str, float]
    images: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)


class Task(Protocol):
    """What is trained. ``loss`` must depend on the step's number and the weights alone (and torch's generator)."""

    @property
    def module(self) -> nn.Module:
        """What is trained."""

    def groups(self) -> list[ParameterGroup]:
        """The parameters, in a fixed order."""

    def loss(self, step: int) -> tuple[Tensor, Mapping[str, Figure]]:
        """Of the step's batch, and figures for the log."""

    def validate(self, step: int) -> Validation:
        """On held-out samples; called without gradients."""

    def facts(self) -> Mapping[str, Any]:
        """JSON that a checkpoint must agree with to be resumed: recipe, seed, architecture."""


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, how often.

    Attributes
    ----------
    steps
        Optimiser steps of the whole schedule.
    warmup_steps, final_rate
        Learning rate: linear from near 0 to the peak, then a cosine to ``final_rate`` times the peak.
    clip_norm
        Largest norm of all gradients together.
    skip_above
        A batch with a greater loss, or with gradients that are not finite, changes nothing.
    ema_decay
        Of a moving average of the weights, which is then validated and exported; 0 for none.
    max_minutes
        Stop after this time, resumably; infinite by default.
    checkpoint_minutes
        Time between checkpoints; one is always written at the end.
    validate_every, log_every
        Steps; 0 for never.
    """

    steps: int
    warmup_steps: int = 1500
    final_rate: float = 0.025
    clip_norm: float = 1.0
    skip_above: float = 5.0
    betas: tuple[float, float] = (0.9, 0.999)
    ema_decay: float = 0.0
    max_minutes: float = math.inf
    checkpoint_minutes: float = 10.0
    validate_every: int = 0
    log_every: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup_steps < 0 or not 0 <= self.ema_decay < 1 or not self.max_minutes > 0:
            raise SettingError("impossible schedule", where="training", got=self)

    def rate(self, step: int) -> float:
        """Learning rate of a step (from 0) as a part of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.final_rate + (1 - self.final_rate) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class Progress:
    """What a progress callback is told after every step."""

    step: int
    steps: int
    loss: float
    minutes: float
    figures: Mapping[str, float]
    validation: Validation | None = None


@dataclass(frozen=True)
class TrainingResult:
    """How a call ended.

    Attributes
    ----------
    step
        Steps done in all, this call's and earlier ones'.
    finished
        The schedule is complete.
    minutes
        Time spent in all calls.
    skipped
        Steps that changed nothing.
    figures
        Of the last validation.
    """

    step: int
    finished: bool
    minutes: float
    skipped: int
    figures: Mapping[str, float]

    @property
    def skipped_words(self) -> str:
        """Of steps that changed nothing, behind a comma; nothing without any."""
        return f", {self.skipped} of {self.step} steps skipped" if self.skipped else ""


def train(
    task: Task,
    settings: LoopSettings,
    output: str | Path,
    *,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: threading.Event | None = None,
) -> TrainingResult:
    """Train until the schedule ends, the time is up, or the process is asked to stop (SIGINT, SIGTERM); resumable in any case.

    Resumed to the same bits on the same device, by the same number of CPU threads and the same torch; with others that is logged.

    Parameters
    ----------
    output
        Folder for ``checkpoint.json`` and its tensors and ``log.csv``; made if need be.
    resume
        Go on from the checkpoint there; begin anew if there is none. Without it, a folder that has a checkpoint is refused.
    progress
        Called after every step. If it raises, training stops without a checkpoint.
    stop
        Of a caller that listens for signals itself, see `asked_to_stop`; ``None``: they are listened for here.

    Returns
    -------
    TrainingResult
        The task's module holds the trained weights, those of the moving average if there is one.

    Raises
    ------
    SettingError
        The folder holds another training, or a step needs more memory than there is.
    WeightError
        The checkpoint is damaged.
    NumericalError
        Fifty batches in a row had to be skipped.
    """
    run = _Run(task, settings, Path(output))
    run.begin(resume)
    with asked_to_stop() if stop is None else nullcontext(stop) as asked:
        run.work(asked, progress)
    return run.result()


class _Run:
    """One call of `train`: the state that a checkpoint holds, and what happens to it."""

    def __init__(self, task: Task, settings: LoopSettings, output: Path) -> None:
        self.task, self.settings, self.output = task, settings, output
        self.groups = task.groups()
        self.optimizer = torch.optim.AdamW(
            [{"params": g.parameters, "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in self.groups],
            betas=settings.betas,
        )
        self.average: dict[str, Tensor] | None = None
        if settings.ema_decay:
            self.average = {k: v.detach().clone() for k, v in task.module.state_dict().items()}
        self.step = self.skipped = self.streak = 0
        self.minutes_before = 0.0
        self.started = self.saved = time.monotonic()
        self.figures: dict[str, float] = {}
        self.log = TrainingLog(output / LOG)

    @property
    def minutes(self) -> float:
        """Of training, in this call and before."""
        return self.minutes_before + (time.monotonic() - self.started) / 60

    # ------------------------------------------------------------------------------------------------- checkpoints

    def begin(self, resume: bool) -> None:
        """Load the checkpoint, or check that there is none."""
        path = self.output / f"{CHECKPOINT}.json"
        if path.exists():
            if not resume:
                raise SettingError(
                    "the folder holds a training", where=self.output.name, remedy="resume it, or name another one"
                )
            self._load(path)
        self.log.forget_after(self.step)

    def save(self) -> None:
        """Write a checkpoint of the state after ``self.step`` steps."""
        generators, generator_facts = random_state()
        tensors = {f"module/{k}": v for k, v in self.task.module.state_dict().items()}
        tensors |= {f"optimizer/{k}": v for k, v in optimizer_tensors(self.optimizer).items()}
        tensors |= {f"random/{k}": v for k, v in generators.items()}
        tensors |= {f"average/{k}": v for k, v in (self.average or {}).items()}
        facts = {
            "step": self.step,
            "skipped": self.skipped,
            "streak": self.streak,
            "minutes": self.minutes,
            "figures": self.figures,
            "random": generator_facts,
            "schedule": self._schedule(),
            "task": dict(self.task.facts()),
            "computed": computed_by(self.groups[0].parameters[0].device),
        }
        write_pair(self.output, CHECKPOINT, tensors, facts, version=f"-{self.step}")
        self.saved = time.monotonic()

    def _load(self, path: Path) -> None:
        try:
            tensors, facts = read_pair(path)
        except WeightError as error:
            raise self._damaged(path, f": {error.what}", error.got, error.expected) from None
        try:
            if facts["task"] != _as_json(self.task.facts()) or facts["schedule"] != _as_json(self._schedule()):
                raise SettingError(
                    "the checkpoint belongs to another training",
                    where=path.name,
                    got=_difference(facts, {"task": self.task.facts(), "schedule": self._schedule()}),
                    remedy="resume with the settings it was begun with, or name another folder",
                )
            parts = {k: _under(tensors, k) for k in ("module", "optimizer", "random", "average")}
            load_into(self.task.module, parts["module"], path.name)
            restore_optimizer(self.optimizer, parts["optimizer"])
            if self.average is not None:
                self.average = {k: v.to(self.average[k].device) for k, v in parts["average"].items()}
            try:
                restore_random_state(parts["random"], facts["random"])
            except RuntimeError as error:
                raise ValueError(f"random generators: {error}") from None
            self.step, self.skipped, self.streak = int(facts["step"]), int(facts["skipped"]), int(facts["streak"])
            self.minutes_before, self.figures = float(facts["minutes"]), dict(facts["figures"])
            self._tell_of_other_bits(facts.get("computed", {}))
        except KeyError as error:
            raise self._damaged(path, "", f"no {error}") from None
        except (
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
        ) as error:  # of JSON of other types, and of tensors of other sizes
            raise self._damaged(path, "", f"{type(error).__name__}: {error}") from None
        if not 0 <= self.step <= self.settings.steps:
            raise self._damaged(path, "", f"step {self.step}", f"0 to {self.settings.steps}")

    def _tell_of_other_bits(self, stated: Mapping[str, Any]) -> None:
        """A sum in another order has other last bits, and a training turns them into other weights."""
        own = computed_by(self.groups[0].parameters[0].device)
        if stated and stated != own and self.step < self.settings.steps:
            log.warning(
                "%s: resumed otherwise than it was begun (%s): the weights will differ from those of a training in one go",
                self.output.name,
                _difference({"": stated}, {"": own}),
            )

    def _damaged(self, path: Path, why: str, got: object, expected: object = None) -> WeightError:
        return WeightError(
            f"the checkpoint is damaged{why}",
            where=f"{self.output.name}/{path.name}",
            got=got,
            expected=expected,
            remedy=f"put both files back from a copy, or remove {path.name}: this phase then begins anew",
        )

    def _schedule(self) -> dict[str, Any]:
        """What changes the result; limits of time and frequencies of reports do not."""
        s = self.settings
        rates = {g.name: [g.learning_rate, g.weight_decay] for g in self.groups}
        names = ("steps", "warmup_steps", "final_rate", "clip_norm", "skip_above", "betas", "ema_decay")
        return {"groups": rates, **{n: getattr(s, n) for n in names}}

    # ---------------------------------------------------------------------------------------------------- the steps

    def work(self, stop: threading.Event, progress: Callable[[Progress], None] | None) -> None:
        """Steps until there is a reason to end."""
        settings = self.settings
        deadline, begun = self.started + settings.max_minutes * 60, self.step
        while self.step < settings.steps and not stop.is_set() and time.monotonic() < deadline:
            with _memory(self.step):
                loss, figures = self._one_step()
            self.step += 1
            last = self.step == settings.steps
            validation = None
            if settings.validate_every and (self.step % settings.validate_every == 0 or last):
                with _memory(self.step):
                    validation = self._validate()
            if settings.log_every and (self.step % settings.log_every == 0 or last or validation is not None):
                seen = {} if validation is None else validation.figures
                row = {"minutes": round(self.minutes, 3), "loss": loss, "skipped": self.skipped, **figures}
                self.log.add(self.step, row, seen)
            if time.monotonic() - self.saved > settings.checkpoint_minutes * 60 or validation is not None:
                self.save()
            if progress is not None:
                progress(Progress(self.step, settings.steps, loss, self.minutes, figures, validation))
        if self.step > begun or not (self.output / f"{CHECKPOINT}.json").exists():
            self.save()

    def _one_step(self) -> tuple[float, dict[str, float]]:
        rate = self.settings.rate(self.step)
        for group, own in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = own.learning_rate * rate
        self.task.module.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss, figures = self.task.loss(self.step)
        value = float(loss.detach())
        # a NaN compares false: it is skipped too
        good = value <= self.settings.skip_above
        norm = math.nan
        if good:
            loss.backward()
            parameters = [p for group in self.groups for p in group.parameters]
            norm = float(nn.utils.clip_grad_norm_(parameters, self.settings.clip_norm))
            good = math.isfinite(norm)
        if good:
            self.optimizer.step()
            self._follow()
        self.streak = 0 if good else self.streak + 1
        self.skipped += not good
        if self.streak >= LONGEST_STREAK:
            raise NumericalError(
                "training diverged",
                where=f"step {self.step}",
                got=f"{self.streak} skipped batches in a row, the last with a loss of {value:.3g} and gradients of {norm:.3g}",
                expected=f"a loss up to {self.settings.skip_above:g}, finite gradients",
                remedy="begin anew with lower rates, or smaller weights of what is added to the loss",
            )
        known = {name: figure() if callable(figure) else figure for name, figure in figures.items()}
        return value, {**known, "gradient_norm": norm, "rate": rate}

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights."""
        if self.average is None:
            return
        # in the first steps the average follows more quickly, or it would remember the random start
        decay = min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))
        for name, value in self.task.module.state_dict().items():
            self.average[name].lerp_(value, 1 - decay) if value.is_floating_point() else self.average[name].copy_(value)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The module with averaged weights."""
        if self.average is None:
            yield
            return
        own = {k: v.detach().clone() for k, v in self.task.module.state_dict().items()}
        self.task.module.load_state_dict(self.average)
        try:
            yield
        finally:
            self.task.module.load_state_dict(own)

    def _validate(self) -> Validation:
        self.task.module.eval()
        # validation may draw random numbers: training must not notice
        tensors, facts = random_state()
        with torch.no_grad(), self._averaged():
            validation = self.task.validate(self.step)
        restore_random_state(tensors, facts)
        self.figures = {k: float(v) for k, v in validation.figures.items()}
        return validation

    def result(self) -> TrainingResult:
        """The end of the call."""
        finished = self.step >= self.settings.steps
        if self.average is not None:
            self.task.module.load_state_dict(self.average)
        return TrainingResult(self.step, finished, self.minutes, self.skipped, self.figures)


def computed_by(device: torch.device) -> dict[str, Any]:
    """What the last bits of a sum depend on: device, the number of threads where it is the CPU, and torch."""
    facts: dict[str, Any] = {"device": device.type, "torch": torch.__version__}
    if device.type == "cuda":
        return facts | {"device": torch.cuda.get_device_name(device)}
    return facts | {"threads": torch.get_num_threads()}


@contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets: the step in progress is completed. A second signal acts as it did before.

    A training of several phases holds one for all of them: what arrives in the last step of a phase, or between two, stops the next.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals belong to the main thread
        return
    before: dict[signal.Signals, Any] = {}

    def ask(number: int, _: Any) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _memory(step: int) -> Iterator[None]:
    """Say in words that there is too little of it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error)
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in words:
            raise
        amount = re.search(r"tried to allocate ([\d.]+ ?\w+)", words, re.IGNORECASE)
        raise SettingError(
            "too little memory",
            where=f"training, step {step}",
            got="none left" if amount is None else f"no {amount[1]} more",
            remedy="train with --recompute, --precision bfloat16, a smaller --batch or smaller scans",
        ) from None


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}/"): v for k, v in tensors.items() if k.startswith(f"{prefix}/")}


def _as_json(facts: Any) -> Any:
    """As it comes back from a file: tuples are lists."""
    if isinstance(facts, Mapping):
        return {str(k): _as_json(v) for k, v in facts.items()}
    return [_as_json(v) for v in facts] if isinstance(facts, (list, tuple)) else facts


def _difference(stated: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The settings that differ, as ``name: theirs, not ours``."""
    parts = []
    for room, values in own.items():
        mine, theirs = _as_json(values), stated.get(room, {})
        if not isinstance(theirs, Mapping):
            parts.append(f"{room}: {theirs}")
            continue
        parts += [
            f"{k}: {theirs.get(k)}, not {mine.get(k)}" for k in sorted({*mine, *theirs}) if mine.get(k) != theirs.get(k)
        ]
    return "; ".join(parts)
