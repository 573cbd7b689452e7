"""Question: how good are PINQI's T1 maps on anatomies it has never seen, beside what a site would use otherwise?

Held-out synthetic slices (split ``test``, a seed of their own) with the published recipe at 4x, 6x and 8x: nRMSE, mean absolute
error and SSIM of T1 inside the brain; inside all tissue, scalp included, where the published method's code judges; and over the
whole image with zeros outside that, which is how that code takes its means. The same slices, coils, noise levels and delays at
every acceleration. ``--brainweb FOLDER``: slices of three heads (of 20) as published, nothing added.

    python -m benchmarks.pinqi --weights pinqi=DIR/pinqi.json --weights h=DIR/h/pinqi.json --samples 8

Beside them the same slices *fully sampled* with the same noise and a plain fit ("1x"): what noise alone leaves of the truth.

``--switched-off a h`` adds what the weights give when parts of them are not used; `benchmarks.pinqi_ablation` trains the variants.

``--against METHOD`` adds a table of differences from one row, slice by slice; with ``--samples 0`` from kept scores alone.

Scores are kept per sample in ``results/pinqi.json`` as soon as they are known: a second call with the same recipe only adds what is
missing (new weights, more samples, what an interrupted call left). ``--fresh`` starts over.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from benchmarks import bart, pinqi_methods
from benchmarks.common import RESULTS, in_words, print_table, write_result
from benchmarks.pinqi_methods import IMAGE, TISSUE, Answer, Sample
from recon_core.methods.pinqi.weights import load_weights
from recon_core.simulation.brainweb import open_anatomy
from recon_core.simulation.quantitative_brain import SATURATION_TIMES, QuantitativeBrains, SampleRecipe
from recon_core.training.pinqi_tasks import EVALUATION_SEED

Scores = dict[str, dict[str, dict[str, dict[str, float]]]]
"""method, acceleration, sample: figures."""

FIGURES = ("nrmse", "mae", "ssim")
GOALS = {4.0: (0.073, 0.042, 0.961), 8.0: (0.10, 0.05, 0.939)}
"""nRMSE, MAE in s and SSIM that the published method reaches."""

FULLY_SAMPLED = "fully sampled + fit"
REFINED = "moe_dqinr without its network + fit"
"""`llr` refined by a collaborative filter in turn with data consistency: the best images that need no training."""


def methods_for(options: argparse.Namespace) -> dict[str, Callable[[Sample], Answer]]:
    """Every method that was asked for, by the name in the table."""
    found: dict[str, Callable[[Sample], Answer]] = {}
    if not options.only_weights:
        found |= {"zero-filled + fit": pinqi_methods.zero_filled}
        found |= {f"{name} + fit": pinqi_methods.classical(name) for name in ("cg_sense", "llr")}
        found |= {REFINED: pinqi_methods.classical("moe_dqinr", network=False)}
        if options.bart and bart.available():
            found["BART LLR + fit"] = pinqi_methods.bart_low_rank(options.bart_iterations, options.threads)
        if options.moba and bart.available():
            found["BART moba"] = pinqi_methods.bart_moba(options.moba_iterations, options.threads, options.moba_weights)
    for label, path in named_weights(options.weights).items():
        trained = load_weights(path, options.device)
        digest = str(trained.facts.get("sha256", ""))[:8]
        found[f"{label} ({digest})"] = pinqi_methods.learned(trained)
        for ablation in options.switched_off:
            without = pinqi_methods.switched_off(trained, ablation)
            found[f"{label} ({digest}), variant {ablation}, not retrained"] = pinqi_methods.learned(without)
    return found


def methods_at(
    acceleration: float, methods: dict[str, Callable[[Sample], Answer]]
) -> Mapping[str, Callable[[Sample], Answer]]:
    """Nothing is to be unfolded where every line was measured: combining the coils is all, and the same for all methods."""
    return {FULLY_SAMPLED: pinqi_methods.zero_filled} if acceleration == 1 else methods


def named_weights(given: list[str]) -> dict[str, Path]:
    """``LABEL=FILE`` or ``FILE``; the label is then the ablation that the file was trained as."""
    found = {}
    for text in given:
        label, _, path = text.rpartition("=")
        facts = json.loads(Path(path).read_text(encoding="utf-8"))
        found[label or str(facts.get("recipe", {}).get("ablation", Path(path).stem))] = Path(path)
    return found


def described(path: Path) -> dict[str, Any]:
    """What a reader of the table has to know of trained weights: no paths."""
    facts = json.loads(path.read_text(encoding="utf-8"))
    kept = (
        "sha256",
        "minutes",
        "device",
        "anatomy",
        "finished",
        "steps",
        "steps_done",
        "samples_seen",
        "commit",
        "validation",
        "recipe",
        "network",
        "noise_rule",
    )
    return {key: facts[key] for key in kept if key in facts}


def summary(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Means over samples, and the standard deviation of nRMSE."""
    rows = list(scores.values())
    elsewhere = [which + key for which in (TISSUE, IMAGE) for key in FIGURES]
    known = [*FIGURES, *(key for key in elsewhere if all(key in row for row in rows)), "cpu_s", "wall_s"]
    means = {key: statistics.fmean(row[key] for row in rows) for key in known}
    return {
        **means,
        "nrmse_sd": statistics.stdev(row["nrmse"] for row in rows) if len(rows) > 1 else 0.0,
        "samples": len(rows),
    }


