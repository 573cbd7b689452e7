"""How libraries say that the GPU failed, and how the operator hears of it.

After an illegal access, a failed assertion or the loss of the device every later call to CUDA in the same process fails as well: what is
left is to end the process. A failed allocation is none of these (`gadgets.memory_errors`).
"""

from __future__ import annotations

import re

from gadgets.errors import DeviceFailed, DeviceFailedHere
from gadgets.memory_errors import out_of_memory

_FAILURES = (
    "CUDA error",
    "CUDA driver error",
    "CUDA unknown error",
    "Triton Error [CUDA]",
    "cudaGetDeviceCount",
    "No CUDA GPUs are available",
)
_STATUS = re.compile(r"\b(?:CUDNN|CUBLAS|CUFFT|CUSOLVER|CUSPARSE|CURAND)_[A-Z_]+\b")
"""cuDNN and its like fail by a status of their own, and most often because something before them has failed."""

_WORDS = re.compile(r"(?:CUDA(?: driver)? error|Triton Error \[CUDA\]): ([\w' -]{1,80})")
REMEDY = "The system's log (Xid) and nvidia-smi say more"


def device_failure(error: BaseException | None, *, here: bool = False) -> DeviceFailed | None:
    """What to tell of a GPU that failed; ``None`` for any other error, also for one of memory.

    Parameters
    ----------
    error
        What a task raised.
    here
        Whether it was raised in the server's own process, which lives on.
    """
    if isinstance(error, DeviceFailed):
        told = error
    elif isinstance(error, RuntimeError) and out_of_memory(error) is None:
        words = str(error)
        status, said = _STATUS.search(words), _WORDS.search(words)
        # torch is not imported here
        if type(error).__name__ != "AcceleratorError" and status is None and not any(mark in words for mark in _FAILURES):
            return None
        # only the driver's own sentence, which is one of a fixed list
        got = status[0] if status is not None else said[1].strip() if said is not None else None
        told = DeviceFailed("the GPU failed", got=got, remedy=REMEDY)
    else:
        return None
    return DeviceFailedHere(told.what, where=told.where, got=told.got, remedy=told.remedy) if here else told
