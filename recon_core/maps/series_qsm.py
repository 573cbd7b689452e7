"""R2*, local field and susceptibility of a reconstructed multi-echo series, whichever method made it.

Order, by the ISMRM consensus (arXiv 2307.02306): R2* from the magnitudes; brain mask; field across all echoes with exact
unwrapping; background removal; sparsity-regularised dipole inversion; the reference region is reported. R2* needs neither mask nor
volume nor field strength, so it still goes out when there is no susceptibility and ``map_failure`` is ``warn``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from recon_core.errors import DataError, ReconError
from recon_core.maps.background import BackgroundSettings, LocalField, outliers, pdf, resharp, v_sharp, without_outliers
from recon_core.maps.brain_mask import brain_mask, given_mask, object_mask, with_later_echoes
from recon_core.maps.dipole import Susceptibility, tkd, tv_admm
from recon_core.maps.dipole_kernel import unit_vector
from recon_core.maps.echo_agreement import agreed_field, check_decay, check_direction
from recon_core.maps.echo_gain import echo_gain
from recon_core.maps.field import FieldMaps
from recon_core.maps.field_noise import field_noise
from recon_core.maps.measured_grid import decay_between, images_between, map_between, mask_between, measured_grid
from recon_core.maps.medi import csf_region, medi
from recon_core.maps.phase_sign import iron_contrast, note_of_sign
from recon_core.maps.r2star import R2StarMaps, arlo, nonlinear_r2star
from recon_core.maps.series import ImageNoise, SeriesMaps
from recon_core.maps.settings import MapSettings
from recon_core.simulation.signal import GYROMAGNETIC_RATIO
from recon_core.types import ImageSeries, ParameterMap, ScanInfo, Tensor

LONGEST = 0.5
"""s; a longer echo time is one that was given in another unit."""

SHORTEST = 5e-4
"""s; a series whose last echo is earlier had its times given in s."""

TESLA = (0.01, 25.0)
"""Field strengths of magnets that image."""

CONTRADICTION = 0.05
"""By how much frequency and field strength may differ: 3 T of a header may be 2.89 T."""

LEAST_PLANES = 8
"""A susceptibility map needs the field's third dimension: fewer planes are a slice, not a volume."""

THIN_SLAB = 0.050
"""m; below, what the rest of the head does to a slab's field cannot be told from the slab's own sources. Of what simulated heads
(planes of 2.5 mm) show as a whole, 16 to 23 % of the contrast is lost at 40 mm (three heads), 11 and 15 at 45 mm, 8 and 12 at 50 mm, 5
and 8 at 60 mm (two)."""

PLACES = ("slab of {:.0f} mm", "{:.0f} mm along y", "{:.0f} mm along x")
"""How long a side is, in words, for z, y and x."""

LEAST_STRENGTH = 3.0
"""RMS of the echoes over that of their noise below which what is bright is no tissue."""

WORTH_A_WORD = 2e-6
"""m^3 of the mask without a field: heads without anything odd have up to 0.5 ml at the surface, at R = 8 1.1 ml."""

HOLES = (
    "{:.1f} ml inside the mask have no signal, or phases on no straight line (metal, air, blood): they have neither local field nor "
    "susceptibility, and next to them R2* is too high"
)

MOST_STRAY = 0.005
"""Part of a given mask's voxels at its surface with a field unlike the inside: 0.02 % in a simulated head's own, 0.3 % in one 3 mm larger,
1.7 % in one 7 mm larger, 2.4 % in one shifted by 12 mm (correlation with the true map 0.82, 0.72, 0.43, 0.44)."""

STRAY = (
    "the given mask seems to reach beyond the brain, or to be shifted: {:.1f} % of its voxels, at its surface, have local fields far above "
    "those inside. Susceptibilities may be wrong deep inside as well: compare the mask with the images"
)

BACKGROUNDS = {"v_sharp": v_sharp, "resharp": resharp}


