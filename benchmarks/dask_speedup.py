"""How much sooner do images come with 2 and 4 Dask workers on one machine than with 1, with and without TLS?

Of a twelve-slice cine, which is spread by slices, and of one slab of eight echoes, which is spread by echoes. Scheduler and workers are
processes of their own, as a site starts them; one compute thread each. The server runs in this process, its own worker prepares
readouts. The time is that from the last readout to the last image; every cluster's images are compared with those of the server's own
worker, bit for bit.

    python -m benchmarks.dask_speedup [--runs 3] [--workers 1 2 4] [--iterations 15] [--cases cine slab] [--name dask_speedup]
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_result
from benchmarks.dask_cluster import dask_cluster, tls_options
from gadgets.scheduler_options import SchedulerOptions
from gadgets.service import Service, ServiceOptions
from tests.e2e.scans import SimulatedScan, ask, complaints, final_images, in_memory
from tests.gadgets.certificates import authority

READY = 180.0


@dataclass(frozen=True)
class Case:
    """A scan and the chain that reconstructs it. ``settings`` of a linear method: the chain's own iterations, all of them."""

    words: str
    chain: str
    kind: str
    scan: dict[str, Any]
    n_images: int
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "cine": Case(
        "12-slice cine", "llr", "cine",
        {"matrix_x": 72, "matrix_y": 72, "coils": 8, "states": 12, "slices": 12, "mask": "vista", "acceleration": 4.0},
        12 * 12,
    ),
    "slab": Case(
        "one slab of 8 echoes", "cg_sense", "mgre",
        {
            "matrix_x": 64, "matrix_y": 64, "partitions": 32, "coils": 8, "states": 8, "mask": "poisson", "acceleration": 3.0,
            "acs": 16, "acs_partitions": 12,
        },
        8, {"iterations": 30, "tolerance": 1e-7},
    ),
}  # fmt: skip


def run(service: Service, case: Case, scan: SimulatedScan, iterations: int, runs: int) -> tuple[list[float], str]:
    """Seconds of each run, and a hash of the images; the first run is not counted."""
    seconds, digest = [], ""
    for _ in range(runs + 1):
        answer = ask(service, case.chain, scan, **{"iterations": iterations, **case.settings})
        images = sorted(final_images(answer), key=lambda image: int(image.header["image_index"]))
        if [text for text in complaints(answer) if "not converged" not in text] or len(images) != case.n_images:
            raise SystemExit("; ".join(answer.texts))
        digest = hashlib.sha256(b"".join(image.data.tobytes() for image in images)).hexdigest()
        (told,) = [text for text in answer.texts if text.startswith(f"INF {case.chain}:")]
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
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--name", default="dask_speedup", help="of the result's file; empty: none")
    chosen = parser.parse_args(arguments)
    load = os.getloadavg()[0]
    scans = {name: in_memory(CASES[name].kind, **CASES[name].scan) for name in chosen.cases}
    rows: list[dict[str, Any]] = []

    def measure(where: str, n: int, service: Service) -> None:
        for name, scan in scans.items():
            seconds, digest = run(service, CASES[name], scan, chosen.iterations, chosen.runs)
            load_now = round(os.getloadavg()[0], 2)
            rows.append({"case": name, "where": where, "workers": n, "seconds": seconds, "images": digest, "load": load_now})
            print(f"{name}, {where} {n}: {seconds}", flush=True)

    options = {"port": 0, "workers": 1, "threads": 1, "rehearse": False, "previews": False}
    with Service(ServiceOptions(**options)) as service:  # type: ignore[arg-type]
        measure("server's own worker", 1, service)
    with tempfile.TemporaryDirectory() as folder:
        for tls in (False, True):
            for n in chosen.workers:
                with ExitStack() as stack:
                    scheduler = cluster(stack, Path(folder) / f"{n}-{tls}", n, tls)
                    service = stack.enter_context(Service(ServiceOptions(**options, scheduler=scheduler)))  # type: ignore[arg-type]
                    wait_for(service, n)
                    measure("Dask over TLS" if tls else "Dask", n, service)
    if len({(row["case"], row["images"]) for row in rows}) != len(scans):
        raise SystemExit("the clusters' images differ")
    report(rows, load, chosen)


def wait_for(service: Service, n: int) -> None:
    """Until all workers have joined."""
    end = time.monotonic() + READY
    while service.jobs._remote is None or service.jobs._remote.capacity != n:
        if time.monotonic() > end:
            raise SystemExit(f"{service.jobs.capacity} of {n} workers joined")
        time.sleep(0.1)


def report(rows: list[dict[str, Any]], load: float, chosen: argparse.Namespace) -> None:
    columns = ["computed by", "workers", "median s", "best s", "worst s", "speed-up", "load"]
    for name in chosen.cases:
        table = []
        own = [row for row in rows if row["case"] == name]
        for row in own:
            seconds = row["seconds"]
            median = statistics.median(seconds)
            base = next((r for r in own if r["where"] == row["where"] and r["workers"] == 1), row)
            row["median_s"], row["speed_up"] = round(median, 3), round(statistics.median(base["seconds"]) / median, 2)
            line = [row["where"], row["workers"], row["median_s"], min(seconds), max(seconds), row["speed_up"], row["load"]]
            table.append(line)
        case, cores = CASES[name], os.cpu_count()
        print_table(
            f"{case.words} by {case.chain}, last readout to last image, on {cores} cores in all ({chosen.runs} runs)",
            columns,
            table,
        )
    result = {
        "load_before": round(load, 2),
        "niceness": os.nice(0),
        "cases": {name: asdict(CASES[name]) for name in chosen.cases},
        "iterations": chosen.iterations,
        "runs": chosen.runs,
        "same_bits": True,
        "rows": rows,
    }
    if chosen.name:
        print(write_result(chosen.name, result))


if __name__ == "__main__":
    main()
