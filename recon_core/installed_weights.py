"""Where trained weights lie, found by name: the wire picks names, never paths."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import recon_core
from recon_core.training.checkpoint import WeightError

FOLDERS = "RECON_WEIGHTS"
"""Environment variable: folders of further weights, searched before the package's own."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def weight_folders() -> tuple[Path, ...]:
    """Folders that are searched: those of the administrator, then the shipped one."""
    named = [Path(part) for part in os.environ.get(FOLDERS, "").split(os.pathsep) if part]
    return (*named, Path(recon_core.__file__).parent / "weights")


def find_installed(name: str, method: str) -> Path:
    """The JSON of the installed weights called ``name``.

    Parameters
    ----------
    method
        For messages, which name the weights that are of this method.

    Raises
    ------
    WeightError
        Not a name, or none of that name is installed.
    """
    where = f"{method}.weights"
    if not NAME.fullmatch(name):
        raise WeightError("not a name of weights", where=where, got=repr(name[:64]), expected="letters, digits, . _ -")
    for folder in weight_folders():
        # compared with what is there: whatever the name holds, it cannot lead out of the folder
        for path in sorted(folder.glob("*.json")):
            if path.stem == name:
                return path
    known = sorted({path.stem for folder in weight_folders() for path in folder.glob("*.json") if _is_of(path, method)})
    raise WeightError(
        "no such weights are installed",
        where=where,
        got=name,
        expected=", ".join(known) or "(none is installed)",
        remedy=f"Train them (recon train {method}), or name their folder in the environment variable {FOLDERS}",
    )


def _is_of(path: Path, method: str) -> bool:
    try:
        stated = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(stated, dict) and stated.get("method") == method
