"""The stages of one scan: index while reading, prepare while scanning, reconstruct after the last readout, send.

The connection's thread calls ``readouts`` for every batch; that call only records headers and hands chunks to workers. Chunk
borders depend on readout numbers alone, never on timing, so every front and every repetition computes the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gadgets.buffer import SortedScan, sort_readouts
from gadgets.chain import Chain, load_chain
from gadgets.errors import SortError
from gadgets.images import ImageWriter, sending_order
from gadgets.jobs import Jobs, ReportReader, Scratch
from gadgets.noise_store import NoiseStore
from gadgets.preparation import CHUNK_BYTES, Preparation
from gadgets.readouts import Kind, ReadoutIndex, classify
from gadgets.spool import ScanLog
from gadgets.tasks import LogSlice, RowFiles, SliceJob, estimate_noise, from_portable, reconstruct_slice
from gadgets.wire import codec
from gadgets.wire.events import Readouts, Waveform
from gadgets.wire.header import MrdHeader
from recon_core.errors import ReconError
from recon_core.preprocess.noise import WHITENED_NOISE_STD
from recon_core.reconstruct import Recipe
from recon_core.types import Result

log = logging.getLogger(__name__)

PROGRESS_SECONDS = 2.0
MAX_WARNINGS = 20  # lines to the operator in one scan


@dataclass(frozen=True)
class Services:
    """What every scan of a server shares. ``configs`` is the folder of chain files, the shipped one when ``None``."""

    jobs: Jobs
    noise: NoiseStore | None = None
    configs: Path | None = None
    device: str = "cpu"
    chunk_bytes: int = CHUNK_BYTES


class Scan:
    """One scan from its first readout to its images.

    Parameters
    ----------
    chain, header
        What to reconstruct with, and what the scanner says about the scan.
    raw
        The verbatim log that the connection appends to.
    services
        Executors and stores of the server.
    say
        Sends one line to the operator at once; may be called from the connection's thread only.
    """

    def __init__(
        self, chain: Chain, header: MrdHeader, raw: ScanLog, services: Services, say: Callable[[str], None]
    ) -> None:
        self.chain, self.header, self.raw, self.services, self.say = chain, header, raw, services, say
        self.index = ReadoutIndex()
        self.n_waveforms = 0
        self.scratch = Scratch()
        self.tasks = services.jobs.scope()
        self._said: set[str] = set()
        self.preparation = Preparation(
            self.index,
            header,
            chain.acquisition,
            chain.preprocess,
            raw_path=lambda: str(raw.path),
            jobs=self.tasks,
            scratch=self.scratch,
            noise=services.noise,
            warn=self._warn,
            chunk_bytes=services.chunk_bytes,
        )

    # ---- while the scan runs -------------------------------------------------------------------------------------------

    def readouts(self, event: Readouts) -> None:
        """Record a batch and start whatever can start. Never waits for computing.

        Raises
        ------
        SortError
            The readouts cannot belong to one scan.
        """
        self.index.append(event.headers, event.offsets, event.payload_bytes)
        self.preparation.advance()

    def waveform(self, event: Waveform) -> None:
        """Waveforms stay in the raw log; time stamps of the readouts are what re-binning uses."""
        self.n_waveforms += 1

    def _warn(self, message: str) -> None:
        if message not in self._said:
            log.warning("event=warning message=%r", message)
        self._tell(message)

    def _tell(self, message: str) -> None:
        """To the operator: each warning once, and not by the hundred, or the console would show nothing else."""
        if message in self._said:
            return
        self._said.add(message)
        if len(self._said) <= MAX_WARNINGS:
            self.say(f"WRN {message}\n")
        elif len(self._said) == MAX_WARNINGS + 1:
            self.say("WRN there are more warnings; the server's log has them\n")

    # ---- after the last readout ----------------------------------------------------------------------------------------

    def finish(self) -> Iterator[bytes]:
        """Images (and words) as encoded MRD messages, in the order in which they are to be sent.

        Raises
        ------
        ReconError
            When no image can be made; everything received stays in the raw log.
        """
        started = time.perf_counter()
        try:
            if len(self.index) == 0:
                raise SortError("no readouts", where="scan", got=f"{self.n_waveforms} waveforms", expected="readouts")
            kind = classify(self.index.headers, self.header, self.chain.acquisition)
            if (kind == Kind.NOISE).any() and not (kind <= Kind.CALIBRATION_AND_IMAGING).any():
                yield from self._noise_only(np.flatnonzero(kind == Kind.NOISE))
                return
            sorted_scan = sort_readouts(self.index.headers, self.header, self.chain.acquisition)
            for note in sorted_scan.notes:
                self._warn(note)
            rows = self.preparation.rows()
            yield from self._reconstruct(sorted_scan, rows, started)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Drop the scan's tasks and intermediate files; the raw log is the connection's."""
        self.tasks.abandon()
        self.scratch.close()

    def _noise_only(self, rows: NDArray[np.intp]) -> Iterator[bytes]:
        """A separate noise scan: keep its covariance for the scans that depend on it."""
        index = self.index
        source = LogSlice(str(self.raw.path), index.headers[rows], index.offsets[rows], index.payload_bytes[rows])
        estimate = self.tasks.submit(estimate_noise, source).result()
        if self.services.noise is None or not self.header.measurement_id:
            raise SortError(
                "a noise measurement that cannot be stored", where="scan", expected="a measurementID in the header"
            )
        self.services.noise.put(self.header.measurement_id, estimate.covariance, estimate.dwell_time)
        channels = estimate.covariance.shape[0]
        yield codec.text(f"INF noise measurement stored: {channels} channels, {estimate.n_samples} samples\n")

    def _reconstruct(self, sorted_scan: SortedScan, rows: RowFiles, started: float) -> Iterator[bytes]:
        writer = ImageWriter(self.header, self.chain.name, self.chain.output)
        spare: ImageWriter | None = None
        reports = ReportReader(self.scratch.path)
        pending: dict[int, Future[Result]] = {}
        n_images = 0
        ahead = max(1, self.services.jobs.workers) + 1
        order = sending_order(sorted_scan.n_slices, scaled=writer.pixel_type.kind == "u")
        for place, number in enumerate(order):
            for upcoming in order[place : place + ahead]:
                if upcoming not in pending:
                    pending[upcoming] = self._submit_slice(sorted_scan, rows, upcoming, self.chain)
            result, failure = self._await(pending[number], reports, number, place, sorted_scan.n_slices)
            if result is None:
                assert failure is not None
                result, name = self._fall_back(sorted_scan, rows, number, place, failure, reports)
                if spare is None:
                    spare = writer.for_fallback(name)
                chosen = spare
            else:
                chosen = writer
            result = from_portable(result)
            wanted = self.chain.output.phase or self.chain.output.complex
            if wanted and not any(series.data.is_complex() for series in result.images):
                self._warn("only magnitudes exist here, no phase (fourier has one with combine = adaptive)")
            pending[number] = Future()  # the result's memory is not needed twice
            for message in chosen.images(sorted_scan, number, result):
                n_images += 1
                yield message
        seconds = time.perf_counter() - started
        log.info(
            "event=scan_done chain=%s images=%d slices=%d seconds=%.3f",
            self.chain.name,
            n_images,
            sorted_scan.n_slices,
            seconds,
        )
        yield codec.text(f"INF {self.chain.name}: {n_images} images in {seconds:.1f} s after the last readout\n")

    def _submit_slice(
        self, sorted_scan: SortedScan, rows: RowFiles, number: int, chain: Chain, *, as_fallback: bool = False
    ) -> Future[Result]:
        job = SliceJob(
            sorted_scan=sorted_scan,
            rows=rows,
            slice_index=number,
            scan=sorted_scan.scan_info(number),
            recipe=Recipe(chain.method, chain.settings, chain.preprocess, chain.coils),
            noise_std=WHITENED_NOISE_STD if self.preparation.whitened else None,
            report_folder=str(self.scratch.path),
            as_fallback=as_fallback,
            device=self.services.device,
        )
        return self.tasks.submit(reconstruct_slice, job)

    def _await(
        self, future: Future[Result], reports: ReportReader, number: int, n_done: int, n_slices: int
    ) -> tuple[Result | None, BaseException | None]:
        """The slice's result or its error; meanwhile the operator hears of progress."""
        last_said = time.monotonic()
        while not wait([future], timeout=0.2).done:
            for warning in reports.warnings():
                self._warn(warning)
            if time.monotonic() - last_said >= PROGRESS_SECONDS:
                done = (n_done + reports.fractions().get(f"slice-{number:04d}", 0.0)) / n_slices
                self.say(f"DBG {self.chain.name} {100 * done:.0f} %\n")
                last_said = time.monotonic()
        for warning in reports.warnings():
            self._warn(warning)
        error = future.exception()
        return (None, error) if error is not None else (future.result(), None)

    def _fall_back(
        self,
        sorted_scan: SortedScan,
        rows: RowFiles,
        number: int,
        n_done: int,
        failure: BaseException,
        reports: ReportReader,
    ) -> tuple[Result, str]:
        """The fallback chain's images of a slice whose method failed, loudly; or the failure itself."""
        reason = _reason(failure)
        if self.chain.fallback is None:
            raise failure
        log.warning("event=fallback chain=%s to=%s slice=%d reason=%r", self.chain.name, self.chain.fallback, number, reason)
        fallback = load_chain(self.chain.fallback, directory=self.services.configs)
        # what the rows went through, and what the console asked for, holds for the stand-in as well
        fallback = replace(fallback, preprocess=self.chain.preprocess)
        future = self._submit_slice(sorted_scan, rows, number, fallback, as_fallback=True)
        result, error = self._await(future, reports, number, n_done, sorted_scan.n_slices)
        # said when it is known: an announced image that does not come is worse than none
        failed = f"{self.chain.name} failed in slice {number} ({reason})"
        if result is None:
            assert error is not None
            why = "either" if _reason(error) == reason else f"({_reason(error)})"
            self._tell(f"{failed}; {fallback.name} cannot stand in for it {why}")
            raise failure from error
        self._tell(f"{failed}; its images come from {fallback.name}")
        return result, fallback.name


def _reason(failure: BaseException) -> str:
    """What may be told of a failure: our own words, or only its kind."""
    return str(failure) if isinstance(failure, ReconError | MemoryError) else type(failure).__name__
