"""Heads for the benchmark of dipole inversion: one that is computed here, and the 2019 challenge's from a folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import ndimage

from recon_core.errors import DataError
from recon_core.maps.dipole_kernel import ppm_per_hz
from recon_core.simulation.brain import LABELS, BrainPhantom
from recon_core.simulation.multi_echo_brain import DEEP, block_mean, brain_region
from recon_core.simulation.phantoms import Grid, Texture, centred_axis
from recon_core.simulation.signal import dipole_field
from recon_core.simulation.volume_files import read_volume

FIELD_STRENGTH = 3.0


@dataclass(frozen=True)
class Head:
    """A local field with its truth; float32 ``(z, y, x)``.

    Attributes
    ----------
    field, chi
        Local field with noise and true susceptibility, ppm.
    mask
        Brain, bool.
    magnitude
        At the echo time, any unit.
    weights
        1 / SD of the field up to a factor.
    deep
        Deep grey nuclei, bool; empty where unknown.
    csf
        Fluid, bool; empty where unknown.
    voxel, b0
        m; direction in the image frame ``(z, y, x)``.
    radians_per_ppm
        Phase at the echo time.
    """

    name: str
    field: torch.Tensor
    chi: torch.Tensor
    mask: torch.Tensor
    magnitude: torch.Tensor
    weights: torch.Tensor
    deep: torch.Tensor
    csf: torch.Tensor
    voxel: tuple[float, float, float]
    b0: tuple[float, float, float]
    radians_per_ppm: float

    def to(self, device: str) -> Head:
        """The same head on another device."""
        names = ("field", "chi", "mask", "magnitude", "weights", "deep", "csf")
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in names}
        return replace(self, **moved)


def simulated_head(
    seed: int,
    side: float,
    *,
    snr: float = 100.0,
    echo_time: float = 0.020,
    b0: tuple[float, float, float] = (1.0, 0.0, 0.0),
    extent: tuple[float, float, float] = (0.160, 0.192, 0.160),
) -> Head:
    """A brain of its own anatomy whose field is computed at half the voxel's side, sources in the brain only.

    Every tissue's susceptibility varies inside it (smooth and grainy texture, 20 % and 4 ppb rms: piecewise constant
    tissue would be too kind to total variation). The voxel's field is the phase of the mean signal of its eight parts, as a scanner
    sees it, with noise of ``magnitude / snr`` in the complex signal.
    """
    n = [2 * round(e / side / 2) for e in extent]
    fine = Grid(*(centred_axis(2 * k, k * side) for k in n))
    tissue = BrainPhantom(seed).maps(fine)
    rng = np.random.default_rng([seed, 77])
    inside = brain_region(tissue.labels)
    position = np.meshgrid(fine.z, fine.y, fine.x, indexing="ij", sparse=True)
    cloud, grain = (Texture(rng, 3, feature, slope) for feature, slope in ((0.010, 1.0), (0.003, 0.3)))
    texture = cloud(*position) + grain(*position)
    chi = np.where(inside, tissue.chi * (1 + 0.14 * texture) + 0.003 * texture, 0.0).astype(np.float32)
    half = (side / 2, side / 2, side / 2)
    shift = dipole_field(chi, half, b0, FIELD_STRENGTH)  # Hz
    signal = np.where(inside, tissue.pd * np.exp(echo_time * (2j * np.pi * shift - tissue.r2star)), 0)
    voxel_signal = block_mean(signal)
    noise = np.abs(voxel_signal[block_mean(inside) > 0.99]).mean() / snr
    shape = voxel_signal.shape
    voxel_signal = voxel_signal + noise * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)) / np.sqrt(2)
    mask = ndimage.binary_opening(block_mean(inside) > 0.99)
    per_hz = ppm_per_hz(FIELD_STRENGTH)
    field = np.angle(voxel_signal) / (2 * np.pi * echo_time) * per_hz
    # the few wraps next to veins are undone with the truth: this benchmark is about the inversion alone
    mean_shift = block_mean(shift) * per_hz
    period = per_hz / echo_time
    field += period * np.rint((mean_shift - field) / period)
    labels = tissue.labels[::2, ::2, ::2]
    magnitude = np.abs(voxel_signal)

    def named(names: tuple[str, ...]) -> torch.Tensor:
        return torch.from_numpy(np.isin(labels, [LABELS[name] for name in names]) & mask)

    def image(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.where(mask, array, 0).astype(np.float32))

    return Head(
        f"simulated head {seed}, {side * 1e3:g} mm",
        image(field),
        image(block_mean(chi)),
        torch.from_numpy(mask),
        torch.from_numpy(magnitude.astype(np.float32)),
        image(magnitude),
        named(DEEP),
        named(("csf",)),
        (side, side, side),
        b0,
        2 * np.pi * echo_time / per_hz,
    )


CHALLENGE = {"field": "Frequency", "chi": "Chi", "mask": "MaskBrainExtracted"}
OPTIONAL = {"magnitude": "Magnitude", "segmentation": "Segmentation"}
"""Names of the 2019 challenge's files (``.nii`` or ``.nii.gz``); magnitude (first echo) and segmentation may be missing."""

DEEP_LABELS = (1, 2, 3, 4, 5, 6)
"""The challenge's deep grey matter."""

CHALLENGE_ECHO = 0.004  # s; only the unwrapping-tolerant data term of MEDI uses it


def challenge_head(folder: Path, *, field_strength: float = 7.0, side: float = 1e-3) -> Head:
    """The reconstruction challenge's in-silico head: ``Frequency`` (local, Hz), ``Chi``, ``MaskBrainExtracted`` in a folder.

    ``Magnitude`` and ``Segmentation`` are read when they are there. NIfTI's last axis is slow here, and B0 lies along it.

    Raises
    ------
    DataError
        A file is missing, or the volumes differ in size.
    """
    read = {}
    for name, stem in CHALLENGE.items():
        if (path := _file(folder, stem)) is None:
            raise DataError(
                "no such file", where="QSM challenge", got=f"{stem}.nii", expected="the challenge's data in the folder"
            )
        read[name] = read_volume(path).astype(np.float32)
    for name, stem in OPTIONAL.items():
        if (path := _file(folder, stem)) is not None:
            read[name] = read_volume(path).astype(np.float32)
    sizes = {array.shape for array in read.values()}
    if len(sizes) > 1:
        raise DataError("volumes differ in size", where="QSM challenge", got=sorted(sizes))
    mask = read["mask"] > 0.5
    magnitude = read.get("magnitude", np.ones(mask.shape, np.float32))
    ppm_to_hz = 1 / ppm_per_hz(field_strength)
    field = np.where(mask, read["field"] / ppm_to_hz, 0).astype(np.float32)
    deep = np.isin(read.get("segmentation", np.zeros(mask.shape)), DEEP_LABELS) & mask
    return Head(
        "2019 challenge",
        torch.from_numpy(field),
        torch.from_numpy(np.where(mask, read["chi"], 0).astype(np.float32)),
        torch.from_numpy(mask),
        torch.from_numpy(magnitude),
        torch.from_numpy(np.where(mask, magnitude, 0).astype(np.float32)),
        torch.from_numpy(deep),
        torch.zeros(mask.shape, dtype=torch.bool),
        (side, side, side),
        (1.0, 0.0, 0.0),
        2 * np.pi * CHALLENGE_ECHO * ppm_to_hz,
    )


def _file(folder: Path, stem: str) -> Path | None:
    for ending in (".nii.gz", ".nii"):
        if (path := folder / f"{stem}{ending}").is_file():
            return path
    return None
