"""Question: what does noise do to the contrast of susceptibility maps, and which part of the chain takes it?

Simulated heads (96 x 64 x 32, six echoes, eight coils), at each field strength and SNR: the images without noise, complete with noise,
three-fold undersampled and reconstructed by ``llr``, and these with what the regularisation held back given back to their phase
(`recon_core.methods.llr.restore`). Of each: brain mask from the magnitudes, field, V-SHARP, and the inversion with a fixed weight of the
total variation and with the chain's. Correlation with the true susceptibility over the map; slope and R2 over regions, with and
without veins; noise of the local field. Everything was chosen on heads 301 to 303.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import print_table, write_result
from benchmarks.qsm_server import LEAST_VOXELS, agreement
from recon_core.maps.background import v_sharp, without_outliers
from recon_core.maps.brain_mask import brain_mask
from recon_core.maps.dipole import TVSettings, tv_admm
from recon_core.maps.dipole_kernel import ppm_per_hz
from recon_core.maps.field import fit_field
from recon_core.maps.field_noise import field_noise
from recon_core.maps.settings import MapSettings
from recon_core.methods.llr import Settings
from recon_core.reconstruct import Recipe, reconstruct_images
from recon_core.simulation.options import settings_for
from recon_core.simulation.scan import Scan, Truth, simulate_scan
from recon_core.types import KSpace, ScanInfo, Tensor

B0 = (1.0, 0.0, 0.0)
MATRIX: dict[str, Any] = {
    "matrix_x": 96,
    "matrix_y": 64,
    "partitions": 32,
    "states": 6,
    "coils": 8,
    "mask": "poisson",
    "acceleration": 3.0,
}
FIXED = TVSettings(weight=5e-5, noise_weight=0.0, added_back=0, shrinkage=2.5e-3, tolerance=1e-3)
INVERSIONS = {"fixed weight": FIXED, "as the chains": TVSettings()}
COLUMNS = ("T", "SNR", "images", "inversion", "noise, ppb", "correlation", "slope", "R2", "slope without veins")


def scene(seed: int, tesla: float) -> tuple[Scan, ScanInfo]:
    """A head's scan without noise, and what the reconstruction is told of it."""
    s = settings_for("mgre", {**MATRIX, "seed": seed, "field_strength": tesla})
    matrix = (s.partitions, s.matrix_y, s.matrix_x)
    fov = (s.partitions * s.slice_thickness, s.fov_y, s.fov_x)
    scan = simulate_scan("mgre", s)
    times = scan.truth.states
    return scan, ScanInfo(matrix, fov, matrix, fov, echo_times=times, field_strength=tesla, b0_direction=B0)


def noisy_kspace(scan: Scan, sigma: float, generator: torch.Generator) -> KSpace:
    """Undersampled hybrid k-space with white noise of ``sigma`` in a complex sample."""
    n_x, clean = int(MATRIX["matrix_x"]), torch.from_numpy(scan.clean[0])
    lines = torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(clean, dim=-1), dim=-1, norm="ortho"), dim=-1)
    first = (lines.shape[-1] - n_x) // 2
    full = lines[..., first : first + n_x].to(torch.complex64).contiguous()
    full += sigma * torch.randn(full.shape, dtype=torch.complex64, generator=generator)
    mask = torch.from_numpy(scan.truth.mask).expand(len(full), -1, -1)
    block = torch.from_numpy(scan.truth.acs_mask)
    return KSpace(
        full * mask[:, None, :, :, None],
        mask.float(),
        acs=full.mean(0) * block[None, :, :, None],
        acs_mask=block,
        noise_std=sigma,
    )


def image_kinds(scan: Scan, info: ScanInfo, snr: float) -> Iterator[tuple[str, Tensor, float | None]]:
    """Name, echo images and noise of one real number."""
    truth, generator = scan.truth, torch.Generator().manual_seed(7)
    clean = torch.from_numpy(truth.images[0])
    sigma = float(np.abs(truth.images)[np.broadcast_to(truth.tissue[:, None], truth.images.shape)].mean()) / snr
    yield "no noise", clean, None
    yield "complete", clean + sigma * torch.randn(clean.shape, dtype=clean.dtype, generator=generator), sigma / 2**0.5
    recipe = Recipe("llr", Settings(), maps=MapSettings(maps="qsm", map_failure="warn"))
    found = reconstruct_images(noisy_kspace(scan, sigma, generator), info, recipe)
    std = None if found.noise is None else found.noise.std
    yield "llr, R = 3", found.result.images[0].data, std
    if found.phase is not None:
        yield "llr, R = 3, restored", found.phase, std


def figures(
    images: Tensor, std: float | None, truth: Truth, info: ScanInfo, tesla: float, settings: TVSettings
) -> tuple[float, ...]:
    """Noise of the local field in ppb, correlation, slope, R2, slope without veins."""
    voxel = tuple(fov / n for fov, n in zip(info.recon_fov, info.recon_matrix, strict=True))
    mask, per_hz = brain_mask(images, voxel), ppm_per_hz(tesla)
    fitted = fit_field(images, truth.states, mask, noise_std=std)
    local = without_outliers(v_sharp(fitted.field.data, mask, voxel), mask, voxel)
    chi = tv_admm(local.field * per_hz, local.mask, voxel, B0, weights=fitted.weights, settings=settings).chi.data
    ppb = np.where(local.mask.numpy(), 1e3 * chi.numpy().astype(np.float64), np.nan)
    noise = 1e3 * per_hz * field_noise(local.field, local.mask)
    return noise, *agreement(ppb, truth), slope_without_veins(ppb, truth)


def slope_without_veins(ppb: NDArray[np.float64], truth: Truth) -> float:
    """Veins are thinner than the voxels, and their two points bend the straight line of all others."""
    names = ("background", "scalp", "skull", "dura", "vein")
    labels, true = truth.labels[0, 0], 1e3 * truth.maps["chi"][0]
    brain = np.isfinite(ppb) & ~np.isin(labels, [truth.label_names[n] for n in names])
    regions = [brain & (labels == n) for n in np.unique(labels[brain])]
    means = [(true[r].mean(), ppb[r].mean()) for r in regions if r.sum() >= LEAST_VOXELS]
    expected, found = (np.array(column) for column in zip(*means, strict=True))
    return float(np.polyfit(expected, found, 1)[0])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[401, 402], help="seeds of the simulation")
    parser.add_argument("--cases", nargs="+", default=["3/100", "3/20", "3/10", "0.55/40"], help="field strength in T / SNR")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for tesla, snr in (map(float, case.split("/")) for case in options.cases):
        found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
        for seed in options.heads:
            scan, info = scene(seed, tesla)
            for kind, images, std in image_kinds(scan, info, snr):
                for name, settings in INVERSIONS.items():
                    one = figures(images, std, scan.truth, info, tesla, settings)
                    found.setdefault((kind, name), []).append(one)
        rows += [(tesla, snr, *key, *np.mean(every, axis=0).tolist()) for key, every in found.items()]
    print_table(f"Noise and contrast, means of heads {options.heads}", COLUMNS, rows)
    write_result(
        "qsm_noise", {"heads": options.heads, "settings": MATRIX, "rows": [dict(zip(COLUMNS, r, strict=True)) for r in rows]}
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
