"""The log of one connection: its bytes, verbatim and in order, in a file that other processes read while it grows."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gadgets.capture import job_folder_of, sidecar, size_of, sync, write_sidecar
from gadgets.errors import SpoolError

if TYPE_CHECKING:
    from gadgets.spool import Spool

logger = logging.getLogger(__name__)

Status = Literal["complete", "truncated", "failed"]

TEMPORARY_PREFIX = "recon-gadgets-log-"
CHECK_EVERY = 256 << 20  # bytes between two looks at the limits
TEMPORARY_AHEAD = 64 << 20
"""The same in temporary storage, which several logs may fill at once, and for which there has to be room at each look."""

NOTE_CHARS = 500
RESERVE_FROM, RESERVE_BYTES = 1 << 20, 64 << 20
FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h
_fallocate = getattr(ctypes.CDLL(None), "fallocate64", None) if os.name == "posix" else None
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
"""Errors of a write after which another place may still take the bytes."""


class ScanLog:
    """The bytes of one connection, in order. Written by one thread; other processes may read what was appended at once.

    ``path`` changes when the log has to move to other storage; offsets stay valid, and the old file stays readable until the
    end.
    """

    replayed = False  # whether somebody waits at a console for what comes of it
    behind = False  # whether scans of scanners go first although somebody waits
    cut = ""  # how the scan broke off, where its end never came and it is reconstructed all the same

    def __init__(self, spool: Spool, peer: str) -> None:
        self._spool = spool
        self._peer = peer
        self._started = datetime.now(UTC)
        self._name = f"{self._started:%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(4)}.mrd"
        self._fd = -1
        self._path: Path | None = None
        self._kept = False
        self._tried: set[Path] = set()
        self._left: list[Path] = []  # files that the log moved away from
        self._next_check = CHECK_EVERY
        self._reserved = 0  # blocks up to here are allocated; never more than RESERVE_BYTES ahead
        self._ended = False
        self._reported = 0  # bytes that the spool's total knows of
        self.size = 0

    @property
    def name(self) -> str:
        """File name of the capture, for logs and messages."""
        return self._name

    @property
    def kept(self) -> bool:
        """Whether the file stays after ``finish``."""
        return self._kept and not self._ended

    @property
    def lost_by_its_spool(self) -> bool:
        """Whether the file will be gone after ``finish`` although captures are wanted."""
        return self._spool.root is not None and self._path is not None and not self._kept

    @property
    def path(self) -> Path:
        """The file that holds every byte appended so far (made when nothing was appended yet)."""
        if self._path is None:
            self._create(0)
        assert self._path is not None
        return self._path

    @property
    def job_folder(self) -> Path:
        """Where what comes of this scan is kept, as long as its capture is."""
        return job_folder_of(self.path)

    def append(self, data: memoryview | bytes) -> int:
        """Write ``data`` behind what is there; returns the offset at which it begins.

        Raises
        ------
        SpoolError
            The log is over ``max_scan_bytes``, or no storage at all has room.
        """
        view = memoryview(data).cast("B")
        if self.size + len(view) > self._spool.max_scan_bytes:
            raise SpoolError(
                "the scan is larger than allowed",
                where="spool",
                got=f"over {self.size + len(view)} bytes",
                expected=f"at most {self._spool.max_scan_bytes}",
                remedy="Raise the limit of one scan",
            )
        if self._fd < 0:
            self._create(len(view))
        offset = self.size
        if self._kept and self.size >= RESERVE_FROM and self.size + len(view) > self._reserved:
            self._reserved = self.size + RESERVE_BYTES if _reserve(self._fd, self.size) else 1 << 62
        while view:
            try:
                written = os.write(self._fd, view)
            except OSError as error:
                if error.errno not in FULL:
                    raise SpoolError("cannot write the raw data", where=f"spool {self._name}", got=error.strerror) from error
                self._move(error.strerror or "write failed")
                continue
            view = view[written:]
            self.size += written
        if self.size >= self._next_check:
            self._look_at_limits()
        return offset

    def _look_at_limits(self) -> None:
        self._next_check = self.size + (CHECK_EVERY if self._kept else TEMPORARY_AHEAD)
        room = self._spool.make_room(self._growth()) if self._kept else self._spool.has_room(self.path.parent)
        if not room:
            self._move("too little free space")

    def _growth(self) -> int:
        grown, self._reported = self.size - self._reported, self.size
        return grown

    def flush(self) -> Callable[[], str]:
        """What forces the bytes to the device; to be called once, by any thread, also after ``finish``.

        It may take seconds, and nobody may wait for it who has images to make. It returns "" or why it failed. Other processes need no
        flush: appending does not buffer, and captures survive the death of the server at any moment; this is for power cuts.
        """
        try:
            own = os.dup(self._fd) if self._fd >= 0 else -1
        except OSError as error:
            reason = error.strerror or "no file descriptor"
            return lambda: reason
        folder = self.path.parent

        def force() -> str:
            try:
                if own >= 0:
                    os.fsync(own)
                    sync(folder)
            except OSError as error:
                return error.strerror or type(error).__name__
            finally:
                if own >= 0:
                    os.close(own)
            return ""

        return force

    def finish(self, status: Status, note: str = "", *, chain: str = "", readouts: int = 0) -> Path | None:
        """End the log: sidecar beside a kept capture, temporary files removed. Returns the capture, if there is one.

        ``note`` is one line for the administrator, without patient data.
        """
        if self._ended or self._path is None:
            self._end()
            return None
        path, kept = self._path, self._kept
        incomplete = [left for left in self._left if left.parent == self._spool.root]
        info = {
            "status": status,
            "note": note[:NOTE_CHARS],
            "started": self._started.isoformat(timespec="milliseconds"),
            "ended": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "bytes": self.size,
            "readouts": readouts,
            "chain": chain,
            "peer": self._peer,
            "versions": self._spool.versions,
        }
        if not kept:
            if status != "complete" and incomplete:
                # the disk ran full during a failed scan: the part that it took is all that will be left
                info |= {
                    "bytes": size_of(incomplete[0]),
                    "note": f"{info['note']} (the disk was full: only the beginning is here)",
                }
                path = incomplete[0]
            else:
                self._end()
                return None
        try:
            write_sidecar(sidecar(path), info)
        except OSError as error:
            logger.error("event=sidecar_failed file=%s error=%s action=later", path.name, error.strerror)
            self._spool.owe_sidecar(path, info)
        self._end(keep=path)
        self._spool.make_room(self._growth())
        return path if path.exists() else None

    def discard(self) -> None:
        """End the log and leave nothing."""
        self._end()

    def _end(self, keep: Path | None = None) -> None:
        self._ended = True
        if self._fd >= 0:
            if self._reserved:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self.size)  # gives back what was reserved
            os.close(self._fd)
            self._fd = -1
        for path in [*self._left, *([self._path] if self._path else [])]:
            if path != keep:
                _remove(path, self._spool.root)
        self._left = []

    def _create(self, needed: int) -> None:
        if self._ended:
            raise SpoolError("the log is finished", where=f"spool {self._name}")
        while True:
            folder, kept = self._spool.place(needed, self._tried)
            try:
                home = folder if kept else Path(tempfile.mkdtemp(prefix=TEMPORARY_PREFIX, dir=folder))
                fd = os.open(home / self._name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            except OSError as error:
                self._tried.add(folder)
                logger.error("event=spool_unusable folder=%s error=%s", folder, error.strerror)
                continue
            with contextlib.suppress(OSError):  # network file systems may have no locks
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._fd, self._path, self._kept, self._reserved = fd, home / self._name, kept, 0
            self._next_check = self.size + (CHECK_EVERY if kept else TEMPORARY_AHEAD)
            if not kept:  # also when nobody ends the log: the process exits, or forgets it
                weakref.finalize(self, _forget, home, os.getpid())
            self._tried.add(folder)
            if not kept and self._spool.root is not None:
                logger.error("event=spool_full file=%s action=temporary_storage folder=%s", self._name, folder)
            return

    def _move(self, why: str) -> None:
        """Go on in other storage: copy what is there, so that one file holds every byte."""
        old_fd, old_path, old_kept = self._fd, self.path, self._kept
        logger.error("event=spool_move file=%s bytes=%d reason=%r", self._name, self.size, why)
        while True:
            self._create(self.size)
            try:
                _copy(old_fd, self._fd, self.size)
                break
            except OSError:  # that place is full as well
                os.close(self._fd)
                _remove(self.path, self._spool.root)
                self._fd, self._path, self._kept = old_fd, old_path, old_kept
        self._left.append(old_path)
        os.close(old_fd)


def _forget(home: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child must not remove its parent's files
        shutil.rmtree(home, ignore_errors=True)


def _copy(source: int, target: int, size: int) -> None:
    for offset, length in _blocks(size, 4 << 20):
        block = memoryview(os.pread(source, length, offset))
        while block:
            block = block[os.write(target, block) :]


def _reserve(fd: int, offset: int) -> bool:
    """Allocate the next blocks of a file without changing its size; whether the file system can.

    Appending then costs less processor time than with allocation page by page (``benchmarks/ingest.py`` appends in its loop).
    """
    if _fallocate is None:
        return False
    return int(_fallocate(fd, FALLOC_FL_KEEP_SIZE, offset, RESERVE_BYTES)) == 0


def _blocks(size: int, step: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, size, step):
        yield offset, min(step, size - offset)


def _remove(path: Path, root: Path | None) -> None:
    for left in (path, sidecar(path)):
        with contextlib.suppress(OSError):
            left.unlink()
    if path.parent != root:
        with contextlib.suppress(OSError):
            path.parent.rmdir()
