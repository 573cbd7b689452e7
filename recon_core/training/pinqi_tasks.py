"""What PINQI is trained on and for: the recipe, the pretraining of its networks, the training of the whole."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from recon_core.errors import SettingError
from recon_core.methods.pinqi.figures import t1_figures, t1_from_rate
from recon_core.methods.pinqi.model import ABLATIONS, AS_LEARNED, STARTS, Pinqi, PinqiOutput, PinqiSettings, Strengths
from recon_core.methods.pinqi.networks import PREDICTIONS
from recon_core.methods.pinqi.noise_rule import DEFAULT_RULE, NoiseRule, acceleration_of
from recon_core.methods.pinqi.start import first_images
from recon_core.methods.pinqi.weights import TIME_TOLERANCE
from recon_core.operators.batched_sense import BatchedSense
from recon_core.problem import Problem, pose, signal_scale
from recon_core.simulation.anatomy import Anatomy
from recon_core.simulation.quantitative_brain import SATURATION_TIMES, BrainBatch, QuantitativeBrains, SampleRecipe
from recon_core.solvers.linear_layer import LinearReport
from recon_core.solvers.nonlinear_layer import NonlinearReport, NonlinearSettings
from recon_core.training.loop import Figure, LoopSettings, ParameterGroup, Validation
from recon_core.training.losses import deep_supervision, weighted_mse
from recon_core.training.pinqi_samples import HeldBatches, NoiseFactors, Posed
from recon_core.training.runs import TrainingRecipe
from recon_core.types import KSpace, Report

Tensor = torch.Tensor

PRETRAINED = ("both", "parameter", "image")
NOISE_FACTORS = ("none", "fixed", "learned")
LONGEST_T1 = 5.0  # s: how wrong a longer one is does not matter to the loss
LONGEST_DELAY = 60.0  # s: everything has recovered long before; delays in ms are above it
LEAST_DENSITY = 0.05  # of what is not air
EVALUATION_SEED = 20240415  # of validation and test samples, whatever the training's seed is
TYPICAL_SAMPLES = 32
SHOWN_T1 = 3.0  # s: white in pictures


@dataclass(frozen=True)
class PinqiRecipe(TrainingRecipe):
    """Everything that decides the result of a training; the defaults are the paper's and its code's.

    Attributes
    ----------
    ablation
        Key of `ABLATIONS`.
    size, times, n_coils, accelerations
        Of the samples.
    rate_spread, spread_part
        See `SampleRecipe`; training only.
    atlas_share
        Part of the training samples that are drawn from the atlas where a BrainWeb folder gives the others; 0 as published.
    columns
        Train on strips of so many readout positions, 0 for whole slices; validation always sees whole slices.
    batch, epochs, samples_per_epoch
        16 heads with 122 slices each are an epoch; 80 epochs are about 156,000 samples.
    pretrain_epochs
        Of the networks alone, on mixtures of the truth and the first images.
    pretrain_networks
        ``"both"``, or one of them: ``"parameter"``, ``"image"``.
    reuse
        Steps of the pretraining with the same samples, each with its own tag, mixture and noise: first images that take longer than
        a step are made once.
    t1_weight
        Added to the published losses: mean absolute error of T1 (s, up to `LONGEST_T1` of either) in the brain, times this. 0 as published.
    image_weight
        Added to the published losses of the training end to end: mean squared error of what the image network gives in its calls, brain 1,
        elsewhere 0.1, times this; in ablation h so is the published loss, which is of images too. 0 as published.
    image_rate
        Learning rate of the image network in the training end to end; 0: that of both, ``network_rate``.
    first_weight, other_weight
        Deep supervision: of the first prediction, and of the others but the last.
    ema_decay
        Moving average of the weights; the paper has none.
    start, prediction
        Images from which the iterations begin, and what the parameter network gives, see `PinqiSettings`.
    pretrain_scale
        Factor on the published learning rates of the pretraining.
    held
        Batches of the training end to end that are made once, with their first images, and used in turn, see `HeldBatches`; 0: always
        new ones.
    noise_factors
        In the training end to end, lambdas count with factors that follow the noise of the sample, as they do in use: those of the
        initial weights (``"fixed"``), or ``"learned"`` from there on. ``"none"`` as published.
    n_iterations
        T of Eq. 12 and 13; 0: the ablation's, 5 as published.
    nonlinear_solver
        Of Eq. 13, see `NonlinearSettings`: ``"lm"``, or ``"lbfgs"`` as published.
    initial_sha256
        sha256 of the weights from which the networks began; empty: random ones.
    """

    ablation: str = "proposed"
    start: str = "adjoint"
    prediction: str = "direct"
    pretrain_networks: str = "both"
    reuse: int = 1
    t1_weight: float = 0.0
    pretrain_scale: float = 1.0
    held: int = 0
    noise_factors: str = "none"
    n_iterations: int = 0
    image_weight: float = 0.0
    image_rate: float = 0.0
    nonlinear_solver: str = "lm"
    initial_sha256: str = ""
    size: int = 192
    times: tuple[float, ...] = SATURATION_TIMES
    n_coils: int = 8
    accelerations: tuple[float, ...] = (4.0, 5.0, 6.0, 7.0, 8.0)
    rate_spread: float = 1.0
    spread_part: float = 1.0
    atlas_share: float = 0.0
    columns: int = 0
    batch: int = 16
    epochs: float = 80.0
    pretrain_epochs: float = 1.0
    samples_per_epoch: int = 1952
    seed: int = 0
    precision: str = "float32"
    network_rate: float = 0.004
    lambda_rate: float = 0.001
    embedding_rate: float = 0.002
    warmup_steps: int = 1500
    first_weight: float = 0.1
    other_weight: float = 0.05
    ema_decay: float = 0.0
    n_validation: int = 4

    def __post_init__(self) -> None:
        if self.ablation not in ABLATIONS:
            raise SettingError("unknown ablation", where="PINQI training", got=self.ablation, expected=", ".join(ABLATIONS))
        if self.start not in STARTS:
            raise SettingError("unknown start", where="PINQI training", got=self.start, expected=", ".join(STARTS))
        for name, known in (
            ("prediction", PREDICTIONS),
            ("pretrain_networks", PRETRAINED),
            ("noise_factors", NOISE_FACTORS),
        ):
            if getattr(self, name) not in known:
                raise SettingError(
                    f"unknown {name}", where="PINQI training", got=getattr(self, name), expected=", ".join(known)
                )
        NonlinearSettings.of(self.nonlinear_solver)  # raises
        if not 0 <= self.atlas_share < 1:
            raise SettingError(
                "no part of the samples", where="PINQI training", got=self.atlas_share, expected="0 or more, below 1"
            )
        if self.noise_factors != "none" and self.batch != 1:
            raise SettingError(
                "factors follow the noise of one sample",
                where="PINQI training",
                got=f"batch {self.batch}",
                expected="batch 1",
            )
        self.check_numbers(
            "PINQI training",
            ("batch", "reuse", "samples_per_epoch", "network_rate", "pretrain_scale", "rate_spread"),
            ("epochs", "pretrain_epochs", "t1_weight", "image_weight", "first_weight", "other_weight", "image_rate",
             "lambda_rate", "embedding_rate", "warmup_steps", "n_validation", "held", "n_iterations"),
        )  # fmt: skip
        if self.epochs + self.pretrain_epochs == 0:
            raise SettingError("impossible recipe", where="PINQI training", got=self)
        self._check_samples()
        self.loop(self.epochs, pretraining=False)  # raises

    def _check_samples(self) -> None:
        """See that samples can be made: in the middle of a training is late for that."""
        samples = replace(
            self.samples, columns=self.columns, rate_spread=self.rate_spread, spread_part=self.spread_part
        )  # raises
        _ = samples.model  # raises too
        steps = np.diff(sorted(self.times))
        if len(self.times) < 2 or max(self.times) > LONGEST_DELAY or steps.min() <= TIME_TOLERANCE:
            raise SettingError(
                "not the delays of a T1 map",
                where="PINQI training",
                got=", ".join(f"{t:g}" for t in self.times) + " s",
                expected=f"two or more, more than 1 ms apart, none above {LONGEST_DELAY:g} s",
                remedy="state them in seconds, one for each state",
            )
        for acceleration in self.accelerations:
            if not 1 <= acceleration < math.inf:
                raise SettingError("not an acceleration", where="PINQI training", got=acceleration, expected="1 or more")
            lines = round(self.size / acceleration)
            if lines < samples.acs:
                raise SettingError(
                    "fewer lines than calibration lines",
                    where="PINQI training",
                    got=f"{lines} of {self.size} lines at acceleration {acceleration:g}",
                    expected=f"{samples.acs} or more",
                    remedy=f"take a size of {math.ceil(samples.acs * acceleration)}, or lower accelerations",
                )

    def facts(self) -> dict[str, Any]:
        """As JSON; later choices are left out where they are the usual ones, so that trainings from before there was a choice go on."""
        facts = super().facts()
        usual: dict[str, Any] = {"nonlinear_solver": "lm", "held": 0, "noise_factors": "none"}
        usual |= {"n_iterations": 0, "image_weight": 0.0, "image_rate": 0.0, "atlas_share": 0.0}
        return {key: value for key, value in facts.items() if key not in usual or value != usual[key]}

    @property
    def samples(self) -> SampleRecipe:
        """How whole slices are acquired."""
        return SampleRecipe(self.size, self.times, self.n_coils, self.accelerations)

    def steps(self, epochs: float) -> int:
        """Optimiser steps of so many epochs, at least one."""
        return max(1, round(epochs * self.samples_per_epoch / self.batch))

    @property
    def n_pretraining(self) -> int:
        """Steps of the pretraining; none where there is nothing to pretrain."""
        choice = ABLATIONS[self.ablation]
        networks = {choice.image_network, choice.parameter_network} - {"none"}
        return self.steps(self.pretrain_epochs) if self.pretrain_epochs and networks else 0

    @property
    def n_training(self) -> int:
        """Steps end to end; without epochs none."""
        return self.steps(self.epochs) if self.epochs else 0

    def loop(self, epochs: float, *, pretraining: bool, **limits: Any) -> LoopSettings:
        """Settings of the loop; a schedule too short for the published warm-up warms up for a fifth of it."""
        steps = self.steps(epochs)
        return LoopSettings(
            steps,
            warmup_steps=min(self.warmup_steps, steps // 5),
            clip_norm=10.0 if pretraining else 1.0,
            ema_decay=0.0 if pretraining else self.ema_decay,
            **limits,
        )


class TrainingSamples:
    """Batches by step number, on a GPU made while the step before is computed.

    Parameters
    ----------
    brains
        The supply.
    batch
        Samples per step.
    first
        Number of step 0's first sample: pretraining and training draw different ones.
    """

    def __init__(self, brains: QuantitativeBrains, batch: int, first: int = 0) -> None:
        self._brains, self._batch, self._first = brains, batch, first
        self._ahead: tuple[int, Future[BrainBatch]] | None = None
        self._pool = ThreadPoolExecutor(1, "samples") if brains.device.type == "cuda" else None

    def batch(self, step: int) -> BrainBatch:
        """The samples of a step."""
        if self._pool is None:
            return self._make(step)
        found = self._ahead[1].result() if self._ahead is not None and self._ahead[0] == step else self._make(step)
        self._ahead = (step + 1, self._pool.submit(self._make, step + 1))
        return found

    def _make(self, step: int) -> BrainBatch:
        first = self._first + step * self._batch
        return self._brains.batch("train", range(first, first + self._batch))


class _PinqiTask:
    """What pretraining and training share."""

    phase: str
    module: nn.Module

    def __init__(self, network: Pinqi, recipe: PinqiRecipe, anatomy: Anatomy, device: torch.device, first: int) -> None:
        self.module = self.network = network
        self.recipe = recipe
        brains = QuantitativeBrains(anatomy, recipe.samples, seed=recipe.seed, device=device)
        self.samples = TrainingSamples(
            brains.with_recipe(columns=recipe.columns, rate_spread=recipe.rate_spread, spread_part=recipe.spread_part),
            recipe.batch,
            first,
        )
        self._evaluation = QuantitativeBrains(anatomy, recipe.samples, seed=EVALUATION_SEED, device=device)
        self._anatomy = anatomy.name

    def facts(self) -> dict[str, Any]:
        """JSON that a checkpoint must agree with."""
        return {"phase": self.phase, "anatomy": self._anatomy, **self.recipe.facts()}

    def validation_samples(self) -> Iterator[BrainBatch]:
        """Held-out samples one by one: the same in every call."""
        for i in range(self.recipe.n_validation):
            yield self._evaluation.batch("validation", [i])

    def aliased(self, batch: BrainBatch) -> Posed:
        """`posed` as the recipe says."""
        return posed(batch, self.recipe.start)


class Pretraining(_PinqiTask):
    """Each network by itself on images as it will meet them: parameters for one, clean images for the other.

    A call of the loop is drawn, all alike, and its tag is told. The first call sees the first images ``y_0``; the later ones see images
    nearer to the truth, ``r y_truth + (1 - r) y_0``, ``r = u^2``, with white noise of up to the data's standard deviation.

    Deviation: the published pretraining tags such mixtures with ``r`` itself, from 0 to 1. The loop's tags of the parameter network
    are 0 and then 1.2 to 2: it would be called with numbers that it was never taught.
    """

    phase = "pretraining"

    def __init__(self, network: Pinqi, recipe: PinqiRecipe, anatomy: Anatomy, device: torch.device, first: int) -> None:
        super().__init__(network, recipe, anatomy, device, first)
        chosen = recipe.pretrain_networks
        self._parameters = network.parameter_net is not None and chosen != "image"
        self._images = network.image_net is not None and chosen != "parameter"
        self._last: tuple[int, _Posed] | None = None

    def groups(self) -> list[ParameterGroup]:
        """The networks that are taught; lambdas keep their first values."""
        factor = self.recipe.pretrain_scale
        groups = network_groups(
            self.network, parameter_rate=3e-4 * factor, image_rate=3e-3 * factor, embedding_rate=1e-4 * factor
        )
        left = {"both": (), "parameter": ("image_net",), "image": ("parameter_net", "embedding")}
        return [g for g in groups if g.name not in left[self.recipe.pretrain_networks]]

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Weighted squared errors of parameters (brain 1, elsewhere 0.05; of fits 0.001 in air) and images (brain 1, elsewhere 0.1)."""
        number = step // self.recipe.reuse
        if self._last is None or self._last[0] != number:
            self._last = number, self._posed(self.samples.batch(number))
        posed = self._last[1]
        call, share, noise = torch.rand(3, len(posed.truth), device=posed.truth.device)
        return self._loss(posed, call, share.square(), noise)

    def _posed(self, batch: BrainBatch) -> _Posed:
        operator, rhs, start = self.aliased(batch)
        first = self.network.first_images(operator, rhs, start)
        return _Posed(first, operator.enter_image(batch.images), batch.parameters.mT, batch.brain.mT, batch.noise_std)

    def _loss(self, posed: _Posed, call: Tensor, share: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, float]]:
        brain = posed.brain[:, None].to(share.dtype)
        total = share.new_zeros(())
        figures: dict[str, float] = {}
        settings = self.network.settings
        if self._parameters:
            tags, images = _met(posed, settings.parameter_tags, call, share, noise)
            predicted = self.network.predict_parameters(images, tags)
            part = weighted_mse(
                predicted, posed.parameters, torch.clamp(brain + outside(settings, posed.parameters, 0.05), max=1.0)
            )
            error = t1_error(predicted, posed.parameters, brain)
            total = total + part + self.recipe.t1_weight * error
            figures |= {
                "parameter_loss": float(part.detach()),
                "t1_error": float(error.detach() / brain.mean().clamp(min=1e-6)),
            }
        if self._images:
            tags, images = _met(posed, settings.image_tags, call, share, noise)
            part = 2 * weighted_mse(self.network.predict_images(images, tags), posed.truth, 0.9 * brain + 0.1)
            total, figures["image_loss"] = total + part, float(part.detach())
        return total, figures

    def validate(self, step: int) -> Validation:
        """Mean losses of the first call."""
        rows = []
        for batch in self.validation_samples():
            first = batch.noise_std.new_zeros(1)
            rows.append(self._loss(self._posed(batch), first, first, first)[1])
        return Validation(_means(rows))


