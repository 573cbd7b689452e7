"""Samples of PINQI's training end to end, and the factors on the lambdas that follow their noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import nn

from recon_core.methods.pinqi.model import Strengths
from recon_core.methods.pinqi.noise_rule import TRAINED_ACCELERATIONS, NoiseRule
from recon_core.operators.batched_sense import BatchedSense
from recon_core.simulation.quantitative_brain import BrainBatch
from recon_core.simulation.random_fields import sample_seed

Tensor = torch.Tensor
ATTEMPTS = 8
LEAST_BRAIN = 0.15
"""Part of the pixels."""
Posed = tuple[BatchedSense, Tensor, Tensor | None]
"""Operator, ``A^H k``, first images where they are given."""


class HeldBatches:
    """A few batches with their first images, made when first asked for, then used in turn: such images take longer than a step.

    Batches with hardly any brain are passed over. Each pass has an order of its own, and at random a batch is mirrored along the
    readout, of which every position is an acquisition of its own. Order and mirroring depend on seed and step alone, so that a resumed
    training sees the same.

    Parameters
    ----------
    make
        The batch of a number.
    pose
        Its operator, ``A^H k`` and first images.
    n
        Batches held.
    seed
        Of order and mirroring.
    """

    def __init__(
        self, make: Callable[[int], BrainBatch], pose: Callable[[BrainBatch], Posed], n: int, seed: int = 0
    ) -> None:
        self._make, self._pose, self._n, self._seed = make, pose, n, seed
        self._held: dict[int, tuple[BrainBatch, Posed]] = {}

    def at(self, step: int) -> tuple[BrainBatch, Posed]:
        """Batch and problem of a step."""
        turn, place = divmod(step, self._n)
        order = torch.randperm(self._n, generator=_generator(self._seed, "order", turn))
        number = int(order[place])
        if number not in self._held:
            batch = self._with_brain(number)
            self._held[number] = batch, self._pose(batch)
        batch, posed = self._held[number]
        if int(torch.randint(2, (1,), generator=_generator(self._seed, "mirrored", step))):
            return mirrored(batch, posed)
        return batch, posed

    def _with_brain(self, number: int) -> BrainBatch:
        """The first of a few batches with enough brain: strips at the edge of a head teach little."""
        for attempt in range(ATTEMPTS):
            batch = self._make(number + attempt * self._n)
            if float(batch.brain.float().mean()) >= LEAST_BRAIN:
                break
        return batch


def _generator(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(sample_seed(key[0], *key[1:]))


def mirrored(batch: BrainBatch, posed: Posed) -> tuple[BrainBatch, Posed]:
    """Batch and problem with the readout reversed."""
    along = ("parameters", "images", "brain", "solid", "tissue", "coil_maps", "kspace")  # x is their last axis
    flipped = replace(batch, **{name: getattr(batch, name).flip(-1) for name in along})
    _, rhs, start = posed  # working images end in (x, y)
    return flipped, (flipped.operator(), rhs.flip(-2), None if start is None else start.flip(-2))


class NoiseFactors(nn.Module):
    """A `NoiseRule` whose factors are weights, so that they can be learned with the lambdas.

    Parameters
    ----------
    rule
        Where they begin.
    learned
        Whether they may change.
    """

    def __init__(self, rule: NoiseRule, learned: bool) -> None:
        super().__init__()
        self._rule = rule
        self.register_buffer("noise", torch.tensor(rule.noise).log())
        for name in ("image", "signal", "parameter"):
            logarithm = torch.tensor(getattr(rule, name)).log()
            self.register_parameter(name, nn.Parameter(logarithm, requires_grad=learned))

    noise: Tensor

    def at(self, noise: float, acceleration: float = TRAINED_ACCELERATIONS[0]) -> Strengths:
        """As `NoiseRule.at`, differentiable in the factors."""
        where = self.noise.new_tensor(max(noise, 1e-12)).log().clamp(self.noise[0], self.noise[-1])
        last = max(len(self.noise) - 2, 0)
        left = min(max(int((self.noise <= where).sum()) - 1, 0), last)
        right = min(left + 1, len(self.noise) - 1)
        width = self.noise[right] - self.noise[left]
        part = (where - self.noise[left]) / width if right > left else where.new_zeros(())
        image, signal, parameter = (torch.lerp(row[left], row[right], part).exp() for row in self._rows())
        less = self._rule.part_at(acceleration)
        return Strengths(image * less, signal * less, parameter, noise)

    def rule(self) -> NoiseRule:
        """The rule as it is now."""
        noise, image, signal, parameter = (_rounded(row.detach().exp()) for row in (self.noise, *self._rows()))
        return NoiseRule(noise, image, signal, parameter, self._rule.acceleration_power)

    def _rows(self) -> Sequence[Tensor]:
        return self.get_parameter("image"), self.get_parameter("signal"), self.get_parameter("parameter")


def _rounded(values: Tensor) -> tuple[float, ...]:
    return tuple(float(f"{v:.6g}") for v in values.tolist())
