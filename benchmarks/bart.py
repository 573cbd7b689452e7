"""Run Debian's BART beside ours: a reader and writer of its array files and one timed call."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# BART's axes, fastest first (misc/mri.h): 0 readout, 1 and 2 phase encoding, 3 coil, 4 map set, 5 echo time
READ, PHASE1, PHASE2, COIL, MAPS, TE = range(6)


@dataclass(frozen=True)
class Timed:
    """An answer of BART and what it took: wall and CPU seconds of the child process, file reading included."""

    data: NDArray[np.complex64]
    wall_s: float
    cpu_s: float


def available() -> str | None:
    """The version of the ``bart`` on the path, or ``None``."""
    if shutil.which("bart") is None:
        return None
    return subprocess.run(["bart", "version"], capture_output=True, text=True, check=True).stdout.strip()


def write_cfl(stem: Path, array: NDArray[np.complexfloating]) -> None:
    """Write complex64 with BART's axis order (fastest first), that is Fortran order of ``array``'s axes."""
    stem.with_suffix(".hdr").write_text("# Dimensions\n" + " ".join(str(n) for n in array.shape) + "\n")
    np.asarray(array, dtype=np.complex64).ravel(order="F").tofile(stem.with_suffix(".cfl"))


def read_cfl(stem: Path) -> NDArray[np.complex64]:
    """Read one array; its axes are BART's, trailing singletons kept."""
    lines = stem.with_suffix(".hdr").read_text().splitlines()
    shape = tuple(int(word) for word in lines[lines.index("# Dimensions") + 1].split())
    return np.fromfile(stem.with_suffix(".cfl"), dtype=np.complex64).reshape(shape, order="F")


def run(words: list[str], *inputs: NDArray[np.complexfloating], threads: int = 1) -> Timed:
    """``bart <words> <inputs> out`` in a folder of its own.

    Raises
    ------
    RuntimeError
        BART failed; its own words are in the text.
    """
    # /dev/shm when there is one: the comparison is about computing, not about the disk
    fast = "/dev/shm" if os.path.isdir("/dev/shm") and os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=fast) as folder:
        stems = [Path(folder) / f"in{i}" for i in range(len(inputs))]
        for stem, array in zip(stems, inputs, strict=True):
            write_cfl(stem, array)
        out = Path(folder) / "out"
        command = ["bart", *words, *map(str, stems), str(out)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        cpu, wall = os.times(), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        wall_s, after = time.perf_counter() - wall, os.times()
        if done.returncode:
            raise RuntimeError(f"bart {' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
        cpu_s = after.children_user + after.children_system - cpu.children_user - cpu.children_system
        return Timed(read_cfl(out), wall_s, cpu_s)


def to_bart(kspace: NDArray[np.complexfloating]) -> NDArray[np.complexfloating]:
    """``(state, coil, k2, k1, k0)`` to BART's axes, states on the echo-time axis."""
    return kspace.transpose(4, 3, 2, 1, 0)[:, :, :, :, None, :]


def maps_to_bart(coil_maps: NDArray[np.complexfloating]) -> NDArray[np.complexfloating]:
    """``(coil, z, y, x)`` to BART's axes."""
    return coil_maps.transpose(3, 2, 1, 0)


def images_from_bart(images: NDArray[np.complexfloating]) -> NDArray[np.complexfloating]:
    """BART's axes to ``(state, z, y, x)``."""
    padded = images.reshape((*images.shape, *(1,) * 6)[:6])  # BART writes 16 axes, the later ones singletons
    return padded[:, :, :, 0, 0, :].transpose(3, 2, 1, 0)
