"""Simulated multi-echo gradient-echo scans of brains with known truth: what LARO is trained and judged on.

A scan is a slab of `BrainPhantom`'s head: tissue values drawn anew for every head, lesions, microbleeds or a haemorrhage, the dipole
field of all sources and of the air around and inside the head, a shim, spoiled gradient echoes on a grid twice as fine (so that
voxels dephase), a phase and a shading of the transmit field, and coils. It depends on its key alone: ``(seed, split, index)``.

Axes are ``(z, y, x)`` with x along the readout; k1 is y and k2 is z. In half of the training heads y is left-right and x
anterior-posterior (the paper's orientation), in the others the reverse.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from recon_core.errors import SettingError
from recon_core.sampling.masks import centre_block
from recon_core.simulation.anatomy import check_split
from recon_core.simulation.brain import LABELS, BrainPhantom
from recon_core.simulation.coils import biot_savart_maps
from recon_core.simulation.phantoms import Grid, Texture, Tissue, TissueMaps, centred_axis
from recon_core.simulation.random_fields import sample_seed
from recon_core.simulation.signal import dipole_field, spoiled_gradient_echo
from recon_core.types import KSpace

Tensor = torch.Tensor
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

AIR_CHI = 9.4
"""ppm against water; the sign of a cavity's field."""

HEAD = (0.212, 0.176)
"""Front to back and left to right in m, with a margin: the least field of view."""

OUTSIDE = ("background", "scalp", "skull", "dura")
DEEP = ("caudate", "putamen", "pallidum", "thalamus", "nigra", "ruber")

REGIONAL_CHI = {
    "pallidum": 0.153,
    "nigra": 0.143,
    "ruber": 0.091,
    "caudate": 0.053,
    "putamen": 0.034,
    "thalamus": 0.000,
    "radiation": -0.058,
    "cortex": -0.010,
}
"""Mean susceptibilities in ppm of the paper's Table S5 (SENSE at R = 2)."""

RADIATION_LABEL, LESION_LABEL, BLEED_LABEL = 32, 64, 128
"""Labels besides the phantom's: the optic radiation; the first lesion, the next ones following; a haemorrhage."""


@dataclass(frozen=True)
class ScanRecipe:
    """How simulated heads are scanned.

    Attributes
    ----------
    matrix
        ``(z, y, x)``.
    voxel
        Smallest and largest edge of a voxel in mm, drawn for each axis; in y and x longer where the head would not fit the field of
        view: an object cut off at its edge folds over in a real scan, and no coil maps describe what is left of it.
    n_echoes
        Echoes of a train.
    first_echo, echo_spacing
        Ranges in s.
    flip_angle, repetition_time
        Range in degrees; s.
    n_coils
        Receive coils, in two rings.
    noise
        Range of the standard deviation of the complex noise of a k-space sample, in units in which the brain peaks near 1.
    field_strength
        T.
    """

    matrix: tuple[int, int, int] = (32, 64, 64)
    voxel: tuple[float, float] = (2.6, 3.4)
    n_echoes: int = 6
    first_echo: tuple[float, float] = (0.0018, 0.0050)
    echo_spacing: tuple[float, float] = (0.0030, 0.0055)
    flip_angle: tuple[float, float] = (10.0, 25.0)
    repetition_time: float = 0.036
    n_coils: int = 8
    noise: tuple[float, float] = (0.006, 0.025)
    field_strength: float = 3.0

    def __post_init__(self) -> None:
        ranges = (self.voxel, self.first_echo, self.echo_spacing, self.flip_angle, self.noise)
        if min(self.matrix) < 4 or self.n_echoes < 1 or self.n_coils < 2 or any(not 0 < a <= b for a, b in ranges):
            raise SettingError("impossible recipe", where="simulated multi-echo brains", got=self)


