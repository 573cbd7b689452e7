"""A cluster over TLS with certificates on both sides: it computes, and it lets nobody else in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client
from distributed.comm.core import CommClosedError

from benchmarks.dask_cluster import dask_cluster, tls_options
from gadgets.compute_dask import ATTEMPTS, DaskPool, _Away, _import
from gadgets.compute_worker import Prepare
from gadgets.errors import SchedulerError
from gadgets.jobs import Jobs
from gadgets.scheduler_options import SchedulerOptions
from gadgets.service import Service, ServiceOptions
from tests.e2e.scans import ask, complaints, in_memory, stack
from tests.e2e.test_dask import cluster_check
from tests.gadgets.certificates import Authority, authority
from tests.ports import free_ports
from tests.waiting import PATIENCE, until


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("site"))


@pytest.fixture(scope="module")
def address(site: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    certificate, key = site.issue("cluster")
    folder = tmp_path_factory.mktemp("cluster")
    with dask_cluster(folder, 1, tls_options(site.certificate, certificate, key)) as running:
        until(lambda: "Registered to:" in (folder / "dask.log").read_text(), "its worker does not come")
        yield running


def options(address: str, ca: Authority, own: Authority, name: str) -> SchedulerOptions:
    certificate, key = own.issue(name)
    return SchedulerOptions(address, Path(ca.certificate), Path(certificate), Path(key))


def test_a_scan_over_tls(
    address: str, site: Authority, service: Service, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert address.startswith("tls://")
    scan = in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=2, slices=2)
    here = ask(service, "cg_sense", scan)
    own = ServiceOptions(port=0, workers=1, threads=1, scheduler=options(address, site, site, "server"), rehearse=False)
    with Service(own) as running:
        until(lambda: cluster_check(running, tmp_path) == ("ok", "room for 1 of 1 task"), "the cluster was not found")
        there = ask(running, "cg_sense", scan)
    assert not complaints(there) and caplog.text.count("event=done_by_cluster") == 2
    np.testing.assert_array_equal(stack(there.images, 2), stack(here.images, 2))


@pytest.mark.parametrize("stranger", ["its certificate", "its trust", "no encryption"])
def test_nobody_else_gets_in(
    stranger: str, address: str, site: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gadgets.compute_dask.CONNECT", PATIENCE / 2)  # each of them is refused at once
    other = authority(tmp_path / "other")
    chosen = {
        "its certificate": lambda: options(address, site, other, "stranger"),
        "its trust": lambda: options(address, other, site, "stranger"),
        "no encryption": lambda: SchedulerOptions(address.replace("tls://", "tcp://")),
    }[stranger]()
    with pytest.raises(SchedulerError, match="cannot be used"):
        Jobs(1, remote=lambda events, threads: DaskPool(chosen, threads, "cpu", events))


def refused(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith("event=scheduler_refused")]


def test_a_scheduler_that_comes_later_is_used_then(
    site: Authority, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After a power cut everything starts at once: the server must take scans, whoever else is there."""
    monkeypatch.setattr("gadgets.compute_dask.CONNECT", 1.0)
    monkeypatch.setattr("gadgets.compute_dask.AGAIN", 0.1)
    caplog.set_level(logging.INFO)
    scan = in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=2, slices=2)
    expected = stack(ask(service, "cg_sense", scan).images, 2)
    [port] = free_ports(1)
    chosen = options(f"tls://127.0.0.1:{port}", site, site, "early")
    own = ServiceOptions(port=0, workers=1, threads=1, scheduler=chosen, rehearse=False)
    with Service(own) as running:
        assert cluster_check(running, tmp_path)[0] == "failing"
        assert "event=scheduler_away" in caplog.text and "cluster_ready" not in caplog.text
        alone = ask(running, "cg_sense", scan)
        assert not complaints(alone) and "event=done_by_cluster" not in caplog.text
        monkeypatch.setattr(
            "gadgets.compute_dask.CONNECT", PATIENCE
        )  # on a busy machine a scheduler that is there may take more than 1 s
        certificate, key = site.issue("late")
        with dask_cluster(tmp_path / "late", 1, tls_options(site.certificate, certificate, key), port):
            until(lambda: cluster_check(running, tmp_path) == ("ok", "room for 1 of 1 task"), "it was not found")
            together = ask(running, "cg_sense", scan)
        assert not complaints(together)
    for answer in (alone, together):
        np.testing.assert_array_equal(stack(answer.images, 2), expected)
    assert caplog.text.count("event=done_by_cluster") == 2 and caplog.text.count("event=scheduler_away") == 1


def test_whoever_takes_the_connection_and_is_silent_holds_no_server_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadgets.compute_dask.CONNECT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        jobs = Jobs(0, remote=lambda events, threads: DaskPool(SchedulerOptions(address), threads, "cpu", events))
        assert jobs.state.remote == 0 and jobs.scope().submit(sum, [1, 2]).result(PATIENCE) == 3
        jobs.close()


