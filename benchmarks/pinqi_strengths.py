"""Question: how should PINQI's lambdas follow the noise of a scan?

Held-out *validation* slices (never the benchmark's test slices) at a few noise levels, 4x and 8x, reconstructed with the weights' lambdas
times factors: nRMSE, MAE and SSIM of T1 for each. What is best at each level is the rule in the weights' JSON (``noise_rule``).

    python -m benchmarks.pinqi_strengths --weights DIR/pinqi.json --factors 1,1,1 3,3,1 1,1,10

Strips of ``columns`` readout positions stand for slices: in hybrid space each position is an acquisition of its own. Every level has
slices of its own. The factor ``rule`` stands for the weights' own. ``--lambda-p`` replaces the learned values first. Scores of earlier
calls with the same weights are kept.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, in_words, print_table, write_result
from benchmarks.pinqi_methods import fitted, held
from recon_core.methods.pinqi.figures import t1_figures, t1_from_rate
from recon_core.methods.pinqi.model import PositiveValues, Strengths
from recon_core.methods.pinqi.noise_rule import acceleration_of
from recon_core.methods.pinqi.weights import TrainedPinqi, load_weights
from recon_core.simulation.brainweb import open_anatomy
from recon_core.simulation.quantitative_brain import BrainBatch, QuantitativeBrains, SampleRecipe
from recon_core.training.pinqi_tasks import EVALUATION_SEED, posed

FIGURES = ("nrmse", "mae", "ssim")
RULE = "rule"
LEAST_BRAIN = 2000  # pixels: strips with less say little


def strips(options: argparse.Namespace) -> list[tuple[str, BrainBatch]]:
    """``noise/acceleration/number`` and the strip, at every level and acceleration; slices differ between levels."""
    found = []
    brains = QuantitativeBrains(open_anatomy(options.brainweb), SampleRecipe(columns=options.columns), seed=EVALUATION_SEED)
    index = options.first
    for noise in options.noise:
        supply = brains.with_recipe(noise=(noise, noise))
        wanted = 0
        while wanted < options.slices:
            batches = [supply.with_recipe(accelerations=(a,)).batch("validation", [index]) for a in options.accelerations]
            if int(batches[0].brain.sum()) >= LEAST_BRAIN:
                found += [(f"{noise:g}/{a:g}/{index}", b) for a, b in zip(options.accelerations, batches, strict=True)]
                wanted += 1
            index += 1
    return found


def factors_of(text: str, trained: TrainedPinqi, batch: BrainBatch) -> Strengths:
    """Three numbers, or the rule of the weights at this noise and acceleration."""
    if text == RULE:
        return trained.noise_rule.at(float(batch.noise_std[0]), acceleration_of(batch.mask))
    return Strengths(*map(float, text.split(",")))


def score(trained: TrainedPinqi, batch: BrainBatch, factors: Sequence[Strengths]) -> list[dict[str, float]]:
    """The figures with each set of factors, and last those of a plain fit of the images it begins with."""
    operator, rhs, start = posed(batch, trained.network.settings.start)
    truth, brain = batch.t1[0].numpy(), batch.brain[0].numpy()
    rows = []
    for factor in factors:
        strengths = replace(factor, noise=float(batch.noise_std[0]))
        with torch.no_grad():
            rate = operator.leave_image(trained.network(operator, rhs, start, strengths).parameters)[0, 2]
        rows.append(t1_figures(held(t1_from_rate(rate.numpy())), truth, brain))
    if start is not None:
        rows.append(t1_figures(fitted(operator.leave_image(start)[0], trained.times), truth, brain))
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument(
        "--factors", nargs="+", default=["1,1,1"], metavar="Y,Q,P", help="on lambda_y, lambda_q, lambda_p; or rule"
    )
    parser.add_argument("--lambda-p", type=float, nargs="+", default=None, help="one per iteration, or one for all")
    parser.add_argument("--noise", type=float, nargs="+", default=[0.003, 0.01, 0.02, 0.04])
    parser.add_argument("--slices", type=int, default=4, help="at each level")
    parser.add_argument("--first", type=int, default=100, help="number of the first validation slice")
    parser.add_argument("--accelerations", type=float, nargs="+", default=[4.0, 8.0])
    parser.add_argument("--columns", type=int, default=64)
    parser.add_argument("--brainweb", default=None, help="folder of BrainWeb heads; else heads drawn from the tissue atlas")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="forget earlier scores")
    parser.add_argument("--name", default="pinqi_strengths", help="of the file in benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    trained = load_weights(options.weights)
    network = trained.network
    if options.lambda_p:
        n = network.settings.n_iterations
        values = options.lambda_p * (n if len(options.lambda_p) == 1 else 1)
        network.lambda_p = PositiveValues(values).requires_grad_(False)
    lambdas = {
        key: [round(float(v), 5) for v in getattr(network, key)()]
        for key in ("lambda_y", "lambda_q", "lambda_p")
        if getattr(network, key) is not None
    }
    settings = {
        "weights": trained.facts.get("sha256"),
        "lambdas": lambdas,
        "noise": options.noise,
        "slices": options.slices,
        "first": options.first,
        "accelerations": options.accelerations,
        "columns": options.columns,
        **({"anatomy": open_anatomy(options.brainweb).name} if options.brainweb else {}),
    }
    path = RESULTS / f"{options.name}.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not options.fresh else {}
    scores: dict[str, dict[str, dict[str, float]]] = kept["scores"] if kept.get("settings") == settings else {}
    todo = [text for text in options.factors if text not in scores]
    for i, (key, batch) in enumerate(strips(options)):
        rows = score(trained, batch, [factors_of(text, trained, batch) for text in todo])
        for text, row in zip([*todo, "start + fit"], rows, strict=False):
            scores.setdefault(text, {})[key] = {name: round(row[name], 5) for name in FIGURES}
        print(f"{i + 1}: {key}", file=sys.stderr, flush=True)
    table = summary(scores)
    rows_shown = [
        [level, text, *(round(table[level][text][name], 4) for name in FIGURES)] for level in table for text in table[level]
    ]
    print_table("T1 on validation strips, by noise and acceleration", ["", "y, q, p", "nRMSE", "MAE s", "SSIM"], rows_shown)
    write_result(options.name, {"settings": settings, "summary": table, "scores": scores})
    return 0


def summary(scores: dict[str, dict[str, dict[str, float]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Means over the strips of each ``noise/acceleration``."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for text, rows in scores.items():
        for key in rows:
            level = key.rsplit("/", 1)[0]
            same = [row for k, row in rows.items() if k.rsplit("/", 1)[0] == level]
            found.setdefault(level, {})[text] = {name: statistics.fmean(r[name] for r in same) for name in FIGURES}
    return found


if __name__ == "__main__":
    raise SystemExit(in_words(main))
