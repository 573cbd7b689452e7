"""Question: what do things that scanners and patients bring do to R2* and susceptibility?

One simulated head (48 x 80 x 72 voxels of about 2.5 mm, six echoes, complete images; noise of 0.7 % of the brain's mean signal in the first
echo unless told otherwise), everything found as the chains find it: scalp of fat (six peaks, in-phase echoes and others), receive shading
(the brain's mean signal stays), a sphere of metal at the edge of the brain, other field strengths with echo times that sites would choose.
Tissue has the R2* of 3 T at every field strength.
Of 5 mm planes the truth is that of the same planes.

Of each: the brain's voxels that the mask misses, correlation with the true susceptibility, slope and R2 over regions, RMS error where the
map has a value, the largest value, and the error of R2*, median and 99th percentile (it contains the dephasing of a voxel near air).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import print_table, write_result
from benchmarks.laro_scores import Maps, regional, regression, true_regional
from recon_core.fourier import fft_centred, ifft_centred
from recon_core.maps.series import ImageNoise
from recon_core.maps.series_qsm import multi_echo_maps
from recon_core.maps.settings import MapSettings
from recon_core.preprocess.measured_part import completed_band, extents_of, in_band
from recon_core.preprocess.oversampling import to_recon_matrix
from recon_core.preprocess.partial_fourier import complete
from recon_core.simulation.brain import LABELS
from recon_core.simulation.multi_echo_brain import BrainScan, ScanRecipe, simulate
from recon_core.simulation.signal import GYROMAGNETIC_RATIO
from recon_core.types import ImageSeries, KSpace, ScanInfo

MATRIX, VOXEL = (48, 80, 72), 2.5
FAT = ((-3.80, 0.087), (-3.40, 0.693), (-2.60, 0.128), (-1.94, 0.004), (-0.39, 0.039), (0.60, 0.048))
"""Shift against water in ppm, and share: Hamilton et al., NMR Biomed. 24 (2011) 784, rounded."""

FAT_FRACTION = 0.9
IN_PHASE = 1 / (3.4e-6 * GYROMAGNETIC_RATIO)
"""s times T: water and fat in phase."""

METAL = ((0.0, -0.040, 0.010), 0.004, 10.0)
"""Centre (z, y, x) and radius in m, ppm."""

FINE = 6
"""Parts of a voxel along each axis near metal."""

COLUMNS = ("head", "brain missed, %", "correlation", "slope", "R2", "RMS, ppb", "largest, ppb", "R2* error, 1/s", "99 %")
Images = NDArray[np.complexfloating]


@dataclass(frozen=True)
class Condition:
    """Field strength in T, first echo and spacing in s, noise of a real number over the brain's mean, what is done to a scan's images, how
    many planes make one, by how much images are interpolated within their planes (zero-filled), and how much of k1 is measured."""

    tesla: float = 3.0
    first: float = 0.004
    spacing: float = 0.005
    noise: float = 0.007
    change: Callable[[BrainScan, float], NDArray[np.number]] | None = None
    planes: int = 1
    finer: int = 1
    share: float = 1.0


def fat(scan: BrainScan, tesla: float) -> Images:
    """Factor of each echo where the scalp is fat, ``(echo, z, y, x)``."""
    times = np.array(scan.echo_times)[:, None]
    shift, share = (np.array(column) for column in zip(*FAT, strict=True))
    spectrum = (share * np.exp(2e-6j * np.pi * GYROMAGNETIC_RATIO * tesla * shift * times)).sum(1)
    scalp = (scan.labels == LABELS["scalp"]).numpy()
    return np.where(scalp, 1 - FAT_FRACTION + FAT_FRACTION * spectrum[:, None, None, None], 1)


def array_coil(scan: BrainScan, tesla: float) -> NDArray[np.floating]:
    """Ten times brighter at the surface than in the middle."""
    y, x = (np.linspace(-1, 1, n) for n in scan.brain.shape[1:])
    return np.asarray(1 + 9 * np.clip((y[:, None] / 0.84) ** 2 + (x / 0.75) ** 2, 0, 1.2))[None, None]


def surface_coil(scan: BrainScan, tesla: float) -> NDArray[np.floating]:
    """Ten times brighter at the one end of y than at the other."""
    return np.asarray(10 ** np.linspace(0, 1, scan.brain.shape[1]))[None, None, :, None]


def metal(scan: BrainScan, tesla: float) -> Images:
    """Mean over each voxel's parts of the phase that the sphere gives, nothing inside it."""
    (centre, radius, ppm), out = METAL, np.ones((len(scan.echo_times), *scan.brain.shape), np.complex64)
    reach = 6 * radius
    places = [(np.arange(n) - n // 2) * side - c for n, side, c in zip(scan.brain.shape, scan.voxel, centre, strict=True)]
    box = tuple(slice(int(w[0]), int(w[-1]) + 1) for w in (np.flatnonzero(np.abs(p) < reach) for p in places))
    fine = [
        (p[b][:, None] + ((np.arange(FINE) + 0.5) / FINE - 0.5) * side).ravel()
        for p, b, side in zip(places, box, scan.voxel, strict=True)
    ]
    z, y, x = np.meshgrid(*fine, indexing="ij", sparse=True)
    square = z**2 + y**2 + x**2
    along = 3 * z**2 / np.maximum(square, radius**2) - 1  # B0 lies along z
    field = 1e-6 * ppm * GYROMAGNETIC_RATIO * tesla / 3 * (radius**2 / np.maximum(square, radius**2)) ** 1.5 * along
    parts = tuple(b.stop - b.start for b in box)
    split = (parts[0], FINE, parts[1], FINE, parts[2], FINE)
    for echo, time in enumerate(scan.echo_times):
        signal = np.where(square > radius**2, np.exp(2j * np.pi * field * time), 0)
        out[echo][box] = signal.reshape(split).mean((1, 3, 5))
    return out


def thick(scan: BrainScan, planes: int) -> BrainScan:
    """The same head in voxels so many times as thick: mean signal, labels where all planes agree."""

    def mean(volume: torch.Tensor) -> torch.Tensor:
        z, y, x = volume.shape[-3:]
        return volume.reshape(*volume.shape[:-3], z // planes, planes, y, x).mean(-3)

    labels = scan.labels.reshape(-1, planes, *scan.labels.shape[1:])
    same = (labels == labels[:, :1]).all(1)
    return replace(
        scan,
        images=mean(scan.images),
        brain=mean(scan.brain.float()) > 0.5,
        chi=mean(scan.chi),
        r2star=mean(scan.r2star),
        labels=torch.where(same, labels[:, 0], 0),
        voxel=(planes * scan.voxel[0], *scan.voxel[1:]),
    )


CONDITIONS = {
    "as it is": Condition(),
    "5 mm planes": Condition(planes=2),
    "partial Fourier 7/8": Condition(share=7 / 8),
    "partial Fourier 6/8": Condition(share=6 / 8),
    "partial Fourier 5/8": Condition(share=5 / 8),
    "5 % noise": Condition(noise=0.05),
    "5 % noise, interpolated by two": Condition(noise=0.05, finer=2),
    "fat, out of phase": Condition(change=fat),
    "fat, in phase": Condition(first=2 * IN_PHASE / 3, spacing=2 * IN_PHASE / 3, change=fat),
    "fat, 1.5 T, in phase": Condition(1.5, IN_PHASE / 1.5, IN_PHASE / 1.5, change=fat),
    "array coil, 10 to 1": Condition(change=array_coil),
    "surface coil, 10 to 1": Condition(change=surface_coil),
    "metal, 8 mm": Condition(change=metal),
    "0.55 T": Condition(0.55, 0.008, 0.011, noise=0.014),
    "7 T": Condition(7.0, 0.003, 0.0035),
}


def completed(images: torch.Tensor, share: float, scan: ScanInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of a part of k1, completed as chains complete them, and those that the field is fitted to."""
    n = images.shape[-2]
    counts = torch.ones(images.shape[:3])
    counts[..., : round(n * (1 - share))] = 0
    kspace = KSpace(fft_centred(images, (-3, -2))[:, None] * counts[:, None, :, :, None], counts)
    extents = extents_of(kspace)
    done = torch.stack([complete(image, extents[0]) for image in ifft_centred(kspace.data[:, 0], (-3, -2))])
    band = completed_band(extents, scan)
    return done, done if band is None else in_band(done, band, scan)


def figures(seed: int, condition: Condition) -> tuple[float, ...]:
    """`COLUMNS` but the first, of one head."""
    c = condition
    recipe = ScanRecipe(
        matrix=MATRIX,
        voxel=(VOXEL, VOXEL),
        first_echo=(c.first, c.first),
        echo_spacing=(c.spacing, c.spacing),
        flip_angle=(15.0, 15.0),
        field_strength=c.tesla,
    )
    scan = thick(simulate(recipe, seed), c.planes)
    images = scan.images if c.change is None else scan.images * torch.from_numpy(c.change(scan, c.tesla)).to(torch.complex64)
    images = images / float(images[0].abs()[scan.brain].mean())
    generator = torch.Generator().manual_seed(seed)
    noisy = images + 2**0.5 * c.noise * torch.randn(images.shape, dtype=images.dtype, generator=generator)
    n_z, n_y, n_x = scan.brain.shape
    matrix, (z, y, x) = (n_z, n_y, n_x), (n * side for n, side in zip(scan.brain.shape, scan.voxel, strict=True))
    finer = (n_z, c.finer * n_y, c.finer * n_x)
    info = ScanInfo(
        matrix, (z, y, x), finer, (z, y, x), echo_times=scan.echo_times, field_strength=c.tesla, b0_direction=scan.b0
    )
    noisy, phase = completed(noisy, c.share, info) if c.share < 1 else (noisy, None)
    noisy = to_recon_matrix(noisy, matrix, info.fov, finer, info.fov)
    settings = MapSettings(maps="qsm")
    made = multi_echo_maps(ImageSeries("echoes", noisy), info, ImageNoise(c.noise, True), settings, phase=phase)
    every = (slice(None), slice(None, None, c.finer), slice(None, None, c.finer))
    maps = {m.name: replace(m, data=m.data[every], valid=m.valid[every]) for m in made.maps}
    chi, r2star, brain = maps["QSM"], maps["R2star"], scan.brain.numpy()
    inside = chi.valid.numpy() & brain
    found, true = chi.data.numpy()[inside], scan.chi.numpy()[inside]
    error = found - true
    region = chi.valid.numpy()
    own = regional(Maps(found, found, found, chi.data.numpy(), region), scan)
    slope, r2, _ = regression(own, true_regional(scan, region))
    rate = (r2star.data - scan.r2star).numpy()[brain & r2star.valid.numpy()]
    return (
        100 * float((brain & ~maps["brain_mask"].valid.numpy()).sum() / brain.sum()),
        float(np.corrcoef(found, true)[0, 1]),
        slope,
        r2,
        1e3 * float(error.std()),
        1e3 * float(np.abs(chi.data.numpy()).max()),
        float(np.median(rate)),
        float(np.quantile(rate, 0.99)),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=11, help="of the head")
    parser.add_argument("--conditions", nargs="+", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--name", default="qsm_conditions", help="of the result")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = [(name, *figures(options.seed, CONDITIONS[name])) for name in options.conditions]
    print_table(f"R2* and susceptibility, head {options.seed}", COLUMNS, rows)
    write_result(options.name, {"seed": options.seed, "rows": [dict(zip(COLUMNS, r, strict=True)) for r in rows]})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
