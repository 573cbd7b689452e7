"""Processes that another one started and that are no use without it: one that is killed can stop nobody."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path


def module_process(name: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Command and environment of a process that runs a module of ours: of the packages that this one runs, wherever its folder is.

    A file in that folder, ``json.py`` say, is not imported.
    """
    home = str(Path(__file__).parent.parent)
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    return [sys.executable, "-P", "-m", name, *arguments], {**os.environ, "PYTHONPATH": path}


def end_with(parent: int, look_every: float) -> None:
    """From now on this process ends within ``look_every`` s of ``parent``, which started it and may be gone by now."""
    threading.Thread(target=_watch, args=(parent, look_every), name="parent", daemon=True).start()


def _watch(parent: int, look_every: float) -> None:
    while os.getppid() == parent:
        time.sleep(look_every)
    os._exit(1)
