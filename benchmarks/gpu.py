"""What waits for a GPU without training, in one call: are the images right on CUDA, and how fast are the methods there?

    python -m benchmarks.gpu --minutes 9 --out FOLDER

Needs torch, numpy, scipy and safetensors only. Runs one after the other, each in a process of its own, most important first, and
starts nothing that its time would not cover:

``cuda_check``           every method gives the CPU's images on CUDA
``moe_dqinr_speed``      the published configurations: all 850 iterations in three precisions, parts against their floors
``moe_dqinr``            quality of the presets ``paper`` and ``default`` on CUDA, cine and MOLLI at 6x
``pinqi_layers``         the differentiable layers of PINQI

The results are in ``benchmarks/results`` and, with ``--out``, copied there.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common import RESULTS

RUNS = (
    (60, "benchmarks.cuda_check"),
    (90, "benchmarks.moe_dqinr_speed"),
    (
        150,
        "benchmarks.moe_dqinr --device cuda --warm --accelerations 6 --name moe_dqinr_cuda "
        "--methods llr,grasp_pro,moe_dqinr:paper,moe_dqinr:default",
    ),
    (60, "benchmarks.pinqi_layers --device cuda"),
)
"""Seconds that a run is expected to need at least, and its command."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything together")
    parser.add_argument("--out", type=Path, help="folder that receives the JSON files")
    options = parser.parse_args()
    end = time.monotonic() + 60 * options.minutes
    failed: list[str] = []
    for needed, command in RUNS:
        words = command.split()
        left = end - time.monotonic()
        if left < needed:
            failed.append(f"{words[0]} (not started: {left:.0f} s left)")
            continue
        try:
            code = subprocess.run([sys.executable, "-m", *words], timeout=left).returncode
        except subprocess.TimeoutExpired:
            code = 124
        if code:
            failed.append(f"{words[0]} (exit {code})")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            for path in RESULTS.glob("*.json"):
                shutil.copy2(path, options.out)
    print("failed: " + ", ".join(failed) if failed else "all done")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
