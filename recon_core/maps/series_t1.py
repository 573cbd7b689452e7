"""T1 maps of a reconstructed series, whichever method made it: which times, which noise, which sign, and what to tell.

A regularised reconstruction fits itself: its states agree with each other better than with the truth, and the standard
deviation from the fit's residual alone is several times too small after ``llr`` (``benchmarks/t1_maps.py`` measures it). So the
noise of the *data* sets the scale of a pixel's standard deviation, as if the images had been unfolded without regularisation
and without loss (geometry factor 1), and where the residual is larger than that noise (aliasing, motion) the residual does.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from recon_core.errors import DataError
from recon_core.maps.saturation import MOST_WRONG, judge_recovery, strong_signal
from recon_core.maps.saturation_places import parts
from recon_core.maps.series import ImageNoise, SeriesMaps
from recon_core.maps.settings import MapSettings
from recon_core.maps.state_gain import StateGain, state_gain
from recon_core.maps.state_motion import Motion, moved_state
from recon_core.maps.state_order import TimesOrder, order_of_times
from recon_core.maps.state_phase import note_of, turn_back, turns_of_states
from recon_core.maps.t1 import T1Maps, inversion_recovery_t1, molli_t1, saturation_recovery_t1
from recon_core.types import ImageSeries, ParameterMap, ScanInfo

Tensor = torch.Tensor

LEAST_TIMES = 3
"""Different times below which three parameters cannot be determined, whatever else is known."""

SHARED_PHASE = 0.9
"""Part of the series' energy that must lie on one axis of the complex plane, pixel by pixel, for its phase to give the sign."""

SHORTEST, LONGEST = 0.02, 60.0
"""s; times that all lie below or above were given in s or in us."""

TIMES_STAND = {
    "inversion": "one time for each image, in the header's TI list or in the readouts",
    "saturation": "one time for each image, in user parameters SaturationTime_ms_0, _1, ..., or in a TI list of which the user parameter "
    "MagnetizationPreparation or the setting preparation says that it is of a saturation",
}
"""Where the times of a preparation are looked for."""

BRIGHTEST_FIRST = 1.05
"""The shortest delay of a saturation is never brighter than the longest, by more than noise and gains make it."""

MOST_TURNED = 0.25
"""rad; by how much the phase of one image of a saturation recovery may differ from that of the longest delay from place to place (RMS over
parts of the object): samples that were placed one too far, a field that drifts with breathing. It would look 3 % darker."""

MOST_INVALID = 0.2
"""Part of the object's pixels without a believable T1 above which the operator is told."""

MOST_EMPTY = 0.1
"""Part of the object with a T1 below which another recovery than the one that is fitted is likely."""

ALIKE = 1.1
"""Residuals of two recoveries that differ by less are alike."""

MOST_ASKED = 2000
"""Pixels that are asked whether another recovery fits as well."""

FITS = {"molli": molli_t1, "inversion_recovery": inversion_recovery_t1, "saturation_recovery": saturation_recovery_t1}


def recovery_times(scan: ScanInfo, n_states: int, settings: MapSettings) -> tuple[float, ...]:
    """The times of the states in s; cheap, so that it can be asked before anything is reconstructed.

    Raises
    ------
    DataError
        No times, another number of times than of states, fewer than three different ones, or times in another unit.
    """
    kind = "saturation" if settings.map_model == "saturation_recovery" else "inversion"
    times = scan.saturation_times if kind == "saturation" else scan.inversion_times
    where = "T1 map"
    if n_states < LEAST_TIMES:
        raise DataError(
            "too few images for a T1 map", where=where, got=n_states, expected=f"at least {LEAST_TIMES} {kind} times"
        )
    if not times:
        raise DataError(
            f"no {kind} times that fit the images",
            where=where,
            got=f"{n_states} images",
            expected=TIMES_STAND[kind],
            remedy="See docs/t1_maps.md for where times may stand; maps = none sends the images alone",
        )
    if len(times) != n_states:
        raise DataError(f"count of {kind} times and of images differ", where=where, got=f"{len(times)} and {n_states}")
    if max(times) < SHORTEST or min(times) > LONGEST:
        raise DataError(
            f"not {kind} times",
            where=where,
            got=", ".join(f"{1e3 * t:g}" for t in times) + " ms",
            expected=f"some between {1e3 * SHORTEST:g} and {1e3 * LONGEST:g} ms",
            remedy="The header's times are in ms",
        )
    if (n := len(set(times))) < LEAST_TIMES:
        raise DataError(f"too few different {kind} times", where=where, got=n, expected=f"at least {LEAST_TIMES}")
    return times


