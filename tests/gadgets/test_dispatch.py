"""The thread that hands out tasks: what fails beside it must not end it, and what it cannot do is said."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gadgets.compute_pool import Task
from gadgets.errors import JobFailed
from gadgets.jobs import Jobs
from tests.gadgets.worker_tasks import die, process_id
from tests.waiting import PATIENCE, until


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Jobs]:
    monkeypatch.setattr("gadgets.jobs.REST_SECONDS", 0.01)
    made = Jobs(0, threads=1, rehearse=False)
    yield made
    made.close()


def no_threads_called(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """The system has no thread of these names for us; what was asked for is noted."""
    start, refused = threading.Thread.start, list[str]()

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith(names):
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    return refused


def test_a_dead_worker_is_replaced_when_no_thread_can_be_had_to_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = Jobs(1, threads=1, rehearse=False)
    refused = no_threads_called(monkeypatch, "retire")
    with pytest.raises(JobFailed, match="died twice"):
        jobs.submit(die).result(PATIENCE)
    assert jobs.submit(abs, -3).result(PATIENCE) == 3
    assert refused
    jobs.close()


@pytest.mark.parametrize("failure", [RuntimeError("as planned"), MemoryError(), SystemExit()])
def test_a_failure_while_choosing_ends_nothing(
    failure: BaseException, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose, failures = jobs._choose, [failure]

    def fail_once() -> Any:
        if failures:
            raise failures.pop()
        return choose()

    monkeypatch.setattr(jobs, "_choose", fail_once)
    assert jobs.submit(abs, -3).result(PATIENCE) == 3
    assert f"event=dispatch_failed error={type(failure).__name__}" in caplog.text
    assert "as planned" not in caplog.text  # words may quote a scan


def test_a_task_that_cannot_be_begun_is_tried_again(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = no_threads_called(monkeypatch, "compute")
    future = jobs.submit(process_id)
    until(lambda: len(refused) > 2, "it was not tried again")
    monkeypatch.undo()
    assert future.result(PATIENCE)


def test_a_task_that_can_never_be_begun_is_an_error_and_the_others_run(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    start = jobs._local.start

    def refuse(task: Task) -> None:
        if task.function is die:
            raise OSError("no memory")
        start(task)

    monkeypatch.setattr(jobs._local, "start", refuse)
    poison, innocent = jobs.submit(die), jobs.submit(abs, -3)
    with pytest.raises(JobFailed, match="cannot be begun; got OSError"):
        poison.result(PATIENCE)
    assert innocent.result(PATIENCE) == 3
    assert jobs.state.running == 0


def test_a_task_that_cannot_be_stopped_is_late_again(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadgets.jobs.ABANDONED_SECONDS", 0.0)
    begun, go, stop, tries = threading.Event(), threading.Event(), jobs._local.stop, list[Task]()

    def fail_twice(task: Task) -> None:
        tries.append(task)
        if len(tries) < 3:
            raise RuntimeError("as planned")
        stop(task)

    monkeypatch.setattr(jobs._local, "stop", fail_twice)
    scope = jobs.scope()
    future = scope.submit(lambda: (begun.set(), go.wait(PATIENCE)))
    assert begun.wait(PATIENCE)
    scope.abandon()
    with pytest.raises(JobFailed, match="given up"):
        future.result(PATIENCE)
    assert len(tries) == 3
    until(lambda: jobs.state.stopped == 1, "it is not counted")  # behind the answer
    go.set()


def test_a_dispatcher_that_is_gone_is_replaced(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(jobs, "_dispatch", lambda: None)
        first = jobs.submit(abs, -1)
        assert jobs._dispatcher is not None
        jobs._dispatcher.join(PATIENCE)
        assert not first.done()
    assert jobs.submit(abs, -2).result(PATIENCE) == 2 and first.result(PATIENCE) == 1
    assert "event=dispatcher_gone waiting=1" in caplog.text
    with monkeypatch.context() as patched:  # those who watch are enough
        jobs._dispatcher = None
        patched.setattr(jobs, "_dispatch", lambda: None)
        left = jobs.submit(abs, -3)
    until(lambda: (jobs.state, left.done())[1], "nobody hands out")


def test_without_a_thread_to_hand_out_a_task_is_refused(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        no_threads_called(patched, "dispatch")
        with pytest.raises(JobFailed, match="no thread can be had"):
            jobs.submit(process_id).result(PATIENCE)
    assert jobs.submit(abs, -3).result(PATIENCE) == 3


def test_a_standstill_is_measured(jobs: Jobs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert jobs.state.stalled == 0.0
    caplog.set_level(logging.CRITICAL)
    with monkeypatch.context() as patched:
        patched.setattr(jobs._local, "free", lambda: False)
        waiting = jobs.submit(process_id)
        until(lambda: jobs.state.stalled > 0.05, "nothing begins, and nobody says so")
    begun, go = threading.Event(), threading.Event()
    busy = jobs.submit(lambda: (begun.set(), go.wait(PATIENCE)))
    assert begun.wait(PATIENCE)
    behind = jobs.submit(process_id)
    assert jobs.state.stalled == 0.0  # a task runs, however long
    go.set()
    for future in (waiting, busy, behind):
        future.result(PATIENCE)
    assert jobs.state.stalled == 0.0
