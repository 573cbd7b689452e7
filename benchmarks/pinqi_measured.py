"""Question: what does PINQI make of an anatomy that no simulation drew?

Measured inversion recovery of a brain (qMRLab's ``IR_demo``: 9 times, one slice, single coil) gives T1 and M0 by our fit. From these maps,
a smooth phase, coils (measured arrays, of a head and of a heart, or simulated loops) and noise follow saturation-recovery data at 4x,
6x and 8x, reconstructed with coil maps *estimated* from the calibration lines. Judged is T1 inside the brain's mask against the
measured map, beside ``llr`` + fit.

    python -m benchmarks.pinqi_measured --picture maps.png

That map is noisy itself, so whatever smooths T1 is punished. ``--maps FILE`` takes another measured brain instead: a MATLAB file with one
array ``(.., .., map)`` of proton density, T1 in s and more, as the numerical brain of MRzero's documentation is
(``numerical_brain_cropped.mat``, 141 x 161, hardly any noise; users download it), in a field of view of 192 x 192 pixels:

    python -m benchmarks.pinqi_measured --maps numerical_brain_cropped.mat --name pinqi_measured_numerical
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat

from benchmarks.common import in_words, print_table, write_result
from benchmarks.dynamic_cells import DONORS
from benchmarks.measured_series import measured
from benchmarks.series import centred_fft
from recon_core.maps.settings import MapSettings
from recon_core.maps.t1 import inversion_recovery_t1
from recon_core.methods import get_method
from recon_core.methods.pinqi.figures import t1_figures
from recon_core.reconstruct import Recipe, reconstruct
from recon_core.sampling.masks import centre_block, random_variable_density
from recon_core.simulation.coils import biot_savart_maps, donor_maps
from recon_core.simulation.encoding import polynomial_field
from recon_core.simulation.phantoms import Grid, centred_axis
from recon_core.simulation.quantitative_brain import SATURATION_TIMES
from recon_core.types import KSpace, ScanInfo

ACS = 8
EMPTY_T1 = 1.0  # s where nothing was measured
PHASE = 0.6  # rad, peak of the smooth phase
MATRIX = 192  # that the weights are made for
PIXEL = 0.0012  # m, of maps that do not state theirs
METHODS = {"pinqi": MapSettings(), "llr": MapSettings(maps="t1", map_model="saturation_recovery", map_max_relative_sd=10.0)}


def truth() -> dict[str, Any]:
    """T1 (s), complex M0 (peak 1) and the mask of the measured brain, all ``(y, x)``; figures of the fit itself."""
    series = measured("brain")
    maps = inversion_recovery_t1(torch.from_numpy(series.images[:, None]).to(torch.complex64), series.times)
    valid, brain = maps.t1.valid[0].numpy(), series.roi
    t1 = np.where(valid, maps.t1.data[0].numpy(), EMPTY_T1)
    m0 = np.where(valid, maps.m0.data[0].numpy(), np.abs(series.images).max(0))
    sd = maps.t1_sd.data[0].numpy()
    fit = {"median_t1_s": float(np.median(t1[brain & valid])), "median_sd_s": float(np.median(sd[brain & valid]))}
    return posed(t1, m0 / np.percentile(m0[brain], 99.5), brain & valid, series.pixel, fit)


def truth_of_maps(path: Path) -> dict[str, Any]:
    """As `truth`, of a file with maps: the longer axis becomes y (the head's anterior-posterior one), air is added up to `MATRIX`."""
    arrays = [value for value in loadmat(path).values() if isinstance(value, np.ndarray) and value.ndim == 3]
    if not arrays or arrays[0].shape[-1] < 2 or max(arrays[0].shape[:2]) > MATRIX:
        raise SystemExit(
            f"{path.name}: expected an array (.., .., map) of proton density, T1 and more, at most {MATRIX} pixels wide"
        )
    density, t1 = (arrays[0][..., i].astype(np.float64) for i in range(2))
    if density.shape[0] < density.shape[1]:
        density, t1 = density.T, t1.T
    before = [(MATRIX - n) // 2 for n in density.shape]
    margins = [(b, MATRIX - n - b) for b, n in zip(before, density.shape, strict=True)]
    density, t1 = np.pad(density, margins), np.pad(t1, margins)
    brain = (density > 0) & (t1 > 0)
    fit = {"median_t1_s": float(np.median(t1[brain]))}
    return posed(np.where(brain, t1, EMPTY_T1), density / np.percentile(density[brain], 99.5), brain, PIXEL, fit)


def posed(
    t1: NDArray[np.floating], m0: NDArray[np.floating], brain: NDArray[np.bool_], pixel: float, fit: dict[str, float]
) -> dict[str, Any]:
    """The maps with a smooth phase; M0 at most 1.3 times what all but the brightest of the brain have."""
    fov = tuple(n * pixel for n in t1.shape)
    grid = Grid(np.zeros(1), *(centred_axis(n, size) for n, size in zip(t1.shape, fov, strict=True)))
    phase = polynomial_field(grid, np.random.default_rng(5), PHASE)[0]
    return {"t1": t1, "m0": np.minimum(m0, 1.3) * np.exp(1j * phase), "brain": brain, "grid": grid, "fov": fov, "fit": fit}


def acquired(found: dict[str, Any], coils: str, acceleration: float, noise: float, seed: int) -> tuple[KSpace, ScanInfo]:
    """Undersampled saturation recovery of the measured maps."""
    rng = np.random.default_rng([seed, int(10 * acceleration)])
    donor = DONORS[coils]
    grid: Grid = found["grid"]
    maps = donor_maps(donor, grid, 0)[0] if donor else biot_savart_maps(grid, 8, rng)[0]
    images = np.stack([found["m0"] * (1 - np.exp(-t / found["t1"])) for t in SATURATION_TIMES])[:, None]
    full = centred_fft(images[:, None] * maps, -2)
    full = full + noise * (rng.standard_normal(full.shape) + 1j * rng.standard_normal(full.shape)) / np.sqrt(2)
    n_y, n_x = images.shape[-2:]
    mask = random_variable_density(n_y, len(SATURATION_TIMES), acceleration, ACS, rng)
    data = (full * mask[:, None, None, :, None]).astype(np.complex64)
    centre = centre_block((n_y,), (ACS,))
    kspace = KSpace(
        torch.from_numpy(data),
        torch.from_numpy(mask[:, None].astype(np.float32)),
        acs=torch.from_numpy(data.mean(0) * centre[None, None, :, None]),
        acs_mask=torch.from_numpy(centre[None]),
        noise_std=noise,
    )
    place = ((1, n_y, n_x), (0.005, *found["fov"]))
    return kspace, ScanInfo(*place, *place, saturation_times=SATURATION_TIMES)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accelerations", type=float, nargs="+", default=[4.0, 6.0, 8.0])
    parser.add_argument("--coils", nargs="+", choices=list(DONORS), default=["brain", "heart", "simulated"])
    parser.add_argument("--noise", type=float, default=0.01, help="of a complex sample; M0 is about 1")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--maps", type=Path, default=None, help="measured maps (.mat) instead of qMRLab's inversion recovery"
    )
    parser.add_argument("--picture", type=Path, default=None)
    parser.add_argument("--name", default="pinqi_measured", help="of the file in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = truth_of_maps(options.maps) if options.maps else truth()
    rows: list[list[Any]] = []
    shown = {"truth": found["t1"], "brain": found["brain"]}
    for coils in options.coils:
        for acceleration in options.accelerations:
            for name, maps in METHODS.items():
                scores = []
                for seed in options.seeds:
                    kspace, scan = acquired(found, coils, acceleration, options.noise, seed)
                    result = reconstruct(kspace, scan, Recipe(name, get_method(name).Settings(), maps=maps))
                    t1 = next(m for m in result.maps if m.name == "T1")
                    # an empty pixel is no answer: it counts as the middle of what tissue can have
                    values = np.where(t1.valid[0].numpy(), t1.data[0].numpy(), EMPTY_T1)
                    scores.append({**t1_figures(values, found["t1"], found["brain"]), "warnings": float(len(result.notes))})
                    if coils == "brain" and acceleration == max(options.accelerations) and seed == options.seeds[0]:
                        shown[f"{name} {acceleration:g}x"] = values
                means = [float(np.mean([s[key] for s in scores])) for key in ("nrmse", "mae", "ssim")]
                rows.append([coils, f"{acceleration:g}x", name, *(round(v, 4) for v in means), int(scores[-1]["warnings"])])
    columns = ["coils", "", "method", "nRMSE", "MAE s", "SSIM", "warnings"]
    print_table(f"T1 of a measured brain as saturation recovery, noise {options.noise:g}", columns, rows)
    print(f"the measured map itself: {found['fit']}")
    settings = {key: value for key, value in vars(options).items() if key not in ("picture", "name", "maps")}
    settings |= {"maps": options.maps.name} if options.maps else {}
    write_result(options.name, {"settings": settings, "reference": found["fit"], "columns": columns, "rows": rows})
    if options.picture is not None:
        from benchmarks.pinqi_montage import montage

        montage(shown, options.picture, "measured brain, measured coils")
    return 0


if __name__ == "__main__":
    raise SystemExit(in_words(main))
