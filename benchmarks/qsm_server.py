"""Question: how long does the operator of ``llr_qsm`` wait on a machine without a GPU?

A simulated multi-echo scan (96 x 64 x 32, six echoes, eight coils, three-fold undersampled in both phase-encoding directions) is replayed
through ``recon serve``, a process of its own with its default settings: seconds from the last readout to the last map, the
processor seconds that the server and its workers spent meanwhile (what counts when the machine is shared), and how far R2* and
susceptibility are from the truth. Target: 120 s on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
import psutil

from benchmarks.common import print_table, write_result
from benchmarks.latency import server
from gadgets.meta import read_meta
from gadgets.replay import replay
from gadgets.simulate import read_truth, simulate
from gadgets.wire.events import Image

TARGET_S = 120.0
COLUMNS = ("chain", "last image, s", "processor, s", "R2* median error, 1/s", "QSM correlation")


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chains", nargs="+", default=["llr_qsm"])
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
            correlation = float(np.corrcoef(chi[inside], truth.maps["chi"][0][inside])[0, 1])
            rows.append((chain, result.seconds_to_last_image, spent, error, correlation))
            texts[chain] = [text.strip() for text in result.texts if not text.startswith("DBG")]
    title = f"{x} x {y} x {z}, {options.echoes} echoes, {options.coils} coils, R = {options.acceleration:g}"
    print_table(title, COLUMNS, rows)
    load = os.getloadavg()[1]
    print(f"load average of the last five minutes {load:.1f}: processor seconds are the figure where it exceeds the cores")
    result_rows = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    write_result(
        "qsm_server", {"title": title, "target_s": TARGET_S, "load_average": load, "rows": result_rows, "texts": texts}
    )
    return int(
        any(float(row[2]) > 2 * TARGET_S for row in rows) or (load < 2 and any(float(row[1]) > TARGET_S for row in rows))
    )


if __name__ == "__main__":
    raise SystemExit(main())
