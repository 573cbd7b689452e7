"""Question 1: does the chain ``fourier`` equal what a real Gadgetron 4.7.2 answered for the same raw data?

The raw file goes through a running server by a replay client of its own; the images are compared with those that the real
``gadgetron_ismrmrd_client`` received from the real Gadgetron's ``default.xml``. Target: 1e-5 relative.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import h5py
import numpy as np

from benchmarks.common import print_table, write_result
from gadgets.replay import replay
from gadgets.service import Service, ServiceOptions

DATA = Path(__file__).parent.parent / "tests" / "data" / "gadgetron-reference"
TARGET = 1e-5


def main() -> None:
    """Replay, compare, print and record."""
    with h5py.File(DATA / "gadgetron_default_images.h5") as file:
        theirs = file["images/image_0/data"][:]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.h5"
        with Service(ServiceOptions(port=0, workers=1)) as service:
            result = replay(DATA / "shepp_logan_raw.h5", port=service.port, config="fourier", out=out)
        with h5py.File(out) as file:
            group = file[result.group]
            ours = np.concatenate([group[name]["data"][:] for name in sorted(group)])
    rows, worst = [], 0.0
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        error = float(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(b))
        largest = float(np.abs(a.astype(float) - b).max() / np.abs(b).max())
        worst = max(worst, error)
        rows.append([number + 1, str(a.dtype), "x".join(map(str, a.shape)), error, largest, TARGET])
    columns = ["image", "pixels", "shape", "relative error", "largest / maximum", "target"]
    print_table("fourier against the real Gadgetron's default.xml", columns, rows)
    write_result("gadgetron_reference", {"columns": columns, "rows": rows})
    if worst > TARGET:
        raise SystemExit("target missed")


if __name__ == "__main__":
    main()
