"""The states of one slice as several tasks: who gets which, and what becomes of the slice."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gadgets.chain import load_chain
from gadgets.errors import JobFailed, OutOfMemory
from gadgets.slice_parts import MapsJob, SliceParts, fit_maps, reconstruct_states, shares
from gadgets.slice_work import SliceWork
from gadgets.tasks import from_portable, portable, reconstruct_slice, report_tag
from recon_core.state_images import StateImages
from recon_core.types import ImageSeries, Result
from tests.gadgets.test_memory_ladder import Recorder


def images(level: float, n_states: int = 2, *notes: str) -> StateImages:
    series = ImageSeries("image", torch.full((n_states, 1, 3, 3), level, dtype=torch.complex64))
    return StateImages(portable(Result((series,), (), {"residual": level}, notes)))


def three() -> list[Future[StateImages]]:
    return [Future(), Future(), Future()]


TAGS = ("slice-from0000-0000", "slice-from0002-0000", "slice-from0004-0000")


@pytest.mark.parametrize(
    ("n_states", "n_parts", "expected"),
    [(6, 3, [2, 2, 2]), (8, 3, [2, 3, 3]), (3, 2, [1, 2]), (2, 5, [1, 1]), (1, 4, [1]), (5, 1, [5])],
)
def test_every_state_has_one_part_and_parts_are_alike(n_states: int, n_parts: int, expected: list[int]) -> None:
    found = shares(n_states, n_parts)
    assert [stop - first for first, stop in found] == expected
    assert [state for first, stop in found for state in range(first, stop)] == list(range(n_states))


def test_parts_report_under_names_of_their_own_that_end_with_the_slice() -> None:
    assert report_tag("slice", 3) == "slice-0003"
    tags = {report_tag("slice", 3, states) for states in shares(6, 3)}
    assert len(tags) == 3 and all(int(tag.rpartition("-")[2]) == 3 and "." not in tag for tag in tags)


def test_the_slice_is_there_when_the_last_part_is_in_the_order_of_states() -> None:
    futures = three()
    parts = SliceParts(TAGS, futures)
    for number in (2, 0, 1):
        assert not parts.whole.done()
        futures[number].set_result(images(float(number), 2, "same words"))
    result = from_portable(parts.whole.result(0))
    assert result.images[0].data[:, 0, 0, 0].real.tolist() == [0, 0, 1, 1, 2, 2]
    assert result.quality == {"residual": 2.0} and result.notes == ("same words",)


def test_a_part_that_fails_fails_the_slice_when_the_others_are_over() -> None:
    futures = three()
    parts = SliceParts(TAGS, futures)
    futures[2].set_exception(JobFailed("third"))
    futures[0].set_result(images(1.0))
    assert not parts.whole.done()
    futures[1].set_exception(OutOfMemory("second"))
    assert isinstance(parts.whole.exception(0), OutOfMemory)


def test_a_part_that_was_cancelled_fails_the_slice_like_any_other() -> None:
    futures = three()
    parts = SliceParts(TAGS, futures)
    futures[0].set_result(images(1.0))
    assert futures[1].cancel() and futures[2].cancel()
    assert isinstance(parts.whole.exception(0), CancelledError)


def test_parts_that_do_not_fit_together_are_a_failure_and_no_silence() -> None:
    futures = three()
    parts = SliceParts(TAGS, futures)
    futures[0].set_result(StateImages(Result((), extras={"curve": 1})))
    for future in futures[1:]:
        future.set_result(images(1.0))
    assert "belong together" in str(parts.whole.exception(0))


@pytest.mark.parametrize("failure", [None, JobFailed("no brain")])
def test_maps_come_last_from_all_states(failure: JobFailed | None) -> None:
    futures, asked, mapped = three(), [], Future[Result]()

    def maps(joined: StateImages) -> Future[Result]:
        asked.append(joined)
        return mapped

    parts = SliceParts(TAGS, futures, maps)
    for future in futures:
        future.set_result(images(1.0))
    assert len(asked) == 1 and asked[0].result.images[0].data.shape[0] == 6 and not parts.whole.done()
    done = images(1.0, 6).result
    if failure is None:
        mapped.set_result(done)
        assert parts.whole.result(0) is done
    else:
        mapped.set_exception(failure)
        assert parts.whole.exception(0) is failure


def test_progress_is_the_mean_of_the_parts() -> None:
    futures = three()
    parts = SliceParts(TAGS, futures)
    assert parts.fraction({}) is None
    assert parts.fraction({TAGS[1]: 0.6, "slice-0001": 1.0}) == pytest.approx(0.2)
    futures[0].set_result(images(1.0))
    assert parts.fraction({TAGS[0]: 0.3, TAGS[1]: 0.5}) == pytest.approx(0.5)
    futures[1].set_result(images(1.0))
    futures[2].set_result(images(1.0))
    assert parts.fraction({}) == 1.0


def test_a_slice_in_one_task_is_as_it_was() -> None:
    future: Future[Result] = Future()
    parts = SliceParts.of_one("slice-0000", future)
    assert parts.whole is future and parts.fraction({}) is None and parts.fraction({"slice-0000": 0.4}) == 0.4
    future.set_result(images(1.0).result)
    assert parts.fraction({}) == 1.0


# ---- which slices are cut ---------------------------------------------------------------------------------------------------


class Tasks(Recorder):
    """Also says which function a task calls."""

    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def submit(self, task: Any, job: Any, **options: Any) -> Future[Any]:
        self.functions.append(task)
        return super().submit(task, job, **options)


def work_of(folder: Path, chain: str, *, workers: int, slices: int, states: int, **maps: object) -> tuple[SliceWork, Tasks]:
    tasks = Tasks()
    services = SimpleNamespace(jobs=SimpleNamespace(capacity=workers), device="cpu", previews=True, time_limit=0.0)
    scan = SimpleNamespace(n_slices=slices, n_states=states, scan_info=lambda number: None)
    return SliceWork(tasks, services, load_chain(chain, maps), folder, scan, None, whitened=True), tasks  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("chain", "workers", "slices", "states", "expected"),
    [
        ("cg_sense", 4, 1, 8, [(0, 2), (2, 4), (4, 6), (6, 8)]),
        ("fourier", 4, 2, 6, [(0, 3), (3, 6), (0, 3), (3, 6)]),
        ("fourier", 8, 1, 2, [(0, 1), (1, 2)]),
        ("cg_sense", 3, 2, 6, [None, None]),  # one worker for each, and half of another
        ("cg_sense", 2, 3, 6, [None, None, None]),
        ("cg_sense", 4, 1, 1, [None]),
        ("llr", 4, 1, 8, [None]),
        ("grasp_pro", 4, 1, 8, [None]),
    ],
)
def test_states_are_spread_where_workers_would_have_nothing_to_do(
    tmp_path: Path, chain: str, workers: int, slices: int, states: int, expected: list[Any]
) -> None:
    work, tasks = work_of(tmp_path, chain, workers=workers, slices=slices, states=states)
    work.begin(range(slices))
    assert [job.states for job in tasks.jobs] == expected
    assert all(job.previews == (job.states is None) for job in tasks.jobs)
    assert set(tasks.functions) == {reconstruct_slice if expected[0] is None else reconstruct_states}


def test_where_memory_is_short_one_task_computes_all_states(tmp_path: Path) -> None:
    work, tasks = work_of(tmp_path, "cg_sense", workers=3, slices=1, states=6)
    work.begin([0])
    for number, future in enumerate(tasks.futures):
        future.set_exception(MemoryError()) if number == 1 else future.set_result(images(1.0))
    assert "smaller batches" in (work.ease(0) or "")
    assert [job.states for job in tasks.jobs[3:]] == [None] and tasks.options[3]["alone"]


def test_the_stand_in_is_spread_as_well(tmp_path: Path) -> None:
    work, tasks = work_of(tmp_path, "cg_sense", workers=3, slices=1, states=6)
    work.begin([0])
    for future in tasks.futures:
        future.set_exception(JobFailed("x"))
    assert work.ease(0) is None
    work.begin_again(0, load_chain("fourier"))
    assert [(job.role, job.states) for job in tasks.jobs[3:]] == [("fallback", cut) for cut in [(0, 2), (2, 4), (4, 6)]]


def test_maps_are_one_more_task_with_the_noise_of_all_states(tmp_path: Path) -> None:
    work, tasks = work_of(tmp_path, "cg_sense", workers=3, slices=1, states=6, maps="qsm")
    work.begin([0])
    for future in tasks.futures[:3]:
        future.set_result(images(1.0))
    (job,) = tasks.jobs[3:]
    assert tasks.functions[3] is fit_maps and isinstance(job, MapsJob) and job.tag == "slice-0000" and job.maps.maps == "qsm"
    assert job.packed("cuda").device == "cuda" and tasks.options[3]["place"] == "remote"
    tasks.futures[3].set_result("maps")
    assert work.take(0) == "maps"
