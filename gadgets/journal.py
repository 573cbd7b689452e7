"""The journal of jobs: one row for each scan, in an SQLite file beside the raw captures.

A row says what became of a scan and what it was reconstructed with; it holds no patient data and outlives its capture. The states are

    received -> reconstructing -> sent
         \\________________\\_____> failed

``received`` means that the raw capture is complete and on the device. A row in one of the first two states whose process has ended (or
that nobody has taken up, such as a retry) is reconstructed by the next server (`gadgets.recovery`).

Reading is for everybody who may read the spool: ``Journal.open(root)``, ``rows``, ``row``, ``counts``. Writing goes through
`gadgets.bookkeeping`, which sees to it that no scan fails with its row.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gadgets.file_locks import is_locked
from gadgets.job_row import COLUMNS, OPEN_STATES, encoded, row_of, values_of
from gadgets.job_row import STATES as STATES
from gadgets.job_row import Archive as Archive
from gadgets.job_row import JobRow as JobRow
from gadgets.job_row import State as State
from recon_core.errors import ReconError

log = logging.getLogger(__name__)

FILE_NAME = "journal.sqlite"
FORMAT = 1
MAX_ROWS = 20_000
"""Rows kept: years of one scanner, some 30 MB."""

BUSY_SECONDS = 5.0  # for another process that is writing
OWNER_PREFIX, OWNER_SUFFIX = ".owner-", ".lock"


class JournalError(ReconError):
    """The journal cannot be opened, read or written."""


class JournalDamaged(JournalError):
    """The file is no database, or a broken one."""


class UnknownJob(JournalError):
    """No job of this id."""


_TABLE = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, chain TEXT NOT NULL, state TEXT NOT NULL, why TEXT NOT NULL,
    received REAL, started REAL, finished REAL, timings TEXT NOT NULL, n_readouts INTEGER NOT NULL, n_images INTEGER NOT NULL,
    settings TEXT NOT NULL, versions TEXT NOT NULL, weights TEXT NOT NULL, peer TEXT NOT NULL, origin TEXT NOT NULL,
    capture TEXT NOT NULL, fallback TEXT NOT NULL, warnings TEXT NOT NULL, archive TEXT NOT NULL, ask TEXT NOT NULL,
    attempts INTEGER NOT NULL, owner TEXT NOT NULL
)
"""
STRICT_SINCE = (3, 37)
"""SQLite that refuses values of another type when it is asked to; RHEL 9 and Debian 11 have an older one."""


