"""Data consistency (Eq. 22-23) as the fit needs it: value and gradient with respect to the images, without differentiating FFTs.

In readout-hybrid space ``|A x - b|^2`` equals Eq. 23 on the 2D k-space (the readout transform is unitary) and is a sum over
readout columns. Its gradient is ``2 (A^H A x - A^H b)`` and its value ``Re x^H (A^H A x - 2 A^H b) + |b|^2``: the data themselves are
needed once, for ``A^H b`` and ``|b|^2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from recon_core.errors import SettingError
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.operators.cartesian import CartesianSense
from recon_core.problem import Problem
from recon_core.types import KSpace

Tensor = torch.Tensor


class Target(Protocol):
    """What a fit needs to know of its goal. Images are working images ``(row, x, z, y)``; a row is a state."""

    @property
    def held_out(self) -> Objective | None:
        """Samples that the fit must not see."""
        ...

    @property
    def n_rows(self) -> int:
        """Images that the goal speaks of."""
        ...

    def mixing(self, field: MoeField) -> Tensor:
        """``(row, component)``: how the field's components make these images."""
        ...

    def value_and_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of each row (float64) and half its gradient with respect to real and imaginary parts."""
        ...

    def columns(self, first: int, step: int) -> Target:
        """The part that some readout columns have."""
        ...


@dataclass(frozen=True)
class Objective:
    """``sum_q |A_q x_q - b_q|^2`` in scaled units, working layout.

    Attributes
    ----------
    operator
        The samples to be fitted.
    rhs
        ``A^H b``, working images.
    energy
        float64 ``(state, x)``: ``|b|^2`` of each state and readout column.
    n_samples
        float64 ``(state,)``: complex samples of each state, all coils and columns.
    noise
        Standard deviation of one complex sample.
    held_out
        The samples kept out of the fit, or ``None``.
    """

    operator: CartesianSense
    rhs: Tensor
    energy: Tensor
    n_samples: Tensor
    noise: float
    held_out: Objective | None = None

    @property
    def n_rows(self) -> int:
        return int(self.rhs.shape[0])

    def mixing(self, field: MoeField) -> Tensor:
        return field.mixing()

    def value_and_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """``|A_q x_q - b_q|^2`` of each state (float64) and ``A^H (A x - b)``, half the gradient over real and imaginary parts."""
        normal = self.operator.normal(images)
        gradient = normal - self.rhs
        # Re x^H (N x - 2 rhs) with one array: N x - 2 rhs = gradient - rhs
        products = torch.view_as_real(images) * torch.view_as_real(gradient - self.rhs)
        value = products.flatten(1).sum(1, dtype=torch.float64) + self.energy.sum(1)
        # rounding may cross zero where there is no noise at all
        return value.clamp_min(0.0), gradient

    def relative_residuals(self, images: Tensor) -> Tensor:
        """RMS residual of each state over the noise's standard deviation, float64 ``(state,)``: 1.0 at the noise floor."""
        value, _ = self.value_and_gradient(images)
        return (value / (self.n_samples.clamp_min(1) * self.noise**2)).sqrt()

    def relative_error(self, images: Tensor) -> float:
        """The same for all states together."""
        value, _ = self.value_and_gradient(images)
        return math.sqrt(float(value.sum()) / max(1.0, float(self.n_samples.sum()))) / self.noise

    def posed(self, problem: Problem) -> Problem:
        """``problem`` with nothing but these samples."""
        return replace(problem, operator=self.operator, rhs=self.rhs)

    def columns(self, first: int, step: int) -> Objective:
        """The part that readout columns ``first, first + step, ...`` have in the sum."""
        chosen = slice(first, None, step)
        share = len(range(self.energy.shape[1])[chosen]) / self.energy.shape[1]
        return replace(
            self,
            operator=self.operator.with_columns(chosen),
            rhs=self.rhs[:, chosen].contiguous(),
            energy=self.energy[:, chosen],
            n_samples=self.n_samples * share,
            held_out=None,
        )


def make_objective(problem: Problem, kspace: KSpace, held_out: float = 0.0, seed: int = 0) -> Objective:
    """The objective of a posed problem, with a part of the lines kept out.

    Parameters
    ----------
    problem, kspace
        ``problem = recon_core.problem.pose(kspace, ...)``; the k-space is needed again for the split and for ``|b|^2``.
    held_out
        Fraction of each state's phase encodings outside the calibration region (``kspace.acs_mask``, and what all states have)
        that the fit does not see; at least one line of each state that has four or more. 0: no split.
    seed
        Of the choice.

    Raises
    ------
    SettingError
        ``held_out`` is not in 0 to 0.5.
    """
    if not 0 <= held_out <= 0.5:
        raise SettingError("out of range", where="held-out fraction", got=held_out, expected="0 to 0.5")
    weights = problem.operator.weights
    if held_out == 0:
        return _part(problem, kspace, weights, rhs=problem.rhs)
    kept_out = choose_lines(kspace, held_out, seed)
    if not bool(kept_out.any()):
        return _part(problem, kspace, weights, rhs=problem.rhs)
    rest = _part(problem, kspace, weights * kept_out)
    return replace(_part(problem, kspace, weights * ~kept_out), held_out=rest)


def choose_lines(kspace: KSpace, fraction: float, seed: int) -> Tensor:
    """bool ``(state, k2, k1)``: the phase encodings to keep out, the same on every device."""
    sampled = kspace.mask.cpu()
    centre = sampled.all(0)
    if kspace.acs_mask is not None:
        centre = centre | kspace.acs_mask.cpu()
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros_like(sampled)
    for state, mask in enumerate(sampled):
        candidates = (mask & ~centre).flatten().nonzero()[:, 0]
        n = round(fraction * len(candidates)) or (1 if len(candidates) >= 4 else 0)
        chosen[state].view(-1)[candidates[torch.randperm(len(candidates), generator=generator)[:n]]] = True
    return chosen.to(kspace.mask.device)


def _part(problem: Problem, kspace: KSpace, weights: Tensor, rhs: Tensor | None = None) -> Objective:
    operator = problem.operator.with_weights(weights)
    energy = []
    for data, weight in zip(kspace.data, weights, strict=True):
        power = torch.view_as_real(data / problem.scale).square().sum(-1)  # (coil, k2, k1, x)
        energy.append((power * weight[None, :, :, None] ** 2).sum((0, 1, 2), dtype=torch.float64))
    # channels without a receiver are silent: their zeros are no samples that have noise
    n_heard = sum(bool((coil != 0).any()) for coil in kspace.data.unbind(1))
    n_samples = (weights > 0).flatten(1).sum(1).double() * n_heard * kspace.data.shape[-1]
    if rhs is None:
        rhs = operator.project(kspace.data, problem.scale)
    return Objective(operator, rhs, torch.stack(energy), n_samples, problem.noise)
