"""Executors and scratch files: a worker's death is survived, memory is given back."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from gadgets.compute_local import log_python_warnings
from gadgets.errors import JobFailed, SpoolError
from gadgets.jobs import Jobs
from gadgets.memory_errors import out_of_memory
from gadgets.reports import FileReport, ReportReader
from gadgets.scratch import SCRATCH_PREFIX, Scratch, remove_stale_scratch
from recon_core.errors import DataError
from recon_core.types import ImageSeries
from tests.gadgets.worker_tasks import die, die_once, fail, process_id
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def workers() -> Jobs:
    jobs = Jobs(1, threads=1, rehearse=False)
    yield jobs
    jobs.close()


def test_tasks_run_in_another_process(workers: Jobs) -> None:
    assert workers.submit(process_id).result(120) != os.getpid()


def test_a_typed_error_keeps_its_parts_across_the_process_border(workers: Jobs) -> None:
    with pytest.raises(DataError) as caught:
        workers.submit(fail).result(120)
    assert (caught.value.where, caught.value.got, caught.value.expected, caught.value.remedy) == ("slice 1", 3, 4, "Look.")


def test_a_task_whose_worker_is_killed_runs_again(workers: Jobs, tmp_path: Path) -> None:
    assert workers.submit(die_once, str(tmp_path / "marker")).result(120) == "alive"
    assert workers.submit(process_id).result(120) != os.getpid()


def test_a_task_that_always_kills_its_worker_is_an_error_and_the_next_one_runs(workers: Jobs) -> None:
    with pytest.raises(JobFailed, match="die"):
        workers.submit(die).result(120)
    assert workers.submit(process_id).result(120) != os.getpid()


def test_without_workers_tasks_run_here() -> None:
    jobs = Jobs(0)
    assert jobs.submit(process_id).result(PATIENCE) == os.getpid()
    jobs.close()


def test_tasks_of_an_abandoned_scan_are_dropped_and_silent(caplog: pytest.LogCaptureFixture) -> None:
    jobs = Jobs(0)
    scan, other = jobs.scope(), jobs.scope()
    running, go_on, ran = threading.Event(), threading.Event(), []

    def lose_its_files() -> None:
        running.set()
        go_on.wait(PATIENCE)
        raise FileNotFoundError

    first = scan.submit(lose_its_files)
    waiting = scan.submit(ran.append, "waiting")
    foreign = other.submit(ran.append, "other")
    running.wait(PATIENCE)
    with caplog.at_level(logging.DEBUG):
        scan.abandon()
        with pytest.raises(JobFailed, match="given up"):
            waiting.result(PATIENCE)
        go_on.set()
        with pytest.raises(FileNotFoundError):
            first.result(PATIENCE)
        foreign.result(PATIENCE)
        with pytest.raises(JobFailed, match="given up"):
            scan.submit(ran.append, "late").result(PATIENCE)
        assert "lose_its_files" not in caplog.text and "append" not in caplog.text
        with pytest.raises(ZeroDivisionError):
            other.submit(divmod, 1, 0).result(PATIENCE)
        assert "event=task_crashed task=divmod error=ZeroDivisionError" in caplog.text
    jobs.close()
    assert ran == ["other"]


def test_a_waiting_task_of_an_abandoned_scan_never_reaches_its_worker(workers: Jobs, tmp_path: Path) -> None:
    scan = workers.scope()
    futures = [scan.submit(die_once, str(tmp_path / "never")) for _ in range(20)]
    scan.abandon()
    for future in futures:
        assert isinstance(future.exception(120), JobFailed) or future.result() == "alive"
    assert workers.submit(process_id).result(120) != os.getpid()


def test_a_running_task_ends_when_its_scan_is_given_up(tmp_path: Path) -> None:
    scratch = Scratch()
    report = FileReport(scratch.path, "slice-0000")
    report.progress(0.5)
    scratch.close()
    with pytest.raises(JobFailed, match="given up"):
        report.progress(1.0)
    with pytest.raises(JobFailed, match="given up"):
        report.warn("nobody reads this")
    shutil.rmtree(scratch.path, ignore_errors=True)


def test_scratch_is_reserved_and_removed() -> None:
    scratch = Scratch()
    path = scratch.allocate(1 << 20)
    assert path.stat().st_size == 1 << 20
    assert path.stat().st_blocks * 512 >= 1 << 20  # really reserved: a later write cannot meet a full file system
    assert path.stat().st_mode & 0o077 == 0
    scratch.close()
    assert not path.exists() and not scratch.path.exists()


def test_scratch_leaves_memory_to_programs_and_says_when_nothing_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the memory is what a file system in memory may take; with the other half the system would begin to kill."""
    scratch, left = Scratch(), [1 << 40]
    monkeypatch.setattr("gadgets.scratch.memory_room", lambda: left[0])
    monkeypatch.setattr(scratch, "_in_memory", True)
    assert scratch.allocate(1 << 20).parent == scratch.path
    left[0] = 1 << 19
    monkeypatch.setattr(scratch, "_granted", 0)  # 64 MiB later
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    beside = scratch.allocate(1 << 20)
    assert beside.is_relative_to(tmp_path) and beside.stat().st_size == 1 << 20
    assert scratch.allocate(1 << 18).parent == scratch.path, "as soon as there is room again"
    with pytest.raises(
        SpoolError, match=r"no room for prepared readouts; got Cannot allocate memory; \w.* MiB more. Free memory, or disk"
    ):
        scratch.allocate(1 << 60)
    assert list(beside.parent.iterdir()) == [beside]
    scratch.close()
    assert not list(tmp_path.iterdir())


