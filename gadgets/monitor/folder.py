"""The monitor's side of the files: what a server says of itself, its jobs, and everything about one of them.

Two sources are put together: the server's status (scans under way, anew every second) and the journal of jobs, which is the truth
about everything that is over. Neither has to be there.
"""

from __future__ import annotations

import contextlib
import csv
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gadgets.journal import JobRow, Journal, JournalError, UnknownJob
from gadgets.monitor.files import LOG_FILE, STATUS_FILE, TOLD_FILE, begun, folder_of, is_job_id, read_object
from gadgets.monitor.processes import Process, is_alive, workers_of
from gadgets.pacs_backlog import Backlog, QueueWatch

FRESH_SECONDS = 10.0
"""A status older than this is that of a server that hangs: it is written every half second."""

MAX_LOG = 256 << 10  # bytes of a job's log that are shown
STATES = ("receiving", "received", "reconstructing", "sent", "failed")


@dataclass(frozen=True)
class Status:
    """What the server said last; ``said`` is empty when there is no server and never was one."""

    said: Mapping[str, Any]
    now: float

    @property
    def age(self) -> float:
        """Seconds since it was said."""
        return max(0.0, self.now - number(self.said.get("time")))

    @property
    def pid(self) -> int:
        return int(number(self.said.get("pid")))

    @property
    def server(self) -> Mapping[str, Any]:
        found = self.said.get("server")
        return found if isinstance(found, dict) else {}

    @property
    def tallies(self) -> Mapping[str, Any]:
        found = self.said.get("tallies")
        return found if isinstance(found, dict) else {}

    @property
    def active(self) -> list[Mapping[str, Any]]:
        """Scans under way; none when their server is not."""
        found = self.said.get("active")
        return [scan for scan in found if isinstance(scan, dict)] if isinstance(found, list) and self.alive else []

    @property
    def exists(self) -> bool:
        """Whether the process that wrote it still runs."""
        return self.pid > 0 and is_alive(self.pid)

    @property
    def alive(self) -> bool:
        """Whether the server runs and does not hang."""
        return self.exists and self.age < FRESH_SECONDS

    def workers(self) -> list[Process]:
        """The server's compute processes on this machine."""
        return workers_of(self.pid) if self.exists else []


@dataclass(frozen=True)
class Job:
    """One scan as the page lists it. ``started`` in seconds since the epoch, ``seconds`` from the first byte to now or to the end.

    ``watched``: a running server says how far it is.
    """

    id: str
    chain: str
    state: str
    started: float = 0.0
    seconds: float = 0.0
    n_readouts: int = 0
    n_images: int = 0
    n_bytes: int = 0
    fraction: float = 0.0
    left: str = ""
    n_warnings: int = 0
    fallback: str = ""
    why: str = ""
    watched: bool = False

    @property
    def is_over(self) -> bool:
        return self.state in ("sent", "failed")


@dataclass(frozen=True)
class JobDetails:
    """Everything there is about one job."""

    job: Job
    row: JobRow | None
    warnings: tuple[str, ...]
    words: tuple[str, ...]
    timings: Mapping[str, float]
    series: tuple[tuple[int, int], ...]
    left_out: int
    log: str
    quality: tuple[Slice, ...]


@dataclass(frozen=True)
class Slice:
    """What the method told of one slice: figures of merit, sentences, and the names of its curves."""

    number: int
    chain: str
    quality: Mapping[str, float | None]
    notes: tuple[str, ...]
    curves: Mapping[str, list[list[float]]] = field(default_factory=dict)


CURVES = ("loss", "held_out", "routing_weights")
MAX_POINTS = 20_000