@dataclass(frozen=True)
class BrainScan:
    """One scan with its truth; arrays ``(z, y, x)``, centred.

    Attributes
    ----------
    images
        complex64 ``(echo, z, y, x)``: noise-free; the 99th percentile of the brain's magnitude in the first echo is 1.
    coil_maps
        complex64 ``(coil, z, y, x)``, unit root-sum-of-squares.
    brain
        bool: brain with its fluid.
    head
        bool: wherever there is signal.
    r2star, field, local_field, chi
        1/s; Hz, with and without the sources outside the brain; ppm. Means over the voxel.
    labels
        uint8: the phantom's, and those of `RADIATION_LABEL` and following.
    echo_times, voxel, b0
        s; m; direction of B0 in the image frame ``(z, y, x)``.
    noise_std
        Of the complex noise of a k-space sample.
    key
        ``(split, index)``.
    """

    images: Tensor
    coil_maps: Tensor
    brain: Tensor
    head: Tensor
    r2star: Tensor
    field: Tensor
    local_field: Tensor
    chi: Tensor
    labels: Tensor
    echo_times: tuple[float, ...]
    voxel: tuple[float, float, float]
    b0: tuple[float, float, float]
    noise_std: float
    key: tuple[str, int]


class MultiEchoBrains:
    """An endless, seeded supply of scans; those used last are kept.

    Parameters
    ----------
    recipe
        How they are acquired.
    seed
        Of the whole supply.
    keep
        Scans held in memory.
    """

    def __init__(self, recipe: ScanRecipe | None = None, *, seed: int = 0, keep: int = 8) -> None:
        self.recipe, self.seed, self._keep = recipe or ScanRecipe(), seed, keep
        self._held: OrderedDict[tuple[str, int], BrainScan] = OrderedDict()

    def with_recipe(self, **changes: object) -> MultiEchoBrains:
        """The same heads, scanned differently."""
        return MultiEchoBrains(replace(self.recipe, **changes), seed=self.seed, keep=self._keep)  # type: ignore[arg-type]

    def scan(self, split: str, index: int) -> BrainScan:
        """Scan number ``index`` of a split: ``train``, ``validation`` or ``test``, which share no head.

        Raises
        ------
        SettingError
            An unknown split.
        """
        check_split(split)
        key = (split, index)
        if key not in self._held:
            self._held[key] = simulate(self.recipe, sample_seed(self.seed, split, index, "multi-echo"), key)
            while len(self._held) > self._keep:
                self._held.popitem(last=False)
        self._held.move_to_end(key)
        return self._held[key]


def simulate(recipe: ScanRecipe, seed: int, key: tuple[str, int] = ("", 0)) -> BrainScan:
    """One scan of one head.

    Half of the heads are scanned with y left-right; their B0 stays along z. Truth maps are means over the eight parts of a voxel.
    """
    rng = np.random.default_rng(seed)
    swapped = bool(rng.random() < 0.5)
    voxel = rng.uniform(*recipe.voxel, 3) * 1e-3
    if swapped:  # the head is longer from front to back than from left to right
        voxel[1] *= 0.9
    voxel[1:] = np.maximum(voxel[1:], np.array(HEAD[::-1] if swapped else HEAD) / recipe.matrix[1:])
    tissue, chi, labels = _anatomy(_grid(recipe.matrix, voxel, swapped, 2), int(rng.integers(2**31)), rng)
    if swapped:
        tissue, chi, labels = _transposed(tissue), chi.swapaxes(1, 2), labels.swapaxes(1, 2)
    half = (float(voxel[0]) / 2, float(voxel[1]) / 2, float(voxel[2]) / 2)
    b0 = (1.0, 0.0, 0.0)
    inside = brain_region(labels)
    head = tissue.pd > 0
    local = dipole_field(np.where(inside, chi, 0).astype(np.float32), half, b0, recipe.field_strength)
    elsewhere = np.where(inside, 0, np.where(head, chi, 0.6 * AIR_CHI)).astype(np.float32)
    cavity = _cavity(labels.shape, rng, swapped)
    elsewhere = np.where(inside, 0, elsewhere + AIR_CHI * cavity).astype(np.float32)
    background = _shimmed(dipole_field(elsewhere, half, b0, recipe.field_strength), inside, half)
    shift = local + background
    density = tissue.pd * (1 - cavity * ~inside) * _profile(len(labels))[:, None, None]
    steady = spoiled_gradient_echo(
        density, tissue.r1, flip_angle=np.deg2rad(rng.uniform(*recipe.flip_angle)), repetition_time=recipe.repetition_time
    )
    spacing = rng.uniform(*recipe.echo_spacing)
    first = rng.uniform(*recipe.first_echo)
    times = tuple(float(first + n * spacing) for n in range(recipe.n_echoes))
    images = _echoes(steady, tissue.r2star, shift, times)
    maps, shading = biot_savart_maps(_grid(recipe.matrix, voxel, False, 1), recipe.n_coils, rng, n_rows=2)
    images *= (shading * _transmit(recipe.matrix, rng)).astype(np.complex64)
    brain = block_mean(inside.astype(np.float32)) > 0.9
    images /= np.quantile(np.abs(images[0])[brain], 0.99)

    def real(array: NDArray[np.floating]) -> Tensor:
        return torch.from_numpy(block_mean(array).astype(np.float32))

    return BrainScan(
        torch.from_numpy(images.astype(np.complex64)),
        torch.from_numpy(maps),
        torch.from_numpy(ndimage.binary_opening(brain)),
        torch.from_numpy(block_mean(density) > 0.05),
        real(tissue.r2star),
        real(shift),
        real(local),
        real(np.where(inside, chi, 0)),
        torch.from_numpy(np.ascontiguousarray(labels[::2, ::2, ::2])),
        times,
        (float(voxel[0]), float(voxel[1]), float(voxel[2])),
        b0,
        float(np.exp(rng.uniform(*np.log(recipe.noise)))),
        key,
    )


