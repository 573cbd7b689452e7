"""Question: where does PINQI's time go, and how much memory does its training take?

Held-out slices of 192 x 192, 5 delays, 8 coils, 8x. ``slices`` at once through the network; its parts by a stopwatch:
conjugate gradients, per-pixel solver, the two UNets. One slice through the whole method (scaling, maps and quality check included).
On a GPU also the memory of a training step.

    python -m benchmarks.pinqi_speed --device cuda --slices 8          # on a GPU
    python -m benchmarks.pinqi_speed --slices 1 --threads 2            # CPU seconds a slice
    python -m benchmarks.pinqi_speed --slices 1 --processes 2          # and a slice in each of two processes at once

Without ``--weights`` the networks have their initial values: the UNets cost the same, the solvers may need other numbers of steps.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.common import in_words, print_table, write_result
from benchmarks.pinqi_methods import Sample
from recon_core.methods.pinqi import model
from recon_core.methods.pinqi.model import Pinqi, PinqiSettings
from recon_core.methods.pinqi.reconstruction import reconstruct_with
from recon_core.methods.pinqi.settings import Settings
from recon_core.methods.pinqi.weights import TrainedPinqi, load_weights
from recon_core.simulation.brainweb import open_anatomy
from recon_core.simulation.quantitative_brain import BrainBatch, QuantitativeBrains, SampleRecipe
from recon_core.training.losses import deep_supervision
from recon_core.training.pinqi_tasks import EVALUATION_SEED, posed
from recon_core.types import Report

PARTS = {
    "pinqi::linear": "conjugate gradients",
    "pinqi::nonlinear": "per-pixel solver",
    "pinqi::parameter_net": "UNet of parameters",
    "pinqi::image_net": "UNet of images",
}


def network_for(options: argparse.Namespace, precision: str) -> TrainedPinqi:
    """The weights that were named, else a network with its initial values."""
    if options.weights:
        return load_weights(options.weights, options.device, precision)
    torch.manual_seed(0)
    recipe = SampleRecipe(size=options.size)
    network = Pinqi(recipe.model, PinqiSettings(precision=precision)).to(options.device).eval()
    return TrainedPinqi(network.requires_grad_(False), recipe.times, 1.0, {"sha256": "initial values"})


def synchronised(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str, repeats: int) -> tuple[float, float]:
    """Median wall seconds and least CPU seconds of all threads, after one call that counts for nothing."""
    walls, used = [], []
    for _ in range(repeats + 1):
        synchronised(device)
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        synchronised(device)
        walls.append(time.perf_counter() - wall)
        used.append(time.process_time() - cpu)
    return statistics.median(walls[1:]), min(used[1:])


def parts_of(call: Callable[[], Any], device: str) -> dict[str, float]:
    """Wall seconds in each of `PARTS`, in one call; a GPU is waited for at both ends of every part.

    The network marks its parts with ``record_function`` for profilers. A profiler itself would slow the per-pixel solver's many small
    operations, so a stopwatch takes its place for this call.
    """
    found = dict.fromkeys(PARTS.values(), 0.0)

    @contextmanager
    def stopwatch(name: str) -> Iterator[None]:
        synchronised(device)
        start = time.perf_counter()
        yield
        synchronised(device)
        found[PARTS[name]] += time.perf_counter() - start

    with patch.object(model, "record_function", stopwatch):
        call()
    return found


def through_network(trained: TrainedPinqi, batch: BrainBatch) -> Callable[[], Any]:
    operator, rhs, start = posed(batch, trained.network.settings.start)

    def call() -> Any:
        with torch.no_grad():
            return trained.network(operator, rhs, start)

    return call


def whole_method(trained: TrainedPinqi, batch: BrainBatch, recipe: SampleRecipe) -> Callable[[], Any]:
    """Scaling, first images, network, maps and quality check of the first slice."""
    sample = Sample.of(batch, recipe)
    return lambda: reconstruct_with(trained, sample.kspace, sample.scan, Settings(), Report())


def test_slices(options: argparse.Namespace) -> tuple[BrainBatch, SampleRecipe, QuantitativeBrains]:
    recipe = SampleRecipe(size=options.size, accelerations=(8.0,))
    brains = QuantitativeBrains(open_anatomy(None, options.device), recipe, seed=EVALUATION_SEED, device=options.device)
    return brains.batch("test", range(options.slices)), recipe, brains


def _one_of_many(options: argparse.Namespace, precision: str, ready: Any, seconds: Any) -> None:
    """A process of `side_by_side`: begins when all are ready."""
    torch.set_num_threads(options.threads)
    batch, recipe, _ = test_slices(options)
    call = whole_method(network_for(options, precision), batch, recipe)
    call()
    ready.wait()
    for _ in range(options.repeats):
        start = time.perf_counter()
        call()
        seconds.put(time.perf_counter() - start)


def side_by_side(options: argparse.Namespace, precision: str) -> float:
    """Seconds a slice where every one of ``--processes`` is at a slice of its own, as a server's workers are."""
    context = multiprocessing.get_context("spawn")
    ready, seconds = context.Barrier(options.processes), context.Queue()
    arguments = (options, precision, ready, seconds)
    processes = [context.Process(target=_one_of_many, args=arguments) for _ in range(options.processes)]
    for process in processes:
        process.start()
    found = [seconds.get(timeout=600) for _ in range(options.processes * options.repeats)]
    for process in processes:
        process.join()
    return statistics.median(found) / options.processes


