"""What a server does with nobody watching: keeps its journal, takes up jobs that lost their connection, sends images to archives."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from gadgets.bookkeeping import Books
from gadgets.handlers import Handlers
from gadgets.jobs import Jobs
from gadgets.journal import JobRow, JournalError
from gadgets.pacs_backlog import has_work
from gadgets.recovery import Recovery
from gadgets.results import Archives, Results, check_archives
from gadgets.spool import Spool
from gadgets.wire.framing import Limits

if TYPE_CHECKING:
    from gadgets.pacs_sender import Sender

log = logging.getLogger(__name__)


class Unattended:
    """All of it for one spool; without one, nothing is written and nothing is taken up.

    Parameters
    ----------
    spool, jobs
        Of the service.
    keep_images
        Keep every scan's images in its job folder.
    archives
        Where the images of every scan go by themselves.

    Raises
    ------
    SettingError, PacsError
        Archives are wanted, and cannot be.
    """

    def __init__(self, spool: Spool, jobs: Jobs, *, keep_images: bool = False, archives: Archives | None = None) -> None:
        self._spool, self._archives = spool, archives
        if archives is not None:
            check_archives(archives, spool.root)
        self.books = Books(spool.root, keep_images=keep_images, archive=archives is not None)
        self.results: Results | None = None
        self.recovery: Recovery | None = None
        self._sender: Sender | None = None
        if spool.root is None:
            return
        if archives is not None:
            from gadgets.pacs_sender import Sender

            self._sender = Sender(archives.queue, spool.max_age)
        self.results = Results(spool.root, self.books, jobs, archives, self._sender)
        self.books.over = self.results.over

    def handlers(self, handlers: Handlers) -> Handlers:
        """The same, with rows for their scans."""
        return replace(handlers, entry=self.books.entry)

    def start(self, handlers: Handlers, limits: Limits) -> None:
        """Begin to take up what waits: this process serves."""
        if self.results is None:
            return
        self.books.is_server = True
        if not self.books.token:  # said by the books: without it, jobs of this process look like nobody's
            log.error("event=unattended_off reason='this process cannot be marked'")
            return
        self.recovery = Recovery(self.books, self._spool, self.results, handlers, limits)
        self.recovery.housekeeping = self._send
        self.books.left = lambda row: self.wake()
        self._send()
        self.recovery.start()

    def reconstruct(self, row: JobRow, handlers: Handlers, limits: Limits) -> JobRow:
        """One waiting job, now and here.

        Raises
        ------
        JournalError
            There is no journal, or it cannot be used.
        """
        if self.results is None:
            raise JournalError("no journal is kept", where="spool", got="captures are switched off")
        return Recovery(self.books, self._spool, self.results, handlers, limits).reconstruct(row)

    def wake(self) -> None:
        """A job waits in the journal."""
        if self.recovery is not None:
            self.recovery.wake()

    def stop(self) -> None:
        """First of all when the service ends: take nothing more up."""
        if self.recovery is not None:
            self.recovery.close()

    def settle(self) -> None:
        """Before the workers end: the images of jobs that are over."""
        if self.results is not None:
            self.books.settle()
            self.results.close()

    def close(self) -> None:
        """Last: nobody writes rows any more."""
        if self.recovery is not None:
            self.recovery.join()
        self.books.close()
        if self._sender is not None:
            self._sender.close()

    def _send(self) -> None:
        if self._sender is not None and self._archives is not None and has_work(self._archives.queue):
            self._sender.poke()
