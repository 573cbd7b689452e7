"""Which threshold should ``llr`` have by default? Errors over weights, on three families of series and two noise levels.

The chosen default (weight 1) is a compromise between phantoms, which like it higher, and a measured series, which likes it lower.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks.common import print_table, write_result
from benchmarks.quality import KIDNEY, make, to_core
from recon_core.methods import get_method
from recon_core.metrics import nrmse
from recon_core.types import Report

WEIGHTS = (0.4, 0.7, 1.0, 1.4, 2.0)
KINDS = ("inversion_recovery", "cine", "kidney (semi-measured)")
SEEDS = (100, 101)


def main() -> None:
    """Scan, print and record."""
    torch.set_num_threads(1)
    method = get_method("llr")
    rows: list[list[object]] = []
    for noise in (0.01, 0.03):
        for kind in KINDS:
            for acceleration in (4, 8):
                errors = np.zeros((len(SEEDS), len(WEIGHTS)))
                for i, seed in enumerate(SEEDS):
                    data = make(kind, acceleration, noise, seed, KIDNEY)
                    kspace, scan = to_core(data, data.coil_maps)
                    for j, weight in enumerate(WEIGHTS):
                        result = method.reconstruct(kspace, scan, method.Settings(weight=weight), Report())
                        errors[i, j] = nrmse(result.images[0].data.numpy(), data.images, data.support)
                rows.append([f"{kind} {acceleration}x, noise {noise:g}", *(round(float(e), 4) for e in errors.mean(axis=0))])
    columns = ["series", *(f"weight {w:g}" for w in WEIGHTS)]
    print_table("nRMSE of llr over its weight", columns, rows)
    write_result("llr_weight", {"columns": columns, "rows": rows, "seeds": SEEDS})


if __name__ == "__main__":
    main()
