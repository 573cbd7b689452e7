"""Four scanners at once, 600 readouts/s each with 32 coils, while a reconstruction runs: is any of them ever held up?

The command ``recon serve`` runs in a process of its own, with its raw captures on disk. Each scanner is a process that hands its
readouts to the kernel one by one, on a schedule; a fifth client keeps the server's worker busy with an iterative reconstruction. For
every readout two times are measured against the schedule:

``handed over``  when the kernel had taken it: late when the connection was full, which is what a scanner would notice
``in the log``   when the server had written it to its raw capture (the capture's size, looked at 200 times a second)

``late start`` counts readouts that the sender itself began over 50 ms late, because it got no processor; ``over 50 ms`` those whose
send took longer than that: back-pressure. The sender's buffer is small (512 KiB, 8 readouts), so that it cannot hide much.

    python -m benchmarks.scanners [--seconds 8] [--scanners 4] [--spool DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import print_table, write_result
from gadgets.simulate import simulate_stream
from gadgets.wire import codec

RATE, COILS, LINES = 600.0, 32, 128
LOOK = 0.005
LATE = 0.05
"""s that count as late: thirty readouts."""

SEND_BUFFER = 512 << 10

COLUMNS = (
    "scanner", "reconstruction", "readouts", "readouts/s", "handed over p50 ms", "p99 ms", "max ms", "late start", "over 50 ms",
    "in the log p50 ms", "log p99 ms", "log max ms", "images after s",
)  # fmt: skip


@dataclass(frozen=True)
class Recording:
    """A scan as one file of wire messages: where each readout begins and ends in it, and what goes before them."""

    path: str
    start: bytes
    ends: NDArray[np.int64]


def record(folder: Path, seconds: float) -> Recording:
    """Simulate one scanner's cine of about so many seconds; the same for all of them."""
    states = max(1, round(seconds * RATE / LINES))
    stream = simulate_stream(
        "cine", {"matrix_x": LINES, "matrix_y": LINES, "coils": COILS, "states": states, "waveforms": False}
    )
    path, ends = folder / "scan.bin", []
    with path.open("wb") as file:
        for headers, samples in stream.batches:
            for i in range(len(headers)):
                file.write(codec.acquisitions(headers[i : i + 1], samples[i : i + 1]))
                ends.append(file.tell())
    start = bytes(codec.config_file("fourier")) + bytes(codec.header(stream.header_text))
    return Recording(str(path), start, np.array(ends))