@dataclass(frozen=True)
class FieldFrame:
    """What a susceptibility needs to know of the scanner: voxel sides in m and B0's direction ``(z, y, x)``, Larmor frequency in Hz."""

    voxel: tuple[float, float, float]
    b0: tuple[float, float, float]
    larmor: float


def multi_echo_times(scan: ScanInfo, n_states: int, settings: MapSettings) -> tuple[float, ...]:
    """The echo times of the states in s; cheap, so that it can be asked before anything is reconstructed.

    Raises
    ------
    DataError
        No echo times, another number of them than of states, equal ones, too few; for ``qsm`` also whatever `field_frame` lacks,
        where ``map_failure`` is ``error`` (otherwise R2* goes out without a susceptibility).
    """
    where = "R2* map" if settings.maps == "r2star" else "susceptibility map"
    least = 3 if settings.map_r2star_fit == "arlo" else 2
    if n_states < least:
        raise DataError("too few echoes", where=where, got=n_states, expected=f"at least {least}")
    times = scan.echo_times
    if not times:
        raise DataError(
            "no echo times that fit the images",
            where=where,
            got=f"{n_states} images",
            expected="one TE for each value of the contrast counter, in the header's sequence parameters",
            remedy="See docs/qsm.md; maps = none sends the images alone",
        )
    if len(times) != n_states:
        raise DataError("count of echo times and of images differ", where=where, got=f"{len(times)} and {n_states}")
    if wrong := [t for t in times if not (math.isfinite(t) and 0 < t <= LONGEST)]:
        raise DataError(
            "not an echo time",
            where=where,
            got=f"{1e3 * wrong[0]:g} ms",
            expected=f"above 0, to {1e3 * LONGEST:g} ms",
            remedy="Correct the header's TE, which are in ms",
        )
    if max(times) < SHORTEST:
        raise DataError(
            "not echo times",
            where=where,
            got=f"the last at {1e3 * max(times):g} ms",
            expected=f"at least {1e3 * SHORTEST:g} ms",
            remedy="The header's TE are in ms",
        )
    if len(set(times)) < n_states:
        raise DataError(
            "an echo time occurs twice",
            where=where,
            got=", ".join(f"{1e3 * t:g}" for t in times) + " ms",
            remedy="Only the contrast counter may vary: several repetitions or sets make several images of one echo. repetitions = "
            "average makes one of them; echoes that a converter counted as repetitions belong into contrast",
        )
    if settings.maps == "qsm" and settings.map_failure == "error":
        field_frame(scan, settings)
    return times


def field_frame(scan: ScanInfo, settings: MapSettings) -> FieldFrame:
    """Voxel, B0's direction and frequency of the console's matrix.

    Raises
    ------
    DataError
        A single slice, no directions, no field strength, an impossible one, two that contradict each other.
    """
    where = "susceptibility map"
    if scan.recon_matrix[0] < LEAST_PLANES:
        raise DataError(
            "not a volume",
            where=where,
            got=f"{scan.recon_matrix[0]} planes",
            expected=f"a 3D scan of at least {LEAST_PLANES} planes",
            remedy="maps = r2star needs no volume",
        )
    z, y, x = (fov / n for fov, n in zip(scan.recon_fov, scan.recon_matrix, strict=True))
    return FieldFrame((z, y, x), _b0_direction(scan, settings), _larmor(scan, where))


