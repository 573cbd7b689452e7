"""Remaining time on made-up schedules whose end is known, and the line that tells it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from gadgets.progress import RemainingTime, progress_line, read_progress_line

STEP = 0.5  # s between two looks


def watch(
    n_tasks: int, workers: int, spans: list[float], shape: Callable[[float], float]
) -> list[tuple[float, float | None]]:
    """``(time, estimate)`` of slices that take ``spans`` s each, first come first served, until the last one ends.

    ``shape`` maps the part of a slice's time that is over to the fraction that it reports.
    """
    free, plan = [0.0] * workers, []
    for span in spans:
        worker = free.index(min(free))
        plan.append((free[worker], free[worker] + span))
        free[worker] += span
    clock, told, now = RemainingTime(n_tasks, workers), [], 0.0
    while now < max(free):
        clock.update(now, {n: shape(min(1.0, (now - a) / (b - a))) for n, (a, b) in enumerate(plan) if a <= now})
        told.append((now, clock.seconds_left(now)))
        now += STEP
    assert clock.fraction <= 1.0
    return told


def worst(told: list[tuple[float, float | None]], end: float, *, after: float) -> float:
    """Largest error of an estimate relative to the whole time."""
    errors = [abs(left - (end - now)) / end for now, left in told if now >= after and left is not None]
    assert len(errors) > 5
    return max(errors)


@pytest.mark.parametrize(
    ("n_slices", "workers", "end"), [(1, 1, 40.0), (3, 1, 120.0), (3, 2, 80.0), (5, 4, 80.0), (8, 8, 40.0)]
)
def test_slices_that_wait_for_workers_are_counted(n_slices: int, workers: int, end: float) -> None:
    told = watch(n_slices, workers, [40.0] * n_slices, lambda part: part)
    assert worst(told, end, after=5.0) < 0.05


def test_a_beginning_without_progress_and_a_sprint_at_the_end() -> None:
    """Coil maps for a tenth of the time, iterations, and a last step that reports nothing."""
    told = watch(3, 1, [60.0] * 3, lambda part: min(0.9, max(0.0, (part - 0.1) / 0.8)) if part < 1 else 1.0)
    assert worst(told, 180.0, after=20.0) < 0.15


def test_slices_of_unequal_size() -> None:
    told = watch(4, 2, [30.0, 60.0, 30.0, 60.0], lambda part: part)
    assert worst(told, 120.0, after=65.0) < 0.1
    assert worst(told, 120.0, after=5.0) < 0.5


def test_nothing_is_said_of_the_rest_in_the_first_seconds_or_without_progress() -> None:
    assert all(left is None for now, left in watch(1, 1, [40.0], lambda part: part) if now < 3.0)
    assert all(left is None for _, left in watch(2, 1, [40.0] * 2, lambda part: 0.0))
    clock = RemainingTime(2, 1)
    for now in range(20):
        clock.update(float(now), {})
    assert clock.seconds_left(20.0) is None and clock.fraction == 0.0


def test_noisy_reports_do_not_make_the_estimate_jump() -> None:
    told = watch(1, 1, [100.0], lambda part: math.floor(20 * part) / 20)  # reports every 5 s only
    ends = [now + left for now, left in told if left is not None and now > 15]
    assert max(abs(a - b) for a, b in zip(ends[1:], ends[:-1], strict=True)) < 3.0
    assert worst(told, 100.0, after=15.0) < 0.1


def test_a_slice_that_begins_anew_does_not_confuse() -> None:
    clock = RemainingTime(1, 1)
    for now in range(10):
        clock.update(float(now), {0: now / 20})
    for now in range(10, 30):
        clock.update(float(now), {0: (now - 10) / 20})
        assert (left := clock.seconds_left(float(now))) is None or 0 <= left < 60
    assert abs((clock.seconds_left(29.0) or 0) - 1.0) < 3.0


def test_fractions_that_are_no_fractions() -> None:
    clock = RemainingTime(2, 1)
    for now in range(10):
        clock.update(float(now), {0: math.nan, 1: 7.0})
    assert 0.0 <= clock.fraction <= 1.0


@pytest.mark.parametrize(
    ("fraction", "seconds", "line", "left"),
    [
        (0.43, 25.4, "DBG moe_dqinr_cine 43 %, about 25 s left\n", "25 s"),
        (0.0, None, "DBG moe_dqinr_cine 0 %\n", ""),
        (0.999, 0.2, "DBG moe_dqinr_cine 100 %, about 1 s left\n", "1 s"),
        (0.5, 7.4, "DBG moe_dqinr_cine 50 %, about 7 s left\n", "7 s"),
        (0.1, 200.0, "DBG moe_dqinr_cine 10 %, about 3 min left\n", "3 min"),
    ],
)
def test_the_line_is_read_as_it_is_written(fraction: float, seconds: float | None, line: str, left: str) -> None:
    assert progress_line("moe_dqinr_cine", fraction, seconds) == line
    assert read_progress_line(line) == (round(100 * fraction) / 100, left)


@pytest.mark.parametrize(
    "text", ["INF llr: 6 images in 0.3 s after the last readout\n", "WRN llr 43 %", "DBG something else", ""]
)
def test_other_texts_are_no_progress(text: str) -> None:
    assert read_progress_line(text) is None
