"""Raw data on disk: every byte of a connection, verbatim, before anything else is done with it.

The log is also the buffer's storage: worker processes read the samples from it by stream offset, so the connection's thread
copies every byte once and never waits for computing. A log without room on the disk goes on in temporary storage: a scan is
never lost because its capture cannot be kept.

Files are ``<utc time>-<random>.mrd`` (mode 0600, in a folder of mode 0700) with a ``.json`` beside each finished one. A log
that is still being written is locked (``flock``); one that is neither locked nor finished was left by a server that died.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import logging
import math
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from gadgets.capture import capture_status, sidecar, write_sidecar
from gadgets.capture import read_capture as read_capture
from gadgets.errors import SpoolError
from gadgets.queries import versions as installed_versions

logger = logging.getLogger(__name__)

Status = Literal["complete", "truncated", "failed"]

TEMPORARY_PREFIX = "recon-gadgets-log-"
CHECK_EVERY = 256 << 20  # bytes between two looks at the limits
NOTE_CHARS = 500
STALE_SECONDS = 3600.0
RECOUNT_SECONDS = 60.0
RESERVE_FROM, RESERVE_BYTES = 1 << 20, 64 << 20
FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h
_fallocate = getattr(ctypes.CDLL(None), "fallocate64", None) if os.name == "posix" else None
if _fallocate is not None:
    _fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS})
"""Errors of a write after which another place may still take the bytes."""


JOB_SUFFIX = ".job"


def job_folder_of(capture: Path) -> Path:
    """The folder of what methods told besides images: part of its capture, in size and in when it is removed."""
    return capture.with_suffix(JOB_SUFFIX)


def default_spool_root() -> Path:
    """``$XDG_STATE_HOME/recon-gadgets/spool``, by default below ``~/.local/state``."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "recon-gadgets" / "spool"


