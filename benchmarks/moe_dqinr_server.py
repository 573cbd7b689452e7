"""Question: what does the operator of ``moe_dqinr_cine`` wait for on a machine without a GPU?

A simulated cine (204 x 204, 12 frames, 10 coils, VISTA-like lines) is replayed through ``recon serve``, which runs in a process of its own
with its default settings: seconds from the last readout to the first preview and to the last image, the error inside tissue beside
that of ``llr`` on the same scan, and what the operator reads meanwhile. Targets: an image within 2 s, 12 frames within 60 s, no
less quality than ``llr``. The error is that of the coils' shading for the most part, which every method leaves: how far apart two
methods are is the question of `benchmarks.moe_dqinr`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import print_table, write_result
from benchmarks.latency import server
from gadgets.image_attributes import is_preview
from gadgets.replay import ReplayResult, replay
from gadgets.simulate import read_truth, simulate
from gadgets.wire.events import Image
from recon_core.metrics import nrmse, psnr
from recon_core.simulation.scan import Truth

PREVIEW_S, ALL_S = 2.0, 60.0


def stacked(images: list[Image], n_slices: int, n_states: int) -> np.ndarray:
    """Final images as magnitudes ``(slice, state, 1, y, x)``."""
    frames = {}
    for image in images:
        place = (int(image.header["slice"]), int(image.header["phase"]))
        frames[place] = np.abs(np.asarray(image.data, dtype=np.float64)).reshape(image.data.shape[-2:])
    return np.stack([[frames[s, q] for q in range(n_states)] for s in range(n_slices)])[:, :, None]


def simulated(path: Path, options: argparse.Namespace, n_slices: int) -> Truth:
    settings = {
        "matrix_x": options.matrix,
        "matrix_y": options.matrix,
        "coils": options.coils,
        "slices": n_slices,
        "mask": "vista",
        "acceleration": options.acceleration,
        "seed": 100,
    }
    simulate("cine", path, settings)
    return read_truth(path.with_suffix(".truth.h5"))


def asked(path: Path, port: int, chain: str, truth: Truth) -> tuple[ReplayResult, float, float]:
    """What came back from one chain, its PSNR in dB and its nRMSE, both inside tissue."""
    images: list[Image] = []
    result = replay(path, port=port, config=chain, on_image=images.append)
    reference = np.abs(truth.images)
    final = stacked([i for i in images if not is_preview(i.attributes)], *reference.shape[:2])
    inside = np.broadcast_to(truth.tissue[:, None], reference.shape)
    # the server keeps the scanner's scale: one factor for the whole scan
    final *= np.vdot(final[inside], reference[inside]) / np.vdot(final[inside], final[inside])
    return result, psnr(final, reference, inside), nrmse(final, reference, inside)


def missed_goals(n_slices: int, preview_s: float, all_s: float, decibels: dict[str, float]) -> list[str]:
    missed = []
    if preview_s > PREVIEW_S:
        missed.append(f"first preview of {n_slices} slices after {preview_s} s, asked {PREVIEW_S} s")
    if n_slices == 1 and all_s > ALL_S:
        missed.append(f"last image after {all_s} s, asked {ALL_S} s")
    below = decibels["llr"] - decibels["moe_dqinr_cine"]
    if below > 0:
        missed.append(f"{n_slices} slices: below llr by {below:.2f} dB")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrix", type=int, default=204)
    parser.add_argument("--coils", type=int, default=10)
    parser.add_argument("--acceleration", type=float, default=4.0, help="calibration lines included")
    parser.add_argument("--slices", type=int, nargs="+", default=[1, 3])
    options = parser.parse_args()
    rows: list[list[Any]] = []
    read: dict[str, list[str]] = {}
    missed = []
    for n_slices in options.slices:
        with tempfile.TemporaryDirectory() as folder, server() as (_, port):
            path = Path(folder) / "cine.h5"
            truth = simulated(path, options, n_slices)
            decibels = {}
            for chain in ("llr", "moe_dqinr_cine"):
                result, decibels[chain], error = asked(path, port, chain, truth)
                preview_s, all_s = round(result.seconds_to_first_preview, 2), round(result.seconds_to_last_image, 2)
                rows.append([n_slices, chain, preview_s, all_s, round(decibels[chain], 2), error])
                read[f"{chain}, {n_slices} slices"] = [text.strip() for text in result.texts]
            missed += missed_goals(n_slices, preview_s, all_s, decibels)
    title = f"{options.matrix} x {options.matrix}, 12 frames, {options.coils} coils, R = {options.acceleration:g}"
    columns = ["slices", "chain", "first preview, s", "last image, s", "PSNR in tissue, dB", "nRMSE in tissue"]
    print_table(title, columns, rows)
    for name, texts in read.items():
        print(f"{name}: " + " | ".join(texts))
    write_result("moe_dqinr_server", {"title": title, "columns": columns, "rows": rows, "texts": read, "missed": missed})
    for text in missed:
        print(f"missed: {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
