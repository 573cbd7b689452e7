"""One slice or slab from sorted k-space to final images: compression, coil maps, the method, partial Fourier, console matrix, maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from recon_core.coils.estimate import CoilSettings, estimate_coil_maps
from recon_core.errors import CalibrationError, DataError, ReconError
from recon_core.fourier import fft_centred, ifft_centred
from recon_core.maps.regrid import map_on_recon_matrix
from recon_core.maps.sampled_centre import doubtful_centre, missing_centre
from recon_core.maps.series import ImageNoise, image_noise
from recon_core.maps.series_qsm import multi_echo_maps, multi_echo_times
from recon_core.maps.series_t1 import recovery_times, t1_maps
from recon_core.maps.settings import MapSettings
from recon_core.methods import Method, get_method, is_separable, llr, needs_coil_maps
from recon_core.preprocess.coil_compression import compress, compress_geometric, compression_matrix, geometric_compression
from recon_core.preprocess.measured_part import completed_band, extents_of, in_band, notes_of_short_sides
from recon_core.preprocess.oversampling import to_recon_matrix
from recon_core.preprocess.partial_fourier import (
    Extents,
    complete,
    partial_axes,
)
from recon_core.preprocess.settings import PreprocessSettings
from recon_core.problem import FAR_TOO_LOUD, LOUDEST, QUIETEST, noise_of, noise_scan_excess, noise_scan_lack, pose
from recon_core.state_images import StateImages
from recon_core.types import COIL, K1, K2, ImageSeries, KSpace, Report, Result, ScanInfo, Tensor

COIL_IMAGE_AXES = (K2, K1)
"""Phase-encoding axes of hybrid k-space, which become z and y."""

RESTORED_FROM = 0.015
"""Noise, relative to the peak, from which on `_restored` is worth while: at 0.011 a region gains 2 % of its contrast at most,
at 0.022 four, at 0.045 ten (docs/qsm.md). With less noise the shrinkage keeps strong components whole."""

FAINT = (
    "much noise: the field comes from less smoothed images (map_restore); susceptibilities may still be 10 to 20 % too low, veins and "
    "small nuclei by more (docs/qsm.md)"
)

SLOW_WITH_GAPS, ENOUGH_ITERATIONS = ("llr", "laro"), 150
"""Methods whose default iterations end before a regular pattern without a complete centre is unfolded, and from how many of `llr` on
little is gained."""

GAPS = "every echo samples the same positions, with gaps at the centre of k-space: R2* may "

TOO_FEW = (
    f"come out 10 to 40 % too low in places; llr_qsm with iterations = {ENOUGH_ITERATIONS} is slower and nearer, a complete centre in "
    "every echo is safe (docs/qsm.md)"
)

NOT_SAFE = "still come out up to a quarter too low in places; a complete centre in every echo is safe (docs/qsm.md)"

MOST_MIXED = 0.085
"""Most that `calibration_contrast` may be for T1 to be right. Without calibration (2 to 4x, random and interleaved lines) nine tubes by
saturation are at most 4 % wrong up to 0.08, 7 to 10 % at 0.09, up to 40 % above; MOLLI is right at 0.02, 8 % wrong at 0.4
(`benchmarks.t1_checks`)."""

UNLIKE_GAPS = (
    "echoes lack different positions at the centre of k-space, which are unfolded: R2* and susceptibility may be far off where the coils "
    "cannot; a complete centre in every echo prevents it (docs/qsm.md)"
)

SMOOTH_PHASE = "homodyne keeps the smooth part of the phase alone, and susceptibilities would be a quarter too low: pocs is used instead"

MAP_NAMES = {"t1": "T1", "r2star": "R2*", "qsm": "susceptibility"}
MAP_OF = {"t1": "T1", "r2star": "R2star", "qsm": "QSM"}
"""The map by which a method's own ones are known for those that are asked for."""


@dataclass(frozen=True)
class Recipe:
    """A method with every setting that decides its images."""

    method: str
    settings: Any
    preprocess: PreprocessSettings = PreprocessSettings()
    coils: CoilSettings = CoilSettings()
    maps: MapSettings = MapSettings()


