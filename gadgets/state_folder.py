"""Where a user's server keeps what it has, unless it is told otherwise."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def state_folder() -> Path:
    """``$XDG_STATE_HOME/recon-gadgets``, by default below ``~/.local/state``."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "recon-gadgets"


def compiler_caches() -> None:
    """Where compilers keep things that the workers, who inherit this, use again.

    Importing torch's (its own optimisers do) makes a folder, by default in temporary storage; Numba's would be beside the package.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recon-gadgets"
    for variable, name in (("TORCHINDUCTOR_CACHE_DIR", "torch"), ("NUMBA_CACHE_DIR", "numba")):
        with contextlib.suppress(OSError):  # a home that cannot be written: what they choose themselves
            (base / name).mkdir(parents=True, exist_ok=True)
            os.environ.setdefault(variable, str(base / name))
