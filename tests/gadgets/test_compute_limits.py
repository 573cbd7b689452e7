"""Limits of computing: time, turns, the machine for itself, workers that cannot start. Real processes, really ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gadgets.compute_local import worker_environment
from gadgets.compute_pool import Budget
from gadgets.errors import JobFailed, SchedulerError, TimeLimitReached, WorkerKilled
from gadgets.fair_queue import REPLAY
from gadgets.jobs import Jobs
from gadgets.scheduler_options import SchedulerOptions
from tests.gadgets.worker_tasks import die, process_id
from tests.waiting import PATIENCE, is_alive, until


@pytest.fixture(scope="module")
def pair() -> Iterator[Jobs]:
    jobs = Jobs(2, threads=1, rehearse=False)
    jobs.warm()
    yield jobs
    jobs.close()


def busy_for_ever(marker: str) -> None:
    """Says who it is and never comes back."""
    note(marker)
    while True:
        pass


def note(marker: str) -> None:
    part = Path(marker + ".part")
    part.write_text(str(os.getpid()))
    part.rename(marker)


def wait_for(marker: str, go: str) -> None:
    """Says that it runs and waits for the word."""
    note(marker)
    while not Path(go).exists():
        time.sleep(0.01)


def test_a_task_that_takes_too_long_is_ended_with_its_process(pair: Jobs, tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    scope, budget = pair.scope(), Budget(0.3, name="llr")
    late = scope.submit(busy_for_ever, str(marker), budget=budget)
    with pytest.raises(TimeLimitReached, match=r"llr: not done within the time limit; got 0\.3 s"):
        late.result(PATIENCE)
    with pytest.raises(TimeLimitReached):  # what is left of the scan is not even begun
        scope.submit(process_id, budget=budget).result(PATIENCE)
    if marker.exists():
        until(lambda: not is_alive(int(marker.read_text())), "the process still runs")
    assert pair.submit(process_id).result(PATIENCE) != os.getpid()


def test_the_others_go_on_while_a_process_is_ended(pair: Jobs, tmp_path: Path) -> None:
    other, go = tmp_path / "other", tmp_path / "go"
    innocent = pair.submit(wait_for, str(other), str(go))
    until(other.exists, "the first task did not begin")
    pid = int(other.read_text())
    with pytest.raises(TimeLimitReached):
        pair.scope().submit(busy_for_ever, str(tmp_path / "x"), budget=Budget(0.3, name="x")).result(PATIENCE)
    with pytest.raises(WorkerKilled, match="died twice"):
        pair.submit(die).result(PATIENCE)
    assert is_alive(pid) and int(other.read_text()) == pid
    go.touch()
    innocent.result(PATIENCE)


def test_waiting_for_a_worker_costs_no_time_of_the_limit(pair: Jobs, tmp_path: Path) -> None:
    go = tmp_path / "go"
    first = [pair.submit(wait_for, str(tmp_path / f"m{n}"), str(go)) for n in range(2)]
    until(lambda: all((tmp_path / f"m{n}").exists() for n in range(2)), "not begun")
    budget = Budget(PATIENCE, name="llr")
    waiting = pair.scope().submit(process_id, budget=budget)
    assert budget.left(time.monotonic() + 1000.0) == PATIENCE
    go.touch()
    assert waiting.result(PATIENCE) != os.getpid()
    for future in first:
        future.result(PATIENCE)


def test_a_scan_that_comes_later_has_its_turn(pair: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both workers and twelve waiting slices belong to one scan: another's preview is next all the same, a replay's comes last."""
    go = tmp_path / "go"
    long, live, replay = pair.scope(), pair.scope(), pair.scope(REPLAY)
    for n in range(2):
        long.submit(wait_for, str(tmp_path / f"m{n}"), str(go))
    until(lambda: all((tmp_path / f"m{n}").exists() for n in range(2)), "not begun")
    order: list[object] = []
    began = pair.began
    monkeypatch.setattr(pair, "began", lambda task: (order.append(task.owner), began(task)))
    futures = [scope.submit(process_id) for scope, n in ((replay, 1), (long, 12), (live, 1)) for _ in range(n)]
    go.touch()
    for future in futures:
        future.result(PATIENCE)
    assert order == [live, *[long] * 12, replay]


def test_a_task_that_wants_the_machine_for_itself_gets_it(pair: Jobs, tmp_path: Path) -> None:
    go, free = tmp_path / "go", tmp_path / "free"
    first = pair.submit(wait_for, str(tmp_path / "first"), str(go))
    until((tmp_path / "first").exists, "not begun")
    scope = pair.scope()
    alone = scope.submit(wait_for, str(tmp_path / "alone"), str(free), alone=True)
    after = pair.submit(process_id)
    assert pair.state.running == 1  # the other worker is idle, and stays so
    go.touch()
    until((tmp_path / "alone").exists, "it never got the machine")
    first.result(PATIENCE)
    assert not after.done() and pair.state.running == 1
    free.touch()
    alone.result(PATIENCE)
    assert after.result(PATIENCE) != os.getpid()


