"""Workers that are killed in the middle of a message: on a busy machine it happens by itself, now and then."""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from gadgets import worker_pipes
from gadgets.jobs import Jobs
from tests.waiting import PATIENCE, until


@pytest.fixture
def elsewhere() -> list[threading.Thread]:
    """Of services that other tests keep."""
    return _threads()


@pytest.fixture
def jobs(elsewhere: list[threading.Thread], monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    monkeypatch.setattr(worker_pipes, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(worker_pipes, "GRACE_SECONDS", 0.3)
    running = Jobs(1, threads=1, rehearse=False)
    running.warm()
    yield running
    running.close()


def half_a_result(once: str) -> str:
    """Run in a worker: the first time, it writes the beginning of a long result and dies."""
    if Path(once).exists():
        return "whole"
    Path(once).touch()
    frame = sys._getframe()
    while frame.f_back is not None and "result_queue" not in frame.f_locals:
        frame = frame.f_back
    pipe = frame.f_locals["result_queue"]._writer.fileno()
    os.write(pipe, struct.pack("!i", 1_000_000) + bytes(1000))
    os.kill(os.getpid(), signal.SIGKILL)
    return "never"


def test_half_a_result_is_made_again(jobs: Jobs, tmp_path: Path) -> None:
    assert jobs.submit(half_a_result, str(tmp_path / "once")).result(PATIENCE) == "whole"
    assert jobs.state.deaths == 1


def test_half_of_the_arguments_leave_no_thread_waiting(jobs: Jobs, elsewhere: list[threading.Thread]) -> None:
    """They are more than the pipe takes: who writes them waits for a worker that will read nothing any more."""
    before = [thread for thread in _threads() if thread not in elsewhere]
    assert before
    worker = psutil.Process(jobs.submit(os.getpid).result(PATIENCE))
    worker.suspend()
    future = jobs.submit(len, bytes(8 << 20))
    until(lambda: jobs.state.running == 1)
    worker.kill()
    assert future.result(PATIENCE) == 8 << 20
    until(lambda: not any(thread.is_alive() for thread in before))


def _threads() -> list[threading.Thread]:
    """Of `loky`'s executors: one that reads and one that writes."""
    return [thread for thread in threading.enumerate() if thread.name in ("ExecutorManagerThread", "QueueFeederThread")]
