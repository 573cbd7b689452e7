"""Images from which PINQI may begin: they are there without any training."""

from __future__ import annotations

import torch

from recon_core.errors import SettingError
from recon_core.methods import llr
from recon_core.methods.pinqi.model import STARTS
from recon_core.problem import Problem
from recon_core.solvers.refinement import RefineSettings, refine
from recon_core.types import Report

Tensor = torch.Tensor

REFINEMENT = RefineSettings()
"""Of ``refined``: as `moe_dqinr` has it. Air before and behind the object is filtered too (no ``support``): aliasing that stays there
is missing in the object."""

OBJECT_LEVEL, OBJECT_NOISE = 0.05, 5.0
"""A pixel belongs to the object from this part of the peak and this many times the noise on."""

MARGIN, STEP = 8, 16
"""Readout positions around the object that are kept, and what their number is a multiple of: the networks' coarsest pixel."""


def first_images(problem: Problem, start: str) -> Tensor:
    """`llr` with its default settings on one posed slice; ``refined``: then a collaborative filter in turn with data consistency.

    Returns
    -------
    complex64 ``(state, y, x)``, centred, in the measured data's unit

    Raises
    ------
    SettingError
        Not a start of this kind.
    """
    return first_images_and_object(problem, start, crop=False)[0]


def first_images_and_object(problem: Problem, start: str, *, crop: bool = True) -> tuple[Tensor, slice]:
    """`first_images`, and the readout positions that the object fills; others keep the images of ``llr``.

    Raises
    ------
    SettingError
        Not a start of this kind.
    """
    if start not in STARTS[1:]:
        raise SettingError("unknown start", where="PINQI", got=start, expected=", ".join(STARTS[1:]))
    images = llr.estimate(problem, llr.Settings(), Report()).solution
    columns = object_columns(images, problem.noise) if crop else slice(0, images.shape[1])
    if start == "refined":
        inside, begun = problem.operator.with_columns(columns), images[:, columns]
        refined = refine(inside, problem.rhs[:, columns], problem.noise, begun, REFINEMENT)
        images[:, columns] = torch.lerp(refined, begun, REFINEMENT.part_of_start(problem.noise))
    return problem.leave(images)[:, 0].to(torch.complex64), columns


def object_columns(images: Tensor, noise: float) -> slice:
    """Readout positions of working images ``(state, x, z, y)`` that hold signal, with a margin; all if none does.

    Aliasing runs along the phase encoding, so beyond these there is nothing but noise.
    """
    n = images.shape[1]
    filled = (images.abs().amax((0, 2, 3)) > max(OBJECT_LEVEL, OBJECT_NOISE * noise)).nonzero().flatten().tolist()
    if not filled:
        return slice(0, n)
    first, end = max(0, filled[0] - MARGIN), min(n, filled[-1] + 1 + MARGIN)
    width = min(n, -(-(end - first) // STEP) * STEP)
    first = min(first, n - width)
    return slice(first, first + width)
