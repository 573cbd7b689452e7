"""Question 5: what do 10,000 hostile streams do to a running server?

Each stream is made from a good one by a seed (``tests/wire/hostile.py``: mutated bytes, truncations, huge length fields, wrong
ids, shuffled, repeated, dropped and inserted messages, bad texts, noise, floods) and sent over loopback to the real command
``recon serve`` in a process of its own. Targets: no crash, no hang over 2 s, no more than 200 MB of memory, and the next good
scan reconstructs to the same images. Seeds are 0 to n - 1, so every stream can be made again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import socket
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import print_table, write_result
from benchmarks.latency import server
from gadgets.wire import codec
from gadgets.wire.events import Close, Image
from gadgets.wire.framing import FrameParser
from tests.wire.hostile import Hostile, boundaries, hostile

CAPTURES = Path(__file__).parent.parent / "tests" / "data" / "wire-captures"
CHAINS = Path(__file__).parent.parent / "configs"
HANG_SECONDS = 2.0
MEMORY_MB = 200.0
GOOD_EVERY = 500


def good_streams() -> list[bytes]:
    """Recorded sessions of the real client, with chains that exist here."""
    recorded = (CAPTURES / "client_config_file.bin").read_bytes()
    body = recorded[2 + 1024 :]  # behind the CONFIG_FILE: header, readouts, CLOSE
    waves = (CAPTURES / "client_waveforms.bin").read_bytes()[2 + 1024 :]
    script = (CHAINS / "fourier.xml").read_text()
    return [
        bytes(codec.config_file("fourier")) + body,
        bytes(codec.config_file("cg_sense.xml")) + waves,
        bytes(codec.config_script(script, nul=True)) + body,
        (CAPTURES / "client_compressed_tolerance.bin").read_bytes(),
        (CAPTURES / "client_noise_dependency.bin").read_bytes(),
        (CAPTURES / "client_query.bin").read_bytes(),
    ]


@dataclass
class Tally:
    """What happened to the streams."""

    answered: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    slowest_seed: int = -1
    hangs: list[int] = field(default_factory=list)
    no_answer: list[int] = field(default_factory=list)


def send(port: int, bad: Hostile, silence: float = 60.0) -> tuple[float, bool]:
    """Seconds from the last byte sent to the server's end of the connection, and whether a CLOSE came.

    After ``silence`` s without a byte it is given up: no answer.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=silence) as connection:
        closed = False
        try:
            connection.sendall(bad.data)
            # every other stream that ends like a session is left open, as the real client does; a stream that is cut in mid-message
            # and left open is indistinguishable from a slow scanner and is given up after the server's stall time (30 s)
            if bad.seed % 2 or not bad.data.endswith(b"\x04\x00"):
                connection.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server may have ended the connection already
        started = time.perf_counter()
        tail = b""
        while True:
            try:
                chunk = connection.recv(1 << 16)
            except OSError:
                break
            if not chunk:
                break
            tail = (tail + chunk)[-2:]
        closed = tail == b"\x04\x00"
        return time.perf_counter() - started, closed


def good_scan(port: int, stream: bytes) -> str:
    """Hash of the images that a good scan gives."""
    digest = hashlib.sha256()
    n = 0
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        connection.sendall(stream)
        parser = FrameParser(role="client")
        while chunk := connection.recv(1 << 20):
            for event in parser.feed(memoryview(chunk)):
                if isinstance(event, Image):
                    n += 1
                    digest.update(event.data.tobytes())
                elif isinstance(event, Close):
                    return f"{n} images {digest.hexdigest()[:16]}"
    return "no CLOSE"


def attack(port: int, n: int, process: psutil.Process, threads: int = 12, first: int = 0) -> tuple[Tally, dict[str, float]]:
    """Send streams ``first`` to ``first + n - 1``; a good scan must give the same images before, between and after."""
    goods = good_streams()
    marks = [boundaries(good) for good in goods]
    tally = Tally()
    reference = good_scan(port, goods[0])
    if not reference.startswith(("4 images", "2 images", "1 images")):
        raise SystemExit(f"the good scan fails: {reference}")

    def one(seed: int) -> None:
        which = seed % len(goods)
        bad = hostile(goods[which], seed, marks[which])
        seconds, closed = send(port, bad)
        tally.answered[f"{bad.kind}: {'CLOSE' if closed else 'connection ended'}"] += 1
        if seconds > tally.slowest:
            tally.slowest, tally.slowest_seed = seconds, seed
        if seconds > HANG_SECONDS:
            tally.hangs.append(seed)
        if not closed:
            tally.no_answer.append(seed)

    base, worker_base = _memory(process), _largest_child(process)
    peak = base
    with ThreadPoolExecutor(threads) as pool:
        for start in range(first, first + n, GOOD_EVERY):
            list(pool.map(one, range(start, min(start + GOOD_EVERY, first + n))))
            peak = max(peak, _memory(process))
            again = good_scan(port, goods[0])
            if again != reference:
                raise SystemExit(f"after stream {start + GOOD_EVERY - 1} the good scan gives {again}, not {reference}")
            print(f"  {min(start + GOOD_EVERY, first + n) - first} streams, server at {peak:.0f} MB", file=sys.stderr)
    worker_peak = _largest_child(process)
    return tally, {"base_mb": base, "peak_mb": peak, "worker_base_mb": worker_base, "worker_peak_mb": worker_peak}


def _largest_child(process: psutil.Process) -> float:
    """The largest high-water mark of the worker processes, MB."""
    return max((_memory(child) for child in process.children(recursive=True)), default=0.0)


def _memory(process: psutil.Process) -> float:
    """Peak resident memory of the server process so far, MB (the kernel's own high-water mark)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1000
    return float(process.memory_info().rss / 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=10_000)
    n = parser.parse_args().streams
    started = time.perf_counter()
    with server() as (process, port):
        tally, memory = attack(port, n, psutil.Process(process.pid))
        alive = process.poll() is None
    seconds = time.perf_counter() - started
    growth = memory["peak_mb"] - memory["base_mb"]
    columns = ["quantity", "measured", "target"]
    rows: list[list[object]] = [
        ["hostile streams", n, 10_000],
        ["server alive at the end", str(alive), "True"],
        ["slowest answer, s", tally.slowest, HANG_SECONDS],
        ["answers over 2 s", len(tally.hangs), 0],
        ["connections that ended without CLOSE", len(tally.no_answer), ""],
        ["peak memory growth of the server, MB", growth, MEMORY_MB],
        ["peak memory growth of the worker, MB", memory["worker_peak_mb"] - memory["worker_base_mb"], MEMORY_MB],
        ["peak memory of the server (with torch loaded), MB", memory["peak_mb"], ""],
        [f"good scans between, every {GOOD_EVERY} streams", "identical images", "identical"],
        ["seconds in all", seconds, ""],
    ]
    print_table("hostile streams", columns, rows)
    detail = {"kinds": dict(sorted(tally.answered.items())), "slowest_seed": tally.slowest_seed, "hangs": tally.hangs[:50]}
    write_result("hostile", {"columns": columns, "rows": rows, "seeds": f"0..{n - 1}", "cores": os.cpu_count(), **detail})
    worker_growth = memory["worker_peak_mb"] - memory["worker_base_mb"]
    if not alive or tally.hangs or max(growth, worker_growth) > MEMORY_MB:
        raise SystemExit("target missed")


if __name__ == "__main__":
    main()
