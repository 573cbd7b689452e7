"""One cell of the benchmark of dynamic and quantitative methods: a series with its truth, mask and noise, as methods take it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation

from benchmarks.series import Series
from recon_core.coils.estimate import estimate_coil_maps
from recon_core.maps.t1 import inversion_recovery_t1, molli_t1
from recon_core.sampling.masks import centre_block, golden_angle, vista
from recon_core.types import KSpace, ScanInfo

Array = NDArray[np.complexfloating]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Cell(Series):
    """One cell: a ``Series`` (truth, maps, hybrid k-space, mask) and what the tables need besides.

    Attributes
    ----------
    kind
        ``cine`` or ``molli`` (anything with inversion times).
    origin
        ``simulated``, ``semi-measured`` or ``measured``.
    roi
        bool ``(z, y, x)``: the heart, the kidneys, the phantom or the brain.
    times
        Inversion times in s in the order of the states (order of acquisition, *not* sorted); empty for cine.
    t1
        float32 ``(z, y, x)`` in s, the tissue's own T1 where the object is simulated, else ``None``.
    look_locker
        False where every image had its own inversion.
    acceleration
        Nominal: lines outside the calibration block are the matrix divided by this.
    fov
        ``(z, y, x)`` in m.
    maps_used
        ``true`` or ``estimated`` (ESPIRiT from the calibration lines).
    """

    kind: str
    origin: str
    roi: BoolArray
    times: tuple[float, ...]
    t1: NDArray[np.float32] | None
    look_locker: bool
    acceleration: float
    fov: tuple[float, float, float]
    maps_used: str = "true"

    @property
    def effective_acceleration(self) -> float:
        """Matrix lines over acquired lines, calibration included."""
        return float(self.mask[0].size * len(self.mask) / self.mask.sum())

    def problem(self, device: torch.device | str = "cpu") -> tuple[KSpace, ScanInfo]:
        """What a method takes."""
        shape = (self.images.shape[1], self.images.shape[2], self.images.shape[3])
        lines = self.kspace * self.acs_mask[None, None, :, :, None]
        # the state with most signal: an image near the zero crossing calibrates badly
        lines = lines[int(np.argmax(np.linalg.norm(lines.reshape(len(lines), -1), axis=1)))]
        kspace = KSpace(
            torch.tensor(self.kspace),
            torch.tensor(self.mask.astype(np.float32)),
            acs=torch.tensor(lines),
            acs_mask=torch.tensor(self.acs_mask),
            coil_maps=torch.tensor(self.coil_maps),
            noise_std=self.noise_std or None,
        )
        return kspace.to(device), ScanInfo(shape, self.fov, shape, self.fov, inversion_times=self.times)

    def reference_t1(self) -> tuple[NDArray[np.float32], BoolArray]:
        """T1 of the *true images* by the same fit, and where it may be believed: the paper's reference for map NMSE."""
        return self._reference_t1

    @cached_property
    def _reference_t1(self) -> tuple[NDArray[np.float32], BoolArray]:
        # every method of a cell is judged by it
        return fit_t1(self, self.images)


def fit_t1(cell: Cell, images: Array) -> tuple[NDArray[np.float32], BoolArray]:
    """T1 in s ``(z, y, x)`` of a series of the cell, and its valid pixels.

    Complex images take the phase-sensitive path, magnitudes the other.
    """
    fit = molli_t1 if cell.look_locker else inversion_recovery_t1
    maps = fit(torch.tensor(images), cell.times)
    return maps.t1.data.numpy(), maps.t1.valid.numpy()


def centred_ifft(array: Array, axis: int) -> Array:
    """Centred, orthonormal inverse FFT by NumPy, in the array's own precision."""
    return np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(array, axes=axis), axis=axis, norm="ortho"), axes=axis)


def undersample(
    cell: Cell, full: Array, acceleration: float, acs: int, rng: np.random.Generator, *, estimated_maps: bool = False
) -> Cell:
    """``cell`` with the mask of its kind laid on complete hybrid k-space ``full`` ``(state, coil, k2, k1, x)``."""
    n = full.shape[-2]
    draw = vista if cell.kind == "cine" else golden_angle
    mask = draw(n, len(full), acceleration, acs, rng, acs_counted=False)[:, None]
    kspace = (full * mask[:, None, :, :, None]).astype(np.complex64)
    cell = replace(
        cell, kspace=kspace, mask=mask, acs_mask=centre_block((n,), (acs,))[None], acceleration=float(acceleration)
    )
    if estimated_maps:
        maps = estimate_coil_maps(cell.problem()[0]).numpy()
        cell = replace(cell, coil_maps=maps, maps_used="estimated", name=f"{cell.name}, ESPIRiT maps")
    return cell


def box(region: BoolArray, margin: int) -> BoolArray:
    """The rectangle about a region ``(z, y, x)``."""
    box = np.zeros(region.shape, bool)
    _, y, x = np.nonzero(region)
    box[:, y.min() : y.max() + 1, x.min() : x.max() + 1] = True
    return np.asarray(binary_dilation(box, np.ones((1, 3, 3)), iterations=margin))
