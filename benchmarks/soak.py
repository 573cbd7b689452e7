"""Does the server stand a night? Mixed scans for hours, with killed workers, clients that leave, malformed peers and a full disk.

The real command ``recon serve`` runs in a process of its own, its spool on a small file system. Meanwhile, all at random but from one
seed: scanners send scans of several kinds and compare every image with the first run's; others leave in mid-scan or before their
images; hostile streams (``tests/wire/hostile.py``) come in; workers are killed with SIGKILL; the disk runs full and is freed again.

Targets: no scan lost (every scan that is sent whole is answered with its images, every one that breaks off has its capture), every
connection answered, and at the end no more than 5 % more memory of its own than after warming up. A connection is hung when nothing came
for ten minutes: no machine is as slow as that. What took longer than a minute is counted, because it says how busy the machine was.

    python -m benchmarks.soak --minutes 120
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import print_table, write_result
from benchmarks.hostile import good_streams
from benchmarks.hostile import send as send_hostile
from benchmarks.soak_disk import Disk, small_disk
from benchmarks.soak_memory import Memory, workers_of
from benchmarks.soak_scans import Kind, leave, make_kinds, scan
from benchmarks.soak_server import Tally, captured, leftovers, open_jobs, serve, without_sidecar
from tests.wire.hostile import boundaries, hostile

LEAK = 0.05
"""Most that memory may grow between the end of the warm-up and the end."""

LEAK_MINUTES = 20.0
"""Shorter runs state the growth and do not judge it: their warm-up is a minute."""


class Soak:
    """One run.

    Parameters
    ----------
    seed
        Everything that is random.
    limits
        Waits in s: silences after which a connection is hung, pauses of the actors (see `soak`).
    scanners
        Scans at once.
    """

    def __init__(
        self, port: int, process: psutil.Process, disk: Disk, *, seed: int, limits: dict[str, float], scanners: int
    ) -> None:
        self.port, self.process, self.disk = port, process, disk
        self.limits, self.scanners, self.seed = limits, scanners, seed
        self.tally = Tally()
        self.memory = Memory(process)
        self.stop = threading.Event()
        self.kinds: list[Kind] = make_kinds()
        self._turns: dict[str, float] = {}  # when each actor began what it does now

    def learn(self) -> None:
        """What each kind's images are, in peace."""
        for kind in self.kinds:
            outcome = scan(self.port, kind, 300.0)
            if not outcome.digest:
                raise SystemExit(f"{kind.name} fails before anything was disturbed: {outcome.problem or outcome.texts}")
            kind.digest = outcome.digest

    def check_again(self) -> None:
        """The same images at the end, in peace."""
        for kind in self.kinds:
            outcome = scan(self.port, kind, 300.0)
            if outcome.digest != kind.digest:
                self.tally.add(
                    "scans_lost", f"{kind.name} at the end: {outcome.problem or 'other images'} {outcome.complaints}"
                )

    def run(self, seconds: float) -> None:
        """Everything at once, for so long."""
        actors: list[Callable[[random.Random], None]] = [self._scanner] * self.scanners
        actors += [self._leaver, self._attacker, self._killer, self._filler]
        threads = [
            threading.Thread(target=self._act, args=(actor, number), name=f"{actor.__name__[1:]} {number}", daemon=True)
            for number, actor in enumerate(actors)
        ]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        while (left := started + seconds - time.monotonic()) > 0 and self.process.is_running() and not self._stuck():
            self.memory.sample()
            self.stop.wait(min(left, self.limits["sample"]))
        self.stop.set()
        while any(thread.is_alive() for thread in threads) and not self._stuck():
            time.sleep(self.limits["sample"])
        for name in self._stuck():
            self.tally.add(
                "never_answered", f"{name}; the soak ended {time.monotonic() - started:.0f} s after its beginning"
            )
        self.disk.free()

    def _stuck(self) -> list[str]:
        """Actors that wait for too long: a connection may hang although words of progress come. It is no use going on then."""
        late = time.monotonic() - self.limits["stuck"]
        return [name for name, began in list(self._turns.items()) if began < late]

    def _act(self, actor: Callable[[random.Random], None], number: int) -> None:
        rng = random.Random(self.seed * 1000 + number)
        name = threading.current_thread().name
        while not self.stop.is_set():
            self._turns[name] = time.monotonic()
            try:
                actor(rng)
            except Exception as error:  # of this program: it must not look like a quiet night
                self.tally.add("actor_failures", f"{actor.__name__}: {error!r}")
                self.stop.wait(1.0)
        del self._turns[name]

    # -- actors ----------------------------------------------------------------------------------------------------------

    def _scanner(self, rng: random.Random) -> None:
        kind = rng.choice(self.kinds)
        outcome = scan(self.port, kind, self.limits["hung"], pieces=rng.choice((1, 4, 16)), pause=rng.choice((0.0, 0.02)))
        self.tally.answered("scan", outcome.seconds)
        if outcome.digest == kind.digest:
            self.tally.count("scans_identical")
        elif outcome.digest and any("fallback" in text or "come from" in text for text in outcome.texts):
            self.tally.count("scans_by_fallback")  # said plainly, and better than no image
        else:
            self.tally.add("scans_lost", f"{kind.name}: {outcome.problem or 'other images'} {outcome.complaints}")
        self.stop.wait(rng.expovariate(1.0 / self.limits["scan_pause"]))

    def _leaver(self, rng: random.Random) -> None:
        """In mid-scan, politely or not, or after everything was sent but before the images."""
        kind = rng.choice(self.kinds)
        marker = f"soak-{self.seed}-{rng.getrandbits(64):016x}"
        started = time.monotonic()
        part, reset = rng.choice((0.2, 0.5, 0.8, 1.0)), rng.random() < 0.5
        leave(self.port, kind, marker, part=part, reset=reset)
        self.tally.count("clients_that_left")
        found = captured(self.disk.spool, marker, self.limits["capture"])
        if not found and not self.disk.was_full_since(started):  # the machine may be busy
            found = captured(self.disk.spool, marker, self.limits["capture_at_last"])
        if self.disk.was_full_since(started):
            self.tally.count("captures_on_a_full_disk" if found else "not_captured_on_a_full_disk")
        elif not found:
            self.tally.add(
                "captures_lost", f"{kind.name} {part} {'reset' if reset else 'closed'} at {datetime.now(UTC):%H:%M:%S}"
            )
        self.stop.wait(rng.expovariate(1.0 / self.limits["leave_pause"]))

    def _attacker(self, rng: random.Random) -> None:
        goods = good_streams()
        which, seed = rng.randrange(len(goods)), rng.getrandbits(31)
        bad = hostile(goods[which], seed, boundaries(goods[which]))
        seconds, _ = send_hostile(self.port, bad, self.limits["hung"])
        self.tally.answered("hostile", seconds)
        if seconds >= self.limits["hung"]:
            self.tally.add("hostile_not_answered", f"{bad.kind} seed {seed} stream {which}: {seconds:.1f} s")
        self.stop.wait(rng.expovariate(1.0 / self.limits["attack_pause"]))

    def _killer(self, rng: random.Random) -> None:
        if self.stop.wait(rng.uniform(0.5, 1.5) * self.limits["kill_every"]):
            return
        # the death of every worker at its start is another matter: the server says that it cannot start any
        with contextlib.suppress(psutil.Error):
            youngest = time.time() - self.limits["kill_age"]
            victims = [worker for worker in workers_of(self.process) if worker.create_time() < youngest]
            if victims:
                rng.choice(victims).kill()
                self.tally.count("workers_killed")

    def _filler(self, rng: random.Random) -> None:
        if self.stop.wait(rng.uniform(0.5, 1.5) * self.limits["fill_every"]):
            return
        self.tally.count(f"disk_{self.disk.fill(rng.choice(('watermark', 'full')))}")
        self.stop.wait(rng.uniform(0.5, 1.5) * self.limits["full_for"])
        self.disk.free()


