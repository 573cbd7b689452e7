"""Synthetic quantitative brains with known maps, drawn on the fly: what PINQI is trained and tested on.

One sample is an axial slice: tissue classes get random T1 and proton density within physiological ranges, mixed by their
fractions *in R1*, blurred a little, and modulated by smooth fields; then a signal model, coils, sampling and noise follow. Everything
is drawn for a batch at once and depends on the sample's key alone: ``(seed, split, index)``.

References
----------
PINQI (Zimmermann et al., doi:10.1109/TCI.2024.3388869), section III-A, and the authors' public code for the ranges. Deviations: noise
is complex (the code adds real numbers; the paper says complex); vessels and lesions are added; coil profiles follow the paper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from recon_core.errors import SettingError
from recon_core.fourier import fft_centred
from recon_core.operators.batched_sense import BatchedSense
from recon_core.sampling.masks import random_variable_density
from recon_core.signal_models import SaturationRecovery, SignalModel
from recon_core.simulation.anatomy import CLASSES, Anatomy, check_split
from recon_core.simulation.random_fields import Draws, gaussian_blur, grid, polynomial, sample_seed, smooth_field

Tensor = torch.Tensor

SATURATION_TIMES = (0.5, 1.0, 1.5, 2.0, 8.0)
"""s; the paper's comparison, phantom and volunteers."""
ABLATION_TIMES = (0.5, 0.7, 0.9, 1.1, 1.3, 1.6, 2.0, 8.0)
"""s; the paper's ablation study."""

# class: T1 in s, proton density; uniform, drawn per sample and class
TISSUE_RANGES: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "csf": ((2.0, 4.0), (0.9, 1.0)),
    "grey": ((1.2, 2.0), (0.7, 1.0)),
    "white": ((0.8, 1.5), (0.5, 0.9)),
    "fat": ((0.3, 0.5), (0.9, 1.0)),
    "muscle": ((1.2, 1.5), (0.9, 1.0)),
    "skin": ((0.5, 0.9), (0.9, 1.0)),
    "vessel": ((1.7, 2.1), (0.8, 1.0)),
    "fat2": ((0.4, 0.6), (0.6, 0.9)),
    "dura": ((2.0, 2.8), (0.9, 1.0)),
    "marrow": ((0.4, 0.6), (0.7, 1.0)),
    "lesion": ((1.0, 2.5), (0.7, 1.0)),  # not in BrainWeb
}
BRAIN_CLASSES = ("csf", "grey", "white", "vessel", "lesion")
SOLID_CLASSES = ("grey", "white", "lesion")
LEAST_TISSUE = 150 / 255
EMPTY_R1 = 1.0  # 1/s where there is no tissue


@dataclass(frozen=True)
class SampleRecipe:
    """How samples are acquired.

    Attributes
    ----------
    size
        Pixels along each side.
    times
        Saturation delays in s, one per state.
    n_coils
        Receive coils.
    accelerations
        Each sample takes one of them.
    acs
        Fully sampled central lines, counted among the sampled lines.
    noise
        Range of the standard deviation of the complex noise, in units in which images are about 1.
    rate_spread
        All rates of a sample are multiplied by one factor between its inverse and this, uniform in its logarithm: other field
        strengths, contrast agent, phantoms. 1 leaves the published ranges, and draws nothing.
    spread_part
        The part of the samples with such a factor; the others keep the published ranges.
    columns
        Keep so many neighbouring readout positions at a random place, 0 for all: in hybrid space every readout position is a
        complete acquisition of its own, so that a strip is as exact as a slice and costs its share.
    """

    size: int = 192
    times: tuple[float, ...] = SATURATION_TIMES
    n_coils: int = 8
    accelerations: tuple[float, ...] = (4.0, 5.0, 6.0, 7.0, 8.0)
    acs: int = 8
    noise: tuple[float, float] = (0.001, 0.04)
    rate_spread: float = 1.0
    spread_part: float = 1.0
    columns: int = 0

    def __post_init__(self) -> None:
        if (
            self.size < 16
            or not 0 <= self.columns <= self.size
            or self.n_coils < 1
            or self.rate_spread < 1
            or not 0 <= self.spread_part <= 1
            or not self.accelerations
            or not 0 <= self.noise[0] <= self.noise[1]
        ):
            raise SettingError("impossible recipe", where="synthetic samples", got=self)

    @property
    def model(self) -> SignalModel:
        """The signal model of the states."""
        return SaturationRecovery(self.times)


