"""The worker's side of a cluster, without one: words on the way, last words, and an end that needs nobody's help."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
from dask.utils import parse_timedelta

from gadgets import compute_worker
from gadgets.compute_dask import _import, _write_words
from gadgets.compute_worker import end, news, run_packed
from gadgets.errors import JobFailed, SchedulerError
from gadgets.reports import FileReport, ReportReader
from gadgets.row_files import RowFiles
from recon_core.errors import DataError
from recon_core.types import ImageSeries
from tests.waiting import PATIENCE, until


@dataclass(frozen=True)
class Job:
    """What a task gets: where it reports, and what the test tells it."""

    report_folder: str = "(of another machine)"
    begun: threading.Event | None = None
    go: threading.Event | None = None


def talk(job: Job) -> str:
    report = FileReport(Path(job.report_folder), "slice-0002")
    report.progress(0.25, "half way to half way")
    report.preview(ImageSeries("quick", torch.arange(4.0).reshape(1, 1, 2, 2)))
    assert job.begun is not None and job.go is not None
    job.begun.set()
    job.go.wait(PATIENCE)
    report.warn("on its way out")
    return "done"


def fail(job: Job) -> None:
    FileReport(Path(job.report_folder), "slice-0000").warn("before the failure")
    raise DataError("bad line", where="slice 0")


def test_words_come_while_it_runs_and_the_last_ones_with_the_result(tmp_path: Path) -> None:
    job, reader = Job(begun=threading.Event(), go=threading.Event()), ReportReader(tmp_path)
    assert job.begun is not None and job.go is not None
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_packed, "one", talk, job, None)
        assert job.begun.wait(PATIENCE)
        said = news([])["one"]
        assert said.seconds >= 0
        _write_words(tmp_path, said.words)
        assert reader.fractions() == {"slice-0002": 0.25}
        ((tag, series),) = reader.previews()
        assert tag == "slice-0002"
        np.testing.assert_array_equal(series.data.numpy().ravel(), [0, 1, 2, 3])
        assert news([])["one"].words == {}  # nothing twice
        job.go.set()
        outcome = running.result(PATIENCE)
    assert (outcome.result, outcome.error) == ("done", None)
    _write_words(tmp_path, outcome.words)
    assert reader.warnings() == ["on its way out"]
    assert news([]) == {}


def test_an_error_comes_with_its_place_and_its_words() -> None:
    outcome = run_packed("two", fail, Job(), None)
    assert isinstance(outcome.error, DataError) and outcome.error.where == "slice 0"
    assert "test_compute_worker.py:" in outcome.places
    assert list(outcome.words.values()) == [b"before the failure"]


def test_a_scan_that_was_given_up_takes_its_task_with_it() -> None:
    job = Job(begun=threading.Event(), go=threading.Event())
    assert job.begun is not None and job.go is not None
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_packed, "three", talk, job, None)
        assert job.begun.wait(PATIENCE)
        assert news(["three"]) == {}
        job.go.set()
        outcome = running.result(PATIENCE)
    assert isinstance(outcome.error, JobFailed) and "given up" in str(outcome.error)


def test_only_the_process_that_runs_a_task_is_ended() -> None:
    assert end("a task of another worker") is False


def lose_the_gpu(job: Job) -> None:
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_a_process_whose_gpu_failed_begins_nothing_more_and_is_the_one_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_worker, "_doomed", set())
    monkeypatch.setattr(compute_worker, "DOOMED_SECONDS", 0.0)
    killed: list[tuple[int, int]] = []
    monkeypatch.setattr(compute_worker.os, "kill", lambda *args: killed.append(args))
    assert isinstance(run_packed("lost", lose_the_gpu, Job(), None).error, RuntimeError)
    assert not killed and end("another") is False
    assert isinstance(run_packed("next", fail, Job(), None).error, DataError)  # where the signal kills, this is not reached
    assert killed == [(os.getpid(), signal.SIGKILL)]
    assert end("lost") is True
    until(lambda: len(killed) == 2, "the process was not ended")


def test_words_for_a_scan_that_is_over_are_dropped(tmp_path: Path) -> None:
    _write_words(tmp_path / "gone", {"slice-0000.progress": b'[0.5, ""]'})
    _write_words(tmp_path, {"../outside": b"x", ".hidden": b"x", "a/b": b"x", "kept": b"x"})
    assert [path.name for path in tmp_path.iterdir()] == ["kept"] and not (tmp_path.parent / "outside").exists()


STUCK = """
import re, sys
from dataclasses import dataclass
from gadgets import compute_worker

@dataclass(frozen=True)
class Job:
    report_folder: str = ""

def stuck(job):
    print("begun", flush=True)
    re.match(r"(a+)+$", "a" * 60 + "b")  # for years, and no other thread of the interpreter gets a word in

compute_worker.GRACE = 0.2
compute_worker.run_packed("key", stuck, Job(), 0.5)
"""


def test_a_process_that_never_gives_way_ends_by_itself() -> None:
    done = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and done.stdout == "begun\n"
    assert "Traceback" not in done.stderr


def test_a_worker_of_another_version_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr(compute_worker, "prepare_process", lambda *_, **__: started.append(1))
    with pytest.raises(SchedulerError, match="torch 0"):
        compute_worker.Prepare({**compute_worker.versions(), "torch": "0"}, 1).setup(None)
    assert not started


def test_without_dask_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SchedulerError, match=r"recon-gadgets\[dask\]"):
        _import()


def test_a_worker_of_our_own_cluster_may_be_long_in_coming_back() -> None:
    """On a busy machine a new process takes minutes, and Dask starts none for a worker that it has given up."""
    _import()
    assert parse_timedelta(dask.config.get("distributed.deploy.lost-worker-timeout")) > PATIENCE


def test_packed_readouts_are_those_of_the_files(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    rows = (rng.standard_normal((23, 2, 5)) + 1j * rng.standard_normal((23, 2, 5))).astype(np.complex64)
    paths = []
    for number in range(3):
        paths.append(str(tmp_path / f"{number}"))
        rows[number * 10 : number * 10 + 10].tofile(paths[-1])
    files = RowFiles(tuple(paths), 10, 23, 2, 5)
    chosen = np.array([22, 3, 10, 9, 3, 11])
    packed = files.picked(chosen)
    assert packed.shape == files.shape and packed.dtype == files.dtype and len(packed) == len(files)
    assert packed.data.shape[0] == 5  # each once
    np.testing.assert_array_equal(packed[chosen], rows[chosen])
    np.testing.assert_array_equal(packed[chosen], files[chosen])
    for missing in (0, 12, 21):
        with pytest.raises(DataError, match="another slice"):
            packed[np.array([3, missing])]
