"""Images from which PINQI may begin: those of the locally low rank reconstruction, which is there without any training."""

from __future__ import annotations

import torch

from recon_core.methods import llr
from recon_core.problem import Problem
from recon_core.types import Report


def low_rank_images(problem: Problem) -> torch.Tensor:
    """`llr` with its default settings on one posed slice.

    Returns
    -------
    complex64 ``(state, y, x)``, centred, in the measured data's unit
    """
    return problem.leave(llr.estimate(problem, llr.Settings(), Report()).solution)[:, 0].to(torch.complex64)
