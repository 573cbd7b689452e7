"""Trained weights of LARO and MoDL with what they were trained for: written by training, read by the method."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from recon_core.installed_weights import find_installed
from recon_core.methods.laro.model import STARTS, Laro, LaroSettings
from recon_core.training.checkpoint import WeightError, load_into, read_weights, write_pair

METHOD, FORMAT = "laro", 1
MOST_LOADED = 4


@dataclass(frozen=True)
class TrainedLaro:
    """A network and what it is good for.

    Attributes
    ----------
    network
        In evaluation mode, on the device asked for.
    start
        First images that it was trained with, one of `STARTS`.
    amplitude
        What `recon_core.problem.signal_scale` gives for a typical training scan: a scan must be brought to it.
    facts
        Everything else that the JSON says: recipe, seed, commit, metrics, sha256.
    noise
        Typical standard deviation of a complex sample in training, at that amplitude; 0: not stated.
    """

    network: Laro
    start: str
    amplitude: float
    facts: Mapping[str, Any]
    noise: float = 0.0


def save_weights(directory: str | Path, name: str, network: Laro, start: str, facts: Mapping[str, Any]) -> Path:
    """Write ``<name>.safetensors`` and ``<name>.json``.

    Parameters
    ----------
    facts
        Recipe, seed, commit, metrics, ``amplitude``, ``noise``.
    """
    settings = {k: v for k, v in asdict(network.settings).items() if k not in ("recompute", "precision")}
    stated = {"method": METHOD, "format": FORMAT, "start": start, "network": settings, **facts}
    return write_pair(directory, name, network.state_dict(), stated)


def load_weights(path: str | Path, device: torch.device | str = "cpu", precision: str = "float32") -> TrainedLaro:
    """The network whose JSON is ``path``.

    Raises
    ------
    WeightError
        Missing, damaged (sha256), of another method or another network.
    """
    tensors, facts = read_weights(path, device, METHOD, FORMAT)
    where = Path(path).name
    try:
        given = dict(facts["network"])
        settings = LaroSettings(**{**given, "features": tuple(given["features"]), "precision": precision})
        start, amplitude, noise = str(facts["start"]), float(facts["amplitude"]), float(facts.get("noise", 0.0))
        if start not in STARTS or not (0 < amplitude < math.inf and 0 <= noise < math.inf):
            raise ValueError(f"start {start}, amplitude {amplitude}, noise {noise}")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightError("incomplete description of weights", where=where, got=str(error)) from None
    network = Laro(settings).to(device).eval()
    load_into(network, tensors, where)
    return TrainedLaro(network.requires_grad_(False), start, amplitude, facts, noise)


def installed_weights(name: str, device: torch.device, precision: str) -> TrainedLaro:
    """The network called ``name`` on a device; read, and its sha256 checked, once and again when its JSON changes.

    Raises
    ------
    WeightError
        As `find_installed` and `load_weights`.
    """
    path = find_installed(name, METHOD)
    return _load(path, path.stat().st_mtime_ns, str(device), precision)


@lru_cache(maxsize=MOST_LOADED)
def _load(path: Path, changed: int, device: str, precision: str) -> TrainedLaro:
    return load_weights(path, device, precision)
