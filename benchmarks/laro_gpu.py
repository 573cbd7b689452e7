"""The one command for a GPU machine: train LARO (or go on where the last call stopped), then measure speed and quality.

    python -m benchmarks.laro_gpu --output DIR --max-minutes 7

Needs torch, NumPy, SciPy, h5py and safetensors alone. Run it again with the same ``--output`` to train further: it resumes by itself.
Options that it does not know go to the training, whose defaults are the published ones; see ``python -m recon_core.training.laro
--help``. The small matrix that ships, with a larger network:

    python -m benchmarks.laro_gpu --output DIR --matrix 32 64 64 --n-echoes 6 --acs 8 8 --patterns 8/2 8/1 8/0 4/2 --second-unrolls 5 \
        --first-steps 2000 --second-steps 20000 --second-start llr --mask-draws 8 --pixel-weight 1

Before it trains, the heads of its scans are simulated by all processors: the same heads in every call on the same kind of processor. A
training goes on with the bits of the scans that it was begun with, and says so where another machine simulates others. Weights, masks,
logs and the figures' JSON lie in ``DIR``. A part that fails is named at the end and leaves the others.

Speed: the published size (256 x 206 x 80, 10 echoes, 8 coils, R = 8) by a network of the published architecture, with the weights of
``DIR`` where there are some and initial ones otherwise (the cost is the same); then R2*, field, background removal and susceptibility.
Targets on an H200: 5 s for the images, 10 s for the maps.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks import laro as quality
from benchmarks.common import (
    RESULTS,
    each_by_itself,
    in_words,
    print_table,
    training_options,
    training_words,
    write_result,
)
from benchmarks.laro_cases import Case, acquire, pattern
from benchmarks.pinqi_speed import synchronised
from recon_core.maps.background import pdf, v_sharp
from recon_core.maps.dipole import tv_admm
from recon_core.maps.dipole_kernel import ppm_per_hz
from recon_core.maps.field import fit_field
from recon_core.maps.r2star import arlo
from recon_core.methods.laro import Settings
from recon_core.methods.laro.model import Laro, LaroSettings
from recon_core.methods.laro.reconstruction import reconstruct_with
from recon_core.methods.laro.weights import TrainedLaro, load_weights
from recon_core.simulation.multi_echo_brain import BrainScan, MultiEchoBrains, ScanRecipe, simulate
from recon_core.simulation.scan_folder import write_scan
from recon_core.training import laro as training
from recon_core.training.laro_tasks import LaroRecipe
from recon_core.training.runs import RECIPE, option_parser, parsed_options
from recon_core.types import Report

Tensor = torch.Tensor

COLUMNS = ("part", "precision", "s (median)", "target, s", "peak memory, GiB")
TARGETS = {"images": 5.0, "maps": 10.0}
REPEATS = 3


def large_scan(matrix: tuple[int, int, int], n_echoes: int, n_coils: int) -> BrainScan:
    """A head of half the matrix, interpolated: simulating the full one takes minutes and would measure nothing else."""
    half = (matrix[0] // 2, matrix[1] // 2, matrix[2] // 2)
    recipe = ScanRecipe(matrix=half, voxel=(1.6, 1.8), n_echoes=n_echoes, n_coils=n_coils, noise=(0.01, 0.01))
    scan = simulate(recipe, 1)

    def finer(x: Tensor) -> Tensor:
        parts = torch.view_as_real(x).movedim(-1, 1)
        grown = functional.interpolate(parts, size=matrix, mode="trilinear")
        return torch.view_as_complex(grown.movedim(1, -1).contiguous())

    maps = finer(scan.coil_maps)
    brain = functional.interpolate(scan.brain[None, None].float(), size=matrix)[0, 0] > 0.5
    voxel = tuple(v * h / n for v, h, n in zip(scan.voxel, half, matrix, strict=True))
    return replace(
        scan,
        images=finer(scan.images),
        coil_maps=maps / torch.linalg.vector_norm(maps, dim=0).clamp_min(1e-6),
        brain=brain,
        voxel=(voxel[0], voxel[1], voxel[2]),
    )


def simulated_scans(recipe: ScanRecipe, seed: int, count: int, folder: Path) -> None:
    """The heads that a training without ``--scans`` would simulate one after the other, in a folder."""
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in [pool.submit(_write_head, recipe, seed, index, folder) for index in range(count)]:
            done.result()


def _write_head(recipe: ScanRecipe, seed: int, index: int, folder: Path) -> None:
    torch.set_num_threads(1)
    write_scan(folder, f"scan_{index:04d}", MultiEchoBrains(recipe, seed=seed, keep=1).scan("train", index))


def train(words: Sequence[str], heads: int) -> None:
    """`recon_core.training.laro` on heads that are simulated first."""
    kinds = (LaroRecipe, training.RunSettings)
    _, (recipe, settings) = parsed_options(option_parser("training", None, *kinds), words, *kinds)
    if settings.scans or not heads:
        training.main(words)
        return
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        simulated_scans(recipe.scans, recipe.seed, heads, Path(folder))
        print(f"{heads} heads simulated in {time.perf_counter() - begun:.0f} s", flush=True)
        training.main([*words, "--scans", folder])


def on_device(case: Case, device: str) -> Case:
    scan = case.scan
    moved = replace(scan, images=scan.images.to(device), coil_maps=scan.coil_maps.to(device), brain=scan.brain.to(device))
    return replace(case, scan=moved, kspace=case.kspace.to(device))


def published_network(device: str, precision: str) -> TrainedLaro:
    """The published architecture with initial weights."""
    torch.manual_seed(0)
    network = Laro(LaroSettings(precision=precision)).to(device).eval()
    return TrainedLaro(network.requires_grad_(False), "cg_sense", 1.0, {"sha256": "initial values"})


def timed(work: Callable[[], Any], device: str, repeats: int) -> tuple[Any, float, float]:
    """What it gives, median seconds, and the peak memory in GiB (NaN on a CPU)."""
    cuda = device.startswith("cuda")
    seconds, found = [], None
    for turn in range(repeats + cuda):  # the first turn on a GPU chooses its kernels
        synchronised(device)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        found = work()
        synchronised(device)
        if turn or not cuda:
            seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan
    return found, statistics.median(seconds), peak


def speed(
    case: Case, networks: dict[str, TrainedLaro], device: str, repeats: int, start: str, *, with_pdf: bool = True
) -> list[list[object]]:
    """Rows of `COLUMNS`."""
    rows: list[list[object]] = []
    scan = case.scan
    images = scan.images
    for precision, trained in networks.items():
        settings = Settings(start=start, precision=precision)
        result, seconds, peak = timed(
            partial(reconstruct_with, trained, case.kspace, case.info, settings, Report()),
            device,
            repeats,
        )
        images = result.images[0].data
        rows.append(["images", precision, seconds, TARGETS["images"], peak])
    total = 0.0

    def part(name: str, work: Callable[[], Any], *, counts: bool = True) -> Any:
        nonlocal total
        found, seconds, peak = timed(work, device, repeats)
        total += seconds if counts else 0.0
        rows.append([name, "float32", seconds, "", peak])
        return found

    part("R2* (ARLO)", lambda: arlo(images, scan.echo_times, mask=scan.brain))
    fitted = part("field fit", lambda: fit_field(images, scan.echo_times, scan.brain))
    local = part("background (V-SHARP)", lambda: v_sharp(fitted.field.data, scan.brain, scan.voxel))
    if with_pdf:
        part(
            "background (PDF, instead)",
            lambda: pdf(fitted.field.data, scan.brain, scan.voxel, scan.b0, weights=fitted.weights),
            counts=False,
        )
    part(
        "susceptibility (TV-ADMM)",
        lambda: tv_admm(local.field * ppm_per_hz(3.0), local.mask, scan.voxel, scan.b0, weights=fitted.weights),
    )
    rows.append(["maps", "float32", total, TARGETS["maps"], ""])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training_options(parser, 7.0, "cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--heads", type=int, default=48, help="simulated before training; 0: one after the other on the way")
    parser.add_argument("--speed-matrix", type=int, nargs=3, default=[80, 206, 256], metavar=("Z", "Y", "X"))
    parser.add_argument("--speed-echoes", type=int, default=10)
    parser.add_argument("--speed-coils", type=int, default=8)
    parser.add_argument("--speed-start", default="weights", help="first images, as in the chain's settings")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--quality-scans", type=int, default=1, help="held-out heads; 0: no quality")
    parser.add_argument("--name", default="laro_gpu", help="of the JSON")
    options, of_training = parser.parse_known_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    weights = options.output / f"{training.NAME}.json"
    parts: dict[str, Callable[[], object]] = {}
    if options.max_minutes > 0:
        parts["training"] = lambda: train([*training_words(options, RECIPE), *of_training], options.heads)
    parts["speed"] = lambda: measure_speed(options, weights)
    if options.quality_scans:
        parts["quality"] = lambda: measure_quality(options, weights)
    return each_by_itself(parts)


def measure_speed(options: argparse.Namespace, weights: Path) -> None:
    """Seconds of images and maps, with the weights if there are some."""
    precisions = ["float32", "bfloat16"] if options.device.startswith("cuda") else ["float32"]
    own = weights.is_file()
    networks = {
        p: load_weights(weights, options.device, p) if own else published_network(options.device, p) for p in precisions
    }
    z, y, x = options.speed_matrix
    scan = large_scan((z, y, x), options.speed_echoes, options.speed_coils)
    case = on_device(acquire(scan, pattern((z, y), options.speed_echoes, 8.0, 2), 8.0, 2), options.device)
    rows = speed(case, networks, options.device, options.repeats, options.speed_start)
    title = f"LARO, {x} x {y} x {z}, {options.speed_echoes} echoes, {options.speed_coils} coils, R = 8"
    print_table(title, COLUMNS, rows)
    facts = {
        "weights": "own" if own else "initial values",
        "matrix_zyx": options.speed_matrix,
        "columns": COLUMNS,
        "rows": rows,
    }
    write_result(options.name, facts)
    shutil.copy(RESULTS / f"{options.name}.json", options.output)


def measure_quality(options: argparse.Namespace, weights: Path) -> None:
    """The benchmark's tables with the trained weights, on the processors; nothing without weights."""
    if not weights.is_file():
        print("no weights: no quality", flush=True)
        return
    name = f"{options.name}_quality"
    words = ["--weights", str(options.output), "--scans", str(options.quality_scans), "--kinds", "8/2", "4/2"]
    words += ["--threads", str(len(os.sched_getaffinity(0)))]
    quality.main([*words, "--parts", "tables,regions", "--methods", "llr,laro", "--name", name])
    shutil.copy(RESULTS / f"{name}.json", options.output)


if __name__ == "__main__":
    sys.exit(in_words(main))
