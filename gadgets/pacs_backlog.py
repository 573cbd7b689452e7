"""What lies in a queue to archives, told without DICOM's libraries: for the monitor, and for the server that starts the sender.

Archives have numbers here, in the order of ``recon serve --pacs``: their titles and addresses are for the network's administrator, not
for everybody who may look at a page. The folder's layout is that of `gadgets.pacs_queue`.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # pynetdicom is an extra
    from gadgets.pacs import Destination

OTHER = "other"
"""An archive that is not one of the server's: what ``recon pacs send`` put in, or what is left of earlier options."""

MAX_RECORD = 64 << 10  # bytes; ours are far smaller
STATES = ("waiting", "failed")


@dataclass(frozen=True)
class Backlog:
    """Transfers to one archive. ``oldest``: seconds that the oldest of those that wait has been waiting, 0 for none."""

    archive: str
    waiting: int = 0
    failed: int = 0
    oldest: float = 0.0


class QueueWatch:
    """Looks into the folder of a queue again and again; may be used from any thread and never raises for what it finds.

    A transfer's archive and age do not change, so its record is read once.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[Path, tuple[str, float]] = {}

    def look(self, root: Path, archives: Sequence[str] = ()) -> tuple[Backlog, ...]:
        """How much waits, for each of ``archives`` (as `key_of` names them) and, where there are any, for others."""
        numbers = {key: str(n) for n, key in enumerate(dict.fromkeys(archives), 1)}
        found: dict[str, dict[str, list[float]]] = {number: {state: [] for state in STATES} for number in numbers.values()}
        now = time.time()
        with self._lock:
            seen = {}
            for state in STATES:
                for folder in _folders(root / state):
                    seen[folder] = key, created = self._known.get(folder) or _record(folder)
                    of_archive = found.setdefault(numbers.get(key, OTHER), {state: [] for state in STATES})
                    of_archive[state].append(max(0.0, now - created))
            self._known = seen  # those that are gone are forgotten
        return tuple(
            Backlog(name, len(ages["waiting"]), len(ages["failed"]), max(ages["waiting"], default=0.0))
            for name, ages in found.items()
        )


def key_of(destination: Destination) -> str:
    """One text for each archive; equal for equal ones."""
    return _key(destination.host, destination.port, destination.aet)


def has_work(root: Path) -> bool:
    """Whether something has to be sent, or is to be removed one day because nobody took it."""
    return bool(_folders(root / "waiting")) or any((root / "failed").glob("*/*.dcm"))


def _folders(parent: Path) -> list[Path]:
    found: list[Path] = []
    with contextlib.suppress(OSError):
        found = sorted(Path(entry.path) for entry in os.scandir(parent))
    return found


def _record(folder: Path) -> tuple[str, float]:
    """Archive and beginning of a transfer; of one that cannot be read, no archive and the folder's time."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        document: dict[str, Any] = json.loads(_small(folder / "job.json"))
        target = document["destination"]
        return _key(str(target["host"]), int(target["port"]), str(target["aet"])), float(document["created"])
    with contextlib.suppress(OSError):
        return "", folder.lstat().st_mtime
    return "", time.time()


def _small(path: Path) -> str:
    if path.parent.is_symlink():
        raise ValueError("leads out of the queue")
    with path.open(encoding="utf-8") as file:
        return file.read(MAX_RECORD)


def _key(host: str, port: int, aet: str) -> str:
    return f"{aet}@{host}:{port}"
