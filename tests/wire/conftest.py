"""Captures of the real programs and the HDF5 files that they carry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.wire.dtypes import ACQUISITION_HEADER

CAPTURES = Path(__file__).parent.parent / "data" / "wire-captures"


@dataclass(frozen=True)
class Stored:
    """An MRD file as h5py sees it: header text, acquisition headers, samples ``(coil, sample)``, waveforms."""

    text: str
    headers: NDArray[np.void]
    samples: list[NDArray[np.complex64]]
    waveforms: list[tuple[np.void, NDArray[np.uint32]]]


def load(name: str) -> Stored:
    with h5py.File(CAPTURES / name) as file:
        data = file["dataset/data"][:]
        text = file["dataset/xml"][0].decode()
        waves = file["dataset/waveforms"][:] if "waveforms" in file["dataset"] else []
    samples = [
        row["data"].view(np.complex64).reshape(row["head"]["active_channels"], row["head"]["number_of_samples"])
        for row in data
    ]
    waveforms = [
        (w["head"], w["data"].astype(np.uint32).reshape(w["head"]["channels"], w["head"]["number_of_samples"]))
        for w in waves
    ]
    return Stored(text, data["head"].astype(ACQUISITION_HEADER), samples, waveforms)


@pytest.fixture(scope="session")
def stored() -> Callable[[str], Stored]:
    cache: dict[str, Stored] = {}

    def get(name: str) -> Stored:
        if name not in cache:
            cache[name] = load(name)
        return cache[name]

    return get


@pytest.fixture(scope="session")
def capture() -> Callable[[str], bytes]:
    return lambda name: (CAPTURES / name).read_bytes()
