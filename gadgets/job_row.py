"""One row of the journal of jobs: what is known of a scan."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

State = Literal["received", "reconstructing", "sent", "failed"]
STATES: tuple[State, ...] = ("received", "reconstructing", "sent", "failed")
OPEN_STATES: tuple[State, ...] = ("received", "reconstructing")

Archive = Literal["", "due", "queued", "stored", "failed"]
"""Automatic sending to an archive: none wanted; images still to be queued; in the queue; confirmed by every archive; not queued, or
given up by the queue."""


@dataclass(frozen=True)
class JobRow:
    """One scan. Times are seconds since the epoch (UTC), ``None`` until they are known.

    Attributes
    ----------
    id
        The capture's stem; that of a retry has ``.r1``, ``.r2``, ... behind it.
    chain
        Asked for: a name, or "(script)".
    state, why
        Where it is, and why it failed (or why it waits again).
    received, started, finished
        The peer's CLOSE has come; reconstructing began; the last image was sent or written, or the job failed.
    timings
        Seconds: ``receiving`` (first byte to CLOSE), ``flush`` (raw data to the device), ``first_image`` and ``last_image`` (after CLOSE).
    n_readouts, n_images
        Received; sent or written (without previews).
    settings
        Every setting of the chain by group, as used.
    versions
        recon-gadgets, torch, python, numpy, ismrmrd, and ``protocol`` (dialect of the connection).
    weights
        sha256 of the method's trained weights, "" where it has none.
    peer
        Address that the connection came from.
    origin
        "connection", "node", or "retry of <id>".
    capture
        File name below the spool's folder, "" when the raw data were not kept. The file may have been evicted meanwhile.
    fallback
        Chain that stood in for this one in some slice, "" for none.
    warnings
        What the operator was told.
    archive
        See ``Archive``.
    ask
        A retry's own wishes: ``config`` (chain name) and ``set`` (settings by name).
    attempts
        How often a reconstruction without connection was begun.
    owner
        Token of the process at work on it, "" for nobody.
    """

    id: str
    chain: str = ""
    state: State = "received"
    why: str = ""
    received: float | None = None
    started: float | None = None
    finished: float | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    n_readouts: int = 0
    n_images: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    weights: str = ""
    peer: str = ""
    origin: str = "connection"
    capture: str = ""
    fallback: str = ""
    warnings: tuple[str, ...] = ()
    archive: Archive = ""
    ask: Mapping[str, Any] = field(default_factory=dict)
    attempts: int = 0
    owner: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen by itself."""
        return self.state not in OPEN_STATES

    @property
    def folder(self) -> str:
        """Where its results are, below the spool's folder: the capture's job folder, a retry's own folder in that."""
        stem, retry, number = self.id.partition(".r")
        return f"{stem}.job/r{number}" if retry else f"{self.id}.job"

    def images(self, root: Path) -> Path | None:
        """Its ``images.h5``, if there is one (scans whose images went to their connection have one only where images are kept)."""
        path = root / self.folder / "images.h5"
        return path if path.is_file() else None


JSON_COLUMNS = ("timings", "settings", "versions", "warnings", "ask")
COLUMNS = tuple(f.name for f in fields(JobRow))


def encoded(name: str, value: Any) -> Any:
    """A value as its column holds it."""
    return json.dumps(value, default=str) if name in JSON_COLUMNS else value


def values_of(row: JobRow) -> tuple[Any, ...]:
    """A row in the order of ``COLUMNS``."""
    return tuple(encoded(name, getattr(row, name)) for name in COLUMNS)


def row_of(record: sqlite3.Row) -> JobRow:
    """The inverse of ``values_of``."""
    values = {name: json.loads(record[name]) if name in JSON_COLUMNS else record[name] for name in COLUMNS}
    return JobRow(**{**values, "warnings": tuple(values["warnings"])})
