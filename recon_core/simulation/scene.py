"""The object in front of the scanner: tissue on the fine grid, its phase and field, and the signal of every state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from recon_core.simulation import brain, signal, torso, tubes
from recon_core.simulation.encoding import FINE, harmonic_field, polynomial_field
from recon_core.simulation.options import ScanSettings, times_of
from recon_core.simulation.phantoms import Grid, TissueMaps, centred_axis

ComplexArray = NDArray[np.complex64]
FloatArray = NDArray[np.float32]

RETRO_FRAMES = 48
"""Cardiac phases that are rendered for retro-gated scans; between them k-space is interpolated."""

BSSFP_GAIN = 5.0
"""Steady-state signals are small: with this receiver gain blood is near 1."""


@dataclass(frozen=True)
class Scene:
    """The fine object.

    Attributes
    ----------
    tissue
        One per state, or a single one when nothing moves.
    m0
        Complex weight of the proton density: phase at TE = 0, coil shading, and for mgre the steady state.
    field
        Off-resonance in Hz.
    states
        The value of each rendered state: cardiac phase, or s.
    """

    tissue: list[TissueMaps]
    m0: ComplexArray
    field: FloatArray
    label_names: Mapping[str, int]
    states: tuple[float, ...]

    def signals(self, kind: str, s: ScanSettings) -> Iterator[ComplexArray]:
        """Complex signal ``(z, y, x)`` of one state after the other."""
        for index, state in enumerate(self.states):
            tissue = self.tissue[min(index, len(self.tissue) - 1)]
            if kind == "cine":
                steady = signal.bssfp(
                    tissue.pd,
                    tissue.r1,
                    tissue.r2,
                    self.field,
                    flip_angle=np.deg2rad(s.flip_angle),
                    repetition_time=s.repetition_time,
                    echo_time=s.echo_time,
                )
                yield np.asarray(steady * self.m0 * BSSFP_GAIN, dtype=np.complex64)
            elif kind == "molli":
                yield signal.look_locker(tissue.pd * self.m0, tissue.t1, state, b_over_a=s.b_over_a)
            elif kind == "satrec":
                left = s.saturation_left + s.saturation_slope * _across(tissue.t1.shape[1])
                recovered = signal.saturation_recovery(tissue.pd * self.m0, tissue.t1, state, left=left)
                yield signal.after_pulses(
                    recovered,
                    tissue.pd * self.m0,
                    tissue.t1,
                    s.pulses_before_centre,
                    flip_angle=np.deg2rad(s.flip_angle),
                    repetition_time=s.repetition_time,
                )
            else:
                yield signal.multi_echo(tissue.pd * self.m0, tissue.r2star, self.field, state)


def fine_grid(s: ScanSettings, slice_positions: tuple[float, ...]) -> Grid:
    """The grid on which the object is rendered: ``FINE`` samples per encoded pixel."""
    z = centred_axis(FINE * s.partitions, s.slice_thickness * s.partitions) if s.is_3d else np.array(slice_positions)
    return Grid(z, centred_axis(FINE * s.matrix_y, s.fov_y), centred_axis(FINE * s.matrix_x, s.fov_x))


def make_scene(
    kind: str, s: ScanSettings, grid: Grid, shading: FloatArray, rng: np.random.Generator, b0: tuple[float, float, float]
) -> Scene:
    """Put the phantom of ``kind`` into the scanner.

    ``shading`` is the coil array's own brightness ``(z, y, x)``; ``b0`` the unit vector of B0 in the image frame
    ``(z, y, x)``.
    """
    phase = np.exp(1j * polynomial_field(grid, rng, 1.2))
    m0 = np.asarray(np.sqrt(shading) * phase, dtype=np.complex64)  # half the shading, as after a prescan normalisation
    off_resonance = harmonic_field(grid, rng, 40.0) if kind == "mgre" else polynomial_field(grid, rng, 25.0)
    if kind in ("cine", "molli"):
        chest = torso.TorsoPhantom(s.seed)
        if kind == "molli":
            frames, times = [chest.maps(grid, 0.75)], times_of(s, kind)  # diastole
        else:
            n = RETRO_FRAMES if s.retro_gated else s.states
            times = tuple(i / n for i in range(n))
            frames = chest.frames(grid, np.array(times))
        return Scene(frames, m0, off_resonance, torso.LABELS, times)
    if s.phantom == "tubes":
        return Scene([tubes.TubePhantom().maps(grid)], m0, off_resonance, tubes.LABELS, times_of(s, kind))
    tissue = brain.BrainPhantom(s.seed).maps(grid)
    if kind == "mgre":
        voxel = (_gap(grid.z, s.slice_thickness), _gap(grid.y, 1.0), _gap(grid.x, 1.0))
        off_resonance = off_resonance + signal.dipole_field(tissue.chi * (tissue.pd > 0), voxel, b0, s.field_strength)
        e1 = np.exp(-s.repetition_time * tissue.r1)
        flip = np.deg2rad(s.flip_angle)
        ernst = np.sin(np.arccos(np.exp(-s.repetition_time / 1.2)))  # scale only: white matter near its density
        m0 = np.asarray(m0 * np.sin(flip) * (1 - e1) / (1 - np.cos(flip) * e1) / ernst * 2.0, dtype=np.complex64)
    return Scene([tissue], m0, off_resonance, brain.LABELS, times_of(s, kind))


def _across(n: int) -> FloatArray:
    """``(y, x)``: 0 in the middle of the field of view along y, -1 and 1 at its edges."""
    return np.asarray((np.arange(n) - n // 2) / (n / 2), dtype=np.float32)[:, None]


def _gap(axis: NDArray[np.float64], otherwise: float) -> float:
    return float(axis[1] - axis[0]) if len(axis) > 1 else otherwise
