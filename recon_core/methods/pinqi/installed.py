"""Where trained weights lie, found by name: the wire picks names, never paths. Loaded once per process."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from pathlib import Path

import torch

import recon_core
from recon_core.methods.pinqi.weights import TrainedPinqi, load_weights
from recon_core.training.checkpoint import WeightError

FOLDERS = "RECON_WEIGHTS"
"""Environment variable: folders of further weights, searched before the package's own."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
MOST_LOADED = 4  # networks kept: each is 12 MB


def weight_folders() -> tuple[Path, ...]:
    """Folders that are searched: those of the administrator, then the shipped one."""
    named = [Path(part) for part in os.environ.get(FOLDERS, "").split(os.pathsep) if part]
    return (*named, Path(recon_core.__file__).parent / "weights")


def find_weights(name: str) -> Path:
    """The JSON of the weights called ``name``.

    Raises
    ------
    WeightError
        Not a name, or none of that name is installed.
    """
    if not NAME.fullmatch(name):
        raise WeightError(
            "not a name of weights", where="pinqi.weights", got=repr(name[:64]), expected="letters, digits, . _ -"
        )
    for folder in weight_folders():
        # compared with what is there: whatever the name holds, it cannot lead out of the folder
        for path in sorted(folder.glob("*.json")):
            if path.stem == name:
                return path
    known = sorted({path.stem for folder in weight_folders() for path in folder.glob("*.json")})
    raise WeightError(
        "no such weights are installed",
        where="pinqi.weights",
        got=name,
        expected=", ".join(known) or "(none is installed)",
        remedy=f"Train them (recon train pinqi), or name their folder in the environment variable {FOLDERS}",
    )


def installed_weights(name: str, device: torch.device, precision: str) -> TrainedPinqi:
    """The network called ``name`` on a device; read, and its sha256 checked, once and again when its JSON changes.

    Raises
    ------
    WeightError
        As `find_weights` and `load_weights`.
    """
    path = find_weights(name)
    return _load(path, path.stat().st_mtime_ns, str(device), precision)


@lru_cache(maxsize=MOST_LOADED)
def _load(path: Path, changed: int, device: str, precision: str) -> TrainedPinqi:
    return load_weights(path, device, precision)
