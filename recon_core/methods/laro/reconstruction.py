"""LARO as a method: a scan is brought to what the network was trained on, plane by plane along the readout, and back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from recon_core.errors import DataError, NumericalError
from recon_core.methods import llr
from recon_core.methods.laro.settings import Settings
from recon_core.methods.laro.starts import Share, least_squares, low_rank_or_refined, planes_of_air
from recon_core.methods.laro.weights import TrainedLaro, installed_weights
from recon_core.operators.planes import Planes
from recon_core.problem import Problem, check_kspace, check_maps, pose
from recon_core.types import ImageSeries, KSpace, Report, Result, ScanInfo

Tensor = torch.Tensor

NAME = "laro"
SUMMARY = "Multi-echo images from learned masks by unrolled ADMM with temporal feature fusion (LARO)"
NEEDS_COIL_MAPS = True
ROUNDING = 2e-3
"""Normalisation inside the network and solvers that stop at a tolerance amplify float32's last bit where there is no signal."""
FIDELITY = 0.2
"""What it has learned stays in images of complete data as well."""
LEAST_FACTOR = 0.01
"""Below it nothing changes any more, and conjugate gradients take longer."""

REHEARSAL = {"unrolls": "1", "start": "cg_sense"}

BYTES_PER_FEATURE = 4 * 6
"""Memory of inference per pixel, echo and channel: the features of one resolution, their copies and the skips."""


def reconstruct(kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report) -> Result:
    """Images of one slab by the installed weights that the settings name; see `reconstruct_with`.

    Raises
    ------
    WeightError
        Weights that are missing or damaged.
    DataError, CalibrationError, NumericalError
        As `reconstruct_with`.
    """
    *_, n2, n1, n0 = kspace.data.shape
    name = settings.weights_for((n2, n1) if kspace.is_3d else (n1, n0))
    trained = installed_weights(name, kspace.data.device, settings.precision)
    return reconstruct_with(trained, kspace, scan, settings, report)


def reconstruct_with(
    trained: TrainedLaro, kspace: KSpace, scan: ScanInfo, settings: Settings, report: Report, given: Tensor | None = None
) -> Result:
    """Unrolled ADMM (Eq. 7) on each plane (k2, k1) of a slab; a single slice is one plane (x, y).

    K-space is scaled so that the 99.9th percentile of its calibration images equals that of the training scans. Echoes are fused in the
    order of their times where the header has them. Which positions were sampled is read from the data, for each echo; the
    number of echoes, coils and positions is free.

    Parameters
    ----------
    trained
        On the device of the k-space.
    kspace
        With coil maps. Averages count by their number.
    scan
        ``echo_times`` in s, one per state, or none.
    given
        First images that somebody has made, complex ``(state, z, y, x)`` in the k-space's units: nothing is spent on others.

    Returns
    -------
    Result
        Images complex64 ``(state, z, y, x)``; ``quality``: relative residual of the normal equations, noise, iterations.

    Raises
    ------
    DataError
        Echo times for another number of echoes; an echo without samples; k-space that does not fit together.
    CalibrationError
        No usable coil maps.
    NumericalError
        Images that are not finite.

    References
    ----------
    LARO (Zhang et al., doi:10.1002/mrm.29582), Eqs. 1, 2, 7 and 8.
    """
    where = f"slice {scan.slice_index}"
    check_kspace(kspace, where)
    check_maps(kspace, where)
    order = echo_order(kspace, scan, where).to(kspace.data.device)
    if not torch.equal(order, torch.sort(order).values):  # k-space is large: no copy of it where none is needed
        kspace = kspace.in_order(order)
    if not bool((kspace.data != 0).any()):
        return _nothing(kspace, report)
    problem = pose(kspace, where, report)
    start = settings.start if settings.start != "weights" else trained.start
    unrolls = settings.unrolls or trained.network.settings.unrolls
    planes = _planes(problem, kspace, trained.amplitude)
    if given is None:
        first = _first_images(start, problem, planes, trained.amplitude, report)
    else:
        first = planes.enter(given[order] * (trained.amplitude / problem.scale)).contiguous()
    images = torch.empty_like(planes.rhs)
    factor = rho_factor(problem.noise * trained.amplitude, trained.noise)
    air = planes_of_air(first / trained.amplitude, problem.noise) & planes.is_3d
    notes: tuple[str, ...] = ()
    if bool(air.all()):
        notes = (f"{NAME}: no plane stands out from the noise: the first images ({start}) are sent",)
        report.warn(notes[0])
    for chosen in planes.groups(trained, settings.memory_mb):
        operator = Planes(planes.maps[chosen], planes.sampling, planes.axes)
        with torch.no_grad():
            found = trained.network(operator, planes.rhs[chosen], first[chosen], unrolls, factor)[-1]
            images[chosen] = torch.where(air[chosen, None, None, None], first[chosen], found)
        report.progress(0.5 + 0.4 * chosen.stop / len(images), NAME)
    if not bool(torch.isfinite(torch.view_as_real(images)).all()):
        raise NumericalError("the network's result is not finite", where=where, remedy="The chain's fallback can answer")
    del first
    working = problem.operator.enter_image(planes.leave(images)).div_(trained.amplitude)
    del images, planes
    if settings.low_rank_steps and kspace.n_states > 1 and not bool(air.all()):
        working = _given_back(problem, working, air, settings.low_rank_steps, report)
    residual, size = (
        float(torch.linalg.vector_norm(torch.view_as_real(x)))
        for x in (problem.operator.normal(working).sub_(problem.rhs), problem.rhs)
    )
    series = problem.leave(working)[torch.argsort(order)]
    report.progress(1.0)
    return Result(
        images=(ImageSeries("image", series, _origin(trained, unrolls, "given" if given is not None else start)),),
        quality={
            "iterations": float(unrolls),
            "residual": residual / size if size > 0 else 0.0,
            "noise": problem.noise,
        },
        notes=notes,
    )


