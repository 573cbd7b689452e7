"""Sampling pattern optimisation (SPO) of LARO: learned probabilities, stochastic masks with a straight-through gradient.

Zhang et al., "LARO: Learned Acquisition and Reconstruction Optimization to accelerate Quantitative Susceptibility Mapping",
Eqs. 4 to 6. Axes are ``(echo, k2, k1)``; DC is at index ``n // 2``.

Where this deviates from the paper: there the central block is set to one *after* sampling, so that a scan has more samples
than the requested ratio (11.8 % for a ratio of 10 % of 206 x 80). Here the block has probability 1 and the rest is
renormalised, so that the expected number of samples *is* the requested number, in training as in the drawn mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates
from torch import nn

from recon_core.errors import DataError, SettingError
from recon_core.sampling.masks import centre_block, radius

Tensor = torch.Tensor
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

SLOPE = 0.25
"""Of the sigmoid, ``a`` of Eq. 4."""

ACS = (20, 20)
"""Central block ``(k2, k1)`` for self-calibration (paper, network architecture)."""

FIXED, SINGLE, PER_ECHO = 0, 1, 2
"""SPO: 0 hand-made multi-level density, 1 one learned pattern for all echoes, 2 one learned pattern per echo."""

LEVELS = 12
"""Rings of constant density of the hand-made pattern."""


@dataclass(frozen=True)
class SamplingSettings:
    """What a sampling pattern is for.

    Attributes
    ----------
    shape
        ``(k2, k1)`` of the phase-encoding grid.
    n_echoes
        Echoes of the train.
    n_samples
        Positions that each echo samples, central block included.
    acs
        Central block ``(k2, k1)`` that is always sampled.
    spo
        0 hand-made density, 1 one learned pattern, 2 one learned pattern per echo.
    slope
        Of the sigmoid (Eq. 4).
    seed
        Of the fixed pattern of ``spo`` 0.
    """

    shape: tuple[int, int]
    n_echoes: int
    n_samples: int
    acs: tuple[int, int] = ACS
    spo: int = PER_ECHO
    slope: float = SLOPE
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or self.n_echoes < 1:
            raise SettingError("empty pattern", where="sampling", got=(self.n_echoes, *self.shape), expected="1 or more")
        if self.spo not in (FIXED, SINGLE, PER_ECHO):
            raise SettingError("no such optimisation", where="sampling.spo", got=self.spo, expected="0, 1 or 2")
        if not (math.isfinite(self.slope) and self.slope > 0):
            raise SettingError("not a slope", where="sampling.slope", got=self.slope, expected="above 0")
        _check_count(self.n_samples, self.shape, self.acs)


def samples_for(shape: tuple[int, int], acceleration: float, n_segments: int = 1) -> int:
    """Samples per echo at ``acceleration``, rounded up to full segments: 206 x 80 at 8 in 11 segments are 188 x 11 = 2068.

    Where the grid has not that many positions they are rounded down: 206 x 80 at 1 in 11 segments are 1498 x 11 = 16478 of 16480.

    Raises
    ------
    SettingError
        An acceleration below 1, no segments, or more of them than positions.
    """
    if not (math.isfinite(acceleration) and acceleration >= 1):
        raise SettingError("not an acceleration", where="mask.acceleration", got=acceleration, expected="1 or more")
    if n_segments < 1:
        raise SettingError("no segments", where="mask.segments", got=n_segments, expected="1 or more")
    available = shape[0] * shape[1]
    if n_segments > available:
        raise SettingError(
            "more segments than positions", where="mask.segments", got=n_segments, expected=f"at most {available}"
        )
    wanted = n_segments * math.ceil(round(available / acceleration, 9) / n_segments)
    return wanted if wanted <= available else n_segments * (available // n_segments)


def renormalise(probability: Tensor, mean: Tensor | float) -> Tensor:
    """Scale probabilities so that their mean over the last axis is ``mean``, all staying in [0, 1] (Eq. 4, LOUPE).

    Too large a mean is lowered by scaling the probabilities, too small a one is raised by scaling their complements.

    Parameters
    ----------
    probability
        ``(..., position)`` in (0, 1).
    mean
        Wanted mean, in [0, 1].
    """
    found = probability.mean(dim=-1, keepdim=True)
    tiny = torch.finfo(probability.dtype).tiny
    lowered = probability * (mean / found.clamp_min(tiny))
    raised = 1.0 - (1.0 - probability) * ((1.0 - mean) / (1.0 - found).clamp_min(tiny))
    return torch.where(found >= mean, lowered, raised).clamp(0.0, 1.0)


class _StraightThrough(torch.autograd.Function):
    """``1_{z < P}`` forward (Eq. 5); the gradient passes to ``P`` unchanged (Eq. 6)."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, probability: Tensor, uniform: Tensor) -> Tensor:
        return (uniform < probability).to(probability.dtype)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def sample(probability: Tensor, uniform: Tensor) -> Tensor:
    """Binary samples of independent Bernoulli variables, with the straight-through gradient (Eqs. 5 and 6).

    Parameters
    ----------
    probability
        Any shape, in [0, 1].
    uniform
        The same shape, uniform in [0, 1).

    Returns
    -------
    Tensor
        0 or 1 in the dtype of ``probability``; its gradient with respect to ``probability`` is taken as the identity.
    """
    sampled: Tensor = _StraightThrough.apply(probability, uniform)
    return sampled


