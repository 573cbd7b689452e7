"""Every method that the benchmark of dynamic series compares, behind one call: a cell in, images and seconds out.

Names: a method of ``recon_core`` (``llr``), one of its presets (``moe_dqinr:default``), a neural comparator (``fmlp``), or
``bart_llr``, Debian's BART with the weight that *the truth* chooses, on the same data, maps and threads.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import bart
from benchmarks.cell import Cell
from benchmarks.comparators import COMPARATORS
from benchmarks.series import centred_fft
from recon_core.errors import UnknownMethod
from recon_core.methods import Method, get_method
from recon_core.metrics import nrmse
from recon_core.types import Report

CLASSICAL = ("cg_sense", "llr", "grasp_pro", "bart_llr")
NEURAL = tuple(COMPARATORS)
PRESETS = ("moe_dqinr:paper", "moe_dqinr:default", "moe_dqinr:cpu")
BART_WEIGHTS = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
BART_FIRST = 3
"""Where the search among the weights begins; it walks downhill from there (measured: one minimum)."""
BART_ITERATIONS = 100
CONFIGURATION = {"cine": "dynamic", "molli": "quantitative"}


@dataclass(frozen=True)
class Answer:
    """``images`` complex64 ``(state, z, y, x)`` in the cell's unit; ``note``: weight or settings that differ from the default."""

    images: NDArray[np.complex64]
    seconds: float
    iterations: int
    note: str = ""
    quality: Mapping[str, float] | None = None


def missing(name: str, overrides: Mapping[str, Any]) -> str | None:
    """Why a method cannot run here, in words, or ``None``."""
    if name == "bart_llr":
        return None if bart.available() else "no bart on the path"
    base = name.partition(":")[0]
    try:
        method = COMPARATORS.get(base) or get_method(base)
    except UnknownMethod as error:
        return str(error)
    known = {field.name for field in fields(method.Settings)}
    unknown = sorted(set(_values(name, "cine", overrides, known)) - known)
    return f"{base} has no setting {', '.join(unknown)}" if unknown else None


def reconstruct(
    name: str, cell: Cell, overrides: Mapping[str, Any], *, device: str = "cpu", threads: int = 1, warm: bool = False
) -> Answer:
    """One method on one cell.

    Parameters
    ----------
    overrides
        Settings that replace the method's (or preset's) own.
    device
        Of ``recon_core``'s methods and the comparators; BART stays on the CPU.
    warm
        Run twice and time the second run: FFT plans, thread pools and CUDA graphs exist in a server.
    """
    if name == "bart_llr":
        return _bart_llr(cell, threads, tuple(overrides.get("weights", BART_WEIGHTS)))
    base = name.partition(":")[0]
    method: Method = COMPARATORS.get(base) or get_method(base)
    known = {field.name for field in fields(method.Settings)}
    settings = method.Settings(**_values(name, cell.kind, overrides, known))
    kspace, scan = cell.problem(device)
    for _ in range(1 + warm):
        _wait(device)
        began = time.perf_counter()
        result = method.reconstruct(kspace, scan, settings, Report())
        _wait(device)
        seconds = time.perf_counter() - began
    images = result.images[0].data.cpu().numpy()
    iterations = int(result.quality.get("iterations", result.quality.get("network_iterations", 0)))
    note = ", ".join(f"{key}={value}" for key, value in overrides.items())
    return Answer(images, seconds, iterations, note, result.quality)


def _values(name: str, kind: str, overrides: Mapping[str, Any], known: set[str]) -> dict[str, Any]:
    base, _, preset = name.partition(":")
    values: dict[str, Any] = {}
    if base == "moe_dqinr":
        values = {"configuration": CONFIGURATION[kind]}
        if "t1_map" in known:
            # T1 maps are fitted to every method's images by the same code, outside the time
            values["t1_map"] = False
        if preset:
            values["preset"] = preset
    return {**values, **overrides}


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _bart_llr(cell: Cell, threads: int, weights: tuple[float, ...]) -> Answer:
    full = bart.to_bart(centred_fft(cell.kspace, -1))
    maps = bart.maps_to_bart(cell.coil_maps)
    tried: dict[int, tuple[float, Answer]] = {}

    def error(index: int) -> float:
        if index not in tried:
            words = ["pics", "-S", "-R", f"L:3:3:{weights[index]}", "-b", "8", "-i", str(BART_ITERATIONS)]
            timed = bart.run(words, full, maps, threads=threads)
            images = bart.images_from_bart(timed.data)
            note = f"weight {weights[index]:g} by truth"
            tried[index] = nrmse(images, cell.images), Answer(images, timed.wall_s, BART_ITERATIONS, note)
        return tried[index][0]

    best = min(BART_FIRST, len(weights) - 1)
    for step in (1, -1):
        while 0 <= best + step < len(weights) and error(best + step) < error(best):
            best += step
    error(best)
    return tried[best][1]
