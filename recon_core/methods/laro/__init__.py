"""LARO: learned masks and unrolled multi-echo reconstruction (Zhang et al., doi:10.1002/mrm.29582)."""

from recon_core.methods.laro.reconstruction import (
    FIDELITY,
    NAME,
    NEEDS_COIL_MAPS,
    REHEARSAL,
    ROUNDING,
    SUMMARY,
    reconstruct,
    reconstruct_with,
)
from recon_core.methods.laro.settings import Settings

__all__ = [
    "FIDELITY",
    "NAME",
    "NEEDS_COIL_MAPS",
    "REHEARSAL",
    "ROUNDING",
    "SUMMARY",
    "Settings",
    "reconstruct",
    "reconstruct_with",
]