def evaluate(options: argparse.Namespace, scores: Scores, keep: Callable[[], object]) -> dict[str, NDArray[Any]]:
    """Add what is missing to ``scores``, and ``keep`` them; the first sample's maps at the highest acceleration, for the picture."""
    recipe = SampleRecipe(size=options.size, times=tuple(options.times))
    brains = QuantitativeBrains(
        open_anatomy(options.brainweb, options.device), recipe, seed=EVALUATION_SEED, device=options.device
    )
    methods = methods_for(options)
    shown: dict[str, NDArray[Any]] = {}
    for acceleration in options.accelerations:
        supply = brains.with_recipe(accelerations=(acceleration,))
        for index in range(options.first, options.first + options.samples):
            sample = Sample.of(supply.batch("test", [index]), supply.recipe)
            picture = options.picture is not None and (acceleration, index) == (max(options.accelerations), options.first)
            if picture:
                shown |= {"truth": sample.t1, "brain": sample.brain}
            for name, method in methods_at(acceleration, methods).items():
                kept = scores.setdefault(name, {}).setdefault(f"{acceleration:g}", {})
                if str(index) in kept and not picture:
                    continue
                answer = method(sample)
                kept[str(index)] = {**sample.score(answer.t1), "cpu_s": answer.cpu_s, "wall_s": answer.wall_s}
                if answer.weight is not None:
                    kept[str(index)]["weight"] = answer.weight
                keep()
                if picture:
                    shown[name] = answer.t1
                print(
                    f"{acceleration:g}x sample {index} {name}: nRMSE {kept[str(index)]['nrmse']:.4f}",
                    file=sys.stderr,
                    flush=True,
                )
    return shown


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """What old scores must agree with to be kept."""
    return {
        "size": options.size,
        "times": list(options.times),
        "anatomy": open_anatomy(options.brainweb).name,
        "seed": EVALUATION_SEED,
        "t1_range": list(pinqi_methods.T1_RANGE),
        "bart_iterations": options.bart_iterations,
        "bart_weights": list(pinqi_methods.BART_WEIGHTS),
        "moba_iterations": options.moba_iterations,
    }