def scanner(port: int, recording: Recording, go: Any, answer: Pipe) -> None:
    """A scanner's process. Answers with the times at which each send began and ended, and that of the last image."""
    n = len(recording.ends)
    began, ended = np.zeros(n), np.zeros(n)
    with (
        socket.create_connection(("127.0.0.1", port)) as connection,
        open(recording.path, "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        connection.sendall(recording.start)
        answer.send("ready")
        go.wait()
        zero, at = time.monotonic() + 0.2, 0
        for i, end in enumerate(recording.ends.tolist()):
            due = zero + i / RATE
            while (left := due - time.monotonic()) > 0:
                time.sleep(left)
            began[i] = time.monotonic() - due
            connection.sendall(view[at:end])
            ended[i] = time.monotonic() - due
            at = end
        connection.sendall(codec.close())
        closed = time.monotonic()
        connection.settimeout(600.0)
        tail, received = b"", 0
        while piece := connection.recv(1 << 20):
            received += len(piece)
            tail = (tail + piece)[-2:]
            if tail == b"\x04\x00":
                break
        answer.send((zero, began, ended, time.monotonic() - closed, received))


class CaptureSizes(threading.Thread):
    """Watches how captures grow: ``(time, size)`` by file, 200 times a second."""

    def __init__(self, spool: Path) -> None:
        super().__init__(daemon=True)
        self.spool, self.seen = spool, {}
        self._over = threading.Event()

    seen: dict[str, list[tuple[float, int]]]

    def run(self) -> None:
        while not self._over.wait(LOOK):
            with contextlib.suppress(OSError), os.scandir(self.spool) as entries:
                for entry in entries:
                    if entry.name.endswith(".mrd"):
                        samples = self.seen.setdefault(entry.name, [])
                        size = entry.stat().st_size
                        if not samples or samples[-1][1] != size:
                            samples.append((time.monotonic(), size))

    def stop(self) -> None:
        self._over.set()
        self.join()


@contextlib.contextmanager
def server(spool: Path) -> Iterator[int]:
    """``recon serve`` with its defaults, on a free port."""
    command = [sys.executable, "-m", "gadgets.cli", "serve", "--port", "0", "--spool", str(spool), "--log-level", "error"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline().rsplit(":", 1)[1])
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@contextlib.contextmanager
def reconstruction(port: int) -> Iterator[list[str]]:
    """While inside, the server's worker computes: forty slices by an iterative method. The texts that it sends."""
    stream = simulate_stream(
        "cine",
        {"matrix_x": 64, "matrix_y": 64, "coils": 8, "states": 10, "slices": 40, "mask": "vista", "acceleration": 4.0,
         "waveforms": False},
    )  # fmt: skip
    texts: list[str] = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(codec.config_file("llr"))
        connection.sendall(codec.header(stream.header_text))
        for headers, samples in stream.batches:
            connection.sendall(codec.acquisitions(headers, samples))
        connection.sendall(codec.close())

        def read() -> None:
            with contextlib.suppress(OSError):
                while piece := connection.recv(1 << 16):
                    texts.extend(part.decode("ascii", "ignore") for part in piece.split(b"\n") if b"DBG llr" in part)

        reader = threading.Thread(target=read, daemon=True)
        reader.start()
        while not texts:  # it computes
            time.sleep(0.05)
        yield texts
        connection.shutdown(socket.SHUT_RDWR)


def measure(port: int, spool: Path, recording: Recording, n: int) -> list[dict[str, Any]]:
    """One row for each scanner."""
    context = multiprocessing.get_context("spawn")
    go, sizes = context.Event(), CaptureSizes(spool)
    processes, pipes, names = [], [], []
    for _ in range(n):
        known = {path.name for path in spool.glob("*.mrd")}
        here, there = context.Pipe()
        process = context.Process(target=scanner, args=(port, recording, go, there), daemon=True)
        process.start()
        assert here.recv() == "ready"
        while not (fresh := {path.name for path in spool.glob("*.mrd")} - known):
            time.sleep(0.01)
        processes.append(process)
        pipes.append(here)
        names.append(fresh.pop())
    sizes.start()
    go.set()
    answers = [pipe.recv() for pipe in pipes]
    sizes.stop()
    for process in processes:
        process.join()
    return [
        row(number, answer, sizes.seen[name], recording)
        for number, (answer, name) in enumerate(zip(answers, names, strict=True))
    ]


def row(number: int, answer: Any, grown: list[tuple[float, int]], recording: Recording) -> dict[str, Any]:
    zero, began, ended, seconds, received = answer
    due = zero + np.arange(len(ended)) / RATE
    times, bytes_there = (np.array(column, float) for column in zip(*grown, strict=True))
    at = np.searchsorted(bytes_there, len(recording.start) + recording.ends)
    if at.max() >= len(times):
        raise SystemExit("a capture is not complete")
    logged = times[at] - due
    blocked = ended - began

    def ms(values: NDArray[np.float64], quantile: float) -> float:
        return round(1000 * float(np.quantile(values, quantile)), 2)

    return {
        "scanner": number + 1, "readouts": len(ended), "bytes": int(recording.ends[-1]),
        "readouts_per_second": round(float((len(ended) - 1) / (due[-1] + ended[-1] - due[0])), 1),
        "handed_over_ms": [ms(ended, q) for q in (0.5, 0.99, 1.0)],
        "blocked_ms": [ms(blocked, q) for q in (0.5, 0.99, 1.0)],
        "late_start": int((began > LATE).sum()), "over_50_ms": int((blocked > LATE).sum()),
        "in_the_log_ms": [ms(logged, q) for q in (0.5, 0.99, 1.0)],
        "images_after_s": round(seconds, 2), "answer_bytes": received,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Without and with a reconstruction at the same time; write ``results/scanners.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--scanners", type=int, default=4)
    parser.add_argument("--spool", type=Path, help="where captures go; default: the temporary directory")
    chosen = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="scanners-", dir=chosen.spool) as folder:
        recording = record(Path(folder), chosen.seconds)
        for busy in (False, True):
            spool = Path(folder) / f"spool-{int(busy)}"
            with server(spool) as port, contextlib.ExitStack() as stack:
                texts = stack.enter_context(reconstruction(port)) if busy else []
                before = len(texts)
                found = measure(port, spool, recording, chosen.scanners)
                if busy and len(texts) == before:
                    raise SystemExit("the reconstruction made no progress meanwhile")
                rows += [{"reconstruction": "running" if busy else "none", **one} for one in found]
    table = [
        [
            r["scanner"], r["reconstruction"], r["readouts"], r["readouts_per_second"], *r["handed_over_ms"], r["late_start"],
            r["over_50_ms"], *r["in_the_log_ms"], r["images_after_s"],
        ]
        for r in rows
    ]  # fmt: skip
    title = f"{chosen.scanners} scanners at {RATE:g} readouts/s of {COILS} coils x {2 * LINES} samples, all on {os.cpu_count()} cores"
    print_table(title, COLUMNS, table)
    result = {
        "load_before": round(load, 2),
        "niceness": os.nice(0),
        "rate": RATE,
        "coils": COILS,
        "samples": 2 * LINES,
        "columns": COLUMNS,
        "rows": rows,
    }
    print(f"load before: {load:.1f}\n{write_result('scanners', result)}")


if __name__ == "__main__":
    main()
