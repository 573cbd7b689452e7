"""One call on a GPU machine: do the methods give the same images on CUDA as on the CPU, and how fast are they there?

Needs torch, numpy and scipy only (``recon_core``; nothing of ``gadgets``):

    python -m benchmarks.cuda_check

Data: the inversion-recovery series of ``benchmarks/series.py``, 8 coils, 192 x 192, 9 states, 4-fold. Without a CUDA device it
runs the same comparison between one and two CPU threads, so that the code stays exercised, and records nothing.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from benchmarks.common import print_table, write_result
from benchmarks.series import from_images, inversion_recovery
from recon_core.methods import methods
from recon_core.reconstruct import Recipe, reconstruct
from recon_core.settings import parse_settings
from recon_core.types import KSpace, ScanInfo

LARGEST_DIFFERENCE = 1e-3
"""Relative: iterations amplify float32 rounding, thresholds can flip a weak component."""

RUNS = 5


def problem(n: int = 192, n_lines: int = 48, n_acs: int = 16) -> tuple[KSpace, ScanInfo]:
    """K-space of one slice as a method sees it."""
    rng = np.random.default_rng(4)
    series = from_images("inversion recovery", inversion_recovery(n, rng), n_lines, n_acs, 0.01, rng)
    data = torch.from_numpy(series.kspace.astype(np.complex64))
    acs_mask = torch.from_numpy(series.acs_mask).reshape(1, n)
    acs = data[-1] * acs_mask[..., None]
    counts = torch.from_numpy(series.mask.astype(np.float32))
    size = (1, n, n)
    fov = (0.005, 0.2, 0.2)
    return KSpace(data, counts, acs, acs_mask, noise_std=series.noise_std), ScanInfo(size, fov, size, fov)


def timed(kspace: KSpace, scan: ScanInfo, recipe: Recipe, device: str) -> tuple[torch.Tensor, float]:
    """Images ``(state, z, y, x)`` on the CPU and the median of ``RUNS`` wall times in s, after one warm-up."""
    moved = kspace.to(device)
    seconds = []
    for run in range(RUNS + 1):
        started = time.perf_counter()
        result = reconstruct(moved, scan, recipe)  # ends with a copy to the CPU: nothing is left in flight
        if run:
            seconds.append(time.perf_counter() - started)
    return result.images[0].data, statistics.median(seconds)


def main() -> None:
    has_cuda = torch.cuda.is_available()
    other = "cuda" if has_cuda else "cpu"
    kspace, scan = problem()
    rows: list[list[object]] = []
    for name, method in methods().items():
        # one preset on both sides: `auto` is another one on each device
        recipe = Recipe(name, parse_settings(method.Settings, {"preset": "default"} if name == "moe_dqinr" else {}))
        limit = max(LARGEST_DIFFERENCE, float(getattr(method, "ROUNDING", 0.0)))
        torch.set_num_threads(1)
        reference, cpu_seconds = timed(kspace, scan, recipe, "cpu")
        torch.set_num_threads(2)
        images, seconds = timed(kspace, scan, recipe, other)
        difference = float(torch.linalg.vector_norm(images - reference) / torch.linalg.vector_norm(reference))
        rows.append([name, cpu_seconds, seconds, cpu_seconds / seconds, difference, limit])
    label = torch.cuda.get_device_name(0) if has_cuda else "CPU, 2 threads (no CUDA device here)"
    columns = ["method", "CPU, 1 thread, s", f"{label}, s", "ratio", "relative difference", "limit"]
    print_table("the same images on CUDA?", columns, rows)
    if has_cuda:
        write_result("cuda_check", {"columns": columns, "rows": rows})
    if any(float(str(row[4])) > float(str(row[5])) for row in rows):
        raise SystemExit("images differ")


if __name__ == "__main__":
    main()
