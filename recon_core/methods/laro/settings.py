"""What a user may choose of LARO as a method; everything else was decided when its weights were trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

from recon_core.methods.laro.model import PRECISIONS, STARTS
from recon_core.settings import setting

AUTO = "auto"

WEIGHTS_OF_PLANES = {"laro": (32, 64), "laro_206x80": (80, 206)}
"""Shipped weights by the plane ``(k2, k1)`` that they were trained on; `AUTO` takes the nearest, the first where nothing is known."""


@dataclass(frozen=True)
class Settings:
    """Which weights, from which images, how long."""

    weights: str = setting(
        AUTO, "name of the installed weights, see docs/laro.md; never a path; auto: of those shipped, by the scan's matrix"
    )
    start: str = setting(
        "weights",
        "first images: as the weights were trained ('weights'), locally low rank refined by a collaborative filter, locally low rank, "
        "a few steps of CG-SENSE, or zero-filled",
        choices=("weights", *STARTS),
    )
    unrolls: int = setting(0, "unrolled iterations; 0: as many as the weights were trained with", low=0, high=100)
    low_rank_steps: int = setting(
        4, "steps of locally low rank that follow the network and give back what it smoothed away; 0: none", low=0, high=1000
    )
    precision: str = setting("float32", "of the networks; bfloat16 is for GPUs", choices=PRECISIONS)
    memory_mb: float = setting(
        512.0,
        "planes are reconstructed in groups whose features take about so much memory",
        unit="MB",
        low=1.0,
        high=100000.0,
    )

    def weights_for(self, plane: tuple[int, int] | None) -> str:
        """Name of the weights for planes of so many positions: with `AUTO` those whose training's number is nearest, as a ratio."""
        if self.weights != AUTO:
            return self.weights
        if plane is None:
            return next(iter(WEIGHTS_OF_PLANES))
        n = max(1, math.prod(plane))
        return min(WEIGHTS_OF_PLANES, key=lambda name: abs(math.log(n / math.prod(WEIGHTS_OF_PLANES[name]))))