def soak(
    minutes: float,
    *,
    seed: int = 0,
    scanners: int = 2,
    workers: int = 2,
    pause: float = 1.0,
    kill_every: float = 60.0,
    keep_log: Path | None = None,
    full_disk: bool = True,
) -> dict[str, Any]:
    """Run it; everything that was counted and measured. ``failures`` is empty when all targets were met.

    ``full_disk``: it counts as a failure when no small disk can be mounted and filled.

    ``pause`` stretches the pauses between the connections of each actor: 1 for a machine of its own.
    """
    seconds = minutes * 60.0
    hung = min(600.0, max(180.0, seconds))
    limits = {
        "hung": hung, "stuck": hung + 120.0,
        "scan_pause": 0.5 * pause, "leave_pause": 4.0 * pause, "attack_pause": 0.25 * pause,
        "capture": 20.0, "capture_at_last": 100.0,
        "kill_every": min(kill_every, seconds / 3),
        "kill_age": min(60.0, seconds / 6),
        "fill_every": min(240.0, seconds / 4),
        "full_for": min(30.0, seconds / 8),
        "sample": min(5.0, seconds / 40),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="soak-") as folder, small_disk(Path(folder)) as disk:
        with serve(disk.spool, Path(folder) / "server.log", workers) as (process, port):
            run = Soak(port, psutil.Process(process.pid), disk, seed=seed, limits=limits, scanners=scanners)
            run.learn()
            run.run(seconds)
            alive = process.poll() is None
            if alive and not run.tally.problems.get("never_answered"):
                run.check_again()
            unfinished = open_jobs(disk.spool, 300.0) + without_sidecar(disk.spool)
            run.memory.last()
        left = leftovers(process.pid)
        log = (Path(folder) / "server.log").read_text(errors="replace")
        if keep_log is not None:
            keep_log.write_text(log)
    tally = run.tally
    memory = run.memory.verdict()
    failures = [f"{name}: {len(found)}" for name, found in tally.problems.items()]
    failures += [] if alive else ["the server died"]
    failures += never_full(disk) if full_disk else []
    failures += [f"{count} log lines say {word}" for word in ("event=crashed", "Traceback") if (count := log.count(word))]
    failures += [f"left behind: {left}"] if left else []
    failures += [f"{len(unfinished)} jobs not over: {unfinished[:5]}"] if unfinished else []
    if minutes >= LEAK_MINUTES:
        failures += [
            f"memory of the {who} grew by {growth:.1%}" for who, growth in memory["growth"].items() if growth > LEAK
        ]
    return {
        "minutes": minutes, "seed": seed, "scanners": scanners, "workers": workers, "limits": limits, "disk": disk.kind,
        "counts": dict(sorted(tally.counts.items())), "answers": tally.answers(), "memory": memory, "failures": failures,
        "examples": {name: found[:20] for name, found in tally.problems.items()}, "load": os.getloadavg(),
        "log_errors": [line for line in log.splitlines() if "level=ERROR" in line][:30],
    }  # fmt: skip


