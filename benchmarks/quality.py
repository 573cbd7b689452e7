"""Question 4: how good and how fast are the classical methods, beside BART on the same data, maps and cores?

Series (``benchmarks/series.py``): 192 x 192, 8 coils, noise 1 % of the peak per coil and complex sample; in every state 192 / R
lines drawn anew plus 16 calibration lines. ``nRMSE`` is of magnitudes inside the object. BART's weight is the best of a scan,
*chosen by the truth*, for each seed; ours is the default. BART's time holds its start and its file access (memory-backed), which is
under 0.1 s of it. Both sides run one after the other on the same number of threads; CPU seconds count children and all threads.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import bart, series
from benchmarks.common import print_table, write_result
from recon_core.methods import get_method
from recon_core.metrics import nrmse, ssim
from recon_core.types import KSpace, Report, ScanInfo

N, COILS, ACS = 192, 8, 16
CASES = (("inversion_recovery", 4), ("inversion_recovery", 8), ("cine", 4), ("cine", 8))
LLR_WEIGHTS = (0.0005, 0.001, 0.002, 0.004, 0.008)
LLR_ITERATIONS = (30, 100)
WAVELET_WEIGHTS = (0.002, 0.005)
KIDNEY = Path(__file__).parent.parent / "tests" / "data" / "molli" / "kidney_molli.npz"
OURS = ("cg_sense", "llr", "grasp_pro")


@dataclass
class Tally:
    """All runs of one method on one case, one entry for each seed."""

    error: list[float] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    weight: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        return {
            "nrmse": [round(v, 5) for v in self.error],
            "nrmse_median": statistics.median(self.error),
            "ssim_median": statistics.median(self.similarity),
            "wall_s_median": statistics.median(self.wall_s),
            "cpu_s_median": statistics.median(self.cpu_s),
            "weights": self.weight,
        }


def cpu_seconds() -> float:
    now = os.times()
    return now.user + now.system


def make(kind: str, acceleration: int, noise: float, seed: int, kidney: Path | None) -> series.Series:
    rng = np.random.default_rng(seed)
    if kind == "kidney (semi-measured)":
        assert kidney is not None
        stack = np.load(kidney)["image"]
        y, x = series.grid(N)
        crop = stack[seed % len(stack), :, None, 32 : 32 + N, 32 : 32 + N].astype(float)
        images = crop * np.exp(1j * (0.8 * x - 0.5 * y + 0.6 * x * y))
    else:
        images = series.inversion_recovery(N, rng) if kind == "inversion_recovery" else series.cine(N, rng)
    return series.from_images(kind, images, N // acceleration, ACS, noise, rng, COILS)


def estimated_maps(data: series.Series, threads: int) -> series.Array:
    """``ecalib`` without its crop, which zeroes anatomy, from the last state's calibration lines."""
    acs = series.centred_fft(data.kspace[-1:] * data.acs_mask[None, None, :, :, None], -1)
    words = ["ecalib", "-m", "1", "-c", "0", "-r", str(ACS)]
    maps = bart.run(words, bart.to_bart(acs)[..., 0], threads=threads).data
    return np.ascontiguousarray(maps.reshape(maps.shape[:4]).transpose(3, 2, 1, 0))


def to_core(data: series.Series, maps: series.Array) -> tuple[KSpace, ScanInfo]:
    lines = data.kspace[-1] * data.acs_mask[None, :, :, None]
    kspace = KSpace(
        torch.from_numpy(data.kspace),
        torch.from_numpy(data.mask.astype(np.float32)),
        acs=torch.from_numpy(lines),
        acs_mask=torch.from_numpy(data.acs_mask),
        coil_maps=torch.from_numpy(maps.astype(np.complex64)),
        noise_std=data.noise_std,
    )
    return kspace, ScanInfo((1, N, N), (0.005, 0.3, 0.3), (1, N, N), (0.005, 0.3, 0.3))


