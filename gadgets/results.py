"""What happens to a job's images when it is over: an image file in its folder, and their way to an archive.

Both are a worker's work at the lowest priority; the console has its images by then. A failure is noted with the job and fails nothing.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gadgets.bookkeeping import Books, reason_of
from gadgets.capture import JOB_SUFFIX
from gadgets.errors import ImageFileError, JobFailed
from gadgets.fair_queue import HOUSEKEEPING
from gadgets.job_images import IMAGES, MESSAGES, write_image_file
from gadgets.jobs import Jobs
from gadgets.journal import JobRow, Journal, UnknownJob
from gadgets.pacs_receipts import Passage, Receipts

if TYPE_CHECKING:  # pynetdicom is an extra
    from gadgets.pacs import Destination
    from gadgets.pacs_sender import Sender

log = logging.getLogger(__name__)

CLOSE_SECONDS = 60.0
FIRST_PAUSE = 60.0  # s until images whose file could not be made are taken up again; twice as long each time
MOST_TRIES = 8


@dataclass(frozen=True)
class Archives:
    """Where images go by themselves: the archives, and the folder of the queue to them.

    With ``parametric_maps`` each map goes there as a Parametric Map object, too, beside the classic images.
    """

    destinations: tuple[Destination, ...]
    queue: Path
    parametric_maps: bool = False


@dataclass(frozen=True)
class Handed:
    """What came of a job's images on their way: whether they are in the queue, and what went wrong ("" for nothing)."""

    queued: bool = False
    problem: str = ""


class Results:
    """After each job of a server.

    Parameters
    ----------
    root
        The spool's folder.
    books, jobs
        Where the end is noted, and whose workers do the work.
    archives, sender
        ``None``: images stay here.
    """

    def __init__(
        self, root: Path, books: Books, jobs: Jobs, archives: Archives | None = None, sender: Sender | None = None
    ) -> None:
        self._root, self._books, self._jobs = root, books, jobs
        self._archives, self._sender = archives, sender
        self._receipts = None if archives is None else Receipts(archives.queue)
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._working: set[str] = set()
        self._tried: dict[str, tuple[int, float]] = {}  # how often in vain, and when again (monotonic)

    def over(self, row: JobRow) -> None:
        """A job has ended: begin what there is to do. Returns at once."""
        due = row.archive == "due"
        if not due and not (self._root / row.folder / MESSAGES).exists():
            return
        with self._lock:
            if row.id in self._working:
                return
            self._working.add(row.id)
        self.make(row).add_done_callback(partial(self._done, row))

    def catch_up(self, journal: Journal) -> None:
        """Take up images that no file was made of: a worker died, the disk was full, or the server ended.

        Raises
        ------
        JournalError
            The journal cannot be read.
        """
        with self._lock:
            names = dict.fromkeys(self._tried)
        for name in names | dict.fromkeys(self._left()):
            with self._lock:
                tries, when = self._tried.get(name, (0, 0.0))
                waits = name in self._working or tries >= MOST_TRIES or time.monotonic() < when
            if waits:
                continue
            with contextlib.suppress(UnknownJob):
                row = journal.row(name)
                if row.is_over and (row.owner == self._books.token or not journal.is_alive(row.owner)):
                    self.over(row)

    def note_receipts(self, journal: Journal) -> None:
        """What the archives have confirmed, or refused, since the last look.

        Raises
        ------
        JournalError
            The journal cannot be read or written.
        """
        if self._receipts is not None:
            self._receipts.note(journal)

    def _left(self) -> Iterator[str]:
        """Jobs whose images are still as they were sent."""
        for path in sorted(self._root.glob(f"*{JOB_SUFFIX}/{MESSAGES}")):
            yield path.parent.stem
        for path in sorted(self._root.glob(f"*{JOB_SUFFIX}/r*/{MESSAGES}")):
            yield f"{path.parent.parent.stem}.{path.parent.name}"

    def make(self, row: JobRow) -> Future[Handed]:
        """The task itself."""
        archives = self._archives if row.archive == "due" else None
        capture = self._root / row.capture
        return self._jobs.scope(HOUSEKEEPING).submit(finish_job, self._root / row.folder, capture, archives, row.id)

    def finish(self, row: JobRow) -> JobRow:
        """As `over`, and waits for it; what does not work now and may later is taken up then.

        Raises
        ------
        ReconError
            The image file cannot be made.
        """
        made = self.make(row)
        error = made.exception()
        if isinstance(error, JobFailed) and row.archive == "due" and row.images(self._root) is not None:
            self._put_off(row, 1, error)
            return row
        return self.note(row, made.result())

    def note(self, row: JobRow, handed: Handed) -> JobRow:
        """The row after its images' way to the archive; the sender is told."""
        if row.archive != "due":
            return row
        if handed.problem:
            log.error("event=archive_failed job=%s text=%r", row.id, handed.problem)
            row = replace(row, warnings=(*row.warnings, f"not sent to the archive: {handed.problem}"))
        if not handed.queued:
            return replace(row, archive="failed")
        if self._sender is not None:
            self._sender.poke()
        return replace(row, archive="queued")

    def _passes(self, row: JobRow, error: BaseException) -> bool:
        """No worker, no room on the disk: that passes, and what the images are made of is kept meanwhile."""
        kept = (self._root / row.folder / MESSAGES).exists()
        return isinstance(error, JobFailed) or (isinstance(error, ImageFileError) and kept)

    def close(self) -> None:
        """Wait for what is being done, within reason; the next server goes on with the rest."""
        with self._ended:
            if not self._ended.wait_for(lambda: not self._working, CLOSE_SECONDS):
                log.warning("event=results_incomplete jobs=%d", len(self._working))

    def _done(self, row: JobRow, future: Future[Handed]) -> None:
        try:
            self._judge(row, future)
        finally:
            with self._ended:
                self._working.discard(row.id)
                self._ended.notify_all()

    def _judge(self, row: JobRow, future: Future[Handed]) -> None:
        """Note what came of a task, or that it is to be tried again."""
        error = future.exception()
        with self._lock:
            tries = self._tried.pop(row.id, (0, 0.0))[0] + 1
        if error is not None and self._passes(row, error) and tries < MOST_TRIES:
            self._put_off(row, tries, error)
            return
        if error is not None:
            self._note_try(row, tries)
            if row.images(self._root) is None:  # else it was their way to the archive that failed, which is said below
                log.error("event=images_not_kept job=%s error=%r", row.id, reason_of(_plain(error)))
        if row.archive == "due":
            self._books.put(self.note(row, future.result() if error is None else Handed(problem=reason_of(_plain(error)))))

    def _put_off(self, row: JobRow, tries: int, error: BaseException) -> None:
        log.warning("event=images_later job=%s try=%d error=%r", row.id, tries, reason_of(_plain(error)))
        self._note_try(row, tries)

    def _note_try(self, row: JobRow, tries: int) -> None:
        with self._lock:
            self._tried[row.id] = (tries, time.monotonic() + FIRST_PAUSE * 2 ** (tries - 1))