def _given_back(problem: Problem, working: Tensor, air: Tensor, steps: int, report: Report) -> Tensor:
    """A few steps of locally low rank from the network's images: they give back what it smoothed away.

    The network sees a plane, pulls what is small and unlike its surroundings towards them, most of all in late echoes, and
    data consistency cannot say no to it where nothing was sampled. Low rank sees blocks of all three axes, and does not know what heads
    look like. Planes of air keep what they had.
    """
    calm = working[:, air] if len(air) == working.shape[1] else None
    found = llr.refine(problem, working, steps, Share(report, 0.9, 1.0)).solution
    if calm is not None:
        found[:, air] = calm
    return found


def rho_factor(noise: float, trained: float) -> float:
    """On the penalty of the data consistency: the square of the noise's ratio, as the data's weight in a least-squares problem is.

    What was learned for noisy data pulls clean data away from what was measured: without this, complete data of a phantom come back
    with 7 % less R2*. Noise above the training's changes nothing: its range was learned.
    """
    return min(1.0, max(LEAST_FACTOR, (noise / trained) ** 2)) if trained > 0 else 1.0


def echo_order(kspace: KSpace, scan: ScanInfo, where: str) -> Tensor:
    """States in the order of their echo times, as they come where the header has none.

    Raises
    ------
    DataError
        Another number of times than of states, or a time that occurs twice.
    """
    times = scan.echo_times
    if not times:
        return torch.arange(kspace.n_states)
    if len(times) != kspace.n_states or len(set(times)) < len(times):
        raise DataError(
            "count of echo times and of echoes differ" if len(times) != kspace.n_states else "an echo time occurs twice",
            where=where,
            got=f"{len(times)} times, {kspace.n_states} states",
            remedy="Check the TE list of the header, and that every echo was sent",
        )
    return torch.argsort(torch.tensor(times, dtype=torch.float64), stable=True)


@dataclass(frozen=True)
class _PlaneProblems:
    """A slab as planes ``(plane, echo, z, y)``, a slice as the one plane ``(1, echo, x, y)``, in the network's units."""

    rhs: Tensor
    maps: Tensor
    sampling: Tensor
    axes: tuple[int, ...]
    is_3d: bool

    def enter(self, images: Tensor) -> Tensor:
        """Centred ``(echo, z, y, x)`` to planes."""
        return images.movedim(-1, 0) if self.is_3d else images[:, 0].mT[None]

    def leave(self, images: Tensor) -> Tensor:
        """Planes to centred ``(echo, z, y, x)``."""
        return images.movedim(0, -1) if self.is_3d else images[0].mT[:, None]

    def groups(self, trained: TrainedLaro, memory_mb: float) -> list[slice]:
        """Planes that are reconstructed together; every group but the last has the same number, so that kernels are reused."""
        settings = trained.network.settings
        per_plane = self.rhs[0].numel() * (settings.channels + settings.features[0]) * BYTES_PER_FEATURE
        per_plane += self.rhs[0].numel() * self.maps.shape[1] * 8 * 4  # coil images of the data consistency
        step = max(1, int(memory_mb * 2**20 / per_plane))
        return [slice(k, min(k + step, len(self.rhs))) for k in range(0, len(self.rhs), step)]


def _planes(problem: Problem, kspace: KSpace, amplitude: float) -> _PlaneProblems:
    assert kspace.coil_maps is not None
    operator = problem.operator
    rhs = operator.leave_image(problem.rhs) * amplitude
    sampling = operator.weights.square()
    if kspace.is_3d:
        return _PlaneProblems(rhs.movedim(-1, 0).contiguous(), kspace.coil_maps.movedim(-1, 0), sampling, (-2, -1), True)
    return _PlaneProblems(rhs[:, 0].mT[None].contiguous(), kspace.coil_maps[:, 0].mT[None], sampling, (-1,), False)


def _first_images(start: str, problem: Problem, planes: _PlaneProblems, amplitude: float, report: Report) -> Tensor:
    """First images in the network's units."""
    if start == "zero_filled":
        return planes.rhs
    own = Share(report, 0.0, 0.5)
    images = least_squares(problem) if start == "cg_sense" else low_rank_or_refined(start, problem, own)
    return planes.enter(problem.operator.leave_image(images) * amplitude).contiguous()


def _origin(trained: TrainedLaro, unrolls: int, start: str) -> str:
    """How the images came about, for their comments: what was done, which a site's settings may have changed."""
    digest = str(trained.facts.get("sha256", ""))[:8] or "unsaved"
    name = Path(str(trained.facts.get("file", ""))).stem
    return f"LARO, weights {name} {digest}, {unrolls} iteration{'s' if unrolls > 1 else ''}, from {start} images"


def _nothing(kspace: KSpace, report: Report) -> Result:
    """Images of data that are all zero: a network has biases and would see something."""
    text = f"{NAME}: all samples are zero"
    report.warn(text)
    report.progress(1.0)
    shape = (kspace.n_states, *kspace.data.shape[2:])
    images = torch.zeros(shape, dtype=torch.complex64, device=kspace.data.device)
    return Result(images=(ImageSeries("image", images, text),), notes=(text,))
