"""What comes before the method and does not end: it has a limit, the operator hears that the server is at it, and may leave."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from gadgets.compute_pool import Budget
from gadgets.errors import Disconnected
from gadgets.service import Service, ServiceOptions
from gadgets.waiting import Waiting
from gadgets.wire import codec
from tests.e2e.scans import SimulatedScan, ask, encoded, in_memory, noise_part
from tests.waiting import PATIENCE, until

STAGES = ("estimate_noise", "prepare_chunk", "compression_matrices", "compress_chunk")
COMPRESSED = {"coil_compression": "svd", "virtual_coils": 4}
LONG = 600.0


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """More coils than virtual ones."""
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=8, states=2, calibration="separate", acs=24)


@pytest.fixture
def stuck() -> Iterator[Callable[[str], Any]]:
    """Makes a task that says that it began and ends with the test only."""
    go = threading.Event()

    def make(name: str) -> Any:
        def wait_for_the_end(job: object) -> None:
            wait_for_the_end.began()  # type: ignore[attr-defined]
            go.wait(PATIENCE)

        wait_for_the_end.__name__ = name
        wait_for_the_end.began = lambda: None  # type: ignore[attr-defined]
        wait_for_the_end.end = go.set  # type: ignore[attr-defined]
        return wait_for_the_end

    yield make
    go.set()


def served(folder: Path, time_limit: float) -> Service:
    return Service(ServiceOptions(port=0, workers=0, threads=1, rehearse=False, noise=folder, time_limit=time_limit))


def ends_with(task: Any, running: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is over as soon as ``task`` runs, however long what comes before it takes on this machine."""
    budgets: list[Budget] = []

    def make(seconds: float, *, name: str) -> Budget:
        budgets.append(Budget(seconds, name=name))
        return budgets[-1]

    def over() -> None:
        assert budgets[-1].seconds == LONG
        budgets[-1].seconds = 0.0
        running.jobs.changed()

    monkeypatch.setattr("gadgets.pipeline.Budget", make)
    task.began = over


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_the_limit_of_the_server(
    stage: str, scan: SimulatedScan, stuck: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = stuck(stage)
    monkeypatch.setattr(f"gadgets.preparation.{stage}", task)
    with served(tmp_path, LONG) as running:
        ends_with(task, running, monkeypatch)
        answer = ask(running, "cg_sense", scan, **COMPRESSED)
    (text,) = [text for text in answer.texts if text.startswith("ERROR")]
    assert "TimeLimitReached: preparation: not done within the time limit" in text and not answer.images


def test_a_noise_scan_has_it_as_well(
    scan: SimulatedScan, stuck: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = stuck("estimate_noise")
    monkeypatch.setattr("gadgets.pipeline.estimate_noise", task)
    with served(tmp_path, LONG) as running:
        ends_with(task, running, monkeypatch)
        answer = ask(running, "fourier", scan, messages=encoded(noise_part(scan)))
    (text,) = [text for text in answer.texts if text.startswith("ERROR")]
    assert "TimeLimitReached: preparation" in text


def test_a_scan_of_usual_speed_needs_none_of_it(scan: SimulatedScan, tmp_path: Path) -> None:
    with served(tmp_path, LONG) as running:
        assert len(ask(running, "cg_sense", scan, **COMPRESSED).images) == 2


@pytest.mark.parametrize("kind", ["scan", "noise"])
def test_a_client_that_leaves_ends_the_wait(
    kind: str, scan: SimulatedScan, stuck: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a limit, and with a task that never ends."""
    task = stuck("estimate_noise")
    monkeypatch.setattr(f"gadgets.{'preparation' if kind == 'scan' else 'pipeline'}.estimate_noise", task)
    monkeypatch.setattr("gadgets.waiting.WORD_SECONDS", 0.02)
    messages = scan.messages if kind == "scan" else encoded(noise_part(scan))
    session = codec.config_file("cg_sense") + codec.header(scan.header) + b"".join(messages) + codec.close()
    with served(tmp_path, 0.0) as running:
        with socket.create_connection((running.host, running.port), timeout=PATIENCE) as client:
            client.sendall(session)
            heard = b""
            while b"DBG cg_sense 0 %" not in heard:
                piece = client.recv(1 << 16)
                assert piece, heard
                heard += piece
            assert running.server.n_connections == 1
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        until(lambda: running.server.n_connections == 0, "the scan of a client that left still waits")
        assert running.jobs.state.running == 1  # the task itself cannot be ended in this process
        task.end()


def test_signs_are_given_while_one_task_takes_long_and_while_many_are_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadgets.waiting.WORD_SECONDS", 0.05)
    slow: Future[int] = Future()
    signs: list[float] = []

    def sign() -> None:
        signs.append(time.monotonic())
        if len(signs) == 3:
            slow.set_result(7)

    waiting = Waiting(sign)
    assert waiting.result(slow) == 7 and len(signs) == 3
    assert all(later - earlier > 0.04 for earlier, later in itertools.pairwise(signs))

    def leave() -> None:
        raise Disconnected("the peer is gone")

    with pytest.raises(Disconnected):
        Waiting(leave).until(Future())
    failed: Future[int] = Future()
    failed.set_exception(ZeroDivisionError())
    waiting.until(failed)
    with pytest.raises(ZeroDivisionError):
        waiting.result(failed)
