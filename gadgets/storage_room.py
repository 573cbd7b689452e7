"""How much may still be written to a place, with what the rest of the machine needs left free. Files in memory take memory."""

from __future__ import annotations

import os
from pathlib import Path

MIN_DISK, MIN_SHARED = 512 << 20, 64 << 20
"""Bytes that stay free in a file system on a disk, and in one in memory: journal, images and prepared readouts are written there, too."""

MIN_MEMORY, MIN_MEMORY_SHARE = 1 << 30, 0.1
"""What files in memory leave for programs: so many bytes, and so much of the machine's memory."""

IN_MEMORY = frozenset({"tmpfs", "ramfs"})
MOUNTS = Path("/proc/self/mountinfo")
MEMORY = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")  # of a container, as it sees itself


def room(folder: Path) -> int:
    """Bytes that may still be written into a folder; none (or fewer) where there is no such folder."""
    left = free(folder)
    return min(left - MIN_SHARED, memory_room()) if is_in_memory(folder) else left - MIN_DISK


def free(folder: Path) -> int:
    """Bytes free in its file system; -1 where there is no such folder (any more)."""
    try:
        state = os.statvfs(folder)
    except OSError:
        return -1
    return state.f_bavail * state.f_frsize


def is_in_memory(folder: Path) -> bool:
    """Whether the folder's file system takes memory (Linux; elsewhere none does)."""
    try:
        device = folder.stat().st_dev
        lines = MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in lines:  # 36 35 98:0 / /mnt rw shared:1 - ext3 /dev/root rw
        words, _, kind = line.partition(" - ")
        if words.split()[2:3] == [number]:
            return kind.split(" ", 1)[0] in IN_MEMORY
    return False


def memory_room() -> int:
    """Bytes that files may take of this machine's memory, or of this container's."""
    total, available = _machine()
    limit, used = _number(GROUP / "memory.max"), _number(GROUP / "memory.current")
    if limit is not None and used is not None and limit < total:
        total, available = limit, min(available, limit - used + _cached())
    return available - max(MIN_MEMORY, int(MIN_MEMORY_SHARE * total))


def memory_in_all() -> int:
    """Bytes of this machine's memory, or of this container's."""
    limit, total = _number(GROUP / "memory.max"), _machine()[0]
    return total if limit is None else min(limit, total)


def _machine() -> tuple[int, int]:
    """Memory in all, and what programs may still take."""
    known: dict[str, int] = {}
    try:
        for line in MEMORY.read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            known[name] = int(value.split()[0]) << 10
        return known["MemTotal"], known["MemAvailable"]
    except (OSError, ValueError, KeyError, IndexError):
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page


def _cached() -> int:
    """Pages of files on disks that count as used, and are given back when somebody needs memory."""
    try:
        lines = (GROUP / "memory.stat").read_text(encoding="ascii").splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return 0


def _number(path: Path) -> int | None:
    """``None`` for no limit, or no such file."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None
