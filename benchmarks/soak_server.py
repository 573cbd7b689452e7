"""The server of the soak, and what can be seen of it from outside."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from benchmarks.latency import server
from benchmarks.soak_disk import SPOOL_GB
from gadgets.job_row import OPEN_STATES
from gadgets.journal import Journal, JournalError
from gadgets.scratch import SCRATCH_PREFIX

STALL_SECONDS = 5.0
SLOW_SECONDS = 60.0
START_BYTES = 64 << 10  # of a capture, in which the header is


class Tally:
    """What happened. Any thread may count."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.problems: dict[str, list[str]] = defaultdict(list)
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def add(self, problem: str, words: str) -> None:
        """Something that must not happen."""
        with self._lock:
            self.problems[problem].append(words)

    def answered(self, what: str, seconds: float) -> None:
        with self._lock:
            self.counts[f"{what}_connections"] += 1
            self.counts[f"{what}_answers_after_a_minute"] += seconds > SLOW_SECONDS
            self._seconds[what].append(seconds)

    def answers(self) -> dict[str, tuple[float, float, float]]:
        """Median, 99th percentile and longest wait for the end of an answer, s."""
        found = {}
        for what, seconds in self._seconds.items():
            ordered = sorted(seconds)
            found[what] = (statistics.median(ordered), ordered[int(0.99 * (len(ordered) - 1))], ordered[-1])
        return found


@contextlib.contextmanager
def serve(spool: Path, log: Path, workers: int) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """``recon serve`` on a free port."""
    options = ["--spool-gb", str(SPOOL_GB), "--workers", str(workers), "--threads", "1"]
    options += ["--stall-seconds", str(STALL_SECONDS), "--log-level", "info"]
    with log.open("w") as errors, server(*options, spool=spool, log=errors) as running:
        yield running


def captured(spool: Path, marker: str, seconds: float) -> bool:
    """Whether a capture holds ``marker``, within so many seconds."""
    until = time.monotonic() + seconds
    wanted = marker.encode()
    while True:
        for path in sorted(spool.glob("*.mrd"), reverse=True)[:200]:
            with contextlib.suppress(OSError), path.open("rb") as file:
                if wanted in file.read(START_BYTES):
                    return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)


def open_jobs(spool: Path, patience: float) -> list[str]:
    """Jobs of the journal that are not over when none has ended for so many seconds: those whose clients have left wait until
    no scanner does."""
    until, fewest = time.monotonic() + patience, 1 << 30
    while True:
        try:
            journal = Journal.open(spool)
        except JournalError as error:
            return [str(error)]
        try:
            left = [f"{row.id} {row.state} {row.why}" for state in OPEN_STATES for row in journal.rows(None, state)]
        finally:
            journal.close()
        if len(left) < fewest:
            until, fewest = time.monotonic() + patience, len(left)
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.5)


def without_sidecar(spool: Path, patience: float = 10.0) -> list[str]:
    """Captures that nobody has finished, also not after so many seconds: a client has its images a moment before that is noted."""
    until = time.monotonic() + patience
    while True:
        left = sorted(path.name for path in spool.glob("*.mrd") if not path.with_suffix(".json").exists())
        if not left or time.monotonic() > until:
            return left
        time.sleep(0.2)


def leftovers(pid: int) -> list[str]:
    """Scratch folders of a server that has ended."""
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    return sorted({path.name for place in places for path in place.glob(f"{SCRATCH_PREFIX}{pid}-*")})