def _larmor(scan: ScanInfo, where: str) -> float:
    """Hz: the frequency of the header, or that of its field strength."""
    stated, by_field = scan.larmor_frequency or 0.0, GYROMAGNETIC_RATIO * (scan.field_strength or 0.0)
    larmor = stated or by_field
    if not (math.isfinite(larmor) and larmor > 0):
        raise DataError(
            "no field strength", where=where, expected="H1resonanceFrequency_Hz or systemFieldStrength_T in the header"
        )
    if stated and by_field and not abs(stated / by_field - 1) <= CONTRADICTION:
        raise DataError(
            "frequency and field strength contradict each other",
            where=where,
            got=f"H1resonanceFrequency_Hz {stated:g} and systemFieldStrength_T {scan.field_strength:g}",
            expected=f"{by_field:.4g} Hz within {100 * CONTRADICTION:g} %",
            remedy="Correct the header: Hz, not MHz, and T",
        )
    if not TESLA[0] <= larmor / GYROMAGNETIC_RATIO <= TESLA[1]:
        raise DataError(
            "not a field strength",
            where=where,
            got=f"{larmor:g} Hz, {larmor / GYROMAGNETIC_RATIO:.3g} T",
            expected=f"{TESLA[0]:g} to {TESLA[1]:g} T",
            remedy="Correct the header: H1resonanceFrequency_Hz in Hz, systemFieldStrength_T in T",
        )
    return larmor


def _b0_direction(scan: ScanInfo, settings: MapSettings) -> tuple[float, float, float]:
    if settings.b0_direction is not None:
        return settings.b0_direction
    if scan.b0_direction is None:
        raise DataError(
            "B0's direction in the image is unknown",
            where="susceptibility map",
            got="readouts without read_dir, phase_dir and slice_dir",
            remedy="State map_b0_direction, for an axial scan 1, 0, 0",
        )
    return unit_vector(scan.b0_direction)


def multi_echo_maps(
    series: ImageSeries,
    scan: ScanInfo,
    noise: ImageNoise | None,
    settings: MapSettings,
    mask: Tensor | None = None,
    phase: Tensor | None = None,
) -> SeriesMaps:
    """R2* with its standard deviation and S0; for ``qsm`` also local field, susceptibility and brain mask, of one slab.

    Parameters
    ----------
    series
        ``(echo, z, y, x)``, final, on the console's matrix, in any order of time. Complex for ``qsm``.
    scan
        Echo times, geometry, frequency, direction of B0.
    noise
        Of the images; ``None`` where it is not known: standard deviations then come from the fits' residuals alone.
    settings
        Which maps, and how.
    mask
        bool ``(z, y, x)`` on the images' matrix: where there is a susceptibility; ``None`` to find the brain in the magnitudes
        (``settings.map_mask``). R2* is not bound by it.
    phase
        Complex, as ``series``: what the field is fitted to; ``None``: the images themselves. Everything else comes from the images.

    Returns
    -------
    SeriesMaps
        With the echoes' combination (root sum of squares) in front of the echo images, or in their place.

    Raises
    ------
    DataError
        As `multi_echo_times`; a signal that grows with the echo time; echoes that are mirrored; ``map_failure = error``
        and no susceptibility could be made, for instance because the mask has another shape or nothing inside.
    """
    times = multi_echo_times(scan, len(series.data), settings)
    check_decay(series.data, times, None if noise is None else noise.std, "R2* map")
    notes = _of_direction(series.data, times, scan, settings)
    images = _signed(series.data, settings)
    combined = ImageSeries(
        "combined",
        torch.linalg.vector_norm(images, dim=0, keepdim=True).float(),
        f"root sum of squares of {len(times)} echoes",
    )
    shown = (combined, series) if settings.map_echo_images else (combined,)
    r2star = _r2star(images, times, noise, settings)
    quality = {"r2star_valid": float(r2star.r2star.valid.float().mean())}
    maps = [r2star.r2star, r2star.r2star_sd, r2star.s0]
    if settings.maps == "qsm":
        try:
            fitted = images if phase is None else _signed(phase, settings)
            found = _where_measured(_Fittable(images, fitted, times, r2star, scan, noise, mask), settings)
        except ReconError as error:
            if settings.map_failure == "error":
                raise
            notes.append(f"R2* only, no susceptibility map: {error}")
        else:
            maps += found.maps
            notes += found.notes
            quality |= found.quality
    gain = echo_gain(images, times, None if noise is None else noise.std, r2star.r2star)
    if gain is not None and gain.note:
        notes.append(gain.note)
    return SeriesMaps(tuple(maps), tuple(notes), quality, shown)