class LearnedSampling(nn.Module):
    """The SPO module (Fig. 1b): weights to probabilities to a binary mask, one per forward pass.

    Weights start at zero, that is, at equal probabilities outside the central block. With ``spo`` 0 there is nothing to
    learn: the mask is one fixed draw of :func:`multilevel_density`.
    """

    weights: Tensor
    fixed: Tensor
    block: Tensor

    def __init__(self, settings: SamplingSettings) -> None:
        super().__init__()
        self.settings = settings
        block = centre_block(settings.shape, settings.acs)
        self.register_buffer("block", torch.from_numpy(block), persistent=False)
        if settings.spo == FIXED:
            density = multilevel_density(settings.shape, settings.n_samples, settings.acs)
            mask = draw_mask(density[None], settings.n_samples, settings.seed, settings.acs)
            self.register_buffer("density", torch.from_numpy(density[None]).float(), persistent=False)
            self.register_buffer("fixed", torch.from_numpy(mask).float())
        else:
            patterns = settings.n_echoes if settings.spo == PER_ECHO else 1
            self.weights = nn.Parameter(torch.zeros(patterns, *settings.shape))

    @torch.no_grad()
    def start_from_density(self) -> None:
        """Set the weights to those of the hand-made density, from which short trainings get further than from equal ones."""
        s = self.settings
        if s.spo != FIXED:
            self.start_from(multilevel_density(s.shape, s.n_samples, s.acs)[None])

    @torch.no_grad()
    def start_from(self, probability: NDArray[np.floating]) -> None:
        """Set the weights to those of probabilities ``(echo or 1, k2, k1)``; one pattern takes the first echo's.

        Raises
        ------
        DataError
            They are fixed (``spo`` 0), or for another matrix or number of echoes.
        """
        s = self.settings
        if s.spo == FIXED or probability.shape[1:] != s.shape or len(probability) not in (1, s.n_echoes):
            expected = "nothing: the pattern is fixed" if s.spo == FIXED else f"{(s.n_echoes, *s.shape)}"
            raise DataError("probabilities do not fit", where="mask", got=probability.shape, expected=expected)
        given = torch.from_numpy(np.asarray(probability)).to(self.weights)[: len(self.weights)]
        self.weights.copy_((torch.logit(given.clamp(1e-3, 1 - 1e-3)) / s.slope).expand_as(self.weights))

    def probability(self) -> Tensor:
        """Probability of each position: ``(echo, k2, k1)``; the mean of every echo is ``n_samples`` over the grid (Eq. 4)."""
        s = self.settings
        if s.spo == FIXED:
            return self.get_buffer("density").expand(s.n_echoes, -1, -1)
        free = ~self.block
        n_free = int(free.sum())
        result = torch.ones_like(self.weights)
        if n_free:
            wanted = (s.n_samples - (free.numel() - n_free)) / n_free
            rest = renormalise(torch.sigmoid(s.slope * self.weights[:, free]), wanted)
            result = result.masked_scatter(free.expand_as(result), rest)
        return result.expand(s.n_echoes, -1, -1)

    def forward(self, generator: torch.Generator | None = None) -> Tensor:
        """A fresh binary mask ``(echo, k2, k1)`` in the weights' dtype; the gradient reaches the weights through Eq. 6.

        Parameters
        ----------
        generator
            On the weights' device; ``None`` takes the global one.
        """
        s = self.settings
        if s.spo == FIXED:
            return self.fixed.expand(s.n_echoes, -1, -1)
        probability = self.probability()[: len(self.weights)]
        uniform = torch.rand(probability.shape, generator=generator, dtype=probability.dtype, device=probability.device)
        return sample(probability, uniform).expand(s.n_echoes, -1, -1)

    def draw(self, seed: int) -> BoolArray:
        """The mask for the second training phase and for a scan: exactly ``n_samples`` per echo, bool ``(echo, k2, k1)``."""
        s = self.settings
        if s.spo == FIXED:
            patterns = self.fixed.cpu().numpy() > 0
        else:
            probability = self.probability()[: len(self.weights)].detach().cpu().double().numpy()
            patterns = draw_mask(probability, s.n_samples, seed, s.acs)
        return np.array(np.broadcast_to(patterns, (s.n_echoes, *s.shape)))


