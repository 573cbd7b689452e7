"""Which device computes, the CPU or a GPU, when a server starts and when a task begins."""

from __future__ import annotations

import re

from gadgets.errors import DeviceFailed
from recon_core.errors import SettingError


def choose_device(wanted: str) -> str:
    """``auto`` takes the first CUDA device when torch sees one, else the CPU.

    Raises
    ------
    SettingError
        CUDA was asked for by name and is not there, or the name is that of no device.
    """
    import torch

    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", wanted):
        raise SettingError("no such device", where="device", got=repr(wanted[:40]), expected="auto, cpu, cuda or cuda:N")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise SettingError("no CUDA device", where="device", got=wanted, expected="auto or cpu on this machine")
    return wanted


def device_of_task(wanted: str) -> str:
    """As ``choose_device``, long after the server (or the cluster) was found to have a GPU.

    Raises
    ------
    DeviceFailed
        It has none now: it fell off, or the driver gives it to nobody.
    """
    try:
        return choose_device(wanted)
    except SettingError as error:
        raise DeviceFailed("there is no GPU any more", got=wanted, remedy="See nvidia-smi") from error
