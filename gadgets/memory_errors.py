"""How libraries say that they got no memory, and how the operator hears of it."""

from __future__ import annotations

import re

from gadgets.errors import OutOfGpuMemory, OutOfMemory

_ALLOCATORS = (
    "DefaultCPUAllocator",
    "can't allocate memory",
    "CUDA out of memory",
    "CUDA error: out of memory",
    "ALLOC_FAILED",
)
"""How torch, cuFFT and cuBLAS say that they got no memory; all of them raise a plain ``RuntimeError`` on some path."""

_AMOUNT = re.compile(r"(?:tried to allocate|unable to allocate) ([\d.]+) ?(bytes|[KMGTP]i?B)", re.IGNORECASE)


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """What to tell the operator of a failed allocation; ``None`` for any other error.

    Only the amount is quoted from the library's words: the rest of them is about processes, devices and shapes.
    """
    if isinstance(error, OutOfMemory):
        return error
    words, kind = str(error), type(error).__name__  # torch is not imported here
    if not isinstance(error, MemoryError | RuntimeError):
        return None
    if isinstance(error, RuntimeError) and kind != "OutOfMemoryError" and not any(mark in words for mark in _ALLOCATORS):
        return None
    on_gpu = kind == "OutOfMemoryError" or any(library in words for library in ("CUDA", "CUFFT", "CUBLAS"))
    amount = _AMOUNT.search(words)
    where = "the GPU" if on_gpu else "this machine"
    asked = "" if amount is None else f": {_readable(amount[1], amount[2])} more were asked for"
    kind_of_error = OutOfGpuMemory if on_gpu else OutOfMemory
    return kind_of_error(f"out of memory on {where}{asked}", remedy="Use fewer virtual coils or a chain that needs less")


def _readable(number: str, unit: str) -> str:
    if unit.lower() != "bytes":
        return f"{number} {unit}"
    size = float(number)
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.0f} MiB"
