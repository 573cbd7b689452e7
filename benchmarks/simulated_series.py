"""Simulated cine and MOLLI cells before they are undersampled: the torso phantom, still or breathing."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

from benchmarks.cell import Array, Cell, box, centred_ifft
from recon_core.simulation.coils import biot_savart_maps, donor_maps
from recon_core.simulation.encoding import FINE, encode, to_image
from recon_core.simulation.options import ScanSettings, settings_for
from recon_core.simulation.scan import Scan, simulate_scan
from recon_core.simulation.scene import fine_grid, make_scene

FOV = 0.34
MOLLI_SCHEME = "4,3,2"
"""4-(1)-3-(1)-2, nine images (the paper's section 4.1)."""
HEART = ("rv_blood", "rv_wall", "myocardium", "lv_blood", "papillary", "pericardium")
PHASE_DRIFT = 0.1
"""Of the whole image between states when breathing, rad (root mean square)."""


def scan_settings(kind: str, seed: int, matrix: tuple[int, int], donor: str, n_coils: int, frames: int) -> ScanSettings:
    values = {
        "seed": seed,
        "matrix_y": matrix[0],
        "matrix_x": matrix[1],
        "fov_x": FOV,
        "fov_y": FOV * matrix[0] / matrix[1],
        "coils": n_coils,
        "donor": donor,
        "oversampling": 1,
        **({"scheme": MOLLI_SCHEME, "pause_beats": 1} if kind == "molli" else {"states": frames}),
    }
    return settings_for(kind, values)


@lru_cache(maxsize=6)
def _scan(kind: str, settings: ScanSettings) -> Scan:
    return simulate_scan(kind, settings)


def _hybrid(kspace: Array) -> NDArray[np.complex64]:
    """k0 to image space."""
    return centred_ifft(kspace, -1).astype(np.complex64)


def simulated(kind: str, settings: ScanSettings) -> tuple[Cell, Array]:
    """Truth and complete hybrid k-space without noise."""
    scan = _scan(kind, settings)
    truth = scan.truth
    full = _hybrid(scan.clean[0])
    heart = np.isin(truth.labels[0], [truth.label_names[name] for name in HEART])
    t1 = truth.maps["t1"][0].astype(np.float32) if kind == "molli" else None
    cell = Cell(
        name=kind,
        images=truth.images[0],
        coil_maps=truth.coil_maps[0].astype(np.complex64),
        kspace=full[:0],
        mask=np.ones((0, 1, settings.matrix_y), bool),
        acs_mask=truth.acs_mask,
        noise_std=0.0,
        support=truth.tissue[0],
        kind=kind,
        origin="simulated",
        roi=box(np.any(heart, axis=0), 4),
        times=truth.states if kind == "molli" else (),
        t1=t1,
        look_locker=True,
        acceleration=1.0,
        fov=(settings.slice_thickness, settings.fov_y, settings.fov_x),
    )
    return cell, full


def breathing_series(
    kind: str, settings: ScanSettings, displacement: float, rng: np.random.Generator
) -> tuple[NDArray[np.complex64], NDArray[np.complex64], NDArray[np.complex64]]:
    """Images ``(state, z, y, x)``, coil maps on their matrix and hybrid k-space of the same kind of object, moved before it is encoded.

    The front of the chest moves most along y, the back not at all; a smaller part goes along x. The anatomy is that of the seed,
    its phase and the coils are drawn anew.
    """
    grid = fine_grid(settings, (0.0,))
    if settings.donor:
        maps, shading = donor_maps(settings.donor, grid, settings.coils)
    else:
        maps, shading = biot_savart_maps(grid, settings.coils, rng)
    scene = make_scene(kind, settings, grid, shading, rng, (1.0, 0.0, 0.0))
    y, x = np.meshgrid(np.arange(len(grid.y)), np.arange(len(grid.x)), indexing="ij")
    front = 1 / (1 + np.exp(8 * grid.y[:, None] / np.ptp(grid.y)))
    pixel = grid.pixel
    matrix = (1, settings.matrix_y, settings.matrix_x)
    images, data = [], []
    for one in scene.signals(kind, settings):
        shift_y, shift_x = rng.normal(0, displacement / pixel, 2) * (1.0, 0.5)
        where = np.stack([y + shift_y * front, x + shift_x * front])
        moved = np.stack([map_coordinates(part, where, order=3, mode="nearest") for part in (one[0].real, one[0].imag)])
        image = ((moved[0] + 1j * moved[1]) * np.exp(1j * rng.normal(0, PHASE_DRIFT))).astype(np.complex64)[None]
        images.append(to_image(encode(image, matrix, 1, three_d=False), (-2, -1)))
        data.append(encode(image * maps, matrix, 1, three_d=False))
    return np.stack(images), np.ascontiguousarray(maps[..., ::FINE, ::FINE]), _hybrid(np.stack(data))
