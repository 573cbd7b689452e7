"""PINQI: physics-informed learned quantitative maps (Zimmermann et al., doi:10.1109/TCI.2024.3388869)."""

from recon_core.methods.pinqi.reconstruction import (
    FIDELITY,
    MAPS,
    NAME,
    NEEDS_COIL_MAPS,
    ROUNDING,
    SUMMARY,
    SUPPORTS_3D,
    calibration,
    reconstruct,
)
from recon_core.methods.pinqi.settings import Settings

__all__ = [
    "FIDELITY",
    "MAPS",
    "NAME",
    "NEEDS_COIL_MAPS",
    "ROUNDING",
    "SUMMARY",
    "SUPPORTS_3D",
    "Settings",
    "calibration",
    "reconstruct",
]
