"""Averages that cancel are told, sound ones and noise are not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.average_checks import cancelling
from gadgets.buffer import assemble, sort_readouts
from tests.gadgets.scan_factory import mrd_header, readout_headers

N_COILS, N_X, N_LINES = 2, 16, 32


def told(signs: tuple[complex, ...], *, signal: float = 30.0, wrong_states: tuple[int, ...] = (0, 1)) -> str:
    """Of two images of a slice whose averages have these factors, with noise of SD 1 a part."""
    rng = np.random.default_rng(3)
    counters = [{"k1": k, "average": a, "phase": p} for a in range(len(signs)) for p in range(2) for k in range(N_LINES)]
    object_ = signal * np.exp(-(((np.arange(N_LINES) - N_LINES // 2) / 4) ** 2))
    rows: NDArray = rng.normal(size=(len(counters), N_COILS, N_X, 2)) @ [1, 1j]
    for row, at in zip(rows, counters, strict=True):
        row += object_[at["k1"]] * (signs[at["average"]] if at["phase"] in wrong_states else 1)
    scan = sort_readouts(readout_headers(counters), mrd_header(N_X, N_LINES))
    rows = rows.astype(np.complex64)
    return cancelling(scan, 0, rows, assemble(scan, 0, rows))


@pytest.mark.parametrize("signs", [(1,), (1, 1), (1, 1, 1, 1), (1, np.exp(1j)), (1, 1, 1, 0.5)], ids=str)
@pytest.mark.parametrize("signal", [0.0, 3.0, 30.0])
def test_sound_averages_and_noise_are_not_told(signs: tuple[complex, ...], signal: float) -> None:
    assert not told(signs, signal=signal)


@pytest.mark.parametrize("signs", [(1, -1), (1, -1, 1, -1), (1, 1j, -1, -1j), (1, np.exp(2j))], ids=str)
def test_averages_that_cancel_are_told(signs: tuple[complex, ...]) -> None:
    assert "cancel each other in 2 of 2 images of slice 0" in told(signs)
    assert "in 1 of 2 images" in told(signs, wrong_states=(1,))
