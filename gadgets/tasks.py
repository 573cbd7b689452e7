"""What workers do for a scan: pure functions from files and small arguments to files and small results.

Every task can be repeated: the raw log is only read, and each task writes a file of its own.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from gadgets.average_checks import cancelling
from gadgets.buffer import SortedScan, assemble
from gadgets.device_errors import device_failure
from gadgets.devices import device_of_task
from gadgets.errors import GivenUp, JobFailed, OutOfMemory, SortError
from gadgets.memory_errors import out_of_memory
from gadgets.readouts import ReadoutGeometry
from gadgets.reports import FileReport
from gadgets.row_files import RowArrays, RowFiles
from gadgets.sample_checks import Samples, look_at, together
from gadgets.wire.readouts import read_samples
from recon_core.batches import batch_share
from recon_core.errors import DataError, ReconError
from recon_core.fourier import fft_centred
from recon_core.methods import methods
from recon_core.preprocess.coil_compression import compression_matrix
from recon_core.preprocess.noise import noise_covariance
from recon_core.preprocess.readout import finite_readouts, prepare_readouts
from recon_core.reconstruct import Recipe, finish, reconstruct, reconstruct_images, series_on_recon_matrix
from recon_core.sampling.coverage import missing_lines
from recon_core.settings import parse_settings
from recon_core.state_images import StateImages
from recon_core.types import K1, K2, ImageSeries, KSpace, ParameterMap, Result, ScanInfo

log = logging.getLogger(__name__)
J = TypeVar("J")
T = TypeVar("T")


@dataclass(frozen=True)
class LogSlice:
    """Readouts in the verbatim log: headers, offsets and sizes as the frame parser saw them."""

    path: str
    headers: NDArray[np.void]
    offsets: NDArray[np.int64]
    payload_bytes: NDArray[np.int64]

    def read(self) -> NDArray[np.complex64]:
        """Samples ``(n, coil, sample)``; all readouts of a slice of the log have one shape."""
        return read_samples(self.path, self.headers, self.offsets, self.payload_bytes)

    def take(self, rows: NDArray[np.intp]) -> LogSlice:
        return LogSlice(self.path, self.headers[rows], self.offsets[rows], self.payload_bytes[rows])


@dataclass(frozen=True)
class NoiseEstimate:
    """Covariance complex128 ``(coil, coil)`` of the noise readouts and how it was measured. Dwell time in s."""

    covariance: NDArray[np.complex128]
    dwell_time: float
    n_samples: int


def estimate_noise(source: LogSlice) -> NoiseEstimate:
    """Noise covariance of all noise readouts of a scan (they may differ in length), without the samples that are marked to be discarded.

    Raises
    ------
    DataError
        No samples, or too few.
    """
    total: NDArray[np.complex128] | None = None
    n_samples = 0
    shapes = np.stack(
        [source.headers[name].astype(np.int64) for name in ("number_of_samples", "discard_pre", "discard_post")], 1
    )
    kept = shapes[:, 0] - shapes[:, 1] - shapes[:, 2]
    if not (kept > 0).any():
        raise DataError(
            "no noise samples left", where="noise covariance", got=shapes[0], expected="more samples than discarded ones"
        )
    for shape in np.unique(shapes[kept > 0], axis=0):
        _, pre, post = shape.tolist()
        samples = source.take(np.flatnonzero((shapes == shape).all(1))).read()
        samples = samples[:, :, pre : samples.shape[2] - post]
        n = samples.shape[0] * samples.shape[2]
        part = np.asarray(noise_covariance(samples)) * (n - 1)
        total = part if total is None else total + part
        n_samples += n
    assert total is not None
    dwell = float(np.median(source.headers["sample_time_us"].astype(np.float64))) * 1e-6
    return NoiseEstimate(total / max(n_samples - 1, 1), dwell, n_samples)


@dataclass(frozen=True)
class ChunkJob:
    """Prepare consecutive readouts: ``keep`` are the positions in the chunk that carry k-space (the rest stays zero).

    ``placement`` is for every readout of the chunk. ``whitening`` is complex64 ``(coil, coil)`` or ``None``; ``matrices`` are
    complex64 ``(virtual coil, coil)`` by slice counter, or ``None``. The file holds complex64 ``(n, coil or virtual coil, x)``.
    ``first_row`` is the arrival number of the chunk's first readout.
    """

    source: LogSlice
    keep: NDArray[np.intp]
    placement: ReadoutGeometry
    whitening: NDArray[np.complex64] | None
    matrices: dict[int, NDArray[np.complex64]] | None
    out: str
    first_row: int = 0


def prepare_chunk(job: ChunkJob) -> Samples:
    """Whiten, flip, inverse-transform, crop and compress one chunk of readouts into its file; what their samples say by themselves.

    Raises
    ------
    DataError
        A sample that is not finite, with the readout's counters.
    """
    headers, place = job.source.headers, job.placement
    n_coils = int(headers["active_channels"][job.keep[0]])
    n_rows = n_coils if job.matrices is None else next(iter(job.matrices.values())).shape[0]
    rows = np.zeros((len(headers), n_rows, place.n_x), np.complex64)
    # one transform at a time for readouts of equal length, and of equal slice where coils are compressed by slice
    slices = headers["idx"]["slice"] if job.matrices is not None else np.zeros(len(headers), np.int64)
    group = np.stack([headers["number_of_samples"][job.keep].astype(np.int64), slices[job.keep].astype(np.int64)], axis=1)
    seen = []
    for length, number in np.unique(group, axis=0):
        chosen = job.keep[(group[:, 0] == length) & (group[:, 1] == number)]
        samples = job.source.take(chosen).read()
        _require_finite(samples, headers[chosen])
        first, last = int(place.first[chosen].max()), int(place.last[chosen].min())
        seen.append(look_at(samples[:, :, first:last] if first < last else samples, job.first_row + chosen))
        rows[chosen] = prepare_readouts(
            samples,
            first=place.first[chosen],
            last=place.last[chosen],
            reverse=place.reverse[chosen],
            k0_start=place.k0_start[chosen],
            n_encoded=place.n_encoded,
            n_x=place.n_x,
            whitening=_coil_transform(job, int(number)),
        ).numpy()
    _write(job.out, rows)
    return together(seen)


def _coil_transform(job: ChunkJob, number: int) -> torch.Tensor | None:
    if job.matrices is None:
        return None if job.whitening is None else torch.from_numpy(job.whitening)
    compression = _matrix_for(job.matrices, number)
    return torch.from_numpy(compression if job.whitening is None else compression @ job.whitening)


def _matrix_for(matrices: dict[int, NDArray[np.complex64]], number: int) -> NDArray[np.complex64]:
    """A slice's own matrix; for a slice that the header did not announce the first one's, until the whole scan is prepared again."""
    return matrices[number] if number in matrices else matrices[min(matrices)]


def _write(path: str, rows: NDArray[np.complex64]) -> None:
    # written, not mapped: a full memory file system answers ENOSPC here and would answer SIGBUS there
    with open(path, "r+b", buffering=0) as file:
        view = memoryview(rows.reshape(-1).view(np.uint8).data)
        while view:
            view = view[file.write(view) :]


def _require_finite(samples: NDArray[np.complex64], headers: NDArray[np.void]) -> None:
    finite = finite_readouts(samples)
    if finite.all():
        return
    bad = np.flatnonzero(~finite)
    idx = headers["idx"][bad[0]]
    place = f"slice {idx['slice']} k1 {idx['kspace_encode_step_1']} k2 {idx['kspace_encode_step_2']}"
    raise DataError(f"{len(bad)} readouts hold samples that are not finite", where=f"first at {place}", expected="numbers")


@dataclass(frozen=True)
class CompressionJob:
    """Find one compression matrix per slice from prepared central lines (rows by slice counter)."""

    rows: RowFiles
    central: dict[int, NDArray[np.intp]]
    n_virtual: int


def compression_matrices(job: CompressionJob) -> dict[int, NDArray[np.complex64]]:
    """Complex64 ``(virtual coil, coil)`` by slice counter."""
    found = {}
    for number, rows in job.central.items():
        lines = torch.from_numpy(job.rows[rows]).transpose(0, 1)
        found[number] = compression_matrix(lines, job.n_virtual).numpy()
    return found


@dataclass(frozen=True)
class RecompressJob:
    """Compress a chunk that was prepared before the matrices were known. ``shape`` is ``(n, coil, x)``."""

    path: str
    shape: tuple[int, int, int]
    slices: NDArray[np.int64]
    matrices: dict[int, NDArray[np.complex64]]
    out: str


def compress_chunk(job: RecompressJob) -> None:
    """Write the compressed rows and give the memory of the full ones back."""
    rows = np.fromfile(job.path, np.complex64).reshape(job.shape)
    n_virtual = next(iter(job.matrices.values())).shape[0]
    out = np.empty((job.shape[0], n_virtual, job.shape[2]), np.complex64)
    for number in np.unique(job.slices):
        chosen = job.slices == number
        out[chosen] = _matrix_for(job.matrices, int(number)) @ rows[chosen]
    _write(job.out, out)


Role = Literal["slice", "fallback", "preview"]
"""What a slice's images are for: final ones, those of a failed method's stand-in, or quick ones ahead of them."""


@dataclass(frozen=True)
class SliceJob:
    """Reconstruct one slice or slab from prepared readouts.

    ``previews``: whether the method's own previews are wanted. ``batch_share`` and ``cpu_only`` are for when memory is short.
    ``states``: first and one past the last of those that this task computes (`gadgets.slice_parts`); ``None`` for all.
    ``given_mask``: ``(z, y, x)`` on the console's matrix, where maps need one and somebody made it.
    """

    sorted_scan: SortedScan
    rows: RowFiles | RowArrays
    slice_index: int
    scan: ScanInfo
    recipe: Recipe
    noise_std: float | None
    report_folder: str
    role: Role = "slice"
    previews: bool = False
    device: str = "cpu"
    batch_share: float = 1.0
    cpu_only: bool = False
    states: tuple[int, int] | None = None
    given_mask: NDArray[np.bool_] | None = None

    @property
    def tag(self) -> str:
        """Under which name it reports."""
        return report_tag(self.role, self.slice_index, self.states)

    def packed(self, device: str) -> SliceJob:
        """The same job with its readouts in memory, for a worker that does not see this machine's files; it chooses ``device`` there."""
        if isinstance(self.rows, RowArrays):
            return replace(self, device=device)
        scan = self.sorted_scan
        own = [place.rows[place.slice == self.slice_index] for place in (scan.imaging, scan.calibration)]
        return replace(self, rows=self.rows.picked(np.concatenate(own)), device=device)


