"""``make bench``: one benchmark after the other, each in a process of its own.

Not those that take many hours, a folder of data, weights or a GPU: `pinqi`, `laro`, `soak` and others are called by themselves.
"""

from __future__ import annotations

import subprocess
import sys

NAMES = (
    "gadgetron_reference",
    "ingest",
    "latency",
    "quality",
    "llr_weight",
    "t1_maps",
    "t1_checks",
    "molli_gains",
    "qsm",
    "qsm_server",
    "qsm_surface",
    "qsm_noise",
    "qsm_conditions",
    "prospective",
    "moe_dqinr",
    "moe_dqinr_speed",
    "pinqi_layers",
    "pinqi_speed",
    "pinqi_measured",
    "pinqi_server",
    "scanners",
    "dask_speedup",
    "slab_shares",
    "hostile",
    "kill",
    "cuda_check",
)

if __name__ == "__main__":
    failed = [name for name in NAMES if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]).returncode]
    raise SystemExit(f"failed: {', '.join(failed)}" if failed else 0)
