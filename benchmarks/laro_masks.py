"""Which masks of one matrix are better: ``python -m benchmarks.laro_masks --masks shipped density learned=FOLDER``.

Several draws of every mask's probabilities on the same held-out heads, with the same noise; every method reconstructs all of them. Heads
are LARGE ones of `benchmarks.laro` with a part of their readout, echoes cut to the first. Masks: ``shipped``, the 206 x 80 ones of this
package; ``density``, the hand-made density with a draw for each echo; ``NAME=FOLDER``, what a training left (``laro_mask_r8_spo2.h5``).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import in_words, print_table, write_result
from benchmarks.laro import LARGE, TEST
from benchmarks.laro_cases import WEIGHTS, acquire, acs_block, available, held_out
from benchmarks.laro_scores import maps_of, scores
from recon_core.sampling.learned import draw_mask, multilevel_density, samples_for
from recon_core.sampling.mask_files import read_mask
from recon_core.sampling.masks import radius
from recon_core.simulation.multi_echo_brain import BrainScan
from recon_core.simulation.scan_folder import cut_readout
from recon_core.training.laro import mask_name

SHIPPED, DENSITY = "shipped", "density"
FIGURES = ("magnitude PSNR", "r2star PSNR", "local field PSNR", "QSM RMSE")
"""Those of `scores` that are compared."""

RINGS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.5)
"""Outer radii of the rings of `profiles`, 1 at the edge of k-space."""

Row = dict[str, Any]


def probabilities(source: str, kind: str, shape: tuple[int, int], n_echoes: int) -> NDArray[np.float64]:
    """``(echo or 1, k2, k1)`` of ``R/SPO`` from one of the sources above; of one pattern for all echoes one."""
    acceleration, spo = kind.split("/")
    if source == DENSITY:
        n_samples = samples_for(shape, float(acceleration))
        density = multilevel_density(shape, n_samples, acs_block(shape, n_samples))[None]
        return density if spo == "1" else np.repeat(density, n_echoes, axis=0)
    path = WEIGHTS / mask_name(kind).replace(".h5", "_206x80.h5") if source == SHIPPED else Path(source) / mask_name(kind)
    found = read_mask(path).probability
    assert found is not None and found.shape[1:] == shape and len(found) >= n_echoes
    return found[: 1 if spo == "1" else n_echoes].astype(np.float64)


def figures_of(
    scan: BrainScan, kind: str, sources: Mapping[str, str], methods: Sequence[str], draws: Sequence[int], head: int
) -> list[Row]:
    """A row per mask, draw and method."""
    truth = maps_of(scan.images, scan)
    n_echoes, *grid, _ = scan.images.shape
    shape = (grid[0], grid[1])
    acceleration, spo = kind.split("/")
    n_samples = samples_for(shape, float(acceleration))
    known = available(sorted(WEIGHTS.glob("laro*.json")))
    rows = []
    for seed in draws:
        for name, source in sources.items():
            drawn = draw_mask(probabilities(source, kind, shape, n_echoes), n_samples, seed, acs_block(shape, n_samples))
            mask = np.array(np.broadcast_to(drawn, (n_echoes, *shape)))
            case = acquire(scan, mask, float(acceleration), int(spo), seed)
            for method in methods:
                images, cpu = known[method](case)
                found = scores(maps_of(images, scan), truth, scan)
                row = {"R/SPO": kind, "head": head, "draw": seed, "masks": name, "method": method, **found, "CPU s": cpu}
                print(kind, head, seed, name, method, {k: round(v, 3) for k, v in found.items()}, flush=True)
                rows.append(row)
    return rows


def compared(rows: Sequence[Row], first: str) -> list[Row]:
    """Means, and the mean difference to the masks called ``first`` with its standard error over heads and draws."""
    summary = []
    for kind, masks, method in dict.fromkeys((r["R/SPO"], r["masks"], r["method"]) for r in rows):
        cases = {
            name: {(r["head"], r["draw"]): r for r in rows if (r["R/SPO"], r["masks"], r["method"]) == (kind, name, method)}
            for name in (masks, first)
        }
        row: Row = {"R/SPO": kind, "masks": masks, "method": method, "cases": len(cases[masks])}
        for figure in FIGURES:
            own = np.array([r[figure] for r in cases[masks].values()])
            difference = own - np.array([cases[first][key][figure] for key in cases[masks]])
            spread = float(difference.std(ddof=1)) if len(own) > 1 else 0.0
            row |= {figure: float(own.mean()), f"{figure}, difference": float(difference.mean())}
            row[f"{figure}, its error"] = spread / len(own) ** 0.5
        summary.append(row)
    return summary


def profiles(kinds: Sequence[str], sources: Mapping[str, str], shape: tuple[int, int], n_echoes: int) -> list[Row]:
    """Mean probability of every ring of k-space, and how far all are from the first masks' (mean absolute difference)."""
    ring = np.digitize(radius(shape), RINGS[:-1])
    rows = []
    for kind in kinds:
        found = {name: probabilities(source, kind, shape, n_echoes) for name, source in sources.items()}
        first = next(iter(found.values()))
        for name, p in found.items():
            means = [float(p[:, ring == i].mean()) for i in range(len(RINGS))]
            rows.append({"R/SPO": kind, "masks": name, "mean change": float(np.abs(p - first).mean()), "rings": means})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--masks", nargs="+", default=[SHIPPED, DENSITY], help="the first is what the others are compared with"
    )
    parser.add_argument("--kinds", nargs="+", default=["8/2"], help="R/SPO")
    parser.add_argument("--methods", default="llr,refined,laro_206x80", help="comma separated")
    parser.add_argument("--first", type=int, default=3, help="number of the first validation head")
    parser.add_argument("--scans", type=int, default=2, help="validation heads")
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 2], help="seeds of masks and noise")
    parser.add_argument("--planes", type=int, default=16, help="readout positions of a head")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="laro_masks", help="of the JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    sources = {word.partition("=")[0]: word.partition("=")[2] or word for word in options.masks}
    recipe = replace(TEST, **LARGE)
    shape = (recipe.matrix[0], recipe.matrix[1])
    result: Row = {"test": str(recipe), "planes": options.planes, "ring radii": RINGS}
    result["profiles"] = profiles(options.kinds, sources, shape, recipe.n_echoes)
    rows: list[Row] = []
    for head in range(options.first, options.first + options.scans):
        scan = cut_readout(held_out(recipe, 1, "validation", head)[0], options.planes, head)
        for kind in options.kinds:
            rows += figures_of(scan, kind, sources, options.methods.split(","), options.draws, head)
            summary = compared(rows, next(iter(sources)))
            write_result(options.name, {**result, "summary": summary, "rows": rows})
    columns = list(summary[0])
    print_table("Masks on validation heads", columns, [[row[c] for c in columns] for row in summary])
    return 0


if __name__ == "__main__":
    raise SystemExit(in_words(main))