def _of_direction(images: Tensor, times: tuple[float, ...], scan: ScanInfo, settings: MapSettings) -> list[str]:
    """What is to be told of echoes that look mirrored, where they are not refused."""
    try:
        check_direction(images, times, scan.reversed_readouts, "R2* map")
    except DataError as error:
        if settings.map_direction == "require":
            raise
        return [f"made all the same, as map_direction asks: {error}"]
    return []


def _signed(images: Tensor, settings: MapSettings) -> Tensor:
    return images.conj() if settings.map_phase_sign == "negative" and images.is_complex() else images


def _r2star(images: Tensor, times: tuple[float, ...], noise: ImageNoise | None, settings: MapSettings) -> R2StarMaps:
    std = None if noise is None else noise.std
    fit = arlo if settings.map_r2star_fit == "arlo" else nonlinear_r2star
    magnitudes = images.abs()
    found = fit(magnitudes, times, noise_std=std)
    if noise is None:
        return replace(found, r2star_sd=replace(found.r2star_sd, comment="noise from the fit's residual: a lower limit"))
    # where the fit leaves more than the noise (aliasing, motion, dephasing), that counts
    t = torch.tensor(times, dtype=magnitudes.dtype, device=images.device)[:, None, None, None]
    rest = magnitudes - found.s0.data * torch.exp(-t * found.r2star.data)
    freedom = max(1, len(times) - 2)
    larger = (rest.square().sum(0) / freedom).sqrt().div_(noise.std).clamp_min_(1.0) if len(times) > 2 else 1.0
    comment = f"from {noise.source}, or the fit's residual where that is larger"
    return replace(found, r2star_sd=replace(found.r2star_sd, data=found.r2star_sd.data * larger, comment=comment))


@dataclass(frozen=True)
class _Fittable:
    """What a susceptibility is made of: images and what the field is fitted to, ``(echo, z, y, x)``, on the scan's console matrix, with
    R2*, noise and a mask, if one is given."""

    images: Tensor
    phase: Tensor
    times: tuple[float, ...]
    r2star: R2StarMaps
    scan: ScanInfo
    noise: ImageNoise | None
    given: Tensor | None


def _where_measured(echoes: _Fittable, settings: MapSettings) -> SeriesMaps:
    """`_susceptibility` in voxels as they were measured, its maps on the console's matrix."""
    images, scan, given = echoes.images, echoes.scan, echoes.given
    own = measured_grid(scan)
    if own is scan or not images.is_complex():
        return _susceptibility(echoes, settings)
    inside = None if given is None else given_mask(given.to(images.device), images.shape[1:])
    few = images_between(images, scan, own)
    measured = replace(
        echoes,
        images=few,
        phase=few if echoes.phase is images else images_between(echoes.phase, scan, own),
        r2star=decay_between(echoes.r2star, scan, own),
        scan=own,
        given=None if inside is None else mask_between(inside, scan, own),
    )
    found = _susceptibility(measured, settings)
    told = "interpolated from {} x {} x {} measured voxels (z y x)".format(*own.recon_matrix)
    maps = [replace(m, comment=f"{m.comment}; {told}") for m in (map_between(m, own, scan) for m in found.maps)]
    if inside is not None:
        *maps, brain = (replace(m, data=m.data * inside, valid=m.valid & inside) for m in maps)
        maps.append(replace(brain, data=inside.float(), valid=inside))
    return replace(found, maps=tuple(maps))


