"""What is tried when memory is short: smaller batches, then the CPU; what comes after that is the chain's fallback."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from gadgets.errors import OutOfGpuMemory, OutOfMemory, WorkerKilled
from gadgets.memory_errors import out_of_memory

log = logging.getLogger(__name__)

SMALLER = 1 / 8
"""Share of the usual batches: activations and coil images are most of what a method needs, so an eighth of them is a step that counts."""


@dataclass(frozen=True)
class Rung:
    """How a slice is computed. ``alone``: no other task of this machine beside it."""

    words: str
    batch_share: float = 1.0
    alone: bool = False
    cpu_only: bool = False


RUNGS = (
    Rung("as usual"),
    Rung("with smaller batches, one slice at a time", SMALLER, alone=True),
    Rung("on the CPU", SMALLER, alone=True, cpu_only=True),
)


class Ladder:
    """Where a scan stands. Steps are taken by the scan: a slice that begins later begins where the last one succeeded."""

    def __init__(self) -> None:
        self._at = 0

    @property
    def rung(self) -> Rung:
        return RUNGS[self._at]

    def down(self, chain: str, taken: Rung, failure: BaseException) -> str | None:
        """Go on below ``taken`` after ``failure``.

        Returns
        -------
        str or None
            What to tell the operator (the same words for every slice that takes the step); ``None`` when the failure is none of memory, or
            nothing is left to try.
        """
        told = failure if isinstance(failure, WorkerKilled) else out_of_memory(failure) or failure
        if not isinstance(told, OutOfMemory | WorkerKilled):
            return None
        below = RUNGS.index(taken) + 1
        if below < len(RUNGS) and RUNGS[below].cpu_only and not isinstance(told, OutOfGpuMemory):
            below += 1  # it was the CPU's memory
        if below >= len(RUNGS):
            return None
        if below > self._at:
            self._at = below
            log.warning("event=memory_step chain=%s to=%r reason=%r", chain, self.rung.words, told.what)
        place = "the GPU" if isinstance(told, OutOfGpuMemory) else "this machine"
        return f"{chain}: memory on {place} is short; it goes on {RUNGS[below].words}"
