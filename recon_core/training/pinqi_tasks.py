"""What PINQI is trained on and for: the recipe, the pretraining of its networks, the training of the whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from recon_core.errors import SettingError
from recon_core.methods.pinqi.figures import t1_figures, t1_from_rate
from recon_core.methods.pinqi.model import ABLATIONS, STARTS, Pinqi
from recon_core.methods.pinqi.start import low_rank_images
from recon_core.operators.batched_sense import BatchedSense
from recon_core.problem import Problem, pose, signal_scale
from recon_core.simulation.anatomy import Anatomy
from recon_core.simulation.quantitative_brain import SATURATION_TIMES, BrainBatch, QuantitativeBrains, SampleRecipe
from recon_core.training.loop import LoopSettings, ParameterGroup, Validation
from recon_core.training.losses import deep_supervision, weighted_mse
from recon_core.training.runs import TrainingRecipe
from recon_core.types import KSpace, Report

Tensor = torch.Tensor

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
    rate_spread
        See `SampleRecipe`; training only.
    columns
        Train on strips of so many readout positions, 0 for whole slices; validation always sees whole slices.
    batch, epochs, samples_per_epoch
        16 heads with 122 slices each are an epoch; 80 epochs are about 156,000 samples.
    pretrain_epochs
        Of the networks alone, on mixtures of the truth and the first images.
    first_weight, other_weight
        Deep supervision: of the first prediction, and of the others but the last.
    ema_decay
        Moving average of the weights; the paper has none.
    start
        Images from which the iterations begin, see `PinqiSettings`.
    pretrain_scale
        Factor on the published learning rates of the pretraining.
    initial_sha256
        sha256 of the weights from which the networks began; empty: random ones.
    """

    ablation: str = "proposed"
    start: str = "adjoint"
    pretrain_scale: float = 1.0
    initial_sha256: str = ""
    size: int = 192
    times: tuple[float, ...] = SATURATION_TIMES
    n_coils: int = 8
    accelerations: tuple[float, ...] = (4.0, 5.0, 6.0, 7.0, 8.0)
    rate_spread: float = 1.0
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
        if self.batch < 1 or not self.epochs > 0 or self.pretrain_epochs < 0 or self.n_validation < 0:
            raise SettingError("impossible recipe", where="PINQI training", got=self)

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

    def __init__(self, network: Pinqi, recipe: PinqiRecipe, anatomy: Anatomy, device: torch.device, first: int) -> None:
        self.module: Pinqi = network
        self.recipe = recipe
        brains = QuantitativeBrains(anatomy, recipe.samples, seed=recipe.seed, device=device)
        self.samples = TrainingSamples(
            brains.with_recipe(columns=recipe.columns, rate_spread=recipe.rate_spread), recipe.batch, first
        )
        self._evaluation = QuantitativeBrains(anatomy, recipe.samples, seed=EVALUATION_SEED, device=device)
        self._anatomy = anatomy.name

    def facts(self) -> dict[str, Any]:
        return {"phase": self.phase, "anatomy": self._anatomy, **self.recipe.facts()}

    def validation_samples(self) -> Iterator[BrainBatch]:
        """Held-out samples one by one: the same in every call."""
        for i in range(self.recipe.n_validation):
            yield self._evaluation.batch("validation", [i])

    def aliased(self, batch: BrainBatch) -> tuple[BatchedSense, Tensor, Tensor | None]:
        """`posed` as the recipe says."""
        return posed(batch, self.recipe.start)


