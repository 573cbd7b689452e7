"""A thread that looks after something again and again, whatever goes wrong with it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from gadgets.journal import JournalError

log = logging.getLogger(__name__)

TROUBLE_SECONDS = 30.0  # until the next look at a journal that cannot be read


class Lookout:
    """Calls ``look`` when it starts, after each ``wake``, and ``pause`` s after its last return.

    Parameters
    ----------
    name
        Of the thread.
    look
        Does what there is to do; may take long. What it raises is logged, and it is called again after a longer pause.
    pause
        Seconds.
    """

    def __init__(self, name: str, look: Callable[[], None], pause: float) -> None:
        self._name, self._look, self._pause = name, look, pause
        self._wake, self._stopping = threading.Event(), False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def wake(self) -> None:
        """Look now."""
        self._wake.set()

    def stop(self) -> None:
        """Look no more; a look that is being taken goes on."""
        self._stopping = True
        self._wake.set()

    def join(self, timeout: float) -> None:
        """Wait for the end of the last look."""
        if self._thread.is_alive():
            self._thread.join(timeout)

    def _run(self) -> None:
        while not self._stopping:
            pause = self._pause
            try:
                self._look()
            except JournalError as error:
                log.error("event=journal_failed error=%r", str(error))
                pause = TROUBLE_SECONDS
            except Exception as error:  # one job's trouble must not leave all others waiting
                log.error("event=recovery_crashed in=%s error=%s", self._name, type(error).__name__)
                pause = TROUBLE_SECONDS
            self._wake.wait(pause)
            self._wake.clear()
