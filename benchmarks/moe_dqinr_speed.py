"""How long does a step of MoE-dqINR take, part by part, and how far is that from what the machine allows?

    python -m benchmarks.moe_dqinr_speed

Both published configurations: dynamic 204 x 204, 12 frames, 10 coils, and quantitative 144 x 144, 9 states, 10 coils. Needs torch,
numpy and scipy only. For each part the floating-point operations and the bytes that cannot be avoided are counted; the floor is the
longer of the two at the device's rates: data sheet for known GPUs, else a matrix product and the faster of a copy and an addition
measured here. On CUDA all 850 iterations are run in each precision; on a CPU a few steps are timed and the whole fit is
*extrapolated* from them, and said so; with one thread the times are the process's own CPU seconds.

Correctness, on the device: loss and gradients of a smaller case against float64 on the CPU; two fits bit by bit; a captured CUDA
graph against plain steps. The command fails where they differ.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from benchmarks import series
from benchmarks.common import print_table, write_result
from benchmarks.quality import to_core
from recon_core.methods.moe_dqinr.configurations import DYNAMIC, QUANTITATIVE, SMALL_DYNAMIC, Configuration
from recon_core.methods.moe_dqinr.fit import CPU_CHUNK, FitSettings, fit
from recon_core.methods.moe_dqinr.gradients import Evaluation, Part, matmul_precision
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.networks import Branches
from recon_core.methods.moe_dqinr.objective import Objective, make_objective
from recon_core.problem import pose
from recon_core.types import Report

ITERATIONS, COILS = 850, 10
CASES = (("dynamic", DYNAMIC, 204, 12), ("quantitative", QUANTITATIVE, 144, 9))
PAPER_SECONDS = {"dynamic": 31.08, "quantitative": 26.82}
"""On an RTX 3090, as published."""

SHEETS = {
    # FLOP/s of dense products in float32, TF32, bfloat16; bytes/s
    "H200": (67e12, 495e12, 989e12, 4.8e12),
    "H100": (67e12, 495e12, 989e12, 3.35e12),
    "A100": (19.5e12, 156e12, 312e12, 2.0e12),
    "L40S": (91.6e12, 183e12, 362e12, 0.864e12),
    "RTX 4090": (82.6e12, 82.6e12, 165e12, 1.008e12),
    "RTX 3090": (35.6e12, 35.6e12, 71e12, 0.936e12),
}
"""Data sheets (products without sparsity)."""

LARGEST_DIFFERENCE = {"loss": 1e-4, "gradient": 1e-3}
"""Relative, float32 on the device against float64 on the CPU."""


@dataclass(frozen=True)
class Rates:
    """FLOP/s of products in the chosen precision, FLOP/s of everything else, bytes/s, and where they are from."""

    products: float
    plain: float
    memory: float
    source: str


def now(device: torch.device) -> float:
    """Wall time on a GPU and for several threads; the process's own CPU time for one thread, which other work hardly changes."""
    return time.process_time() if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def median_time(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median time in s after one warm-up."""
    times = []
    for repeat in range(repeats + 1):
        _finish(device)
        started = now(device)
        run()
        _finish(device)
        if repeat:
            times.append(now(device) - started)
    return statistics.median(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rates(device: torch.device, precision: str) -> Rates:
    """Of the data sheet where the GPU is known, else measured."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for known, (single, tf32, half, memory) in SHEETS.items():
        if known in name:
            return Rates({"float32": single, "tf32": tf32, "bfloat16": half}[precision], single, memory, "data sheet")
    side = 4096 if device.type == "cuda" else 768
    elements = 1 << (28 if device.type == "cuda" else 24)

    def products(dtype: torch.dtype) -> float:
        a = torch.randn(side, side, device=device).to(dtype)
        return 2 * side**3 / median_time(lambda: a @ a, device, 5)

    source, target = torch.ones(elements, device=device), torch.empty(elements, device=device)
    # copying reads and writes 4 bytes, adding in place reads 8 and writes 4
    copied = 8 * elements / median_time(lambda: target.copy_(source), device, 5)
    memory = max(copied, 12 * elements / median_time(lambda: target.add_(source), device, 5))
    single = products(torch.float32)
    with matmul_precision(precision) as half_type:
        return Rates(products(half_type or torch.float32), single, memory, "measured here")


def case(
    name: str, n: int, n_states: int, device: torch.device, dtype: torch.dtype = torch.complex64
) -> tuple[Objective, tuple[int, ...]]:
    """The objective of a simulated series, 4-fold, 16 calibration lines, on the device, and the shape of its images."""
    rng = np.random.default_rng(7)
    make = series.cine if name == "dynamic" else series.inversion_recovery
    data = series.from_images(name, make(n, rng, n_states), n // 4, 16, 0.01, rng, COILS)
    kspace = to_core(data, data.coil_maps)[0].to(device)
    assert kspace.coil_maps is not None
    kspace = replace(kspace, data=kspace.data.to(dtype), coil_maps=kspace.coil_maps.to(dtype))
    problem = pose(kspace, name, Report())
    return make_objective(problem, kspace), problem.operator.image_shape


def field_for(configuration: Configuration, shape: tuple[int, ...], device: torch.device) -> MoeField:
    generator = torch.Generator().manual_seed(0)
    return MoeField(configuration, shape[0], shape[1:], generator=generator, device=device)


@dataclass(frozen=True)
class PartTime:
    """One row of the table: what must be done at least, and what was measured, in one step."""

    name: str
    product_flops: float
    plain_flops: float
    bytes_moved: float
    seconds: float

    def floor(self, r: Rates) -> float:
        return max(self.product_flops / r.products + self.plain_flops / r.plain, self.bytes_moved / r.memory)


def part_times(
    field: MoeField, objective: Objective, device: torch.device, precision: str, share: float, repeats: int
) -> list[PartTime]:
    """Forward and backward of each part; on a CPU the branches see a ``share`` of the pixels and are scaled up."""
    n_pixels = math.prod(field.spatial_shape)
    product, table = field.encoder.product, field.encoder.table.detach()
    features = product.forward(table)
    seen = max(1, round(share * n_pixels))
    chunk = CPU_CHUNK if device.type == "cpu" else n_pixels
    rows = [
        PartTime(
            "encode",
            0.0,
            4.0 * product.n_levels * n_pixels * 4 * 2,
            encode_bytes(field),
            median_time(lambda: (product.forward(table), product.transpose(features)), device, repeats),
        )
    ]
    for name, branches in (("experts", field.experts), ("background", field.background), ("residual", field.residual)):
        if branches is None:
            continue
        weights = sum(w.numel() for w in branches.weights)
        seconds = median_time(partial(branch_step, branches, features[:seen], chunk, precision), device, repeats)
        rows.append(
            PartTime(name, 6.0 * weights * n_pixels, 0.0, branch_bytes(branches, n_pixels), seconds * n_pixels / seen)
        )
    images = field.images(chunk)
    rows.append(operator_time(objective, images, device, repeats))
    parameters = [p.detach().clone().requires_grad_() for p in field.parameters()]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimiser = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    n = sum(p.numel() for p in parameters)
    # parameter, gradient and two moments read; parameter and moments written
    rows.append(PartTime("optimiser", 0.0, 15.0 * n, 7 * 4.0 * n, median_time(optimiser.step, device, repeats)))
    return rows


def encode_bytes(field: MoeField) -> float:
    """Matrix (index and weight of 4 bytes) and features once in each direction, table read and its gradient written."""
    product = field.encoder.product
    elements = 4 * product.n_levels * product.n_pixels
    features = product.n_levels * product.n_pixels * product.n_features
    return 2.0 * (8 * elements + 4 * features + 4 * product.n_entries * product.n_features)


def branch_bytes(branches: Branches, n_pixels: int) -> float:
    """What a kernel that keeps hidden layers on the chip must move: features, outputs and their gradients, weights."""
    inputs = int(branches.weights[0].shape[1])
    weights = sum(w.numel() for w in branches.weights)
    return 4.0 * (2 * n_pixels * inputs + 2 * n_pixels * 2 * branches.n_branches + 3 * weights)


def operator_time(objective: Objective, images: torch.Tensor, device: torch.device, repeats: int) -> PartTime:
    """Coil maps, two FFTs along k1, weights, conjugate maps, and the value."""
    n_states, n_x, _, n_y = images.shape
    transformed = n_states * objective.operator.n_coils * n_x * n_y
    # 5 N log2 N for a complex FFT; two complex products of 6, one addition of 2, one weighting of 2
    flops = transformed * (2 * 5 * math.log2(n_y) + 16)
    # images read and written, maps and right-hand side read: coil images may stay on the chip
    moved = 8.0 * (3 * images.numel() + objective.operator.n_coils * n_x * n_y)
    seconds = median_time(lambda: objective.value_and_gradient(images), device, repeats)
    return PartTime("operator", 0.0, flops, moved, seconds)


def branch_step(branches: Branches, features: torch.Tensor, chunk: int, precision: str) -> None:
    with matmul_precision(precision) as dtype:
        for part in features.split(chunk):
            leaf = part.detach().requires_grad_()
            out = branches(leaf, dtype)
            out.backward(torch.ones_like(out))
    branches.zero_grad()


def whole_fit(
    configuration: Configuration,
    objective: Objective,
    shape: tuple[int, ...],
    device: torch.device,
    precision: str,
    steps: int,
) -> tuple[float, float, float]:
    """Seconds of ``steps`` iterations after the first one's set-up is done, of all with set-up, and the last loss."""
    started = now(device)
    field = field_for(configuration, shape, device)
    marks: list[float] = []
    settings = FitSettings(iterations=steps, precision=precision, report_every=max(1, steps // 10))

    def mark(_: object) -> None:
        _finish(device)
        marks.append(now(device))

    result = fit(field, objective, settings, mark)
    _finish(device)
    done = now(device)
    per_step = (
        (marks[-1] - marks[0]) / max(1, steps - settings.report_every) if len(marks) > 1 else (marks[0] - started) / steps
    )
    return per_step, done - started, float(result.losses[-1])


def correctness(device: torch.device) -> list[list[object]]:
    """Differences and their limits; every row is (what, found, limit)."""
    cpu = torch.device("cpu")
    double, shape = case("dynamic", 64, 6, cpu, torch.complex128)
    exact_loss, exact = _evaluate(field_for(SMALL_DYNAMIC, shape, cpu).double(), double, 0, False)
    on_device, _ = case("dynamic", 64, 6, device)
    rows: list[list[object]] = []
    for chunk, recompute in ((0, False), (1000, True)):
        loss, slopes = _evaluate(field_for(SMALL_DYNAMIC, shape, device), on_device, chunk, recompute)
        name = f"chunk {chunk or 'all'}, {'recomputed' if recompute else 'kept'}"
        rows.append([f"loss, {name}", abs(loss / exact_loss - 1), LARGEST_DIFFERENCE["loss"]])
        difference = float((slopes.double() - exact).norm() / exact.norm())
        rows.append([f"gradient, {name}", difference, LARGEST_DIFFERENCE["gradient"]])
    settings = FitSettings(iterations=20)
    fits = [fit(field_for(SMALL_DYNAMIC, shape, device), on_device, settings).images for _ in range(2)]
    rows.append(["two fits of one seed", float((fits[0] - fits[1]).abs().max()), 0.0])
    plain = fit(field_for(SMALL_DYNAMIC, shape, device), on_device, replace(settings, cuda_graph=False)).images
    what = "captured graph against plain steps" if device.type == "cuda" else "plain steps again (no graphs on a CPU)"
    rows.append([what, float((fits[0] - plain).norm() / plain.norm()), 1e-4])
    return rows


def _evaluate(field: MoeField, objective: Objective, chunk: int, recompute: bool) -> tuple[float, torch.Tensor]:
    loss = float(Evaluation(field, Part(field, objective), chunk, recompute, None)().sum())
    return loss, torch.cat([p.grad.flatten().cpu() for p in field.parameters() if p.grad is not None])


COLUMNS = ["part", "GFLOP", "MB", "floor, ms", "measured, ms", "floor / measured"]


def report_case(
    name: str, configuration: Configuration, n: int, n_states: int, options: argparse.Namespace
) -> dict[str, object]:
    """Tables of one configuration in each precision."""
    device = torch.device(options.device)
    on_cuda = device.type == "cuda"
    objective, shape = case(name, n, n_states, device)
    found: dict[str, object] = {"matrix": n, "states": n_states, "coils": COILS, "paper_s": PAPER_SECONDS[name]}
    for precision in ("float32", "tf32", "bfloat16") if on_cuda else ("float32", "bfloat16"):
        speed = rates(device, precision)
        field = field_for(configuration, shape, device)
        parts = part_times(field, objective, device, precision, 1.0 if on_cuda else options.share, options.repeats)
        del field
        rows = [[p.name, *_row(p.product_flops + p.plain_flops, p.bytes_moved, p.floor(speed), p.seconds)] for p in parts]
        flops, moved = sum(p.product_flops + p.plain_flops for p in parts), sum(p.bytes_moved for p in parts)
        floor = sum(p.floor(speed) for p in parts)
        rows.append(["sum of parts", *_row(flops, moved, floor, sum(p.seconds for p in parts))])
        steps = ITERATIONS if on_cuda else options.steps
        per_step, total, loss = whole_fit(configuration, objective, shape, device, precision, steps)
        rows.append(["step of the fit", *_row(flops, moved, floor, per_step)])
        rate = f"{speed.products / 1e12:.3g} TFLOP/s, {speed.memory / 1e9:.3g} GB/s {speed.source}"
        print_table(f"{name} {n} x {n} x {n_states}, {precision} ({rate})", COLUMNS, rows)
        seconds = total if on_cuda else per_step * ITERATIONS
        how = "measured" if on_cuda else f"EXTRAPOLATED from {steps} steps"
        print(
            f"{ITERATIONS} iterations: {seconds:,.2f} s {how}; floor {floor * ITERATIONS:,.2f} s; paper {PAPER_SECONDS[name]} s"
        )
        found[precision] = {
            "columns": COLUMNS,
            "rows": rows,
            "rates": rate,
            "fit_s": seconds,
            "fit_is": how,
            "floor_s": floor * ITERATIONS,
            "last_loss": loss,
            "steps_run": steps,
        }
    return found


def _row(flops: float, moved: float, floor: float, seconds: float) -> list[float]:
    return [flops / 1e9, moved / 1e6, 1e3 * floor, 1e3 * seconds, floor / seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--steps", type=int, default=2, help="steps of the whole fit that a CPU runs")
    parser.add_argument("--share", type=float, default=0.1, help="share of the pixels on which a CPU times the branches")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    checks = correctness(torch.device(options.device))
    print_table(f"correct on {options.device}?", ["what", "relative difference", "limit"], checks)
    clock = "CPU seconds of one thread" if options.device == "cpu" and options.threads == 1 else "wall seconds"
    result: dict[str, object] = {
        "device": options.device,
        "threads": options.threads,
        "clock": clock,
        "correctness": checks,
    }
    for name, configuration, n, n_states in CASES:
        result[name] = report_case(name, configuration, n, n_states, options)
    write_result("moe_dqinr_speed" + ("" if options.device.startswith("cuda") else "_cpu"), result)
    if any(found > limit for _, found, limit in checks):  # type: ignore[operator]
        raise SystemExit("the device does not agree")


if __name__ == "__main__":
    main()
