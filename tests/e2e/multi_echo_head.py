"""A small head of spheres whose fields are known in closed form, acquired as a 3D multi-echo scan: the whole path has a truth."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gadgets.simulate import simulate_kind, stream_of
from gadgets.simulate_header import Geometry
from recon_core.simulation.options import settings_for
from tests.e2e.scans import SimulatedScan
from tests.e2e.semi_measured import encode_oversampled
from tests.recon_core.maps.analytic_fields import positions, sphere_field

HERTZ_PER_PPM = 42.577478518 * 3.0

# centre (z, y, x) and radius in m, susceptibility in ppm against the brain around it, R2* in 1/s
INSERTS = (
    ((0.002, -0.020, 0.026), 0.010, 0.20, 45.0),
    ((0.002, -0.020, -0.026), 0.010, 0.12, 35.0),
    ((-0.002, 0.020, 0.026), 0.010, -0.10, 12.0),
    ((-0.002, 0.020, -0.026), 0.010, 0.08, 28.0),
)
BRAIN_R2STAR, SKULL_R2STAR = 18.0, 100.0
AIR = ((-0.060, -0.030, 0.0), 0.012, 9.0)  # centre, radius in m, ppm: a sinus below the brain
BRAIN, SKULL, SCALP = (0.041, 0.058, 0.070), 1.14, 1.30  # half axes in m; outer borders as multiples of them


@dataclass(frozen=True)
class HeadTruth:
    """``(z, y, x)``: susceptibility in ppm against the brain, R2* in 1/s, local field in Hz, brain, and the inside of each insert."""

    chi: NDArray[np.float64]
    r2star: NDArray[np.float64]
    local: NDArray[np.float64]
    brain: NDArray[np.bool_]
    inserts: tuple[NDArray[np.bool_], ...]


@lru_cache(maxsize=4)
def multi_echo_head(*, empty: bool = False, **settings: Any) -> tuple[SimulatedScan, HeadTruth]:
    """48 x 40 x 24 voxels of 4 mm, four echoes unless told otherwise; ``empty`` leaves only noise.

    Other settings are those of the simulation. The object is rendered on half the voxel: partial volume and dephasing are real.
    """
    values = {
        "matrix_x": 48, "matrix_y": 40, "partitions": 24, "fov_x": 0.192, "fov_y": 0.160, "slice_thickness": 0.004, "states": 4,
        "coils": 6, "snr": 80.0, "acs": 16, "acs_partitions": 12, "waveforms": False, "echo_time": 0.004, "echo_spacing": 0.005,
    }  # fmt: skip
    complete = settings_for("mgre", {**values, **settings})
    scan = simulate_kind("mgre", complete)
    g = Geometry.of(complete)
    b0 = (float(g.slice_dir[2]), float(g.phase_dir[2]), float(g.read_dir[2]))
    shape = (complete.partitions, complete.matrix_y, complete.matrix_x)
    voxel = (complete.slice_thickness, complete.fov_y / complete.matrix_y, complete.fov_x / complete.matrix_x)
    where = positions(shape, voxel, 2)
    level = np.sqrt(sum((w / a) ** 2 for w, a in zip(where, BRAIN, strict=True)))
    r2star = np.where(level < 1, BRAIN_R2STAR, SKULL_R2STAR)
    density = np.select([level < 1, level < SKULL, level < SCALP], [1.0, 0.03, 0.8], 0.0)
    chi, local = np.zeros(level.shape), np.zeros(level.shape)
    inside = []
    for centre, radius, ppm, rate in INSERTS:
        moved = tuple(w - c for w, c in zip(where, centre, strict=True))
        local += ppm * HERTZ_PER_PPM * sphere_field(moved, radius, b0)  # type: ignore[arg-type]
        sphere = np.asarray(sum(m**2 for m in moved) < radius**2)
        chi[sphere], r2star[sphere] = ppm, rate
        inside.append(_mean(sphere.astype(float)) > 0.999)
    moved = tuple(w - c for w, c in zip(where, AIR[0], strict=True))
    background = AIR[2] * HERTZ_PER_PPM * sphere_field(moved, AIR[1], b0)  # type: ignore[arg-type]
    field = local + background + 15.0 + 200.0 * where[2]
    offset = 0.8 + 6.0 * where[1] - 9.0 * where[2]
    echoes = [density * np.exp(-t * r2star + 1j * (offset + 2 * np.pi * field * t)) for t in scan.truth.states]
    images = np.stack([_mean(e) for e in echoes])
    scale = np.percentile(np.abs(scan.truth.images), 99) / np.percentile(np.abs(images[0]), 99)
    images = 0.0 * images[None] if empty else images[None] * scale
    clean = encode_oversampled(images[:, :, None] * scan.truth.coil_maps[:, None], (-3, -2, -1))
    scan = replace(scan, clean=clean, truth=replace(scan.truth, images=images.astype(np.complex64)))
    truth = HeadTruth(_mean(chi), _mean(r2star), _mean(local), _mean((level < 1).astype(float)) > 0.5, tuple(inside))
    return SimulatedScan(Path("(in memory)"), stream_of(scan)), truth


def _mean(fine: NDArray[Any]) -> NDArray[Any]:
    z, y, x = (n // 2 for n in fine.shape)
    return np.asarray(fine.reshape(z, 2, y, 2, x, 2).mean((1, 3, 5)))
