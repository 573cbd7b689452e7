"""What is tried when memory is short or a GPU fails; what comes after that is the chain's fallback.

Memory: smaller batches, then the CPU. A GPU: another worker, once for each slice, then the CPU.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from gadgets.device_errors import device_failure
from gadgets.errors import DeviceFailed, DeviceFailedHere, OutOfGpuMemory, OutOfMemory, WorkerKilled
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
        self._elsewhere: set[object] = set()  # slices that were given to another worker

    @property
    def rung(self) -> Rung:
        return RUNGS[self._at]

    def down(self, chain: str, taken: Rung, failure: BaseException, which: object = None) -> str | None:
        """Go on below ``taken`` after ``failure`` of the slice ``which``.

        Returns
        -------
        str or None
            What to tell the operator (the same words for every slice that takes the step); ``None`` when the failure is none of memory
            or of a GPU, or nothing is left to try.
        """
        failed = device_failure(failure)
        if failed is not None:
            return self._leave_device(chain, taken, failed, which)
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

    def _leave_device(self, chain: str, taken: Rung, failed: DeviceFailed, which: object) -> str | None:
        if taken.cpu_only:
            return None
        again = not (self.rung.cpu_only or which in self._elsewhere or isinstance(failed, DeviceFailedHere))
        self._elsewhere.add(which)
        step = "on another worker" if again else RUNGS[-1].words
        if again or not self.rung.cpu_only:
            log.warning("event=device_step chain=%s to=%r reason=%r", chain, step, str(failed))
        if not again:
            self._at = len(RUNGS) - 1
        return f"{chain}: the GPU failed; it goes on {step}"