def t1_maps(series: ImageSeries, scan: ScanInfo, noise: ImageNoise | None, settings: MapSettings) -> SeriesMaps:
    """T1 with its standard deviation, M0 and residual of one slice or slab.

    Parameters
    ----------
    series
        ``(state, z, y, x)``, complex or magnitude, final: on the console's matrix, partial Fourier completed. Any order of times.
    scan
        For the times of the states.
    noise
        Of the images; ``None`` where it is not known: then standard deviations come from the residual alone, and too few times
        or states are refused sooner.
    settings
        Model, sign and limits.

    Returns
    -------
    SeriesMaps
        T1, its standard deviation, M0, the residual and, of a saturation recovery that kept its phase, M0's phase (rad). All share
        one ``valid``; values are 0 where it is ``False``. The standard deviation is the larger of what the noise and what the fit's
        residual say, and the map's comment names the source.

    Raises
    ------
    DataError
        Times as in `recovery_times`; images that are not finite; a sign from the phase asked of magnitude images; of a
        saturation recovery, delays that do not belong together, a beginning far from zero, where T1 would be too wrong, or a shortest
        delay that is the brightest; an object that moved in one state, where T1 would be too wrong; of an inversion
        recovery, images that a saturation explains as well, or, where T1 would be too wrong, times in another order than the images, or
        one image that is brighter or darker than the others say.
    """
    times = recovery_times(scan, len(series.data), settings)
    if settings.map_model == "saturation_recovery":
        _refuse_falling(series.data, times)
    signed, sign_note = _with_sign(series.data, settings.map_sign)
    turned = ""
    if settings.map_model == "saturation_recovery" and signed.is_complex():
        turns = turns_of_states(signed, max(range(len(times)), key=times.__getitem__))
        signed, turned = turn_back(signed, turns), note_of(turns, times)
        if settings.map_sign == "auto" and (other := _of_another_phase(signed, times)):
            signed, turned, sign_note = signed.abs(), "", other
    fit = FITS[settings.map_model]
    fitted = fit(signed, times, noise_std=None if noise is None else noise.std, settings=settings.t1)
    maps = _honest_deviation(fitted, noise, settings)
    sign = "sign from phase" if signed.is_complex() else "sign from zero crossing"
    t1 = replace(maps.t1, comment=f"{settings.map_model}, {len(times)} times {min(times):.3g} to {max(times):.3g} s, {sign}")
    seen = strong_signal(series.data)
    share = float(t1.valid[seen].float().mean()) if bool(seen.any()) else 0.0
    notes = [sign_note] if sign_note else []
    if turned:
        notes.append(f"T1: {turned}")
    if settings.map_model == "saturation_recovery" and (
        note := _judged_saturation(signed, maps, times, settings.map_delays)
    ):
        notes.append(f"T1: {note}")
    other = ""
    if settings.map_model != "saturation_recovery":
        other = _judged_images(signed, fitted, times, settings) or _judged_inversion(signed, fitted, times, settings)
    # what another recovery, order or gain leaves looks like motion as well
    if note := other or _judged_motion(signed, fitted, times, settings.map_delays):
        notes.append(f"T1: {note}")
    if share < 1 - MOST_INVALID:
        empty = f"T1: {100 * (1 - share):.0f} % of the object's pixels have no believable T1 and are left empty"
        notes.append(empty + _why_empty(settings) if share < MOST_EMPTY else empty)
    # of an inversion recovery the series has an axis in the complex plane; that of M0 is only its positive end if the sign is right
    complete = replace(maps, t1=t1, m0_phase=maps.m0_phase if settings.map_model == "saturation_recovery" else None)
    return SeriesMaps(complete.maps, tuple(notes), {"t1_valid": share})


def _why_empty(settings: MapSettings) -> str:
    """What is likely wrong where hardly any pixel has a T1."""
    fitted = settings.map_model.replace("_", " ")
    return f": the recovery is likely no {fitted} (setting map_model), or its times are others than the header says"


