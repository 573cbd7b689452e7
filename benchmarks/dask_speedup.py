"""How much sooner do images of a twelve-slice cine come with 2 and 4 Dask workers on one machine than with 1, with and without TLS?

Scheduler and workers are processes of their own, as a site starts them; one compute thread each. The server runs in this process, its
own worker prepares readouts. The time is that from the last readout to the last image; every cluster's images are compared with those of
the server's own worker, bit for bit.

    python -m benchmarks.dask_speedup [--runs 3] [--workers 1 2 4] [--iterations 15]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_result
from benchmarks.dask_cluster import dask_cluster, tls_options
from gadgets.scheduler_options import SchedulerOptions
from gadgets.service import Service, ServiceOptions
from tests.e2e.scans import SimulatedScan, ask, complaints, final_images, in_memory
from tests.gadgets.certificates import authority

CHAIN, SLICES = "llr", 12
SCAN = {
    "matrix_x": 72, "matrix_y": 72, "coils": 8, "states": 12, "slices": SLICES, "mask": "vista", "acceleration": 4.0,
}  # fmt: skip
READY = 180.0


def run(service: Service, scan: SimulatedScan, iterations: int, runs: int) -> tuple[list[float], str]:
    """Seconds of each run, and a hash of the images; the first run is not counted."""
    seconds, digest = [], ""
    for _ in range(runs + 1):
        answer = ask(service, CHAIN, scan, iterations=iterations)
        images = sorted(final_images(answer), key=lambda image: int(image.header["image_index"]))
        if complaints(answer) or len(images) != SLICES * SCAN["states"]:  # type: ignore[operator]
            raise SystemExit("; ".join(answer.texts))
        digest = hashlib.sha256(b"".join(image.data.tobytes() for image in images)).hexdigest()
        (told,) = [text for text in answer.texts if text.startswith(f"INF {CHAIN}:")]
        seconds.append(float(told.split(" images in ")[1].split(" s ")[0]))
    return seconds[1:], digest


def cluster(stack: ExitStack, folder: Path, n: int, tls: bool) -> SchedulerOptions:
    """Start a cluster of ``n`` workers."""
    if not tls:
        return SchedulerOptions(stack.enter_context(dask_cluster(folder, n)))
    site = authority(folder / "authority")
    certificate, key = site.issue("cluster")
    address = stack.enter_context(dask_cluster(folder, n, tls_options(site.certificate, certificate, key)))
    own, own_key = site.issue("server")
    return SchedulerOptions(address, Path(site.certificate), Path(own), Path(own_key))


def main(arguments: list[str] | None = None) -> None:
    """Every cluster, and write ``results/dask_speedup.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--iterations", type=int, default=15)
    chosen = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    scan = in_memory("cine", **SCAN)
    rows: list[dict[str, Any]] = []

    def note(where: str, n: int, seconds: list[float], digest: str) -> None:
        rows.append(
            {"where": where, "workers": n, "seconds": seconds, "images": digest, "load": round(os.getloadavg()[0], 2)}
        )
        print(f"{where} {n}: {seconds}", flush=True)

    options = {"port": 0, "workers": 1, "threads": 1, "rehearse": False, "previews": False}
    with Service(ServiceOptions(**options)) as service:  # type: ignore[arg-type]
        note("server's own worker", 1, *run(service, scan, chosen.iterations, chosen.runs))
    with tempfile.TemporaryDirectory() as folder:
        for tls in (False, True):
            for n in chosen.workers:
                with ExitStack() as stack:
                    scheduler = cluster(stack, Path(folder) / f"{n}-{tls}", n, tls)
                    service = stack.enter_context(Service(ServiceOptions(**options, scheduler=scheduler)))  # type: ignore[arg-type]
                    wait_for(service, n)
                    note("Dask over TLS" if tls else "Dask", n, *run(service, scan, chosen.iterations, chosen.runs))
    if len({row["images"] for row in rows}) != 1:
        raise SystemExit("the clusters' images differ")
    report(rows, load, chosen.runs)


def wait_for(service: Service, n: int) -> None:
    """Until all workers have joined."""
    end = time.monotonic() + READY
    while service.jobs._remote is None or service.jobs._remote.capacity != n:
        if time.monotonic() > end:
            raise SystemExit(f"{service.jobs.capacity} of {n} workers joined")
        time.sleep(0.1)


def report(rows: list[dict[str, Any]], load: float, runs: int) -> None:
    table = []
    for row in rows:
        median = statistics.median(row["seconds"])
        base = next((r for r in rows if r["where"] == row["where"] and r["workers"] == 1), row)
        row["median_s"], row["speed_up"] = round(median, 3), round(statistics.median(base["seconds"]) / median, 2)
        table.append(
            [
                row["where"],
                row["workers"],
                row["median_s"],
                min(row["seconds"]),
                max(row["seconds"]),
                row["speed_up"],
                row["load"],
            ]
        )
    columns = ["slices computed by", "workers", "median s", "best s", "worst s", "speed-up", "load"]
    cores = os.cpu_count()
    print_table(
        f"{SLICES}-slice cine by {CHAIN}, last readout to last image, on {cores} cores in all ({runs} runs)", columns, table
    )
    result = {
        "load_before": round(load, 2),
        "niceness": os.nice(0),
        "scan": SCAN,
        "chain": CHAIN,
        "runs": runs,
        "same_bits": True,
        "rows": rows,
    }
    print(write_result("dask_speedup", result))


if __name__ == "__main__":
    main()
