"""What tests give worker processes to do."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from recon_core.errors import DataError


def process_id() -> int:
    return os.getpid()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_once(marker: str) -> str:
    """Kills its process with a real signal the first time, answers the second time."""
    path = Path(marker)
    if not path.exists():
        path.write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def fail() -> None:
    raise DataError("bad line", where="slice 1", got=3, expected=4, remedy="Look.")