def training_memory(batch: BrainBatch, precision: str, recompute: bool) -> tuple[float, float]:
    """GiB at the peak, and seconds, of one step forwards and backwards; GPU only."""
    torch.manual_seed(0)
    network = Pinqi(SampleRecipe().model, PinqiSettings(precision=precision, recompute=recompute)).to(batch.kspace.device)
    operator = batch.operator()
    rhs = operator.adjoint(operator.enter_data(batch.kspace))

    def step() -> None:
        network.zero_grad()
        found = network(operator, rhs)
        weight = batch.brain.mT[:, None].float() + 0.01
        deep_supervision(found.predictions, batch.parameters.mT, weight, first=0.1, others=0.05).backward()

    torch.cuda.reset_peak_memory_stats()
    wall, _ = timed(step, "cuda", 2)
    return torch.cuda.max_memory_allocated() / 2**30, wall


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures of one device, as a document."""
    batch, recipe, brains = test_slices(options)
    document: dict[str, Any] = {
        "slices": options.slices,
        "size": options.size,
        "device": options.device,
        "threads": options.threads,
    }
    for precision in options.precisions:
        trained = network_for(options, precision)
        call = through_network(trained, batch)
        wall, cpu = timed(call, options.device, options.repeats)
        found = call()
        one_wall, one_cpu = timed(whole_method(trained, batch, recipe), options.device, options.repeats)
        begin = partial(posed, batch, trained.network.settings.start)
        start_wall, start_cpu = timed(begin, options.device, options.repeats)
        document[precision] = {
            "start": {"wall_s": start_wall, "cpu_s": start_cpu},
            "network": {"wall_s": wall, "cpu_s": cpu},
            "parts_s": parts_of(call, options.device),
            "method_one_slice": {"wall_s": one_wall, "cpu_s": one_cpu},
            "linear_steps": [int(r.iterations.max()) for r in found.linear],
            "nonlinear_steps": [int(r.iterations.max()) for r in found.nonlinear],
            "weights": str(trained.facts.get("sha256", ""))[:8],
        }
        if options.processes > 1:
            document[precision]["processes"] = {"number": options.processes, "s_a_slice": side_by_side(options, precision)}
        if options.device.startswith("cuda"):
            eight = brains.batch("train", range(8))
            for recompute in (False, True):
                gib, seconds = training_memory(eight, precision, recompute)
                name = "training_batch_8" + ("_recompute" if recompute else "")
                document[precision][name] = {"peak_gib": gib, "step_s": seconds}
    return document


def show(document: dict[str, Any], precisions: Sequence[str]) -> None:
    rows: list[list[Any]] = []
    for precision in precisions:
        d = document[precision]
        n = document["slices"]
        rows.append(
            [precision, f"network, {n} slices", d["network"]["wall_s"], d["network"]["cpu_s"], d["network"]["cpu_s"] / n]
        )
        rows.append([precision, f"its first images, {n} slices", *d["start"].values(), d["start"]["cpu_s"] / n])
        rows += [[precision, f"  {name}", seconds, "", ""] for name, seconds in d["parts_s"].items()]
        rows.append([precision, "whole method, 1 slice", *d["method_one_slice"].values(), d["method_one_slice"]["cpu_s"]])
        if many := d.get("processes"):
            rows.append([precision, f"whole method, in each of {many['number']} processes", "", "", many["s_a_slice"]])
        rows += [
            [precision, name.replace("_", " "), d[name]["step_s"], f"{d[name]['peak_gib']:.1f} GiB", ""]
            for name in d
            if name.startswith("training")
        ]
    print_table(f"PINQI on {document['device']}", ["precision", "part", "wall s", "CPU s", "CPU s a slice"], rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=None, help="JSON of trained weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--slices", type=int, default=8)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1, help="slices at once, each in a process of --threads threads")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", default=["float32"], choices=("float32", "bfloat16"))
    parser.add_argument("--name", default="pinqi_speed", help="of the file in benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    document = measure(options)
    show(document, options.precisions)
    write_result(
        options.name, {**document, "network_settings": repr(network_for(options, options.precisions[0]).network.settings)}
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(in_words(main))
