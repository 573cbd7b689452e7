"""The cells of the benchmark of dynamic and quantitative methods: one series, one mask, one noise level each, with known truth.

``simulated``       the torso phantom of ``recon_core.simulation``: rendered twice as finely as the encoded matrix, multiplied by the
                    coil maps *there*, transformed and truncated. Truth is the coil-free object at the resolution of the matrix.
                    With ``breathing`` the chest is displaced a little in every state and its phase drifts, as in a real breath-hold:
                    then nothing outside the heart is exactly still or of rank one.
``semi-measured``   measured magnitude series (``benchmarks/measured_series.py``), polarity restored, times a smooth phase and coil
                    maps, simulated or from a measured array, transformed on their own matrix. Say so where a figure is quoted.
``measured``        fully sampled scans of CMRxRecon or OCMR (``benchmarks/datasets.py``), undersampled afterwards.

No measured cine is in the repository; the measured ones need a dataset's folder.

Sampling as in the paper's section 4.1: VISTA-like lines for cine, golden-angle lines for mapping, nominal acceleration of the lines
*outside* 16 calibration lines. Noise is white (prewhitened coils), relative to the 99.9th percentile of the truth's magnitude.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.cell import Cell, fit_t1, undersample
from benchmarks.measured_series import DATA
from benchmarks.semi_measured import semi_measured
from benchmarks.simulated_series import breathing_series, scan_settings, simulated

__all__ = ["Cell", "cells", "fit_t1", "make_cell", "undersample"]

ACS, COILS, FRAMES = 16, 10, 12
ACCELERATIONS = (4, 6, 8)
ANATOMIES = 3
NOISES = (0.005, 0.02)
MATRIX = {"cine": (160, 160), "molli": (144, 144)}
"""k1 and readout; the paper's are 204 x 204 and 144 x 144."""
DONORS = {
    "simulated": None,
    "heart": DATA / "coil-donors" / "heart_12coil_radial_centre.npz",
    "brain": DATA / "coil-donors" / "brain_4coil_images_64.npz",
}
BREATHING = 0.0015
"""Displacement of the chest wall between states, root mean square, m, in the cells that breathe."""


def make_cell(
    kind: str,
    anatomy: int | str = 0,
    acceleration: float = 4,
    noise: float = 0.005,
    *,
    matrix: tuple[int, int] | None = None,
    donor: str = "simulated",
    n_coils: int = COILS,
    frames: int = FRAMES,
    acs: int = ACS,
    breathing: float = 0.0,
    estimated_maps: bool = False,
) -> Cell:
    """One simulated or semi-measured cell; the same arguments give the same cell.

    Parameters
    ----------
    kind
        ``cine`` or ``molli``.
    anatomy
        Seed of the torso phantom, or the name of a measured series (``kidney 0``, ``kidney 1``, ``phantom``, ``brain``).
    acceleration
        Nominal, calibration lines not counted.
    noise
        Standard deviation of a complex sample, relative to the peak.
    matrix
        ``(y, x)`` with y along k1; rectangular ones keep the pixel of the readout (the field of view along k1 shrinks). Measured
        series are resampled to it, by default only the kidneys.
    donor
        ``simulated`` loops, or the measured arrays ``heart`` (12 coils) and ``brain`` (4).
    n_coils
        Of simulated loops; a donor gives the smaller of this and what it has.
    frames
        Cardiac phases of a cine.
    breathing
        Displacement of the chest wall in m, root mean square over states (simulated cells).
    estimated_maps
        Give the methods ESPIRiT maps of the calibration lines instead of the true ones.
    """
    rng = np.random.default_rng([int(1000 * noise), int(10 * acceleration), sum(map(ord, f"{kind} {anatomy} {donor}"))])
    coils = min(n_coils, {"heart": 12, "brain": 4}.get(donor, n_coils))
    if isinstance(anatomy, int):
        settings = scan_settings(kind, anatomy, matrix or MATRIX[kind], str(DONORS[donor] or ""), coils, frames)
        cell, full = simulated(kind, settings)
        if breathing:
            images, maps, full = breathing_series(kind, settings, breathing, np.random.default_rng([anatomy, 11]))
            cell = replace(cell, images=images, coil_maps=maps)
    else:
        cell, full = semi_measured(anatomy, matrix, DONORS[donor], coils)
    peak = float(np.percentile(np.abs(cell.images), 99.9))
    full = full / peak
    full = full + noise * (rng.standard_normal(full.shape) + 1j * rng.standard_normal(full.shape)) / np.sqrt(2)
    size = "" if matrix is None else f", {matrix[0]}x{matrix[1]}"
    array = ("" if donor == "simulated" else f", {donor} coils") + (", breathing" if breathing else "")
    cell = replace(
        cell,
        name=f"{kind} {anatomy}{array}{size}, {acceleration:g}x, noise {100 * noise:g} %",
        images=(cell.images / peak).astype(np.complex64),
        noise_std=noise,
    )
    return undersample(cell, full, acceleration, acs, rng, estimated_maps=estimated_maps)


