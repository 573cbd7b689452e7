"""Question: what are the variants a, h and i of PINQI worth beside it at full size, when all are trained alike?

The proposed method and the variants begin with the same weights (those of the networks that a variant has), see the same strips with
the same first images in the same order, and take equally many steps with the same options: those of the last stage of the shipped
weights (``stages`` in their JSON), but fewer steps. Strips and their first images are made once for all.

    python -m benchmarks.pinqi_variants --initial FILE --output DIR --steps 100
    python -m benchmarks.pinqi --only-weights --weights "a, equal budget=DIR/a/pinqi.json" ...    # the second line that is printed

What training the start had seen belongs to the proposed method: variants have to unlearn some of it. Rows in the result file are
kept, a training that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, in_words, print_table, write_result
from benchmarks.pinqi_ablation import MEANING
from recon_core.methods.pinqi.model import ABLATIONS, Pinqi
from recon_core.simulation.brainweb import open_anatomy
from recon_core.training.checkpoint import read_pair, write_pair
from recon_core.training.pinqi import RunSettings, run
from recon_core.training.pinqi_samples import HeldBatches
from recon_core.training.pinqi_tasks import EndToEnd, PinqiRecipe

ROWS = ("proposed", "a", "h", "i")
MAKING = "making_strips_cpu_s"
IMAGE_FACTORS = (0.1, 0.3, 0.6, 1.0, 3.0)
"""On lambda_y at the noise levels of the initial weights' rule, as the last stage of the shipped weights began."""

JOINT = PinqiRecipe(
    start="refined",
    prediction="kernel",
    columns=48,
    batch=1,
    accelerations=(4.0, 5.0, 6.0, 7.0, 8.0, 8.0),
    pretrain_epochs=0.0,
    network_rate=0.0002,
    image_rate=0.001,
    lambda_rate=0.008,
    embedding_rate=0.0001,
    noise_factors="learned",
    t1_weight=0.3,
    image_weight=10.0,
    ema_decay=0.98,
    warmup_steps=40,
    rate_spread=2.2,
    spread_part=0.25,
    n_validation=0,
    seed=21,
)
"""The last stage of the shipped weights."""


def beginning(initial: Path, folder: Path, factors: Sequence[float]) -> Path:
    """A copy of the initial weights whose noise rule has other factors on lambda_y; without ``factors`` the same."""
    tensors, facts = read_pair(initial)
    stated = {key: value for key, value in facts.items() if key not in ("file", "sha256")}
    if factors:
        stated["noise_rule"] = {**facts["noise_rule"], "image": list(factors)}
    return write_pair(folder, "initial", tensors, stated)


def held_by_all(recipe: PinqiRecipe) -> HeldBatches:
    """The strips, made now."""
    network = Pinqi(recipe.samples.model, replace(ABLATIONS[recipe.ablation], start=recipe.start))
    task = EndToEnd(network, recipe, open_anatomy(None), torch.device("cpu"), first=0)
    assert task.held is not None
    for step in range(recipe.held):
        task.held.at(step)
    return task.held


def log_of(folder: Path) -> list[dict[str, str]]:
    """Rows of a training's log."""
    with (folder / "training" / "log.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def learned(rows: list[dict[str, str]], part: int = 10) -> dict[str, float]:
    """Mean loss of the first and the last steps: of h it is of images alone."""
    losses = [float(row["loss"]) for row in rows]
    n = max(1, len(losses) // part)
    return {"first_loss": statistics.fmean(losses[:n]), "last_loss": statistics.fmean(losses[-n:])}


def kept_rows(path: Path, settings: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], float]:
    """Rows of an earlier call with the same settings, and what its strips took; else nothing."""
    if path.is_file():
        document = json.loads(path.read_text(encoding="utf-8"))
        making = document["settings"].pop(MAKING)
        if document["settings"] == settings:
            return document["rows"], making
    return {}, 0.0


def trained(ablation: str, recipe: PinqiRecipe, initial: Path, folder: Path, held: HeldBatches) -> dict[str, Any]:
    """Train one row, or find it finished; what it took."""
    there = folder / "recipe.json"
    began = time.process_time()
    settings = RunSettings("cpu", initial=str(initial), resume=there.is_file(), validate_every=0)
    result, weights = run(replace(recipe, ablation=ablation), folder, settings, held=held)
    facts = json.loads(weights.read_text(encoding="utf-8"))
    return {
        "sha256": facts["sha256"],
        "steps": result.step,
        "minutes": result.minutes,
        "cpu_s": time.process_time() - began,
        "skipped_steps": result.skipped,
        "noise_rule": facts["noise_rule"],
        **learned(log_of(folder)),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--initial", type=Path, required=True, help="weights (JSON) that all begin with")
    parser.add_argument("--output", type=Path, required=True, help="folder; every row gets one of its own there")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ABLATIONS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--held", type=int, default=64, help="strips, each used steps / held times")
    parser.add_argument("--size", type=int, default=JOINT.size)
    parser.add_argument("--columns", type=int, default=JOINT.columns)
    parser.add_argument(
        "--image-factors",
        type=float,
        nargs="*",
        default=list(IMAGE_FACTORS),
        help="on lambda_y instead of those of the initial weights' rule; none: as they are",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="pinqi_variants")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = replace(
        JOINT,
        held=options.held,
        size=options.size,
        columns=options.columns,
        epochs=options.steps / JOINT.samples_per_epoch,
    )
    initial = beginning(options.initial, options.output / "initial", options.image_factors)
    settings: dict[str, Any] = {"initial_sha256": read_pair(initial)[1]["sha256"], "recipe": recipe.facts()}
    settings["image_factors"] = options.image_factors
    found, making = kept_rows(RESULTS / f"{options.name}.json", settings)
    held = None
    for ablation in options.rows:
        if ablation in found:
            continue
        if held is None:
            began = time.process_time()
            held = held_by_all(recipe)
            making = making or time.process_time() - began
        found[ablation] = trained(ablation, recipe, initial, options.output / ablation, held)
        write_result(options.name, {"settings": {**settings, MAKING: making}, "rows": found})
        print(f"{ablation}: {found[ablation]['steps']} steps, {found[ablation]['minutes']:.1f} min", flush=True)
    keys = ("steps", "minutes", "cpu_s", "first_loss", "last_loss")
    rows = [[name, MEANING[name], row["sha256"][:8], *(round(row[k], 4) for k in keys)] for name, row in found.items()]
    columns = ["", "variant", "weights", "steps", "minutes", "CPU s", "first loss", "last loss"]
    print_table(f"Trained alike, {options.held} strips made in {making:.0f} CPU s", columns, rows)
    given = " ".join(f'--weights "{name}, equal budget={options.output / name / "pinqi.json"}"' for name in found)
    print(f"python -m benchmarks.pinqi --only-weights {given}")
    return 0


if __name__ == "__main__":
    raise SystemExit(in_words(main))
