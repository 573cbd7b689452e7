"""What a user may choose of PINQI as a method; everything else was decided when its weights were trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from recon_core.methods.pinqi.model import PRECISIONS
from recon_core.settings import setting
from recon_core.solvers.nonlinear_layer import SOLVERS

DEFAULT_WEIGHTS = "pinqi_t1"
FAILURES = ("tell", "mark", "error")
COIL_MAP_SOURCES = ("longest", "chain")


@dataclass(frozen=True)
class Settings:
    """Which weights, and what may be believed of the maps.

    Attributes
    ----------
    same_as
        Settings of the fit of images that say the same as one of these: who gives one gives both, so that a map has the same limits
        whoever makes it, this method or the fit of the fallback's images.
    """

    same_as: ClassVar[dict[str, str]] = {"t1_min": "map_t1_min", "t1_max": "map_t1_max"}

    weights: str = setting(DEFAULT_WEIGHTS, "name of the installed weights, see docs/pinqi.md; never a path")
    coil_map_source: str = setting(
        "longest",
        "calibration lines that coil maps come from: the longest delay's, which has the most signal, or those that the chain's "
        "setting 'calibration' chooses",
        choices=COIL_MAP_SOURCES,
    )
    regularisation: str = setting(
        "noise",
        "how much what was learned counts: less where there is less noise than most training samples had, or always as learned",
        choices=("noise", "learned"),
    )
    precision: str = setting("float32", "of the networks; bfloat16 is for GPUs", choices=PRECISIONS)
    nonlinear_solver: str = setting(
        "lm",
        "of the parameters' subproblem: Levenberg-Marquardt for every pixel, or one L-BFGS for all as published, slower and less exact",
        choices=SOLVERS,
    )
    t1_min: float = setting(
        0.05, "shortest plausible T1, also of the fit of a fallback's images", unit="s", low=0.001, high=1.0
    )
    t1_max: float = setting(
        6.0, "longest plausible T1, also of the fit of a fallback's images", unit="s", low=1.0, high=60.0
    )
    signal_floor: float = setting(
        0.05,
        "a pixel whose series is below this part of its 99.9th percentile (RMS over states) has no T1",
        low=0.0,
        high=1.0,
    )
    max_relative_sd: float = setting(
        1.0,
        "largest standard deviation of T1 as a part of T1; it is that of a fit without regularisation, so more than the error",
        low=0.001,
        high=10.0,
    )
    quality_noise: float = setting(
        1.1,
        "the maps fail when their residual against the measured data is above this many times the noise",
        low=1.0,
        high=1000.0,
    )
    quality_signal: float = setting(
        0.03, "... and what noise does not explain of it is above this part of the data (both must hold)", low=0.0, high=1.0
    )
    quality_failure: str = setting(
        "mark",
        "maps that fail: 'tell' says so, 'mark' also empties the pixels that do not fit (all where T1 would be a tenth wrong), "
        "'error' lets the chain's fallback answer",
        choices=FAILURES,
    )
