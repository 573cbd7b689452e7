"""Waiting for a scan's tasks where its operator waits as well."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TypeVar

T = TypeVar("T")

WORD_SECONDS = 2.0


class Waiting:
    """Waits for one task after the other, and gives a sign of life every few seconds, however long a single one takes.

    Parameters
    ----------
    sign
        Tells the operator that the server is at it. It raises when nobody listens any more (``Disconnected``), and so does waiting.
    """

    def __init__(self, sign: Callable[[], None]) -> None:
        self._sign = sign
        self._given = time.monotonic()

    def until(self, future: Future[Any]) -> None:
        """Until the task is done, well or not."""
        while not wait([future], timeout=max(0.0, self._given + WORD_SECONDS - time.monotonic())).done:
            self._given = time.monotonic()
            self._sign()

    def result(self, future: Future[T]) -> T:
        """The task's result, or its error."""
        self.until(future)
        return future.result()
