"""How many readouts per second reach the buffer, spool on, also while a compute worker is fully busy?

A separate process plays a pre-made byte stream over loopback (``sendfile``) and stops its clock at the server's CLOSE, so
that every byte has been received, written to the spool, framed and indexed. Beside it, in the same run and with the same
streams, the reading loop of pip ``gadgetron`` (its ``Connection``; it stores nothing and keeps nothing).

    python -m benchmarks.ingest [--runs 5] [--spool DIR]
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import print_table, write_result
from gadgets.buffer import ReadoutIndex
from gadgets.chain import load_chain
from gadgets.handlers import ChainRequest, OpenScan, Say, ScanFacts
from gadgets.jobs import Jobs
from gadgets.pipeline import Scan, Services
from gadgets.server import Server
from gadgets.spool import ScanLog, Spool
from gadgets.wire import codec
from gadgets.wire.dtypes import ACQUISITION_HEADER
from gadgets.wire.events import Readouts, Waveform
from gadgets.wire.header import parse_header

HEADER = """<?xml version="1.0"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
 <acquisitionSystemInformation><receiverChannels>{channels}</receiverChannels></acquisitionSystemInformation>
 <experimentalConditions><H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz></experimentalConditions>
 <encoding>
  <encodedSpace><matrixSize><x>{x}</x><y>256</y><z>1</z></matrixSize><fieldOfView_mm><x>600</x><y>300</y><z>6</z></fieldOfView_mm></encodedSpace>
  <reconSpace><matrixSize><x>{half}</x><y>256</y><z>1</z></matrixSize><fieldOfView_mm><x>300</x><y>300</y><z>6</z></fieldOfView_mm></reconSpace>
  <encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>255</maximum><center>128</center></kspace_encoding_step_1></encodingLimits>
  <trajectory>cartesian</trajectory>
 </encoding>