def kept_scores(options: argparse.Namespace, settings: dict[str, Any]) -> tuple[Scores, dict[str, Any]]:
    """Scores and descriptions of weights of an earlier call with the same recipe."""
    path = RESULTS / f"{options.name}.json"
    if options.fresh or not path.is_file():
        return {}, {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return (document["scores"], document["weights"]) if document.get("settings") == settings else ({}, {})


def summaries(scores: Scores) -> dict[str, dict[str, dict[str, float]]]:
    """``summary`` by acceleration and method."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, by_acceleration in scores.items():
        for key, own in by_acceleration.items():
            if own:
                table.setdefault(key, {})[name] = summary(own)
    return {key: table[key] for key in sorted(table, key=float)}


def report(table: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print the table, with the goals."""
    rows: list[list[Any]] = []
    for key, methods in table.items():
        for name, s in methods.items():
            figures = [round(s[k], 4) for k in ("nrmse", "nrmse_sd", "mae", "ssim")]
            elsewhere = [", ".join(f"{s[w + k]:.4f}" for k in FIGURES if w + k in s) for w in (TISSUE, IMAGE)]
            rows.append([f"{key}x", name, *figures, *elsewhere, round(s["cpu_s"], 2), int(s["samples"])])
        if float(key) in GOALS:
            nrmse, mae, ssim = GOALS[float(key)]
            goal = f"{nrmse:.4f}, {mae:.4f}, {ssim:.4f}"
            rows.append([f"{key}x", "(goal)", nrmse, "", mae, ssim, goal, goal, "", ""])
    columns = ["", "method", "nRMSE", "SD", "MAE s", "SSIM", "inside all tissue", "over the whole image", "CPU s", "samples"]
    print_table("T1 inside the brain, held-out synthetic anatomies, means", columns, rows)


def paired(scores: Scores, against: str) -> list[list[Any]]:
    """Rows of a table: every method minus one, mean and SD over the slices that both have, and on how many of them it is better."""
    rows: list[list[Any]] = []
    for key in sorted(scores[against], key=float):
        for name, by_acceleration in scores.items():
            own, other = by_acceleration.get(key, {}), scores[against][key]
            common = sorted(own.keys() & other.keys(), key=int)
            if name == against or len(common) < 2:
                continue
            minus = {k: [own[i][k] - other[i][k] for i in common] for k in FIGURES}
            means = [round(statistics.fmean(minus[k]), 4) for k in minus]
            better = [sum(d * (1 if k == "ssim" else -1) > 0 for d in minus[k]) for k in minus]
            counts = ", ".join(str(n) for n in better) + f" of {len(common)}"
            rows.append([f"{key}x", name, means[0], round(statistics.stdev(minus["nrmse"]), 4), *means[1:], counts])
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", action="append", default=[], metavar="[LABEL=]FILE", help="trained weights (JSON); repeat"
    )
    parser.add_argument(
        "--switched-off",
        nargs="+",
        default=[],
        choices=pinqi_methods.SWITCHED_OFF,
        help="also the weights without a part of theirs, as in the variants of section III-D, but not trained to do without it",
    )
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first slice: others than those that choices were made on"
    )
    parser.add_argument("--accelerations", type=float, nargs="+", default=[1.0, 4.0, 6.0, 8.0])
    parser.add_argument("--size", type=int, default=192)
    parser.add_argument("--times", type=float, nargs="+", default=list(SATURATION_TIMES), help="s")
    parser.add_argument("--brainweb", default=None, help="folder of BrainWeb heads; else heads drawn from the tissue atlas")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-weights", action="store_true", help="no comparators")
    parser.add_argument("--bart", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bart-iterations", type=int, default=100)
    parser.add_argument("--moba", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--moba-iterations", type=int, default=12)
    parser.add_argument(
        "--moba-weights",
        type=float,
        nargs="+",
        default=list(pinqi_methods.MOBA_WEIGHTS),
        help="minutes each; the best counts",
    )
    parser.add_argument("--against", default="", metavar="METHOD", help="as the table names it")
    parser.add_argument("--picture", type=Path, default=None, help="PNG of the first sample at the highest acceleration")
    parser.add_argument("--fresh", action="store_true", help="forget earlier scores")
    parser.add_argument("--name", default="pinqi", help="of the file in benchmarks/results")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = settings_of(options)
    scores, weights = kept_scores(options, settings)
    weights |= {label: described(path) for label, path in named_weights(options.weights).items()}

    def keep() -> None:
        known = {"settings": settings, "bart": bart.available(), "weights": weights}
        write_result(options.name, {**known, "summary": summaries(scores), "scores": scores})

    shown = evaluate(options, scores, keep)
    report(summaries(scores))
    if options.against:
        if options.against not in scores:
            raise SystemExit(f"no scores of {options.against!r}; there are those of {', '.join(scores)}")
        columns = ["", "method", "nRMSE", "SD", "MAE s", "SSIM", "better slices: nRMSE, MAE, SSIM"]
        print_table(f"Minus {options.against}", columns, paired(scores, options.against))
    keep()
    if options.picture is not None:
        from benchmarks.pinqi_montage import montage

        montage(shown, options.picture, f"{max(options.accelerations):g}x")
    return 0


if __name__ == "__main__":
    raise SystemExit(in_words(main))
