"""Question: are the T1 values of the nine-tube phantom right at 8x, with coil maps estimated from eight lines?

The scan is simulated as a scanner would acquire it (finely rendered object, coils, correlated receiver noise), whitened, and
reconstructed with *estimated* coil maps by ``llr`` with a fit per pixel and by PINQI with the given weights.

    python -m benchmarks.pinqi_phantom --weights DIR/pinqi.json
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import in_words, print_table, write_result
from recon_core.coils.estimate import estimate_coil_maps
from recon_core.fourier import ifft_centred
from recon_core.maps.settings import MapSettings
from recon_core.methods import get_method
from recon_core.methods.pinqi.reconstruction import longest_delay_calibration, reconstruct_with
from recon_core.methods.pinqi.settings import Settings
from recon_core.methods.pinqi.weights import load_weights
from recon_core.preprocess.noise import WHITENED_NOISE_STD
from recon_core.reconstruct import Recipe, reconstruct
from recon_core.simulation.encoding import correlated_noise
from recon_core.simulation.options import settings_for
from recon_core.simulation.scan import Scan, simulate_scan
from recon_core.simulation.tubes import PROTOCOL, PUBLISHED, TABLE_I, TubeReport, compare_tubes
from recon_core.types import KSpace, Report, Result, ScanInfo

GOAL_RMS, GOAL_WORST = 0.035, 0.07  # s, part of the reference


def acquired(scan: Scan, seed: int) -> tuple[KSpace, ScanInfo]:
    """The first slice of a fully rendered 2D scan: masked, noisy, whitened, readout transformed and cropped."""
    truth, s = scan.truth, scan.settings
    clean = scan.clean[0]  # (state, coil, k2, k1, k0)
    rng = np.random.default_rng([seed, 5])
    n_states, n_coils, n_2, n_1, n_0 = clean.shape
    noise = correlated_noise(truth.noise_covariance, (n_states * n_2 * n_1, n_0), rng)
    noisy = clean + noise.reshape(n_states, n_2, n_1, n_coils, n_0).transpose(0, 3, 1, 2, 4)
    whitening = WHITENED_NOISE_STD * np.linalg.inv(np.linalg.cholesky(truth.noise_covariance))
    noisy = np.einsum("dc,sczyx->sdzyx", whitening, noisy) * truth.mask[:, None, :, :, None]
    data = ifft_centred(torch.from_numpy(noisy.astype(np.complex64)), -1)
    first = n_0 // 2 - s.matrix_x // 2
    data = data[..., first : first + s.matrix_x].contiguous()
    acs_mask = torch.from_numpy(truth.acs_mask)
    counts = torch.from_numpy(truth.mask.astype(np.float32))
    acs = data.mean(0) * acs_mask[None, :, :, None]
    place = ((1, s.matrix_y, s.matrix_x), (s.slice_thickness, s.fov_y, s.fov_x))
    kspace = KSpace(data, counts, acs=acs, acs_mask=acs_mask, noise_std=WHITENED_NOISE_STD)
    return kspace, ScanInfo(*place, *place, saturation_times=truth.states)


def judged(result: Result, scan: Scan) -> TubeReport:
    """The tubes of a result's T1 map."""
    t1 = next(m for m in result.maps if m.name == "T1")
    return compare_tubes(t1.data[0].numpy(), scan.truth.labels[0, 0, 0], t1.valid[0].numpy())


def entry(report: TubeReport) -> dict[str, Any]:
    return {
        "mean_s": [round(float(v), 4) for v in report.mean],
        "sd_s": [round(float(v), 4) for v in report.sd],
        "valid": [round(float(v), 3) for v in report.valid],
        "rms_deviation_s": report.rms_deviation,
        "worst_relative": float(np.abs(report.relative).max()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=None, help="JSON of trained weights")
    parser.add_argument("--acceleration", type=float, default=8.0)
    parser.add_argument("--matrix", type=int, default=192)
    parser.add_argument("--snr", type=float, default=40.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="pinqi_phantom", help="of the file in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    changes = {"matrix_x": options.matrix, "matrix_y": options.matrix, "acceleration": options.acceleration}
    values = {**PROTOCOL, **changes, "snr": options.snr, "seed": options.seed}
    scan = simulate_scan("satrec", settings_for("satrec", values))
    kspace, info = acquired(scan, options.seed)
    found = {}
    maps = MapSettings(maps="t1", map_model="saturation_recovery", map_max_relative_sd=10.0)
    found["llr + fit"] = judged(reconstruct(kspace, info, Recipe("llr", get_method("llr").Settings(), maps=maps)), scan)
    if options.weights is not None:
        trained = load_weights(options.weights)
        for label, calibrated in (("all delays", kspace), ("longest delay", longest_delay_calibration(kspace, info))):
            with_maps = replace(calibrated, coil_maps=estimate_coil_maps(calibrated))
            result = reconstruct_with(trained, with_maps, info, Settings(), Report())
            found[f"pinqi, coil maps from {label}"] = judged(result, scan)
            print(f"{label}: quality { ({k: round(v, 3) for k, v in result.quality.items()}) } {result.notes}")
    rows = [["reference", *TABLE_I, "", ""], ["published", *PUBLISHED, GOAL_RMS, GOAL_WORST]]
    rows += [
        [name, *np.round(r.mean, 3).tolist(), r.rms_deviation, float(np.abs(r.relative).max())] for name, r in found.items()
    ]
    columns = ["T1 in s", *(f"tube {i + 1}" for i in range(len(TABLE_I))), "RMS s", "worst"]
    print_table(f"Nine tubes at {options.acceleration:g}x, SNR {options.snr:g}", columns, rows)
    goals = {"rms_deviation_s": GOAL_RMS, "worst_relative": GOAL_WORST}
    within = {n: bool(r.rms_deviation <= GOAL_RMS and np.abs(r.relative).max() <= GOAL_WORST) for n, r in found.items()}
    settings = {key: value for key, value in vars(options).items() if key != "weights"}
    scores = {name: entry(report) for name, report in found.items()}
    write_result(options.name, {"settings": settings, "goals": goals, "within": within, "tubes": scores})
    return 0


if __name__ == "__main__":
    raise SystemExit(in_words(main))
