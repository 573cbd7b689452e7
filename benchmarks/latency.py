"""Question 3: how long from the last readout to the first image, and how much memory does a large scan take?

The real command ``recon serve`` runs in a process of its own; readouts are encoded beforehand and sent over loopback, so the
clock starts when the last byte (the CLOSE behind the last readout) has been handed to the kernel.

Memory is the server's process tree (PSS: pages shared by several processes count once) plus its scratch files in
memory-backed storage. The capture on disk is not counted: its pages belong to the file.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import psutil

from benchmarks.common import print_table, write_result
from gadgets.scratch import SCRATCH_PREFIX
from gadgets.wire import codec
from gadgets.wire.dtypes import ACQUISITION_HEADER
from gadgets.wire.events import Close, Image, Text
from gadgets.wire.framing import FrameParser

HEADER = """<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
<experimentalConditions><H1resonanceFrequency_Hz>128000000</H1resonanceFrequency_Hz></experimentalConditions>
<encoding><encodedSpace><matrixSize><x>{x2}</x><y>{y}</y><z>1</z></matrixSize>
<fieldOfView_mm><x>600</x><y>300</y><z>5</z></fieldOfView_mm></encodedSpace>
<reconSpace><matrixSize><x>{x}</x><y>{y}</y><z>1</z></matrixSize>
<fieldOfView_mm><x>300</x><y>300</y><z>5</z></fieldOfView_mm></reconSpace>
<encodingLimits><kspace_encoding_step_1><minimum>0</minimum><maximum>{last}</maximum><center>{centre}</center></kspace_encoding_step_1>
<slice><minimum>0</minimum><maximum>{last_slice}</maximum><center>0</center></slice></encodingLimits>
<trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"""


def readouts(matrix: int, coils: int, number: int) -> bytes:
    """One fully sampled slice of noise, two-fold oversampled, as wire bytes."""
    rng = np.random.default_rng(number)
    headers = np.zeros(matrix, ACQUISITION_HEADER)
    headers["version"] = 1
    headers["number_of_samples"] = 2 * matrix
    headers["center_sample"] = matrix
    headers["active_channels"] = headers["available_channels"] = coils
    headers["sample_time_us"] = 5
    headers["read_dir"], headers["phase_dir"], headers["slice_dir"] = (1, 0, 0), (0, 1, 0), (0, 0, 1)
    headers["position"] = (0, 0, 5 * number)
    headers["idx"]["kspace_encode_step_1"] = np.arange(matrix)
    headers["idx"]["slice"] = number
    headers["scan_counter"] = number * matrix + np.arange(matrix)
    samples = rng.standard_normal((matrix, coils, 4 * matrix), np.float32).view(np.complex64)
    return bytes(codec.acquisitions(headers, samples))


def header(matrix: int, slices: int) -> bytes:
    text = HEADER.format(x2=2 * matrix, x=matrix, y=matrix, last=matrix - 1, centre=matrix // 2, last_slice=slices - 1)
    return bytes(codec.config_file("fourier")) + bytes(codec.header(text))


@contextlib.contextmanager
def server(
    *options: str, spool: Path | None = None, log: IO[str] | None = None
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``recon serve`` on a free port, spool on: in a folder of its own, unless one is named. ``log`` takes what it says on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "gadgets.cli",
            "serve",
            "--port",
            "0",
            "--spool",
            str(spool or Path(folder) / "spool"),
        ]
        command += options or ["--log-level", "warning"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=Path(__file__).parent.parent)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.startswith("listening"):
                raise SystemExit("the server does not start")
            yield process, int(line.rsplit(":", 1)[1])
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


def scan(port: int, start: bytes, slices: list[bytes], repeat: int = 1) -> tuple[float, float, int]:
    """Seconds from the last byte sent to the first and to the last image, and the number of images."""
    times: list[float] = []
    texts: list[str] = []
    closed = threading.Event()
    with socket.create_connection(("127.0.0.1", port)) as connection:

        def receive() -> None:
            parser = FrameParser(role="client")
            while not closed.is_set():
                chunk = connection.recv(1 << 20)
                if not chunk:
                    break
                for event in parser.feed(memoryview(chunk)):
                    if isinstance(event, Image):
                        times.append(time.perf_counter())
                    elif isinstance(event, Text):
                        texts.append(event.text)
                    elif isinstance(event, Close):
                        closed.set()

        reader = threading.Thread(target=receive)
        reader.start()
        connection.sendall(start)
        for _ in range(repeat):
            for part in slices:
                connection.sendall(part)
        connection.sendall(codec.close())
        last = time.perf_counter()
        reader.join(300)
    if not times:
        raise SystemExit("no images: " + " ".join(texts))
    return times[0] - last, times[-1] - last, len(times)


class PeakMemory(threading.Thread):
    """Samples the process tree's PSS and its memory-backed scratch files."""

    def __init__(self, process: psutil.Process) -> None:
        super().__init__(daemon=True)
        self.process, self.peak, self.base = process, 0, 0
        self._stop_now = threading.Event()

    def sample(self) -> int:
        total = 0
        for p in [self.process, *self.process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += p.memory_full_info().pss
        for path in Path("/dev/shm").glob(f"{SCRATCH_PREFIX}*/*"):
            with contextlib.suppress(OSError):
                total += path.stat().st_blocks * 512
        return total

    def run(self) -> None:
        self.base = self.sample()
        while not self._stop_now.wait(0.05):
            self.peak = max(self.peak, self.sample())

    def stop(self) -> None:
        self._stop_now.set()
        self.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    one = [readouts(256, 32, 0)]
    with server() as (_, port):
        scan(port, header(256, 1), one)
        timed = [scan(port, header(256, 1), one) for _ in range(runs)]
    first = statistics.median(t[0] for t in timed)

    slices = [readouts(256, 32, number) for number in range(30)]
    raw = sum(map(len, slices))
    with server() as (process, port):
        scan(port, header(256, 1), one)
        memory = PeakMemory(psutil.Process(process.pid))
        memory.start()
        big_first, big_last, n_images = scan(port, header(256, len(slices)), slices)
        memory.stop()
    ratio = memory.peak / raw
    net = (memory.peak - memory.base) / raw
    columns = ["quantity", "measured", "target"]
    rows: list[list[object]] = [
        [f"last readout to first image, 256 x 256, 32 coils, fourier, s (median of {runs})", first, 0.1],
        ["slowest of these, s", max(t[0] for t in timed), ""],
        [f"raw size of the large scan, GB ({n_images} slices of 256 x 256, 32 coils)", raw / 1e9, ""],
        ["its last readout to first / last image, s", f"{big_first:.3f} / {big_last:.2f}", ""],
        ["peak memory of server and worker / raw size", ratio, 2.5],
        ["the same less the idle server's own", net, ""],
    ]
    print_table("latency and memory", columns, rows)
    write_result("latency", {"columns": columns, "rows": rows, "all_first_image_s": [t[0] for t in timed], "raw_bytes": raw})
    if first > 0.1 or ratio > 2.5:
        raise SystemExit("target missed")


if __name__ == "__main__":
    main()
