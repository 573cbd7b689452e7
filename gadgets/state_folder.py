"""Where a user's server keeps what it has, unless it is told otherwise."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def state_folder() -> Path:
    """``$XDG_STATE_HOME/recon-gadgets``, by default below ``~/.local/state``."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "recon-gadgets"


def torch_cache() -> None:
    """Where torch's compiler keeps things: importing it (every optimiser does) makes a folder, by default in temporary storage."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recon-gadgets" / "torch"
    with contextlib.suppress(OSError):  # a home that cannot be written: temporary storage it is
        base.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base))  # the workers inherit it