def _susceptibility(echoes: _Fittable, settings: MapSettings) -> SeriesMaps:
    images, times, r2star, given = echoes.images, echoes.times, echoes.r2star, echoes.given
    scan, noise = echoes.scan, echoes.noise
    if not images.is_complex():
        raise DataError(
            "only magnitudes exist, no phase",
            where="susceptibility map",
            remedy="Use a method that keeps the phase (not fourier)",
        )
    frame = field_frame(scan, settings)
    mask = _mask(echoes, frame, settings)
    agreed = agreed_field(
        echoes.phase,
        times,
        mask,
        None if noise is None else noise.std,
        backwards=_backwards(scan, times, settings),
    )
    field, notes = agreed.field, list(agreed.notes)
    weights = field.weights
    if thin := note_of_thin_slab(mask, frame.voxel):
        notes.append(thin)
    lost = int((mask & ~agreed.known).sum()) * math.prod(frame.voxel)
    if lost >= WORTH_A_WORD:
        notes.append(HOLES.format(1e6 * lost))
    local = _local_field(field, agreed.known, frame, weights, settings)
    if given is None and settings.map_mask == "brain" and settings.map_background != "none":
        local = without_outliers(local, agreed.known, frame.voxel)
    if given is not None and settings.map_mask == "brain" and settings.map_background != "none":
        stray = outliers(local, agreed.known, frame.voxel)
        if stray is not None and (part := float(stray.sum() / local.mask.sum())) > MOST_STRAY:
            notes.append(STRAY.format(100 * part))
    if not local.converged:
        notes.append(f"background removal: not converged after {local.iterations} steps (residual {local.residual:.1e})")
    chi, region = _invert(local, images, times, r2star, frame, weights, settings)
    if not chi.converged:
        notes.append(f"dipole inversion: still changing by {100 * chi.change:.1f} % after {chi.iterations} steps")
    brain = settings.map_mask == "brain"  # of phantoms nothing is known
    tesla = frame.larmor / GYROMAGNETIC_RATIO
    contrast = iron_contrast(chi.chi, r2star.r2star, mask, frame.voxel, tesla) if brain else None
    if turned := note_of_sign(contrast, settings.map_phase_sign):
        notes.append(turned)
    method = settings.map_background
    noise_ppb = 1e9 / frame.larmor * field_noise(local.field, local.mask)
    facts = (f"background {method}", f"noise of the local field {noise_ppb:.1f} ppb", _conventions(frame, settings))
    maps = (
        ParameterMap("local_field", local.field, "Hz", local.mask, f"background removed by {method}"),
        replace(chi.chi, comment="; ".join((chi.chi.comment, *facts))),
        ParameterMap("brain_mask", mask.float(), "1", mask, region if given is None else f"as given; {region}"),
    )
    volume = float(mask.sum()) * math.prod(frame.voxel)
    quality = {
        "brain_ml": 1e6 * volume,
        "without_field_ml": 1e6 * lost,
        "susceptibility_ml": 1e6 * float(local.mask.sum()) * math.prod(frame.voxel),
        "phase_residual": agreed.residual,
        "background_residual": local.residual,
        "field_noise_ppb": noise_ppb,
        "inversion_iterations": float(chi.iterations),
        "inversion_change": chi.change,
    }
    if contrast is not None:
        quality["iron_contrast"] = contrast
    return SeriesMaps(maps, tuple(notes), quality)


def note_of_thin_slab(mask: Tensor, voxel: tuple[float, float, float]) -> str:
    """A word where an object is cut at both ends of a volume so narrow that the removal of the background takes contrast as well."""
    narrow = []
    for axis, (side, place) in enumerate(zip(voxel, PLACES, strict=True)):
        planes = mask.movedim(axis, 0)
        width = len(planes) * side
        if width < THIN_SLAB and bool(planes[:2].any()) and bool(planes[-2:].any()):
            narrow.append(place.format(1e3 * width))
    if not narrow:
        return ""
    return (
        f"{' and '.join(narrow)}, cut at both ends: susceptibilities are too low, at 40 mm by about a fifth (by more where several sides "
        f"are cut); {1e3 * THIN_SLAB:.0f} mm or more are needed"
    )


