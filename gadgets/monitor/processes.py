"""Processes of this machine as the kernel lists them: who is alive, and how much memory they hold."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
STATE, PARENT = 0, 1
WORKER_MARKS = (b"popen_loky", b"loky.backend", b"distributed.cli.dask_worker", b"dask_worker", b"dask worker")
"""In the command lines of local compute processes."""


@dataclass(frozen=True)
class Process:
    """One process; ``memory`` is its resident set in bytes."""

    pid: int
    memory: int


def is_alive(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    state = _field(pid, STATE)
    return state is not None and state not in ("Z", "X")


def memory_of(pid: int) -> int:
    """Resident bytes; 0 when it is gone."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int((PROC / str(pid) / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def workers_of(server: int) -> list[Process]:
    """Living compute processes that ``server`` started, by their command lines."""
    found = []
    for pid in _children(server):
        with contextlib.suppress(OSError):
            command = (PROC / str(pid) / "cmdline").read_bytes()
            if any(mark in command for mark in WORKER_MARKS) and b"resource_tracker" not in command and is_alive(pid):
                found.append(Process(pid, memory_of(pid)))
    return sorted(found, key=lambda process: process.pid)


def _children(parent: int) -> list[int]:
    numbers = (int(entry.name) for entry in os.scandir(PROC) if entry.name.isdecimal()) if PROC.is_dir() else ()
    return sorted(pid for pid in numbers if _field(pid, PARENT) == str(parent))


def _field(pid: int, place: int) -> str | None:
    """A field of the process's ``stat``, counted behind its name (which may hold anything)."""
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()[place]
    except (OSError, IndexError):
        return None
