"""How many processors this process may use: of a machine's, those that a container, a batch system or ``taskset`` leaves to it."""

from __future__ import annotations

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def cores() -> int:
    """Processors that may run this process, and no more than the time on them that its control group gets (``docker run --cpus``)."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(_share())))


def _share() -> float:
    """Processors' worth of time, by the tightest limit of the group and those around it; a billion without one."""
    try:
        own = next(line for line in OWN_GROUP.read_text(encoding="ascii").splitlines() if line.startswith("0::"))
    except (OSError, ValueError, StopIteration):
        return 1e9
    group = GROUPS / own.removeprefix("0::").strip().lstrip("/")
    return min(_limit(folder) for folder in (group, *group.parents) if folder.is_relative_to(GROUPS))


def _limit(folder: Path) -> float:
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        return int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or "max"
        return 1e9
