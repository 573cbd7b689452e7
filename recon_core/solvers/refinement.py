"""From a first estimate to the final images: data consistency in turn with a collaborative filter of falling strength.

Half-quadratic splitting of ``|A x - b|^2 / 2 + R(x)``:

    z = filter(x + beta (x - x_before), sigma_k)
    x = argmin_x |A x - b|^2 / 2 + mu_k |x - z|^2 / 2,   mu_k = lambda (noise / sigma_k)^2

``sigma_k`` falls geometrically from what undersampling artefacts look like down to the noise. The answer is the last ``z``,
averaged with the start where there is little noise: the errors of a filtered and of a low-rank image are not the same.

A slab is filtered in planes, across another axis in every iteration: patches of all three orientations take part.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from recon_core.batches import batch
from recon_core.operators.cartesian import CartesianSense
from recon_core.solvers.cg import conjugate_gradient
from recon_core.solvers.collaborative import PatchGroups, PatchSettings

Tensor = torch.Tensor

SLAB_BLOCK = 1 << 20
"""Elements of an image series that data consistency of a slab takes at a time."""

LEAST_NOISE = 1e-3
"""Noise, relative to the peak, below which undersampling artefacts and float32 matter more."""

QUIET = 0.005
"""Noise, relative to the peak, up to which the full ``pull`` holds. With more, data consistency brings back more noise than
artefacts and the pull falls with the noise's root to half (tuned on anatomies 0 to 2, ``benchmarks/dynamic_cells.py``)."""


@dataclass(frozen=True)
class RefineSettings:
    """How long and how strongly.

    Attributes
    ----------
    iterations, first_sigma, last_sigma
        ``sigma_k`` falls from ``first_sigma`` (relative to the peak) to ``last_sigma`` times the noise.
    threshold
        Of the filter, in units of ``sigma_k``.
    pull
        lambda for little noise (see ``QUIET``): how strongly data consistency is drawn to the filtered images.
    momentum
        beta.
    start_part
        Part of the start in the answer for little noise (see ``QUIET``); with more noise it falls as its inverse.
    regroup
        Iterations after which similar patches are looked for again (of a slab: iterations across the same axis).
    cg_iterations
        Of each data consistency step.
    patches
        Size and reach of the patch groups.
    """

    iterations: int = 16
    first_sigma: float = 0.04
    last_sigma: float = 1.0
    threshold: float = 1.7
    pull: float = 0.6
    momentum: float = 0.8
    start_part: float = 0.25
    regroup: int = 5
    cg_iterations: int = 2
    patches: PatchSettings = PatchSettings()

    def sigma(self, iteration: int, noise: float) -> float:
        """``sigma_k``, never rising: with more noise than ``first_sigma`` it is the noise from the beginning."""
        last = self.last_sigma * max(noise, LEAST_NOISE)
        first = max(self.first_sigma, last)
        part = iteration / max(1, self.iterations - 1)
        return float(first * (last / first) ** part)

    def part_of_start(self, noise: float) -> float:
        """How much of the start the answer keeps."""
        return self.start_part * min(1.0, QUIET / max(noise, LEAST_NOISE))

    def weight(self, iteration: int, noise: float) -> float:
        """``mu_k``."""
        pull = self.pull * min(1.0, max(0.5, math.sqrt(QUIET / max(noise, LEAST_NOISE))))
        return pull * (max(noise, LEAST_NOISE) / self.sigma(iteration, noise)) ** 2