class Journal:
    """The rows in ``<root>/journal.sqlite``. Threads may share it; any number of processes may read, one at a time writes.

    Use ``open`` to read what a server writes; the constructor makes the file when it is missing.

    Parameters
    ----------
    root
        The spool's folder.
    max_rows
        Rows kept; the oldest that are over go first.

    Raises
    ------
    JournalError
        The file cannot be made, is no database, or of a newer format.
    """

    def __init__(self, root: Path | str, max_rows: int = MAX_ROWS) -> None:
        self.root, self.max_rows = Path(root), max_rows
        self.path = self.root / FILE_NAME
        self._lock = threading.Lock()
        with self._errors("open"):
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self._database = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._database.row_factory = sqlite3.Row
            self._prepare()

    @classmethod
    def open(cls, root: Path | str) -> Journal:
        """The journal that a server keeps in ``root``.

        Raises
        ------
        JournalError
            There is none, or it cannot be read.
        """
        if not (Path(root) / FILE_NAME).is_file():
            raise JournalError("no journal", where=str(root), expected=FILE_NAME, remedy="Name the server's spool: --spool")
        return cls(root)

    @staticmethod
    def set_aside(root: Path) -> Path:
        """Rename a damaged journal, so that a new one can be begun; its new name."""
        aside = root / f"{FILE_NAME}.damaged-{time.time_ns()}"
        with contextlib.suppress(OSError):
            (root / FILE_NAME).rename(aside)
        for left in ("-wal", "-shm"):
            (root / (FILE_NAME + left)).unlink(missing_ok=True)
        return aside

    def close(self) -> None:
        """May be called twice."""
        with self._lock:
            self._database.close()

    # -- reading ---------------------------------------------------------------------------------------------------------------

    def rows(self, limit: int | None = 100, state: State | None = None) -> list[JobRow]:
        """Jobs, newest first; ``None`` for all of them.

        Raises
        ------
        JournalError
            The file cannot be read.
        """
        where, values = ("", ()) if state is None else ("WHERE state = ?", (state,))
        found = self._read(
            f"SELECT * FROM jobs {where} ORDER BY received DESC, id DESC LIMIT ?", (*values, -1 if limit is None else limit)
        )
        return [row_of(record) for record in found]

    def row(self, id: str) -> JobRow:
        """One job.

        Raises
        ------
        UnknownJob
            None of this id.
        JournalError
            The file cannot be read.
        """
        found = self._read("SELECT * FROM jobs WHERE id = ?", (id,))
        if not found:
            raise UnknownJob("no such job", where="journal", got=id[:80], remedy="recon jobs lists them")
        return row_of(found[0])

    def find(self, start: str) -> JobRow:
        """The one job whose id begins so; a scan goes before its own retries, whose ids begin with its id.

        Raises
        ------
        UnknownJob
            None does, or several scans' do.
        JournalError
            The file cannot be read.
        """
        with contextlib.suppress(UnknownJob):
            return self.row(start)
        found = self._read("SELECT * FROM jobs WHERE substr(id, 1, ?) = ? ORDER BY id LIMIT 1", (len(start), start))
        if found and start:
            first = row_of(found[0])
            retries = f"{first.id}.r"
            others = self._read(
                "SELECT 1 FROM jobs WHERE substr(id, 1, ?) = ? AND id <> ? AND substr(id, 1, ?) <> ? LIMIT 1",
                (len(start), start, first.id, len(retries), retries),
            )
            if not others:
                return first
        if found:
            raise UnknownJob("several jobs begin so", where="journal", got=start[:80], expected="the whole id: recon jobs")
        return self.row(start)

    def counts(self) -> dict[State, int]:
        """How many jobs are in each state; every state is there.

        Raises
        ------
        JournalError
            The file cannot be read.
        """
        found = {record[0]: int(record[1]) for record in self._read("SELECT state, COUNT(*) FROM jobs GROUP BY state", ())}
        return {state: found.get(state, 0) for state in STATES}

    def waiting(self) -> list[JobRow]:
        """Jobs that are not over and at which no living process works, oldest first; without those of this very process."""
        marks = ", ".join("?" * len(OPEN_STATES))
        found = self._read(f"SELECT * FROM jobs WHERE state IN ({marks}) ORDER BY received, id", OPEN_STATES)
        return [row for row in map(row_of, found) if not row.owner or not self.is_alive(row.owner)]

    def held(self) -> frozenset[str]:
        """Captures (file names) of jobs that are not over, whoever works at them.

        Raises
        ------
        JournalError
            The file cannot be read.
        """
        marks = ", ".join("?" * len(OPEN_STATES))
        found = self._read(f"SELECT capture FROM jobs WHERE state IN ({marks})", OPEN_STATES)
        return frozenset(record[0] for record in found)

    def unarchived(self) -> list[JobRow]:
        """Jobs that are over, whose images still have to be queued for an archive, and at which no living process works."""
        found = self._read("SELECT * FROM jobs WHERE archive = 'due' AND state = 'sent' ORDER BY received", ())
        return [row for row in map(row_of, found) if not self.is_alive(row.owner)]

    # -- writing ---------------------------------------------------------------------------------------------------------------

    def put(self, row: JobRow) -> None:
        """Write a whole row, in place of one of the same id.

        Raises
        ------
        JournalError
            The file cannot be written.
        """
        marks = ", ".join("?" * len(COLUMNS))
        self._write(f"INSERT OR REPLACE INTO jobs ({', '.join(COLUMNS)}) VALUES ({marks})", values_of(row))

    def add_retry(self, original: JobRow, ask: Mapping[str, Any]) -> JobRow:
        """A new row that points to the original's capture, for whoever takes it up.

        Raises
        ------
        JournalError
            The file cannot be written.
        """
        stem = original.id.partition(".r")[0]
        chain = str(ask.get("config") or original.chain)
        for number in range(1, 10_000):
            row = JobRow(
                id=f"{stem}.r{number}", chain=chain, received=time.time(), n_readouts=original.n_readouts, peer=original.peer,
                origin=f"retry of {original.id}", capture=original.capture, ask=dict(ask),
            )  # fmt: skip
            marks = ", ".join("?" * len(COLUMNS))
            added = self._write(f"INSERT OR IGNORE INTO jobs ({', '.join(COLUMNS)}) VALUES ({marks})", values_of(row))
            if added:
                return row
        raise JournalError("too many retries of one scan", where=stem)

    def update(self, id: str, **changes: Any) -> None:
        """Change some columns of a row; nothing when there is no such row.

        Raises
        ------
        JournalError
            The file cannot be written.
        """
        values = [encoded(name, value) for name, value in changes.items()]
        self._write(f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in changes)} WHERE id = ?", (*values, id))

    def claim(self, row: JobRow, owner: str) -> bool:
        """Take a waiting job up, unless somebody else was faster; counts the attempt."""
        return bool(
            self._write(
                "UPDATE jobs SET owner = ?, attempts = attempts + 1 WHERE id = ? AND owner = ? AND state IN (?, ?)",
                (owner, row.id, row.owner, *OPEN_STATES),
            )
        )

    def prune(self, before: float | None = None) -> int:
        """Remove the oldest rows that are over: above ``max_rows``, and those received earlier than ``before``; returns how many.

        Raises
        ------
        JournalError
            The file cannot be written.
        """
        over = "state NOT IN (?, ?)"
        removed = (
            0 if before is None else self._write(f"DELETE FROM jobs WHERE {over} AND received < ?", (*OPEN_STATES, before))
        )
        keep = "SELECT id FROM jobs ORDER BY received DESC, id DESC LIMIT ?"
        return removed + self._write(f"DELETE FROM jobs WHERE {over} AND id NOT IN ({keep})", (*OPEN_STATES, self.max_rows))

    # -- who is alive ------------------------------------------------------------------------------------------------------------

    def is_alive(self, owner: str) -> bool:
        """Whether the process with this token still runs: it holds a lock that ends with it, however it ends."""
        return is_locked(self.root / f"{OWNER_PREFIX}{owner}{OWNER_SUFFIX}")

    def has_server(self) -> bool:
        """Whether some process takes jobs up."""
        return any(is_locked(path) for path in self.root.glob(f"{OWNER_PREFIX}s*{OWNER_SUFFIX}"))

    # -- SQLite ------------------------------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        found = int(self._database.execute("PRAGMA user_version").fetchone()[0])
        if found > FORMAT:
            raise JournalError(
                "the journal is of a newer version", where=str(self.path), got=found, expected=FORMAT,
                remedy="Go back to that version, or move the file away: a new one is begun",
            )  # fmt: skip
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        if found < FORMAT:
            strict = " STRICT" if sqlite3.sqlite_version_info >= STRICT_SINCE else ""
            self._database.execute(f"{_TABLE}{strict}")
            self._database.execute("CREATE INDEX IF NOT EXISTS jobs_state ON jobs (state, received)")
            self._database.execute("CREATE INDEX IF NOT EXISTS jobs_due ON jobs (archive) WHERE archive = 'due'")
            self._database.execute(f"PRAGMA user_version = {FORMAT}")

    def _read(self, statement: str, values: tuple[Any, ...]) -> list[sqlite3.Row]:
        with self._errors("read"), self._lock:
            return self._database.execute(statement, values).fetchall()

    def _write(self, statement: str, values: tuple[Any, ...]) -> int:
        with self._errors("write"), self._lock:
            return self._database.execute(statement, values).rowcount

    @contextlib.contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            kind = JournalDamaged if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else JournalError
            raise kind(f"cannot {what} the journal", where=str(self.path), got=str(error)) from None


class Owner:
    """This process's claim on jobs: a locked file, which the kernel unlocks when the process ends, however it ends.

    Parameters
    ----------
    root
        The spool's folder.
    server
        Whether this process takes up jobs of others.

    Raises
    ------
    JournalError
        The file cannot be made.
    """

    def __init__(self, root: Path, *, server: bool) -> None:
        self.token = ("s" if server else "c") + secrets.token_hex(6)
        self._path = root / f"{OWNER_PREFIX}{self.token}{OWNER_SUFFIX}"
        for left in root.glob(f"{OWNER_PREFIX}*{OWNER_SUFFIX}"):
            if not is_locked(left):
                left.unlink(missing_ok=True)
        try:
            unlocked = self._path.with_suffix(".new")  # another process would take an unlocked one for a dead one's
            self._fd = os.open(unlocked, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            unlocked.rename(self._path)
        except OSError as error:
            raise JournalError("cannot make a lock", where=str(self._path), got=error.strerror) from None

    def close(self) -> None:
        """May be called twice."""
        if self._fd >= 0:
            self._path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1