def reconstruct(
    kspace: KSpace, scan: ScanInfo, recipe: Recipe, report: Report | None = None, mask: Tensor | None = None
) -> Result:
    """Images and maps of one slice or slab on the console's matrix.

    Maps of the recipe are fitted last, to the final images: a map is no linear function of the signal, so neither partial Fourier
    nor interpolation may come after it. A method's own maps (of a learned or joint method) stand in for the same maps of the recipe; where
    that asks for none, or for others, they are left out.

    Parameters
    ----------
    kspace
        Hybrid k-space, see ``KSpace``; whitened if a noise measurement exists.
    scan
        Geometry and times of this slice.
    recipe
        The method and all settings.
    report
        Receives progress and warnings.
    mask
        bool ``(z, y, x)`` on ``scan.recon_matrix``, for a susceptibility; ``None``: found in the images.

    Returns
    -------
    Result
        Image series ``(state, z, y, x)`` and maps ``(z, y, x)`` on ``scan.recon_matrix``, on the CPU.

    Raises
    ------
    ReconError
        From the stage that failed; nothing is substituted here.
    """
    return finish(reconstruct_images(kspace, scan, recipe, report), scan, recipe.maps, report, mask)


def reconstruct_images(
    kspace: KSpace,
    scan: ScanInfo,
    recipe: Recipe,
    report: Report | None = None,
    states: tuple[int, int] | None = None,
) -> StateImages:
    """Images of one slice or slab on the console's matrix, without the recipe's maps.

    Parameters
    ----------
    kspace, scan, recipe, report
        As in `reconstruct`: all states.
    states
        First and one past the last of the states that are wanted, of a separable method; ``None`` for all. What the states have in
        common (virtual coils, coil maps, scale, noise, measured extent) is that of the whole slice, so the images are the same bits.

    Raises
    ------
    ReconError
        From the stage that failed; ``CalibrationError`` where coil maps would make T1 wrong; ``DataError`` where some of the
        states are wanted of a method that reconstructs them together.
    """
    report = report or Report()
    method = get_method(recipe.method)
    if states is not None and not is_separable(recipe.method):
        raise DataError(
            "reconstructs the states of a slice together", where=recipe.method, got=f"states {states}", expected="all"
        )
    wrong = _known_beforehand(kspace, scan, method, recipe)
    loudest = FAR_TOO_LOUD if recipe.maps.maps == "none" else LOUDEST
    kspace, loud = with_believable_noise(kspace, report, loudest)
    empty = not bool((kspace.data != 0).any())
    if empty:
        report.warn(f"slice {scan.slice_index}: all samples are zero")
    else:
        kspace = compress_coils(kspace, recipe.preprocess)
    extents = extents_of(kspace)
    recipe, told = _with_whole_phase(recipe, extents, scan, report)
    short = notes_of_short_sides(extents, extents_of(kspace, completable=False), scan, recipe.maps.maps)
    for note in short:
        report.warn(note)
    completed = recipe.maps.maps == "qsm" and recipe.preprocess.partial_fourier != "zero_fill"
    band = completed_band(extents, scan) if completed and not empty else None
    by_coil_maps = needs_coil_maps(method, recipe.settings)
    if by_coil_maps and kspace.coil_maps is None:
        kspace = replace(
            kspace, coil_maps=_equal_coils(kspace) if empty else _coil_maps(kspace, scan, method, recipe, report)
        )
    wanted = kspace
    if states is not None:
        wanted, extents = kspace.part(*states), extents[slice(*states)]
    if by_coil_maps:
        result, phase = _with_coil_maps(wanted, extents, scan, method, recipe, report, empty=empty)
    else:
        result, phase = _without_coil_maps(wanted, extents, scan, method, recipe, report), None
    gaps = doubtful_centre(kspace.mask) if recipe.maps.maps == "t1" and wrong is None else _of_gaps(kspace, recipe)
    if gaps:
        report.warn(gaps)
        result = replace(result, notes=(*result.notes, gaps))
    noise = None if recipe.maps.maps == "none" or _has_its_own(result, recipe.maps) else _noise_of(kspace, scan)
    result = replace(result, notes=(*loud, *told, *short, *result.notes))
    return StateImages(result, noise, "" if wrong is None else str(wrong), phase, band)


