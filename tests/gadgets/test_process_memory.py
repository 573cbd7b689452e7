"""Memory of a server that runs for months: connections that are over leave nothing behind, threads share the allocator's areas."""

from __future__ import annotations

import gc
import os
import platform
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gadgets import process_memory
from gadgets.connection import Connection
from gadgets.dicom_identity import read_header_text
from gadgets.peer import Peer
from gadgets.pipeline import Scan
from gadgets.preparation import Preparation
from gadgets.raw_source import CapturedSession
from gadgets.readouts import ReadoutIndex
from gadgets.recovery import examine
from gadgets.scan_log import ScanLog
from gadgets.service import Service, ServiceOptions
from gadgets.wire import codec
from gadgets.wire.framing import FrameParser
from tests.e2e.scans import SimulatedScan, in_memory
from tests.strict_client import StrictClient
from tests.waiting import PATIENCE, until

OF_A_CONNECTION = (Connection, FrameParser, Peer, Preparation, ReadoutIndex, Scan, ScanLog)

ARRAYS_OF_A_WORKER = """
import resource, sys
import torch
if sys.argv[1] == "prepared":
    from gadgets.compute_worker import Prepare, versions
    Prepare(versions(), 1, rehearse=False).setup(None)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(1 << 20)  # the first of a size is new in any case
before = faults()
for _ in range(20):
    torch.ones(1 << 20)
print(faults() - before)
"""

ARENAS_OF_THREADS = """
import ctypes, sys, tempfile, threading
if sys.argv[1] == "shared":
    from gadgets.process_memory import bound_allocator
    assert bound_allocator()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
together = threading.Barrier(6)
def take():
    together.wait()  # six threads at once: a thread that ends hands its area on
    library.malloc(1000)
    together.wait()
threads = [threading.Thread(target=take) for _ in range(6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
with tempfile.NamedTemporaryFile() as file:
    library.fopen.restype = ctypes.c_void_p
    stream = ctypes.c_void_p(library.fopen(file.name.encode(), b"w"))
    library.malloc_info(0, stream)
    library.fclose(stream)
    print(file.read().count(b"<heap nr"))
"""


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return in_memory("cine", matrix_x=32, matrix_y=32, coils=2, states=2, slices=1)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    spool = tmp_path_factory.mktemp("memory") / "spool"
    options = ServiceOptions(port=0, workers=0, threads=1, spool=spool, observe=True, rehearse=False)
    with Service(options) as running:
        yield running


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What goes now goes because nobody refers to it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _whole(port: int, scan: SimulatedScan) -> None:
    answer = StrictClient("127.0.0.1", port, timeout=PATIENCE).scan("cg_sense", header=scan.header, messages=scan.messages)
    assert answer.images


def _send(port: int, data: bytes, *, reset: bool = False) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        connection.sendall(data)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass


def _reset(port: int, scan: SimulatedScan) -> None:
    _send(port, codec.config_file("fourier") + codec.header(scan.header) + b"".join(scan.messages), reset=True)


def _cut(port: int, scan: SimulatedScan) -> None:
    """In the middle of a readout, by a peer that reads on."""
    _send(port, codec.config_file("fourier") + codec.header(scan.header) + b"".join(scan.messages)[:-100])


def _left(port: int, scan: SimulatedScan) -> None:
    """After its CLOSE: taken up again by the server."""
    _send(
        port, codec.config_file("fourier") + codec.header(scan.header) + b"".join(scan.messages) + codec.close(), reset=True
    )


def _unknown_message(port: int, scan: SimulatedScan) -> None:
    data = b"".join(scan.messages)
    _send(port, codec.config_file("fourier") + codec.header(scan.header) + data + b"\x21\x43" + data)


def _other_channels(port: int, scan: SimulatedScan) -> None:
    """Refused by the scan itself, while it is read."""
    other = in_memory("cine", matrix_x=32, matrix_y=32, coils=3, states=1, slices=1)
    data = b"".join(scan.messages) + b"".join(other.messages)
    _send(port, codec.config_file("fourier") + codec.header(scan.header) + data + codec.close())


def _no_such_chain(port: int, scan: SimulatedScan) -> None:
    _send(port, codec.config_file("no-such-chain") + codec.header(scan.header) + codec.close())


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("send", [_whole, _reset, _cut, _left, _unknown_message, _other_channels, _no_such_chain])
def test_a_connection_that_is_over_is_gone_without_the_garbage_collector(
    service: Service, scan: SimulatedScan, send: Callable[[int, SimulatedScan], None]
) -> None:
    """Each in a circle would wait for hundreds of others, with the headers of all its readouts."""
    for _ in range(3):
        send(service.port, scan)
    until(lambda: not _left_behind(), lambda: f"left behind: {[type(thing).__name__ for thing in _left_behind()]}")


