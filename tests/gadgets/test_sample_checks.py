"""Readouts that hold nothing are not measured, and samples that were cut off at a limit are found; sound scans are left alone."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.buffer import sort_readouts
from gadgets.sample_checks import FEWEST_AT_LIMIT, LOST, Samples, look_at, lost_channels, together, unmeasured
from gadgets.simulate import simulate_stream
from gadgets.wire.header import parse_header
from tests.gadgets.scan_factory import flag, mrd_header, readout_headers

PIECE = 7


@pytest.fixture(scope="module", params=["satrec", "molli"])
def samples(request: pytest.FixtureRequest) -> NDArray[np.complex64]:
    """All imaging readouts of a scan, ``(readout, coil, sample)``."""
    small = {"matrix_x": 48, "matrix_y": 48, "coils": 3, "noise_readouts": 0, "waveforms": False}
    found = np.concatenate([samples for _, samples in simulate_stream(request.param, small).batches])
    found.flags.writeable = False
    return found


def in_pieces(samples: NDArray[np.complex64]) -> Samples:
    """As the scan is prepared: some readouts at a time."""
    rows = np.arange(len(samples))
    return together([look_at(samples[at : at + PIECE], rows[at : at + PIECE]) for at in range(0, len(rows), PIECE)])


def integers(samples: NDArray[np.complex64], largest: int) -> NDArray[np.complex64]:
    scale = largest / max(np.abs(samples.real).max(), np.abs(samples.imag).max())
    return (np.round(samples.real * scale) + 1j * np.round(samples.imag * scale)).astype(np.complex64)


def cut_off(samples: NDArray[np.complex64], share: float) -> NDArray[np.complex64]:
    top = share * max(np.abs(samples.real).max(), np.abs(samples.imag).max())
    return (np.clip(samples.real, -top, top) + 1j * np.clip(samples.imag, -top, top)).astype(np.complex64)


def test_a_sound_scan_has_no_limit(samples: NDArray[np.complex64]) -> None:
    for sound in (samples, integers(samples, 32000), integers(samples, 500), samples * np.float32(1e-9)):
        assert not in_pieces(sound).note and not len(in_pieces(sound).empty)
    assert not in_pieces(np.zeros_like(samples[:9])).note
    silent = samples.copy()
    silent[:, 1] = np.round(np.random.default_rng(0).uniform(-3, 3, (*silent[:, 1].shape, 2))) @ np.array([1, 1j])
    assert in_pieces(silent).n_largest[1] >= FEWEST_AT_LIMIT and not in_pieces(silent).note, (
        "a coil without signal, in whole numbers"
    )


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_samples_that_were_cut_off_are_told(samples: NDArray[np.complex64], share: float) -> None:
    cut = cut_off(samples, share)
    found, whole = in_pieces(cut), look_at(cut, np.arange(len(cut)))
    top = np.float32(np.abs(cut.real).max())
    assert found.limited.tolist() == whole.limited.tolist() and (found.largest[found.limited] == top).all()
    n_cut = sum(int((np.abs(part[:, found.limited]) == top).sum()) for part in (cut.real, cut.imag))
    assert found.note.startswith(f"{n_cut} samples are at one largest value (channels {found.limited[0]}")


def test_empty_readouts_are_not_measured_where_others_of_the_image_are() -> None:
    """Set 0: lines 1 and 5 are empty; set 1 is without any signal, and stays an image. A calibration line without signal is none."""
    counters = [{"k1": k, "set": q, "flags": flag(21) * (k == 4)} for q in range(2) for k in range(8)]
    counters += [{"k1": k, "flags": flag(20)} for k in range(3, 6)]
    headers = readout_headers(counters)
    samples = np.ones((len(counters), 2, 16), np.complex64)
    samples[[1, 5, *range(8, 16), 17]] = 0
    samples[0, :, 8] = 0  # silent at the middle alone
    found = look_at(samples, np.arange(len(counters)))
    assert found.empty.tolist() == [1, 5, *range(8, 16), 17]
    scan = sort_readouts(headers, mrd_header())
    without = unmeasured(scan, found.empty)
    assert without.tolist() == [1, 5, 17]
    again = sort_readouts(headers, mrd_header(), None, without)
    assert again.imaging.rows.tolist() == [0, 2, 3, 4, 6, 7, *range(8, 16)] and again.calibration.rows.tolist() == [
        4,
        12,
        16,
        18,
    ]
    assert again.skipped == {"nothing but zeros": 3} and again.n_states == 2
    assert "3 of 19 readouts hold nothing but zeros: they count as not measured" in again.notes


@pytest.mark.parametrize("kind", ["satrec", "molli", "cine"])
def test_a_channel_that_an_image_of_a_recovery_has_lost_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sound scans have none by far, however dim an image is; of other scans nothing is said, as late echoes may lose one."""
    stream = simulate_stream(
        kind, {"matrix_x": 48, "matrix_y": 48, "coils": 6, "snr": 20.0, "noise_readouts": 0, "slices": 2}
    )
    headers, samples = (np.concatenate(parts) for parts in zip(*stream.batches, strict=True))
    scan = sort_readouts(headers, parse_header(stream.header_text))
    with monkeypatch.context() as stricter:
        stricter.setattr("gadgets.sample_checks.LOST", 5 * LOST)
        assert not lost_channels(scan, in_pieces(samples))
    counter = "phase" if kind == "cine" else "set"
    lost = (headers["idx"][counter] == 1) & (headers["idx"]["slice"] == 1)
    rng = np.random.default_rng(0)
    spread = np.sqrt(stream.truth.noise_covariance[4, 4].real / 2)
    samples[lost, 4] = spread * (rng.standard_normal((*samples[lost, 4].shape, 2)) @ np.array([1, 1j]))
    told = lost_channels(scan, in_pieces(samples))
    assert (
        (told == "")
        if kind == "cine"
        else (f"1 of {2 * scan.n_states} images" in told and "(channels 4; the first: slice 1" in told)
    )
