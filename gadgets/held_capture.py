"""A capture played to a connection without a socket: the file takes the place of peer and log."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from gadgets.capture import windows
from gadgets.errors import Disconnected
from gadgets.peer import Peer, Timing
from gadgets.scan_log import ScanLog, Status
from gadgets.wire import codec

WINDOW_BYTES = 4 << 20


class HeldLog(ScanLog):
    """A finished capture as the log of a connection: what is "received" is in it already, at the same offsets.

    Parameters
    ----------
    capture
        The file.
    folder
        Where what comes of it is kept.
    cut
        How the scan broke off, where it did.
    """

    replayed = True

    def __init__(self, capture: Path, folder: Path, cut: str = "") -> None:
        self._capture, self._folder, self.cut = capture, folder, cut
        self._name = capture.name
        self.size = 0

    @property
    def kept(self) -> bool:
        return True

    @property
    def lost_by_its_spool(self) -> bool:
        return False

    @property
    def path(self) -> Path:
        return self._capture

    @property
    def job_folder(self) -> Path:
        return self._folder

    def append(self, data: memoryview | bytes) -> int:
        """Only counts."""
        offset = self.size
        self.size += len(data)
        return offset

    def flush(self) -> Callable[[], str]:
        """Nothing to do."""
        return str

    def finish(self, status: Status, note: str = "", *, chain: str = "", readouts: int = 0) -> Path | None:
        """The sidecar is left as it is: whoever replays knows better."""
        return self._capture

    def discard(self) -> None:
        """The file is left as it is."""


class HeldLogs:
    """In the place of a spool."""

    def __init__(self, log: HeldLog) -> None:
        self._log = log

    def open(self, *, peer: str = "") -> ScanLog:
        """The one log."""
        return self._log


class CapturePeer(Peer):
    """Sends a capture, and takes whatever is said to it.

    Parameters
    ----------
    capture
        The file.
    end
        Where its last whole message ends: a CLOSE follows there instead of what the file has. By default the file is sent as it is.
    """

    def __init__(self, capture: Path, end: int | None = None) -> None:
        self.timing = Timing()
        self.gone = False
        self._windows: Iterator[memoryview] = windows(capture, WINDOW_BYTES) if capture.stat().st_size else iter(())
        if end is not None:
            self._windows = _closed(self._windows, end)
        self._window = memoryview(b"")
        self._halted = threading.Event()

    def receive(self, timeout: float) -> memoryview | None:
        """The next bytes of the file; empty at its end."""
        self._window = memoryview(b"") if self._halted.is_set() else next(self._windows, memoryview(b""))
        return self._window

    def receive_more(self, held: int) -> memoryview | None:
        """A window is all there is at a time."""
        return None

    def received(self, held: int) -> memoryview:
        """The window."""
        return self._window

    def send(self, message: bytes | bytearray | memoryview) -> None:
        """Nobody listens.

        Raises
        ------
        Disconnected
            The server is ending.
        """
        if self._halted.is_set():
            raise Disconnected("the server is stopping", where="connection")

    def close(self) -> bool:
        """Let go of the file."""
        self.gone = True
        self._windows, self._window = iter(()), memoryview(b"")
        return True

    def stop(self) -> None:
        """From another thread: no more bytes, no more messages."""
        self._halted.set()


def _closed(pieces: Iterator[memoryview], end: int) -> Iterator[memoryview]:
    """The first ``end`` bytes, and a CLOSE."""
    for piece in pieces:
        if end <= 0:
            break
        yield piece[:end]
        end -= len(piece)
    yield memoryview(codec.close())
