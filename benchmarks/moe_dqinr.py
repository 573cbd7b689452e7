"""Question: how good is MoE-dqINR beside classical and neural methods, on the same data, maps and cores?

Cells (``benchmarks/dynamic_cells.py``): simulated cine and MOLLI, semi-measured inversion recoveries, and, given their folders, the
paper's own data: ``--cmrxrecon`` (Tables 1 and 2) and ``--ocmr`` (Table 3). The comparators are smaller and run for fewer
iterations than in their publications; the tables say how many. BART's weight is chosen by the truth, no one else's is.
``--ablation`` runs the rows of ``ABLATION`` instead of the methods.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import wilcoxon

from benchmarks.cell import Cell
from benchmarks.common import print_table, write_result
from benchmarks.dynamic_cells import ACCELERATIONS, cells, make_cell
from benchmarks.dynamic_methods import BART_WEIGHTS, CLASSICAL, NEURAL, PRESETS, missing, reconstruct
from benchmarks.dynamic_montage import montage
from benchmarks.dynamic_scores import score

OCMR_ACCELERATIONS = (2, 4, 6)
"""Table 3."""

ABLATION: dict[str, tuple[str, dict[str, Any]]] = {
    # Table 4 of the paper
    "MoE + residual": ("moe_dqinr:paper", {"variant": "full"}),
    "residual only": ("moe_dqinr:paper", {"variant": "residual_only"}),
    "MoE, no residual": ("moe_dqinr:paper", {"variant": "no_residual"}),
    # what `default` adds, one taken away at a time
    "default": ("moe_dqinr:default", {}),
    "default, no warm start": ("moe_dqinr:default", {"warm_start": False}),
    "default, no network": ("moe_dqinr:default", {"network": False}),
    "default, no refinement": ("moe_dqinr:default", {"refine": False}),
    "default, nothing held out": ("moe_dqinr:default", {"held_out": 0.0}),
    "default, residual only": ("moe_dqinr:default", {"variant": "residual_only"}),
    "default, no residual": ("moe_dqinr:default", {"variant": "no_residual"}),
    "llr": ("llr", {}),
}
"""Row name to method and the settings that differ."""

QUICK: dict[str, dict[str, Any]] = {
    **{name: {"iterations": 20} for name in (*NEURAL, *PRESETS)},
    # from a random start the images are none before (`LEAST_EXPLAINED`)
    "moe_dqinr:paper": {"iterations": 60},
    "bart_llr": {"weights": (0.002,)},
}

Row = dict[str, Any]
Run = tuple[str, str, dict[str, Any]]


def chosen_cells(options: argparse.Namespace) -> Iterator[Cell]:
    """The cells that the command line asks for."""
    if options.cmrxrecon or options.ocmr:
        yield from dataset_cells(options)
    elif options.matrix:
        for acceleration in options.accelerations or ACCELERATIONS:
            for kind in ("cine", "molli") if options.kind == "all" else (options.kind,):
                yield make_cell(kind, options.first_anatomy, acceleration, 0.01, matrix=(options.matrix, options.matrix))
    elif options.quick:
        for kind in ("cine", "molli"):
            yield make_cell(kind, options.first_anatomy, 4, 0.01, matrix=(64, 72), n_coils=6, frames=8)
    else:
        accelerations = tuple(options.accelerations or ACCELERATIONS)
        yield from cells(
            options.kind,
            full=options.full,
            first_anatomy=options.first_anatomy,
            accelerations=accelerations,
            estimated_maps=options.maps == "espirit",
        )


def dataset_cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Tables 1 and 2 (CMRxRecon) and 3 (OCMR)."""
    from benchmarks import datasets

    def undersampled(scans: Iterator[datasets.FullScan], accelerations: Sequence[float]) -> Iterator[Cell]:
        for scan in scans:
            for acceleration in options.accelerations or accelerations:
                yield datasets.to_cell(scan, acceleration)

    if options.cmrxrecon:
        for kind in ("cine", "molli") if options.kind == "all" else (options.kind,):
            if options.kind == "all" and not any(options.cmrxrecon.rglob(datasets.FILES[kind])):
                print(f"no {datasets.FILES[kind]} in the folder: no {kind} cells", file=sys.stderr)
                continue
            scans = datasets.cmrxrecon_scans(options.cmrxrecon, kind, most=options.subjects, slices=options.slices)
            yield from undersampled(scans, ACCELERATIONS)
    if options.ocmr:
        yield from undersampled(datasets.ocmr_scans(options.ocmr, most=options.subjects), OCMR_ACCELERATIONS)


