"""Retro-gating on simulated heart beats with known phases."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gadgets.buffer import AcquisitionSettings, assemble, sort_readouts
from gadgets.errors import SortError
from gadgets.gating import cardiac_phases
from tests.gadgets.scan_factory import mrd_header, numbered_rows, readout_headers

TICK_MS = 2.5


def beats(
    rr_ms: list[float], tr_ms: float = 20.0, start_ms: float = 1e6, clock: bool = True, channel: int = 0
) -> tuple[NDArray[np.void], NDArray[np.float64]]:
    """Headers of a continuous acquisition over beats, and each readout's true position in its beat (0 to 1)."""
    triggers = np.concatenate(([0.0], np.cumsum(rr_ms)))
    t = np.arange(0.1, triggers[-1], tr_ms)
    t = t[t < triggers[-1]]
    beat = np.searchsorted(triggers, t, side="right") - 1
    since = t - triggers[beat]
    headers = np.repeat(readout_headers([{}]), len(t))
    headers["idx"]["kspace_encode_step_1"] = np.arange(len(t)) % 8
    headers["physiology_time_stamp"][:, channel] = since / TICK_MS
    if clock:
        headers["acquisition_time_stamp"] = (start_ms + t) / TICK_MS
    return headers, since / np.asarray(rr_ms)[beat]


def check(phase: NDArray[np.int32], truth: NDArray[np.float64], n: int, slack: float) -> None:
    """Each phase is the bin of the true position, up to ``slack`` of a bin at its edges."""
    used = phase >= 0
    centre = (phase[used] + 0.5) / n
    assert np.abs(centre - truth[used]).max() <= (0.5 + slack) / n


@pytest.mark.parametrize("clock", [True, False])
def test_phases_follow_each_beats_own_rr_interval(clock: bool) -> None:
    rr = [800.0, 880.0, 760.0, 840.0, 800.0, 900.0]
    headers, truth = beats(rr, clock=clock)
    headers.flags.writeable = False
    gating = cardiac_phases(headers, AcquisitionSettings(cardiac_phases=12))
    assert len(gating.rr) == 6 and not gating.rejected.any()
    # the last beat's interval is unknown, the median of the others is used; without a clock RR is known to one TR
    assert np.abs(gating.rr[:5] - np.array(rr[:5]) / 1e3).max() <= (0.005 if clock else 0.021)
    assert gating.median_rr == pytest.approx(0.8, abs=0.005 if clock else 0.021)
    known = gating.beat < 5
    check(gating.phase[known], truth[known], 12, 0.15 if clock else 0.4)
    assert set(gating.phase.tolist()) == set(range(12))


def test_order_of_arrival_does_not_matter_with_a_clock() -> None:
    headers, _ = beats([800.0, 900.0, 850.0, 820.0])
    order = np.random.default_rng(1).permutation(len(headers))
    chosen = AcquisitionSettings(cardiac_phases=10)
    straight, shuffled = cardiac_phases(headers, chosen), cardiac_phases(headers[order], chosen)
    assert np.array_equal(straight.phase[order], shuffled.phase)


@pytest.mark.parametrize(("odd", "clock"), [(450.0, True), (1500.0, True), (450.0, False), (1500.0, False)])
def test_arrhythmic_beats_are_rejected_and_counted(odd: float, clock: bool) -> None:
    headers, truth = beats([800.0, 820.0, odd, 800.0, 780.0, 810.0], clock=clock)
    gating = cardiac_phases(headers, AcquisitionSettings(cardiac_phases=8))
    assert gating.rejected.tolist() == [False, False, True, False, False, False]
    assert gating.n_rejected_readouts == int((gating.beat == 2).sum()) > 20
    assert (gating.phase[gating.beat == 2] == -1).all()
    assert "1 beats" in gating.note and f"({gating.n_rejected_readouts} readouts)" in gating.note
    keep_all = cardiac_phases(headers, AcquisitionSettings(cardiac_phases=8, arrhythmia_rejection=0.0))
    assert keep_all.n_rejected_readouts == 0
    known = keep_all.beat < 5
    check(keep_all.phase[known], truth[known], 8, 0.15 if clock else 0.4)


def test_a_long_last_beat_is_rejected_by_its_late_readouts() -> None:
    headers, _ = beats([800.0, 820.0, 800.0, 1400.0])
    assert cardiac_phases(headers, AcquisitionSettings(cardiac_phases=8)).rejected.tolist() == [False, False, False, True]


def test_a_beat_just_over_the_limit_is_no_pause_while_readouts_continue() -> None:
    headers, truth = beats([600.0, 600.0, 901.0, 600.0], tr_ms=4.0, clock=False)
    gating = cardiac_phases(headers, AcquisitionSettings(cardiac_phases=2, arrhythmia_rejection=0.0))
    assert gating.rr[2] == pytest.approx(0.9, abs=0.005)
    check(gating.phase, truth, 2, 0.05)


def test_rejected_readouts_are_counted_by_the_buffer() -> None:
    headers, _ = beats([800.0, 800.0, 400.0, 800.0, 800.0, 800.0], tr_ms=5.0)
    scan = sort_readouts(headers, mrd_header(), AcquisitionSettings(cardiac_phases=4))
    assert scan.skipped == {"arrhythmia": 80}
    assert len(scan.imaging) == len(headers) - 80
    assert not np.isin(np.arange(320, 400), scan.imaging.rows).any()


