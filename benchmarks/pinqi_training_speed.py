"""Question: how long does a training step of PINQI take, and which part takes how much?

Forwards: making the samples, the linear layer (CG), the nonlinear layer (per pixel), both networks. Backwards: the layers'
implicit gradients, and all together, of which the rest is the networks'. On a GPU:

    python -m benchmarks.pinqi_training_speed --device cuda --batch 16 --precision bfloat16

On a CPU that others use as well, one thread and ``--cpu-time`` count the CPU seconds that a quiet machine would take. What the forward
pass keeps for the backward pass, most of a step's memory, is the same on any device and grows with the batch.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from benchmarks.common import print_table, write_result
from recon_core.methods.pinqi import model as unrolled
from recon_core.simulation.head_atlas import HeadAtlas
from recon_core.solvers import linear_layer, nonlinear_layer
from recon_core.training.pinqi_tasks import EndToEnd, PinqiRecipe

PARTS = (
    "samples", "linear", "nonlinear", "parameter_net", "image_net", "linear backwards", "nonlinear backwards", "backward", "optimiser",
)  # fmt: skip


class Stopwatch:
    """Seconds by part; waits for a GPU before it looks at the clock.

    Parameters
    ----------
    device
        What is to be waited for.
    cpu_time
        Count the process's CPU seconds.
    """

    def __init__(self, device: torch.device, cpu_time: bool) -> None:
        self.device, self.clock = device, time.process_time if cpu_time else time.perf_counter
        self.seconds: dict[str, float] = defaultdict(float)

    def now(self) -> float:
        """The clock, once the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, its time added to ``part``."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.now()
            result = function(*args, **kwargs)
            self.seconds[part] += self.now() - start
            return result

        return run

    @contextmanager
    def watching(self, task: EndToEnd) -> Iterator[None]:
        """Every part of a training step is timed; the code under test stays as it is."""
        net = task.network
        linear, nonlinear = linear_layer._Attached, nonlinear_layer._Attached
        with (
            mock.patch.object(unrolled, "solve_linear", self.timed("linear", linear_layer.solve_linear)),
            mock.patch.object(unrolled, "solve_nonlinear", self.timed("nonlinear", nonlinear_layer.solve_nonlinear)),
            mock.patch.object(linear, "backward", staticmethod(self.timed("linear backwards", linear.backward))),
            mock.patch.object(nonlinear, "backward", staticmethod(self.timed("nonlinear backwards", nonlinear.backward))),
            mock.patch.object(net, "predict_parameters", self.timed("parameter_net", net.predict_parameters)),
            mock.patch.object(net, "predict_images", self.timed("image_net", net.predict_images)),
            mock.patch.object(task.samples, "batch", self.timed("samples", task.samples.batch)),
        ):
            yield


def training_steps(task: EndToEnd, watch: Stopwatch, n: int) -> list[dict[str, float]]:
    """Seconds by part of ``n`` steps, after one that warms up."""
    optimizer = torch.optim.AdamW(task.module.parameters(), lr=1e-6)
    rows = []
    with watch.watching(task):
        for step in range(n + 1):
            watch.seconds.clear()
            optimizer.zero_grad()
            start = watch.now()
            loss, _ = task.loss(step)
            watch.timed("backward", loss.backward)()
            watch.timed("optimiser", optimizer.step)()
            rows.append({**watch.seconds, "step": watch.now() - start})
    return rows[1:]


def kept_gib(task: EndToEnd) -> float:
    """What the forward pass of a step keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss, _ = task.loss(0)
    assert loss.requires_grad
    return sum(kept.values()) / 2**30


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--columns", type=int, default=0)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds; with one thread only")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    recipe = PinqiRecipe(size=options.size, columns=options.columns, batch=options.batch, accelerations=(4.0, 6.0, 8.0))
    torch.manual_seed(0)
    settings = unrolled.PinqiSettings(precision=options.precision, recompute=options.recompute)
    network = unrolled.Pinqi(recipe.samples.model, settings).to(device)
    task = EndToEnd(network, recipe, HeadAtlas(device=device), device, first=0)
    kept = round(kept_gib(task), 2)
    rows = training_steps(task, Stopwatch(device, options.cpu_time), options.steps)
    least = {part: min(row[part] for row in rows) for part in (*PARTS, "step")}
    memory = round(torch.cuda.max_memory_allocated(device) / 2**30, 2) if device.type == "cuda" else None
    what = f"{options.batch} x {options.size} x {options.columns or options.size}, {options.precision}, {options.device}"
    memories = {"kept for the backward pass, GiB": kept, "peak GPU memory, GiB": memory}
    print_table(f"training step, {what}", ("part", "seconds"), [*least.items(), *memories.items()])
    name = f"pinqi_training_speed_{device.type}_{options.size}x{options.columns or options.size}_{options.precision}"
    name += f"_batch_{options.batch}" if options.batch > 1 else ""
    write_result(name, {"options": vars(options), "seconds": least, "kept_gib": kept, "gpu_memory_gib": memory})


if __name__ == "__main__":
    main()
