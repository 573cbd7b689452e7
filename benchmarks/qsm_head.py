"""Heads for the benchmark of dipole inversion: one that is computed here, and those of the 2016 and 2019 challenges from a folder."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

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
    read = _challenge_volumes(folder, CHALLENGE, OPTIONAL, "QSM challenge")
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


CHALLENGE_2016 = {"field": "phs_tissue", "mask": "msk", "cosmos": "chi_cosmos", "chi_33": "chi_33"}
OPTIONAL_2016 = {"magnitude": "magn", "regions": "evaluation_mask"}
"""Names of the 2016 challenge's files (``.nii.gz``, ``.nii`` or ``.mat``), field and susceptibility in ppm."""

FIELD_STRENGTH_2016 = 2.8936  # T
ECHO_2016 = 0.025  # s
VOXEL_2016 = (1.0714286e-3, 1.0625e-3, 1.0625e-3)
MARGIN_2016 = 8
"""Voxels around the mask that are kept: more than the reach of any score's filter."""

MAT_ERRORS = (MatReadError, ArithmeticError, LookupError, NotImplementedError, OSError, TypeError, ValueError, zlib.error)
"""What the reader of damaged files raises; NotImplementedError: version 7.3."""


@dataclass(frozen=True)
class BrainInVivo:
    """A measured local field, and what was found from twelve orientations; float32 ``(z, y, x)``.

    Attributes
    ----------
    head
        Its ``chi`` is chi33 of the susceptibility tensor, the challenge's reference.
    cosmos
        Susceptibility by COSMOS, ppm.
    regions
        The challenge's regions of white and grey matter, labels from 1; all 0 where they are not known.
    """

    head: Head
    cosmos: torch.Tensor
    regions: torch.Tensor

    def to(self, device: str) -> BrainInVivo:
        """The same brain on another device."""
        return BrainInVivo(self.head.to(device), self.cosmos.to(device), self.regions.to(device))


def challenge_2016(folder: Path) -> BrainInVivo:
    """The 2016 challenge's brain, from the folder that its archive unfolds to (or the folder ``data`` in it).

    ``phs_tissue``, ``msk``, ``chi_cosmos`` and ``chi_33`` are needed; ``magn`` and ``evaluation_mask`` are read when they are there.
    Without ``magn`` every voxel of the mask has the same weight, and the magnitude has no edges. B0 lies along the files' last axis.
    Volumes are cut to the mask and `MARGIN_2016` voxels around it.

    Raises
    ------
    DataError
        A file is missing or damaged, or the volumes differ in size.
    """
    where, inner = "2016 QSM challenge", folder / "data"
    read = _challenge_volumes(inner if inner.is_dir() else folder, CHALLENGE_2016, OPTIONAL_2016, where, mat=True)
    mask = read["mask"] > 0.5
    if not mask.any():
        raise DataError("mask is empty", where=where, got="msk", expected="1 in the brain")
    (box,) = ndimage.find_objects(mask.astype(np.uint8))
    box = tuple(slice(max(0, side.start - MARGIN_2016), side.stop + MARGIN_2016) for side in box)
    read, mask = {name: volume[box].copy() for name, volume in read.items()}, mask[box].copy()
    magnitude = read.get("magnitude", np.ones(mask.shape, np.float32))

    def image(array: NDArray[np.float32]) -> torch.Tensor:
        return torch.from_numpy(np.where(mask, array, 0).astype(np.float32))

    nothing = torch.zeros(mask.shape, dtype=torch.bool)
    head = Head(
        "2016 challenge",
        image(read["field"]),
        image(read["chi_33"]),
        torch.from_numpy(mask),
        torch.from_numpy(magnitude),
        image(magnitude),
        nothing,
        nothing,
        VOXEL_2016,
        (1.0, 0.0, 0.0),
        2 * np.pi * ECHO_2016 / ppm_per_hz(FIELD_STRENGTH_2016),
    )
    regions = np.rint(read.get("regions", np.zeros(mask.shape, np.float32))) * mask
    return BrainInVivo(head, image(read["cosmos"]), torch.from_numpy(regions.astype(np.int64)))


def _challenge_volumes(
    folder: Path, needed: dict[str, str], optional: dict[str, str], where: str, *, mat: bool = False
) -> dict[str, NDArray[np.float32]]:
    """The volumes ``(z, y, x)`` by what they are; optional ones where they are there."""
    read = {}
    for name, stem in (needed | optional).items():
        if (path := _file(folder, stem, mat=mat)) is not None:
            volume = _mat_volume(path, stem) if path.suffix == ".mat" else read_volume(path)
            read[name] = np.array(volume, np.float32, order="C")  # torch wants to be allowed to write
        elif name in needed:
            raise DataError("no such file", where=where, got=f"{stem}.nii", expected="the challenge's data in the folder")
    sizes = {array.shape for array in read.values()}
    if len(sizes) > 1:
        raise DataError("volumes differ in size", where=where, got=sorted(sizes))
    return read


def _mat_volume(path: Path, name: str) -> NDArray[np.generic]:
    """MATLAB's array ``name`` ``(x, y, z)`` as ``(z, y, x)``."""
    try:
        content = loadmat(path)
    except MAT_ERRORS as error:
        raise DataError(
            "damaged volume", where=path.name, got=type(error).__name__, expected="a MATLAB file up to version 7"
        ) from None
    volume = content.get(name)
    if volume is None or volume.ndim != 3:
        known = sorted(key for key in content if not key.startswith("__"))
        raise DataError("not the volume", where=path.name, got=known, expected=f"an array {name} of three axes")
    return np.asarray(volume).transpose(2, 1, 0)


def _file(folder: Path, stem: str, *, mat: bool = False) -> Path | None:
    for ending in (".nii.gz", ".nii", *((".mat",) if mat else ())):
        if (path := folder / f"{stem}{ending}").is_file():
            return path
    return None