@dataclass(frozen=True)
class BrainBatch:
    """Samples with their truth; all arrays centred, axes named outermost first.

    Attributes
    ----------
    parameters
        float32 ``(sample, (Re M0, Im M0, R1), y, x)``; R1 in 1/s.
    images
        complex64 ``(sample, state, y, x)``: the noise-free images.
    brain
        bool ``(sample, y, x)``: mostly grey matter, white matter, fluid, vessel or lesion.
    solid
        bool ``(sample, y, x)``: mostly grey or white matter or lesion.
    tissue
        bool ``(sample, y, x)``: more than 150/255 of tissue of any class, scalp included, and so are the eight neighbours. That is where
        the published method's code trains and judges.
    coil_maps
        complex64 ``(sample, coil, y, x)``, unit root-sum-of-squares.
    mask
        bool ``(sample, state, k1)``.
    kspace
        complex64 ``(sample, state, coil, k1, x)``, hybrid space, zero where not sampled.
    noise_std
        float32 ``(sample,)``: standard deviation of the complex noise of one k-space value.
    """

    parameters: Tensor
    images: Tensor
    brain: Tensor
    solid: Tensor
    tissue: Tensor
    coil_maps: Tensor
    mask: Tensor
    kspace: Tensor
    noise_std: Tensor

    @property
    def t1(self) -> Tensor:
        """T1 in s, ``(sample, y, x)``."""
        return 1 / self.parameters[:, 2]

    def operator(self) -> BatchedSense:
        """The acquisition of these samples."""
        return BatchedSense(self.coil_maps, self.mask)

    def __len__(self) -> int:
        return len(self.parameters)


