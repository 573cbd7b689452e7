"""PINQI as a method: a scan is brought to what the network was trained on, and its answer back to the scan's units."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from recon_core.errors import DataError, NumericalError
from recon_core.maps.saturation import MOST_WRONG, Judgement, judge_recovery, strong_signal
from recon_core.maps.state_motion import Motion, moved_state
from recon_core.maps.state_phase import note_of, turn_back, turns_of_states
from recon_core.methods.pinqi.installed import installed_weights
from recon_core.methods.pinqi.model import AS_LEARNED, PinqiOutput, Strengths
from recon_core.methods.pinqi.noise_rule import acceleration_of
from recon_core.methods.pinqi.parameter_maps import Agreement, agreement, parameter_maps
from recon_core.methods.pinqi.phase import low_pass_phase, turned
from recon_core.methods.pinqi.settings import Settings
from recon_core.methods.pinqi.start import first_images_and_object
from recon_core.methods.pinqi.weights import TrainedPinqi, check_times
from recon_core.operators.batched_sense import BatchedSense
from recon_core.problem import check_kspace, check_maps, pose
from recon_core.signal_models import SaturationRecovery
from recon_core.solvers.nonlinear_layer import NonlinearReport
from recon_core.types import ImageSeries, KSpace, ParameterMap, Report, Result, ScanInfo

Tensor = torch.Tensor

NAME = "pinqi"
SUMMARY = "Physics-informed learned T1 maps from undersampled saturation recovery (PINQI)"
NEEDS_COIL_MAPS = True
SUPPORTS_3D = False
ROUNDING = 5e-3
"""The thresholds of the refined first images may fall either way, as in `moe_dqinr`; and solvers stop at a tolerance: where there is no
signal their end point is anywhere within it."""
FIDELITY = 0.2
"""What it has learned stays in images of complete data as well."""
MAPS = {"T1": "s", "T1_SD": "s", "M0": "1", "M0_phase": "rad"}
"""Names and units."""

MOST_EMPTY = 0.2  # part of the pixels with signal without a believable T1 above which the operator is told


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """T1, M0 and images of one slice by the installed weights that the settings name; see `reconstruct_with`.

    Raises
    ------
    WeightError
        Weights that are missing, damaged, or trained for other states or delays.
    DataError, CalibrationError, NumericalError
        As `reconstruct_with`.
    """
    check_geometry(kspace, scan)
    trained = installed_weights(settings.weights, kspace.data.device, settings.precision, settings.nonlinear_solver)
    return reconstruct_with(trained, kspace, scan, settings, report)


def reconstruct_with(trained: TrainedPinqi, kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """T1, M0 and images of one slice by a trained network.

    K-space is scaled so that the 99.9th percentile of the images of the calibration lines, all delays together (the longest one
    rules it), equals that of the training samples; states are sorted as the network knows them, and put back. Both are undone.

    Parameters
    ----------
    trained
        On the device of the k-space.
    kspace
        With coil maps. Averages count by their number. ``noise_std`` sets the scale of standard deviations and of the quality check;
        ``None``: estimated from the outer lines.
    scan
        ``saturation_times`` in s, one per state, any order.

    Returns
    -------
    Result
        Images complex64 ``(state, z, y, x)``; maps ``T1`` and ``T1_SD`` (s), ``M0`` (images' unit), ``M0_phase`` (rad), float32
        ``(z, y, x)``; ``quality``: residuals of images and of maps over the noise, what noise leaves unexplained, part of valid pixels.

    Raises
    ------
    DataError
        A slab; no, or not one per state, saturation times; k-space that does not fit together.
    WeightError
        The weights were trained for other states or delays.
    CalibrationError
        No usable coil maps.
    NumericalError
        Results that are not finite, or (``quality_failure = error``) maps that contradict the data or come from delays that
        contradict each other.

    References
    ----------
    PINQI (Zimmermann et al., doi:10.1109/TCI.2024.3388869), Eq. (10)-(14), (19) and section III-C.
    """
    where = check_geometry(kspace, scan)
    check_kspace(kspace, where)
    check_maps(kspace, where)
    order = network_order(trained, saturation_times(kspace, scan, where))
    if not bool((kspace.data != 0).any()):
        return _nothing(kspace, report)
    report.progress(0.0, NAME)
    turns = _turns(kspace, scan)
    applied = apply_network(
        trained, replace(kspace, data=turn_back(kspace.data, turns)), order, where, report, settings.regularisation
    )
    found, scale, noise = applied.found, applied.scale, applied.noise
    report.progress(0.9, NAME)
    agreed = agreement(applied.operator, applied.data, found, applied.signal, applied.sample_noise)
    judged = _judged_recovery(trained, applied)
    motion = _motion(trained, applied)
    notes = _judge(agreed, judged, motion, applied.noise_measured, settings, where)
    if turned := note_of(turns, scan.saturation_times):
        notes = (f"pinqi: {turned}", *notes)
    comment = "; ".join((_origin(trained), *notes))
    rates = trained.network.predicted_rates
    wrong = judged.forbids_map or (motion is not None and motion.forbids_map)
    believed = not judged.is_no_saturation and (settings.quality_failure == "tell" or not wrong)
    maps, share = parameter_maps(
        trained.network.model, applied.operator, found, agreed, noise, scale, settings, comment, rates, believed=believed
    )
    if share < 1 - MOST_EMPTY:
        notes = (
            *notes,
            f"pinqi: {100 * (1 - share):.0f} % of the pixels with signal have no believable T1 and are left empty",
        )
    for note in notes:
        report.warn(note)
    images = turn_back(applied.operator.leave_image(found.images)[0, torch.argsort(order), None] * scale, -turns)
    report.progress(1.0)
    return Result(
        images=(ImageSeries("image", images.to(torch.complex64)),),
        maps=maps,
        quality={
            "residual": agreed.images,
            "residual_maps": agreed.maps,
            "unexplained": agreed.unexplained,
            "noise": noise,
            "t1_valid": share,
            "linear_converged": float(all(r.all_converged for r in found.linear)),
            "unconverged_pixels": float(found.nonlinear[-1].n_unconverged) if found.nonlinear else 0.0,
        },
        notes=notes,
    )


def _turns(kspace: KSpace, scan: ScanInfo) -> Tensor:
    """By how much whole states are turned against the longest delay, rad ``(state,)``, in the positions that all have sampled."""
    times = scan.saturation_times
    shared = kspace.mask.all(0)
    samples = kspace.data.movedim(1, -1)[:, shared]
    return turns_of_states(samples, max(range(len(times)), key=times.__getitem__))


@dataclass(frozen=True)
class Applied:
    """What the network made of one slice, in its own units and order of states.

    Attributes
    ----------
    operator, data
        Acquisition of one sample, and its weighted working data.
    found, signal
        Parameters and images, and the signal ``q(p)`` of the parameters.
    scale
        Measured units per unit of the network.
    noise, noise_measured
        SD of a complex sample of a complete readout of ``data``, and whether it was measured or estimated from the outer lines.
    readout_share
        Part of the readout that was measured, mean over states.
    """

    operator: BatchedSense
    data: Tensor
    found: PinqiOutput
    signal: Tensor
    start: Tensor | None
    scale: float
    noise: float
    noise_measured: bool
    readout_share: float = 1.0

    @property
    def sample_noise(self) -> float:
        """SD of a sample as the data have it: what an asymmetric echo left out is zero and has no noise."""
        return self.noise * math.sqrt(self.readout_share) if self.noise_measured else self.noise


def apply_network(
    trained: TrainedPinqi, kspace: KSpace, order: Tensor, where: str, report: Report, regularisation: str = "noise"
) -> Applied:
    """Sort, scale and reconstruct one slice whose k-space and maps have been checked.

    ``regularisation="noise"``: the lambdas follow noise and acceleration by the weights' rule, see `recon_core.methods.pinqi.noise_rule`.

    Raises
    ------
    NumericalError
        Results that are not finite.
    """
    order = order.to(kspace.data.device)
    kspace = kspace.in_order(order)
    problem = pose(kspace, where, report)
    scale, noise = problem.scale / trained.amplitude, problem.noise * trained.amplitude
    assert kspace.coil_maps is not None
    operator = BatchedSense(kspace.coil_maps[None, :, 0], problem.operator.weights[None, :, 0])
    data = operator.enter_data(kspace.data[None, :, :, 0] / scale)
    acceleration = acceleration_of(operator.weights)
    strengths = trained.noise_rule.at(noise, acceleration) if regularisation == "noise" else AS_LEARNED
    start, columns, kind = None, slice(None), trained.network.settings.start
    if kind != "adjoint":
        images, columns = first_images_and_object(problem, kind)
        start = operator.enter_image(images[None] / scale)
    with torch.no_grad():
        found = _nearly_real(trained, operator, data, start, strengths, columns)
        signal = trained.network.model.signal(found.parameters.movedim(1, 0)).movedim(0, 1)
    if not bool(torch.isfinite(found.parameters).all() & torch.isfinite(torch.view_as_real(found.images)).all()):
        raise NumericalError("the network's result is not finite", where=where, remedy="The chain's fallback can answer")
    return Applied(operator, data, found, signal, start, scale, noise, problem.noise_measured, kspace.readout_share)


def _nearly_real(
    trained: TrainedPinqi,
    operator: BatchedSense,
    data: Tensor,
    start: Tensor | None,
    strengths: Strengths,
    columns: slice,
) -> PinqiOutput:
    """The network on images without the coil maps' phase; see `recon_core.methods.pinqi.phase`.

    Readout positions outside ``columns`` keep the images of the start; their parameters are those of no signal.
    """
    network, rhs = trained.network, operator.adjoint(data)

    def inside(maps: Tensor, rhs: Tensor, start: Tensor | None) -> PinqiOutput:
        if start is None:
            return network(BatchedSense(maps, operator.weights), rhs, None, strengths)
        begun = start[:, :, columns]
        found = network(BatchedSense(maps[..., columns], operator.weights), rhs[:, :, columns], begun, strengths)
        return replace(
            found,
            parameters=_put(found.parameters, columns, network.no_signal(start)),
            images=_put(found.images, columns, start),
            nonlinear=tuple(_wider(report, columns, start) for report in found.nonlinear),
        )

    if not network.model.is_complex:
        return inside(operator.coil_maps, rhs, start)
    longest = max(range(len(trained.times)), key=trained.times.__getitem__)
    turn = low_pass_phase((rhs if start is None else start)[:, longest])  # (1, x, y)
    back = turn.conj()[:, None]
    maps = operator.coil_maps * turn.mT[:, None]
    found = inside(maps, rhs * back, None if start is None else start * back)
    return turned(found, turn, network.model.parameter_names)


def _wider(report: NonlinearReport, columns: slice, images: Tensor) -> NonlinearReport:
    """The report of a fit for all of the images' pixels: where there was none, nothing is wrong."""
    pixels = (len(images), *images.shape[2:])
    none = torch.zeros(pixels, dtype=torch.bool, device=images.device)
    at_bound = none[:, None].expand(-1, report.at_bound.shape[1], -1, -1)
    return NonlinearReport(
        _put(report.iterations[:, None], columns, none[:, None].to(report.iterations.dtype))[:, 0],
        _put(report.converged[:, None], columns, ~none[:, None])[:, 0],
        _put(report.at_bound, columns, at_bound),
    )


def _put(part: Tensor, columns: slice, whole: Tensor) -> Tensor:
    """A copy of ``whole`` ``(batch, axis, x, y)`` with ``part`` at the readout positions ``columns``."""
    result = whole.clone(memory_format=torch.contiguous_format)
    result[:, :, columns] = part
    return result


def check_geometry(kspace: KSpace, scan: ScanInfo) -> str:
    """Where we are, for errors; raises ``DataError`` for a slab."""
    where = f"slice {scan.slice_index}"
    if kspace.is_3d:
        raise DataError(
            "pinqi reconstructs single slices", where=where, got=f"a slab of {kspace.data.shape[-3]}", remedy="Use llr"
        )
    return where


def saturation_times(kspace: KSpace, scan: ScanInfo, where: str) -> tuple[float, ...]:
    """The delays of the states in s.

    Raises
    ------
    DataError
        None, or another number than of states.
    """
    times = scan.saturation_times
    if not times:
        raise DataError(
            "no saturation times",
            where=where,
            got=f"{kspace.n_states} states",
            expected="one delay for each state, in user parameters SaturationTime_ms_0, _1, ..., or in a TI list of a saturation",
            remedy="See docs/pinqi.md for where times may stand; llr reconstructs the images without them",
        )
    if len(times) != kspace.n_states:
        raise DataError(
            "count of saturation times and of states differ",
            where=where,
            got=f"{len(times)} times, {kspace.n_states} states",
            expected="one for each state",
            remedy="Check the TI list and the user parameters of the header",
        )
    return times


def network_order(trained: TrainedPinqi, times: tuple[float, ...]) -> Tensor:
    """Which state of the scan is the network's first, second, ...

    Raises
    ------
    WeightError
        The weights were trained for other states or delays.
    """
    ours = torch.argsort(torch.tensor(times, dtype=torch.float64), stable=True)
    ranks = torch.argsort(torch.argsort(torch.tensor(trained.times, dtype=torch.float64), stable=True))
    order = ours[ranks] if len(ours) == len(ranks) else ours
    check_times(trained, [times[i] for i in order.tolist()])
    return order


def longest_delay_calibration(kspace: KSpace, scan: ScanInfo) -> KSpace:
    """The k-space with the calibration lines of the longest delay alone, where that state holds them all; else unchanged.

    What coil maps are estimated from, if they are estimated as published: the state with the most signal and the least contrast.
    """
    times = scan.saturation_times
    if kspace.acs_mask is None or len(times) != kspace.n_states or not bool(kspace.acs_mask.any()):
        return kspace
    longest = max(range(len(times)), key=times.__getitem__)
    if not bool(kspace.mask[longest][kspace.acs_mask].all()):
        return kspace
    return replace(kspace, acs=kspace.data[longest] * kspace.acs_mask[None, :, :, None])


def calibration(kspace: KSpace, scan: ScanInfo, settings: Settings) -> KSpace:
    """The k-space whose calibration lines give the coil maps: those of the longest delay, or unchanged."""
    return longest_delay_calibration(kspace, scan) if settings.coil_map_source == "longest" else kspace


def _judge(
    agreed: Agreement, judged: Judgement, motion: Motion | None, noise_measured: bool, settings: Settings, where: str
) -> tuple[str, ...]:
    """Nothing, or what the operator has to know of maps that contradict the data or of delays that contradict each other.

    Raises
    ------
    NumericalError
        Such maps, if they are not to be sent.
    """
    source = "measured noise" if noise_measured else "noise of outer k-space"
    misfit = f"residual {agreed.maps:.1f} times the {source}, {100 * agreed.unexplained:.0f} % of the signal unexplained"
    if settings.quality_failure == "error":
        _refuse_wrong(agreed, judged, motion, misfit, settings, where)
    told = [found.note for found in (judged, motion) if found is not None and found.note]
    if agreed.fails(settings):
        told.append(f"the maps do not fit the measured data ({misfit})")
    if noise_measured and agreed.noise_too_loud:
        told.append(
            f"the residual is {agreed.maps:.1f} times the measured noise, which cannot be: the noise measurement is too loud (its "
            "scaling, or another bandwidth), and whether the maps fit the data cannot be told"
        )
    # one story: delays that do not belong together are why the maps do not fit
    return (f"pinqi: {'; '.join(told)}",) if told else ()


def _refuse_wrong(
    agreed: Agreement, judged: Judgement, motion: Motion | None, misfit: str, settings: Settings, where: str
) -> None:
    """Raise ``NumericalError`` for maps that are not to be sent."""
    causes = [found for found in (judged, motion) if found is not None and found.forbids_map]
    if causes:
        raise NumericalError(
            "T1 would be wrong",
            where=where,
            got="; ".join(found.note for found in causes),
            expected=f"delays that belong together, an object at rest, and T1 within {100 * MOST_WRONG:g} % of the truth",
            remedy="Another method's T1 would be as wrong; the images are not. quality_failure = tell sends the map",
        )
    if agreed.fails(settings):
        told = "; ".join(found.note for found in (judged, motion) if found is not None and found.note)
        raise NumericalError(
            "the maps do not fit the measured data",
            where=where,
            got=misfit,
            expected=f"below {settings.quality_noise:g} times, or below {100 * settings.quality_signal:g} %",
            remedy=f"The chain's fallback can answer; {told or 'motion and wrong delays are common causes'}",
        )


def _judged_recovery(trained: TrainedPinqi, applied: Applied) -> Judgement:
    """Whether the delays belong together, by images that the model has not touched."""
    model = trained.network.model
    if not isinstance(model, SaturationRecovery) or not model.is_complex:
        return Judgement()
    images, m0, rate, inside = _untouched(applied)
    return judge_recovery(images[:, inside], m0[inside], 1 / rate[inside], trained.times, inside)


def _motion(trained: TrainedPinqi, applied: Applied) -> Motion | None:
    """Whether the object moved in one delay, by the same images."""
    model = trained.network.model
    if not isinstance(model, SaturationRecovery) or not model.is_complex:
        return None
    images, m0, rate, inside = _untouched(applied)
    fitted = torch.stack((m0.abs(), rate))
    return moved_state(images[:, None], m0.angle()[None], fitted[:, inside], trained.times, inside[None])


def _untouched(applied: Applied) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``(state, x, y)`` that the model has not touched, complex M0 and R1 ``(x, y)``, and where there is signal.

    A network that begins with ``adjoint`` has none but its own: tied to the model, but by the measured samples first of all.
    """
    images = (applied.found.images if applied.start is None else applied.start)[0]
    parameters = applied.found.parameters[0]
    inside = strong_signal(images) & (parameters[-1] > 0)
    return images, torch.complex(parameters[0], parameters[1]), parameters[-1], inside


def _origin(trained: TrainedPinqi) -> str:
    digest = str(trained.facts.get("sha256", ""))[:8] or "unsaved"
    return f"PINQI, weights {digest}, {len(trained.times)} delays {min(trained.times):g} to {max(trained.times):g} s"


def _nothing(kspace: KSpace, report: Report) -> Result:
    """Images and maps of data that are all zero: zero, nothing valid."""
    text = "pinqi: all samples are zero"
    report.warn(text)
    report.progress(1.0)
    shape = tuple(kspace.data.shape[2:])
    zero = torch.zeros(shape, device=kspace.data.device)
    nothing = zero.bool()
    images = torch.zeros((kspace.n_states, *shape), dtype=torch.complex64, device=kspace.data.device)
    return Result(
        images=(ImageSeries("image", images),),
        maps=tuple(ParameterMap(name, zero, unit, nothing, text) for name, unit in MAPS.items()),
        notes=(text,),
    )
