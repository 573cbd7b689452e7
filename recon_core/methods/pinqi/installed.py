"""PINQI's installed weights by name, loaded once per process."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from recon_core.installed_weights import FOLDERS, find_installed, weight_folders
from recon_core.methods.pinqi.weights import TrainedPinqi, load_weights

__all__ = ["FOLDERS", "find_weights", "installed_weights", "weight_folders"]

MOST_LOADED = 4  # networks kept: each is 12 MB


def find_weights(name: str) -> Path:
    """The JSON of the weights called ``name``; see `find_installed`.

    Raises
    ------
    WeightError
        Not a name, or none of that name is installed.
    """
    return find_installed(name, "pinqi")


def installed_weights(name: str, device: torch.device, precision: str, nonlinear_solver: str = "lm") -> TrainedPinqi:
    """The network called ``name`` on a device; read, and its sha256 checked, once and again when its JSON changes.

    Raises
    ------
    WeightError
        As `find_weights` and `load_weights`.
    """
    path = find_weights(name)
    return _load(path, path.stat().st_mtime_ns, str(device), precision, nonlinear_solver)


@lru_cache(maxsize=MOST_LOADED)
def _load(path: Path, changed: int, device: str, precision: str, nonlinear_solver: str) -> TrainedPinqi:
    return load_weights(path, device, precision, nonlinear_solver)
