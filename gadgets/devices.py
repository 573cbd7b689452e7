"""Which device computes."""

from __future__ import annotations

from recon_core.errors import SettingError


def choose_device(wanted: str) -> str:
    """``auto`` takes the first CUDA device when torch sees one, else the CPU.

    Raises
    ------
    SettingError
        CUDA was asked for by name and is not there.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise SettingError("no CUDA device", where="device", got=wanted, expected="auto or cpu on this machine")
    return wanted
