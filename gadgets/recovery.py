"""Jobs whose connection is gone: after the death of a server or a client, and retries. None of them is lost.

A capture is replayed to a connection of its own (`gadgets.held_capture`), through the same code as when it came from the scanner, so
the images are the same, too. They go into ``images.h5`` in the job's folder.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from gadgets.bookkeeping import Books, Entry, reason_of
from gadgets.capture import Capture, amend_sidecar, read_capture, windows
from gadgets.clock import not_ahead
from gadgets.connection import Connection
from gadgets.errors import CaptureGone
from gadgets.handlers import ChainRequest, Handlers
from gadgets.held_capture import CapturePeer, HeldLog, HeldLogs
from gadgets.journal import JobRow, Journal
from gadgets.lookout import Lookout
from gadgets.results import Results
from gadgets.spool import ORPHAN_NOTE, Spool
from gadgets.wire import events
from gadgets.wire.framing import FrameParser, Limits
from recon_core.errors import ReconError

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Between two looks at the journal for jobs that other processes have left or put in."""

HOUSEKEEPING_SECONDS = 60.0
JOIN_SECONDS = 30.0
MAX_ATTEMPTS = 3
"""A scan that ends the process that reconstructs it, again and again, must not keep the server from its work."""

ROW_SECONDS = 3 * 365 * 86400.0  # rows are kept for so long


@dataclass(frozen=True)
class Examined:
    """What is in a capture. ``end`` is where its last whole message ends; ``lost``: what follows it cannot be read."""

    n_readouts: int
    closed: bool
    chain: str
    is_node: bool
    end: int = 0
    lost: bool = False


def examine(path: Path, limits: Limits | None = None) -> Examined:
    """Look through a capture: headers only, no samples."""
    n_readouts, chain = 0, ""
    with FrameParser(limits) as parser:
        for window in windows(path) if path.stat().st_size else ():
            for event in parser.feed(window):
                if isinstance(event, events.Readouts):
                    n_readouts += len(event)
                elif isinstance(event, events.Composite):
                    n_readouts += 1
                elif isinstance(event, events.ConfigFile):
                    chain = ChainRequest(name=event.name).label
                elif isinstance(event, events.ConfigScript):
                    chain = ChainRequest(script=event.text).label
        return Examined(n_readouts, parser.closed, chain, parser.role == "node", parser.boundary, parser.lost)