def run_case(
    tallies: dict[str, Tally], data: series.Series, maps: series.Array, threads: int, with_bart: bool, repeats: int
) -> None:
    """Every method on one series. ``tallies`` are added to."""
    kspace, scan = to_core(data, maps)

    def note(name: str, images: np.ndarray, wall_s: float, cpu_s: float, weight: float) -> float:
        tally, error = tallies[name], nrmse(images, data.images, data.support)
        tally.error.append(error)
        tally.similarity.append(ssim(images, data.images, data.support))
        tally.wall_s.append(wall_s)
        tally.cpu_s.append(cpu_s)
        tally.weight.append(weight)
        return error

    for name in OURS:
        method = get_method(name)

        def ours(method: Any = method) -> tuple[np.ndarray, float, float]:
            cpu, wall = cpu_seconds(), time.perf_counter()
            result = method.reconstruct(kspace, scan, method.Settings(), Report())
            return result.images[0].data.numpy(), time.perf_counter() - wall, cpu_seconds() - cpu

        runs = [ours() for _ in range(repeats)]
        note(name, runs[0][0], statistics.median(r[1] for r in runs), statistics.median(r[2] for r in runs), 1.0)

    if not with_bart:
        return
    full, bart_maps = bart.to_bart(series.centred_fft(data.kspace, -1)), bart.maps_to_bart(maps)

    def pics(*words: str) -> bart.Timed:
        return bart.run(["pics", "-S", *words], full, bart_maps, threads=threads)

    def best(weights: tuple[float, ...], words: Callable[[float], list[str]]) -> tuple[float, bart.Timed]:
        found = [(weight, pics(*words(weight))) for weight in weights]
        return min(found, key=lambda pair: nrmse(bart.images_from_bart(pair[1].data), data.images, data.support))

    def low_rank(weight: float, iterations: int) -> list[str]:
        return ["-R", f"L:3:3:{weight}", "-b", "8", "-i", str(iterations)]

    answer = pics("-l2", "-r", "0.01", "-i", "30")
    note("BART pics l2, 30 its", bart.images_from_bart(answer.data), answer.wall_s, answer.cpu_s, 0.01)
    weight, answer = best(WAVELET_WEIGHTS, lambda w: ["-R", f"W:3:0:{w}", "-i", "100"])
    note("BART pics wavelet, 100 its", bart.images_from_bart(answer.data), answer.wall_s, answer.cpu_s, weight)
    for iterations in LLR_ITERATIONS:
        weight, answer = best(LLR_WEIGHTS, lambda w, n=iterations: low_rank(w, n))  # type: ignore[misc]
        note(f"BART pics LLR, {iterations} its", bart.images_from_bart(answer.data), answer.wall_s, answer.cpu_s, weight)


def verdict(summary: dict[str, Any]) -> dict[str, dict[str, float]]:
    """``llr`` against BART's LLR at its best weight, for each of BART's iteration counts: ratios of medians, ours over theirs."""
    ours = summary["llr"]
    return {
        name: {
            "nrmse_ratio": ours["nrmse_median"] / theirs["nrmse_median"],
            "worst_seed_nrmse_ratio": max(a / b for a, b in zip(ours["nrmse"], theirs["nrmse"], strict=True)),
            "wall_ratio": ours["wall_s_median"] / theirs["wall_s_median"],
            "cpu_ratio": ours["cpu_s_median"] / theirs["cpu_s_median"],
        }
        for name, theirs in summary.items()
        if name.startswith("BART pics LLR")
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=200, help="defaults were tuned on 0 to 2 and 100 to 101")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each of our methods per seed")
    parser.add_argument("--threads", type=int, default=1, help="OMP threads of BART and torch threads of ours")
    parser.add_argument("--noise", type=float, default=0.01, help="per complex sample, relative to the peak")
    parser.add_argument("--maps", choices=("true", "ecalib"), default="true", help="coil maps that both sides get")
    parser.add_argument("--kidney", type=Path, default=KIDNEY, help="measured series, times simulated coils")
    parser.add_argument("--name", default="quality", help="of the file in benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    version = bart.available()
    if version is None:
        print("bart is not installed (Debian: apt install bart): ours only")
    cases = list(CASES) + ([("kidney (semi-measured)", 4), ("kidney (semi-measured)", 8)] if options.kidney else [])
    rows: list[list[Any]] = []
    document: dict[str, Any] = {}
    for kind, acceleration in cases:
        tallies: dict[str, Tally] = defaultdict(Tally)
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            data = make(kind, acceleration, options.noise, seed, options.kidney)
            maps = data.coil_maps if options.maps == "true" else estimated_maps(data, options.threads)
            if seed == options.first_seed:
                # a server is warm: FFT plans and thread pools exist before the first scan
                run_case(defaultdict(Tally), data, maps, options.threads, False, 1)
            run_case(tallies, data, maps, options.threads, version is not None, options.repeats)
            errors = ", ".join(f"{name} {tally.error[-1]:.4f}" for name, tally in tallies.items())
            print(f"{kind} {acceleration}x, seed {seed}: {errors}", file=sys.stderr, flush=True)
        case = f"{kind} {acceleration}x+{ACS}"
        summary = {name: tally.summary() for name, tally in tallies.items()}
        document[case] = {"methods": summary, "llr_against_bart": verdict(summary)}
        for name, entry in summary.items():
            weights = "default" if name in OURS else "/".join(f"{w:g}" for w in dict.fromkeys(entry["weights"]))
            times = [round(entry["wall_s_median"], 2), round(entry["cpu_s_median"], 2)]
            rows.append([case, name, round(entry["nrmse_median"], 4), round(entry["ssim_median"], 4), *times, weights])
    title = (
        f"{N}x{N}, {COILS} coils, noise {options.noise:g}, {options.maps} maps, {options.threads} thread(s), BART {version}"
    )
    columns = ["series", "method", "nRMSE", "SSIM", "wall s", "CPU s", "weight"]
    print_table(f"Quality and time, medians of {options.seeds} seeds: {title}", columns, rows)
    ratios = [
        [case, name, *(round(value, 3) for value in entry.values())]
        for case, both in document.items()
        for name, entry in both["llr_against_bart"].items()
    ]
    print_table("llr over BART's LLR", ["series", "against", "nRMSE", "nRMSE, worst seed", "wall", "CPU"], ratios)
    settings = {key: str(value) for key, value in vars(options).items() if key != "kidney"}
    write_result(options.name, {"settings": settings, "bart": version, "cases": document})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
