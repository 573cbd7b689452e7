"""What does it save to reconstruct the echoes of one slab in shares, and what does each share repeat?

The slab of `benchmarks.dask_speedup` is received once; then one process computes all of it, and each share of 2, 4 and 8, one after
the other. Processor time, so that a busy machine matters little: the longest share against the whole is the speed-up with a processor
for each, without the transport. The shares together are compared with the whole, bit for bit.

    python -m benchmarks.slab_shares [--runs 3]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.common import print_table, write_result
from benchmarks.dask_speedup import CASES
from gadgets import slice_work
from gadgets.service import Service, ServiceOptions
from gadgets.slice_parts import reconstruct_states, shares
from gadgets.tasks import SliceJob, from_portable, reconstruct_slice
from recon_core.state_images import StateImages, join_states
from recon_core.types import Result
from tests.e2e.scans import ask, in_memory

CASE = CASES["slab"]
PARTS = (2, 4, 8)


def slab() -> SliceJob:
    """The task of the whole slab, as the server makes it, with its readouts."""
    kept: list[SliceJob] = []

    def keep(job: SliceJob) -> Result:
        kept.append(job.packed("cpu"))
        return reconstruct_slice(job)

    options = ServiceOptions(port=0, workers=0, threads=1, rehearse=False, previews=False)
    with mock.patch.object(slice_work, "reconstruct_slice", keep), Service(options) as service:
        ask(service, CASE.chain, in_memory(CASE.kind, **CASE.scan), **CASE.settings)
    return kept[0]


def seconds(compute: Callable[[SliceJob], Any], job: SliceJob, runs: int) -> tuple[float, Any]:
    """The least of some runs, and what the last one gave."""
    best, result = float("inf"), None
    for _ in range(runs):
        begun = time.process_time()
        result = compute(job)
        best = min(best, time.process_time() - begun)
    return best, result


def main(arguments: list[str] | None = None) -> None:
    """Whole and shares, and write ``results/slab_shares.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--name", default="slab_shares", help="of the result's file; empty: none")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = replace(slab(), report_folder=folder)
        whole, expected = seconds(reconstruct_slice, job, chosen.runs)
        rows = [{"shares": 1, "longest_s": round(whole, 2), "all_s": round(whole, 2), "speed_up": 1.0}]
        for n_parts in PARTS:
            cuts = shares(job.sorted_scan.n_states, n_parts)
            measured = [seconds(reconstruct_states, replace(job, states=states), chosen.runs) for states in cuts]
            if not _same([images for _, images in measured], expected):
                raise SystemExit(f"{n_parts} shares give other images")
            longest, total = max(s for s, _ in measured), sum(s for s, _ in measured)
            rows.append(
                {
                    "shares": n_parts,
                    "longest_s": round(longest, 2),
                    "all_s": round(total, 2),
                    "speed_up": round(whole / longest, 2),
                }
            )
    print_table(
        f"{CASE.words} by {CASE.chain}, processor time ({chosen.runs} runs, the best)",
        ["shares", "longest s", "all s", "speed-up"],
        [list(row.values()) for row in rows],
    )
    if chosen.name:
        result = {"scan": CASE.scan, "chain": CASE.chain, "settings": CASE.settings, "runs": chosen.runs, "same_bits": True}
        print(write_result(chosen.name, {**result, "rows": rows}))


def _same(parts: list[StateImages], expected: Result) -> bool:
    joined = join_states([replace(part, result=from_portable(part.result)) for part in parts]).result
    return all(torch.equal(a.data, b.data) for a, b in zip(joined.images, from_portable(expected).images, strict=True))


if __name__ == "__main__":
    main()
