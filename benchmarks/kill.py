"""What does it cost to end a worker, the server or the client with kill -9 at a random moment of a scan?

Real processes and real signals: the command ``recon serve`` with its workers, and a client of its own process. A scan is lost when neither
its client nor its job folder has every image, bit for bit as in an undisturbed run; or, when the client died before its CLOSE, when
its capture is not the beginning of the session or no row says that it was cut.

About half of a scan is receiving and half is computing: the rate is chosen for that on each machine, after a first scan. Half of the
kills of workers and clients fall into each; that computing has begun is known from the capture, which then holds every byte of the
session. The server is killed after receipt only: before, the scan would be cut, and its client knows.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import psutil

from benchmarks.common import print_table, write_result
from benchmarks.soak_memory import workers_of
from gadgets.errors import ReplayFailed
from gadgets.image_attributes import is_preview
from gadgets.image_file import read_images
from gadgets.journal import JobRow, Journal
from gadgets.replay import replay
from gadgets.simulate import simulate
from gadgets.wire.events import Image

CHAIN = "llr"
SCAN = {
    "matrix_x": 96,
    "matrix_y": 96,
    "coils": 8,
    "states": 6,
    "slices": 2,
    "mask": "vista",
    "acceleration": 3.0,
    "waveforms": False,
}
DEADLINE = 300.0
TARGETS = ("worker", "server", "client")
RECEIVING, COMPUTING, OVER = "receiving", "computing", "over"
PHASES = {"worker": (RECEIVING, COMPUTING), "server": (COMPUTING,), "client": (RECEIVING, COMPUTING)}

T = TypeVar("T")
Images = dict[tuple[int, int, int], str]


@dataclass
class Kill:
    """One kill. ``moment`` is in s after the first readout (receiving) or after the last one has arrived (computing).

    ``phase`` is that in which it was to fall, ``fell`` that in which it did: "receiving", "computing" or "over". ``recovery`` is in s:
    how much later than undisturbed the last image came (worker), from the kill until the job was over (server, client); ``restart``
    is the part of it in which the server started and warmed its worker.
    """

    target: str
    phase: str
    moment: float
    fell: str = ""
    outcome: str = ""
    lost: bool = False
    recovery: float = 0.0
    restart: float = 0.0


@dataclass
class Reference:
    """The undisturbed scan: its images, its bytes, how long it took and was computed for in s, its rate in readouts/s."""

    images: Images
    session: bytes
    seconds: float
    computing: float
    rate: float

    @property
    def receiving(self) -> float:
        return self.seconds - self.computing


@dataclass
class Site:
    """A spool, the raw file to send and the server that is running now."""

    folder: Path
    raw: Path
    process: subprocess.Popen[str] | None = None
    port: int = 0
    started: int = field(default=0)

    @property
    def spool(self) -> Path:
        return self.folder / "spool"

    def start(self) -> None:
        """``recon serve`` with one worker."""
        self.started += 1
        command = [sys.executable, "-m", "gadgets.cli", "serve", "--port", "0", "--workers", "1", "--threads", "1"]
        with (self.folder / f"server-{self.started}.log").open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--spool", str(self.spool)], stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {(self.folder / f'server-{self.started}.log').read_text()[-2000:]}")
        self.port = int(line.rsplit(":", 1)[1])

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()

    def worker(self) -> psutil.Process | None:
        """A computing process of the server."""
        assert self.process is not None
        with contextlib.suppress(psutil.Error):
            return next(iter(workers_of(psutil.Process(self.process.pid))), None)
        return None

    def newest(self) -> Path | None:
        return max(self.spool.glob("*.mrd"), default=None)

    def rows(self) -> list[JobRow]:
        journal = Journal.open(self.spool)
        try:
            return journal.rows(limit=None)
        finally:
            journal.close()

    def ended(self, capture: str) -> JobRow | None:
        """The row of a scan, once it is over."""
        return next((row for row in self.rows() if row.capture == capture and row.is_over), None)


def key(image: Image) -> tuple[int, int, int]:
    return tuple(int(image.header[name]) for name in ("image_series_index", "image_index", "slice"))  # type: ignore[return-value]


def digest(image: Image) -> str:
    return hashlib.sha256(image.data.tobytes()).hexdigest()


def final(images: Iterator[Image]) -> Images:
    return {key(image): digest(image) for image in images if not is_preview(image.attributes)}


def until(look: Callable[[], T | None], what: str) -> T:
    """Poll a condition; the benchmark ends when it does not come true."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        found = look()
        if found:
            return found
        time.sleep(0.01)
    raise SystemExit(f"waited {DEADLINE:g} s for {what}")


