"""A GPU that fails in the middle of a slice, played on the CPU: another worker, then the CPU, then the fallback, and always images."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gadgets.compute_local import start_worker
from gadgets.errors import DeviceFailed
from gadgets.memory_ladder import SMALLER
from gadgets.scheduler_options import SchedulerOptions
from gadgets.service import Service, ServiceOptions
from recon_core.batches import batch
from recon_core.methods import get_method, methods
from tests.e2e.scans import SimulatedScan, ask, complaints, in_memory, stack
from tests.e2e.slow_chain import write_chain
from tests.e2e.test_dask import _Packable, pool
from tests.gadgets.test_device_errors import WORDS
from tests.waiting import PATIENCE, is_alive, until

FOLDER = "TEST_GPU_FAILURES"
"""Names the folder in which attempts are noted; workers inherit it."""


def attempts(folder: Path) -> list[tuple[int, bool]]:
    """Process, and whether it was on the lowest rung, of each attempt in order."""
    lines = [path.read_text().split() for path in sorted(folder.glob("attempt-*"))]
    return [(int(pid), small == "True") for pid, small in lines]


def failing(times: int) -> Any:
    """A method whose first ``times`` attempts, over all processes, fail as a GPU does."""

    def reconstruct(kspace: Any, scan: Any, settings: Any, report: Any) -> Any:
        folder = Path(os.environ[FOLDER])
        n = len(list(folder.glob("attempt-*")))
        (folder / f"attempt-{n:03d}").write_text(f"{os.getpid()} {batch(1000) == 1000 * SMALLER}")
        if n < times:
            raise RuntimeError(WORDS)
        return get_method("fourier").reconstruct(kspace, scan, settings, report)

    settings = get_method("fourier").Settings
    return SimpleNamespace(NAME="x", SUMMARY="", NEEDS_COIL_MAPS=False, Settings=settings, reconstruct=reconstruct)


def lose_the_gpu(job: _Packable) -> None:
    raise RuntimeError(WORDS)


METHODS = {"fails_once": 1, "fails_twice": 2, "fails_always": 1000}


def add_methods() -> None:
    methods().update({name: failing(times) for name, times in METHODS.items()})


def start_worker_with_methods(threads: int, rehearse: bool, server: int) -> None:
    start_worker(threads, rehearse, server)
    add_methods()


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """One slice: its attempts come one after the other."""
    return in_memory("cine", matrix_x=32, matrix_y=32, coils=2, states=2)


@pytest.fixture(scope="module")
def chains(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("configs")
    before = dict(methods())
    add_methods()
    for name in METHODS:
        write_chain(folder, name, name, "quick")
    write_chain(folder, "quick", "fourier")
    yield folder
    methods().clear()
    methods().update(before)


@pytest.fixture(scope="module", params=[1, 0], ids=["worker", "in-process"])
def site(request: pytest.FixtureRequest, chains: Path) -> Iterator[Service]:
    options = ServiceOptions(port=0, workers=request.param, threads=1, rehearse=False, configs=chains)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(FOLDER, "set by each test")
        patched.setattr("gadgets.compute_local.start_worker", start_worker_with_methods)
        with Service(options) as running:
            yield running


@pytest.fixture
def folder(site: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's attempts are noted, also by the worker that runs already."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    if site.jobs.workers:
        site.jobs.submit(note_in, str(tmp_path)).result(PATIENCE)
    return tmp_path


def note_in(folder: str) -> None:
    os.environ[FOLDER] = folder


def test_one_failure_costs_no_image(
    site: Service, scan: SimulatedScan, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = ask(site, "quick", scan)
    answer = ask(site, "fails_once", scan)
    np.testing.assert_array_equal(stack(answer.images, 2), stack(expected.images, 2))
    first, second = attempts(folder)
    if site.jobs.workers:
        assert complaints(answer) == ["WRN fails_once: the GPU failed; it goes on on another worker\n"]
        assert first[0] != second[0] and not first[1] and not second[1]
        until(lambda: not is_alive(first[0]), "the worker whose GPU failed still runs")
    else:
        assert complaints(answer) == ["WRN fails_once: the GPU failed; it goes on on the CPU\n"]
        assert first == (os.getpid(), False) and second == (os.getpid(), True)
    assert (
        "event=device_failed task=reconstruct_slice" in caplog.text and "event=device_step chain=fails_once" in caplog.text
    )


def test_a_second_failure_leaves_the_cpu(site: Service, scan: SimulatedScan, folder: Path) -> None:
    """And without another worker the CPU was the second attempt: what fails there as well comes from the fallback."""
    answer = ask(site, "fails_twice", scan)
    steps = ["on another worker", "on the CPU"] if site.jobs.workers else ["on the CPU"]
    stand_in = any("_instead_of_" in image.attributes for image in answer.images)
    assert len(answer.images) == 2 and stand_in == (not site.jobs.workers)
    told = complaints(answer)
    assert told[: len(steps)] == [f"WRN fails_twice: the GPU failed; it goes on {step}\n" for step in steps]
    assert len(told) == len(steps) + stand_in
    pids, on_cpu = zip(*attempts(folder), strict=True)
    assert on_cpu == ((False, False, True) if site.jobs.workers else (False, True))
    assert len(set(pids)) == (3 if site.jobs.workers else 1)


def test_what_fails_everywhere_comes_from_the_fallback(
    site: Service, scan: SimulatedScan, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    answer = ask(site, "fails_always", scan)
    assert len(answer.images) == 2
    assert all("quick_instead_of_fails_always" in image.attributes for image in answer.images)
    *_, step, last = complaints(answer)
    assert step == "WRN fails_always: the GPU failed; it goes on on the CPU\n"
    assert "an illegal memory access was encountered" in last and "come from quick" in last
    assert [small for _, small in attempts(folder)] == [False] * (1 + bool(site.jobs.workers)) + [True]
    steps = [
        r.getMessage() for r in caplog.records if "event=device_step" in r.getMessage() and "'on the CPU'" in r.getMessage()
    ]
    assert len(steps) == 1


def test_a_worker_of_a_cluster_is_ended_and_the_cluster_is_whole_again(scan: SimulatedScan, chains: Path) -> None:
    options = ServiceOptions(
        port=0, workers=1, threads=1, scheduler=SchedulerOptions("local:1"), rehearse=False, configs=chains
    )
    with Service(options) as running:
        until(lambda: pool(running).capacity == 1, "no worker came")
        (pid,) = pool(running)._client.run(os.getpid).values()
        with pytest.raises(DeviceFailed, match="illegal memory access"):
            running.jobs.scope().submit(lose_the_gpu, _Packable(), place="remote").result(PATIENCE)
        until(lambda: not is_alive(pid), "the worker whose GPU failed still runs")
        answer = ask(running, "quick", scan)
        assert len(answer.images) == 2 and not complaints(answer)
