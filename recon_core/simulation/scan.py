"""A simulated scan: continuous object, coils, truncated k-space, receiver noise and the truth, in arrays.

The object is rendered on a grid finer than the encoded one, multiplied by the coil maps there, transformed and *truncated*:
Gibbs ringing and partial volume come out as in a measurement. Scaling: the centred orthonormal inverse FFT of the full
encoded k-space gives the object's values.

``recon_core.simulation.schedule`` says when each line is read; ``gadgets.simulate`` writes it down as MRD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from recon_core.errors import SettingError
from recon_core.sampling import masks as sampling
from recon_core.simulation import coils, schedule
from recon_core.simulation.encoding import FINE, correlated_noise, encode, pixel_mean, to_image
from recon_core.simulation.options import ScanSettings, check
from recon_core.simulation.phantoms import FloatArray, Grid
from recon_core.simulation.scene import RETRO_FRAMES, Scene, fine_grid, make_scene

ComplexArray = NDArray[np.complex64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Truth:
    """What the scan should give back. Image space ``(slice, state, z, y, x)``, SI units.

    Attributes
    ----------
    images
        complex64, the coil-free object with the resolution of the full encoded k-space: no noise, no undersampling.
    coil_maps
        complex64 ``(slice, coil, z, y, x)``, unit root-sum-of-squares.
    maps
        Name to float32 ``(slice, z, y, x)`` or, where it changes, ``(slice, state, z, y, x)``: ``t1``, ``t2`` (s),
        ``r2star`` (1/s), ``pd``,
        ``field`` (Hz), ``chi`` (ppm), and complex64 ``m0``. Averages over the pixel, relaxation *rates* weighted by density.
    tissue, interior
        bool ``(slice, z, y, x)``: where there is signal; and where a pixel and its neighbours are one tissue in all states.
    labels
        uint8 ``(slice, state or 1, z, y, x)`` and what they mean.
    mask
        bool ``(state, k2, k1)``, sampled for the image.
    noise_covariance
        complex128 ``(coil, coil)`` of one complex imaging sample.
    states
        The value of each state: cardiac phase (0 to 1), or s.
    """

    images: ComplexArray
    coil_maps: ComplexArray
    maps: Mapping[str, NDArray[Any]]
    tissue: BoolArray
    interior: BoolArray
    labels: NDArray[np.uint8]
    label_names: Mapping[str, int]
    mask: BoolArray
    acs_mask: BoolArray
    noise_covariance: NDArray[np.complex128]
    states: tuple[float, ...]


@dataclass(frozen=True)
class Scan:
    """``clean`` is noise-free k-space ``(slice, state, coil, k2, k1, k0)``, complex64, complete; ``plan`` what is
    read of it.

    For retro-gated scans ``clean`` holds ``RETRO_FRAMES`` finely spaced cardiac phases instead of the output states.
    """

    kind: str
    settings: ScanSettings
    clean: ComplexArray
    plan: schedule.Schedule
    truth: Truth
    slice_positions: tuple[float, ...]  # m, along the slice direction
    first_line: int  # first k1 that the sequence reaches (partial Fourier)
    first_sample: int  # first readout sample that is acquired (asymmetric echo)

    def samples(self, start: int, stop: int, rng: np.random.Generator) -> ComplexArray:
        """Readouts ``start`` to ``stop`` of the plan, ``(readout, coil, k0)``, with fresh receiver noise."""
        rows = slice(start, stop)
        p = self.plan
        if self.settings.retro_gated:
            position = p.cardiac_phase[rows] * RETRO_FRAMES
            low = np.floor(position).astype(int)
            share = (position - low).astype(np.float32)[:, None, None]
            clean = (1 - share) * self._lines(rows, low % RETRO_FRAMES) + share * self._lines(rows, (low + 1) % RETRO_FRAMES)
        else:
            clean = self._lines(rows, p.state[rows])
        clean = clean[..., self.first_sample :]
        if self.settings.snr > 0:
            clean = clean + correlated_noise(self.truth.noise_covariance, (len(clean), clean.shape[-1]), rng)
        return np.ascontiguousarray(clean, dtype=np.complex64)

    def _lines(self, rows: slice, frame: NDArray[np.int64]) -> ComplexArray:
        p = self.plan
        return self.clean[p.slice[rows], frame, :, p.k2[rows], p.k1[rows]]


def make_mask(s: ScanSettings, rng: np.random.Generator, n_states: int) -> tuple[BoolArray, BoolArray]:
    """Sampling mask ``(state, k2, k1)`` and calibration block ``(k2, k1)`` for the settings.

    Raises
    ------
    SettingError
        A mask that does not exist for this scan, or an impossible count.
    """
    lines = sampling.partial_fourier_lines(s.matrix_y, s.partial_fourier)
    if s.is_3d:
        return _plane_mask(s, rng, n_states, lines)
    mask, acs = _line_mask(s, rng, n_states, lines)
    return mask[:, None], acs[None]


def _line_mask(s: ScanSettings, rng: np.random.Generator, n_states: int, lines: BoolArray) -> tuple[BoolArray, BoolArray]:
    """Of a slice: ``(state, k1)`` and ``(k1,)``."""
    acs_lines = 0 if s.calibration == "none" else s.acs
    acs = sampling.centre_block((s.matrix_y,), (acs_lines,))
    inside = acs_lines if s.calibration == "embedded" else 0
    if s.mask == "full":
        return sampling.full((s.matrix_y,), n_states, lines), acs
    if s.mask == "uniform":
        rate = s.integer_acceleration()
        return sampling.uniform(s.matrix_y, n_states, rate, inside, available=lines, interleaved=s.interleaved), acs
    draw: dict[str, Callable[..., BoolArray]] = {
        "random": sampling.random_variable_density,
        "golden": sampling.golden_angle,
        "vista": sampling.vista,
    }
    if s.mask not in draw:
        raise SettingError(
            "3D mask for a 2D scan", where="simulate.mask", got=s.mask, expected=f"full, uniform, {', '.join(draw)}"
        )
    return draw[s.mask](s.matrix_y, n_states, s.acceleration, inside, rng, available=lines), acs


def _plane_mask(s: ScanSettings, rng: np.random.Generator, n_states: int, lines: BoolArray) -> tuple[BoolArray, BoolArray]:
    """Of a slab: ``(state, k2, k1)`` and ``(k2, k1)``."""
    shape = (s.partitions, s.matrix_y)
    block = (min(s.acs_partitions, s.partitions), s.acs) if s.calibration != "none" else (0, 0)
    acs = sampling.centre_block(shape, block)
    embedded = s.calibration == "embedded"
    inside = block if embedded else (0, 0)
    available = np.broadcast_to(lines, shape)
    if s.elliptical:
        available = available & (sampling.elliptical(shape) | (acs if embedded else False))
    if s.mask == "full":
        return sampling.full(shape, n_states, available), acs
    if s.mask == "uniform":
        return sampling.uniform_2d(shape, n_states, (1, s.integer_acceleration()), inside) & available, acs
    draw: dict[str, Callable[..., BoolArray]] = {
        "random": sampling.random_variable_density,
        "poisson": sampling.poisson_disc,
    }
    if s.mask not in draw:
        raise SettingError(
            "2D mask for a 3D scan", where="simulate.mask", got=s.mask, expected=f"full, uniform, {', '.join(draw)}"
        )
    return draw[s.mask](shape, n_states, s.acceleration, inside, rng, available=available), acs


def make_plan(
    kind: str, s: ScanSettings, mask: BoolArray, acs: BoolArray, states: tuple[float, ...], rng: np.random.Generator
) -> schedule.Schedule:
    """The order of acquisition that belongs to this kind of scan."""
    order = schedule.Order(
        mask=mask,
        acs_mask=acs,
        separate=s.calibration == "separate",
        calibration_state=0 if kind in ("cine", "mgre") else int(np.argmax(states)),  # where the signal is strongest
        n_slices=1 if s.is_3d else s.slices,
        n_averages=s.averages,
        n_repetitions=s.repetitions,
        n_segments=s.segments,
        repetition_time=s.repetition_time,
        rr=s.rr,
    )
    if kind == "cine" and s.retro_gated:
        return schedule.retro_gated_cine(order, s.lines_per_segment, rng, arrhythmia=s.arrhythmia)
    if kind == "cine":
        return schedule.gated_cine(order)
    if kind == "molli":
        return schedule.single_shots(order, tuple(int(v) for v in s.scheme.split(",")), s.pause_beats, 0.35 * s.rr)
    if kind == "satrec":
        return schedule.prepared_shots(order, states)
    return schedule.echo_trains(order, states)


def simulate_scan(kind: str, settings: ScanSettings, b0_direction: tuple[float, float, float] = (1.0, 0.0, 0.0)) -> Scan:
    """Everything about a scan except its file format.

    Parameters
    ----------
    kind
        ``cine``, ``molli``, ``satrec`` or ``mgre``.
    b0_direction
        Unit vector of B0 in the image frame ``(z, y, x)``; matters for the field of susceptibility sources.

    Raises
    ------
    SettingError
        Settings that contradict each other.
    """
    s = settings
    check(kind, s)
    seeds = np.random.SeedSequence(s.seed).spawn(5)
    object_rng, coil_rng, mask_rng, plan_rng, covariance_rng = (np.random.default_rng(seed) for seed in seeds)
    matrix = (s.partitions, s.matrix_y, s.matrix_x)
    distance = s.slice_thickness + s.slice_gap
    positions = (0.0,) if s.is_3d else tuple((i - (s.slices - 1) / 2) * distance for i in range(s.slices))
    grid = fine_grid(s, positions)
    coil_maps, shading = _coil_maps(s, grid, coil_rng)
    scene = make_scene(kind, s, grid, shading, object_rng, b0_direction)

    def by_slice(a: NDArray[Any]) -> NDArray[Any]:
        """(..., z, y, x) to (slice, ..., z, y, x): slices of a 2D scan lie along z."""
        return a[None] if s.is_3d else np.moveaxis(a[..., None, :, :], -4, 0)

    fine_maps = by_slice(coil_maps)
    images, clean = _acquired(scene, kind, s, fine_maps, by_slice)
    n_states = s.states if s.retro_gated else len(scene.states)
    mask, acs = make_mask(s, mask_rng, n_states)
    states = tuple(i / n_states for i in range(n_states)) if s.retro_gated else scene.states
    shown = np.round(np.array(states) * RETRO_FRAMES).astype(int) if s.retro_gated else np.arange(n_states)
    tissue, interior, labels = _regions(scene, by_slice, s.is_3d)
    peak = float(np.abs(images)[np.broadcast_to(tissue[:, None], images.shape)].mean())
    sigma = peak / s.snr if s.snr > 0 else 1e-6 * peak
    truth = Truth(
        images=_at_phases(images, states) if s.retro_gated else images,
        coil_maps=np.ascontiguousarray(_on_matrix(fine_maps, s.is_3d)),
        maps=_parameter_maps(scene, by_slice, matrix, s.is_3d, shown),
        tissue=tissue,
        interior=interior,
        labels=labels[:, shown % labels.shape[1]] if labels.shape[1] > 1 else labels,
        label_names=scene.label_names,
        mask=mask,
        acs_mask=acs,
        noise_covariance=coils.random_noise_covariance(s.coils, covariance_rng) * sigma**2,
        states=states,
    )
    dropped = round(matrix[2] * s.oversampling * (1.0 - s.asymmetric_echo))
    return Scan(
        kind=kind,
        settings=s,
        clean=clean,
        plan=make_plan(kind, s, mask, acs, states, plan_rng),
        truth=truth,
        slice_positions=positions,
        first_line=int(np.flatnonzero(sampling.partial_fourier_lines(s.matrix_y, s.partial_fourier))[0]),
        first_sample=dropped,
    )


def _coil_maps(s: ScanSettings, grid: Grid, rng: np.random.Generator) -> tuple[ComplexArray, FloatArray]:
    """Coil maps ``(coil, z, y, x)`` of the fine grid and the shading that they leave in images."""
    if s.donor:
        return coils.donor_maps(s.donor, grid, s.coils)
    scale = max(s.fov_x, s.fov_y) / 0.34
    n_rows = 2 if s.is_3d and s.coils >= 8 else 1
    return coils.biot_savart_maps(grid, s.coils, rng, radii=(0.20 * scale, 0.165 * scale), n_rows=n_rows)


def _acquired(
    scene: Scene, kind: str, s: ScanSettings, fine_maps: ComplexArray, by_slice: Callable[..., NDArray[Any]]
) -> tuple[ComplexArray, ComplexArray]:
    """Images ``(slice, frame, z, y, x)`` and k-space ``(slice, frame, coil, k2, k1, k0)`` of the whole grid, without noise."""
    matrix, n_frames = (s.partitions, s.matrix_y, s.matrix_x), len(scene.states)
    images = np.empty((len(fine_maps), n_frames, *matrix), dtype=np.complex64)
    kspace = np.empty((len(fine_maps), n_frames, s.coils, *matrix[:2], matrix[2] * s.oversampling), dtype=np.complex64)
    axes = (-3, -2, -1) if s.is_3d else (-2, -1)
    for frame, whole in enumerate(scene.signals(kind, s)):
        for i, one in enumerate(by_slice(whole)):
            images[i, frame] = to_image(encode(one, matrix, 1, three_d=s.is_3d), axes)
            for coil in range(s.coils):
                kspace[i, frame, coil] = encode(one * fine_maps[i, coil], matrix, s.oversampling, three_d=s.is_3d)
    return images, kspace


def _at_phases(images: ComplexArray, phases: tuple[float, ...]) -> ComplexArray:
    """Images at the given cardiac phases, interpolated between rendered frames as the scan itself interpolates."""
    position = np.array(phases) * RETRO_FRAMES
    low = np.floor(position).astype(int)
    share = (position - low).astype(np.float32)[:, None, None, None]
    return np.asarray((1 - share) * images[:, low] + share * images[:, (low + 1) % RETRO_FRAMES], dtype=np.complex64)


def _on_matrix(fine: NDArray[Any], three_d: bool) -> NDArray[Any]:
    """Every ``FINE``-th sample: the same positions as the encoded pixels (coordinate 0 at ``n // 2`` on both grids)."""
    return fine[..., :: FINE if three_d else 1, ::FINE, ::FINE]


def _regions(
    scene: Scene, by_slice: Callable[..., NDArray[Any]], three_d: bool
) -> tuple[BoolArray, BoolArray, NDArray[np.uint8]]:
    """Tissue, interior ``(slice, z, y, x)`` and labels ``(slice, frame, z, y, x)`` on the encoded matrix."""
    labels = np.stack([by_slice(t.labels) for t in scene.tissue], axis=1)
    density = np.mean([by_slice(t.pd) for t in scene.tissue], axis=0)
    size = (1, 1, 2 * FINE + 1 if three_d else 1, 2 * FINE + 1, 2 * FINE + 1)
    low = ndimage.minimum_filter(labels, size).min(axis=1)
    high = ndimage.maximum_filter(labels, size).max(axis=1)
    tissue = pixel_mean(density, three_d) > 0.3
    interior = _on_matrix(low == high, three_d) & tissue
    return tissue, np.asarray(interior), np.ascontiguousarray(_on_matrix(labels, three_d))


def _parameter_maps(
    scene: Scene,
    by_slice: Callable[..., NDArray[Any]],
    matrix: tuple[int, int, int],
    three_d: bool,
    shown: NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    """Truth maps on the encoded matrix; with several frames a state axis is inserted behind the slice axis."""
    tissue = [scene.tissue[i] for i in shown] if len(scene.tissue) > 1 else scene.tissue
    result: dict[str, list[NDArray[Any]]] = {name: [] for name in ("pd", "t1", "t2", "r2star", "chi", "field", "m0")}
    axes = (-3, -2, -1) if three_d else (-2, -1)
    field = by_slice(scene.field)
    for frame in tissue:
        density = by_slice(frame.pd)
        weight = density + 1e-4  # in air every tissue counts alike, very little

        def mean(fine: NDArray[Any], weight: NDArray[np.floating] = weight) -> NDArray[np.float32]:
            return pixel_mean(np.asarray(fine * weight), three_d) / pixel_mean(weight, three_d)

        result["pd"].append(pixel_mean(density, three_d))
        result["t1"].append(1.0 / mean(by_slice(frame.r1)))
        result["t2"].append(1.0 / mean(by_slice(frame.r2)))
        result["r2star"].append(mean(by_slice(frame.r2star)))
        result["chi"].append(mean(by_slice(frame.chi)))
        result["field"].append(mean(field))
        m0 = encode(np.asarray(density * by_slice(scene.m0), dtype=np.complex64), matrix, 1, three_d=three_d)
        result["m0"].append(to_image(m0, axes))
    if len(tissue) == 1:
        return {name: arrays[0] for name, arrays in result.items()}
    return {name: np.stack(arrays, axis=1) for name, arrays in result.items()}