class Folder:
    """A server's spool, read only. Every method may be called from any thread and never raises for what it finds.

    Parameters
    ----------
    root
        The spool's folder; need not exist yet.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._lock = threading.Lock()
        self._journal: Journal | None = None
        self._queue = QueueWatch()

    def status(self) -> Status:
        """What the server says now."""
        return Status(read_object(self.root / STATUS_FILE), time.time())

    def free_bytes(self) -> int:
        """Free for this user on the spool's disk; -1 when there is no spool."""
        try:
            state = os.statvfs(self.root)
        except OSError:
            return -1
        return state.f_bavail * state.f_frsize

    def is_writable(self) -> bool:
        return self.root.is_dir() and os.access(self.root, os.W_OK | os.X_OK)

    def backlog(self, status: Status | None = None) -> tuple[Backlog, ...]:
        """What waits for archives, or nobody took; also when there is no server any more."""
        said = (self.status() if status is None else status).server
        queue = said.get("archive_queue")
        # where recon serve has it, so that what was left by a server with --pacs does not go unseen under one without
        place = Path(queue) if isinstance(queue, str) and queue and "\0" not in queue else self.root.parent / "pacs"
        return self._queue.look(place, texts(said.get("archives")))

    def jobs(self, limit: int = 100, status: Status | None = None) -> list[Job]:
        """Newest first."""
        rows = {row.id: row for row in self._rows(limit)}
        status = self.status() if status is None else status
        live = {str(scan.get("id")): scan for scan in status.active if is_job_id(str(scan.get("id")))}
        found = [merged(job, rows.get(job), live.get(job)) for job in {*rows, *live}]
        return sorted(found, key=lambda job: (job.started, job.id), reverse=True)[:limit]

    def counts(self) -> dict[str, int]:
        """Jobs of the journal by state."""
        with self._reading() as journal:
            return {} if journal is None else {str(state): n for state, n in journal.counts().items()}
        return {}

    def weights(self) -> set[tuple[str, str]]:
        """Chain and sha256 of the trained weights of the last jobs."""
        return {(row.chain, row.weights) for row in self._rows(50) if row.weights}

    def job(self, id: str) -> JobDetails | None:
        """``None`` for what is no job, or not known."""
        if not is_job_id(id):
            return None
        row = self._row(id)
        live = next((scan for scan in self.status().active if scan.get("id") == id), None)
        if row is None and live is None:
            return None
        told = read_object(folder_of(self.root, id) / TOLD_FILE)
        timings = {name: number(value) for name, value in _mapping(told.get("seconds")).items()}
        return JobDetails(
            job=merged(id, row, live),
            row=row,
            warnings=tuple(row.warnings) if row is not None and row.warnings else texts(told.get("warnings")),
            words=texts(told.get("words")),
            timings=row.timings if row is not None and row.timings else timings,
            series=tuple((int(number(pair[0])), int(number(pair[1]))) for pair in _pairs(told.get("series"))),
            left_out=int(number(told.get("left_out"))),
            log=self._log(id),
            quality=self._slices(id),
        )

    def close(self) -> None:
        """Let go of the journal."""
        with self._lock:
            if self._journal is not None:
                self._journal.close()
            self._journal = None

    def _log(self, id: str) -> str:
        try:
            with (folder_of(self.root, id) / LOG_FILE).open("rb") as file:
                return file.read(MAX_LOG).decode("utf-8", errors="replace")
        except OSError:
            return ""

    def _slices(self, id: str) -> tuple[Slice, ...]:
        folder = folder_of(self.root, id)
        found = []
        for key, part in _mapping(read_object(folder / "quality.json").get("slices")).items():
            if not (isinstance(part, dict) and key.isdecimal() and len(key) <= 6):
                continue
            quality = {
                name: None if value is None else number(value) for name, value in _mapping(part.get("quality")).items()
            }
            stem = f"slice-{int(key):04d}"
            curves = {name: read_table(folder / f"{stem}_{name}.csv") for name in CURVES}
            shown = {name: rows for name, rows in curves.items() if rows}
            found.append(Slice(int(key), str(part.get("chain", "")), quality, texts(part.get("notes")), shown))
        return tuple(sorted(found, key=lambda part: part.number))

    def _rows(self, limit: int) -> list[JobRow]:
        with self._reading() as journal:
            return [] if journal is None else journal.rows(limit)
        return []

    def _row(self, id: str) -> JobRow | None:
        with self._reading() as journal, contextlib.suppress(UnknownJob):
            return None if journal is None else journal.row(id)
        return None

    @contextlib.contextmanager
    def _reading(self) -> Any:
        """The journal, or ``None``; one that cannot be read (removed, being made, broken) is opened anew the next time."""
        with self._lock:
            if self._journal is None:
                with contextlib.suppress(JournalError):
                    self._journal = Journal.open(self.root)
            journal = self._journal
        try:
            yield journal
        except UnknownJob:
            raise
        except JournalError:
            with self._lock:
                if self._journal is not None:
                    self._journal.close()
                self._journal = None


def merged(id: str, row: JobRow | None, live: Mapping[str, Any] | None) -> Job:
    """One job from what the journal and the running server say of it; what is over is the journal's."""
    said: Mapping[str, Any] = live or {}
    over = row is not None and row.is_over
    state = row.state if row is not None and (over or live is None) else str(said.get("state", "received"))
    if state not in STATES:  # a capture that was cut short
        state = "failed"
    started = _begun_at(row, begun(id))
    ended = row.finished if row is not None and row.finished else None
    return Job(
        id=id,
        chain=str(said.get("chain") or (row.chain if row is not None else "")),
        state=state,
        started=started,
        seconds=max(0.0, ended - started) if ended else number(said.get("seconds")),
        n_readouts=int(number(said.get("readouts"))) or (row.n_readouts if row is not None else 0),
        n_images=row.n_images if over and row is not None else int(number(said.get("images"))),
        n_bytes=int(number(said.get("bytes"))),
        fraction=1.0 if state == "sent" else min(1.0, max(0.0, number(said.get("fraction")))),
        left="" if over else str(said.get("left", ""))[:20],
        n_warnings=len(row.warnings) if over and row is not None else int(number(said.get("warnings"))),
        fallback=row.fallback if row is not None else "",
        why=row.why if row is not None else "",
        watched=live is not None,
    )


def _begun_at(row: JobRow | None, first: float) -> float:
    """A retry begins when somebody asks for it, not with its scan's first byte."""
    return row.received if row is not None and ".r" in row.id and row.received else first


def number(value: Any) -> float:
    """A finite number, 0 for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0.0
    return float(value) if abs(value) < 1e300 else 0.0


def texts(value: Any) -> tuple[str, ...]:
    """The strings of a list."""
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def read_table(path: Path) -> list[list[float]]:
    """Rows of a curve's CSV without its heading; empty where there is none or it is no table of numbers."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                [float(cell) for cell in line]
                for _, line in zip(range(MAX_POINTS), list(csv.reader(file))[1:], strict=False)
            ]
    except (OSError, ValueError, csv.Error):
        return []
    return rows if rows and len({len(row) for row in rows}) == 1 else []


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _pairs(value: Any) -> list[list[Any]]:
    return [pair for pair in value if isinstance(pair, list) and len(pair) == 2] if isinstance(value, list) else []