def report_tag(role: Role, slice_index: int, states: tuple[int, int] | None = None) -> str:
    """Ends with the slice; a task that computes some of its states has a name of its own."""
    part = "" if states is None else f"-from{states[0]:04d}"
    return f"{role}{part}-{slice_index:04d}"


class SliceReport(FileReport):
    """A slice's report, whose previews are on the console's matrix as its final images will be.

    A preview that cannot be shown is left out: the final images do not depend on it.
    """

    def __init__(self, job: SliceJob) -> None:
        super().__init__(Path(job.report_folder), job.tag)
        self._scan, self._wanted = job.scan, job.previews

    def preview(self, series: ImageSeries) -> None:
        if not self._wanted:
            return
        try:
            # a method without coil maps works on the console's matrix already
            moves = tuple(series.data.shape[-3:]) == self._scan.matrix
            super().preview(series_on_recon_matrix(series, self._scan) if moves else series)
        except GivenUp:
            raise
        except Exception as error:  # memory too short for a copy, say
            words = str(error) if isinstance(error, ReconError) else type(error).__name__
            log.warning("event=preview_failed task=%s error=%r", self.tag, words)


def reconstruct_slice(job: SliceJob) -> Result:
    """Sort, reconstruct and return one slice; arrays come back as numpy inside the ``Result``'s tensors.

    Raises
    ------
    ReconError
        From sorting, preprocessing or the method; ``JobFailed`` when memory ran out or the GPU failed. A fallback to plain Fourier
        (and a preview by it) is refused for undersampled data: its images would be aliased.
    """
    return told_of_memory(_reconstruct_slice, job)