def _mask(echoes: _Fittable, frame: FieldFrame, settings: MapSettings) -> Tensor:
    images, noise, given = echoes.images, echoes.noise, echoes.given
    if given is not None:
        return given_mask(given.to(images.device), images.shape[1:])
    if settings.map_mask_file:
        raise DataError(
            "the mask that was named is not there or does not fit", where="given mask", got=repr(settings.map_mask_file[:64])
        )
    if settings.map_mask == "object":
        return object_mask(images)
    mask = brain_mask(with_later_echoes(images, echoes.times, echoes.r2star), frame.voxel)
    if noise is not None:
        # noise has bright parts as well, and where coils are near they hang together
        strength = float(images[:, mask].abs().square().mean(0).sqrt().median()) / (math.sqrt(2) * noise.std)
        if strength < LEAST_STRENGTH:
            raise DataError(
                "no brain found",
                where="brain mask",
                got=f"{strength:.2g} times the noise",
                expected=f"at least {LEAST_STRENGTH:g} times",
                remedy="Check that the images show a head",
            )
    return mask


def _conventions(frame: FieldFrame, settings: MapSettings) -> str:
    """What turns a susceptibility round or bends it when it is wrong, for whoever reads the map."""
    direction = " ".join(f"{part:.2f}" for part in frame.b0)
    return f"{1e-6 * frame.larmor:.2f} MHz; B0 along {direction} (z y x); phase sign {settings.map_phase_sign}"


def _backwards(scan: ScanInfo, times: tuple[float, ...], settings: MapSettings) -> tuple[bool, ...]:
    """Which echoes were read backwards, one for each; empty where nothing is to be corrected."""
    if settings.map_bipolar == "on":  # every second, in order of time
        rank = {i: k for k, i in enumerate(sorted(range(len(times)), key=times.__getitem__))}
        return tuple(rank[i] % 2 == 1 for i in range(len(times)))
    known = settings.map_bipolar == "auto" and len(scan.reversed_readouts) == len(times)
    return scan.reversed_readouts if known else ()


def _local_field(field: FieldMaps, mask: Tensor, frame: FieldFrame, weights: Tensor, settings: MapSettings) -> LocalField:
    total = field.field.data
    if settings.map_background == "none":
        return LocalField(total, mask, 0, 0.0, True)
    if settings.map_background == "pdf":
        return pdf(total, mask, frame.voxel, frame.b0, weights=weights, settings=BackgroundSettings())
    return BACKGROUNDS[settings.map_background](total, mask, frame.voxel)


def _invert(
    local: LocalField,
    images: Tensor,
    times: tuple[float, ...],
    r2star: R2StarMaps,
    frame: FieldFrame,
    weights: Tensor,
    settings: MapSettings,
) -> tuple[Susceptibility, str]:
    """The map, and a word on its reference region."""
    per_hz = 1e6 / frame.larmor
    ppm, mask, voxel, b0 = local.field * per_hz, local.mask, frame.voxel, frame.b0
    wanted = settings.map_reference == "csf" or settings.map_inversion == "medi0"
    fluid = csf_region(r2star.r2star.data, mask, voxel) if wanted else None
    name = "" if fluid is None else "cerebrospinal fluid"
    if settings.map_inversion == "tv":
        found = tv_admm(ppm, mask, voxel, b0, weights=weights, reference=fluid, reference_name=name)
    elif settings.map_inversion == "tkd":
        found = tkd(ppm, mask, voxel, b0, reference=fluid, reference_name=name)
    else:
        magnitude = images.abs().square().sum(0).sqrt()
        spacing = min(b - a for a, b in pairwise(sorted(times)))
        found = medi(
            ppm,
            mask,
            magnitude,
            voxel,
            b0,
            weights=weights,
            csf=fluid,
            radians_per_ppm=2 * math.pi * spacing / per_hz,
        )
    return found, f"reference region: {found.reference}"
