"""Settings of what happens to k-space before a method and to its images afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from recon_core.settings import setting


@dataclass(frozen=True)
class PreprocessSettings:
    """Noise, coil compression and partial Fourier; the same for every method."""

    prewhiten: bool = setting(True, "Whiten the coils with the scan's noise measurement, if there is one.")
    relative_noise_bandwidth: float = setting(
        0.793, "Receiver noise bandwidth relative to the sampling bandwidth, where the header is silent.", low=0.01, high=1.0
    )
    coil_compression: str = setting(
        "none", "Reduce the coils to virtual ones before the method.", choices=("none", "svd", "geometric")
    )
    virtual_coils: int = setting(12, "Number of virtual coils; scans with fewer coils are left alone.", low=1, high=128)
    partial_fourier: str = setting(
        "pocs",
        "How unmeasured outer k-space (partial Fourier, asymmetric echo) is completed.",
        choices=("zero_fill", "homodyne", "pocs"),
    )