class Client(threading.Thread):
    """A scan in a thread of this process: its images, and when they came."""

    def __init__(self, site: Site, rate: float | None) -> None:
        super().__init__(daemon=True)
        self.site, self.rate = site, rate
        self.n_readouts = 0
        self.images: Images = {}
        self.begun = threading.Event()
        self.began = self.ended = 0.0
        self.failure = ""
        self.sent = 0

    def run(self) -> None:
        def progress(done: int, total: int | None) -> None:
            if not self.begun.is_set():
                self.began = time.monotonic()
                self.begun.set()

        def take(image: Image) -> None:
            if not is_preview(image.attributes):
                self.images[key(image)] = digest(image)

        try:
            done = replay(self.site.raw, port=self.site.port, config=CHAIN, rate=self.rate, progress=progress, on_image=take)
            self.sent, self.n_readouts = done.bytes_sent, done.n_readouts
        except ReplayFailed as error:
            self.failure = str(error)
        self.ended = time.monotonic()


def undisturbed(site: Site) -> Reference:
    """The scan as it should be, at a rate at which receiving takes as long as computing. The first one pays for starting."""
    rate, computing, client = None, 0.0, Client(site, None)
    for again in range(3):
        client = Client(site, rate)
        client.start()
        client.join()
        if client.failure or not client.images:
            raise SystemExit(f"the undisturbed scan failed: {client.failure}")
        capture = site.newest()
        assert capture is not None
        name = capture.name
        row = until(partial(site.ended, name), "its row")
        computing = row.timings["last_image"]
        rate = client.n_readouts / computing if again < 2 else rate
    assert rate is not None and capture is not None
    return Reference(client.images, capture.read_bytes(), client.ended - client.began, computing, rate)


def wait_for(site: Site, reference: Reference, before: Path | None, kill: Kill) -> Path | None:
    """Until the moment of a kill in a scan whose first readout is out; its capture."""
    if kill.phase == COMPUTING:
        until(lambda: arrived(site, before) == len(reference.session), "receipt")
    time.sleep(kill.moment)
    have = arrived(site, before)
    kill.fell = RECEIVING if have < len(reference.session) else COMPUTING
    return site.newest()


def arrived(site: Site, before: Path | None) -> int:
    """Bytes in the capture that is newer than ``before``."""
    path = site.newest()
    return path.stat().st_size if path is not None and path != before else 0


def kill_worker(site: Site, reference: Reference, kill: Kill) -> None:
    known, before = {row.id for row in site.rows()}, site.newest()
    client = Client(site, reference.rate)
    client.start()
    client.begun.wait(DEADLINE)
    wait_for(site, reference, before, kill)
    # one that was killed before is replaced when there is work: wait for it, or for the end of the scan
    victim = until(lambda: site.worker() or (None if client.is_alive() else "nobody"), "a worker")
    kill.fell = kill.fell if client.is_alive() else OVER
    if isinstance(victim, psutil.Process):
        victim.kill()
    client.join(DEADLINE)
    kill.recovery = client.ended - client.began - reference.seconds
    if client.images == reference.images and not client.failure:
        kill.outcome = "client has its images"
    else:
        row = until(lambda: next((r for r in site.rows() if r.id not in known and r.is_over), None), "the job")
        kill.recovery = time.monotonic() - client.began - reference.seconds
        judge(kill, site, reference, row)


def kill_server(site: Site, reference: Reference, kill: Kill) -> None:
    before = site.newest()
    client = Client(site, reference.rate)
    client.start()
    capture = wait_for(site, reference, before, kill)
    assert capture is not None
    kill.fell = kill.fell if client.is_alive() else OVER
    site.kill()
    killed = time.monotonic()
    client.join(DEADLINE)
    site.start()
    kill.restart = time.monotonic() - killed
    row = until(
        lambda: next((r for r in site.rows() if r.id == capture.stem and r.is_over), None), "the job after the restart"
    )
    kill.recovery = time.monotonic() - killed
    if client.images == reference.images and not client.failure:
        kill.outcome = "client has its images"
    else:
        judge(kill, site, reference, row)


def kill_client(site: Site, reference: Reference, kill: Kill) -> None:
    known, before = {row.id for row in site.rows()}, site.newest()
    words = [str(site.port), str(site.raw), str(reference.rate)]
    client = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.kill", "--client", *words], stdout=subprocess.PIPE, text=True
    )
    assert client.stdout is not None
    client.stdout.readline()  # the first readout is out
    wait_for(site, reference, before, kill)
    client.kill()
    killed = time.monotonic()
    told = client.stdout.read()
    client.wait()
    row = until(lambda: next((r for r in site.rows() if r.id not in known and r.is_over), None), "the job of a dead client")
    kill.recovery = time.monotonic() - killed
    if "done" in told:
        kill.outcome, kill.fell = "client has its images", OVER
    else:
        judge(kill, site, reference, row)


