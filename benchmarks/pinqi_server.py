"""Question: does the nine-tube phantom come out of the running server with the right T1, and how long does a slice take?

The phantom of Table I is simulated as raw MRD data at 8x (finely rendered, correlated noise, a noise scan, coil maps unknown) and replayed
to ``recon serve``, which runs in a process of its own with its default settings. Judged are the T1 maps as a console gets them:
integer codes with slope, intercept and padding. Goal: RMS deviation of tube means at most 35 ms, none over 7 %.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import print_table, write_result
from benchmarks.latency import server
from benchmarks.pinqi_phantom import GOAL_RMS, GOAL_WORST, entry
from gadgets.meta import read_meta
from gadgets.replay import replay
from gadgets.simulate import read_truth, simulate
from gadgets.wire.events import Image
from recon_core.simulation.tubes import PROTOCOL, PUBLISHED, TABLE_I, compare_tubes

CHAINS: dict[str, dict[str, str]] = {"pinqi_t1": {}, "llr_t1": {"map_model": "saturation_recovery"}}


def t1_of(images: list[Image]) -> np.ndarray:
    """The T1 map in s ``(y, x)``, NaN where the console shows nothing."""
    for image in images:
        meta = read_meta(image.attributes)
        if meta.get("GADGETRON_DataRole", ("",))[0] == "T1":
            codes = image.data[0, 0].astype(float)
            values = codes * float(meta["RescaleSlope"][0]) + float(meta["RescaleIntercept"][0])
            return np.where(codes == float(meta["PixelPaddingValue"][0]), np.nan, values) * 1e-3
    raise SystemExit("no T1 map came back")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--acceleration", type=float, default=8.0)
    parser.add_argument("--snr", type=float, default=40.0)
    options = parser.parse_args()
    rows: list[list[Any]] = [
        ["(in the tubes)", "", *TABLE_I, "", "", ""],
        ["(published PINQI)", "", *PUBLISHED, 0.035, 0.077, ""],
    ]
    found: dict[str, list[dict[str, Any]]] = {chain: [] for chain in CHAINS}
    with tempfile.TemporaryDirectory() as folder, server() as (_, port):
        for seed in options.seeds:
            path = Path(folder) / f"tubes_{seed}.h5"
            settings = {**PROTOCOL, "acceleration": options.acceleration, "snr": options.snr, "seed": seed}
            simulate("satrec", path, settings)
            labels = read_truth(path.with_suffix(".truth.h5")).labels[0, 0, 0]
            for chain, parameters in CHAINS.items():
                images: list[Image] = []
                result = replay(path, port=port, config=chain, parameters=parameters, on_image=images.append)
                t1 = t1_of(images)
                report = compare_tubes(np.nan_to_num(t1), labels, np.isfinite(t1))
                figures = {
                    **entry(report),
                    "seed": seed,
                    "last_image_s": result.seconds_to_last_image,
                    "texts": result.texts,
                }
                found[chain].append(figures)
                rows.append(
                    [
                        chain,
                        seed,
                        *np.round(report.mean, 3).tolist(),
                        report.rms_deviation,
                        float(np.abs(report.relative).max()),
                        round(result.seconds_to_last_image, 2),
                    ]
                )
    columns = ["T1 in s", "seed", *(f"tube {i + 1}" for i in range(len(TABLE_I))), "RMS s", "worst", "last image, s"]
    print_table(f"Nine tubes at {options.acceleration:g}x through the server, SNR {options.snr:g}", columns, rows)
    missed = [
        f"{chain}, seed {f['seed']}: RMS {1e3 * f['rms_deviation_s']:.0f} ms, worst {100 * f['worst_relative']:.1f} %"
        for chain, scans in found.items()
        for f in scans
        if f["rms_deviation_s"] > GOAL_RMS or f["worst_relative"] > GOAL_WORST
    ]
    goals = {"rms_deviation_s": GOAL_RMS, "worst_relative": GOAL_WORST}
    write_result("pinqi_server", {"settings": vars(options), "goals": goals, "scans": found, "missed": missed})
    for text in missed:
        print(f"missed: {text}")
    return 1 if any(text.startswith("pinqi") for text in missed) else 0


if __name__ == "__main__":
    raise SystemExit(main())