class QuantitativeBrains:
    """An endless, seeded supply of samples.

    Parameters
    ----------
    anatomy
        Where slices come from; it also makes them on its device.
    recipe
        How they are acquired.
    seed
        Of the whole supply. Test sets use a seed of their own, so that they stay the same whatever is trained.
    device
        Where batches are wanted; the anatomy must be there too.
    """

    def __init__(
        self, anatomy: Anatomy, recipe: SampleRecipe | None = None, *, seed: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.anatomy, self.recipe, self.seed = anatomy, recipe or SampleRecipe(), seed
        self.device = torch.device(device)

    def with_recipe(self, **changes: object) -> QuantitativeBrains:
        """The same anatomies, acquired differently."""
        return QuantitativeBrains(self.anatomy, replace(self.recipe, **changes), seed=self.seed, device=self.device)  # type: ignore[arg-type]

    @torch.no_grad()
    def batch(self, split: str, indices: Sequence[int]) -> BrainBatch:
        """The samples of a split with these numbers.

        Raises
        ------
        SettingError
            An unknown split.
        """
        check_split(split)
        draws = Draws([sample_seed(self.seed, split, i) for i in indices], self.device)
        recipe, n = self.recipe, self.recipe.size
        fractions = self.anatomy.fractions(draws, n, split)
        parameters = vary(draws, tissue_parameters(draws, fractions))
        if recipe.rate_spread > 1:
            exponent = draws.uniform(-1.0, 1.0, 1, 1)
            if recipe.spread_part < 1:
                exponent = exponent * (draws.uniform(0.0, 1.0, 1, 1) < recipe.spread_part)
            parameters[:, 2] *= torch.exp(exponent * math.log(recipe.rate_spread))
        coil_maps = birdcage_maps(draws, n, recipe.n_coils)
        mask = self._masks(draws)
        noise_std = draws.uniform(*recipe.noise)
        if recipe.columns:
            fractions, parameters, coil_maps = _strips(draws, recipe.columns, fractions, parameters, coil_maps)
        images = recipe.model.signal(parameters.movedim(1, 0)).movedim(0, 1)
        kspace = torch.zeros(*images.shape[:2], recipe.n_coils, *images.shape[2:], dtype=images.dtype, device=self.device)
        for i in range(len(draws)):  # sample by sample: coil images of a whole batch would fall out of the cache
            self._acquire(kspace[i], images[i], coil_maps[i], mask[i])
        _add_noise(draws, kspace, mask, noise_std)
        brain, solid = (
            fractions[:, [CLASSES.index(name) for name in names]].sum(1) > 0.5 for names in (BRAIN_CLASSES, SOLID_CLASSES)
        )
        return BrainBatch(parameters, images, brain, solid, all_tissue(fractions), coil_maps, mask, kspace, noise_std)

    @staticmethod
    def _acquire(out: Tensor, images: Tensor, coil_maps: Tensor, mask: Tensor) -> None:
        """Fill ``(state, coil, k1, x)`` with the sampled lines."""
        for state, image in enumerate(images):
            out[state] = fft_centred(image * coil_maps, -2) * mask[state, :, None]

    def _masks(self, draws: Draws) -> Tensor:
        recipe = self.recipe
        masks = []
        for rng in draws.numpy():
            acceleration = float(rng.choice(recipe.accelerations))
            masks.append(random_variable_density(recipe.size, len(recipe.times), acceleration, recipe.acs, rng))
        return torch.from_numpy(np.stack(masks)).to(self.device)


def _strips(draws: Draws, columns: int, *images: Tensor) -> tuple[Tensor, ...]:
    """The same ``columns`` neighbouring positions of the last axis of all images, at a random place in every sample."""
    n = images[0].shape[-1]
    first = (draws.uniform(0.0, n - columns + 1.0)).long().clamp(max=n - columns)
    index = first[:, None, None, None] + torch.arange(columns, device=first.device)
    return tuple(image.gather(-1, index.expand(*image.shape[:-1], columns)) for image in images)


def _add_noise(draws: Draws, kspace: Tensor, mask: Tensor, noise_std: Tensor) -> None:
    """Complex Gaussian noise on the sampled lines only, in place: each line takes its own from as many as were sampled."""
    _, n_states, n_coils, n_k1, n_x = kspace.shape
    most = int(mask.sum(-1).max())
    noise = draws.noise(n_states, most, n_coils, n_x) * noise_std[:, None, None, None, None]
    rank = (mask.cumsum(-1) - 1).clamp(min=0)
    for data, lines, which, values in zip(kspace, mask, rank, noise, strict=True):
        rows = values.flatten(0, 1)[(which + most * torch.arange(n_states, device=which.device)[:, None]).flatten()]
        data += (rows.reshape(n_states, n_k1, n_coils, n_x) * lines[:, :, None, None]).movedim(1, 2)


# ------------------------------------------------------------------------------------------------------------------ maps


def all_tissue(fractions: Tensor) -> Tensor:
    """bool ``(sample, y, x)``, see `BrainBatch`; what lies beyond the image is none."""
    none = functional.pad((fractions.sum(1) <= LEAST_TISSUE).float(), (1, 1, 1, 1), value=1.0)
    return functional.max_pool2d(none, 3, stride=1) == 0


def tissue_parameters(draws: Draws, fractions: Tensor) -> Tensor:
    """Fractions to ``(Re M0, Im M0, R1)``: uniform values per sample and class, mixed linearly in R1 and in density, blurred.

    The imaginary part of the density is uniform within a tenth of the class's largest. Gaussian 5 x 5 blur with a sigma from 0.01
    to size/600 pixels.

    Returns
    -------
    float32 ``(sample, 3, y, x)``
    """
    limits = torch.tensor([TISSUE_RANGES[name] for name in CLASSES], device=fractions.device)  # (class, 2, 2)
    value = draws.uniform(0.0, 1.0, len(CLASSES), 2) * (limits[..., 1] - limits[..., 0]) + limits[..., 0]
    imaginary = draws.uniform(-0.1, 0.1, len(CLASSES)) * limits[:, 1, 1]
    per_class = torch.stack((value[..., 1], imaginary, 1 / value[..., 0]), dim=1)  # (sample, parameter, class)
    parameters = torch.einsum("bpc,bcyx->bpyx", per_class, fractions)
    parameters[:, 2] += EMPTY_R1 * (1 - fractions.sum(1)).clamp(min=0)
    sigma = draws.uniform(0.01, max(fractions.shape[-1] / 600, 0.02))
    return gaussian_blur(parameters, sigma)


def vary(draws: Draws, parameters: Tensor) -> Tensor:
    """Multiply with smooth random fields: phase and bias of M0, and R1.

    * phase: polynomial of third order (strengths 0.1, at most 0.2 rad), minus its mean, plus a constant of SD 0.2 rad;
    * ``|M0|`` times ``1 + b``, ``b`` a polynomial (strengths 0.3, 0.2, 0.2) plus low-pass noise of SD 0.1, within -0.5 and 0.3;
    * T1 times a polynomial of at most 0.2 from lowest to highest, times a truncated normal factor (1, SD 0.1, from 0.8 to
      1.2), times low-pass noise of SD 0.1 (truncated at two SD).
    """
    n = parameters.shape[-1]
    phase = polynomial(draws, n, (0.1, 0.1, 0.1)).clamp(-0.2, 0.2)
    phase = phase - phase.mean((1, 2), keepdim=True) + 0.2 * draws.normal(1, 1)
    bias = (polynomial(draws, n, (0.3, 0.2, 0.2)) + 0.1 * smooth_field(draws, n, 8)[:, 0]).clamp(-0.5, 0.3)
    density = torch.complex(parameters[:, 0], parameters[:, 1]) * torch.polar(1 + bias, phase)

    shape = polynomial(draws, n, (0.2, 0.2, 0.2))
    spread = shape.amax((1, 2), keepdim=True) - shape.amin((1, 2), keepdim=True)
    shape = (shape - shape.mean((1, 2), keepdim=True)) * (0.2 / spread.clamp(min=0.2))
    factor = (1 + 0.1 * _truncated_normal(draws, 1, 1)) * (1 + shape)
    factor = factor * (1 + 0.1 * smooth_field(draws, n, 16)[:, 0].clamp(-2, 2))
    # air keeps its constant: no signal, nothing to learn
    tissue = (density.abs() > 1e-3).to(factor.dtype)
    rate = parameters[:, 2] * (1 + tissue * (1 / factor - 1))
    return torch.stack((density.real, density.imag, rate), dim=1)


def _truncated_normal(draws: Draws, *shape: int) -> Tensor:
    """Standard normal within two SD, by inverting its distribution function."""
    edge = math.erf(2 / math.sqrt(2))
    return math.sqrt(2) * torch.erfinv(draws.uniform(-edge, edge, *shape))


# ----------------------------------------------------------------------------------------------------------------- coils


def birdcage_maps(draws: Draws, n: int, n_coils: int, *, radius: tuple[float, float] = (0.5, 0.65)) -> Tensor:
    """Gaussian profiles on a circle: half width at half maximum 0.2 to 0.5 of the field of view, smooth random phases.

    Parameters
    ----------
    radius
        Of the circle, in fields of view.

    Returns
    -------
    complex64 ``(sample, coil, n, n)`` with unit root-sum-of-squares
    """
    y, x = grid(n, draws.device)
    turn = draws.uniform(0.0, 1.0, 1) + torch.arange(n_coils, device=draws.device) / n_coils + 0.02 * draws.normal(n_coils)
    far = 2 * draws.uniform(*radius, 1)  # the grid runs from -1 to 1
    centre_y, centre_x = (far * f(2 * math.pi * turn) for f in (torch.sin, torch.cos))
    width = 2 * draws.uniform(0.2, 0.5, n_coils)
    distance = (y - centre_y[..., None, None]) ** 2 + (x - centre_x[..., None, None]) ** 2
    # the exponent is shifted by its largest value per pixel: far from all coils nothing underflows
    exponent = -math.log(2) * distance / width[..., None, None] ** 2
    amplitude = torch.exp(exponent - exponent.amax(1, keepdim=True))
    slope = draws.normal(3, n_coils, 1, 1)
    phase = draws.uniform(-math.pi, math.pi, n_coils, 1, 1) + slope[:, 0] * y + slope[:, 1] * x + 0.5 * slope[:, 2] * x * y
    amplitude = amplitude / amplitude.square().sum(1, keepdim=True).sqrt()
    return torch.polar(amplitude, phase)