class Spool:
    """Keeps captures and their total size.

    Parameters
    ----------
    root
        Folder of the captures (made when missing); ``None`` keeps none: logs then live in temporary storage only.
    max_bytes
        Size of all captures together; the oldest finished ones are removed above it, complete ones before failed ones as
        long as the failed ones take no more than half of it. A scan that is running is never removed.
    min_free_bytes
        What has to stay free on the disk. When removing finished captures is not enough, logs go to temporary storage.
    max_scan_bytes
        Largest single log; more is a ``SpoolError``.
    versions
        Written into every sidecar; by default those of this installation.

    Raises
    ------
    SpoolError
        The folder cannot be made or belongs to someone else.
    """

    def __init__(
        self,
        root: Path | None,
        max_bytes: int = 50 * 10**9,
        min_free_bytes: int = 2 * 10**9,
        max_scan_bytes: int = 64 * 10**9,
        *,
        versions: Mapping[str, str] | None = None,
        temporary_directories: tuple[Path, ...] | None = None,
    ) -> None:
        self.root = None if root is None else Path(root).expanduser()
        self.max_bytes, self.min_free_bytes, self.max_scan_bytes = max_bytes, min_free_bytes, max_scan_bytes
        self.versions = dict(installed_versions() if versions is None else versions)
        self.temporary_directories = temporary_directories or (Path("/dev/shm"), Path(tempfile.gettempdir()))
        self._lock = threading.Lock()
        self._used, self._counted = 0, -math.inf  # bytes in the folder, and when they were last counted
        self._salt = secrets.token_bytes(16)  # peers are comparable within one run of the server, and not beyond
        if self.root is not None:
            self._make_root(self.root)
            self._adopt_orphans(self.root)
        self._remove_stale_temporaries()

    def open(self, *, peer: str = "") -> ScanLog:
        """A new, empty log. ``peer`` is stored as a keyed hash only; no file exists before the first byte."""
        digest = hashlib.blake2b(peer.encode(), key=self._salt, digest_size=6).hexdigest() if peer else ""
        return ScanLog(self, digest)

    def captures(self) -> list[Path]:
        """Finished captures, oldest first."""
        if self.root is None:
            return []
        return sorted(path for path in self.root.glob("*.mrd") if sidecar(path).exists())

    def make_room(self, grown: int = 0) -> bool:
        """Remove the oldest finished captures above the limits; whether the limits hold now.

        ``grown`` is what a log has taken since it last said so. Files are counted anew once a minute, or when a limit seems to be
        reached: looking at each of ten thousand captures for every connection would hold all of them up.
        """
        if self.root is None:
            return False
        with self._lock:
            self._used += grown
            fresh = time.monotonic() - self._counted < RECOUNT_SECONDS
            if fresh and self._used <= self.max_bytes and _free(self.root) >= self.min_free_bytes:
                return True
            return self._evict(self.root)

    def _evict(self, root: Path) -> bool:
        sizes = {path: _size(path) + _folder_size(job_folder_of(path)) for path in root.glob("*.mrd")}
        used = self._used = sum(sizes.values())
        self._counted = time.monotonic()
        if used <= self.max_bytes and _free(root) >= self.min_free_bytes:
            return True
        finished = [path for path in sorted(sizes) if sidecar(path).exists()]
        status = {path: capture_status(path) for path in finished}
        kept_failed = sum(sizes[path] for path in finished if status[path] != "complete")
        # when others have filled the disk, removing captures would lose them and not help
        helps = _free(root) + sum(sizes[path] for path in finished) >= self.min_free_bytes
        while finished and (used > self.max_bytes or (helps and _free(root) < self.min_free_bytes)):
            complete = [path for path in finished if status[path] == "complete"]
            victim = complete[0] if complete and kept_failed <= self.max_bytes // 2 else finished[0]
            finished.remove(victim)
            with contextlib.suppress(OSError):
                victim.unlink()
            with contextlib.suppress(OSError):
                sidecar(victim).unlink()
            shutil.rmtree(job_folder_of(victim), ignore_errors=True)
            used -= sizes[victim]
            self._used = used
            kept_failed -= sizes[victim] if status[victim] != "complete" else 0
            logger.info("event=capture_evicted file=%s bytes=%d status=%s", victim.name, sizes[victim], status[victim])
        return _free(root) >= self.min_free_bytes

    def place(self, needed: int, tried: set[Path]) -> tuple[Path, bool]:
        """Where a log of at least ``needed`` bytes may go, and whether it is kept there.

        Raises
        ------
        SpoolError
            Neither the spool nor temporary storage has room.
        """
        if self.root is not None and self.root not in tried:
            if not self.root.is_dir():  # somebody removed it while the server runs
                with contextlib.suppress(SpoolError):
                    self._make_root(self.root)
            if self.make_room():
                return self.root, True
        for folder in self.temporary_directories:
            # room for as much again, because the scan goes on
            if folder not in tried and folder.is_dir() and _free(folder) > max(2 * needed, 64 << 20):
                return folder, False
        raise SpoolError("no room for the raw data", where="spool", remedy="Free disk space or lower the spool's limits")

    def _make_root(self, root: Path) -> None:
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if root.stat().st_uid != os.getuid():
                raise SpoolError("the folder belongs to another user", where=f"spool {root}")
            root.chmod(0o700)
        except OSError as error:
            raise SpoolError("cannot make the folder", where=f"spool {root}", got=error.strerror) from error

    def _adopt_orphans(self, root: Path) -> None:
        """Give a sidecar to captures that a dying server left; without one they would never be evicted."""
        for path in root.glob("*.mrd"):
            if sidecar(path).exists() or _is_locked(path):
                continue
            info = {"status": "truncated", "note": "the server ended during this scan", "bytes": _size(path), "versions": {}}
            with contextlib.suppress(OSError):
                os.truncate(path, _size(path))  # gives back what was reserved
                write_sidecar(sidecar(path), info)
                logger.warning("event=capture_orphaned file=%s bytes=%d", path.name, _size(path))

    def _remove_stale_temporaries(self) -> None:
        for folder in self.temporary_directories:
            for left in folder.glob(TEMPORARY_PREFIX + "*"):
                with contextlib.suppress(OSError):
                    state = left.stat()
                    old = time.time() - state.st_mtime > STALE_SECONDS
                    if state.st_uid == os.getuid() and old and not any(_is_locked(log) for log in left.glob("*.mrd")):
                        shutil.rmtree(left)


class ScanLog:
    """The bytes of one connection, in order. Written by one thread; other processes may read what was appended at once.

    ``path`` changes when the log has to move to other storage; offsets stay valid, and the old file stays readable until the
    end.
    """

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
            self._next_check = self.size + CHECK_EVERY
            if self._kept and not self._spool.make_room(self._growth()):
                self._move("too little free space")
        return offset

    def _growth(self) -> int:
        grown, self._reported = self.size - self._reported, self.size
        return grown

    def flush(self) -> None:
        """Force the bytes to the device. Other processes need no flush: appending does not buffer.

        Not done at the end of a scan: it would stall the file system under the next one. Captures survive the death of the
        server at any moment; a power cut may cost the last seconds.
        """
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # not every file system can; the bytes are in the page cache then
                os.fdatasync(self._fd)

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
                    "bytes": _size(incomplete[0]),
                    "note": f"{info['note']} (the disk was full: only the beginning is here)",
                }
                path = incomplete[0]
            else:
                self._end()
                return None
        try:
            write_sidecar(sidecar(path), info)
        except OSError as error:
            logger.error("event=sidecar_failed file=%s error=%s", path.name, error.strerror)
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
            folder, kept = self._spool.place(self.size + needed, self._tried)
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
            self._create(self.size + (64 << 20))
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


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _folder_size(folder: Path) -> int:
    """Bytes of the files in it; none where there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in entries)
    except OSError:
        return 0


def _free(folder: Path) -> int:
    """Bytes; none where there is no such folder (any more)."""
    try:
        state = os.statvfs(folder)
    except OSError:
        return -1
    return state.f_bavail * state.f_frsize