def refine(
    operator: CartesianSense,
    rhs: Tensor,
    noise: float,
    start: Tensor,
    settings: RefineSettings,
    on_iteration: Callable[[int, Tensor], None] | None = None,
    support: Tensor | None = None,
) -> Tensor:
    """Refined working images ``(state, x, z, y)``, scaled units; z is 1 for a slice.

    Parameters
    ----------
    operator, rhs
        ``A`` and ``A^H b``.
    noise
        Standard deviation of a complex sample.
    start
        First estimate, working images.
    on_iteration
        Called with the number of the iteration and its ``z``.
    support
        bool ``(x, z, y)``: only patches that touch it are filtered (`object_of`). Saves time; but aliasing that stays in air is
        missing in the object, which with one phase-encoded axis costs a lot (`recon_core.methods.pinqi.start`).

    Beside the problem and the start, three arrays of the images' size are held for a slab, and where the groups begin.
    """
    x, before = start, start
    z = start
    axes = _plane_axes(start)
    groups: dict[int, list[PatchGroups | None]] = {}
    for iteration in range(settings.iterations):
        sigma = settings.sigma(iteration, noise)
        axis = axes[iteration % len(axes)]
        if axis not in groups or iteration // len(axes) % settings.regroup == 0:
            groups[axis] = _grouped(x, axis, settings.patches, support)
        z = torch.lerp(before, x, 1 + settings.momentum)
        _filter(z, axis, groups[axis], sigma, settings.threshold)
        if on_iteration is not None:
            on_iteration(iteration, z)
        before = x
        x = consistent(operator, rhs, z, settings.weight(iteration, noise), settings.cg_iterations)
    return z


def object_of(images: Tensor, level: float, margin: int) -> Tensor:
    """Where a series has signal: bool ``(x, z, y)`` of working images, grown by ``margin`` voxels along every axis longer than 1.

    A voxel has signal where the root mean square over states exceeds ``level``.
    """
    found = (images.abs().square().mean(0).sqrt() > level).float()[None, None]
    sides = [2 * margin + 1 if n > 1 else 1 for n in found.shape[2:]]
    grown = torch.nn.functional.max_pool3d(found, sides, 1, [side // 2 for side in sides])
    return grown[0, 0] > 0


def _plane_axes(images: Tensor) -> tuple[int, ...]:
    """Axes of working images ``(state, x, z, y)`` across which planes are cut: all of a slab, the short one of a slice."""
    short = tuple(axis for axis in (1, 2, 3) if images.shape[axis] == 1)
    return short[:1] or (1, 2, 3)


def _grouped(images: Tensor, axis: int, settings: PatchSettings, support: Tensor | None) -> list[PatchGroups | None]:
    """The groups of every plane; ``None`` for a plane without support."""
    side = min(settings.side, *(n for i, n in enumerate(images.shape) if i not in (0, axis)))
    chosen = replace(settings, side=side)
    planes = images.movedim(axis, 0)
    if support is None:
        return [PatchGroups(plane, chosen) for plane in planes]
    return [
        PatchGroups(plane, chosen, where) if bool(where.any()) else None
        for plane, where in zip(planes, support.movedim(axis - 1, 0), strict=True)
    ]


def _filter(images: Tensor, axis: int, groups: list[PatchGroups | None], sigma: float, threshold: float) -> None:
    """In place."""
    for group, plane in zip(groups, images.movedim(axis, 0), strict=True):
        if group is not None:
            plane.copy_(group.filter(plane, sigma, threshold))


def consistent(operator: CartesianSense, rhs: Tensor, prior: Tensor, weight: float, iterations: int) -> Tensor:
    """``argmin_x |A x - b|^2 / 2 + weight |x - prior|^2 / 2`` by conjugate gradients from the prior.

    Readout positions are problems of their own. Those of a slab are solved as such, a part of them at a time; a slice is one system.
    """
    if min(prior.shape[1:]) == 1:
        return _solved(operator, rhs, prior, weight, iterations, 0)
    found = torch.empty_like(prior)
    step = max(1, batch(SLAB_BLOCK) // prior[:, 0].numel())
    for first in range(0, prior.shape[1], step):
        part = slice(first, first + step)
        found[:, part] = _solved(operator.with_columns(part), rhs[:, part], prior[:, part], weight, iterations, 1)
    return found


def _solved(
    operator: CartesianSense, rhs: Tensor, prior: Tensor, weight: float, iterations: int, n_batch_axes: int
) -> Tensor:
    def swapped(images: Tensor) -> Tensor:
        return images.movedim(1, 0) if n_batch_axes else images

    def normal(images: Tensor) -> Tensor:
        return swapped(operator.normal(swapped(images)).add_(swapped(images), alpha=weight))

    solution = conjugate_gradient(
        normal,
        swapped(rhs + weight * prior),
        initial=swapped(prior).contiguous(),
        max_iterations=iterations,
        tolerance=1e-4,
        n_batch_axes=n_batch_axes,
    ).solution
    return swapped(solution)
