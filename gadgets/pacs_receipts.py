"""What became of a scan's images at the archives: the queue leaves a receipt, the server notes it in the journal.

A transfer that belongs to a scan has ``scan.json`` in its folder of the queue. When the archive has confirmed every object, the file
becomes ``<root>/stored/<transfer>.json``: a rename, for which a full disk has room. The journal is written by the server's process;
receipts may come from any process that sends.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gadgets.journal import Journal, UnknownJob

log = logging.getLogger(__name__)

RECORD, STORED = "scan.json", "stored"
MAX_RECORD = 4 << 10  # bytes; ours are far smaller
NOT_TAKEN = "not taken by an archive: recon pacs queue says why"


@dataclass(frozen=True)
class Passage:
    """One scan's way to one of its ``archives`` (a number). ``archive`` tells that one from the others."""

    scan: str
    archive: str
    archives: int = 1


def write_passage(folder: Path, passage: Passage) -> None:
    """Beside the objects of a transfer that is being put together."""
    path = folder / RECORD
    path.touch(mode=0o600)
    path.write_text(json.dumps(asdict(passage)), encoding="utf-8")


def leave_receipt(root: Path, folder: Path) -> None:
    """The transfer in ``folder`` has been confirmed. Never raises: without a receipt the row says "queued" for ever, no more."""
    try:
        (folder / RECORD).rename(root / STORED / f"{folder.name}.json")
    except FileNotFoundError:
        pass  # it belongs to no scan of a server, or the receipt was left before its sender died
    except OSError as error:
        log.error("event=pacs_receipt_not_left job=%s error=%s", folder.name, error.strerror)


def prune_receipts(root: Path, before: float) -> None:
    """Remove what no server has noted since: one whose other transfers were thrown away, for one."""
    for path in _files(root / STORED):
        with contextlib.suppress(OSError):
            if path.lstat().st_mtime < before:
                path.unlink()


class Receipts:
    """The server's side: looks into the queue again and again, and brings its scans' rows up to date.

    Parameters
    ----------
    root
        Folder of the queue.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._refused: set[str] = set()  # transfers whose end is noted

    def note(self, journal: Journal) -> None:
        """Rows say ``stored`` when every archive has confirmed every object, and ``failed`` when a transfer was given up.

        Raises
        ------
        JournalError
            It cannot be read or written.
        """
        confirmed: dict[str, list[tuple[Path, Passage]]] = {}
        for path in _files(self._root / STORED):
            passage = _read(path)
            if passage is None:
                path.unlink(missing_ok=True)
            else:
                confirmed.setdefault(passage.scan, []).append((path, passage))
        for scan, left in confirmed.items():
            # images that were queued twice, after a worker's death, have two receipts of one archive
            if len({passage.archive for _, passage in left}) >= left[0][1].archives and self._stored(journal, scan):
                for path, _ in left:
                    path.unlink(missing_ok=True)
        failed = {folder.name: folder for folder in _files(self._root / "failed")}
        self._refused &= set(failed)  # one that is tried again may fail again
        for name in failed.keys() - self._refused:
            passage = None if failed[name].is_symlink() else _read(failed[name] / RECORD)
            if passage is None or self._given_up(journal, passage):
                self._refused.add(name)

    def _stored(self, journal: Journal, scan: str) -> bool:
        """Whether the receipts of a scan have served. A row that is not written yet says so later."""
        with contextlib.suppress(UnknownJob):
            row = journal.row(scan)
            if row.archive in ("queued", "failed"):
                warnings = tuple(words for words in row.warnings if words != NOT_TAKEN)
                journal.update(scan, archive="stored", warnings=warnings)
                log.info("event=archive_stored job=%s", scan)
                return True
            return row.archive == "stored"
        return True

    def _given_up(self, journal: Journal, passage: Passage) -> bool:
        with contextlib.suppress(UnknownJob):
            row = journal.row(passage.scan)
            if row.archive == "queued":
                journal.update(row.id, archive="failed", warnings=(*row.warnings, NOT_TAKEN))
            return row.archive in ("queued", "failed", "stored")
        return True


def _files(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(folder.iterdir())
    except OSError:
        return


def _read(path: Path) -> Passage | None:
    try:
        with path.open("rb") as file:
            document = json.loads(file.read(MAX_RECORD))
        return Passage(str(document["scan"]), str(document["archive"]), int(document["archives"]))
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
