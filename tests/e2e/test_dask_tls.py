"""A cluster over TLS with certificates on both sides: it computes, and it lets nobody else in."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.dask_cluster import dask_cluster, tls_options
from gadgets.compute_dask import DaskPool
from gadgets.errors import SchedulerError
from gadgets.jobs import Jobs
from gadgets.scheduler_options import SchedulerOptions
from gadgets.service import Service, ServiceOptions
from tests.e2e.scans import ask, complaints, in_memory, stack
from tests.gadgets.certificates import Authority, authority


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def address(site: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    certificate, key = site.issue("cluster")
    with dask_cluster(tmp_path_factory.mktemp("cluster"), 1, tls_options(site.certificate, certificate, key)) as running:
        yield running


def options(address: str, ca: Authority, own: Authority, name: str) -> SchedulerOptions:
    certificate, key = own.issue(name)
    return SchedulerOptions(address, Path(ca.certificate), Path(certificate), Path(key))


def test_a_scan_over_tls(address: str, site: Authority, service: Service) -> None:
    assert address.startswith("tls://")
    scan = in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=2, slices=2)
    here = ask(service, "cg_sense", scan)
    own = ServiceOptions(port=0, workers=1, threads=1, scheduler=options(address, site, site, "server"), rehearse=False)
    with Service(own) as running:
        there = ask(running, "cg_sense", scan)
        assert running.jobs._remote is not None and running.jobs._remote.capacity == 1
    assert not complaints(there)
    np.testing.assert_array_equal(stack(there.images, 2), stack(here.images, 2))


@pytest.mark.parametrize("stranger", ["its certificate", "its trust", "no encryption"])
def test_nobody_else_gets_in(
    stranger: str, address: str, site: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gadgets.compute_dask.CONNECT", 3.0)
    other = authority(tmp_path / "other")
    chosen = {
        "its certificate": lambda: options(address, site, other, "stranger"),
        "its trust": lambda: options(address, other, site, "stranger"),
        "no encryption": lambda: SchedulerOptions(address.replace("tls://", "tcp://")),
    }[stranger]()
    with pytest.raises(SchedulerError, match="cannot be used"):
        Jobs(1, remote=lambda events, threads: DaskPool(chosen, threads, "cpu", events))


def test_a_scheduler_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadgets.compute_dask.CONNECT", 1.0)
    with pytest.raises(SchedulerError, match="cannot be used"):
        Jobs(1, remote=lambda events, threads: DaskPool(SchedulerOptions("tcp://127.0.0.1:1"), threads, "cpu", events))


def test_workers_of_another_version_are_refused(address: str, site: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadgets.compute_worker.versions", lambda: {"recon-gadgets": "0.0.0", "torch": "1.0"})
    chosen = options(address, site, site, "old")
    with pytest.raises(SchedulerError, match="other versions"):
        Jobs(1, remote=lambda events, threads: DaskPool(chosen, threads, "cpu", events))