def sampled_kspace(full: Tensor, mask: Tensor, acs: tuple[int, int], scan: BrainScan) -> KSpace:
    """What a mask leaves of a full noisy acquisition of a scan, with its calibration block and the scan's coil maps.

    Parameters
    ----------
    full
        complex ``(echo, coil, k2, k1, x)``.
    mask
        float ``(echo, k2, k1)``.
    acs
        Central block ``(k2, k1)``; of it counts what every echo has.
    """
    kept = full * mask[:, None, :, :, None]
    block = torch.from_numpy(centre_block((mask.shape[1], mask.shape[2]), acs)).to(mask.device) & mask.bool().all(0)
    maps = scan.coil_maps.to(full.device)
    acs_data = kept.mean(0) * block[None, :, :, None]
    return KSpace(kept, mask, acs=acs_data, acs_mask=block, coil_maps=maps, noise_std=scan.noise_std)


def block_mean(fine: NDArray[np.generic]) -> NDArray[np.floating]:
    """Mean of 2 x 2 x 2 samples over the last three axes, which are even."""
    z, y, x = (k // 2 for k in fine.shape[-3:])
    return np.asarray(fine.reshape(*fine.shape[:-3], z, 2, y, 2, x, 2).mean((-5, -3, -1)))


def brain_region(labels: NDArray[np.integer]) -> BoolArray:
    """The largest connected region of `BrainPhantom` labels that are neither air nor the brain's covers."""
    outside = np.isin(labels, [LABELS[name] for name in OUTSIDE])
    parts, _ = ndimage.label(~outside)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return np.asarray(parts == int(np.argmax(sizes)))


def _grid(matrix: tuple[int, int, int], voxel: NDArray[np.floating], swapped: bool, fine: int) -> Grid:
    """Positions in the head's frame: with ``swapped`` the phantom's x (left-right) is the scan's y."""
    n, d = list(matrix), [float(v) for v in voxel]
    if swapped:
        n[1], n[2], d[1], d[2] = n[2], n[1], d[2], d[1]
    # the slab is centred on the deep nuclei, a little above the head's centre
    axes = [centred_axis(fine * k, k * v) for k, v in zip(n, d, strict=True)]
    return Grid(axes[0] + 0.004, axes[1], axes[2])


def _transposed(tissue: TissueMaps) -> TissueMaps:
    names = ("pd", "r1", "r2", "r2star", "chi", "labels")
    return TissueMaps(**{name: np.ascontiguousarray(getattr(tissue, name).swapaxes(1, 2)) for name in names})


# --------------------------------------------------------------------------------------------------------------- anatomy


def _anatomy(grid: Grid, phantom_seed: int, rng: np.random.Generator) -> tuple[TissueMaps, FloatArray, NDArray[np.uint8]]:
    """A head with its own tissue values, pathology and texture of the susceptibility; in the phantom's frame."""
    phantom = BrainPhantom(phantom_seed)
    values = {**REGIONAL_CHI, "grey": REGIONAL_CHI["cortex"]}
    for name, t in phantom.tissues.items():
        chi = values.get(name, t.chi) * rng.uniform(0.8, 1.2) + rng.uniform(-0.005, 0.005)
        r2star = t.r2star * rng.uniform(0.8, 1.25)
        phantom.tissues[name] = Tissue(t.pd * rng.uniform(0.95, 1.05), t.t1 * rng.uniform(0.9, 1.1), t.t2, r2star, chi)
    tissue = phantom.maps(grid)
    z, y, x = np.meshgrid(grid.z, grid.y, grid.x, indexing="ij", sparse=True)
    cloud, grain = Texture(rng, 3, 0.010, 1.0)(z, y, x), Texture(rng, 3, 0.003, 0.3)(z, y, x)
    chi = tissue.chi * (1 + 0.10 * (cloud + grain)) + 0.002 * (cloud + grain)
    r2star = tissue.r2star * np.clip(1 + 0.05 * cloud, 0.7, 1.3)
    labels = tissue.labels.copy()
    # optic radiation: a bent sheet of white matter on both sides of the posterior horns
    sheet = (
        (np.abs(np.abs(x) - 0.024 - 0.1 * np.abs(y - 0.03)) < 0.005)
        & (np.abs(y - 0.035) < 0.024)
        & (np.abs(z - 0.005) < 0.013)
    )
    where = sheet & (labels == LABELS["white"])
    chi[where] += values["radiation"] - phantom.tissues["white"].chi
    labels[where] = RADIATION_LABEL
    pd = tissue.pd.copy()
    _pathology(grid, chi, r2star, pd, labels, rng)
    return replace(tissue, pd=pd, r2star=r2star.astype(np.float32), labels=labels), chi.astype(np.float32), labels


def _pathology(
    grid: Grid, chi: FloatArray, r2star: FloatArray, pd: FloatArray, labels: NDArray[np.uint8], rng: np.random.Generator
) -> None:
    """Lesions in white matter in two of three heads, a haemorrhage in one of four, microbleeds in one of three; in place."""
    white = np.argwhere(labels == LABELS["white"])
    if not len(white):
        return
    covers = [LABELS[name] for name in OUTSIDE]

    def blob(radius: float, own_chi: float, rate: float, density: float, label: int) -> None:
        at = white[rng.integers(len(white))]
        half = rng.uniform(0.75, 1.3, 3) * radius
        away = [(axis - axis[k]) / h for axis, k, h in zip((grid.z, grid.y, grid.x), at, half, strict=True)]
        box = tuple(slice(int(w[0]), int(w[-1]) + 1) for w in (np.flatnonzero(np.abs(d) < 1) for d in away))
        z, y, x = (d[part] for d, part in zip(away, box, strict=True))
        level = z[:, None, None] ** 2 + y[None, :, None] ** 2 + x[None, None, :] ** 2
        where = (level < 1) & ~np.isin(labels[box], covers)
        chi[box][where] = own_chi
        r2star[box][where] = rate
        pd[box][where] *= density
        labels[box][where] = label

    if rng.random() < 2 / 3:
        for n in range(int(rng.integers(2, 7))):
            blob(rng.uniform(0.004, 0.009), rng.uniform(0.0, 0.08), rng.uniform(12, 22), 1.1, LESION_LABEL + n)
    if rng.random() < 1 / 4:
        blob(rng.uniform(0.007, 0.014), rng.uniform(0.2, 0.8), rng.uniform(60, 140), 0.9, BLEED_LABEL)
    if rng.random() < 1 / 3:
        for _ in range(int(rng.integers(1, 5))):
            blob(rng.uniform(0.0025, 0.004), rng.uniform(0.2, 0.5), rng.uniform(60, 120), 0.9, BLEED_LABEL + 1)


def _cavity(shape: tuple[int, ...], rng: np.random.Generator, swapped: bool) -> FloatArray:
    """Air below the frontal brain and beside the brain stem, in grid coordinates; its field reaches the brain from outside."""
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    front, side = (x[None, None, :], y[None, :, None]) if swapped else (y[None, :, None], x[None, None, :])
    low = z[:, None, None]
    sinus = ((low + 1.0) / 0.35) ** 2 + ((front + 0.45) / 0.18) ** 2 + (side / 0.16) ** 2 < rng.uniform(0.4, 1.0)
    ears = ((low + 1.0) / 0.3) ** 2 + ((front - 0.1) / 0.1) ** 2 + ((np.abs(side) - 0.55) / 0.1) ** 2 < rng.uniform(0.4, 1.0)
    return np.asarray(sinus | ears, np.float32)


def _shimmed(field: FloatArray, inside: BoolArray, voxel: tuple[float, float, float]) -> FloatArray:
    """The field less its best solid harmonics up to second order over the brain: what shim coils can do.

    Their fields are harmonic, like those of all sources outside: what is left is for background removal. An isotropic part
    (``x^2 + y^2 + z^2``) is none, and would look like sources all over the brain.
    """
    axes = ((np.arange(n) - n / 2) * side for n, side in zip(field.shape, voxel, strict=True))
    z, y, x = (10.0 * axis for axis in np.meshgrid(*axes, indexing="ij", sparse=True))  # in units in which a head is about 1
    one = np.ones(field.shape, np.float32)
    terms = [one * t for t in (1, z, y, x, z * y, z * x, y * x, y * y - x * x, 2 * z * z - y * y - x * x)]
    rows = np.stack([t[inside][::17] for t in terms], axis=1)
    found = np.linalg.lstsq(rows, field[inside][::17], rcond=None)[0]
    return np.asarray(field - sum(c * t for c, t in zip(found, terms, strict=True)), np.float32)


# ---------------------------------------------------------------------------------------------------------------- signal


def _echoes(steady: FloatArray, r2star: FloatArray, shift: FloatArray, times: tuple[float, ...]) -> NDArray[np.complex64]:
    """Voxel means of ``m exp(t (2 pi i f - R2*))``, ``(echo, z, y, x)``: voxels dephase as they do in a scanner."""
    rate = (2j * np.pi * shift - r2star).astype(np.complex64)
    signal = steady * np.exp(np.float32(times[0]) * rate)
    step = np.exp(np.float32(times[1] - times[0]) * rate) if len(times) > 1 else rate
    found = []
    for n in range(len(times)):
        if n:
            signal = signal * step
        found.append(block_mean(signal))
    return np.stack(found).astype(np.complex64)


def _profile(n: int) -> FloatArray:
    """The slab's excitation profile: full inside, falling over the outer tenths."""
    z = np.abs(np.linspace(-1, 1, n))
    return np.asarray(1 / (1 + np.exp((z - 0.92) / 0.025)), np.float32)


def _transmit(matrix: tuple[int, int, int], rng: np.random.Generator) -> NDArray[np.complexfloating]:
    """Phase at TE = 0 (a smooth polynomial within some radians) and shading of the transmit field, on the coarse grid."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in matrix), indexing="ij", sparse=True)
    a = rng.normal(0, 0.5, 7)
    phase = (
        rng.uniform(-np.pi, np.pi)
        + a[0] * z
        + a[1] * y
        + a[2] * x
        + a[3] * y * x
        + a[4] * y * y
        + a[5] * x * x
        + a[6] * z * z
    )
    shading = 1 + 0.15 * rng.normal() * (y * y + x * x) + 0.1 * rng.normal() * y
    return np.asarray(np.clip(shading, 0.5, 1.5) * np.exp(1j * phase))