def _known_beforehand(kspace: KSpace, scan: ScanInfo, method: Method, recipe: Recipe) -> ReconError | None:
    """What will make maps wrong, before anything is computed; raised where the recipe wants no images without maps."""
    if not bool((kspace.counts > 0).any()):
        raise DataError("nothing was sampled", where=f"slice {scan.slice_index}")
    refuses = recipe.maps.map_failure == "error"
    if recipe.maps.maps != "none" and refuses:
        _require_times(scan, kspace.n_states, recipe.maps)
    wrong: ReconError | None = _empty_states(kspace, scan, recipe)
    wrong = wrong or _mixed_calibration(kspace, scan, method, recipe) or _missing_centre(kspace, scan, method, recipe)
    if wrong is not None and refuses:
        raise wrong
    return wrong


def finish(
    images: StateImages, scan: ScanInfo, settings: MapSettings, report: Report | None = None, mask: Tensor | None = None
) -> Result:
    """The images of all states with the maps that the recipe asks for, on the CPU; ``mask`` as in `reconstruct`.

    Raises
    ------
    ReconError
        No map can be made, and ``map_failure`` is ``error``.
    """
    return _with_parameter_maps(images, scan, settings, report or Report(), mask).to("cpu")


def compress_coils(kspace: KSpace, settings: PreprocessSettings) -> KSpace:
    """Fewer, virtual coils, chosen from the calibration lines (or all lines when there are none)."""
    if settings.coil_compression == "none" or kspace.n_coils <= settings.virtual_coils:
        return kspace
    source = kspace.acs if kspace.acs is not None else kspace.data.sum(dim=0)

    def apply(data: torch.Tensor) -> torch.Tensor:
        return compress_geometric(data, matrix) if geometric else compress(data, matrix, COIL + data.ndim)

    geometric = settings.coil_compression == "geometric"
    find = geometric_compression if geometric else compression_matrix
    matrix = find(source, settings.virtual_coils)
    return replace(kspace, data=apply(kspace.data), acs=None if kspace.acs is None else apply(kspace.acs), coil_maps=None)


