"""Times as people read them: always in UTC and always saying so, as ids of jobs are and the monitor's page is.

A log, a table and an id that name one moment have to agree, also on a server whose clock is set to another zone and in the night in
which that zone repeats an hour.
"""

from __future__ import annotations

import time

FORMAT = "%Y-%m-%d %H:%M:%S"
_BEGAN = time.time(), time.monotonic()


def utc(moment: float) -> str:
    """Seconds since the epoch as ``2026-11-29 10:53:42Z``."""
    return time.strftime(f"{FORMAT}Z", time.gmtime(moment))


def not_ahead() -> float:
    """Seconds since the epoch, for deciding what is old enough to be removed.

    Never more than this process has lived beyond its start: a clock that jumps ahead, by a wrong time server say, makes no raw data old.
    """
    wall, steady = _BEGAN
    return min(time.time(), wall + time.monotonic() - steady)