def told_of_memory(compute: Callable[[J], T], job: J) -> T:
    """``compute(job)``; where it finds no memory (the allocator is emptied), or the GPU fails, the failure has our words."""
    try:
        return compute(job)
    except (MemoryError, RuntimeError) as error:
        told: JobFailed | None = out_of_memory(error) or device_failure(error)
        if told is None:
            raise
    # outside the handler the failed attempt's arrays are gone: what the allocator keeps of them is the next one's, or another's
    if isinstance(told, OutOfMemory) and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # a GPU that failed before, in a process that goes on with the CPU
            torch.cuda.empty_cache()
    raise told


def _reconstruct_slice(job: SliceJob) -> Result:
    report = SliceReport(job)
    images = state_images(job, report)
    with batch_share(job.batch_share):
        return portable(finish(images, job.scan, job.recipe.maps, report, as_tensor(job.given_mask)))


def as_tensor(mask: NDArray[np.bool_] | None) -> torch.Tensor | None:
    """A mask that crossed the process border."""
    return None if mask is None else torch.from_numpy(mask)


def state_images(job: SliceJob, report: SliceReport) -> StateImages:
    """The images of the states that are asked for, where they were computed."""
    report.progress(0.0)
    kspace = assemble(job.sorted_scan, job.slice_index, job.rows)
    if job.role == "slice" and (job.states is None or not job.states[0]):
        told = cancelling(job.sorted_scan, job.slice_index, job.rows, kspace)
        if told:
            report.warn(told)
    kspace = replace(kspace, noise_std=job.noise_std).to("cpu" if job.cpu_only else device_of_task(job.device))
    if job.role != "slice" and job.recipe.method == "fourier":
        _refuse_aliasing(kspace)
    with batch_share(job.batch_share):
        return reconstruct_images(kspace, job.scan, job.recipe, report, job.states)


