"""First images of LARO: what the network, and its training, begin from."""

from __future__ import annotations

import torch

from recon_core.methods import cg_sense, llr
from recon_core.methods.laro.model import LEAST_SQUARES_STEPS, LEAST_SQUARES_TOLERANCE, LEAST_SQUARES_WEIGHT
from recon_core.problem import Problem
from recon_core.solvers.collaborative import PatchSettings
from recon_core.solvers.refinement import RefineSettings, object_of, refine
from recon_core.types import Report

Tensor = torch.Tensor

LEAST_OBJECT = 0.05
"""RMS of a plane against the brightest tissue: one in a hundred of its pixels at half brightness."""

REFINEMENT = RefineSettings(iterations=9, first_sigma=0.06, threshold=2.0, patches=PatchSettings(reach=5))
"""Three iterations across each axis of a slab; strengths chosen on two validation heads, R = 8 and 4."""

MARGIN = 1
"""Voxels around the object that are filtered with it."""

LOW_RANK_PART = 0.15
"""Of the time that refined images take."""


def low_rank_or_refined(start: str, problem: Problem, report: Report) -> Tensor:
    """First images ``llr`` or ``refined``: working images, scaled units. A single echo has no rank: `least_squares`."""
    if problem.rhs.shape[0] == 1:
        return least_squares(problem)
    if start != "refined":
        return llr.estimate(problem, llr.Settings(), report).solution
    images = llr.estimate(problem, llr.Settings(), Share(report, 0.0, LOW_RANK_PART)).solution
    return _refined(problem, images, Share(report, LOW_RANK_PART, 1.0))


def least_squares(problem: Problem) -> Tensor:
    """A few steps of CG-SENSE."""
    return cg_sense.solve(problem, LEAST_SQUARES_WEIGHT, LEAST_SQUARES_STEPS, LEAST_SQUARES_TOLERANCE, Report()).solution


def _refined(problem: Problem, images: Tensor, report: Report) -> Tensor:
    """Collaborative filter in turn with data consistency. Planes of air along the readout of a slab keep what they have."""
    is_slab = min(images.shape[2:]) > 1
    air = planes_of_air(images.movedim(1, 0), problem.noise) & is_slab
    if bool(air.all()):
        return images
    refined = refine(
        problem.operator,
        problem.rhs,
        problem.noise,
        images,
        REFINEMENT,
        lambda done, _: report.progress((done + 1) / REFINEMENT.iterations, "refinement"),
        object_of(images, object_level(problem.noise), MARGIN),
    )
    refined[:, air] = images[:, air]
    return refined


def object_level(noise: float) -> float:
    """Amplitude above which there is an object; the brightest tissue of the scan is near 1, ``noise`` is of a complex sample."""
    return max(LEAST_OBJECT, 2 * noise)


def planes_of_air(images: Tensor, noise: float) -> Tensor:
    """Which planes ``(plane, echo, z, y)`` hold no object: bool ``(plane,)``.

    The network's normalisation lifts whatever is in a plane to full size, and it has learned on planes with an object: of noise alone it
    makes stripes. Such planes keep their first images.

    Parameters
    ----------
    images
        First images; the brightest tissue of the scan is near 1.
    noise
        Standard deviation of a complex sample, in these units.
    """
    return images.abs().square().mean((1, 2, 3)).sqrt() < object_level(noise)


class Share(Report):
    """Progress of a part of the method."""

    def __init__(self, report: Report, first: float, last: float) -> None:
        self._report, self._first, self._last = report, first, last

    def progress(self, fraction: float, message: str = "") -> None:
        self._report.progress(self._first + (self._last - self._first) * fraction, message)

    def warn(self, message: str) -> None:
        self._report.warn(message)