class Pretraining(_PinqiTask):
    """Both networks on ``r y_truth + (1 - r) y_0``, ``r = u^2``, tagged ``r``: parameters for one, clean images for the other."""

    phase = "pretraining"

    def groups(self) -> list[ParameterGroup]:
        """The networks; lambdas keep their first values."""
        factor = self.recipe.pretrain_scale
        return network_groups(
            self.module, parameter_rate=3e-4 * factor, image_rate=3e-3 * factor, embedding_rate=1e-4 * factor
        )

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Weighted squared errors of parameters (brain 1, elsewhere 0.05) and images (brain 1, elsewhere 0.1)."""
        batch = self.samples.batch(step)
        share = torch.rand(len(batch), device=batch.kspace.device).square()
        return self._loss(batch, share)

    def _loss(self, batch: BrainBatch, share: Tensor) -> tuple[Tensor, dict[str, float]]:
        operator, rhs, start = self.aliased(batch)
        truth = operator.enter_image(batch.images)
        mixed = torch.lerp(self.module.first_images(operator, rhs, start), truth, share[:, None, None, None].to(truth.dtype))
        brain = batch.brain.mT[:, None].to(share.dtype)
        total = share.new_zeros(())
        figures = {}
        if self.module.parameter_net is not None:
            predicted = self.module.predict_parameters(mixed, share)
            part = weighted_mse(predicted, batch.parameters.mT, 0.95 * brain + 0.05)
            total, figures["parameter_loss"] = total + part, float(part.detach())
        if self.module.image_net is not None:
            part = 2 * weighted_mse(self.module.predict_images(mixed, share), truth, 0.9 * brain + 0.1)
            total, figures["image_loss"] = total + part, float(part.detach())
        return total, figures

    def validate(self, step: int) -> Validation:
        """Mean losses at a share of zero, where reconstruction begins."""
        rows = [self._loss(b, b.noise_std.new_zeros(1))[1] for b in self.validation_samples()]
        return Validation(_means(rows))


class EndToEnd(_PinqiTask):
    """The whole unrolled network on the parameters (ablation h: on the images)."""

    phase = "training"

    def groups(self) -> list[ParameterGroup]:
        """Networks, embedding, lambdas."""
        r, net = self.recipe, self.module
        groups = network_groups(
            net, parameter_rate=r.network_rate, image_rate=r.network_rate, embedding_rate=r.embedding_rate
        )
        taken = {id(p) for g in groups for p in g.parameters}
        rest = [p for p in net.parameters() if id(p) not in taken]
        return [*groups, ParameterGroup("lambdas", rest, r.lambda_rate, 1e-5)] if rest else groups

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of all parameters, brain 1.01 and elsewhere 0.01, with deep supervision."""
        batch = self.samples.batch(step)
        operator, rhs, start = self.aliased(batch)
        found = self.module(operator, rhs, start)
        brain = batch.brain.mT[:, None].to(batch.noise_std.dtype)
        if self.recipe.ablation == "h":
            return weighted_mse(found.images, operator.enter_image(batch.images), 0.9 * brain + 0.1), {}
        truth = batch.parameters.mT
        loss = deep_supervision(
            found.predictions, truth, brain + 0.01, first=self.recipe.first_weight, others=self.recipe.other_weight
        )
        figures = {"rate_error": float((found.parameters.detach()[:, 2:] - truth[:, 2:])[brain > 0].abs().mean())}
        if found.nonlinear:
            figures["unconverged"] = float(sum(r.n_unconverged for r in found.nonlinear))
        return loss, figures

    def validate(self, step: int) -> Validation:
        """nRMSE, MAE and SSIM of T1 in the brain, and maps beside the truth and their difference."""
        rows, pictures = [], {}
        for i, batch in enumerate(self.validation_samples()):
            operator, rhs, start = self.aliased(batch)
            found = operator.leave_image(self.module(operator, rhs, start).parameters)
            t1 = t1_from_rate(found[0, 2].cpu().numpy())
            truth, brain = batch.t1[0].cpu().numpy(), batch.brain[0].cpu().numpy()
            rows.append(t1_figures(t1, truth, brain))
            pictures[f"t1_{i}"] = _side_by_side(t1, truth, brain)
        return Validation(_means(rows), pictures)


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
    if start != "llr":
        return operator, rhs, None
    return operator, rhs, operator.enter_image(torch.stack([low_rank_images(problem) for problem in _problems(batch)]))


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
