"""Raw data on disk: every byte of a connection, verbatim, before anything else is done with it.

The log is also the buffer's storage: worker processes read the samples from it by stream offset, so the connection's thread
copies every byte once and never waits for computing. A log without room on the disk goes on in temporary storage: a scan is
never lost because its capture cannot be kept.

Files are ``<utc time>-<random>.mrd`` (mode 0600, in a folder of mode 0700) with a ``.json`` beside each finished one. A log
that is still being written is locked (``flock``); one that is neither locked nor finished was left by a server that died.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from gadgets.capture import JOB_SUFFIX as JOB_SUFFIX
from gadgets.capture import capture_status, folder_size, sidecar, size_of, write_sidecar
from gadgets.capture import job_folder_of as job_folder_of
from gadgets.capture import read_capture as read_capture
from gadgets.clock import not_ahead
from gadgets.errors import SpoolError
from gadgets.file_locks import is_locked
from gadgets.queries import versions as installed_versions
from gadgets.scan_log import TEMPORARY_AHEAD, TEMPORARY_PREFIX
from gadgets.scan_log import ScanLog as ScanLog
from gadgets.scan_log import Status as Status
from gadgets.state_folder import state_folder
from gadgets.storage_room import free as _free
from gadgets.storage_room import room
from recon_core.errors import plain

logger = logging.getLogger(__name__)

ORPHAN_NOTE = "the server ended during this scan"
"""In the sidecar of a capture that a dying server left, until `gadgets.recovery` has looked at it."""

STALE_SECONDS = 3600.0
RECOUNT_SECONDS = 60.0
EARLY_SECONDS = 86400.0
"""A capture that has to make room sooner than this goes with a warning."""


def default_spool_root() -> Path:
    """``$XDG_STATE_HOME/recon-gadgets/spool``, by default below ``~/.local/state``."""
    return state_folder() / "spool"


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
    max_age
        Finished captures older than this many seconds are removed, whatever became of their scans; ``None`` keeps them.
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
        max_age: float | None = None,
        versions: Mapping[str, str] | None = None,
        temporary_directories: tuple[Path, ...] | None = None,
    ) -> None:
        self.root = None if root is None else Path(root).expanduser()
        self.max_bytes, self.min_free_bytes, self.max_scan_bytes = max_bytes, min_free_bytes, max_scan_bytes
        self.max_age = max_age
        # captures (file names) that are still to be reconstructed: never removed
        self.held: Callable[[], Collection[str]] = frozenset
        self.versions = dict(installed_versions() if versions is None else versions)
        self.temporary_directories = temporary_directories or _temporaries(self.root)
        self._lock = threading.Lock()
        self._owed: dict[Path, dict[str, Any]] = {}  # sidecars that the disk did not take
        self._used, self._counted = 0, -math.inf  # bytes in the folder, and when they were last counted
        self._evicted: Counter[tuple[str, str]] = Counter()
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

    def evicted(self) -> list[tuple[str, str, int]]:
        """How many captures this process has removed: why (``age``, ``size``, ``disk``), how their scans had ended, number."""
        with self._lock:
            return sorted((reason, status, n) for (reason, status), n in self._evicted.items())

    def make_room(self, grown: int = 0) -> bool:
        """Remove the oldest finished captures above the limits; whether the limits hold now.

        ``grown`` is what a log has taken since it last said so. Files are counted anew once a minute, or when a limit seems to be
        reached: looking at each of ten thousand captures for every connection would hold all of them up.
        """
        if self.root is None:
            return False
        with self._lock:
            self._write_owed()
            self._used += grown
            fresh = time.monotonic() - self._counted < RECOUNT_SECONDS
            if fresh and self._used <= self.max_bytes and _free(self.root) >= self.min_free_bytes:
                return True
            return self._evict(self.root)

    def owe_sidecar(self, capture: Path, info: Mapping[str, Any]) -> None:
        """Write a finished capture's sidecar as soon as the disk takes it: without one the capture would never be evicted."""
        with self._lock:
            self._owed[capture] = dict(info)

    def _write_owed(self) -> None:
        for capture, info in list(self._owed.items()):
            try:
                if capture.exists():
                    write_sidecar(sidecar(capture), info)
            except OSError:
                return
            del self._owed[capture]

    def _evict(self, root: Path) -> bool:
        sizes = {path: size_of(path) + folder_size(job_folder_of(path)) for path in root.glob("*.mrd")}
        self._used = sum(sizes.values())
        self._counted = time.monotonic()
        held = self.held()
        if self.max_age is not None:
            oldest = not_ahead() - self.max_age
            for path in [path for path in sizes if path.name not in held and _finished(path) < oldest]:
                self._remove(path, sizes.pop(path), "age", capture_status(path))
        used = self._used
        if used <= self.max_bytes and _free(root) >= self.min_free_bytes:
            return True
        finished = [path for path in sorted(sizes) if path.name not in held and sidecar(path).exists()]
        status = {path: capture_status(path) for path in finished}
        kept_failed = sum(sizes[path] for path in finished if status[path] != "complete")
        # when others have filled the disk, removing captures would lose them and not help
        helps = _free(root) + sum(sizes[path] for path in finished) >= self.min_free_bytes
        while finished and (used > self.max_bytes or (helps and _free(root) < self.min_free_bytes)):
            complete = [path for path in finished if status[path] == "complete"]
            victim = complete[0] if complete and kept_failed <= self.max_bytes // 2 else finished[0]
            finished.remove(victim)
            self._remove(victim, sizes[victim], "size" if used > self.max_bytes else "disk", status[victim])
            used = self._used
            kept_failed -= sizes[victim] if status[victim] != "complete" else 0
        return _free(root) >= self.min_free_bytes

    def _remove(self, capture: Path, size: int, reason: str, status: str) -> None:
        """A capture, its sidecar and what came of it; loudly where that cannot be what anybody wants.

        The raw data of a scan that failed are all that is left of it. One that goes on the day of its scan for want of room is a spool
        that is too small, or somebody who fills it.
        """
        age = time.time() - _finished(capture)
        for path in (capture, sidecar(capture)):
            with contextlib.suppress(OSError):
                path.unlink()
        shutil.rmtree(job_folder_of(capture), ignore_errors=True)
        self._used -= size
        self._evicted[reason, status] += 1
        loud = status != "complete" or (reason != "age" and age < EARLY_SECONDS)
        logger.log(
            logging.WARNING if loud else logging.INFO, "event=capture_evicted file=%s bytes=%d reason=%s status=%s hours=%.1f",
            capture.name, size, reason, plain(status, 16), age / 3600.0,
        )  # fmt: skip

    def place(self, needed: int, tried: set[Path]) -> tuple[Path, bool]:
        """Where a log may go of which ``needed`` bytes are there, and whether it is kept there.

        The scan goes on, so a log looks at its place again while it grows (`has_room`).

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
            if folder not in tried and self.has_room(folder, needed):
                return folder, False
        rooms = ", ".join(f"{max(0, room(folder)) >> 20} MiB in {folder}" for folder in self.temporary_directories)
        raise SpoolError(
            "no room for the raw data", where="spool", got=f"room for {rooms or 'nothing'}",
            expected=f"{needed + TEMPORARY_AHEAD >> 20} MiB", remedy="Free disk space or lower the spool's limits",
        )  # fmt: skip

    def has_room(self, folder: Path, needed: int = 0) -> bool:
        """Whether temporary storage takes so many bytes more, and those that come until a log looks again."""
        return room(folder) >= needed + TEMPORARY_AHEAD

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
            if sidecar(path).exists() or is_locked(path):
                continue
            info = {
                "status": "truncated",
                "note": ORPHAN_NOTE,
                "bytes": size_of(path),
                "versions": {},
            }
            with contextlib.suppress(OSError):
                os.truncate(path, size_of(path))  # gives back what was reserved
                write_sidecar(sidecar(path), info)
                logger.warning("event=capture_orphaned file=%s bytes=%d", path.name, size_of(path))

    def _remove_stale_temporaries(self) -> None:
        for folder in self.temporary_directories:
            for left in folder.glob(TEMPORARY_PREFIX + "*"):
                with contextlib.suppress(OSError):
                    state = left.stat()
                    old = time.time() - state.st_mtime > STALE_SECONDS
                    if state.st_uid == os.getuid() and old and not any(is_locked(log) for log in left.glob("*.mrd")):
                        shutil.rmtree(left)


def _finished(capture: Path) -> float:
    """When its scan was over, in s since the epoch; for one that is not, the end of all times."""
    try:
        return sidecar(capture).stat().st_mtime
    except OSError:
        return math.inf


def _temporaries(root: Path | None) -> tuple[Path, ...]:
    """Temporary storage, in the order in which it is tried.

    Where the spool has no room, disks come first: memory is what the reconstructions need. Where raw data are not to be kept at all,
    they are not to lie on a disk either, if that can be helped.
    """
    memory, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    return (memory, disk) if root is None else (disk, memory)
