"""Question: what are places at the surface of the brain worth whose local field stands out, and from where on are they left out?

Noise-free, fully sampled simulated heads, brain mask from the magnitudes as chains find it; every background removal with and without
`recon_core.maps.background.without_outliers`, at several thresholds; the same inversion for all. Means over the heads: correlation with the
true susceptibility over the map, slope and R2 over regions, and the voxels that have a value. The default was chosen on heads 200 to 202.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.common import print_table, write_result
from benchmarks.qsm_server import FIELD_STRENGTH, agreement
from gadgets.simulate import read_truth, simulate
from recon_core.maps.background import LocalField, pdf, resharp, v_sharp, without_outliers
from recon_core.maps.brain_mask import brain_mask
from recon_core.maps.dipole import tv_admm
from recon_core.maps.dipole_kernel import ppm_per_hz
from recon_core.maps.field import fit_field
from recon_core.simulation.options import settings_for

B0 = (1.0, 0.0, 0.0)
SETTINGS = {"matrix_x": 96, "matrix_y": 64, "partitions": 32, "states": 6, "coils": 2}
THRESHOLDS = (0.0, 3.0, 4.0, 5.0)
COLUMNS = ("background", "threshold", "heads", "correlation", "slope over regions", "R2 over regions", "voxels")


def figures(seed: int, backgrounds: Sequence[str], thresholds: Sequence[float]) -> dict[tuple[str, float], list[float]]:
    """Of one head, by background and threshold (0: nothing is left out): correlation, slope, R2, voxels."""
    settings = {**SETTINGS, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        simulate("mgre", Path(folder) / "head.h5", settings)
        truth = read_truth(Path(folder) / "head.truth.h5")
    complete = settings_for("mgre", settings)
    voxel = (complete.slice_thickness, complete.fov_y / SETTINGS["matrix_y"], complete.fov_x / SETTINGS["matrix_x"])
    images = torch.from_numpy(truth.images[0])
    mask = brain_mask(images, voxel)
    fitted = fit_field(images, truth.states, mask)
    field, found = fitted.field.data, {}
    for name in backgrounds:
        whole: LocalField
        if name == "pdf":
            whole = pdf(field, mask, voxel, B0, weights=fitted.weights)
        else:
            whole = {"v_sharp": v_sharp, "resharp": resharp}[name](field, mask, voxel)
        for threshold in thresholds:
            local = without_outliers(whole, mask, voxel, threshold) if threshold else whole
            chi = tv_admm(local.field * ppm_per_hz(FIELD_STRENGTH), local.mask, voxel, B0, weights=fitted.weights).chi
            ppb = np.where(local.mask.numpy(), 1e3 * chi.data.numpy().astype(np.float64), np.nan)
            found[name, threshold] = [*agreement(ppb, truth), float(local.mask.sum())]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[200, 201, 202, 203, 204], help="seeds of the simulation")
    parser.add_argument("--backgrounds", nargs="+", default=["v_sharp", "resharp"], choices=("v_sharp", "resharp", "pdf"))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    every = [figures(seed, options.backgrounds, THRESHOLDS) for seed in options.heads]
    rows = [
        (name, threshold, len(every), *np.mean([one[name, threshold] for one in every], axis=0).tolist())
        for name, threshold in every[0]
    ]
    print_table("Outliers of the local field at the brain's surface", COLUMNS, rows)
    write_result(
        "qsm_surface",
        {"heads": options.heads, "settings": SETTINGS, "rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows]},
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