def test_a_task_that_does_not_notice_that_its_scan_was_given_up_is_ended(
    pair: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gadgets.jobs.ABANDONED_SECONDS", 0.2)
    marker, scope = tmp_path / "pid", pair.scope()
    future = scope.submit(busy_for_ever, str(marker))
    until(marker.exists, "not begun")
    scope.abandon()
    with pytest.raises(JobFailed, match="given up"):
        future.result(PATIENCE)
    until(lambda: not is_alive(int(marker.read_text())), "the process still runs")


def test_in_this_process_a_late_task_is_left_behind(tmp_path: Path) -> None:
    jobs, go = Jobs(0), tmp_path / "go"
    late = jobs.scope().submit(wait_for, str(tmp_path / "m"), str(go), budget=Budget(0.1, name="llr"))
    with pytest.raises(TimeLimitReached):
        late.result(PATIENCE)
    assert jobs.submit(process_id).result(PATIENCE) == os.getpid()
    go.touch()
    jobs.close()


def test_tasks_are_told_when_the_server_stops(tmp_path: Path) -> None:
    jobs = Jobs(1, threads=1, rehearse=False)
    running = jobs.submit(busy_for_ever, str(tmp_path / "pid"))
    waiting = jobs.submit(process_id)
    until((tmp_path / "pid").exists, "not begun")
    jobs.close()
    for future in (running, waiting, jobs.submit(process_id)):
        with pytest.raises(JobFailed, match="stopping"):
            future.result(PATIENCE)
    until(lambda: not is_alive(int((tmp_path / "pid").read_text())), "the process still runs")


def test_workers_that_cannot_start_are_an_error_and_no_endless_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gadgets.compute_local.start_worker", os._exit)
    jobs = Jobs(1, threads=1)
    with pytest.raises(JobFailed, match="no worker process can be started"):
        jobs.submit(process_id).result(PATIENCE)
    with pytest.raises(JobFailed, match="no worker process can be started"):
        jobs.warm()
    jobs.close()


@pytest.mark.parametrize("container", [None, 3 << 30])
def test_a_worker_may_grow_by_a_scan_but_not_without_end(
    container: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gadgets.storage_room.GROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{container or 'max'}\n")
    memory = container or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for workers in (1, 4, 4096):
        limit = int(worker_environment(workers, 0, 0, {})["LOKY_MAX_MEMORY_LEAK_SIZE"])
        assert limit == max(1 << 30, memory // (2 * workers))


@pytest.mark.parametrize(
    ("devices", "given", "expected"),
    [(0, "", [None] * 3), (1, "", [None] * 3), (2, "", ["0", "1", "0"]), (2, "3,GPU-ab", ["3", "GPU-ab", "3"])],
)
def test_each_worker_has_a_gpu_of_its_own_where_there_are_several(
    devices: int, given: str, expected: list[str | None]
) -> None:
    found = [worker_environment(3, number, devices, {"CUDA_VISIBLE_DEVICES": given}) for number in range(3)]
    assert [environment.get("CUDA_VISIBLE_DEVICES") for environment in found] == expected


# ---- which scheduler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "address", ["local:1", "local:8", "tcp://127.0.0.1:8786", "tcp://[::1]:8786", "tcp://localhost:8786"]
)
def test_schedulers_on_this_machine_need_nothing(address: str) -> None:
    assert SchedulerOptions(address).address == address


@pytest.mark.parametrize(
    "address",
    [
        "", "tcp://", "tcp://host", "tcp://host:port", "http://host:8786", "tcp://host:99999", "local:0", "local:1000", "local:x", "8786",
        "tcp://user@127.0.0.1:8786", "tcp://127.0.0.1:8786/path", "ucx://127.0.0.1:8786", "tcp://[::1:8786",
    ],
)  # fmt: skip
def test_what_is_no_scheduler(address: str) -> None:
    with pytest.raises(SchedulerError):
        SchedulerOptions(address)


@pytest.mark.parametrize(
    "address", ["tcp://10.1.2.3:8786", "tcp://192.0.2.7:8786", "tcp://0.0.0.0:8786", "tcp://[2001:db8::1]:8786"]
)
def test_an_open_network_has_to_be_asked_for(address: str) -> None:
    with pytest.raises(SchedulerError, match="run code"):
        SchedulerOptions(address)
    assert SchedulerOptions(address, insecure=True).insecure


def test_tls_needs_all_certificates(tmp_path: Path) -> None:
    there = tmp_path / "x.pem"
    there.touch()
    with pytest.raises(SchedulerError, match="no ca, key"):
        SchedulerOptions("tls://10.1.2.3:8786", cert=there)
    with pytest.raises(SchedulerError, match="no such file"):
        SchedulerOptions("tls://10.1.2.3:8786", there, there, tmp_path / "missing.pem")
    assert SchedulerOptions("tls://10.1.2.3:8786", there, there, there).address == "tls://10.1.2.3:8786"