class Recovery:
    """Takes up the jobs that wait in the journal of a spool.

    Parameters
    ----------
    books, spool, results
        Of the server, or of the process that retries a job.
    handlers, limits
        As its connections have them.
    """

    def __init__(
        self, books: Books, spool: Spool, results: Results, handlers: Handlers, limits: Limits | None = None
    ) -> None:
        assert spool.root is not None
        self._books, self._spool, self._results = books, spool, results
        self._handlers, self._limits = handlers, limits or Limits()
        self._root = spool.root
        self._lock = threading.Lock()
        self._peers: set[CapturePeer] = set()
        self._stopping = False
        self._adopted = threading.Event()
        self._tidied = float("-inf")
        self._lookouts = (
            Lookout("recovery", self._look_for_lost, LOOK_SECONDS),
            Lookout("retries", self._look_for_retries, LOOK_SECONDS),
            Lookout("housekeeping", self._tidy, LOOK_SECONDS),
        )
        spool.held = books.held
        self.housekeeping: Callable[[], None] = lambda: None  # of the rest of the server, once a minute

    def start(self) -> None:
        """Look after what was left, now and from now on."""
        for lookout in self._lookouts:
            lookout.start()

    def wake(self) -> None:
        """A job waits."""
        for lookout in self._lookouts:
            lookout.wake()

    def close(self) -> None:
        """Stop; a job that is being reconstructed waits for the next server."""
        with self._lock:
            self._stopping = True
            for peer in self._peers:
                peer.stop()
        for lookout in self._lookouts:
            lookout.stop()

    def join(self, timeout: float = JOIN_SECONDS) -> None:
        """Wait for the end of the threads, after ``close`` and after the workers have been stopped."""
        until = time.monotonic() + timeout
        for lookout in self._lookouts:
            lookout.join(max(0.0, until - time.monotonic()))

    # -- the threads -------------------------------------------------------------------------------------------------------------

    def _look_for_lost(self) -> None:
        """Scans that lost their connection. A retry may take hours; they do not wait for it, and nothing else does."""
        journal = self._books.journal()
        if not self._adopted.is_set():
            self._adopt(journal)
            self._adopted.set()
        self._take_up(lambda row: not row.origin.startswith("retry"))

    def _look_for_retries(self) -> None:
        self._take_up(lambda row: row.origin.startswith("retry"))

    def _take_up(self, ours: Callable[[JobRow], bool]) -> None:
        """The waiting jobs of one kind, oldest first; the journal is read after each, because more may have come."""
        journal, seen = self._books.journal(), set[str]()
        while not self._stopping:
            row = next((row for row in journal.waiting() if ours(row) and row.id not in seen), None)
            if row is None:
                return
            seen.add(row.id)  # one that is to be tried again has its turn after a pause
            self.reconstruct(row)

    def _tidy(self) -> None:
        journal = self._books.journal()
        if not self._adopted.is_set():
            return  # captures without a row are not known to wait
        for row in journal.unarchived():
            journal.update(row.id, owner=self._books.token)
            self._results.over(row)
        self._results.note_receipts(journal)
        if time.monotonic() - self._tidied > HOUSEKEEPING_SECONDS:
            self._tidied = time.monotonic()
            self._spool.make_room()
            self._results.catch_up(journal)
            journal.prune(not_ahead() - ROW_SECONDS)
            self.housekeeping()

    def _adopt(self, journal: Journal) -> None:
        """Rows for captures of a server that died before it wrote any."""
        known = {row.id: row for row in journal.rows(limit=None)}
        for path in self._spool.captures():
            with contextlib.suppress(ReconError, OSError):
                capture = read_capture(path)
                if capture.info.get("note") == ORPHAN_NOTE:
                    self._adopt_one(journal, capture, known.get(path.stem))

    def _adopt_one(self, journal: Journal, capture: Capture, row: JobRow | None) -> None:
        if row is None:
            found = examine(capture.path)
            if found.n_readouts:
                row = JobRow(
                    id=capture.path.stem, chain=found.chain, received=capture.path.stat().st_mtime, n_readouts=found.n_readouts,
                    origin="node" if found.is_node else "connection", capture=capture.path.name,
                )  # fmt: skip
                if not found.closed:
                    why = f"the scan was cut: the server ended after {found.n_readouts} readouts"
                    row = replace(row, state="failed", why=why, finished=time.time())
                journal.put(row)
        status = "complete" if row is not None and row.state == "sent" else "truncated"
        words = "it was complete" if row is not None and row.state != "failed" else "it was cut"
        amend_sidecar(capture.path, note=f"{ORPHAN_NOTE}; {words}", status=status)
        log.warning("event=capture_adopted job=%s state=%s", capture.path.stem, row.state if row else "no scan")

    # -- one job -----------------------------------------------------------------------------------------------------------------

    def reconstruct(self, row: JobRow) -> JobRow:
        """Reconstruct a waiting job now, unless another process is faster; the row as it is afterwards.

        Raises
        ------
        JournalError
            The journal cannot be read or written.
        """
        journal = self._books.journal()
        if row.attempts >= MAX_ATTEMPTS:
            return self._over(replace(row, state="failed", why=f"{row.why or 'no reason known'}; {row.attempts} attempts"))
        if not journal.claim(row, self._books.token):
            return journal.row(row.id)
        why = row.why or ("" if row.origin.startswith("retry") else "the server ended before its images were sent")
        row = replace(row, owner=self._books.token, attempts=row.attempts + 1, why=why)
        log.info("event=job_taken_up job=%s origin=%r attempt=%d", row.id, row.origin, row.attempts)
        try:
            capture = require_capture(self._root, row)
            row = self._replay(row, capture)
        except Exception as error:  # whatever it is, it ends this job only
            if not isinstance(error, ReconError):
                log.error("event=recovery_crashed job=%s error=%s", row.id, type(error).__name__)
            row = replace(row, state="failed", why=reason_of(error))
        return self._over(row)

    def _over(self, row: JobRow) -> JobRow:
        if row.state == "received":
            # when the server is ending, this was no attempt
            row = replace(row, owner="", attempts=row.attempts - 1 if self._stopping else row.attempts)
        elif row.finished is None:
            row = replace(row, finished=time.time())
        self._books.put(row)
        self._books.settle()
        log.info("event=job_over job=%s state=%s images=%d why=%r", row.id, row.state, row.n_images, row.why)
        if row.is_over and row.capture and not row.origin.startswith("retry"):
            amend_sidecar(self._root / row.capture, status="complete" if row.state == "sent" else "failed", chain=row.chain)
        return row

    def _replay(self, row: JobRow, capture: Path) -> JobRow:
        entry = Entry(self._books, base=row)
        end, cut = self._cut(row, capture)
        peer = CapturePeer(capture, end)
        with self._lock:
            self._peers.add(peer)
            if self._stopping:
                return replace(row, state="received")
        logs = HeldLogs(HeldLog(capture, self._root / row.folder, cut))
        connection = Connection(row.id, peer, row.peer, self._asked(row, entry), self._limits, logs)
        connection.stopping = self._stopping
        try:
            connection.run()
        finally:
            with self._lock:
                self._peers.discard(peer)
        if self._stopping and (entry.row is None or entry.row.state != "sent"):
            return replace(row, state="received")
        if entry.row is None:
            return replace(row, state="failed", why="there is no scan in the capture")
        row = replace(entry.row, why=row.why if entry.row.state == "sent" else entry.row.why)
        if row.state == "sent" and row.n_images:
            row = self._results.finish(row)
        return row

    def _cut(self, row: JobRow, capture: Path) -> tuple[int | None, str]:
        """Where a scan that is tried again broke off, and words about it. By itself no such scan is reconstructed: somebody asked."""
        if not row.origin.startswith("retry"):
            return None, ""
        found = examine(capture, self._limits)
        if found.closed or found.lost or not found.n_readouts:
            return None, ""
        return found.end, f"the scan broke off after {found.n_readouts} readouts"

    def _asked(self, row: JobRow, entry: Entry) -> Handlers:
        """The server's handlers, with a retry's own chain and settings in place of those in the capture."""
        config, own = row.ask.get("config"), dict(row.ask.get("set", {}))

        def chosen(request: ChainRequest) -> ChainRequest:
            if config:
                return ChainRequest(name=config, overrides=own)
            return replace(request, overrides={**request.overrides, **own})

        handlers = replace(self._handlers, chosen=chosen, entry=lambda peer: entry)
        return replace(handlers, node_request=lambda text: ChainRequest(name=config)) if config else handlers


def require_capture(root: Path, row: JobRow) -> Path:
    """The raw data of a job.

    Raises
    ------
    CaptureGone
        They were not kept, or have been removed.
    """
    if not row.capture:
        raise CaptureGone("the raw data of this job were not kept", where=f"job {row.id}", remedy="Was the disk full?")
    path = root / row.capture
    if path.parent != root or "/" in row.id or not path.is_file():  # also from a journal that somebody has written into
        raise CaptureGone(
            "the raw data of this job have been removed", where=f"job {row.id}", got=f"no {row.capture}",
            remedy="Keep more: --spool-gb, --keep-days",
        )  # fmt: skip
    return path