def _refuse_falling(images: Tensor, times: tuple[float, ...]) -> None:
    """Raise ``DataError`` where the shortest delay is brighter than the longest: no pixel has a T1, and an empty map tells nobody why."""
    shortest, longest = (pick(range(len(times)), key=times.__getitem__) for pick in (min, max))
    seen = strong_signal(images)
    first, last = (float(torch.linalg.vector_norm(images[state][seen])) for state in (shortest, longest))
    if first > BRIGHTEST_FIRST * last:
        raise DataError(
            "the images of the shortest delay are the brightest: this is no recovery",
            where="T1 map",
            got=f"{times[shortest]:g} s is {first / last:.1f} times as bright as {times[longest]:g} s" if last else None,
            expected="images that become brighter with the delay",
            remedy="Check the order of the delays; a reference without saturation has a long one (ten times the longest T1), and not 0",
        )


def _judged_saturation(images: Tensor, maps: T1Maps, times: tuple[float, ...], delays: str) -> str:
    """What is to be said of delays that do not belong together; raises ``DataError`` where T1 would be too wrong (``map_delays``)."""
    seen = maps.t1.valid
    m0 = maps.m0.data[seen]
    if maps.m0_phase is not None:
        m0 = torch.polar(m0, maps.m0_phase.data[seen])
    judged = judge_recovery(images[:, seen], m0, maps.t1.data[seen], times, seen)
    if judged.is_no_saturation or (judged.forbids_map and delays == "require"):
        what = "this is no recovery from saturation" if judged.is_no_saturation else "T1 would be wrong"
        raise DataError(
            what,
            where="T1 map",
            got=judged.note,
            expected=f"delays that belong together, and T1 within {100 * MOST_WRONG:g} % of the truth",
            remedy="Check the preparation and the delays in the header, and whether the scanner or a converter scaled images by "
            "themselves; map_delays = tell sends such a map, but none of an inversion",
        )
    return judged.note