def _pieces(path: Path) -> int:
    return sum(len(piece.data) for piece in CapturedSession(path).pieces())


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("look", [examine, _pieces, read_header_text], ids=["examine", "replay", "header"])
@pytest.mark.parametrize("end", [None, -100], ids=["whole", "cut"])
def test_looking_through_a_capture_leaves_no_parser_behind(
    scan: SimulatedScan, tmp_path: Path, look: Callable[[Path], object], end: int | None
) -> None:
    stream = codec.config_file("fourier") + codec.header(scan.header) + b"".join(scan.messages) + codec.close()
    capture = tmp_path / "raw.mrd"
    capture.write_bytes(stream[:end])
    before = {id(thing) for thing in _left_behind()}
    look(capture)
    until(lambda: {id(thing) for thing in _left_behind()} <= before)  # the service may be at the scans that were left to it


def _left_behind() -> list[object]:
    return [thing for thing in gc.get_objects() if type(thing) in OF_A_CONNECTION]


def test_threads_share_few_areas() -> None:
    """Six threads at once take an area each, unless told otherwise; other C libraries than glibc have none."""
    if platform.libc_ver()[0] != "glibc":
        assert not process_memory.bound_allocator()
        return
    assert _arenas("own") > process_memory.ARENAS
    assert _arenas("shared") <= process_memory.ARENAS


def _arenas(how: str) -> int:
    ended = subprocess.run(
        [sys.executable, "-c", ARENAS_OF_THREADS, how], capture_output=True, text=True, timeout=PATIENCE, check=True
    )
    return int(ended.stdout)


def test_a_dask_worker_keeps_the_memory_of_its_arrays() -> None:
    """With Dask's own setting an array of 4 MiB costs a page fault for every page, each time."""
    if platform.libc_ver()[0] != "glibc":
        assert not process_memory.keep_freed_memory()
        return
    assert _page_faults_of_arrays("prepared") < 0.1 * _page_faults_of_arrays("as Dask starts it")


def _page_faults_of_arrays(how: str) -> int:
    """Of twenty arrays of 1024 pages each, one after the other."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "65536"}
    ended = subprocess.run(
        [sys.executable, "-c", ARRAYS_OF_A_WORKER, how],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
        env=environment,
    )
    return int(ended.stdout)


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        """Has none of glibc's functions."""

    monkeypatch.setattr("ctypes.CDLL", lambda name: Other())
    assert not process_memory.bound_allocator()
    assert not process_memory.keep_freed_memory()
    process_memory.tidy()


def test_tidying_goes_on_until_the_server_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    done, stop = threading.Semaphore(0), threading.Event()
    monkeypatch.setattr(process_memory, "tidy", done.release)
    thread = threading.Thread(target=process_memory.tidy_until, args=(stop, 0.001))
    thread.start()
    assert done.acquire(timeout=PATIENCE) and done.acquire(timeout=PATIENCE)
    stop.set()
    thread.join(PATIENCE)
    assert not thread.is_alive()


SERVE = """
import sys
from gadgets import process_memory as memory
def told(name, real):
    def tell(*given):
        print(name, flush=True)
        return real(*given)
    return tell
for name in ("bound_allocator", "settle", "tidy"):
    setattr(memory, name, told(name, getattr(memory, name)))
memory.tidy_until.__defaults__ = (0.01,)
sys.argv = ["recon", "serve", "--port", "0", "--workers", "0", "--no-keep-raw", "--log-level", "error"]
import atexit, gc
from gadgets.cli import main
# registered before the command's own, so run after it
atexit.register(lambda: print("frozen", gc.get_freeze_count(), gc.isenabled(), flush=True))
try:
    main()
finally:
    print("imported", *(name for name in ("numba", "torch._dynamo", "sympy") if name in sys.modules), flush=True)
    gc.unfreeze()
"""


def test_the_command_does_all_of_it_in_this_order(tmp_path: Path) -> None:
    """And its rehearsal of every method imports neither torch's compiler nor sympy: 3 s of each worker's start."""
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        assert server.stdout is not None
        lines = [server.stdout.readline().split()[:1] for _ in range(4)]
        server.terminate()
        rest = [line.split() for line in server.stdout.read().splitlines()]
        assert server.wait(PATIENCE) == 0
    assert lines == [["bound_allocator"], ["listening"], ["settle"], ["tidy"]]
    imported, frozen = [words for words in rest if words != ["tidy"]]
    assert imported == ["imported", "numba"]
    assert int(frozen[1]) > 100_000 and frozen[2] == "True", "the end looks at nothing"
