"""Processes that another one started and that are no use without it: one that is killed can stop nobody."""

from __future__ import annotations

import os
import threading
import time


def end_with(parent: int, look_every: float) -> None:
    """From now on this process ends within ``look_every`` s of ``parent``, which started it and may be gone by now."""
    threading.Thread(target=_watch, args=(parent, look_every), name="parent", daemon=True).start()


def _watch(parent: int, look_every: float) -> None:
    while os.getppid() == parent:
        time.sleep(look_every)
    os._exit(1)
