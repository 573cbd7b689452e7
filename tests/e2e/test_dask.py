"""Slices on a real Dask cluster: same images, killed workers, limits, and no cluster at all."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from gadgets.compute_dask import DaskPool
from gadgets.errors import JobFailed
from gadgets.monitor import health
from gadgets.monitor.folder import Folder
from gadgets.scheduler_options import SchedulerOptions
from gadgets.service import Service, ServiceOptions
from tests.e2e.scans import SimulatedScan, ask, complaints, final_images, in_memory, stack
from tests.e2e.slow_chain import site_chains
from tests.monitor import spools
from tests.waiting import PATIENCE, is_alive, until


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """Two slices: one for the cluster, one for the server's own worker."""
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=2, slices=2, calibration="separate", acs=16)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service whose slices go to two Dask workers; no file of the server is given to them."""
    options = ServiceOptions(
        port=0, workers=1, threads=1, scheduler=SchedulerOptions("local:2"), rehearse=False,
        configs=site_chains(tmp_path_factory.mktemp("configs")),
    )  # fmt: skip
    with Service(options) as running:
        until(lambda: pool(running).capacity == 2, "the cluster is not whole")
        yield running


def pool(service: Service) -> DaskPool:
    remote = service.jobs._remote
    assert isinstance(remote, DaskPool)
    return remote


def processes(service: Service) -> dict[str, int]:
    """Process id of each of two workers, by its address; the pool's own word may be of a moment before."""

    def whole() -> dict[str, int]:
        found: dict[str, int] = pool(service)._client.run(os.getpid, on_error="ignore")
        return found if len(found) == 2 else {}

    return until(whole, "the cluster did not replace a worker")


def busy_worker(service: Service) -> str:
    """Address of a worker that computes a slice now."""
    remote = pool(service)
    found: list[str] = until(
        lambda: [sent.worker for sent in list(remote._sent.values()) if sent.worker is not None], "no task began"
    )
    return found[0]


def test_images_are_those_of_the_servers_own_workers(cluster: Service, service: Service, scan: SimulatedScan) -> None:
    here = ask(service, "llr", scan, iterations=8)
    there = ask(cluster, "long", scan, iterations=8)
    assert not complaints(there)
    np.testing.assert_array_equal(stack(final_images(there), 2), stack(final_images(here), 2))


def test_progress_and_previews_cross_the_cluster(cluster: Service) -> None:
    # nothing is said in the first three seconds: enough work for an idle machine
    scan = in_memory("cine", matrix_x=112, matrix_y=96, coils=4, states=2, slices=2, calibration="separate", acs=16)
    answer = ask(cluster, "long", scan, iterations=1200, preview="auto")
    assert any(text.startswith("DBG long") for text in answer.texts)
    assert len(final_images(answer)) == 4


def test_a_worker_that_is_killed_in_mid_slice_costs_no_image(cluster: Service, scan: SimulatedScan) -> None:
    expected = stack(final_images(ask(cluster, "long", scan)), 2)
    killed, pids = list[int](), processes(cluster)

    def kill() -> None:
        killed.append(pids[busy_worker(cluster)])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    answer = ask(cluster, "long", scan)
    killer.join()
    until(lambda: not is_alive(killed[0]))
    assert not complaints(answer)
    np.testing.assert_array_equal(stack(final_images(answer), 2), expected)
    assert killed[0] not in processes(cluster).values()


def test_what_takes_too_long_is_ended_and_the_fallback_answers(cluster: Service, scan: SimulatedScan) -> None:
    began, pids = list[str](), processes(cluster)
    watcher = threading.Thread(target=lambda: began.append(busy_worker(cluster)))
    watcher.start()
    answer = ask(cluster, "late", scan)
    watcher.join()
    assert len(answer.images) == 4
    assert all("quick_instead_of_late" in image.attributes for image in answer.images)
    assert {text.split(" failed ")[0] for text in complaints(answer)} == {"WRN late"}
    assert all("time limit" in text for text in complaints(answer))
    until(lambda: not is_alive(pids[began[0]]), "the worker still computes")


def test_a_scan_that_is_given_up_leaves_the_cluster(cluster: Service) -> None:
    scope = cluster.jobs.scope()
    processes(cluster)
    future = scope.submit(never, _Packable(), place="remote")
    until(lambda: any(sent.future is not None for sent in list(pool(cluster)._sent.values())), "nothing was sent")
    scope.abandon()
    with pytest.raises(JobFailed, match="given up"):
        future.result(PATIENCE)
    until(lambda: pool(cluster).free(), "its place is still taken")


@dataclass(frozen=True)
class _Packable:
    """A task's argument."""

    report_folder: str = "/nonexistent"

    def packed(self, device: str) -> _Packable:
        return self


def never(job: _Packable) -> None:
    """Until its scan is given up: then its folder is gone."""
    while Path(job.report_folder).is_dir():
        time.sleep(0.05)


def cluster_check(service: Service, folder: Path) -> tuple[str, str]:
    """What /healthz would say now."""
    spools.put_status(folder / "status", **{**service._describe(), "workers": 0})
    (check,) = [check for check in health.checks(Folder(folder / "status")) if check.name == "cluster"]
    return check.level, check.words


def test_without_the_scheduler_slices_are_computed_here(scan: SimulatedScan, tmp_path: Path) -> None:
    options = ServiceOptions(
        port=0, workers=1, threads=1, scheduler=SchedulerOptions("local:1"), rehearse=False, configs=site_chains(tmp_path)
    )
    with Service(options) as running:
        until(lambda: cluster_check(running, tmp_path) == ("ok", "room for 1 of 1 task"), "no cluster")
        stopper = threading.Thread(target=lambda: (busy_worker(running), pool(running)._cluster.close(timeout=30)))
        stopper.start()
        answer = ask(running, "long", scan)
        stopper.join()
        assert len(final_images(answer)) == 4 and not complaints(answer)
        until(lambda: pool(running).capacity == 0, "the lost cluster still counts")
        assert cluster_check(running, tmp_path)[0] == "failing"
        assert len(final_images(ask(running, "quick", scan))) == 4


def test_a_cluster_without_workers_gives_its_tasks_back(
    scan: SimulatedScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gadgets.compute_dask.DESERTED", 0.5)
    options = ServiceOptions(
        port=0, workers=1, threads=1, scheduler=SchedulerOptions("local:1"), rehearse=False, configs=site_chains(tmp_path)
    )
    with Service(options) as running:
        until(lambda: pool(running).capacity == 1, "no cluster")

        def leave() -> None:
            busy_worker(running)
            pool(running)._cluster.scale(0)

        leaver = threading.Thread(target=leave)
        leaver.start()
        answer = ask(running, "long", scan)
        leaver.join()
        assert len(final_images(answer)) == 4 and not complaints(answer)