def test_scratch_of_a_dead_process_is_removed_and_of_a_living_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = tmp_path / f"{SCRATCH_PREFIX}{2**22 + 1}-abc"  # beyond the largest process id
    living = tmp_path / f"{SCRATCH_PREFIX}{os.getpid()}-abc"
    dead.mkdir()
    living.mkdir()
    assert remove_stale_scratch() >= 1
    assert living.exists() and not dead.exists()


def test_a_report_crosses_through_files(tmp_path: Path) -> None:
    report, reader = FileReport(tmp_path, "slice-0003"), ReportReader(tmp_path)
    assert reader.fractions() == {}
    report.progress(0.25, "iterating")
    report.warn("first")
    report.warn("second")
    report.preview(ImageSeries("quick", torch.arange(4.0).reshape(1, 1, 2, 2), "preview"))
    assert reader.fractions() == {"slice-0003": 0.25}
    assert reader.warnings() == ["first", "second"]
    assert reader.warnings() == []
    ((tag, series),) = reader.previews()
    assert (tag, series.name, series.comment) == ("slice-0003", "quick", "preview")
    np.testing.assert_array_equal(series.data.numpy().ravel(), [0, 1, 2, 3])
    assert reader.previews() == [] and not list(tmp_path.glob("*.preview-*"))  # read ones are removed: they are large


def test_a_preview_for_nobody_ends_the_task(tmp_path: Path) -> None:
    report = FileReport(tmp_path / "gone", "slice-0000")
    with pytest.raises(JobFailed, match="given up"):
        report.preview(ImageSeries("quick", torch.ones(1, 1, 2, 2)))


# ---- memory ----------------------------------------------------------------------------------------------------------------


def want_tensor() -> None:
    torch.empty(1 << 60, dtype=torch.float32)


def want_array() -> None:
    np.empty(1 << 56, dtype=np.float64)


def want_list() -> None:
    raise MemoryError


def want_gpu() -> None:
    """As torch raises it; no GPU is needed for the words."""
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139.81 GiB of which 1.19 GiB is free. "
        "Process 4242 has 138.6 GiB memory in use."
    )


@pytest.mark.parametrize(
    ("task", "place", "amount"),
    [
        (want_tensor, "this machine", "4294967296.00 GiB"),
        (want_array, "this machine", "512. PiB"),
        (want_list, "this machine", ""),
        (want_gpu, "the GPU", "2.50 GiB"),
    ],
)
def test_a_task_without_memory_says_so_in_one_sentence(
    workers: Jobs, task: Callable[[], None], place: str, amount: str
) -> None:
    with pytest.raises(JobFailed, match=f"out of memory on {place}") as caught:
        workers.submit(task).result(120)
    words = str(caught.value)
    assert amount in words and "fewer virtual coils" in words
    assert not re.search(r"Process|4242|shape|alloc_cpu|GPU 0", words)
    assert workers.submit(process_id).result(120) != os.getpid()


@pytest.mark.parametrize(
    ("words", "place"),
    [
        ("cuFFT error: CUFFT_ALLOC_FAILED", "the GPU"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "the GPU"),
        ("CUDA error: out of memory", "the GPU"),
    ],
)
def test_libraries_of_the_gpu_without_memory(words: str, place: str) -> None:
    assert place in str(out_of_memory(RuntimeError(words)))


@pytest.mark.parametrize(
    "error", [RuntimeError("shape '[3]' is invalid"), ValueError("CUDA out of memory"), DataError("x"), ZeroDivisionError()]
)
def test_other_failures_are_not_taken_for_memory(error: Exception) -> None:
    assert out_of_memory(error) is None


def test_a_librarys_warning_is_one_log_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # put back afterwards
    log_python_warnings()
    warnings.showwarning("first\nsecond", RuntimeWarning, "/some/where/library.py", 7)
    (record,) = caplog.records
    assert "\n" not in record.getMessage() and "library.py:7" in record.getMessage()
