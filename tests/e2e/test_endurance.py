"""Many scans in a row, good and bad ones: nothing piles up."""

from __future__ import annotations

import gc
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from gadgets.scratch import SCRATCH_PREFIX
from gadgets.service import Service
from gadgets.wire import codec
from gadgets.wire.dtypes import Flag, flag_bits
from tests.e2e.scans import SimulatedScan, ask, complaints, encoded, in_memory, stack
from tests.waiting import PATIENCE, until

SCANS = 40
MAX_GROWTH = 32 << 20  # bytes; one scan that is not given back is 10 MiB and more


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return in_memory("cine", matrix_x=96, matrix_y=96, coils=8, states=4, slices=2)


def footprint(service: Service) -> tuple[int, int, list[str], int, list[int]]:
    """File descriptors of the server and of its workers, threads by name, memory of the server and of its workers."""
    for thread in threading.enumerate():
        if re.fullmatch(r"c\d+", thread.name):
            thread.join(PATIENCE)
    gc.collect()
    own = psutil.Process()
    workers = [child for child in own.children(recursive=True) if "loky" in " ".join(child.cmdline())]
    names = sorted(thread.name.split("_")[0] for thread in threading.enumerate())
    return (
        own.num_fds(),
        sum(worker.num_fds() for worker in workers),
        names,
        own.memory_info().rss,
        [worker.memory_info().rss for worker in workers],
    )


def settled(service: Service) -> tuple[int, int, list[str], int, list[int]]:
    """The footprint when the last connection has been accepted and is over: who has left may still wait to be accepted."""
    deadline = time.monotonic() + 60.0
    found = footprint(service)
    while time.monotonic() < deadline:
        time.sleep(1.0)
        before, found = found, footprint(service)
        if found[:3] == before[:3]:
            break
    return found


def abandon(service: Service, scan: SimulatedScan) -> None:
    """A client that leaves in the middle."""
    with socket.create_connection((service.host, service.port)) as connection:
        connection.sendall(codec.config_file("cg_sense") + codec.header(scan.header) + b"".join(scan.messages)[:-5000])


def test_forty_scans_leave_nothing_behind(service: Service, scan: SimulatedScan, caplog: pytest.LogCaptureFixture) -> None:
    broken = [(h.copy(), np.where(s == s.flat[0], np.nan, s)) for h, s in scan.stream.batches]
    good = [ask(service, "cg_sense", scan) for _ in range(3)]  # allocators and caches reach their size
    abandon(service, scan)
    before = settled(service)
    with caplog.at_level(logging.INFO):
        for number in range(SCANS):
            if number % 4 == 3:
                abandon(service, scan)
            elif number % 4 == 2:
                assert not ask(service, "fourier", scan, messages=encoded(broken)).images
            else:
                answer = ask(service, "cg_sense", scan)
                np.testing.assert_array_equal(stack(answer.images, 4), stack(good[0].images, 4))
    last = [settled(service)]

    def nothing_more() -> bool:
        last[0] = footprint(service)
        return last[0][0] <= before[0] and last[0][1] <= before[1] and last[0][2] == before[2]

    until(nothing_more, lambda: f"{last[0][:3]} where {before[:3]} was before")
    after = last[0]
    assert after[3] - before[3] < MAX_GROWTH
    assert all(b - a < MAX_GROWTH for a, b in zip(before[4], after[4], strict=True))
    assert "task_crashed" not in caplog.text and "event=crashed" not in caplog.text
    own = f"{SCRATCH_PREFIX}{os.getpid()}-*"
    until(lambda: not [*Path("/dev/shm").glob(own), *Path(os.environ.get("TMPDIR", "/tmp")).glob(own)])


def test_the_console_is_not_flooded_with_warnings(service: Service) -> None:
    many = in_memory("cine", matrix_x=24, matrix_y=24, coils=2, states=1, slices=24, calibration="separate", acs=8)

    def without_calibration() -> Iterator[bytes]:
        for headers, samples in many.stream.batches:
            calibration = (headers["flags"] & flag_bits(Flag.ACQ_IS_PARALLEL_CALIBRATION)) != 0
            yield bytes(codec.acquisitions(headers, np.where(calibration[:, None, None], 0, samples)))

    answer = ask(service, "cg_sense", many, messages=without_calibration())
    said = complaints(answer)
    assert len(answer.images) == 24 and len(said) == 21
    assert all("come from fourier" in text for text in said[:-1]) and "more warnings" in said[-1]
    assert len(set(said)) == len(said)