def never_full(disk: Disk) -> list[str]:
    """Why the soak has shown nothing of a full disk."""
    return [] if disk.mounted else ["the disk was never full: that needs the right to mount (or --without-full-disk)"]


def table(result: dict[str, Any]) -> list[list[object]]:
    counts, memory = result["counts"], result["memory"]
    rows: list[list[object]] = [["minutes", result["minutes"], ""]]
    rows += [[name.replace("_", " "), n, ""] for name, n in counts.items()]
    for name in ("scans_lost", "captures_lost", "hostile_not_answered", "never_answered", "actor_failures"):
        rows.append([name.replace("_", " "), len(result["examples"].get(name, [])), 0])
    for what, figures in result["answers"].items():
        rows.append([f"{what}: answered in, s (median / 99 % / longest)", " / ".join(f"{x:.2f}" for x in figures), ""])
    for who, growth in memory["growth"].items():
        rows.append([f"memory of the {who}: after warm-up, at the end, MB", memory["text"][who], f"growth {growth:+.1%}"])
    return [*rows, ["failures", len(result["failures"]), 0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scanners", type=int, default=2, help="scans at once")
    parser.add_argument(
        "--pause", type=float, default=1.0, help="stretches the pauses between connections: for a busy machine"
    )
    parser.add_argument("--workers", type=int, default=2, help="worker processes of the server")
    parser.add_argument("--keep-log", type=Path, default=None, help="where the server's log shall be kept")
    parser.add_argument(
        "--without-full-disk",
        action="store_true",
        help="where nothing can be mounted: the spool's own limit instead of a full disk",
    )
    parser.add_argument("--name", default="soak", help="of the result file; empty for none")
    given = parser.parse_args()
    result = soak(
        given.minutes, seed=given.seed, scanners=given.scanners, workers=given.workers, pause=given.pause, keep_log=given.keep_log,
        full_disk=not given.without_full_disk,
    )  # fmt: skip
    columns = ["quantity", "measured", "target"]
    rows = table(result)
    print_table("soak", columns, rows)
    if given.name:
        write_result(given.name, {"columns": columns, "rows": rows, **result})
    if result["failures"]:
        print(json.dumps({"examples": result["examples"], "log_errors": result["log_errors"]}, indent=2), file=sys.stderr)
        raise SystemExit("targets missed: " + "; ".join(result["failures"]))


if __name__ == "__main__":
    main()