def _of_gaps(kspace: KSpace, recipe: Recipe) -> str:
    """A word where positions next to the centre were not measured, as with regular patterns whose calibration lines are separate: such
    aliases vanish last of all, and slowest in the dim late echoes; where every echo has its own, its brightness is its own, too.

    Gaps along k1 alone that differ unfold well (R = 2: R2* within 1 %).
    """
    if recipe.maps.maps not in ("r2star", "qsm") or kspace.n_states < 2:
        return ""
    mask = kspace.mask
    z, y = (n // 2 for n in mask.shape[1:])
    centre = mask[:, max(0, z - 1) : z + 2, max(0, y - 1) : y + 2]
    if bool(centre.all()):
        return ""
    if bool((mask == mask[:1]).all()):
        if recipe.method not in SLOW_WITH_GAPS:
            return ""
        return GAPS + (TOO_FEW if getattr(recipe.settings, "iterations", 0) < ENOUGH_ITERATIONS else NOT_SAFE)
    return "" if bool((centre == centre[:, :1]).all()) else UNLIKE_GAPS


def _mixed_calibration(kspace: KSpace, scan: ScanInfo, method: Method, recipe: Recipe) -> CalibrationError | None:
    """Why T1 would be wrong by the coil maps: calibration lines that lie side by side and come from states of unlike contrast."""
    estimated = needs_coil_maps(method, recipe.settings) and kspace.coil_maps is None and kspace.n_coils > 1
    if recipe.maps.maps != "t1" or not estimated or kspace.acs_states is None:
        return None
    saturated = recipe.maps.map_model == "saturation_recovery"
    times = scan.saturation_times if saturated else scan.inversion_times
    if len(times) != len(kspace.acs_states) or not bool(kspace.acs_states.any()):
        return None  # no T1 without times, and whoever asks for it says so; no line of these states mixes nothing
    spread = calibration_contrast(kspace.acs_states, times, inverted=not saturated)
    if spread <= MOST_MIXED:
        return None
    return CalibrationError(
        "calibration lines of states that differ in contrast: coil maps of them make T1 wrong",
        where=f"slice {scan.slice_index}",
        got=f"lines of which the signal differs by {100 * spread:.0f} % at a T1 of 1 s",
        expected=f"one state, or a scan of its own, with all of them, or at most {100 * MOST_MIXED:g} %",
        remedy="Acquire calibration lines; maps = none sends the images alone",
    )


def _empty_states(kspace: KSpace, scan: ScanInfo, recipe: Recipe) -> DataError | None:
    """Why a map would be wrong: it would take an image that was lost for one without signal."""
    if recipe.maps.maps == "none":
        return None
    empty = [number for number, state in enumerate(kspace.data) if not bool((state != 0).any())]
    if len(empty) in (0, kspace.n_states):
        return None
    return DataError(
        "images without any signal",
        where=f"slice {scan.slice_index}",
        got=f"nothing but zeros in {len(empty)} of {kspace.n_states} images, the first: {empty[0]}",
        remedy="Repeat the scan; maps = none sends the images alone",
    )


def _missing_centre(kspace: KSpace, scan: ScanInfo, method: Method, recipe: Recipe) -> CalibrationError | None:
    """Why T1 would be wrong by a centre of k-space that some states lack, and that the coils cannot tell."""
    if recipe.maps.maps != "t1" or not bool((kspace.data != 0).any()):
        return None
    preparation = "saturation" if recipe.maps.map_model == "saturation_recovery" else "inversion"
    unfolding = kspace.n_coils if needs_coil_maps(method, recipe.settings) else 1
    return missing_centre(kspace.mask, unfolding, preparation, f"slice {scan.slice_index}")


def calibration_contrast(states: Tensor, times: Sequence[float], *, inverted: bool) -> float:
    """By how much the signal differs between calibration lines, standard deviation over mean, where T1 is 1 s.

    Parameters
    ----------
    states
        bool ``(state, k2, k1)``: in which states each line was measured, which are averaged.
    times
        s after saturation, or inversion if ``inverted``.
    """
    signal = 1 - (2 if inverted else 1) * torch.exp(-torch.tensor(times, dtype=torch.float64))
    measured = states.flatten(1).double().cpu()
    measured = measured[:, measured.any(0)]
    lines = signal @ measured / measured.sum(0)
    return float(lines.std(correction=0) / lines.mean().abs().clamp_min(1e-3))


def with_believable_noise(kspace: KSpace, report: Report, loudest: float = LOUDEST) -> tuple[KSpace, tuple[str, ...]]:
    """The k-space without its noise measurement where that contradicts the samples, and what to tell of it.

    A noise level too high would blind T1's checks, which ask whether the misfit is more than noise, bend R2* (noise lifts late echoes),
    and regularise images away. One too low would make standard deviations too small, and regularisation that follows the noise next to
    none.

    Parameters
    ----------
    loudest
        How many times louder than outer k-space it may be.
    """
    if (excess := noise_scan_excess(kspace)) > loudest:
        note = f"{excess:.1f} times louder than the outer k-space of the images, which cannot be"
    elif (lack := noise_scan_lack(kspace)) > QUIETEST:
        note = f"{lack:.{1 if lack < 10 else 0}f} times quieter than the noise in the outer k-space of the images"
    else:
        return kspace, ()
    note = (
        f"the noise measurement is {note} (its scaling, or another bandwidth): noise is estimated from outer k-space instead"
    )
    report.warn(note)
    return replace(kspace, noise_std=None), (note,)


def _with_whole_phase(
    recipe: Recipe, extents: Sequence[Extents], scan: ScanInfo, report: Report
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that completes k-space by another method where homodyne would take the field's details, and what to tell of it."""
    chosen = recipe.preprocess
    if recipe.maps.maps != "qsm" or chosen.partial_fourier != "homodyne" or not _is_partial(extents, scan):
        return recipe, ()
    report.warn(SMOOTH_PHASE)
    return replace(recipe, preprocess=replace(chosen, partial_fourier="pocs")), (SMOOTH_PHASE,)


def _equal_coils(kspace: KSpace) -> torch.Tensor:
    """For data that are all zero: they show no coils, and one such slice must not cost the scan its other slices."""
    return torch.full_like(kspace.data[0], kspace.n_coils**-0.5)


def _calibration(method: Method, kspace: KSpace, scan: ScanInfo, settings: Any) -> KSpace:
    """What coil maps are estimated from: the method may know better which state's lines are good for it."""
    choose = getattr(method, "calibration", None)
    return kspace if choose is None else cast(KSpace, choose(kspace, scan, settings))


def _is_partial(extents: Sequence[Extents], scan: ScanInfo) -> bool:
    return any(partial_axes(of_state, scan.matrix) for of_state in extents)


def _by_state(change: Callable[..., torch.Tensor], data: torch.Tensor, *of_states: Sequence[Any]) -> torch.Tensor:
    """One state at a time: the rounding of a state does not depend on its neighbours, and less memory is needed."""
    return torch.stack([change(*state) for state in zip(data, *of_states, strict=True)])


def _coil_maps(kspace: KSpace, scan: ScanInfo, method: Method, recipe: Recipe, report: Report) -> Tensor:
    return estimate_coil_maps(_calibration(method, kspace, scan, recipe.settings), recipe.coils, report)


def _with_coil_maps(
    kspace: KSpace,
    extents: Sequence[Extents],
    scan: ScanInfo,
    method: Method,
    recipe: Recipe,
    report: Report,
    *,
    empty: bool,
) -> tuple[Result, Tensor | None]:
    """Combined images, and those that maps should take the phase from where they are others (see `_restored`)."""
    result = method.reconstruct(kspace, scan, recipe.settings, report)
    phase: Tensor | None = None
    restored = None if empty else _restored(result, kspace, recipe)
    if restored is not None:
        phase = _to_console(restored, extents, scan, recipe).images[0].data
        report.warn(FAINT)
        result = replace(result, notes=(*result.notes, FAINT))
    return _to_console(result, extents, scan, recipe), phase


def _without_coil_maps(
    kspace: KSpace, extents: Sequence[Extents], scan: ScanInfo, method: Method, recipe: Recipe, report: Report
) -> Result:
    """Methods that combine coils by magnitude: phase-sensitive steps have to come first, coil by coil."""
    how = recipe.preprocess.partial_fourier
    completes = how != "zero_fill" and _is_partial(extents, scan)
    moves_grid = scan.matrix != scan.recon_matrix or scan.fov[1:] != scan.recon_fov[1:]
    if completes or moves_grid:

        def moved(state: torch.Tensor, measured: Extents) -> torch.Tensor:
            images = complete(ifft_centred(state, COIL_IMAGE_AXES), measured, how)
            images = to_recon_matrix(images, scan.matrix, scan.fov, scan.recon_matrix, scan.recon_fov)
            return fft_centred(images, COIL_IMAGE_AXES)

        data = _by_state(moved, kspace.data, extents)
        counts = torch.ones((data.shape[0], *data.shape[-3:-1]), dtype=torch.float32, device=data.device)
        kspace = KSpace(data, counts, noise_std=kspace.noise_std)
        there = replace(scan, matrix=scan.recon_matrix, fov=scan.recon_fov)
        return method.reconstruct(kspace, there, recipe.settings, report)
    return method.reconstruct(kspace, scan, recipe.settings, report)


def _restored(result: Result, kspace: KSpace, recipe: Recipe) -> Result | None:
    """The images with what the method held back of the data given back, for their phase; ``None`` where that is of no use."""
    steps = recipe.maps.map_restore if recipe.maps.maps == "qsm" and not result.maps else 0
    series = result.images[0]
    if not steps or recipe.method != llr.NAME or kspace.n_states < 2 or not series.data.is_complex():
        return None
    problem = pose(kspace, series.name, Report())
    if problem.noise < RESTORED_FROM:
        return None
    images = problem.operator.enter_image(series.data).div_(problem.scale)
    found = llr.restore(problem, images, steps, Report()).solution
    return Result((replace(series, data=problem.leave(found)),))


def _to_console(result: Result, extents: Sequence[Extents], scan: ScanInfo, recipe: Recipe) -> Result:
    completed = _complete(result, extents, recipe.preprocess)
    images = tuple(series_on_recon_matrix(series, scan) for series in completed.images)
    return replace(completed, images=images, maps=tuple(map_on_recon_matrix(m, scan) for m in completed.maps))


def _complete(result: Result, extents: Sequence[Extents], settings: PreprocessSettings) -> Result:
    """Partial Fourier on the combined images of methods that keep the phase."""

    def completed(state: torch.Tensor, measured: Extents) -> torch.Tensor:
        return complete(state, measured, settings.partial_fourier)

    images = tuple(
        replace(series, data=_by_state(completed, series.data, extents)) if series.data.is_complex() else series
        for series in result.images
    )
    return replace(result, images=images)


def series_on_recon_matrix(series: ImageSeries, scan: ScanInfo) -> ImageSeries:
    """A series ``(state, z, y, x)`` of ``scan.matrix`` on ``scan.recon_matrix``."""

    def move(state: torch.Tensor) -> torch.Tensor:
        return to_recon_matrix(state, scan.matrix, scan.fov, scan.recon_matrix, scan.recon_fov)

    moved = _by_state(move, series.data)
    # interpolating a magnitude rings below zero; a magnitude cannot be negative
    return replace(series, data=moved if moved.is_complex() else moved.clamp_min(0.0))


def _has_its_own(result: Result, settings: MapSettings) -> bool:
    """Whether the method has made the maps that are asked for."""
    return any(one.name == MAP_OF.get(settings.maps) for one in result.maps)


def _with_parameter_maps(
    final: StateImages, scan: ScanInfo, settings: MapSettings, report: Report, mask: Tensor | None
) -> Result:
    """The maps that the recipe asks for, fitted to the final images of the method's first series."""
    result = final.result
    if final.no_maps:
        text = f"no {MAP_NAMES[settings.maps]} map: {final.no_maps}"
        report.warn(text)
        return replace(result, maps=(), notes=(*result.notes, text))
    if _has_its_own(result, settings):
        return result
    # what was not asked for was not checked beforehand either (`_known_beforehand`)
    result = replace(result, maps=())
    if settings.maps == "none":
        return result
    series, phase = result.images[0], final.phase
    if final.band is not None and series.data.is_complex():
        phase = in_band(series.data if phase is None else phase, final.band, scan)
    try:
        if settings.maps == "t1":
            found = t1_maps(series, scan, final.noise, settings)
        else:
            found = multi_echo_maps(series, scan, final.noise, settings, mask, phase)
    except ReconError as error:
        if settings.map_failure == "error":
            raise
        text = f"no {MAP_NAMES[settings.maps]} map: {error}"
        report.warn(text)
        return replace(result, notes=(*result.notes, text))
    for note in found.notes:
        report.warn(note)
    images = result.images if found.images is None else (*found.images, *result.images[1:])
    notes, quality = (*result.notes, *found.notes), {**result.quality, **found.quality}
    return replace(result, images=images, maps=found.maps, notes=notes, quality=quality)


def _require_times(scan: ScanInfo, n_states: int, settings: MapSettings) -> None:
    """Refuse a scan whose times cannot make the maps that are asked for."""
    if settings.maps == "t1":
        recovery_times(scan, n_states, settings)
    else:
        multi_echo_times(scan, n_states, settings)


def _noise_of(kspace: KSpace, scan: ScanInfo) -> ImageNoise | None:
    """Measured, or estimated from outer k-space; ``None`` for data without any noise."""
    noise, measured = noise_of(kspace)
    if not noise > 0:
        return None
    return image_noise(noise, kspace.counts, scan, measured=measured, readout_shares=kspace.readout_shares)
