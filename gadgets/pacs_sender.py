"""A server's own process for sending what is queued for an archive: DICOM's libraries and pauses stay out of the server.

``python -m gadgets.pacs_sender QUEUE PARENT [SECONDS]`` sends until the process PARENT is no more, and keeps what failed for SECONDS.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from gadgets.log_lines import log_to_stderr
from gadgets.orphans import module_process

log = logging.getLogger(__name__)

RESTART_SECONDS = 10.0
LOOK_SECONDS = 1.0


class Sender:
    """Starts the sending process when there is something to send, and again if it should die.

    Parameters
    ----------
    queue
        Folder of the queue.
    keep_failed
        How long the files of failed jobs are kept, in s; ``None`` for the queue's own limit.
    """

    def __init__(self, queue: Path, keep_failed: float | None = None) -> None:
        self._queue = queue
        self._options = [] if keep_failed is None else [str(keep_failed)]
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._started = float("-inf")
        self._closed = False

    def poke(self) -> None:
        """Something may wait: see to it that a process is there."""
        with self._lock:
            if self._closed or (self._process is not None and self._process.poll() is None):
                return
            if self._process is not None:
                log.warning("event=pacs_sender_died rc=%s", self._process.returncode)
            if time.monotonic() - self._started < RESTART_SECONDS:
                return
            self._started = time.monotonic()
            command, environment = module_process("gadgets.pacs_sender", str(self._queue), str(os.getpid()), *self._options)
            try:
                self._process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
            except OSError as error:
                log.error("event=pacs_sender_failed error=%s", error.strerror)

    def close(self) -> None:
        """End the process; what is left waits on disk."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def main(queue: str, parent: str, keep_failed: str = "") -> None:
    """Send until the parent is gone."""
    log_to_stderr("INFO")
    from gadgets.pacs_queue import FAILED_SECONDS, Queue

    stop = threading.Event()
    options = {"keep_failed": float(keep_failed or FAILED_SECONDS)}
    worker = threading.Thread(target=Queue(Path(queue)).work, args=(stop,), kwargs=options, daemon=True)
    worker.start()
    while os.getppid() == int(parent) and worker.is_alive():
        worker.join(LOOK_SECONDS)
    stop.set()  # an object on its way is sent again by the next one


if __name__ == "__main__":
    main(*sys.argv[1:4])