def test_a_stranger_that_comes_later_is_not_let_in(
    address: str, site: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is said once, not every five seconds."""
    monkeypatch.setattr("gadgets.compute_dask.AGAIN", 0.05)
    knock, knocks = DaskPool._knock, []

    def nobody_at_first(pool: DaskPool, *where: Any) -> None:
        knocks.append(where)
        if len(knocks) == 1:
            raise _Away("for the test")
        knock(pool, *where)

    monkeypatch.setattr(DaskPool, "_knock", nobody_at_first)
    chosen = options(address, authority(tmp_path / "other"), site, "trusts another")
    jobs = Jobs(0, remote=lambda events, threads: DaskPool(chosen, threads, "cpu", events))
    until(lambda: len(knocks) > 4, "it is not looked for")
    assert jobs.state.remote == 0 and jobs.scope().submit(sum, [1, 2]).result(PATIENCE) == 3
    jobs.close()
    (said,) = refused(caplog)
    assert "cannot be used" in said


@contextlib.contextmanager
def empty_cluster(workers: int = 0) -> Iterator[str]:
    """The address of a scheduler without workers, or with some that do nothing, of this process."""
    distributed = _import()
    with distributed.LocalCluster(
        n_workers=workers, threads_per_worker=1, processes=False, protocol="tcp://", host="127.0.0.1",
        dashboard_address="127.0.0.1:0",
    ) as running:  # fmt: skip
        yield running.scheduler_address


def server(address: str) -> Jobs:
    return Jobs(0, remote=lambda events, threads: DaskPool(SchedulerOptions(address), threads, "cpu", events))


def breaks_off(times: int, error: Exception, method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, which fails at first."""
    errors = [error] * times

    def call(*arguments: Any, **options: Any) -> Any:
        if errors:
            raise errors.pop()
        return method(*arguments, **options)

    return call


def test_a_connection_that_breaks_off_at_the_start_is_no_refusal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scheduler closes its client's connection when a worker ends that is being made ready."""
    monkeypatch.setattr("gadgets.compute_dask.PAUSE", 0.01)
    broken = CommClosedError("for the test")
    monkeypatch.setattr(Client, "register_plugin", breaks_off(ATTEMPTS - 1, broken, Client.register_plugin))
    with empty_cluster() as address:
        jobs = server(address)
        remote = jobs._remote
        assert isinstance(remote, DaskPool) and remote._client is not None and "event=scheduler" not in caplog.text
        jobs.close()


@pytest.mark.parametrize("error", [CommClosedError("for the test"), OSError("Timed out trying to connect to a worker")])
def test_a_server_starts_though_its_workers_cannot_be_made_ready_yet(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gadgets.compute_dask.PAUSE", 0.01)
    monkeypatch.setattr("gadgets.compute_dask.AGAIN", 0.01)
    monkeypatch.setattr(Client, "register_plugin", breaks_off(ATTEMPTS + 1, error, Client.register_plugin))
    with empty_cluster() as address:
        jobs = server(address)
        until(lambda: "event=scheduler_back" in caplog.text, "it is not looked for")
        jobs.close()
    (said,) = [record.message for record in caplog.records if "event=scheduler_away" in record.message]
    assert "cannot be made ready" in said and not refused(caplog)


def test_a_worker_that_hangs_while_it_is_made_ready_holds_no_server_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gadgets.compute_dask.READY", 0.2)
    monkeypatch.setattr("gadgets.compute_dask.AGAIN", 0.01)
    free = threading.Event()

    async def setup(plugin: Prepare, worker: Any) -> None:
        while not free.is_set():
            await asyncio.sleep(0.01)

    monkeypatch.setattr(Prepare, "setup", setup)
    with empty_cluster(workers=2) as address:
        jobs = server(address)
        assert jobs.state.remote == 0 and "event=scheduler_away" in caplog.text and "not ready after 0.2 s" in caplog.text
        monkeypatch.setattr("gadgets.compute_dask.READY", PATIENCE)
        free.set()
        until(lambda: jobs.state.remote == 2, "workers that are ready are not used")
        jobs.close()
    assert caplog.text.count("event=scheduler_away") == 1


def test_workers_that_cannot_have_our_code_are_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = ModuleNotFoundError("No module named 'gadgets'")
    monkeypatch.setattr(Client, "register_plugin", breaks_off(ATTEMPTS, absent, Client.register_plugin))
    with empty_cluster() as address, pytest.raises(SchedulerError, match="cannot be used; got ModuleNotFoundError"):
        server(address)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
def test_what_answers_and_is_no_scheduler_is_refused(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def behave() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(
                            1
                        )  # one that closes before it has heard anything is a proxy of a scheduler that is not there
                        connection.sendall(answer)

        threading.Thread(target=behave, daemon=True).start()
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(SchedulerError, match="cannot be used"):
            Jobs(0, remote=lambda events, threads: DaskPool(SchedulerOptions(address), threads, "cpu", events))


def test_workers_of_another_version_are_refused(address: str, site: Authority, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadgets.compute_worker.versions", lambda: {"recon-gadgets": "0.0.0", "torch": "1.0"})
    chosen = options(address, site, site, "old")
    with pytest.raises(SchedulerError, match="other versions"):
        Jobs(1, remote=lambda events, threads: DaskPool(chosen, threads, "cpu", events))
