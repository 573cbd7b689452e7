"""Images from which PINQI may begin: they are there without any training."""

from __future__ import annotations

import torch

from recon_core.errors import SettingError
from recon_core.methods import llr
from recon_core.methods.pinqi.model import STARTS
from recon_core.problem import Problem
from recon_core.solvers.refinement import RefineSettings, object_of, refine
from recon_core.types import Report

REFINEMENT = RefineSettings(iterations=8, momentum=1.0)
"""Of ``refined``: half as many iterations as `moe_dqinr` has, with more momentum (chosen on validation slices)."""

OBJECT_LEVEL, OBJECT_MARGIN = 0.04, 3
"""Where the collaborative filter looks: RMS over delays against the brightest tissue, and pixels around it."""


def first_images(problem: Problem, start: str) -> torch.Tensor:
    """`llr` with its default settings on one posed slice; ``refined``: then a collaborative filter in turn with data consistency.

    Returns
    -------
    complex64 ``(state, y, x)``, centred, in the measured data's unit

    Raises
    ------
    SettingError
        Not a start of this kind.
    """
    if start not in STARTS[1:]:
        raise SettingError("unknown start", where="PINQI", got=start, expected=", ".join(STARTS[1:]))
    images = llr.estimate(problem, llr.Settings(), Report()).solution
    if start == "refined":
        where = object_of(images, OBJECT_LEVEL, OBJECT_MARGIN)
        refined = refine(problem.operator, problem.rhs, problem.noise, images, REFINEMENT, support=where)
        images = torch.lerp(refined, images, REFINEMENT.part_of_start(problem.noise))
    return problem.leave(images)[:, 0].to(torch.complex64)
