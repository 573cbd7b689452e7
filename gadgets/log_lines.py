"""The log: one line for each event on stderr, whatever a peer has sent."""

from __future__ import annotations

import logging
import sys

from gadgets.clock import utc
from recon_core.errors import plain

LOG_FORMAT = "%(asctime)s level=%(levelname)s logger=%(name)s %(message)s"
MAX_MESSAGE_CHARACTERS = 8000


class OneLine(logging.Formatter):
    """Messages as one line of printable characters: words of a peer or a file can neither forge lines nor steer a terminal.

    Times are UTC, to the millisecond. Tracebacks stay as they are: they are the program's own.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        record.message = plain(record.message, MAX_MESSAGE_CHARACTERS)
        return super().formatMessage(record)

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return f"{utc(record.created).removesuffix('Z')}.{int(record.msecs):03d}Z"


def log_to_stderr(level: str | int) -> None:
    """Send the log of this process to stderr, from ``level`` on; once is enough."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine(LOG_FORMAT))
    logging.basicConfig(level=level, handlers=[handler])
