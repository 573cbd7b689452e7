"""A retro-gated cine, whose phase counter is no cardiac phase, is re-binned by its time stamps on the console's request."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.service import Service
from tests.e2e.scans import SimulatedScan, ask, complaints, encoded, error, in_memory, stack

PHASES = 8


@pytest.fixture(scope="module")
def retro() -> SimulatedScan:
    """Every seventh beat is premature; the second average has the lines whose beats are rejected in the first."""
    return in_memory(
        "cine", matrix_x=64, matrix_y=64, coils=4, states=PHASES, retro_gated=True, arrhythmia=True, averages=2,
        lines_per_segment=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def truth(retro: SimulatedScan) -> NDArray[np.float64]:
    """Bin i holds what lies between the truth's phases i and i + 1."""
    return 0.5 * (retro.truth + np.roll(retro.truth, -1, axis=1))


def moving(truth: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Pixels whose signal changes with the heartbeat."""
    spread = np.ptp(truth, axis=1)
    return np.asarray(spread > 0.3 * spread.max())[:, None]


@pytest.mark.parametrize("chain", ["fourier", "cg_sense", "llr"])
def test_rebinned_phases_show_the_heart_where_it_is(
    chain: str, service: Service, retro: SimulatedScan, truth: NDArray[np.float64]
) -> None:
    answer = ask(service, chain, retro, cardiac_phases=PHASES)
    assert len(answer.images) == PHASES
    images = stack(answer.images, PHASES)
    assert error(images, truth, retro.tissue) < 0.08
    # the right phase, not only the right anatomy
    scaled = images / np.sqrt(2)  # whitened noise has SD 1 in both parts, the truth's unit is SD 1 of the complex sample
    heart = np.broadcast_to(moving(truth), truth.shape)
    differences = np.array(
        [
            np.linalg.norm((scaled - np.roll(truth, shift, axis=1))[heart]) / np.linalg.norm(truth[heart])
            for shift in range(PHASES)
        ]
    )
    assert int(np.argmin(differences)) == 0
    assert differences[0] < 0.5 * differences[PHASES // 2]


def test_rejected_beats_are_told(service: Service, retro: SimulatedScan) -> None:
    answer = ask(service, "fourier", retro, cardiac_phases=PHASES)
    (told,) = [text for text in answer.texts if "retro-gating" in text]
    assert "16 beats" in told and "2 beats" in told and "arrhythmia" in told
    # premature beats as such are no reason to worry the operator with more than that line
    assert len(complaints(answer)) <= 2


def test_another_number_of_phases(service: Service, retro: SimulatedScan) -> None:
    answer = ask(service, "fourier", retro, cardiac_phases=4)
    assert len(answer.images) == 4
    assert [float(i.header["image_index"]) for i in answer.images] == [1, 2, 3, 4]


def test_arrhythmia_rejection_pays(service: Service, retro: SimulatedScan, truth: NDArray[np.float64]) -> None:
    def of(**settings: object) -> float:
        answer = ask(service, "fourier", retro, cardiac_phases=PHASES, **settings)
        return error(stack(answer.images, PHASES), truth, moving(truth)[:, 0])

    assert of() < of(arrhythmia_rejection=0)


def test_without_the_request_the_raw_phases_come_with_a_warning(service: Service, retro: SimulatedScan) -> None:
    """The header says that re-binning is meant; which raw phases are incomplete is said, too."""
    answer = ask(service, "fourier", retro)
    raw_phases = 1 + max(int(headers["idx"]["phase"].max()) for headers, _ in retro.stream.batches)
    assert len(answer.images) == raw_phases > 3 * PHASES
    said = complaints(answer)
    assert any("set cardiac_phases" in text for text in said)
    assert any("fewer lines than expected" in text for text in said)


def test_a_scan_without_time_stamps_says_what_to_do(service: Service, retro: SimulatedScan) -> None:
    silent = []
    for headers, samples in retro.stream.batches:
        changed = headers.copy()
        changed["physiology_time_stamp"] = 0
        silent.append((changed, samples))
    answer = ask(service, "fourier", retro, messages=encoded(silent), cardiac_phases=PHASES)
    assert not answer.images
    assert any("no physiology time stamps" in text and "physiology_channel" in text for text in answer.texts)
