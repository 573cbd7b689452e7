"""Question: which part of PINQI does what (Fig. 6 of the paper), all variants trained on equally many samples?

Every variant of section III-D is trained from scratch on the same samples in the same order (pretraining of its networks, then end to end),
with the same rates, at 8x, with the eight delays of Fig. 6 and the published start, and judged on held-out slices. Small slices and a
short schedule, so that a CPU can do it: the table states both. The published order belongs to 80 epochs of full slices.

    python -m benchmarks.pinqi_ablation --size 64 --steps 150                        # on a CPU
    python -m benchmarks.pinqi_ablation --size 192 --steps 2000 --batch 16 --device cuda --precision bfloat16

Rows are kept in the result file: a second call with the same settings trains only what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import pinqi_methods
from benchmarks.common import RESULTS, print_table, write_result
from benchmarks.pinqi_methods import Sample
from recon_core.methods.pinqi.model import ABLATIONS
from recon_core.methods.pinqi.weights import load_weights
from recon_core.simulation.brainweb import open_anatomy
from recon_core.simulation.quantitative_brain import ABLATION_TIMES, QuantitativeBrains, SampleRecipe
from recon_core.training.pinqi import RunSettings, run
from recon_core.training.pinqi_tasks import EVALUATION_SEED, PinqiRecipe

ACCELERATION = 8.0
MEANING = {
    "proposed": "as proposed",
    "a": "signal function unknown to the images",
    "b": "no image network",
    "c": "no parameter network",
    "d": "no nonlinear solver",
    "e": "gradient descent for it",
    "f": "networks applied once",
    "g1": "one iteration",
    "g2": "two iterations",
    "h": "separate regression",
    "i": "end-to-end regression",
}
PUBLISHED_NRMSE = {"a": 0.104, "d": 0.108, "e": 0.171, "f": 0.136, "g1": 0.143, "g2": 0.109, "h": 0.166, "i": 0.126}
PUBLISHED_MAE = {
    "proposed": 0.049,
    "a": 0.062,
    "b": 0.060,
    "c": 0.075,
    "d": 0.065,
    "e": 0.098,
    "f": 0.079,
    "g1": 0.085,
    "g2": 0.063,
    "h": 0.101,
    "i": 0.077,
}
"""Figures of T1 (MAE in s) at 8x with `ABLATION_TIMES`, as Fig. 6 is labelled; the nRMSE of the proposed method, b and c cannot be
read in our copy. The text calls a worse than d, the labels say otherwise."""


def recipe_of(ablation: str, options: argparse.Namespace) -> PinqiRecipe:
    """The same for all but for the variant; an epoch is one step."""
    return PinqiRecipe(
        ablation=ablation,
        size=options.size,
        times=tuple(options.times),
        accelerations=(ACCELERATION,),
        batch=options.batch,
        samples_per_epoch=options.batch,
        epochs=float(options.steps),
        pretrain_epochs=float(options.pretraining),
        precision=options.precision,
        network_rate=options.network_rate,
        n_validation=0,
    )


def scored(path: Path, options: argparse.Namespace) -> dict[str, float]:
    """Mean figures of trained weights on held-out slices."""
    trained = load_weights(path, options.device)
    recipe = SampleRecipe(size=options.size, times=tuple(options.times), accelerations=(ACCELERATION,))
    brains = QuantitativeBrains(open_anatomy(None, options.device), recipe, seed=EVALUATION_SEED, device=options.device)
    rows = []
    for index in range(options.samples):
        sample = Sample.of(brains.batch("test", [index]), recipe)
        rows.append(sample.score(pinqi_methods.learned(trained)(sample).t1))
    return {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=list(ABLATIONS), choices=list(ABLATIONS))
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--times", type=float, nargs="+", default=list(ABLATION_TIMES), help="saturation delays, s")
    parser.add_argument("--steps", type=int, default=150, help="end to end, of --batch samples")
    parser.add_argument("--pretraining", type=int, default=150, help="steps of the networks alone")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8, help="held-out slices")
    parser.add_argument("--network-rate", type=float, default=0.001)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="pinqi_ablation")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {key: value for key, value in vars(options).items() if key not in ("rows", "threads", "name")}
    published = {"published_nrmse": PUBLISHED_NRMSE, "published_mae": PUBLISHED_MAE}
    path = RESULTS / f"{options.name}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found: dict[str, Any] = before["rows"] if before.get("settings") == settings else {}
    for ablation in options.rows:
        if ablation in found:
            continue
        with tempfile.TemporaryDirectory() as folder:
            began = time.process_time()
            result, weights = run(recipe_of(ablation, options), folder, RunSettings(options.device, log_every=50))
            figures = scored(weights, options)
            found[ablation] = {**figures, "cpu_s": time.process_time() - began, "skipped_steps": result.skipped}
        print(f"{ablation}: nRMSE {figures['nrmse']:.4f}", flush=True)
        write_result(options.name, {**published, "settings": settings, "rows": found})
    rows = [
        [
            name,
            MEANING[name],
            *(round(row[k], 4) for k in ("nrmse", "mae", "ssim")),
            PUBLISHED_NRMSE.get(name, ""),
            PUBLISHED_MAE.get(name, ""),
            round(row["cpu_s"]),
        ]
        for name, row in sorted(found.items(), key=lambda item: item[1]["nrmse"])
    ]
    columns = ["", "variant", "nRMSE", "MAE s", "SSIM", "published nRMSE", "published MAE", "CPU s"]
    print_table(
        f"T1 at 8x, {len(options.times)} delays, {options.size} x {options.size}, {options.pretraining} + {options.steps} steps each",
        columns,
        rows,
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
