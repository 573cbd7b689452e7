"""A worker that is killed in the middle of a message must not be waited for.

`loky` reads results from a pipe of which this process has the other end, too. A worker that dies while it writes leaves half a message:
the thread that reads it waits for the rest, and as its own process could still write it, the pipe never ends. That thread would have been
the one to notice the death: the scan would wait for ever, and so would the end of the server. The thread that writes a task's arguments
to a worker that is gone waits just so. So somebody else looks whether workers are alive, and closes our ends of the pipes of those that
are not.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from concurrent.futures import Executor
from multiprocessing.connection import wait
from typing import Any

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
GRACE_SECONDS = 5.0
"""`loky` notices nearly every death by itself, at once."""


def guard(executor: Executor) -> None:
    """Watch over a `loky` executor of one process from now on, until it ends. To be called after its first task was submitted."""
    threading.Thread(target=_watch, args=(_Inside(executor),), name="worker-pipes", daemon=True).start()


class _Inside:
    """What is needed of an executor, which forgets it at its end. Keeps no reference to the executor itself."""

    def __init__(self, executor: Any) -> None:
        self.manager: threading.Thread = executor._executor_manager_thread
        self._processes: dict[int, Any] = executor._processes
        self._flags = executor._flags
        self._ends = (executor._result_queue._writer, executor._call_queue._reader)

    @property
    def dead(self) -> bool:
        """Whether no process is left that the manager could wait for. One that is between two processes is none."""
        sentinels = [process.sentinel for process in list(self._processes.values())]
        try:
            return (
                len(wait(sentinels, 0)) == len(sentinels) if sentinels else bool(self._flags.broken or self._flags.shutdown)
            )
        except (OSError, ValueError):  # closed meanwhile
            return True

    def close(self) -> None:
        for end in self._ends:
            # not by its own ``close``: that one forgets the number after closing it, and the manager, which wakes up by this, may close
            # the same number again, when it is another file's
            number, end._handle = end._handle, None
            if number is not None:
                with contextlib.suppress(OSError):
                    os.close(number)


def _watch(inside: _Inside) -> None:
    since: float | None = None
    while True:
        inside.manager.join(LOOK_SECONDS)
        if not inside.manager.is_alive():
            inside.close()  # nobody is left to read: what still writes arguments ends by this
            return
        if not inside.dead:
            since = None
            continue
        since = time.monotonic() if since is None else since
        if time.monotonic() - since >= GRACE_SECONDS:
            log.warning("event=worker_pipes_closed reason='a worker died in the middle of a message'")
            inside.close()
            return
