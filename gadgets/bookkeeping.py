"""Writing the journal while scans run: no scan ever waits for its row, or fails with it.

Connections and recoveries tell an ``Entry`` what happens; a thread of its own forces raw data to the device and writes rows. A row that
cannot be written is tried again with the next one; a journal that is damaged is set aside and a new one begun, loudly.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from gadgets.errors import Disconnected, JobFailed, WorkerDied
from gadgets.handlers import PREVIEW_SERIES, ScanFacts
from gadgets.job_images import ImageLog
from gadgets.journal import Archive, JobRow, Journal, JournalDamaged, JournalError, Owner, State
from gadgets.queries import versions as installed_versions
from gadgets.scan_log import ScanLog
from gadgets.wire.dtypes import IMAGE_HEADER
from gadgets.wire.ids import MessageId
from recon_core.errors import ReconError

log = logging.getLogger(__name__)

MAX_UNWRITTEN = 1000  # rows held while the disk takes none
AGAIN_SECONDS = 10.0  # between two tries to write them
CLOSE_SECONDS = 30.0
MAX_WARNINGS = 50  # of one row
WHY_CHARS = 500
NOT_FORCED = "a power cut may cost the raw data of this scan: they cannot be forced to the device"
PEER_LEFT = "the peer left before it had its images"

_IMAGE = int(MessageId.IMAGE).to_bytes(2, "little")
_TEXT = int(MessageId.TEXT).to_bytes(2, "little")
_fields = IMAGE_HEADER.fields
assert _fields is not None
_SERIES = 2 + int(_fields["image_series_index"][1])


@dataclass(frozen=True)
class _Note:
    """One thing to write: a row, after forcing raw data to the device where ``force`` says so."""

    row: JobRow
    force: Callable[[], str] | None = None
    then: Callable[[JobRow], None] | None = None


class Books:
    """The journal of one process. Its thread begins with the first row.

    Parameters
    ----------
    root
        The spool's folder; ``None`` writes nothing.
    keep_images
        Keep every scan's images in its job folder, so that they outlive a client that dies.
    archive
        Whether images go to an archive by themselves (see ``gadgets.results``).
    """

    def __init__(self, root: Path | None, *, keep_images: bool = False, archive: bool = False) -> None:
        self.root, self.keep_images, self.archive = root, keep_images, archive
        self.left: Callable[[JobRow], None] = lambda row: None  # this scan lost its connection, and waits for somebody
        self.over: Callable[[JobRow], None] = lambda row: None  # this scan with its own connection is over
        self.is_server = False  # whether this process takes up jobs that others have left; set before the first row
        self._versions = installed_versions()
        self._notes: queue.SimpleQueue[_Note | threading.Event | None] = queue.SimpleQueue()
        self._queued: deque[JobRow] = deque()  # rows among the notes
        self._unwritten: dict[str, JobRow] = {}
        self._held: frozenset[str] = frozenset()
        self._closed = False
        self._flush: dict[str, float] = {}
        self._unforced: dict[str, str] = {}  # warnings of rows whose raw data could not be forced to the device
        self._journal: Journal | None = None
        self._owner: Owner | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def token(self) -> str:
        """This process in the column ``owner``; "" where it cannot be marked."""
        with self._lock:
            if self._owner is None and self.root is not None:
                try:
                    self._owner = Owner(self.root, server=self.is_server)
                except JournalError as error:
                    log.error("event=journal_failed error=%r", str(error))
            return "" if self._owner is None else self._owner.token

    def journal(self) -> Journal:
        """The journal itself, opened (again) where needed.

        Raises
        ------
        JournalError
            It cannot be opened.
        """
        if self.root is None:
            raise JournalError("no journal is kept", where="spool", got="captures are switched off")
        with self._lock:
            if self._journal is None:
                try:
                    self._journal = Journal(self.root)
                except JournalDamaged as error:
                    aside = Journal.set_aside(self.root)
                    log.error("event=journal_damaged error=%r action=new_one kept_as=%s", str(error), aside.name)
                    self._journal = Journal(self.root)
            return self._journal

    def entry(self, peer: str = "") -> Entry:
        """For a new connection; there is no row before it has a scan."""
        return Entry(self, peer=peer)

    def put(self, row: JobRow, force: Callable[[], str] | None = None, then: Callable[[JobRow], None] | None = None) -> None:
        """Write a row soon. ``force`` is called before it (what it says is logged, and a warning of the row), ``then`` after it."""
        if self.root is None:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="journal", daemon=True)
                self._thread.start()
            self._queued.append(row)
            self._notes.put(_Note(row, force, then))

    def held(self) -> frozenset[str]:
        """Captures (file names) that are still to be reconstructed: in the journal, and in rows that are not written yet."""
        if self.root is not None and not self._closed:
            try:
                self._held = self.journal().held()
            except JournalError as error:  # what was held is held on
                log.error("event=journal_failed error=%r", str(error))
        unwritten = [*list(self._queued), *list(self._unwritten.values())]
        return self._held | {row.capture for row in unwritten if not row.is_over}

    def settle(self, timeout: float = CLOSE_SECONDS) -> bool:
        """Wait until everything put so far has been tried; whether that was in time."""
        if self._thread is None or not self._thread.is_alive():
            return not self._queued
        done = threading.Event()
        self._notes.put(done)
        return done.wait(timeout)

    def close(self) -> None:
        """Write what is left, and let go of the jobs: whatever is not over may be taken up by others."""
        if self._thread is not None:
            self._notes.put(None)
            self._thread.join(CLOSE_SECONDS)
        self._closed = True
        with self._lock:
            if self._owner is not None:
                self._owner.close()
            if self._journal is not None:
                self._journal.close()
            self._owner = self._journal = None

    # -- the thread --------------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            try:
                note = self._notes.get(timeout=AGAIN_SECONDS if self._unwritten else None)
            except queue.Empty:
                self._write_held()
                continue
            if note is None:
                self._write_held()
                return
            if isinstance(note, threading.Event):
                note.set()
                continue
            try:
                self._take(note)
            except Exception as error:  # a bug here must not end the bookkeeping of all later scans
                log.error("event=journal_crashed job=%s error=%s", note.row.id, type(error).__name__)
            finally:
                self._queued.popleft()

    def _take(self, note: _Note) -> None:
        row = note.row
        if note.force is not None:
            started = time.monotonic()
            problem = note.force()
            self._flush[row.id] = time.monotonic() - started
            if problem:
                log.error("event=capture_not_flushed job=%s error=%s", row.id, problem)
                self._unforced[row.id] = not_forced(problem)
        if row.id in self._flush:
            row = replace(row, timings={**row.timings, "flush": round(self._flush[row.id], 4)})
        unforced = self._unforced.get(row.id)
        if unforced is not None and unforced not in row.warnings:  # there already: its connection has said so
            row = replace(row, warnings=(*row.warnings, unforced))
        self._unwritten[row.id] = row
        self._write_held()
        if row.is_over or not row.owner:
            self._flush.pop(row.id, None)
            self._unforced.pop(row.id, None)
        if note.then is not None:
            note.then(row)

    def _write_held(self) -> None:
        """Rows that are not in the journal yet, oldest first."""
        try:
            journal = self.journal()
            for name in list(self._unwritten):
                journal.put(self._unwritten[name])
                del self._unwritten[name]
        except JournalError as error:
            log.error("event=journal_failed rows=%d error=%r", len(self._unwritten), str(error))
            if isinstance(error, JournalDamaged):
                with self._lock, contextlib.suppress(JournalError):
                    if self._journal is not None:
                        self._journal.close()
                    self._journal = None
            for name in list(self._unwritten)[:-MAX_UNWRITTEN]:
                del self._unwritten[name]


class Entry:
    """One scan's row in the making.

    Parameters
    ----------
    books
        Where it is written.
    peer
        Address of the connection.
    base
        The row of a job that is taken up again; its connection is gone, and whoever takes it up writes the end (``row``).
    """

    def __init__(self, books: Books, peer: str = "", base: JobRow | None = None) -> None:
        self._books, self._peer, self._base = books, peer, base
        self.row: JobRow | None = None
        self.images: ImageLog | None = None
        self.n_images = 0
        self._began = time.monotonic()
        self._closed = 0.0
        self._timings: dict[str, float] = {}
        # whoever takes a job up does not force its raw data to the device again
        self._warnings = [] if base is None else [words for words in base.warnings if words.startswith(NOT_FORCED)]
        self._forced = threading.Event()
        self._forced.set()
        self._unforced = ""

    def received(self, raw: ScanLog | None, chain: str, n_readouts: int, protocol: str) -> None:
        """The peer's CLOSE has come and reconstructing begins."""
        if self._books.root is None:
            return
        self._begin_row(raw, chain, n_readouts, protocol)
        assert self.row is not None
        if self._base is None:
            self._timings["receiving"] = round(self._closed - self._began, 4)
            self._books.put(self.row, self._force(raw))
        self.row = replace(self.row, state="reconstructing", started=time.time())
        self._books.put(self.row)
        if (
            raw is not None
            and self.row.capture
            and (self._base is not None or self._books.keep_images or self._books.archive)
        ):
            self.images = ImageLog(self._books.root / self.row.folder)

    def _force(self, raw: ScanLog | None) -> Callable[[], str] | None:
        """What forces kept raw data to the device, before the row that says that they are there."""
        if raw is None or not raw.kept:
            return None
        flush = raw.flush()
        self._forced.clear()

        def force() -> str:
            problem = flush()
            self._unforced = not_forced(problem) if problem else ""
            self._forced.set()
            return problem

        return force

    def unforced(self, seconds: float = 0.0) -> str:
        """A warning for the operator where the raw data cannot be forced to the device; only once, "" for none.

        It is not known at once: this waits for ``seconds`` at most.
        """
        if not self._forced.wait(seconds):
            return ""
        words, self._unforced = self._unforced, ""
        return words

    def sent(self, message: bytes | bytearray | memoryview) -> None:
        """One message has gone to the peer."""
        kind = bytes(memoryview(message)[:2])
        if kind == _TEXT:
            self.said(bytes(message[6:]).decode(errors="replace"))
        if kind != _IMAGE:
            return
        if int.from_bytes(memoryview(message)[_SERIES : _SERIES + 2], "little") <= PREVIEW_SERIES:
            self.n_images += 1
            seconds = round(time.monotonic() - self._closed, 4)
            self._timings.setdefault("first_image", seconds)
            self._timings["last_image"] = seconds
        if self.images is not None:
            self.images.append(message)

    def said(self, text: str) -> None:
        """The operator was told something: warnings are kept."""
        kind, _, words = text.strip().partition(" ")
        if kind == "WRN" and len(self._warnings) < MAX_WARNINGS:
            self._warnings.append(words[:WHY_CHARS])

    def end(
        self, failure: Exception | None, facts: ScanFacts, *, complete: bool, delivered: bool, stopping: bool, raw: ScanLog | None,
        chain: str, n_readouts: int, protocol: str,
    ) -> None:  # fmt: skip
        """The connection is over.

        Parameters
        ----------
        failure
            What went wrong first.
        facts
            Of the scan, as far as it was opened.
        complete, delivered, stopping
            Whether the peer's CLOSE had come, whether the peer read on until ours, and whether the server is ending.
        raw, chain, n_readouts, protocol
            As in ``received``, which was not called for a scan that failed before.
        """
        if self._books.root is None:
            return
        force = None
        if self.row is None:
            self._begin_row(raw, chain, n_readouts, protocol)
            force = self._force(raw) if self._base is None else None
        assert self.row is not None
        kept = self.images is not None and not self.images.failed
        if failure is None:  # everything went out; what its reader has lost is kept
            left = not delivered and not kept and self.n_images > 0
        else:
            # workers that die say more about this machine than about the scan: it is tried again, without a console
            again = (Disconnected, JobFailed) if stopping else (Disconnected, WorkerDied)
            left = complete and isinstance(failure, again)
        state, why = self._verdict(failure, left=left, stopping=stopping)
        waits = state == "received"
        archive = self._archive(state, kept)
        if self.images is not None:
            self.images.close()
            if waits:
                self.images.discard()
        self.row = replace(
            self.row, state=state, why=why, owner="" if waits else self.row.owner, finished=None if waits else time.time(),
            timings=dict(self._timings), n_images=self.n_images, chain=facts.chain or self.row.chain, settings=facts.settings,
            weights=facts.weights, fallback=facts.fallback, warnings=tuple(self._warnings), archive=archive,
        )  # fmt: skip
        if self._base is None:
            self._books.put(self.row, force, self._books.over if self.row.is_over else self._books.left)

    def _verdict(self, failure: Exception | None, *, left: bool, stopping: bool) -> tuple[State, str]:
        """What became of the scan, and why; a scan that is ``left`` without its images waits, if it can, to be taken up again."""
        assert self.row is not None
        if left and self.row.capture:
            gone = failure is None or isinstance(failure, Disconnected)
            return "received", "the server stopped" if stopping else PEER_LEFT if gone else reason_of(failure)
        if failure is not None or left:
            return "failed", reason_of(failure) or f"{PEER_LEFT}, and the raw data are not kept"
        return "sent", ""

    def _archive(self, state: State, kept: bool) -> Archive:
        original = self._base is None or not self._base.origin.startswith("retry")
        if state != "sent" or not (self.n_images and self._books.archive and original):
            return ""
        if kept:
            return "due"
        self._warnings.append("not sent to the archive: the images could not be kept")
        log.error("event=archive_failed job=%s text='the images could not be kept'", self.row.id if self.row else "")
        return "failed"

    def _begin_row(self, raw: ScanLog | None, chain: str, n_readouts: int, protocol: str) -> None:
        self._closed = time.monotonic()
        if self._base is not None:
            self.row = replace(self._base, n_readouts=n_readouts, started=time.time(), owner=self._books.token)
        else:
            kept = raw is not None and raw.kept
            self.row = JobRow(
                id=Path(raw.name).stem if raw is not None else self._books.token, chain=chain, received=time.time(),
                n_readouts=n_readouts, peer=self._peer, owner=self._books.token,
                origin="node" if protocol == "node" else "connection", capture=raw.name if kept and raw is not None else "",
            )  # fmt: skip
        self.row = replace(self.row, versions={**self._books._versions, "protocol": protocol})


def not_forced(problem: str) -> str:
    """The warning about raw data that a device did not take."""
    return f"{NOT_FORCED} ({problem})"


def reason_of(failure: Exception | None) -> str:
    """For rows and sidecars: nothing of an unexpected error but its class, because its words may quote the header."""
    if failure is None:
        return ""
    words = f"{type(failure).__name__}: {failure}" if isinstance(failure, ReconError) else type(failure).__name__
    return words[:WHY_CHARS]
