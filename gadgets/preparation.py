"""Work on readouts while the scan still runs: whitening, readout transform, crop and coil compression, chunk by chunk.

The connection's thread calls ``advance`` after every batch; that only hands tasks to workers and never waits. Everything that
decides a result depends on the order of the readouts alone, never on timing: chunk borders are readout numbers, the noise
measurement is what precedes the first imaging readout, and coil compression begins at the first chunk border at which every
slice has had its calibration lines. So every front and every repetition of a scan computes the same bits.

How many slices come is what the header announces, as far as it does. Where it is silent or wrong the last readout shows it, and every
slice gets virtual coils of its own all the same: those of another one may hold next to nothing of its signal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.compute_pool import Budget
from gadgets.errors import SortError, SpoolError
from gadgets.jobs import Scope
from gadgets.noise_store import NoiseStore
from gadgets.readouts import Kind, ReadoutIndex, chosen_encoding, classify, readout_geometry
from gadgets.row_files import RowFiles
from gadgets.sample_checks import Samples, together
from gadgets.scan_checks import COMPLEX_BYTES, MAX_EXPANSION, refuse_out_of_proportion
from gadgets.scratch import Scratch
from gadgets.tasks import (
    ChunkJob,
    CompressionJob,
    LogSlice,
    NoiseEstimate,
    RecompressJob,
    compress_chunk,
    compression_matrices,
    estimate_noise,
    prepare_chunk,
)
from gadgets.waiting import Waiting
from gadgets.wire.header import MrdHeader
from recon_core.preprocess.noise import dead_channels, whitening_matrix
from recon_core.preprocess.settings import PreprocessSettings

log = logging.getLogger(__name__)

DWELL_TIMES = (1e-9, 1.0)
"""s between two samples: no receiver is quicker or slower, and a header that says so says nothing."""

CHUNK_BYTES = 8 << 20
"""Raw bytes prepared as one task: small enough that little is left after the last readout."""

CALIBRATION_HALF_WIDTH = 12
"""Lines within this distance of the k-space centre decide the coil compression ..."""

CALIBRATION_LINES = 24
"""... as soon as every slice has had so many of them."""


@dataclass
class Chunk:
    """One run of readouts: its task, its file, which coils the file holds, and the task that has seen the samples."""

    future: Future[Any] | None
    path: str
    compressed: bool = False
    seen: Future[Samples] | None = None


@dataclass
class Calibration:
    """Central lines seen so far: rows by slice counter, in arrival order. ``n_slices`` is infinite while nobody knows how many come."""

    n_slices: float
    rows: dict[int, list[NDArray[np.intp]]] = field(default_factory=dict)

    @property
    def enough(self) -> set[int]:
        """Slices that have had their lines."""
        return {number for number, rows in self.rows.items() if sum(map(len, rows)) >= CALIBRATION_LINES}

    @property
    def complete(self) -> bool:
        return len(self.enough) >= self.n_slices


class Preparation:
    """Raw readouts in the log -> prepared rows in scratch files, as far ahead as the data allow.

    Parameters
    ----------
    index
        The scan's readouts so far; shared with the scan, which appends to it.
    header, acquisition, settings
        What the scanner says and what the chain asks for.
    raw_path
        Where the verbatim log lies now.
    jobs, scratch, noise
        Workers, the scan's files, and the store of noise measurements of other scans.
    warn
        Says something to the operator.
    budget
        What all of it together may compute; ``None``: as long as it takes.
    sign
        Tells the operator, every few seconds while ``rows`` waits, that the server is at it; may raise (see ``Waiting``).
    """

    def __init__(
        self,
        index: ReadoutIndex,
        header: MrdHeader,
        acquisition: AcquisitionSettings,
        settings: PreprocessSettings,
        raw_path: Callable[[], str],
        jobs: Scope,
        scratch: Scratch,
        noise: NoiseStore | None,
        warn: Callable[[str], None],
        chunk_bytes: int = CHUNK_BYTES,
        *,
        budget: Budget | None = None,
        sign: Callable[[], None] | None = None,
    ) -> None:
        self._index, self._header, self._acquisition, self._settings = index, header, acquisition, settings
        self._raw_path, self._jobs, self._scratch, self._store, self._warn = raw_path, jobs, scratch, noise, warn
        self._chunk_bytes, self._budget, self._sign = chunk_bytes, budget, sign or _unheard
        self._size = 0  # readouts per chunk, known with the first readout that carries k-space
        self._n_channels = 0
        self._n_x = 0
        self._noise_rows: NDArray[np.intp] = np.zeros(0, np.intp)
        self._noise: Future[NoiseEstimate] | None = None
        self._whitening: NDArray[np.complex64] | None = None
        self._chunks: list[Chunk] = []
        self._calibration: Calibration | None = None
        self._first_compressed: int | None = None  # chunk number from which on rows are written compressed
        self._matrices: Future[dict[int, NDArray[np.complex64]]] | None = None

    @property
    def whitened(self) -> bool:
        """Whether rows are (or will be) white; known after ``rows``."""
        return self._whitening is not None

    def close(self) -> None:
        """The scan is over: what it is told by is let go, which would keep the scan and its readouts for as long as this."""
        self._warn = self._sign = _unheard

    # ---- while reading -------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        """Start every task whose input is complete. Never waits.

        Raises
        ------
        SortError
            The readouts cannot belong to one scan.
        """
        if self._size == 0 and not self._begin():
            return
        self._dispatch(len(self._index) // self._size)

    def _begin(self) -> bool:
        headers = self._index.headers
        carriers = np.flatnonzero(_carries(headers, self._header, self._acquisition))
        if not len(carriers):
            return False
        first = int(carriers[0])
        self._n_channels = int(headers["active_channels"][first])
        if self._n_channels == 0:
            raise SortError("a readout without channels", where=f"readout {first}", got=0, expected="at least 1")
        bytes_each = 342 + 8 * int(headers["number_of_samples"][first]) * self._n_channels
        self._size = max(8, self._chunk_bytes // bytes_each)
        if self._settings.coil_compression == "svd" and self._n_channels > self._settings.virtual_coils:
            limit = chosen_encoding(self._header, self._acquisition).limits.get("slice")
            self._calibration = Calibration(math.inf if limit is None else limit.maximum - limit.minimum + 1)
        kind = classify(headers[:first], self._header, self._acquisition)
        self._start_noise(np.flatnonzero(kind == Kind.NOISE))
        return True

    def _start_noise(self, rows: NDArray[np.intp]) -> None:
        self._noise_rows = rows
        if not self._settings.prewhiten:
            return
        if len(rows):
            channels = np.unique(self._index.headers["active_channels"][rows])
            if channels.tolist() != [self._n_channels]:
                raise SortError(
                    "the noise readouts have other channels", where="scan", got=channels, expected=self._n_channels
                )
            self._noise = self._jobs.submit(estimate_noise, self._log_slice(rows), budget=self._budget)
        else:
            self._use_stored_noise()

    def _use_stored_noise(self) -> None:
        wanted = self._header.noise_dependency
        if wanted is None or self._store is None:
            return
        stored = self._store.get(wanted)
        if stored is None:
            self._warn("the noise measurement that this scan depends on is not stored; images are not whitened")
            return
        labels = self._header.labels_of(self._n_channels)
        covariance = stored.of_coils(labels, self._n_channels)
        if covariance is not None:
            self._whitening = self._whiten(covariance, stored.dwell_time)
            return
        got = f"{stored.covariance.shape[0]} channels in the noise, {self._n_channels} in the scan"
        if others := [label for label in labels if stored.coil_labels and label not in stored.coil_labels]:
            got += f", without noise: {', '.join(others[:8])}"
        self._warn(f"the stored noise measurement does not fit this scan ({got}); images are not whitened")

    def _whiten(self, covariance: NDArray[np.complex128], noise_dwell: float) -> NDArray[np.complex64] | None:
        """``None`` where a dwell time is missing: noise and images then have no common scale."""
        headers = self._index.headers
        first = np.flatnonzero(_carries(headers, self._header, self._acquisition))[0]
        dwell = float(headers["sample_time_us"][first]) * 1e-6
        shortest, longest = DWELL_TIMES
        if not (shortest <= dwell <= longest and shortest <= noise_dwell <= longest):
            self._warn(
                f"no dwell time: sample_time_us is {1e6 * noise_dwell:g} in the noise readouts and {1e6 * dwell:g} in the imaging ones, "
                f"where both have to be {1e6 * shortest:g} to {1e6 * longest:g}; "
                "images are not whitened, and noise is estimated from outer k-space"
            )
            return None
        matrix = torch.from_numpy(covariance)
        silent = dead_channels(matrix)
        if silent:
            self._warn(f"channels without noise are left out: {', '.join(map(str, silent))}")
        whitening = whitening_matrix(
            matrix,
            dwell_time=dwell,
            noise_dwell_time=noise_dwell,
            relative_bandwidth=self._header.relative_noise_bandwidth or self._settings.relative_noise_bandwidth,
            silent=silent,
        )
        return whitening.numpy()

    def _dispatch(self, n_chunks: int, waiting: Waiting | None = None) -> None:
        """Hand over chunks up to ``n_chunks``, as far as whitening and compression are known, or all, by ``waiting`` for those."""
        if self._noise is not None and self._whitening is None:
            if waiting is not None:
                waiting.until(self._noise)
            if not self._noise.done():
                return
            self._settle_noise(self._noise.result())
        while len(self._chunks) < n_chunks:
            number = len(self._chunks)
            if (
                self._first_compressed is not None
                and number >= self._first_compressed
                and not self._compression_known(waiting)
            ):
                return
            self._submit(number)
            if self._calibration is not None and self._first_compressed is None and self._calibration.complete:
                self._first_compressed = number + 1
        if self._first_compressed is not None:
            self._compression_known(waiting)

    def _settle_noise(self, estimate: NoiseEstimate) -> None:
        self._whitening = self._whiten(estimate.covariance, estimate.dwell_time)
        if self._whitening is None:
            self._noise = None
            return
        if self._store is not None and self._header.measurement_id:
            try:
                labels = self._header.labels_of(len(estimate.covariance))
                self._store.put(self._header.measurement_id, estimate.covariance, estimate.dwell_time, labels)
            except SpoolError as error:  # this scan has its noise; only those that depend on it will miss it
                self._warn(f"the noise measurement could not be stored for later scans: {error}")

    def _submit(self, number: int) -> None:
        start = number * self._size
        rows = np.arange(start, min(start + self._size, len(self._index)))
        source = self._log_slice(rows)
        placement = readout_geometry(source.headers, self._header, self._acquisition, first_index=start)
        keep = np.flatnonzero(placement.is_image)
        if not len(keep):
            self._chunks.append(Chunk(None, ""))
            return
        channels = source.headers["active_channels"][keep]
        if (channels != self._n_channels).any():
            bad = int(np.argmax(channels != self._n_channels))
            where = f"readout {start + int(keep[bad])}"
            raise SortError("the number of channels changed", where=where, got=int(channels[bad]), expected=self._n_channels)
        self._n_x = placement.n_x
        sampled = int(source.headers["number_of_samples"][keep].astype(np.int64).sum()) * self._n_channels * COMPLEX_BYTES
        grid = len(rows) * self._n_channels * placement.n_encoded * COMPLEX_BYTES
        given = f"for {len(keep)} readouts on a grid of {placement.n_encoded}"
        refuse_out_of_proportion("the readout grid", grid, sampled, given, MAX_EXPANSION)
        matrices = None
        if self._first_compressed is not None and number >= self._first_compressed:
            assert self._matrices is not None
            matrices = self._matrices.result()
        elif self._calibration is not None:
            self._note_calibration(rows[keep], source.headers[keep])
        n_coils = self._n_channels if matrices is None else self._settings.virtual_coils
        out = str(self._scratch.allocate(len(rows) * n_coils * placement.n_x * 8))
        job = ChunkJob(source, keep, placement, self._whitening, matrices, out, start)
        seen = self._jobs.submit(prepare_chunk, job, budget=self._budget)
        self._chunks.append(Chunk(seen, out, matrices is not None, seen))

    def _note_calibration(self, rows: NDArray[np.intp], headers: NDArray[np.void]) -> None:
        assert self._calibration is not None
        encoding = chosen_encoding(self._header, self._acquisition)
        central = np.ones(len(rows), bool)
        for name, n in (
            ("kspace_encode_step_1", encoding.encoded_matrix[1]),
            ("kspace_encode_step_2", encoding.encoded_matrix[0]),
        ):
            limit = encoding.limits.get(name)
            centre = n // 2 if limit is None else limit.center
            central &= np.abs(headers["idx"][name].astype(np.int64) - centre) <= CALIBRATION_HALF_WIDTH
        slices = headers["idx"]["slice"]
        for number in np.unique(slices[central]):
            self._calibration.rows.setdefault(int(number), []).append(rows[central & (slices == number)])

    def _compression_known(self, waiting: Waiting | None) -> bool:
        """Whether the compression matrices exist; starts their task, and the compression of what lies already there."""
        assert self._calibration is not None and self._first_compressed is not None
        early = self._chunks[: self._first_compressed]
        if self._matrices is None:
            futures = [c.future for c in early if c.future is not None]
            if waiting is not None:
                for f in futures:
                    waiting.until(f)
            if not all(f.done() for f in futures):
                return False
            for f in futures:
                f.result()
            rows = {number: np.concatenate(parts) for number, parts in self._calibration.rows.items()}
            job = CompressionJob(
                self._row_files(len(early) * self._size, compressed=False), rows, self._settings.virtual_coils
            )
            self._matrices = self._jobs.submit(compression_matrices, job, budget=self._budget)
        if waiting is not None:
            waiting.until(self._matrices)
        if not self._matrices.done():
            return False
        matrices = self._matrices.result()
        for number, chunk in enumerate(early):
            if chunk.future is not None and not chunk.compressed:
                self._recompress(number, chunk, matrices)
        return True

    def _recompress(self, number: int, chunk: Chunk, matrices: dict[int, NDArray[np.complex64]]) -> None:
        start = number * self._size
        slices = self._index.headers["idx"]["slice"][start : start + self._size]
        out = str(self._scratch.allocate(len(slices) * self._settings.virtual_coils * self._n_x * 8))
        job = RecompressJob(chunk.path, (len(slices), self._n_channels, self._n_x), slices.astype(np.int64), matrices, out)
        full = Path(chunk.path)
        chunk.future, chunk.path, chunk.compressed = self._jobs.submit(compress_chunk, job, budget=self._budget), out, True
        # only after success: a task that is repeated because its worker died still needs its input
        chunk.future.add_done_callback(lambda done: full.unlink(missing_ok=True) if done.exception() is None else None)

    def _log_slice(self, rows: NDArray[np.intp]) -> LogSlice:
        index = self._index
        return LogSlice(self._raw_path(), index.headers[rows], index.offsets[rows], index.payload_bytes[rows])

    # ---- after the last readout ----------------------------------------------------------------------------------------

    def rows(self) -> RowFiles:
        """All prepared readouts; waits for the tasks that are still running.

        Raises
        ------
        ReconError
            No readout carries k-space, a task failed, the limit was reached, or the operator is gone.
        """
        waiting = Waiting(self._sign)
        if self._size == 0 and not self._begin():
            raise SortError("no readout carries k-space", where="scan", got=f"{len(self._index)} other readouts")
        kind = classify(self._index.headers, self._header, self._acquisition)
        noise_rows = np.flatnonzero(kind == Kind.NOISE)
        if len(noise_rows) and not len(self._noise_rows) and self._settings.prewhiten:
            self._start_again(noise_rows, waiting)
        n_chunks = -(-len(self._index) // self._size)
        self._dispatch(n_chunks, waiting)
        self._compress_what_came(n_chunks, waiting)
        for chunk in self._chunks:
            if chunk.future is not None:
                waiting.result(chunk.future)
        return self._row_files(len(self._index), compressed=self._first_compressed is not None)

    def samples(self) -> Samples:
        """What the samples of all readouts that carry k-space say by themselves; after ``rows``."""
        return together([chunk.seen.result() for chunk in self._chunks if chunk.seen is not None])

    def _compress_what_came(self, n_chunks: int, waiting: Waiting) -> None:
        """The header was silent or wrong about the slices: each of those that came gets virtual coils of its own."""
        if self._calibration is None:
            return
        carriers = _carries(self._index.headers, self._header, self._acquisition)
        slices = set(np.unique(self._index.headers["idx"]["slice"][carriers]).tolist())
        if self._first_compressed is not None and slices <= self._calibration.enough:
            return
        self._calibration.n_slices = len(slices)
        if self._first_compressed is not None:
            self._drop_chunks(waiting)
            self._dispatch(n_chunks, waiting)
        elif self._calibration.complete:
            self._first_compressed = n_chunks
            self._compression_known(waiting)

    def _start_again(self, noise_rows: NDArray[np.intp], waiting: Waiting) -> None:
        """The noise readouts came after the first imaging readout: nothing that was prepared is white."""
        self._drop_chunks(waiting)
        self._whitening = None
        self._start_noise(noise_rows)

    def _drop_chunks(self, waiting: Waiting) -> None:
        for chunk in self._chunks:
            if chunk.future is not None:
                waiting.until(chunk.future)
                Path(chunk.path).unlink(missing_ok=True)
        self._chunks, self._matrices, self._first_compressed = [], None, None
        if self._calibration is not None:
            self._calibration.rows.clear()

    def _row_files(self, n_readouts: int, *, compressed: bool) -> RowFiles:
        n_coils = self._settings.virtual_coils if compressed else self._n_channels
        paths = tuple(chunk.path for chunk in self._chunks)
        return RowFiles(paths, self._size, min(n_readouts, len(self._index)), n_coils, self._n_x)


def _carries(headers: NDArray[np.void], header: MrdHeader, acquisition: AcquisitionSettings) -> NDArray[np.bool_]:
    return classify(headers, header, acquisition) <= Kind.CALIBRATION_AND_IMAGING


def _unheard(*message: str) -> None:
    """In place of a scan that is over."""