</ismrmrdHeader>"""


@dataclass(frozen=True)
class Case:
    """One shape of readouts and the rate that the project has promised."""

    name: str
    channels: int
    samples: int
    readouts: int
    target: float


CASES = (Case("32 x 512", 32, 512, 7680, 10_000.0), Case("4 x 128", 4, 128, 102_400, 100_000.0))


def write_stream(path: Path, case: Case) -> None:
    """A whole session in Gadgetron's dialect; CONFIG_SCRIPT, because pip gadgetron knows no other."""
    rng = np.random.default_rng(1)
    block = 256
    samples = rng.standard_normal((block, case.channels, 2 * case.samples), np.float32).view(np.complex64)
    with path.open("wb") as file:
        file.write(codec.config_script("ingest"))
        file.write(codec.header(HEADER.format(channels=case.channels, x=case.samples, half=case.samples // 2)))
        for first in range(0, case.readouts, block):
            heads = np.zeros(block, ACQUISITION_HEADER)
            heads["version"], heads["scan_counter"] = 1, np.arange(first, first + block)
            heads["available_channels"] = case.channels
            heads["center_sample"], heads["sample_time_us"] = case.samples // 2, 5.0
            heads["idx"]["kspace_encode_step_1"], heads["idx"]["repetition"] = np.arange(block), first // block
            file.write(codec.acquisitions(heads, samples))
        file.write(codec.close())


def play(port: int, path: str, answer: Pipe) -> None:
    """The sender's process: everything as fast as it goes, then wait for CLOSE. Answers with the seconds that it took."""
    with socket.create_connection(("127.0.0.1", port)) as connection, open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        started = time.perf_counter()
        at = 0
        while at < size:
            at += os.sendfile(connection.fileno(), file.fileno(), at, size - at)
        tail = b""
        while piece := connection.recv(1 << 16):
            tail = (tail + piece)[-2:]
            if tail == b"\x04\x00":
                break
        answer.send(time.perf_counter() - started if tail == b"\x04\x00" else float("nan"))


class IndexOnly:
    """A scan that goes as far as the buffer: every header and offset is kept, nothing is computed."""

    def __init__(self, request: ChainRequest, header: str, raw: ScanLog, say: Say) -> None:
        self.index = ReadoutIndex()
        self.facts = ScanFacts()
        IndexOnly.last = self

    last: IndexOnly

    def readouts(self, event: Readouts) -> None:
        self.index.append(event.headers, event.offsets, event.payload_bytes)

    def waveform(self, event: Waveform) -> None:
        pass

    def finish(self) -> Iterator[bytes]:
        yield codec.text(f"INF {len(self.index)} readouts\n")

    def abandon(self) -> None:
        pass


def ours(path: Path, case: Case, spool: Path) -> float:
    """Seconds for one stream through the server, spool on."""
    return _through(path, case, spool, IndexOnly)


def _through(path: Path, case: Case, spool: Path, open_scan: OpenScan) -> float:
    with Server(port=0, open_scan=open_scan, spool=Spool(spool)) as server:
        seconds = _play(server.port, path)
    stored = sum(capture.stat().st_size for capture in spool.glob("*.mrd"))
    if stored != path.stat().st_size:
        raise SystemExit(f"{case.name}: {stored} bytes in the spool, {path.stat().st_size} sent")
    shutil.rmtree(spool)  # one capture at a time: the disk's cache is not the question
    received = len(IndexOnly.last.index)
    if received != case.readouts:
        raise SystemExit(f"{case.name}: {received} of {case.readouts} readouts arrived")
    return seconds


def gadgetron(path: Path, case: Case, spool: Path) -> float:
    """Seconds for one stream through pip gadgetron's Connection; the readouts are dropped."""
    from gadgetron.external.connection import Connection

    logging.getLogger().setLevel(logging.ERROR)  # it warns that our configuration is no XML
    listener = socket.create_server(("127.0.0.1", 0))
    with listener:
        return _play(listener.getsockname()[1], path, lambda: _drop_all(Connection, listener, case))


def _drop_all(kind: type, listener: socket.socket, case: Case) -> None:
    accepted, _ = listener.accept()
    with kind(accepted) as connection:
        received = sum(1 for _ in connection)
    if received != case.readouts:
        raise SystemExit(f"gadgetron: {received} of {case.readouts} readouts arrived")


def _play(port: int, path: Path, serve: Callable[[], None] | None = None) -> float:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    sender = context.Process(target=play, args=(port, str(path), there), daemon=True)
    sender.start()
    if serve is not None:
        serve()
    if not here.poll(120):
        raise SystemExit("the sender has not finished")
    seconds = float(here.recv())
    sender.join()
    return seconds


class Preparing(Scan):
    """The real scan up to the last readout: whitening, readout transform and crop run in the worker while it is read."""

    def finish(self) -> Iterator[bytes]:
        IndexOnly.last = self  # type: ignore[assignment]  # both have an index
        self.abandon()
        yield codec.text(f"INF {len(self.index)} readouts\n")


def preparing(path: Path, case: Case, spool: Path) -> float:
    """Seconds for one stream through the server, spool on, while a worker prepares what has arrived."""
    services = Services(WORKER)

    def open_scan(request: ChainRequest, header: str, raw: ScanLog, say: Say) -> Scan:
        return Preparing(load_chain("fourier"), parse_header(header), raw, services, say)

    return _through(path, case, spool, open_scan)


WORKER = Jobs(1, threads=1)


def compute_for_ever() -> None:
    """A compute worker that is never idle: FFTs of a 32-coil slice."""
    data = np.random.default_rng(0).standard_normal((32, 256, 512)).astype(np.complex64)
    while True:
        np.fft.ifft2(data)


@contextmanager
def busy(active: bool) -> Iterator[None]:
    """While inside, one of our worker processes computes (when ``active``)."""
    if not active:
        yield
        return
    worker = Jobs(1, threads=1)
    worker.warm()
    worker.submit(compute_for_ever)
    try:
        yield
    finally:
        worker.close()


SERVERS = {
    "recon-gadgets, spool on": ours,
    "the same, and preparing in a worker": preparing,
    "pip gadgetron Connection, discards": gadgetron,
}


def compare(stream: Path, case: Case, spool: Path, runs: int) -> dict[str, list[float]]:
    """Seconds of every run; the servers take turns, so that what else the machine does hits both. The first turn is dropped."""
    found: dict[str, list[float]] = {name: [] for name in SERVERS}
    for _ in range(runs + 1):
        for name, server in SERVERS.items():
            found[name].append(server(stream, case, spool))
    return {name: seconds[1:] for name, seconds in found.items()}


@contextmanager
def stream_folder() -> Iterator[Path]:
    """In memory where there is room, so that the disk is left to the spool."""
    shared = Path("/dev/shm")
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 3 << 30
    with tempfile.TemporaryDirectory(prefix="ingest-", dir=shared if roomy else None) as folder:
        yield Path(folder)


def main(arguments: list[str] | None = None) -> None:
    """Run every case and write ``results/ingest.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--spool", type=Path, help="where captures go; default: the temporary directory")
    chosen = parser.parse_args(arguments)
    rows: list[list[Any]] = []
    results: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ingest-", dir=chosen.spool) as folder, stream_folder() as streams:
        WORKER.warm()
        for case in CASES:
            stream = streams / "stream.bin"
            write_stream(stream, case)
            for compute in (False, True):
                with busy(compute):
                    seconds = compare(stream, case, Path(folder) / "spool", chosen.runs)
                for name, server in SERVERS.items():
                    median = statistics.median(seconds[name])
                    rate, megabytes = case.readouts / median, stream.stat().st_size / median / 1e6
                    target = case.target * (0.5 if compute else 1.0) if server is ours else None
                    met = None if target is None else rate >= target
                    worker = "busy" if compute else "idle"
                    shown = {True: "yes", False: "NO", None: ""}[met]
                    rows.append([case.name, name, worker, rate, megabytes, target or "", shown])
                    results.append(
                        {
                            "readout": case.name, "server": name, "worker": worker,
                            "readouts_per_second": round(rate), "megabytes_per_second": round(megabytes),
                            "seconds": [round(s, 4) for s in seconds[name]], "readouts": case.readouts,
                            "target": target, "target_met": met,
                        }
                    )  # fmt: skip
    columns = ["coils x samples", "server", "worker", "readouts/s", "MB/s", "target", "met"]
    print_table("Ingest over loopback (median of runs; sender, server and worker share the cores)", columns, rows)
    print(write_result("ingest", {"runs": chosen.runs, "load_before": round(load, 2), "rows": results}))


if __name__ == "__main__":
    main()
