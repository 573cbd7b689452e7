"""Slice by slice from the recorded scores of `benchmarks.pinqi`: on how many slices is one method better than another, and by how much?

``python -m benchmarks.pinqi_pairs pinqi_fresh "proposed (6d0b89a4)"`` compares with all others; a third name with that one alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.common import RESULTS, print_table

Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Acceleration, slice, figure."""

COLUMNS = ("acceleration", "beside", "slices", "better in nRMSE", "MAE", "SSIM", "nRMSE minus its nRMSE", "SD")
FIGURES = (("nrmse", 1.0), ("mae", 1.0), ("ssim", -1.0))


def pairs(mine: Scores, other: Scores) -> list[tuple[str, int, list[int], float, float]]:
    """Per acceleration that both have: slices, on how many ``mine`` is better in each figure, mean and sample SD of nRMSE's difference."""
    rows = []
    for acceleration in sorted(set(mine) & set(other), key=float):
        a, b = mine[acceleration], other[acceleration]
        slices = sorted(set(a) & set(b), key=int)
        if not slices:
            continue
        better = [sum(sign * a[s][key] < sign * b[s][key] for s in slices) for key, sign in FIGURES]
        differences = np.array([a[s]["nrmse"] - b[s]["nrmse"] for s in slices])
        rows.append(
            (acceleration, len(slices), better, float(differences.mean()), float(differences.std(ddof=len(slices) > 1)))
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", help="name of the JSON in benchmarks/results")
    parser.add_argument("method", help="its rows are compared")
    parser.add_argument("beside", nargs="?", help="with this one's; with all if left out")
    options = parser.parse_args(arguments)
    scores: dict[str, Scores] = json.loads((RESULTS / f"{options.result}.json").read_text())["scores"]
    if wrong := [n for n in (options.method, options.beside) if n and n not in scores]:
        parser.error(f"{options.result} has no {wrong[0]!r}; it has: " + ", ".join(map(repr, scores)))
    others = [options.beside] if options.beside else [n for n in scores if n != options.method]
    rows = [
        (acceleration, other, n, *better, mean, sd)
        for other in others
        for acceleration, n, better, mean, sd in pairs(scores[options.method], scores[other])
    ]
    print_table(f"{options.result}: {options.method}", COLUMNS, rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
