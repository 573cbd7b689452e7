"""Whether the server does its work, as a list of checks with words."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from gadgets.monitor.folder import Folder, Job, Status, number
from gadgets.pacs_backlog import OTHER, Backlog
from gadgets.queries import gpus

Level = Literal["ok", "warning", "failing"]

LATE_SECONDS = 3600.0
"""Images that wait for an archive for longer are worth a word."""

DEEP_QUEUE = 100
"""Tasks that wait for a worker (one for each slice); more is worth a word."""


STALLED_SECONDS = 120.0
"""For which tasks may wait while nothing runs: a fresh worker on a busy machine takes some."""


@dataclass(frozen=True)
class Check:
    """One thing looked at: how it is, and a sentence about it."""

    name: str
    level: Level
    words: str


def checks(folder: Folder, status: Status | None = None, jobs: Sequence[Job] | None = None) -> tuple[Check, ...]:
    """Everything that is looked at: ``server``, ``workers``, ``spool``, ``queue``, ``last``, ``gpu``, ``pacs``, ``cluster``."""
    status = folder.status() if status is None else status
    return (
        _server(status),
        _workers(status),
        _spool(folder, status),
        _queue(status),
        _last(folder.jobs(20, status) if jobs is None else jobs),
        _gpu(status),
        _pacs(folder.backlog(status)),
        _cluster(status),
    )


def worst(found: Iterable[Check]) -> Level:
    """The worst level of all."""
    levels = {check.level for check in found}
    return "failing" if "failing" in levels else "warning" if "warning" in levels else "ok"


def _server(status: Status) -> Check:
    if not status.said:
        return Check("server", "failing", "no server writes into this spool")
    if not status.exists:
        return Check("server", "failing", f"the server's process ended; it last spoke {duration(status.age)} ago")
    if not status.alive:
        return Check("server", "failing", f"the server hangs: no word for {duration(status.age)}")
    if not status.server.get("listening"):
        return Check("server", "failing", "the server does not accept connections")
    up = duration(time.time() - number(status.said.get("started")))
    connections = int(number(status.server.get("connections")))
    return Check("server", "ok", f"up for {up}, {plural(connections, 'connection')}")


def _workers(status: Status) -> Check:
    wanted = int(number(status.server.get("workers")))
    if not status.exists:
        return Check("workers", "failing", "none without a server")
    if wanted == 0:
        return Check("workers", "ok", "the server computes by itself")
    alive = len(status.workers())
    words = f"{alive} of {wanted} alive"
    return Check("workers", "failing" if alive == 0 else "ok" if alive >= wanted else "warning", words)


def _spool(folder: Folder, status: Status) -> Check:
    free, least = folder.free_bytes(), number(status.server.get("min_free_bytes"))
    if free < 0:
        return Check("spool", "failing", "the folder is not there")
    words = f"{size(free)} free"
    if not folder.is_writable():
        return Check("spool", "failing", f"the folder cannot be written; {words}")
    if free < least:
        return Check("spool", "failing", f"{words}, raw data need {size(least)}: new scans are reconstructed but not kept")
    return Check("spool", "warning" if free < 2 * least else "ok", words)


def _queue(status: Status) -> Check:
    waiting = queue_length(status)
    words = f"{plural(len(status.active), 'scan')} under way, {plural(waiting, 'task')} waiting"
    stalled = number(status.server.get("stalled")) if status.alive else 0.0
    if stalled > STALLED_SECONDS:
        return Check("queue", "failing", f"{words}, and none has begun for {duration(stalled)}")
    return Check("queue", "warning" if waiting > DEEP_QUEUE else "ok", words)


def _last(jobs: Sequence[Job]) -> Check:
    over = next((job for job in jobs if job.is_over), None)
    if over is None:
        return Check("last", "ok", "no scan yet")
    if over.state == "failed":
        return Check("last", "warning", f"{over.chain} failed")
    if over.fallback:
        return Check("last", "warning", f"{over.chain} sent, with images of {over.fallback}")
    return Check("last", "ok", f"{over.chain} sent")


def _gpu(status: Status) -> Check:
    names = [gpu["name"] for gpu in gpus()]
    wanted = str(status.server.get("device", "")).startswith("cuda")
    if wanted and not names:
        return Check("gpu", "failing", "the server computes on a GPU and there is none")
    words = ", ".join(names) if names else "none; the server computes on the CPU"
    return Check("gpu", "ok", words)


def _pacs(backlogs: Sequence[Backlog]) -> Check:
    if not backlogs:
        return Check("pacs", "ok", "no archive")
    words = []
    for backlog in backlogs:
        parts = [f"{plural(backlog.failed, 'transfer')} failed (recon pacs queue)"] if backlog.failed else []
        if backlog.waiting:
            wait = "waits" if backlog.waiting == 1 else "wait"
            parts.append(f"{plural(backlog.waiting, 'transfer')} {wait}, the oldest {duration(backlog.oldest)}")
        if parts:
            place = f"archive {backlog.archive}: " if backlog.archive != OTHER else "other archives: "
            words.append((place if len(backlogs) > 1 else "") + ", ".join(parts))
    late = any(backlog.oldest > LATE_SECONDS for backlog in backlogs)
    failed = any(backlog.failed for backlog in backlogs)
    return Check("pacs", "failing" if failed else "warning" if late else "ok", "; ".join(words) or "nothing waits")


def _cluster(status: Status) -> Check:
    if status.server.get("cluster_wanted") is None:
        return Check("cluster", "ok", "none; slices are computed on this machine")
    present, wanted = (int(number(status.server.get(name))) for name in ("cluster", "cluster_wanted"))
    if not status.exists:
        return Check("cluster", "failing", "nobody uses it without a server")
    if wanted == 0:
        words = "no worker of it has been seen yet (is its scheduler running?): slices are computed on this machine"
        return Check("cluster", "failing", words)
    if present == 0:
        return Check("cluster", "failing", "no worker of it can be had: slices are computed on this machine")
    return Check("cluster", "warning" if present < wanted else "ok", f"room for {present} of {plural(wanted, 'task')}")


def queue_length(status: Status) -> int:
    """Tasks that wait for a worker: slices, previews, files to be written."""
    return int(number(status.server.get("queued"))) if status.alive else 0


def duration(seconds: float) -> str:
    """As exact as anybody needs it: ``0.4 s``, ``12 s``, ``5 min``, ``3 h``, ``2 d``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86400:.0f} d"


def size(n_bytes: float) -> str:
    """``512 kB``, ``3.2 MB``, ``64 GB``; powers of 1000, as disks are sold."""
    for limit, unit, name in ((1e6, 1e3, "kB"), (1e9, 1e6, "MB"), (1e13, 1e9, "GB")):
        if n_bytes < limit:
            value = n_bytes / unit
            return f"{value:.1f} {name}" if value < 10 else f"{value:.0f} {name}"
    return f"{n_bytes / 1e12:.0f} TB"


def plural(n: int, noun: str) -> str:
    """``1 scan``, ``2 scans``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"
