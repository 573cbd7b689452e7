"""The small series that a method of a certain acquisition can reconstruct: the contract is the same, the scan has to be of its kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from recon_core.methods import Method
from recon_core.simulation.quantitative_brain import SATURATION_TIMES
from tests.recon_core.pinqi.saturation_scan import saturation_scan
from tests.recon_core.small_series import SmallSeries, small_series


def series_of(method: Method, shape: tuple[int, int, int] = (1, 32, 30), **options: Any) -> SmallSeries:
    """`small_series` with what the method asks for: PINQI a recovery after saturation, with the delays that its weights know."""
    if method.NAME != "pinqi":
        return small_series(shape, **options)
    times = SATURATION_TIMES[: options.pop("n_states", None)]
    if shape[0] > 1:
        series = small_series(shape, len(times), **options)
        return replace(series, scan=replace(series.scan, saturation_times=times))
    s = saturation_scan(shape[1:], times, **{"noise": 0.01, "keep": 0.3, **options})
    images = np.stack([s.m0 * (1 - np.exp(-t / s.t1)) for t in times])[:, None]
    return SmallSeries(images, s.kspace, s.scan)
