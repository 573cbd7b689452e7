"""Settings of MoE-dqINR, and the plan (network, iterations, refinement) that preset, device and changes make of them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from recon_core.errors import SettingError
from recon_core.methods.moe_dqinr.configurations import (
    DYNAMIC,
    QUANTITATIVE,
    SMALL_DYNAMIC,
    SMALL_QUANTITATIVE,
    Configuration,
    MlpShape,
)
from recon_core.methods.moe_dqinr.fit import FitSettings
from recon_core.methods.moe_dqinr.gradients import PRECISIONS
from recon_core.methods.moe_dqinr.model import VARIANTS
from recon_core.settings import setting
from recon_core.solvers.refinement import RefineSettings

PRESETS = ("auto", "paper", "default", "cpu")
CONFIGURATIONS = ("dynamic", "quantitative")


@dataclass(frozen=True)
class Settings:
    """Preset and configuration decide nearly everything; the rest are the parts that ``default`` adds to the paper's method."""

    preset: str = setting(
        "auto", "paper: as published; default: for a GPU; cpu: smaller; auto: default or cpu by the device", choices=PRESETS
    )
    configuration: str = setting(
        "dynamic", "dynamic (frames, with residual branch) or quantitative (contrasts)", choices=CONFIGURATIONS
    )
    variant: str = setting("full", "which branches there are (paper, Table 4)", choices=VARIANTS)
    iterations: int = setting(0, "k-space iterations of the network; 0: the preset's", low=0, high=20000)
    warm_start: bool = setting(True, "start router and experts from a quick low-rank image (default, cpu)")
    network: bool = setting(True, "fit the network at all; without it the low-rank image is refined (default, cpu)")
    refine: bool = setting(True, "collaborative filter and data consistency after the network (default, cpu)")
    held_out: float = setting(
        0.1,
        "part of the outer lines that the network does not see and is judged by; 0: none, and the refinement never starts from "
        "its images (default, cpu)",
        low=0.0,
        high=0.5,
    )
    filter_strength: float = setting(
        1.0, "strength of the collaborative filter, 1: by the noise (default, cpu)", low=0.0, high=10.0
    )
    precision: str = setting("", "of the networks' products; empty: the preset's", choices=("", *PRECISIONS))
    seed: int = setting(0, "of initial parameters and held-out lines", low=0, high=2**31 - 1)

    def __post_init__(self) -> None:
        """Refuse what would change nothing: whoever asks for it expects other images.

        Raises
        ------
        SettingError
            Settings that exclude each other.
        """
        changed = {f.name for f in fields(self) if getattr(self, f.name) != f.default}
        if self.configuration == "quantitative" and self.variant == "residual_only":
            raise SettingError(
                "the quantitative configuration has no residual branch",
                where="variant",
                got="residual_only",
                expected="full or no_residual",
            )
        if self.preset == "paper":
            # what is off in the published method anyway may be switched off
            _refuse(changed & {"network", "filter_strength"}, "preset = paper", "Choose default or cpu")
            if self.held_out > 0:
                _refuse(changed & {"held_out"}, "preset = paper", "Choose default or cpu")
        if not self.refine:
            _refuse(changed & {"network", "filter_strength"}, "refine = false", "Leave one of them out")
        if not self.network:
            _refuse(changed & {"variant"}, "network = false", "Leave one of them out")


def _refuse(names: set[str], where: str, remedy: str) -> None:
    if names:
        raise SettingError("changes nothing there", where=where, got=", ".join(sorted(names)), remedy=remedy)


@dataclass(frozen=True)
class Plan:
    """A preset, spelled out.

    Attributes
    ----------
    configuration, fit
        The network and its k-space iterations.
    network
        Whether there is one.
    prefit
        Image-domain iterations before them; ``None``: start from random parameters.
    refinement
        ``None``: the network's images are the answer.
    held_out
        Part of the outer lines that the network does not see and is judged by.
    support
        Only pixels with signal in the first estimate belong to the network.
    """

    name: str
    configuration: Configuration
    fit: FitSettings
    network: bool
    prefit: FitSettings | None
    refinement: RefineSettings | None
    held_out: float
    support: bool


PAPER_FIT = FitSettings(iterations=850)

DEFAULT_FIT = FitSettings(iterations=100, schedule="cosine", lr_image=3e-4)
DEFAULT_PREFIT = FitSettings(iterations=480, schedule="cosine", weight_decay=0.0, column_parts=8, lr_image=1e-2)

CPU_BRANCH = MlpShape(width=64, depth=1)
"""On a CPU one hidden layer: half the time of three and, started from an image, no worse (benchmarks/moe_dqinr.py)."""

CPU_FIT = FitSettings(iterations=40, schedule="cosine", column_parts=4, lr_image=3e-4)
CPU_PREFIT = FitSettings(iterations=320, schedule="cosine", weight_decay=0.0, column_parts=8, lr_image=1e-2)
"""A part of the readout columns in each iteration: the sum over columns makes them unbiased steps at a part of the cost, and many
small steps reach further than few large ones. The k-space steps are short: longer ones only lose what the regression found."""


def plan_for(settings: Settings, device_type: str) -> Plan:
    """The preset that the settings name, for the device that the data are on, with what they override."""
    preset = settings.preset
    if preset == "auto":
        preset = "cpu" if device_type == "cpu" else "default"
    dynamic = settings.configuration == "dynamic"
    if preset == "paper":
        published = DYNAMIC if dynamic else QUANTITATIVE
        plan = Plan("paper", published, PAPER_FIT, True, None, None, 0.0, False)
    else:
        on_cpu = preset == "cpu"
        refinement = RefineSettings()
        refinement = replace(refinement, threshold=refinement.threshold * settings.filter_strength)
        small = SMALL_DYNAMIC if dynamic else SMALL_QUANTITATIVE
        if on_cpu:
            small = replace(small, name=f"cpu {settings.configuration}", expert=CPU_BRANCH, background=CPU_BRANCH)
        plan = Plan(
            preset,
            small,
            CPU_FIT if on_cpu else DEFAULT_FIT,
            settings.network,
            (CPU_PREFIT if on_cpu else DEFAULT_PREFIT) if settings.warm_start else None,
            refinement if settings.refine else None,
            settings.held_out,
            on_cpu,
        )
    fit = plan.fit
    if settings.iterations:
        fit = replace(fit, iterations=settings.iterations)
    if settings.precision:
        fit = replace(fit, precision=settings.precision)
    return replace(plan, fit=replace(fit, seed=settings.seed))