def judge(kill: Kill, site: Site, reference: Reference, row: JobRow) -> None:
    """What became of a scan whose client does not have it."""
    capture = site.spool / row.capture
    if row.state == "sent":
        path = until(lambda: row.images(site.spool), "the image file")
        kill.lost = final(read_images(path)) != reference.images
        kill.outcome = "images in the job folder"
        return
    kept = capture.read_bytes() if row.capture else b""
    cut = len(kept) < len(reference.session) and reference.session.startswith(kept)
    kill.lost = not (cut and row.why)
    kill.outcome = f"cut: {row.n_readouts} readouts kept" if cut else f"failed: {row.why}"


KILLS: dict[str, Callable[[Site, Reference, Kill], None]] = {
    "worker": kill_worker,
    "server": kill_server,
    "client": kill_client,
}


@contextlib.contextmanager
def site(folder: Path) -> Iterator[Site]:
    """A server with an empty spool, ended at the end."""
    raw = folder / "scan.h5"
    simulate("cine", raw, SCAN)
    running = Site(folder, raw)
    running.start()
    try:
        yield running
    finally:
        running.stop()


def run(folder: Path, times: int, seed: int) -> tuple[Reference, list[Kill]]:
    """``times`` kills of each target, in its phases by turns, at moments drawn uniformly over the phase."""
    draw, kills = random.Random(seed), []
    with site(folder) as running:
        reference = undisturbed(running)
        for target in TARGETS:
            for number in range(times):
                phase = PHASES[target][number % len(PHASES[target])]
                span = reference.receiving if phase == RECEIVING else reference.computing
                last = Kill(target, phase, draw.uniform(0.0, span))
                KILLS[target](running, reference, last)
                kills.append(last)
                print(f"{target:7} {last.fell:9} {last.moment:6.2f} s: {last.outcome}, {last.recovery:.2f} s", flush=True)
    return reference, kills


def as_client(port: int, raw: Path, rate: float) -> None:
    """The client that is to be killed."""

    def progress(done: int, total: int | None) -> None:
        if done and not told:
            told.append(done)
            print("begun", flush=True)

    told: list[int] = []
    replay(raw, port=port, config=CHAIN, rate=rate, progress=progress)
    print("done", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=10, help="kills of each target")
    parser.add_argument("--seed", type=int, default=6)
    parser.add_argument("--name", default="kill", help="of the result; none is written without one")
    parser.add_argument("--client", nargs=3, metavar=("PORT", "RAW", "RATE"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.client:
        return as_client(int(chosen.client[0]), Path(chosen.client[1]), float(chosen.client[2]))
    with tempfile.TemporaryDirectory() as folder:
        reference, kills = run(Path(folder), chosen.times, chosen.seed)
    columns = [
        "killed",
        "phase",
        "times",
        "client has images",
        "images in job folder",
        "cut, raw kept",
        "lost",
        "median s",
        "longest s",
        "restart s",
    ]
    rows: list[list[object]] = []
    for target, phase in [(target, phase) for target in TARGETS for phase in (RECEIVING, COMPUTING, OVER)]:
        own = [kill for kill in kills if (kill.target, kill.fell) == (target, phase)]
        if not own:
            continue
        counts = [sum(kill.outcome.startswith(word) for kill in own) for word in ("client has", "images in", "cut")]
        recovery = [kill.recovery for kill in own]
        lost = sum(kill.lost for kill in own)
        restart = statistics.median(kill.restart for kill in own)
        rows.append([target, phase, len(own), *counts, lost, statistics.median(recovery), max(recovery), restart or ""])
    title = f"kill -9 at random moments of a scan: {reference.receiving:.1f} s of receiving, {reference.computing:.1f} s of computing"
    print_table(title, columns, rows)
    document = {
        "columns": columns,
        "rows": rows,
        "scan_seconds": reference.seconds,
        "receiving_seconds": reference.receiving,
        "computing_seconds": reference.computing,
        "readouts_per_second": reference.rate,
        "load": os.getloadavg(),
        "kills": [asdict(kill) for kill in kills],
    }
    if chosen.name:
        write_result(chosen.name, document)
    if any(kill.lost for kill in kills):
        raise SystemExit("scans were lost")


if __name__ == "__main__":
    main()
