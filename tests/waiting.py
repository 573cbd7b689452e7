"""Waiting for what other threads and processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
PATIENCE = 240.0  # s; only the time until something counts as hung


def until(look: Callable[[], T], what: str | Callable[[], str] = "waited in vain") -> T:
    """What ``look`` says as soon as it is something; ``what`` is wrong if it never is."""
    deadline = time.monotonic() + PATIENCE
    while not (found := look()):
        assert time.monotonic() < deadline, what if isinstance(what, str) else what()
        time.sleep(0.02)
    return found


def is_alive(pid: int) -> bool:
    """A process that has ended and that nobody has asked about yet is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
