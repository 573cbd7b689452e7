"""Objects on their way to an archive, kept on disk until it has confirmed each of them.

``<root>/waiting/<id>/`` has ``job.json`` and the DICOM files that are left; a file is deleted when the archive has confirmed
it, so after a crash, at whatever moment, at most one object is sent twice (with the same UID, which an archive takes as
the same object). A job that failed too often lies in ``<root>/failed/``. What waits is never thrown away. Of what failed the files
go when they are old enough, because they are patient data, and the record stays until someone has seen it and says `Queue.remove`.

The folders are readable by their owner only: the files hold patient data. Ids and ``job.json`` do not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gadgets.capture import sync
from gadgets.clock import not_ahead
from gadgets.pacs import Attempt, Destination, PacsError, Tls, store
from gadgets.pacs_receipts import STORED, Passage, leave_receipt, prune_receipts, write_passage
from gadgets.private_folder import make_private

log = logging.getLogger(__name__)

LEFTOVER_SECONDS = 86400.0
"""Age at which a copy that was never finished (its process died) is removed."""
LOOK_SECONDS = 2.0
"""How often `Queue.work` looks for jobs that others have put in."""
FAILED_SECONDS = 30 * 86400.0
"""How long `Queue.work` keeps the files of failed jobs."""
PRUNE_SECONDS = 60.0

Send = Callable[[list[Path], Destination, Callable[[Path], None]], Attempt]


@dataclass(frozen=True)
class Pauses:
    """Waiting times between attempts: ``first`` s, then ``factor`` times as long each time up to ``longest`` s."""

    first: float = 15.0
    factor: float = 2.0
    longest: float = 3600.0
    attempts: int = 100  # then the job has failed; with the other defaults after about four days

    def after(self, attempts: int) -> float:
        """Seconds to wait after so many failed attempts."""
        return min(self.longest, self.first * self.factor ** min(attempts - 1, 64))


@dataclass(frozen=True)
class Job:
    """One hand-over. ``state`` is "waiting" or "failed"; times in seconds since the epoch."""

    id: str
    destination: Destination
    n_files: int
    created: float
    attempts: int = 0
    next_try: float = 0.0
    problem: str = ""
    state: str = "waiting"
    left: int = 0


class QueueBusy(PacsError):
    """Another process is sending from this queue; it will send these jobs as well."""


class Queue:
    """A queue below ``root``. Any number of processes may put jobs in; one at a time sends.

    Raises
    ------
    PacsError
        The folder cannot be made.
    """

    def __init__(self, root: Path | str, pauses: Pauses | None = None, now: Callable[[], float] = time.time) -> None:
        self.root, self.pauses, self._now = Path(root), pauses or Pauses(), now
        self._unwritten: dict[str, Job] = {}  # as they are, where the disk took no new record
        self._silent: set[Destination] = set()  # did not answer the last time
        try:
            for folder in (self.root, self.root / "waiting", self.root / "failed", self.root / STORED):
                make_private(folder)
        except OSError as error:
            raise PacsError("cannot make the folder", where=f"queue {self.root}", got=error.strerror) from None

    def put(self, files: Iterable[Path], destination: Destination, passage: Passage | None = None) -> Job:
        """Copy files into the queue; when this returns they are safe on disk.

        With a ``passage`` they belong to a scan, whose row says what becomes of them (`gadgets.pacs_receipts`).

        Raises
        ------
        PacsError
            No file, or one that cannot be copied.
        """
        sources = list(files)
        if not sources:
            raise PacsError("nothing to send", where=f"queue {self.root}", expected="at least one DICOM file")
        name = f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime(self._now()))}-{secrets.token_hex(4)}"
        job = Job(name, destination, len(sources), self._now(), next_try=self._now(), left=len(sources))
        incoming = self.root / f".incoming-{name}"
        try:
            incoming.mkdir(mode=0o700)
            for position, source in enumerate(sources):
                target = incoming / f"{position:06d}.dcm"
                target.touch(mode=0o600)
                shutil.copyfile(source, target)
                sync(target)
            _write(incoming / "job.json", job)
            if passage is not None:
                write_passage(incoming, passage)
            sync(incoming)
            os.rename(incoming, self.root / "waiting" / name)
            sync(self.root / "waiting")
        except OSError as error:
            shutil.rmtree(incoming, ignore_errors=True)
            raise PacsError("cannot queue the files", where=f"queue {self.root}", got=error.strerror) from None
        log.info("event=pacs_queued job=%s objects=%d", name, len(sources))
        return job

    def jobs(self) -> list[Job]:
        """All jobs, oldest first; one whose record cannot be read is left out here and moved aside by `send_due`."""
        found = []
        for state in ("waiting", "failed"):
            for folder in sorted((self.root / state).iterdir()):
                with contextlib.suppress(PacsError):
                    found.append(_read(folder, state))
        return sorted(found, key=lambda job: job.id)

    def retry(self, name: str) -> Job:
        """Make a waiting or failed job due now, with all its attempts before it.

        Raises
        ------
        PacsError
            No such job, or one whose files have been removed.
        """
        for job in self.jobs():
            if job.id == name:
                if job.state == "failed" and not job.left:  # one that waits with nothing left has been sent just now
                    raise PacsError("its files have been removed", where=f"job {name}", got=job.problem, remedy=_again(job))
                with self._sending():
                    again = replace(job, attempts=0, next_try=self._now(), state="waiting")
                    folder = self.root / job.state / name
                    _write(folder / "job.json", again)
                    os.rename(folder, self.root / "waiting" / name)
                return again
        known = ", ".join(job.id for job in self.jobs())
        expected = f"one of {known}" if known else "nothing: the queue is empty"
        raise PacsError("no such job", where=f"queue {self.root}", got=repr(name), expected=expected)

    def remove(self, name: str) -> None:
        """Throw a failed job away, with its files and its record; also one whose record cannot be read.

        Raises
        ------
        PacsError
            No such failed job.
        """
        failed = {folder.name: folder for folder in sorted((self.root / "failed").iterdir())}
        if name not in failed:
            known = ", ".join(failed) or "none"
            raise PacsError("no such failed job", where=f"queue {self.root}", got=repr(name), expected=known)
        with self._sending():
            folder = failed[name]
            left = len(_images(folder))
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
        log.warning("event=pacs_removed job=%s left=%d reason=asked", name, left)

    def prune(self, seconds: float) -> None:
        """Remove the files of jobs that failed longer ago than this; their records stay, and say so.

        Raises
        ------
        QueueBusy
            Another process is sending.
        """
        oldest = min(self._now(), not_ahead()) - seconds
        with self._sending():
            prune_receipts(self.root, oldest)
            for folder in sorted((self.root / "failed").iterdir()):
                with contextlib.suppress(FileNotFoundError):  # somebody has removed it by hand just now
                    files = _images(folder)
                    if files and _changed(folder) < oldest:
                        self._drop(folder, files, seconds)

    def _drop(self, folder: Path, files: list[Path], seconds: float) -> None:
        # said before it is done: whatever comes in between, no object goes without a word
        log.error("event=pacs_removed job=%s left=%d reason=age days=%.3g", folder.name, len(files), seconds / 86400)
        try:
            for path in files:
                path.unlink()
            job = _read(folder, "failed")
            words = f"{len(files)} objects removed unsent after {seconds / 86400:.3g} days; {job.problem}"
            _write(folder / "job.json", replace(job, problem=words))
        except OSError as error:
            log.error("event=pacs_not_removed job=%s error=%s", folder.name, error.strerror)
        except PacsError:
            pass  # a record that could not be read before either: its folder is what stays

    def send_due(self, send: Send = store, only: str | None = None) -> list[Job]:
        """One attempt for each waiting job that is due (or for ``only``, if it waits); the jobs as they are afterwards.

        A job with nothing ``left`` is done, and gone from the disk. When an archive does not answer, its other jobs are left for the
        next call: each would wait as long in vain, and jobs for other archives behind them all.

        Raises
        ------
        QueueBusy
            Another process is at it.
        """
        done: list[Job] = []
        silent: set[Destination] = set()
        postponed = 0
        with self._sending():
            self._tidy()
            due = self._due(only)
            # last those that did not answer the last time: whoever comes in meanwhile waits for one of their attempts, not for all
            for folder, job in sorted(due, key=lambda pair: pair[1].destination in self._silent):
                if job.destination in silent:
                    postponed += 1  # as it is: no attempt was made
                    continue
                job, answered = self._attempt(folder, job, send)
                if not answered:
                    silent.add(job.destination)
                done.append(job)
        if postponed:
            log.info("event=pacs_postponed jobs=%d silent=%d", postponed, len(silent))
        tried = {job.destination for job in done}
        self._silent = (self._silent - tried) | silent
        return done

    def _due(self, only: str | None) -> list[tuple[Path, Job]]:
        due = []
        for folder in sorted((self.root / "waiting").iterdir()):
            if only is not None and folder.name != only:
                continue
            try:
                job = self._unwritten.get(folder.name) or _read(folder, "waiting")
            except PacsError:
                log.error("event=pacs_record_unreadable job=%s", folder.name)
                os.rename(folder, self.root / "failed" / folder.name)
                continue
            now = self._now()
            # further away than any pause is long: the clock has been put back since
            if only is not None or not now < job.next_try <= now + self.pauses.longest:
                due.append((folder, job))
        return due

    def work(self, stop: threading.Event, send: Send = store, keep_failed: float = FAILED_SECONDS) -> None:
        """Send what is due, again and again, until ``stop`` is set; while another process sends, wait.

        ``keep_failed`` is how long the files of failed jobs are kept, in s.
        """
        pruned = float("-inf")
        while not stop.is_set():
            with contextlib.suppress(QueueBusy):
                self.send_due(send)
                if time.monotonic() - pruned > PRUNE_SECONDS:
                    self.prune(keep_failed)
                    pruned = time.monotonic()
            stop.wait(LOOK_SECONDS)

    def _attempt(self, folder: Path, job: Job, send: Send) -> tuple[Job, bool]:
        """The job afterwards, and whether its archive answered."""
        # a link leads out of the queue: what it points to was not put in
        files = sorted(path for path in folder.glob("*.dcm") if not path.is_symlink())
        try:
            outcome = send(files, job.destination, Path.unlink) if files else Attempt(problem="links in place of files")
        except (PacsError, OSError) as error:  # one job must not keep the others from being sent
            problem = str(error) if isinstance(error, PacsError) else type(error).__name__
            outcome = Attempt(left=files, problem=problem)
        left = len(list(folder.glob("*.dcm")))
        if not left:
            self._unwritten.pop(job.id, None)
            leave_receipt(self.root, folder)
            shutil.rmtree(folder)
            log.info("event=pacs_sent job=%s objects=%d attempts=%d", job.id, job.n_files, job.attempts + 1)
            return replace(job, attempts=job.attempts + 1, left=0, problem=""), True
        attempts = job.attempts + 1
        failed = attempts >= self.pauses.attempts
        next_try = self._now() + self.pauses.after(attempts)
        job = replace(job, attempts=attempts, next_try=next_try, problem=outcome.problem, left=left)
        job = replace(job, state="failed" if failed else "waiting")
        try:
            _write(folder / "job.json", job)
            self._unwritten.pop(job.id, None)
            if failed:
                os.rename(folder, self.root / "failed" / folder.name)
        except OSError as error:  # a full disk: the pauses hold all the same, and the other jobs go on
            self._unwritten[job.id] = replace(job, state="waiting")
            log.error("event=pacs_record_not_written job=%s error=%s", job.id, error.strerror)
        if failed:  # nobody tries it any more, so somebody has to look
            log.error("event=pacs_failed job=%s left=%d attempts=%d", job.id, left, attempts)
        else:
            log.warning("event=pacs_retry job=%s left=%d attempts=%d", job.id, left, attempts)
        return job, not outcome.silent

    def _tidy(self) -> None:
        for folder in self.root.glob(".incoming-*"):
            with contextlib.suppress(OSError):  # its process has finished it just now
                if self._now() - folder.stat().st_mtime > LEFTOVER_SECONDS:
                    shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def _sending(self) -> Iterator[None]:
        with (self.root / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise QueueBusy("another process is sending", where=f"queue {self.root}") from None
            yield  # closing the file releases the lock


def _again(job: Job) -> str:
    """The commands that make and send objects whose files are no more; the patient comes from the capture beside the folder."""
    return (
        "While the scan's folder is kept: recon dicom SPOOL/ID.job/images.h5 -o DIR; "
        f"recon pacs send DIR {job.destination.options()}"
    )


def _images(folder: Path) -> list[Path]:
    """What a job has still to send; nothing behind a link, which leads out of the queue."""
    return [] if folder.is_symlink() else sorted(folder.glob("*.dcm"))


def _changed(folder: Path) -> float:
    """When a job's last attempt was noted."""
    record = folder / "job.json"
    return (record if record.exists() else folder).stat().st_mtime


def _write(path: Path, job: Job) -> None:
    document: dict[str, Any] = asdict(job)
    del document["state"], document["left"]  # the place and the files say it
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1), encoding="utf-8")
    sync(partial)
    os.replace(partial, path)


def _read(folder: Path, state: str) -> Job:
    try:
        if folder.is_symlink():
            raise ValueError("a link in place of a folder")
        document = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        target = document.pop("destination")
        secure = target.pop("tls")
        destination = Destination(**target, tls=None if secure is None else Tls(**secure))
        left = len(list(folder.glob("*.dcm")))
        return Job(**{**document, "id": folder.name}, destination=destination, state=state, left=left)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise PacsError("record cannot be read", where=f"job {folder.name}", got=type(error).__name__) from None