SEMI_MEASURED = (
    ("kidney 0", "simulated"),
    ("kidney 1", "heart"),
    ("brain", "brain"),
    ("phantom", "simulated"),
)


def cells(
    kind: str = "all",
    *,
    full: bool = False,
    first_anatomy: int = 0,
    accelerations: tuple[float, ...] = ACCELERATIONS,
    estimated_maps: bool = False,
) -> Iterator[Cell]:
    """The grid of the benchmark, one cell at a time.

    Parameters
    ----------
    kind
        ``cine``, ``molli`` (simulated), ``semi-measured`` or ``all``.
    full
        All accelerations, anatomies and noise levels (and rectangular matrices); otherwise a few that vary together: every
        acceleration is seen, every anatomy and both noise levels.
    first_anatomy
        Seed of the first of four torsos. Defaults are tuned on 0 to 3; reports use others.
    accelerations
        Nominal ones.
    estimated_maps
        ESPIRiT maps of the calibration lines instead of the true ones.
    """
    give = partial(make_cell, estimated_maps=estimated_maps)
    anatomies, other = tuple(first_anatomy + i for i in range(ANATOMIES)), first_anatomy + ANATOMIES
    for series in ("cine", "molli"):
        if kind not in (series, "all"):
            continue
        if not full:
            for number, acceleration in enumerate(accelerations):
                yield give(series, anatomies[number % ANATOMIES], acceleration, NOISES[number % 2])
            middle = accelerations[len(accelerations) // 2]
            yield give(series, other, middle, NOISES[0], breathing=BREATHING)
            continue
        y, x = MATRIX[series]
        for acceleration in accelerations:
            for anatomy in anatomies:
                for noise in NOISES:
                    yield give(series, anatomy, acceleration, noise)
            for noise in NOISES:
                yield give(series, other, acceleration, noise, breathing=BREATHING)
            yield give(series, other, acceleration, NOISES[0], matrix=(y * 2 // 5 * 2, x))
    if kind in ("semi-measured", "all"):
        for number, (name, donor) in enumerate(SEMI_MEASURED):
            arrays = tuple(dict.fromkeys((donor, "simulated", "heart"))) if full else (donor,)
            for acceleration in accelerations if full else (accelerations[number % len(accelerations[:2])],):
                for array in arrays:
                    yield give("molli", name, acceleration, NOISES[0], donor=array)


def main() -> int:
    """Print the grid: what there is, before anything is reconstructed."""
    import argparse

    from benchmarks.common import print_table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=("cine", "molli", "semi-measured", "all"), default="all")
    parser.add_argument("--full", action="store_true")
    options = parser.parse_args()
    rows = []
    for cell in cells(options.kind, full=options.full):
        shape = "x".join(str(n) for n in cell.images.shape[2:])
        row = [cell.name, cell.origin, len(cell.images), len(cell.coil_maps), shape]
        rows.append([*row, round(cell.effective_acceleration, 2), int(cell.roi.sum())])
    print_table("Cells", ["cell", "origin", "states", "coils", "matrix", "effective R", "roi pixels"], rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