def _plain(error: BaseException) -> Exception:
    return error if isinstance(error, Exception) else RuntimeError(type(error).__name__)


def finish_job(folder: Path, capture: Path, archives: Archives | None, scan: str) -> Handed:
    """A worker's task: the image file, then the queue to the archives.

    Raises
    ------
    ImageFileError
        The image file cannot be made.
    """
    write_image_file(folder)
    return Handed() if archives is None else queue_images(folder, capture, archives, scan)


def queue_images(folder: Path, capture: Path, archives: Archives, scan: str) -> Handed:
    """Convert the images of the job ``scan`` and put them into the queue once for each archive.

    Run twice, it queues the same objects with the same UIDs, which an archive takes as the same.

    Raises
    ------
    JobFailed
        The disk is full: it may be tried again.
    """
    made, problem = folder / "dicom", ""
    try:
        from gadgets.dicom import NO_PATIENT, convert
        from gadgets.dicom_identity import read_header_text
        from gadgets.pacs_queue import Queue

        shutil.rmtree(made, ignore_errors=True)
        header = read_header_text(capture)
        try:
            converted = convert(folder / IMAGES, made, header=header, parametric_maps=archives.parametric_maps)
            files = converted.files
            problem = f"Parametric Maps: {'; '.join(converted.unmade)}" if converted.unmade else ""
        except Exception as error:
            if not archives.parametric_maps:
                raise
            # the classic images go in any case; what stands in their way as well is said instead
            problem = f"Parametric Maps: {_told(error)}"
            converted = convert(folder / IMAGES, made, header=header)
            files = converted.files
        if NO_PATIENT in converted.notes:  # recon pacs send would refuse them; here nobody can be asked
            log.warning("event=archive_without_patient job=%s objects=%d", scan, len(files))
        queue = Queue(archives.queue)
        for destination in archives.destinations:
            queue.put(files, destination, Passage(scan, str(destination), len(set(archives.destinations))))
    except Exception as error:  # DICOM libraries raise many kinds; a scan is none the worse for it
        if (full := _disk_is_full(error)) is not None:
            remedy = "Free disk space beside the spool"
            raise JobFailed("no room for DICOM files", where=folder.name, got=full, remedy=remedy) from None
        return Handed(problem=_told(error))
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return Handed(queued=True, problem=problem)


def _disk_is_full(error: BaseException | None) -> str | None:
    """The system's words for it, where that is what is behind an error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return error.strerror
        error = error.__cause__ or error.__context__
    return None


def _told(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: pip install 'recon-gadgets[dicom]'"
    return reason_of(error)


def check_archives(archives: Archives, spool: Path | None) -> None:
    """Whether images can go to an archive by themselves, before the first scan comes.

    Raises
    ------
    SettingError
        No raw data are kept: a crash would lose images on their way.
    PacsError
        The queue's folder cannot be made.
    """
    from gadgets.pacs_queue import Queue
    from recon_core.errors import SettingError

    if spool is None:
        raise SettingError(
            "images go to an archive only where raw data are kept", where="pacs", remedy="Leave out --no-keep-raw"
        )
    Queue(archives.queue)
