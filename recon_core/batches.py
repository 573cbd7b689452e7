"""How much is computed at once, for machines on which memory is short: a share of what blocks and chunks would have by default.

Blocks bound the memory of intermediate values and cost some speed; results agree up to rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHARE: ContextVar[float] = ContextVar("batch_share", default=1.0)


@contextmanager
def batch_share(share: float) -> Iterator[None]:
    """While inside, blocks are ``share`` (0 to 1) of their usual size."""
    if not 0 < share <= 1:
        raise ValueError(f"batch share: got {share}, expected a number above 0 and up to 1")
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)


def batch(usual: int) -> int:
    """Elements (or bytes) to take at once where ``usual`` would be taken with memory to spare."""
    return max(1, int(usual * _SHARE.get()))
