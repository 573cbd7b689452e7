"""MoE-dqINR: a scan-specific image series as a background and a few spatial experts, mixed state by state by a router."""

from recon_core.methods.moe_dqinr.reconstruction import (
    NAME,
    NEEDS_COIL_MAPS,
    REHEARSAL,
    ROUNDING,
    SUMMARY,
    SUPPORTS_3D,
    reconstruct,
)
from recon_core.methods.moe_dqinr.settings import Settings

__all__ = ["NAME", "NEEDS_COIL_MAPS", "REHEARSAL", "ROUNDING", "SUMMARY", "SUPPORTS_3D", "Settings", "reconstruct"]
