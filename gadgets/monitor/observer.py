"""The server's side of the monitor: watches scans from outside and writes what it sees into files.

A scan must never wait for this, nor fail with it. The connection's thread only notes numbers and puts images into a queue; a thread
of its own writes. What does not fit or cannot be written is left out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gadgets.capture import capture_status, sidecar, write_sidecar
from gadgets.handlers import Say, Scan, ScanFacts
from gadgets.monitor.files import STATUS_FILE
from gadgets.monitor.record import JobRecorder
from gadgets.monitor.tallies import Tallies
from gadgets.scan_log import ScanLog
from gadgets.wire.events import Readouts, Waveform
from gadgets.wire.ids import MessageId

logger = logging.getLogger(__name__)

SECONDS = 0.5
"""Between two looks of the writing thread; the page is no more current than this."""

SETTLE_SECONDS = 20.0
"""How long the end of a capture is waited for before a scan counts as ended the way it seemed to."""

IMAGE, TEXT = (int(number).to_bytes(2, "little") for number in (MessageId.IMAGE, MessageId.TEXT))
_EVENT = re.compile(r"event=([a-z_]{1,40})")


class Observer:
    """Watches the scans of one server; ``start`` and ``close`` it with the server.

    Parameters
    ----------
    root
        The spool's folder: the status goes there, and what is told of a job beside its capture.
    describe
        The server's own state, called by the writing thread every second; goes into the status as it is.
    min_free_bytes
        With less room than this on the disk no image is kept for the page.
    """

    def __init__(self, root: Path, describe: Callable[[], dict[str, Any]], *, min_free_bytes: int = 0) -> None:
        self.root, self.describe, self.min_free_bytes = root, describe, min_free_bytes
        self.tallies = Tallies()
        self._lock = threading.Lock()
        self._active: list[JobRecorder] = []
        self._ending: list[JobRecorder] = []  # over, and their connections may have a last word
        self._by_thread: dict[int, JobRecorder] = {}
        self._last: dict[str, Any] = {}
        self._started = time.time()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._handler = _LogTap(self)
        self._troubled = False

    def start(self) -> Observer:
        """Begin to write, and to listen to this process's log."""
        root = logging.getLogger()
        for handler in root.handlers:  # what an operator does not want to read may still be worth counting
            if handler.level == logging.NOTSET:
                handler.setLevel(root.level)
        if root.level > logging.INFO:
            root.setLevel(logging.INFO)
        root.addHandler(self._handler)
        self._thread = threading.Thread(target=self._run, name="observer", daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Write what is left, and remove the status: its server is no more."""
        logging.getLogger().removeHandler(self._handler)
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10.0)
        with contextlib.suppress(OSError):
            (self.root / STATUS_FILE).unlink()

    def open(self, make: Callable[[Say], Scan], chain: str, raw: ScanLog, say: Say) -> Scan:
        """The scan that ``make`` makes, under observation; called in its connection's thread.

        Parameters
        ----------
        make
            Given what to tell the operator with, opens the scan.
        chain
            Name of an installed chain.
        raw, say
            The scan's capture; sends one line to the operator.
        """
        try:
            recorder = JobRecorder(raw, chain)
        except Exception as error:
            self._trouble(error)
            return make(say)

        def tell(text: str) -> None:
            recorder.say(text)
            say(text)

        scan = make(tell)
        with self._lock:
            self._active.append(recorder)
            self._by_thread[threading.get_ident()] = recorder
        return WatchedScan(scan, recorder, self.tallies)

    def heard(self, record: logging.LogRecord, line: str) -> None:
        """One line of the log: counted, and noted with the scan whose connection said it."""
        found = _EVENT.match(line)
        if found is not None and record.levelno >= logging.WARNING:
            self.tallies.event(found[1])
        thread = record.thread or 0
        recorder = self._by_thread.get(thread)
        if recorder is not None:
            recorder.log(record, line)
            if recorder.closed:
                self._by_thread.pop(thread, None)

    def _run(self) -> None:
        while True:
            last = self._stop.wait(SECONDS)
            self._look(last)
            self._write_status()
            if last:
                return

    def _look(self, last: bool) -> None:
        for recorder in self._watched():
            self._write(recorder)
            try:
                self._settle(recorder, anyhow=last)
            except Exception as error:
                self._trouble(error)
        for recorder in list(self._ending):
            over = recorder.closed or last or _waited(recorder)
            self._write(recorder)
            if over:
                self._forget(recorder)

    def _write(self, recorder: JobRecorder) -> None:
        try:
            recorder.write(self._room())
        except Exception as error:  # a full disk, a folder that is gone: what was to be written is left out
            self._trouble(error)

    def _watched(self) -> list[JobRecorder]:
        with self._lock:
            return list(self._active)

    def _settle(self, recorder: JobRecorder, *, anyhow: bool) -> None:
        """A scan is over when its capture is: only then is it known how it ended, and what the log says about it."""
        if recorder.ended is None:
            return
        known = not recorder.replayed and sidecar(recorder.capture).exists()
        if not (known or anyhow or _waited(recorder) or recorder.closed):
            return
        status = capture_status(recorder.capture) if known else "unknown"
        recorder.settle(recorder.seemed if status == "unknown" else status)
        self._write(recorder)
        self.tallies.scan(recorder.chain, recorder.state)
        for stage, seconds in recorder.seconds.items():
            self.tallies.seconds(stage, recorder.chain, seconds)
        with self._lock:
            self._active.remove(recorder)
        self._ending.append(recorder)
        self._last = recorder.summary()

    def _forget(self, recorder: JobRecorder) -> None:
        self._ending.remove(recorder)
        with self._lock:
            # its connection may have ended without a word; a later one may have the thread's number
            self._by_thread = {thread: other for thread, other in self._by_thread.items() if other is not recorder}

    def _room(self) -> bool:
        with contextlib.suppress(OSError):
            state = os.statvfs(self.root)
            return state.f_bavail * state.f_frsize > self.min_free_bytes
        return False

    def _write_status(self) -> None:
        try:
            document = {
                "time": time.time(),
                "started": self._started,
                "pid": os.getpid(),
                "server": self.describe(),
                "active": [recorder.summary() for recorder in self._watched()],
                "last": self._last,
                "tallies": self.tallies.document(),
            }
            write_sidecar(self.root / STATUS_FILE, document)
            self._troubled = False
        except Exception as error:
            self._trouble(error)

    def _trouble(self, error: Exception) -> None:
        """Said once: a full disk would fill the log as well."""
        if not self._troubled:
            logger.warning("event=monitor_file_failed error=%s", type(error).__name__)
        self._troubled = True


def _waited(recorder: JobRecorder) -> bool:
    """Whether a scan has been over for so long that no word of its connection comes any more."""
    return recorder.ended is not None and time.monotonic() - recorder.ended > SETTLE_SECONDS


class WatchedScan:
    """A scan under observation: passes everything on, and notes it."""

    def __init__(self, scan: Scan, recorder: JobRecorder, tallies: Tallies) -> None:
        self._scan, self._recorder, self._tallies = scan, recorder, tallies

    @property
    def facts(self) -> ScanFacts:
        """See ``gadgets.handlers.Scan``."""
        return self._scan.facts

    def readouts(self, event: Readouts) -> None:
        """See ``gadgets.handlers.Scan``."""
        self._recorder.n_readouts += len(event)
        self._tallies.add("readouts", len(event))
        self._scan.readouts(event)

    def waveform(self, event: Waveform) -> None:
        """See ``gadgets.handlers.Scan``."""
        self._scan.waveform(event)

    def finish(self) -> Iterator[bytes]:
        """See ``gadgets.handlers.Scan``."""
        recorder, sending = self._recorder, 0.0
        recorder.received()
        self._tallies.add("bytes", recorder.n_bytes)
        seemed = "failed"
        try:
            for message in self._scan.finish():
                kind = bytes(memoryview(message)[:2])
                if kind == IMAGE:
                    recorder.image(message)
                    self._tallies.add("images")
                elif kind == TEXT:
                    recorder.say(bytes(message[6:]).decode(errors="replace"))
                before = time.monotonic()
                yield message
                sending += time.monotonic() - before
            seemed = "complete"
        except GeneratorExit:
            seemed = "truncated"  # the peer left while its images were being made
            raise
        finally:
            recorder.end(seemed, sending)

    def abandon(self) -> None:
        """See ``gadgets.handlers.Scan``."""
        self._recorder.end("failed")
        self._scan.abandon()


class _LogTap(logging.Handler):
    """Hands every line of the log to the observer. Never raises, never waits."""

    def __init__(self, observer: Observer) -> None:
        super().__init__(logging.INFO)
        self._observer = observer

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            self._observer.heard(record, record.getMessage())
