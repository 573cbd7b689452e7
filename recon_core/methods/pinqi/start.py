"""Images from which PINQI may begin: they are there without any training."""

from __future__ import annotations

import torch

from recon_core.errors import SettingError
from recon_core.methods import llr
from recon_core.methods.pinqi.model import STARTS
from recon_core.problem import Problem
from recon_core.solvers.refinement import RefineSettings, refine
from recon_core.types import Report

REFINEMENT = RefineSettings()
"""Of ``refined``: as `moe_dqinr` has it. Air is filtered too (no ``support``): aliasing that stays there is missing in the object."""


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
        refined = refine(problem.operator, problem.rhs, problem.noise, images, REFINEMENT)
        images = torch.lerp(refined, images, REFINEMENT.part_of_start(problem.noise))
    return problem.leave(images)[:, 0].to(torch.complex64)