def _refuse_aliasing(kspace: KSpace) -> None:
    """Missing lines inside the measured extent mean aliasing without coil maps."""
    missing, total = missing_lines(kspace.mask)
    if missing:
        raise SortError(
            f"plain Fourier cannot answer for undersampled data: {missing} of {total} lines missing",
            where="fallback",
            remedy="Acquire calibration lines or choose another chain.",
        )


def portable(result: Result) -> Result:
    """Tensors as numpy arrays, so that they cross the process border as plain bytes."""

    def series(s: ImageSeries) -> ImageSeries:
        return replace(s, data=s.data.contiguous().numpy())  # type: ignore[arg-type]

    def parameter(m: ParameterMap) -> ParameterMap:
        return replace(m, data=m.data.contiguous().numpy(), valid=m.valid.numpy())  # type: ignore[arg-type]

    return replace(
        result,
        images=tuple(series(s) for s in result.images),
        maps=tuple(parameter(m) for m in result.maps),
        extras=_plain(result.extras),
    )


def from_portable(result: Result) -> Result:
    """The inverse of what ``reconstruct_slice`` did to cross the process border."""

    def tensor(a: Any) -> torch.Tensor:
        return a if isinstance(a, torch.Tensor) else torch.from_numpy(a)

    return replace(
        result,
        images=tuple(replace(s, data=tensor(s.data)) for s in result.images),
        maps=tuple(replace(m, data=tensor(m.data), valid=tensor(m.valid)) for m in result.maps),
    )


def _plain(extras: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for k, v in extras.items()}


REHEARSED_DELAYS = (0.5, 1.0, 1.5, 2.0, 8.0)  # s; those of the shipped weights


def rehearse() -> None:
    """Run every stage and every method once on tiny data: a worker's first scan pays no import, planning or allocation."""
    n_states, n_coils, n = len(REHEARSED_DELAYS), 4, 32
    whole = np.zeros(2, np.intp)
    samples = np.ones((2, n_coils, n), np.complex64)
    prepare_readouts(samples, first=whole, last=whole + n, reverse=whole > 0, k0_start=whole, n_encoded=n, n_x=n)
    grid = torch.linspace(-1, 1, n)
    disc = ((grid[:, None] ** 2 + grid**2) < 0.5).to(torch.complex64)
    sensitivity = torch.stack([torch.exp(1j * c * grid[:, None] + 0.3 * c * grid) for c in range(n_coils)])
    contrast = torch.linspace(1, 2, n_states)[:, None, None, None, None]
    data = fft_centred(contrast * (sensitivity * disc)[:, None], (K2, K1)).to(torch.complex64)
    kspace = KSpace(data, torch.ones(n_states, 1, n), data[-1], torch.ones(1, n, dtype=torch.bool))
    place = ((1, n, n), (0.01, 0.2, 0.2))
    scan = ScanInfo(*place, *place, saturation_times=REHEARSED_DELAYS)
    for name, method in methods().items():
        try:
            settings: Any = parse_settings(method.Settings, getattr(method, "REHEARSAL", {}))
            reconstruct(kspace, scan, Recipe(name, settings))
        except Exception as error:  # weights of a site may break one method in ways nobody foresaw: the others have to start
            log.warning("event=rehearsal_failed method=%s error=%r", name, f"{type(error).__name__}: {error}")