def multilevel_density(
    shape: tuple[int, int], n_samples: int, acs: tuple[int, int] = ACS, *, levels: int = LEVELS, power: float = 1.5
) -> FloatArray:
    """Hand-made multi-level density (SPO = 0): rings around DC, each of one probability ``exp(-(b k)^power)``.

    The scheme of Roman, Hansen and Adcock (arXiv:1406.4178) that the paper cites; the paper does not give its density.
    ``b`` is solved for, so that ``n_samples`` are expected in all, central block included.

    Returns
    -------
    float64 ``(k2, k1)`` in [0, 1], 1 in the central block.

    Raises
    ------
    SettingError
        More samples than positions, or fewer than the block has.
    """
    _check_count(n_samples, shape, acs)
    block = centre_block(shape, acs)
    r = radius(shape)
    ring = np.minimum((r * levels).astype(int), levels) / levels  # the corners beyond radius 1 are one more ring

    def density(b: float) -> FloatArray:
        return np.where(block, 1.0, np.exp(-((b * ring) ** power)))

    low, high = 0.0, 1.0
    while density(high).sum() > n_samples and high < 1e6:
        high *= 2
    for _ in range(100):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if density(middle).sum() > n_samples else (low, middle)
    found = density(high)
    # what the innermost ring leaves over when even it has to be thinned out (few samples, large block)
    free = ~block
    excess = found.sum() - n_samples
    if abs(excess) > 1e-9 and free.any() and found[free].sum() > 0:
        found[free] *= max(0.0, 1.0 - excess / found[free].sum())
    return np.asarray(np.clip(found, 0.0, 1.0))