def _judged_inversion(images: Tensor, maps: T1Maps, times: tuple[float, ...], settings: MapSettings) -> str:
    """What is to be said of an inversion recovery that one from saturation explains as well; raises ``DataError`` (``map_delays``).

    With signs from the zero crossing a shortest delay that is dim passes for inverted, and T1 comes out by half too short.
    """
    seen = maps.t1.valid.flatten().nonzero()[:, 0]
    if len(set(times)) <= LEAST_TIMES or not len(seen):
        return ""
    asked = seen[:: -(-len(seen) // MOST_ASKED)]
    few = images.flatten(1)[:, asked][:, None, None]
    saturated = saturation_recovery_t1(few, times, settings=settings.t1).residual
    alike = saturated.valid[0, 0] & (saturated.data[0, 0] < ALIKE * maps.residual.data.flatten()[asked])
    share = float(alike.float().mean())
    if share <= 0.5:
        return ""
    found = f"a recovery from saturation fits {100 * share:.0f} % of the pixels as well, with one number less"
    if settings.map_delays == "require":
        raise DataError(
            "this is no inversion recovery",
            where="T1 map",
            got=found,
            expected="images that begin with inverted magnetisation",
            remedy="Use map_model = saturation_recovery, or check the preparation and the times in the header; map_delays = tell sends "
            "such a map",
        )
    return f"{found}: likely there was no inversion, and T1 is wrong (setting map_model)"


def _judged_images(images: Tensor, maps: T1Maps, times: tuple[float, ...], settings: MapSettings) -> str:
    """What is to be said of times in another order than the images, or of an image that is brighter than the others say, whichever explains
    more; raises as `_told_or_refused`."""
    assert maps.parameters is not None
    inside = maps.t1.valid
    gain = state_gain(images, _phase_of(maps), maps.parameters[:, inside], times, inside)
    fit = partial(FITS[settings.map_model], settings=settings.t1)
    order = order_of_times(images, times, strong_signal(images), fit)
    if order is not None and (gain is None or not gain.matters or order.explained > gain.explained):
        return _told_or_refused(
            order, settings.map_delays, "images in the order of their times", "Check the times in the header"
        )
    remedy = "Check the times in the header, and whether the scanner or a converter scaled images by themselves"
    return _told_or_refused(gain, settings.map_delays, "images that belong together", remedy)


def _judged_motion(images: Tensor, maps: T1Maps, times: tuple[float, ...], delays: str) -> str:
    """What is to be said of an object that moved in one state; raises as `_told_or_refused`."""
    inside = maps.t1.valid
    fitted = torch.stack((maps.m0.data, 1 / maps.t1.data)) if maps.parameters is None else maps.parameters
    motion = moved_state(images, _phase_of(maps), fitted[:, inside], times, inside)
    return _told_or_refused(motion, delays, "an object at rest", "Repeat the scan, or leave that image out")


def _phase_of(maps: T1Maps) -> Tensor | None:
    return None if maps.m0_phase is None else maps.m0_phase.data


def _told_or_refused(found: StateGain | TimesOrder | Motion | None, delays: str, expected: str, remedy: str) -> str:
    """The note of what was found; raises ``DataError`` where T1 would be too wrong and ``map_delays`` requires that it is not."""
    if found is None:
        return ""
    if found.forbids_map and delays == "require":
        raise DataError(
            "T1 would be wrong",
            where="T1 map",
            got=found.note,
            expected=f"{expected}, and T1 within {100 * MOST_WRONG:g} % of the truth",
            remedy=f"{remedy}; map_delays = tell sends such a map",
        )
    return found.note


def _with_sign(images: Tensor, sign: str) -> tuple[Tensor, str]:
    """Complex images where the phase is to give the sign, magnitudes otherwise; and a note where 'auto' had to decline."""
    if not images.is_complex():
        if sign == "phase":
            raise DataError(
                "only magnitudes exist, the phase cannot give the sign",
                where="T1 map",
                remedy="Use map_sign = magnitude, or a method that keeps the phase",
            )
        return images, ""
    if sign == "phase":
        return images, ""
    if sign == "magnitude":
        return images.abs(), ""
    energy = images.abs().square().sum()
    shared = float(images.square().sum(0).abs().sum() / energy) if float(energy) > 0 else 1.0
    if shared >= SHARED_PHASE:
        return images, ""
    note = (
        f"T1: the states share no phase ({100 * shared:.0f} % of the signal does), signs come from the zero crossing instead"
    )
    return images.abs(), note


def _of_another_phase(images: Tensor, times: tuple[float, ...]) -> str:
    """What is to be said of a delay whose phase differs from that of the longest one from place to place; empty for none.

    Up to a sign, which an inversion may have; aliases have all phases, and cancel.
    """
    inside = strong_signal(images)
    squares = images[:, inside].square()
    squares = squares * squares[max(range(len(times)), key=times.__getitem__)].conj()
    turns = [squares[:, part].sum(1).angle() / 2 for part in parts(inside)]
    if not turns:
        return ""
    size = torch.stack(turns).square().mean(0).sqrt()
    worst = int(size.argmax())
    if float(size[worst]) <= MOST_TURNED:
        return ""
    return (
        f"T1: the phase of the delay {times[worst]:g} s differs from that of the longest one by {size[worst]:.1f} rad from place to place: "
        "T1 is fitted to magnitudes"
    )


def _honest_deviation(maps: T1Maps, noise: ImageNoise | None, settings: MapSettings) -> T1Maps:
    """The standard deviation scaled up where the residual is larger than the noise; pixels that become uncertain are emptied."""
    if noise is None:
        return replace(maps, t1_sd=replace(maps.t1_sd, comment="noise from the fit's residual: a lower limit"))
    larger = (maps.residual.data / noise.std).clamp_min(1.0)
    sd = maps.t1_sd.data * larger
    valid = maps.t1.valid & (sd <= settings.map_max_relative_sd * maps.t1.data)

    def kept(parameter: ParameterMap, data: Tensor, comment: str = "") -> ParameterMap:
        return replace(parameter, data=torch.where(valid, data, 0.0), valid=valid, comment=comment or parameter.comment)

    return T1Maps(
        kept(maps.t1, maps.t1.data),
        kept(
            maps.t1_sd,
            sd,
            f"from {noise.source}, or the fit's residual where that is larger; not what regularisation smooths away",
        ),
        kept(maps.m0, maps.m0.data),
        kept(maps.residual, maps.residual.data),
        None if maps.m0_phase is None else kept(maps.m0_phase, maps.m0_phase.data),
        maps.parameters,
    )