def chosen_runs(options: argparse.Namespace) -> list[Run]:
    """(row name, method, overrides), without what cannot run here, which is said on the terminal."""
    iterations = dict(pair.rsplit("=", 1) for pair in options.iterations)
    runs: list[Run] = []
    if options.ablation:
        wanted = [(name, method, values) for name, (method, values) in ABLATION.items() if options.rows in name]
    else:
        names = options.methods.split(",") if options.methods else (*CLASSICAL, *NEURAL, *PRESETS)
        wanted = [(name, name, {}) for name in names]
    for name, method, values in wanted:
        overrides = {**(QUICK.get(method, {}) if options.quick else {}), **values}
        if options.precision and method.startswith("moe_dqinr"):
            overrides["precision"] = options.precision
        if method in iterations:
            overrides["iterations"] = int(iterations[method])
        reason = missing(method, overrides)
        if method == "moe_dqinr:paper" and options.device == "cpu" and not options.methods and "iterations" not in overrides:
            reason = reason or f"hours per cell on a CPU; name it in --methods, or --iterations {method}=N, or --device cuda"
        if reason:
            print(f"left out: {name}: {reason}", file=sys.stderr)
        else:
            runs.append((name, method, overrides))
    return runs


def run_cell(
    cell: Cell, runs: list[Run], options: argparse.Namespace, failed: list[str]
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Every method on one cell. One that fails is added to ``failed`` in words and left out of the cell."""
    rows: list[Row] = []
    answers = {}
    for name, method, overrides in runs:
        try:
            answer = reconstruct(method, cell, overrides, device=options.device, threads=options.threads, warm=options.warm)
        except Exception as error:  # one failure must not lose hours of other results
            failed.append(f"{cell.name}: {name}: {type(error).__name__}: {error}")
            print(f"FAILED {failed[-1]}", file=sys.stderr, flush=True)
            continue
        figures = score(cell, answer.images, answer.seconds, answer.iterations)
        about = {"cell": cell.name, "kind": cell.kind, "origin": cell.origin, "acceleration": cell.acceleration}
        rows.append({**about, "method": name, "note": answer.note, **figures.as_dict()})
        answers[name] = answer.images
        text = f"{cell.name}: {name} {figures.psnr:.2f} dB, region {figures.roi_psnr:.2f} dB, {figures.seconds:.1f} s"
        print(text, file=sys.stderr, flush=True)
    return rows, answers


CELL_COLUMNS = ("psnr", "ssim", "nrmse", "hfen", "roi_psnr", "roi_ssim", "roi_nrmse", "roi_hfen", "t1_nmse", "t1_percent")
SHOWN = ("PSNR", "SSIM", "nRMSE", "HFEN", "roi PSNR", "roi SSIM", "roi nRMSE", "roi HFEN", "T1 NMSE", "T1 dev %")


def rounded(value: float | None, digits: int = 4) -> float | str:
    return "" if value is None else round(value, digits)


def cell_table(cell: Cell, rows: list[Row]) -> None:
    """All figures of one cell."""
    shape = "x".join(str(n) for n in cell.images.shape[2:])
    title = (
        f"{cell.name}: {cell.origin}, {len(cell.images)} states, {len(cell.coil_maps)} coils, {shape}, {cell.maps_used} maps"
    )
    table = [
        [
            row["method"],
            *(rounded(row[key], 2 if "psnr" in key or "percent" in key else 4) for key in CELL_COLUMNS),
            rounded(row["residual"], 2),
            row["rank"],
            row["iterations"],
            round(row["seconds"], 2),
            row["note"],
        ]
        for row in rows
    ]
    columns = ["method", *SHOWN, "residual/noise", "rank", "its", "s", "settings"]
    print_table(f"{title}, effective R {cell.effective_acceleration:.2f}", columns, table)


Group = Callable[[Row], str]


def grouped(rows: list[Row], group: Group) -> dict[str, dict[str, list[Row]]]:
    """Group to method to rows."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(group(row), {}).setdefault(row["method"], []).append(row)
    return found


def by_kind_and_acceleration(row: Row) -> str:
    return f"{row['kind']} {row['acceleration']:g}x ({row['origin']})"


def mean_of(rows: list[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.fmean(values) if values else None


def significance(rows: list[Row], reference: list[Row]) -> float | str:
    """p of the paired Wilcoxon test of PSNR against a reference method (as in the paper's tables), from 6 cells on."""
    ours = {row["cell"]: row["psnr"] for row in reference}
    pairs = [(row["psnr"], ours[row["cell"]]) for row in rows if row["cell"] in ours]
    if rows is reference or len(pairs) < 6 or all(a == b for a, b in pairs):
        return ""
    return round(float(wilcoxon(*zip(*pairs, strict=True)).pvalue), 4)


def mean_tables(rows: list[Row], reference: str) -> dict[str, Any]:
    """Means over cells: for each kind and acceleration, and over all."""
    document: dict[str, Any] = {}
    groups = {**grouped(rows, by_kind_and_acceleration), **grouped(rows, lambda row: f"all {row['kind']}")}
    groups.update(grouped(rows, lambda row: "all cells"))
    for group, methods in groups.items():
        table = []
        for method, part in methods.items():
            keys = (*CELL_COLUMNS, "seconds")
            means = {key: mean_of(part, key) for key in keys}
            document.setdefault(group, {})[method] = {"cells": len(part), **means}
            values = [rounded(means[key], 2 if "psnr" in key or key in ("t1_percent", "seconds") else 4) for key in keys]
            table.append([method, len(part), *values, significance(part, methods.get(reference, []))])
        print_table(f"Means: {group}", ["method", "cells", *SHOWN, "s", f"p against {reference}"], table)
    return document


def judged(runs: list[Run]) -> list[str]:
    """The rows that are this project's method, in any form."""
    return [name for name, method, _ in runs if method.startswith("moe_dqinr")]


def verdict(rows: list[Row], ours: str, figure: str = "psnr") -> dict[str, Any]:
    """``ours`` against the best classical method of each group (the one with the highest mean) and, cell by cell, against ``llr``.

    ``figure`` is a score in dB: ``psnr`` (whole frame) or ``roi_psnr``.
    """
    document: dict[str, Any] = {"gain_over_best_classical_db": {}}
    text = f"{ours}, {'region' if figure.startswith('roi') else 'whole frame'}"
    for group, methods in grouped(rows, by_kind_and_acceleration).items():
        classical = {name: mean_of(methods[name], figure) for name in CLASSICAL if name in methods}
        if ours not in methods or not classical:
            continue
        best = max(classical, key=lambda name: classical[name] or 0.0)
        gain = (mean_of(methods[ours], figure) or 0.0) - (classical[best] or 0.0)
        document["gain_over_best_classical_db"][group] = {"best": best, "gain_db": round(gain, 3)}
        print(f"{text}, {group}: {gain:+.2f} dB against {best}, the best classical method")
    found = {name: {row["cell"]: row[figure] for row in rows if row["method"] == name} for name in (ours, "llr")}
    gains = {cell: found[ours][cell] - found["llr"][cell] for cell in found[ours] if cell in found["llr"]}
    if gains:
        worst, mean = min(gains, key=gains.__getitem__), statistics.fmean(gains.values())
        document["worst_cell_against_llr"] = {"cell": worst, "gain_db": round(gains[worst], 3)}
        document["mean_gain_over_llr_db"] = round(mean, 3)
        print(f"{text}: worst cell against llr {gains[worst]:+.2f} dB ({worst}); mean {mean:+.2f} dB")
    return document


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", default="", help=f"separated by commas; all: {','.join((*CLASSICAL, *NEURAL, *PRESETS))}"
    )
    parser.add_argument("--kind", choices=("cine", "molli", "semi-measured", "all"), default="all")
    parser.add_argument("--full", action="store_true", help="every acceleration, anatomy, noise level and coil array")
    parser.add_argument("--quick", action="store_true", help="two tiny cells, few iterations: does everything run?")
    parser.add_argument("--ablation", action="store_true", help="the paper's Table 4 and what `default` adds")
    parser.add_argument("--rows", default="", help="of the ablation: those whose name has this text")
    parser.add_argument("--most", type=int, default=0, help="stop after so many cells; 0 runs all")
    parser.add_argument("--accelerations", type=float, nargs="+")
    parser.add_argument("--matrix", type=int, default=0, help="one small cine and one MOLLI cell an acceleration, N x N")
    parser.add_argument("--precision", default="", help="of moe_dqinr's networks, e.g. bfloat16; empty: the preset's")
    parser.add_argument("--first-anatomy", type=int, default=100, help="seed of the torsos; defaults were tuned on 0 to 3")
    parser.add_argument("--maps", choices=("true", "espirit"), default="true", help="coil maps that every method gets")
    parser.add_argument("--cmrxrecon", type=Path, help="folder of CMRxRecon: Tables 1 and 2")
    parser.add_argument("--ocmr", type=Path, help="folder of OCMR: Table 3")
    parser.add_argument("--subjects", type=int, default=0, help="of a dataset; 0 is all")
    parser.add_argument("--slices", type=int, default=1, help="of each CMRxRecon subject")
    parser.add_argument("--iterations", nargs="*", default=[], metavar="METHOD=N", help="e.g. fmlp=2000 moe_dqinr:paper=100")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "2")))
    parser.add_argument("--warm", action="store_true", help="time a second run of each method")
    parser.add_argument("--montage", type=Path, help="folder for a picture of the first cell of each kind")
    parser.add_argument("--name", default="", help="of the JSON in benchmarks/results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    runs = chosen_runs(options)
    rows: list[Row] = []
    failed: list[str] = []
    pictured: set[tuple[str, str]] = set()
    for cell in islice(chosen_cells(options), options.most or None):
        found, answers = run_cell(cell, runs, options, failed)
        rows += found
        cell_table(cell, found)
        if options.montage and (cell.kind, cell.origin) not in pictured:
            pictured.add((cell.kind, cell.origin))
            montage(cell, answers, options.montage / f"{cell.kind}-{cell.origin}.png")
    reference = "default" if options.ablation else "moe_dqinr:default"
    document: Mapping[str, Any] = {
        "settings": {key: str(value) for key, value in vars(options).items()},
        "bart_weights": BART_WEIGHTS,
        "cells": rows,
        "failed": failed,
        "means": mean_tables(rows, reference),
        "verdict": {name: {key: verdict(rows, name, key) for key in ("psnr", "roi_psnr")} for name in judged(runs)},
    }
    name = options.name or ("moe_dqinr_ablation" if options.ablation else "moe_dqinr") + ("_quick" if options.quick else "")
    print(f"written: {write_result(name, dict(document)).name}")
    for text in failed:
        print(f"failed: {text}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