def test_a_pause_in_the_acquisition_is_not_an_arrhythmia() -> None:
    headers, truth = beats([800.0] * 9)
    breath_holds = (truth >= 0) & ~np.isin(np.arange(len(headers)) // 40, (3, 4, 5))  # beats 3 to 5 are not acquired
    gating = cardiac_phases(headers[breath_holds], AcquisitionSettings(cardiac_phases=10))
    assert len(gating.rr) == 6 and gating.n_rejected_readouts == 0
    check(gating.phase, truth[breath_holds], 10, 0.1)


def test_midnight() -> None:
    headers, truth = beats([800.0] * 6, start_ms=86_400_000 - 2000)
    headers["acquisition_time_stamp"] %= round(86_400_000 / TICK_MS)
    assert np.ptp(headers["acquisition_time_stamp"]) > 1e7
    gating = cardiac_phases(headers, AcquisitionSettings(cardiac_phases=10))
    assert len(gating.rr) == 6 and gating.n_rejected_readouts == 0
    check(gating.phase, truth, 10, 0.1)


def test_other_channel_and_tick() -> None:
    headers, _ = beats([800.0] * 4, channel=1)
    with pytest.raises(SortError, match="no physiology time stamps"):
        cardiac_phases(headers, AcquisitionSettings(cardiac_phases=8))
    chosen = AcquisitionSettings(cardiac_phases=8, physiology_channel=1)
    assert cardiac_phases(headers, chosen).median_rr == pytest.approx(0.8, abs=0.005)
    slow = AcquisitionSettings(cardiac_phases=8, physiology_channel=1, tick=5e-3)
    assert cardiac_phases(headers, slow).median_rr == pytest.approx(1.6, abs=0.01)


def test_one_beat_is_not_enough() -> None:
    headers, _ = beats([800.0])
    with pytest.raises(SortError, match="the RR interval is unknown"):
        cardiac_phases(headers, AcquisitionSettings(cardiac_phases=8))


def test_gated_scan_through_the_buffer() -> None:
    # segmented cine: 4 lines per beat are repeated over the beat, two beats for each group of lines
    rr = [800.0, 860.0, 820.0, 840.0, 800.0]
    headers, _ = beats(rr, tr_ms=10.0)
    beat = np.searchsorted(np.cumsum(rr), np.arange(len(headers)) * 10.0 + 0.1, side="right")
    k1 = np.where(beat < 2, 0, 4) + np.arange(len(headers)) % 4
    headers["idx"]["kspace_encode_step_1"] = k1
    headers["idx"]["phase"] = np.arange(len(headers)) % 20  # as many as fitted: not a cardiac phase
    rows = numbered_rows(len(headers), 2, 16)
    scan = sort_readouts(headers, mrd_header(), AcquisitionSettings(cardiac_phases=6))
    assert [s["phase"] for s in scan.states] == list(range(6))
    kspace = assemble(scan, 0, rows)
    assert float(kspace.counts.sum()) == len(headers)
    assert bool(kspace.mask.all())
    gating = cardiac_phases(headers, AcquisitionSettings(cardiac_phases=6))
    for q in range(6):
        for k in range(8):
            own = (gating.phase == q) & (k1 == k)
            assert float(kspace.counts[q, 0, k]) == own.sum()
            assert np.allclose(kspace.data[q, :, 0, k].numpy(), rows[own].mean(0), rtol=1e-5)
    assert any("5 beats" in n for n in scan.notes)


def test_unfilled_positions_stay_empty_and_are_noted_and_an_empty_phase_is_an_error() -> None:
    headers, _ = beats([800.0] * 4, tr_ms=40.0)
    scan = sort_readouts(headers, mrd_header(), AcquisitionSettings(cardiac_phases=10, min_line_fraction=0.0))
    kspace = assemble(scan, 0, numbered_rows(len(headers), 2, 16))
    assert not bool(kspace.mask.all())
    assert (
        np.abs(kspace.data.numpy()[~np.broadcast_to(kspace.mask.numpy()[:, None, ..., None], kspace.data.shape)]).max() == 0
    )
    assert any(n.startswith("retro-gating: 4 beats") for n in scan.notes)
    late_only = headers[headers["physiology_time_stamp"][:, 0] > 100]
    with pytest.raises(SortError, match="slice 0 phase 0: 0 of"):
        sort_readouts(late_only, mrd_header(), AcquisitionSettings(cardiac_phases=10))


@settings(max_examples=60, deadline=None)
@given(
    rr=st.lists(st.floats(600, 1000), min_size=2, max_size=12),
    tr=st.floats(3, 40),
    n=st.integers(1, 30),
    clock=st.booleans(),
)
def test_every_readout_of_an_accepted_beat_gets_a_phase_near_its_true_position(
    rr: list[float], tr: float, n: int, clock: bool
) -> None:
    headers, truth = beats(rr, tr_ms=tr, clock=clock)
    gating = cardiac_phases(headers, AcquisitionSettings(cardiac_phases=n, arrhythmia_rejection=0.0))
    assert (gating.phase >= 0).all() and (gating.phase < n).all() and len(gating.rr) == len(rr)
    known = gating.beat < len(rr) - 1
    error = (5.0 if clock else tr + 5.0) / 600 * n
    check(gating.phase[known], truth[known], n, error + 1e-6)