@dataclass(frozen=True)
class _Posed:
    """Samples of the pretraining in the operator's layout: first and true images, true parameters, brain, noise."""

    first: Tensor
    truth: Tensor
    parameters: Tensor
    brain: Tensor
    noise_std: Tensor


def _met(posed: _Posed, tags: Sequence[float], call: Tensor, share: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Tag and images of one of a network's calls, per sample; ``call``, ``noise`` in [0, 1)."""
    which = (call * len(tags)).long()
    later = which > 0
    share = torch.where(later, share, 0.0)[:, None, None, None]
    noise = torch.where(later, noise, 0.0) * posed.noise_std
    images = torch.lerp(posed.first, posed.truth, share.to(posed.truth.dtype))
    images = images + noise[:, None, None, None] * torch.randn_like(images)
    return torch.tensor(tags, device=call.device, dtype=share.dtype)[which], images


def outside(settings: PinqiSettings, truth: Tensor, weight: float) -> Tensor | float:
    """The weight of what is not brain. A fit in air is anything, and nothing is to be learned from that: it hardly counts."""
    if settings.prediction == "direct":
        return weight
    return weight * (truth[:, :2].square().sum(1, keepdim=True) > LEAST_DENSITY**2) + 0.001


def t1_error(parameters: Tensor, truth: Tensor, brain: Tensor) -> Tensor:
    """Mean over all pixels of the absolute error of T1 in the brain, in s; of T1 above `LONGEST_T1` none."""
    found, true = (1 / p[:, 2:].clamp(min=1 / LONGEST_T1) for p in (parameters, truth))
    return (brain * (found - true).abs()).mean()


class EndToEnd(_PinqiTask):
    """The whole unrolled network on the parameters (ablation h: on the images)."""

    phase = "training"

    def __init__(
        self,
        network: Pinqi,
        recipe: PinqiRecipe,
        anatomy: Anatomy,
        device: torch.device,
        first: int,
        rule: NoiseRule = DEFAULT_RULE,
        held: HeldBatches | None = None,
    ) -> None:
        super().__init__(network, recipe, anatomy, device, first)
        self.factors = None
        if recipe.noise_factors != "none":
            self.factors = NoiseFactors(rule, recipe.noise_factors == "learned").to(device)
            self.module = nn.ModuleDict({"network": network, "factors": self.factors})
        self.held = held
        if recipe.held and held is None:
            self.held = HeldBatches(self.samples.batch, self.aliased, recipe.held, recipe.seed)
        self._validation: list[tuple[BrainBatch, Posed]] = []

    def _strengths(self, batch: BrainBatch) -> Strengths:
        if self.factors is None:
            return AS_LEARNED
        return self.factors.at(float(batch.noise_std[0]), acceleration_of(batch.mask))

    def groups(self) -> list[ParameterGroup]:
        """Networks, embedding, lambdas."""
        r, net = self.recipe, self.network
        groups = network_groups(
            net, parameter_rate=r.network_rate, image_rate=r.image_rate or r.network_rate, embedding_rate=r.embedding_rate
        )
        taken = {id(p) for g in groups for p in g.parameters}
        rest = [p for p in self.module.parameters() if p.requires_grad and id(p) not in taken]
        return [*groups, ParameterGroup("lambdas", rest, r.lambda_rate, 1e-5)] if rest else groups

    def loss(self, step: int) -> tuple[Tensor, dict[str, Figure]]:
        """Mean squared error of all parameters, brain 1.01 and elsewhere 0.01, with deep supervision."""
        if self.held is None:
            batch = self.samples.batch(step)
            operator, rhs, start = self.aliased(batch)
        else:
            batch, (operator, rhs, start) = self.held.at(step)
        found = self.network(operator, rhs, start, self._strengths(batch))
        brain = batch.brain.mT[:, None].to(batch.noise_std.dtype)
        of_images: dict[str, Figure] = {"images_untrusted": lambda: _untrusted(found.linear)}
        if self.recipe.ablation == "h":
            own = weighted_mse(found.images, operator.enter_image(batch.images), 0.9 * brain + 0.1)
            return (self.recipe.image_weight or 1.0) * own + self._imagined(found, operator, batch), of_images
        truth = batch.parameters.mT
        loss = deep_supervision(
            found.predictions,
            truth,
            brain + outside(self.network.settings, truth, 0.01),
            first=self.recipe.first_weight,
            others=self.recipe.other_weight,
        )
        if self.recipe.t1_weight:
            loss = loss + self.recipe.t1_weight * t1_error(found.parameters, truth, brain)
        loss = loss + self._imagined(found, operator, batch)
        figures: dict[str, Figure] = {
            "rate_error": float((found.parameters.detach()[:, 2:] - truth[:, 2:])[brain > 0].abs().mean())
        }
        if solved := (*found.nonlinear, *found.fits):
            figures["unconverged"] = float(sum(r.n_unconverged for r in solved))
            figures["singular"] = lambda: _singular(solved)
        return loss, figures | of_images

    def _imagined(self, found: PinqiOutput, operator: BatchedSense, batch: BrainBatch) -> Tensor:
        """Mean squared error of what the image network gave, times its weight."""
        if not self.recipe.image_weight or not found.image_predictions:
            return batch.noise_std.new_zeros(())
        true, weight = operator.enter_image(batch.images), 0.9 * batch.brain.mT[:, None].to(batch.noise_std.dtype) + 0.1
        parts = [weighted_mse(images, true, weight) for images in found.image_predictions]
        return self.recipe.image_weight * torch.stack(parts).mean()

    def validate(self, step: int) -> Validation:
        """nRMSE, MAE and SSIM of T1 in the brain, and maps beside the truth and their difference."""
        rows, pictures = [], {}
        for i, (batch, (operator, rhs, start)) in enumerate(self._posed_validation()):
            found = operator.leave_image(self.network(operator, rhs, start, self._strengths(batch)).parameters)
            t1 = t1_from_rate(found[0, 2].cpu().numpy())
            truth, brain = batch.t1[0].cpu().numpy(), batch.brain[0].cpu().numpy()
            rows.append(t1_figures(t1, truth, brain))
            pictures[f"t1_{i}"] = _side_by_side(t1, truth, brain)
        return Validation(_means(rows), pictures)

    def _posed_validation(self) -> Iterator[tuple[BrainBatch, Posed]]:
        """Validation samples as problems; held where training samples are."""
        if self.held is None:
            yield from ((batch, self.aliased(batch)) for batch in self.validation_samples())
            return
        self._validation = self._validation or [(batch, self.aliased(batch)) for batch in self.validation_samples()]
        yield from self._validation


def _untrusted(reports: Sequence[LinearReport]) -> float:
    """Samples of all iterations whose images, or the gradient through them, missed the tolerance; NaN before a backward pass."""
    trusted = [r.gradient_trusted for r in reports]
    return float(sum(int((~t).sum()) for t in trusted if t is not None)) if any(t is not None for t in trusted) else math.nan


def _singular(reports: Sequence[NonlinearReport]) -> float:
    """Pixels of all fits without a gradient; NaN where no backward pass has run."""
    counts = [r.n_singular for r in reports]
    return float(sum(n for n in counts if n is not None)) if any(n is not None for n in counts) else math.nan


def network_groups(
    network: Pinqi, *, parameter_rate: float, image_rate: float, embedding_rate: float
) -> list[ParameterGroup]:
    """The groups of the networks that this variant has."""
    found: list[tuple[str, nn.Module | None, float]] = [
        ("parameter_net", network.parameter_net, parameter_rate),
        ("image_net", network.image_net, image_rate),
        ("embedding", network.embedding, embedding_rate),
    ]
    return [ParameterGroup(name, list(net.parameters()), rate) for name, net, rate in found if net is not None]


def posed(batch: BrainBatch, start: str) -> tuple[BatchedSense, Tensor, Tensor | None]:
    """Operator, ``A^H k``, and the images to begin with where the network does not make them from these."""
    operator = batch.operator()
    rhs = operator.adjoint(operator.enter_data(batch.kspace))
    if start == "adjoint":
        return operator, rhs, None
    found = torch.stack([first_images(problem, start) for problem in _problems(batch)])
    return operator, rhs, operator.enter_image(found)


def _problems(batch: BrainBatch) -> Iterator[Problem]:
    """The samples as inverse problems of their own."""
    for i in range(len(batch)):
        yield pose(_kspace(batch, i), "training sample", Report())


def _kspace(batch: BrainBatch, i: int) -> KSpace:
    return KSpace(
        batch.kspace[i][:, :, None],
        batch.mask[i][:, None].float(),
        coil_maps=batch.coil_maps[i][:, None],
        noise_std=float(batch.noise_std[i]),
    )


def typical_amplitude(brains: QuantitativeBrains, n_samples: int = TYPICAL_SAMPLES) -> float:
    """Median of what `signal_scale` gives for training samples: the amplitude that a scan has to be brought to."""
    scales = []
    for i in range(n_samples):
        batch = brains.batch("train", [i])
        scales.append(signal_scale(_kspace(batch, 0)))
    return float(np.median(scales))


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]} if rows else {}


def _side_by_side(t1: NDArray[np.floating], truth: NDArray[np.floating], brain: NDArray[np.bool_]) -> NDArray[np.floating]:
    """Found, true, and five times the difference inside the brain, upright, in [0, 1]."""
    error = 5 * np.abs(t1 - truth) * brain
    return np.concatenate([np.clip(plane[::-1] / SHOWN_T1, 0, 1) for plane in (t1, truth, error)], axis=1)
