"""Question: is an image of an inversion recovery that is brighter or darker than the others found, and are good scans left alone?

`recon_core.maps.state_gain`: simulated MOLLI scans by ``llr``, good ones and such with one image scaled or with wrong times of the second
inversion; and measured series. T1's error is that against the scan as it was. `recon_core.maps.state_order`: the same, and times in
another order.

    python -m benchmarks.molli_gains
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from benchmarks.common import print_table, write_result
from benchmarks.measured_series import measured
from benchmarks.pinqi_phantom import acquired
from benchmarks.t1_checks import images_of
from recon_core.maps.saturation import strong_signal
from recon_core.maps.state_gain import StateGain, state_gain
from recon_core.maps.state_order import MOST_ASKED, TimesOrder, best_order, order_of_times
from recon_core.maps.t1 import T1Maps, inversion_recovery_t1, molli_t1
from recon_core.simulation.options import settings_for
from recon_core.simulation.scan import simulate_scan
from recon_core.types import KSpace, ScanInfo

GOOD_MOLLI: tuple[dict[str, Any], ...] = (
    {},
    {"acceleration": 6.0},
    {"mask": "full", "acceleration": 1.0},
    {"snr": 15.0},
    {"snr": 1000.0},
    {"scheme": "4,3,2"},
    {"scheme": "3,3,5"},
    {"scheme": "8"},
    {"mask": "uniform", "acceleration": 2.0, "acs": 24},
    {"partial_fourier": 0.7},
    {"coils": 1, "snr": 30.0},
    {"coils": 12, "seed": 5},
)
EXCHANGED = ((0, 1), (0, 5), (1, 2), (1, 5), (1, 6), (2, 3), (2, 7), (3, 4), (4, 7), (5, 6), (6, 7))
"""Two images of 5(3)3 whose times are exchanged."""

MOLLI_GAINS = ((0, 0.5), (0, 0.8), (0, 0.9), (0, 1.2), (1, 0.9), (1, 1.1), (4, 0.8), (5, 0.8), (5, 1.2), (7, 0.8))
"""Which image of 5(3)3, in the order of acquisition, and how much brighter it is."""


def gain_of(
    name: str, images: torch.Tensor, times: Sequence[float], model: str, rest: T1Maps | None
) -> tuple[list[Any], T1Maps]:
    """T1's error against ``rest``, which image is found, and what another order of the times explains; and the maps."""
    fit = molli_t1 if model == "molli" else inversion_recovery_t1
    maps = fit(images, times)
    inside = maps.t1.valid
    assert maps.parameters is not None
    phase = None if maps.m0_phase is None else maps.m0_phase.data
    gain = state_gain(images, phase, maps.parameters[:, inside], times, inside)
    off = ["", ""]
    if rest is not None and bool(inside.any()):
        both = inside & rest.t1.valid
        error = (maps.t1.data[both] / rest.t1.data[both] - 1).numpy()
        off = [f"{100 * np.median(error):+.0f}", f"{100 * np.quantile(np.abs(error), 0.75):.0f}"]
    seen = strong_signal(images)
    by_order = best_order(images[:, seen][:, :: -(-int(seen.sum()) // MOST_ASKED)], tuple(times))[0]
    found: StateGain | TimesOrder | None = gain if gain is not None and gain.matters else None
    if (order := order_of_times(images, times, seen, fit)) is not None and (
        gain is None or order.explained > gain.explained
    ):
        found = order
    verdict = "-" if found is None else "no map" if found.forbids_map else "told"
    columns = ["", "", ""]
    if gain is not None:
        columns = [f"{gain.time:g} s {100 * gain.size:+.0f} %", f"{gain.explained:.2f}", f"{100 * gain.t1_quartile:.1f}"]
    return [name, *off, *columns, f"{by_order:.2f}", verdict], maps


def molli_gain_rows() -> list[list[Any]]:
    """Good scans, measured series, and MOLLI 5(3)3 with one image brighter or darker, with wrong times, or with those of other images."""
    rows = []
    for change in GOOD_MOLLI:
        kspace, info, times = molli(**change)
        rows.append(
            gain_of(
                ", ".join(f"{k} {v}" for k, v in change.items()) or "good", images_of(kspace, info), times, "molli", None
            )[0]
        )
    for name in ("kidney 0", "kidney 1", "brain"):
        series = measured(name)
        images = torch.from_numpy(np.abs(series.images))[:, None].float()
        rows.append(
            gain_of(f"measured, {name}", images, series.times, "molli" if name != "brain" else "inversion_recovery", None)[0]
        )
    kspace, info, times = molli()
    images = images_of(kspace, info)
    rest = molli_t1(images, times)
    for state, gain in MOLLI_GAINS:
        data = kspace.data.clone()
        data[state] *= gain
        acs = None if kspace.acs_mask is None else data.mean(0) * kspace.acs_mask[None, ..., None]
        changed = images_of(replace(kspace, data=data, acs=acs), info)
        rows.append(gain_of(f"{times[state]:g} s {100 * (gain - 1):+.0f} %", changed, times, "molli", rest)[0])
    for later in (0.04, 0.08):
        stated = [t + later * (state >= 5) for state, t in enumerate(times)]
        rows.append(gain_of(f"second inversion {1e3 * later:+.0f} ms", images, stated, "molli", rest)[0])
    for i, j in EXCHANGED:
        stated = list(times)
        stated[i], stated[j] = stated[j], stated[i]
        rows.append(gain_of(f"{times[i]:g} and {times[j]:g} s exchanged", images, stated, "molli", rest)[0])
    rows.append(gain_of("times sorted", images, sorted(times), "molli", rest)[0])
    return rows


def molli(**change: Any) -> tuple[KSpace, ScanInfo, tuple[float, ...]]:
    """A heart by MOLLI 5(3)3 at 3x, unless another scan is asked for."""
    values = {
        "matrix_x": 80,
        "matrix_y": 80,
        "coils": 6,
        "snr": 60.0,
        "mask": "random",
        "acceleration": 3.0,
        "acs": 12,
        **change,
    }
    scan = simulate_scan("molli", settings_for("molli", values))
    kspace, info = acquired(scan, 0)
    times = tuple(scan.truth.states)
    return kspace, replace(info, saturation_times=(), inversion_times=times), times


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = molli_gain_rows()
    columns = ["the scan", "T1 off %, median", "a quarter", "found", "explained", "T1 off by that %, a quarter"]
    columns += ["by another order", "verdict"]
    print_table("MOLLI: an image that is brighter or darker than the others", columns, rows)
    write_result("molli_gains", {"settings": vars(options), "columns": columns, "rows": rows})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
