"""Slices on this machine's own workers: killed in the middle, and taking too long. The operator gets images."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gadgets.scratch import SCRATCH_PREFIX
from gadgets.service import Service, ServiceOptions
from tests.e2e.scans import SimulatedScan, ask, complaints, final_images, in_memory, stack
from tests.e2e.slow_chain import site_chains
from tests.waiting import is_alive, until


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=2, slices=2, calibration="separate", acs=16)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("site")
    options = ServiceOptions(
        port=0, workers=1, threads=1, rehearse=False, configs=site_chains(folder / "configs"), time_limit=600.0
    )
    with Service(options) as running:
        yield running


def a_slice_began() -> bool:
    """A slice reports as soon as its task runs; this process has no other scan."""
    own = f"{SCRATCH_PREFIX}{os.getpid()}-*/*.progress"
    return any(any(Path(root).glob(own)) for root in ("/dev/shm", tempfile.gettempdir()))


def test_a_worker_that_is_killed_in_mid_slice_costs_no_image(server: Service, scan: SimulatedScan) -> None:
    expected = stack(final_images(ask(server, "long", scan)), 2)
    pid = server.jobs.submit(os.getpid).result(120)

    def kill() -> None:
        until(a_slice_began, "no slice began")
        os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    answer = ask(server, "long", scan)
    killer.join()
    until(lambda: not is_alive(pid))
    assert server.jobs.state.deaths == 1
    assert not complaints(answer)
    np.testing.assert_array_equal(stack(final_images(answer), 2), expected)


def test_what_takes_too_long_is_ended_and_the_fallback_answers(server: Service, scan: SimulatedScan) -> None:
    pid = server.jobs.submit(os.getpid).result(120)
    answer = ask(server, "late", scan)
    assert len(answer.images) == 4
    assert all("quick_instead_of_late" in image.attributes for image in answer.images)
    assert len(complaints(answer)) == 2
    assert all("not done within the time limit" in text and "come from quick" in text for text in complaints(answer))
    until(lambda: not is_alive(pid), "the worker still computes")
    assert server.jobs.state.stopped == 1  # the second slice was not even begun


def test_limits_that_are_none(server: Service, scan: SimulatedScan) -> None:
    (text,) = [text for text in ask(server, "endless", scan, time_limit=-1).texts if text.startswith("ERROR")]
    assert "SettingError" in text and "time_limit" in text