def draw_mask(probability: FloatArray, n_samples: int, seed: int, acs: tuple[int, int] = ACS) -> BoolArray:
    """Masks of exactly ``n_samples`` positions per echo, reproducibly.

    Independent Bernoulli draws (Eq. 5) have a random number of samples, which no sequence can play. Here positions are
    sampled systematically in random order: the count is exact, and each position is taken with its own probability
    (renormalised where the probabilities do not add up to ``n_samples``).

    Parameters
    ----------
    probability
        ``(echo, k2, k1)`` in [0, 1].
    seed
        The same seed gives the same mask; an echo's draw does not depend on how many echoes follow.
    acs
        Central block ``(k2, k1)``, sampled always and counted.

    Returns
    -------
    bool ``(echo, k2, k1)``

    Raises
    ------
    DataError
        Probabilities outside [0, 1], not finite, or not three axes.
    SettingError
        More samples than positions, or fewer than the block has.
    """
    p = np.asarray(probability, dtype=np.float64)
    if p.ndim != 3 or not np.isfinite(p).all() or p.min(initial=0) < 0 or p.max(initial=0) > 1:
        raise DataError("not probabilities", where="mask", got=f"shape {p.shape}", expected="(echo, k2, k1) in [0, 1]")
    shape = (int(p.shape[1]), int(p.shape[2]))
    _check_count(n_samples, shape, acs)
    block = centre_block(shape, acs)
    free = np.flatnonzero(~block.ravel())
    n_free = n_samples - int(block.sum())
    masks = np.repeat(block[None], len(p), axis=0)
    for echo, values in enumerate(p.reshape(len(p), -1)):
        if n_free == 0:
            break
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, echo))))
        wanted = renormalise(torch.from_numpy(values[free]), n_free / len(free)).numpy()
        masks[echo].reshape(-1)[free[_systematic(wanted, n_free, rng)]] = True
    return masks


def _systematic(probability: FloatArray, n: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """``n`` different indices; index ``i`` is among them with ``probability[i]`` (which add up to ``n``)."""
    order = rng.permutation(len(probability))
    edges = np.cumsum(probability[order])
    edges *= n / edges[-1]
    points = np.arange(n) + rng.random()
    chosen = np.searchsorted(edges, points, side="right")
    # rounding may make a probability of 1 a little more, and two points fall on it: the next free index takes the second
    for i in range(1, n):
        chosen[i] = max(chosen[i], chosen[i - 1] + 1)
    if chosen[-1] >= len(order):  # the same at the end: from behind
        chosen = np.minimum(chosen, len(order) - np.arange(n, 0, -1))
    return np.asarray(order[chosen])


def interpolate_probability(probability: FloatArray, shape: tuple[int, int], n_samples: int) -> FloatArray:
    """Probability maps for another matrix: bilinear, DC on DC and edge on edge, mean renormalised to ``n_samples``.

    What the paper does for another voxel size (generalisation experiments): the new pattern is then drawn from it.

    Parameters
    ----------
    probability
        ``(echo, k2, k1)`` in [0, 1].
    shape
        New ``(k2, k1)``.

    Returns
    -------
    float64 ``(echo, *shape)`` in [0, 1]

    Raises
    ------
    DataError
        Not three axes.
    SettingError
        More samples than positions.
    """
    p = np.asarray(probability, dtype=np.float64)
    if p.ndim != 3:
        raise DataError("not probability maps", where="mask", got=f"shape {p.shape}", expected="(echo, k2, k1)")
    _check_count(n_samples, shape, (0, 0))
    axes = [(np.arange(new) - new // 2) * (old / new) + old // 2 for new, old in zip(shape, p.shape[1:], strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    moved = np.stack([map_coordinates(echo, grid, order=1, mode="nearest") for echo in p]).clip(0.0, 1.0)
    flat = renormalise(torch.from_numpy(moved.reshape(len(p), -1)), n_samples / (shape[0] * shape[1]))
    return flat.numpy().reshape(len(p), *shape)


def _check_count(n_samples: int, shape: tuple[int, int], acs: tuple[int, int]) -> None:
    n_block = int(centre_block(shape, acs).sum())
    if not max(1, n_block) <= n_samples <= shape[0] * shape[1]:
        raise SettingError(
            "impossible number of samples",
            where="mask.n_samples",
            got=n_samples,
            expected=f"{max(1, n_block)} (the central block) to {shape[0] * shape[1]}",
            remedy="change the acceleration or the central block",
        )
