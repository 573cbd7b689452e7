"""Question: how long does the operator of ``llr_qsm`` wait on a machine without a GPU?

A simulated multi-echo scan (96 x 64 x 32, six echoes, eight coils, three-fold undersampled in both phase-encoding directions) is replayed
through ``recon serve``, a process of its own with its default settings: seconds from the last readout to the last map, the
processor seconds that the server and its workers spent meanwhile (what counts when the machine is shared), and how far R2* and
susceptibility are from the truth: the correlation over the whole map, the slope over regions, and the same of the maps that the
noise-free, fully sampled images give with each background removal. Target: 120 s on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from benchmarks.common import print_table, write_result
from benchmarks.latency import server
from gadgets.meta import read_meta
from gadgets.replay import replay
from gadgets.simulate import read_truth, simulate
from gadgets.wire.events import Image
from recon_core.maps.series_qsm import multi_echo_maps
from recon_core.maps.settings import MapSettings
from recon_core.simulation.options import settings_for
from recon_core.simulation.scan import Truth
from recon_core.types import ImageSeries, ScanInfo

TARGET_S = 120.0
FIELD_STRENGTH = 3.0
COLUMNS = (
    "chain",
    "last image, s",
    "processor, s",
    "R2* median error, 1/s",
    "QSM correlation",
    "QSM slope over regions",
    "QSM R2 over regions",
)
LEAST_VOXELS = 12
BACKGROUNDS = ("v_sharp", "resharp", "pdf")


def processor_seconds(root: int) -> float:
    """User and system time of a process and its descendants so far (those that live)."""
    family = [psutil.Process(root), *psutil.Process(root).children(recursive=True)]
    total = 0.0
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def values(image: Image) -> np.ndarray:
    """A map in the console's unit, NaN where it is empty."""
    meta = read_meta(image.attributes)
    pixels = np.asarray(image.data[0], dtype=np.float64)
    shown = pixels * float(meta["RescaleSlope"][0]) + float(meta["RescaleIntercept"][0])
    return np.where(pixels == 0, np.nan, shown)


def agreement(chi: NDArray[np.float64], truth: Truth) -> tuple[float, float, float]:
    """Of a map in ppb (NaN outside) with the truth: correlation over every voxel, and slope and R^2 of the means of the brain's regions.

    Not over the truth's ``interior``, whose voxels are almost all white matter: without contrast there is nothing to correlate.
    """
    true, labels = 1e3 * truth.maps["chi"][0], truth.labels[0, 0]
    brain = np.isfinite(chi) & ~np.isin(labels, [truth.label_names[n] for n in ("background", "scalp", "skull", "dura")])
    regions = [brain & (labels == n) for n in np.unique(labels[brain])]
    means = np.array([(true[r].mean(), chi[r].mean()) for r in regions if r.sum() >= LEAST_VOXELS])
    slope = float(np.polyfit(means[:, 0], means[:, 1], 1)[0])
    return float(np.corrcoef(chi[brain], true[brain])[0, 1]), slope, float(np.corrcoef(means.T)[0, 1] ** 2)


def best_map(truth: Truth, voxel: tuple[float, float, float], background: str) -> NDArray[np.float64]:
    """Susceptibility in ppb of the noise-free, fully sampled images by the chain's own defaults but for the background, NaN outside."""
    matrix = truth.images.shape[-3:]
    fov = (matrix[0] * voxel[0], matrix[1] * voxel[1], matrix[2] * voxel[2])
    scan = ScanInfo(
        matrix, fov, matrix, fov, echo_times=truth.states, field_strength=FIELD_STRENGTH, b0_direction=(1.0, 0.0, 0.0)
    )
    images = ImageSeries("all", torch.from_numpy(truth.images[0]))
    (chi,) = (
        m
        for m in multi_echo_maps(images, scan, None, MapSettings(maps="qsm", map_background=background)).maps
        if m.name == "QSM"
    )
    return np.where(chi.valid.numpy(), 1e3 * chi.data.numpy(), np.nan)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", nargs="+", default=["llr_qsm", "laro_qsm"])
    parser.add_argument("--matrix", type=int, nargs=3, default=[96, 64, 32], metavar=("X", "Y", "Z"))
    parser.add_argument("--echoes", type=int, default=6)
    parser.add_argument("--coils", type=int, default=8)
    parser.add_argument("--acceleration", type=float, default=3.0)
    options = parser.parse_args()
    x, y, z = options.matrix
    settings = {
        "matrix_x": x,
        "matrix_y": y,
        "partitions": z,
        "states": options.echoes,
        "coils": options.coils,
        "mask": "poisson",
        "acceleration": options.acceleration,
        "seed": 100,
    }
    rows, texts = [], {}
    with tempfile.TemporaryDirectory() as folder, server() as (process, port):
        path = Path(folder) / "mgre.h5"
        simulate("mgre", path, settings)
        truth = read_truth(path.with_suffix(".truth.h5"))
        for chain in options.chains:
            images: list[Image] = []
            before = processor_seconds(process.pid)
            result = replay(path, port=port, config=chain, on_image=images.append)
            spent = processor_seconds(process.pid) - before
            maps = {read_meta(i.attributes).get("GADGETRON_DataRole", ("",))[0]: i for i in images}
            r2star, chi = values(maps["R2STAR"]), values(maps["QSM"])
            inside = truth.interior[0] & np.isfinite(r2star) & np.isfinite(chi)
            error = float(np.median(np.abs(r2star - truth.maps["r2star"][0])[inside]))
            rows.append((chain, result.seconds_to_last_image, spent, error, *agreement(chi, truth)))
            texts[chain] = [text.strip() for text in result.texts if not text.startswith("DBG")]
    complete = settings_for("mgre", settings)
    voxel = (complete.slice_thickness, complete.fov_y / y, complete.fov_x / x)
    for background in BACKGROUNDS:
        name = f"noise-free, fully sampled, {background}"
        rows.append((name, math.nan, math.nan, math.nan, *agreement(best_map(truth, voxel, background), truth)))
    title = f"{x} x {y} x {z}, {options.echoes} echoes, {options.coils} coils, R = {options.acceleration:g}"
    print_table(title, COLUMNS, rows)
    load = os.getloadavg()[1]
    print(f"load average of the last five minutes {load:.1f}: processor seconds are the figure where it exceeds the cores")
    result_rows = [
        {k: v for k, v in zip(COLUMNS, row, strict=True) if not (isinstance(v, float) and math.isnan(v))} for row in rows
    ]
    write_result(
        "qsm_server", {"title": title, "target_s": TARGET_S, "load_average": load, "rows": result_rows, "texts": texts}
    )
    return int(
        any(float(row[2]) > 2 * TARGET_S for row in rows) or (load < 2 and any(float(row[1]) > TARGET_S for row in rows))
    )


if __name__ == "__main__":
    raise SystemExit(main())
