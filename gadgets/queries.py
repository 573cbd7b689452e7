"""Answers to QUERY (id 6): the keys of the real Gadgetron server, and three of our own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from functools import lru_cache

from gadgets import __version__
from gadgets.cores import cores

UNKNOWN = "Unknown query"
PRODUCT = "recon-gadgets"
GPU_SECONDS = 60.0
"""For how long an answer of the driver's tool counts; it takes up to a second, and ten where a GPU hangs."""

BEHIND = "recon::behind"
"""Whoever asks this before its data lets scans of scanners go first."""

BEHIND_ID = 7
"""Of our own client's query, by which it knows the answer."""


def version_of(distribution: str) -> str:
    """Version of an installed distribution, ``"not installed"`` without one."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def versions() -> dict[str, str]:
    """What has to be known to repeat a reconstruction; goes into captures and into ``gadgetron::info``."""
    return {
        PRODUCT: __version__,
        "python": platform.python_version(),
        **{name: version_of(name) for name in ("torch", "numpy", "ismrmrd")},
    }


def answer(query: str, *, chains: Callable[[], Iterable[str]] = tuple) -> str:
    """The text that answers ``query``; ``"Unknown query"`` for a key that neither Gadgetron nor this server knows.

    ``chains`` names the installed chains for ``recon::chains``.
    """
    table: dict[str, Callable[[], str]] = {
        "ismrmrd::version": lambda: version_of("ismrmrd"),
        # the client prints these; the name says that this is not Gadgetron
        "gadgetron::version": lambda: f"{PRODUCT} {__version__}",
        "gadgetron::build": lambda: f"{PRODUCT} {__version__}",
        "gadgetron::info": info,
        "gadgetron::info::memory": lambda: str(memory_bytes()),
        "gadgetron::info::python": lambda: "1",
        "gadgetron::info::matlab": lambda: "0",
        "gadgetron::info::cuda": lambda: str(int(bool(gpus()))),
        "gadgetron::cuda::devices": lambda: str(len(gpus())),
        "gadgetron::cuda::driver": lambda: next((gpu["driver"] for gpu in gpus()), "N/A"),
        "gadgetron::cuda::runtime": cuda_runtime,
        "gadgetron::cuda::memory": lambda: ", ".join(gpu["memory"] for gpu in gpus()) or "N/A",
        "gadgetron::cuda::capabilities": lambda: ", ".join(gpu["capability"] for gpu in gpus()) or "N/A",
        "recon::info": info,
        "recon::chains": lambda: "\n".join(chains()),
        BEHIND: lambda: "scanners go first",
    }
    return table.get(query, lambda: UNKNOWN)()


def info() -> str:
    """Versions, memory and devices as lines of text."""
    lines = [f"{name} {value}" for name, value in versions().items()]
    lines.append(f"cores {cores()}, memory {memory_bytes() / 2**30:.1f} GiB")
    lines += [f"gpu {gpu['name']}, {gpu['memory']}, driver {gpu['driver']}" for gpu in gpus()] or ["no gpu"]
    return "\n".join(lines) + "\n"


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def gpus() -> tuple[dict[str, str], ...]:
    """NVIDIA devices as the driver's own tool lists them, at most a minute old: one may fall off, and come back.

    Asking torch would make a CUDA context in this process.
    """
    return _gpus(int(time.monotonic() / GPU_SECONDS))


@lru_cache(maxsize=1)
def _gpus(period: int) -> tuple[dict[str, str], ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    fields = ["name", "memory.total", "compute_cap", "driver_version"]
    try:
        out = subprocess.run(
            [tool, "--query-gpu=" + ",".join(fields), "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[part.strip() for part in line.split(",")] for line in out.splitlines()]
    keys = ("name", "memory", "capability", "driver")
    return tuple(dict(zip(keys, row, strict=True)) for row in rows if len(row) == len(keys))


def cuda_runtime() -> str:
    """The CUDA version that torch was built for; ``"N/A"`` without torch or without CUDA."""
    if importlib.util.find_spec("torch") is None:
        return "N/A"
    import torch.version  # torch takes seconds to import: only when asked

    return torch.version.cuda or "N/A"
