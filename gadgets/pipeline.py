"""The stages of one scan: index while reading, prepare while scanning, reconstruct after the last readout, send.

The connection's thread calls ``readouts`` for every batch; that call only records headers and hands chunks to workers. Chunk
borders depend on readout numbers alone, never on timing, so every front and every repetition computes the same bits.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gadgets.buffer import SortedScan, sort_readouts
from gadgets.chain import Chain, load_chain
from gadgets.compute_pool import Budget
from gadgets.cut_scan import sort_cut_scan
from gadgets.errors import GivenUp, SortError
from gadgets.fair_queue import REPLAY, SCAN
from gadgets.given_masks import doubt_of_mask, given_mask_of, named_mask
from gadgets.images import ImageWriter, sending_order
from gadgets.job_folder import JobFolders, JobRecord
from gadgets.jobs import Jobs
from gadgets.mask_check import check_samples
from gadgets.memory_errors import out_of_memory
from gadgets.noise_store import NoiseStore
from gadgets.preparation import CHUNK_BYTES, Preparation
from gadgets.previews import OFF, Previews
from gadgets.progress import progress_line
from gadgets.readouts import Kind, ReadoutIndex, classify
from gadgets.row_files import RowFiles
from gadgets.sample_checks import lost_channels, unmeasured
from gadgets.scan_facts import facts_of
from gadgets.scratch import Scratch
from gadgets.slice_work import SliceWork
from gadgets.spool import ScanLog
from gadgets.tasks import LogSlice, estimate_noise, from_portable
from gadgets.waiting import Waiting
from gadgets.wire import codec
from gadgets.wire.events import Readouts, Waveform
from gadgets.wire.header import MrdHeader
from recon_core.errors import ReconError
from recon_core.methods import delivered_maps
from recon_core.types import Result

log = logging.getLogger(__name__)

MAX_WARNINGS = 20  # lines to the operator in one scan


@dataclass(frozen=True)
class Services:
    """What every scan of a server shares.

    ``configs`` is the folder of chain files, the shipped one when ``None``; ``previews=False`` makes none, whatever chains ask for;
    ``job_folders`` keeps what methods tell besides images; ``time_limit`` bounds every chain's computing for a scan, and what comes before
    the chain on its own, in s (0: not);
    ``masks`` is the folder of the sampling masks that scans are compared with, and of masks for susceptibility maps.
    """

    jobs: Jobs
    noise: NoiseStore | None = None
    configs: Path | None = None
    device: str = "cpu"
    chunk_bytes: int = CHUNK_BYTES
    previews: bool = True
    job_folders: JobFolders | None = None
    time_limit: float = 0.0
    masks: Path | None = None


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
        if chain.changed:
            log.info("event=settings chain=%s changed=%r", chain.name, dict(chain.changed))
        self.index = ReadoutIndex()
        self.n_waveforms = 0
        self.facts = facts_of(chain, header)
        self.scratch = Scratch()
        self.tasks = services.jobs.scope(REPLAY if raw.replayed or raw.behind else SCAN)
        self._said: set[str] = set()
        # not the chain's own limit: no fallback could answer for what is missing here
        limit = services.time_limit
        self._preparing = Budget(limit, name="preparation") if limit > 0 else None
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
            budget=self._preparing,
            sign=self._give_sign,
        )
        # while the patient still lies there
        if doubt := doubt_of_mask(chain, header, services.masks):
            self._warn(doubt)

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

    def _give_sign(self) -> None:
        self.say(progress_line(self.chain.name, 0.0, None))

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
            # a scan that broke off while it measured noise is none of noise
            if (kind == Kind.NOISE).any() and not (kind <= Kind.CALIBRATION_AND_IMAGING).any() and not self.raw.cut:
                yield from self._noise_only(np.flatnonzero(kind == Kind.NOISE))
                return
            sorted_scan, rows = self._sorted_and_prepared()
            sampled = check_samples(sorted_scan, self.services.masks)
            for note in (*sorted_scan.notes, *sampled.notes):
                self._warn(note)
            if sampled.agreement is not None:
                self.say(f"INF {sampled.agreement}\n")
            mask, refusal = self._given_mask(sorted_scan)
            yield from self._reconstruct(sorted_scan, rows, started, sampled.refusal or refusal, mask)
        finally:
            self.abandon()

    def _sorted_and_prepared(self) -> tuple[SortedScan, RowFiles]:
        """The scan without the lines that turn out to hold nothing, and its rows."""
        sorted_scan = self._sort()  # first: headers that contradict each other are known at once
        rows = self.preparation.rows()
        samples = self.preparation.samples()
        if samples.note:
            self._warn(samples.note)
        if lost := lost_channels(sorted_scan, samples):
            self._warn(lost)
        without = unmeasured(sorted_scan, samples.empty)
        return (self._sort(without) if len(without) else sorted_scan), rows

    def _sort(self, unmeasured: NDArray[np.int64] | None = None) -> SortedScan:
        headers, settings = self.index.headers, self.chain.acquisition
        if not self.raw.cut:
            return sort_readouts(headers, self.header, settings, unmeasured)
        self._warn(f"incomplete: {self.raw.cut}")
        unfolds = self.chain.method != "fourier"
        return sort_cut_scan(headers, self.header, settings, unmeasured, unfolds=unfolds)

    def _given_mask(self, sorted_scan: SortedScan) -> tuple[NDArray[np.bool_] | None, ReconError | None]:
        """The mask that the chain's maps are to be made in, or why the chain is refused; where that is to be a warning, it is one."""
        settings = self.chain.maps
        if not (name := named_mask(settings)):
            return None, None
        try:
            return given_mask_of(sorted_scan, name, self.services.masks), None
        except ReconError as error:
            if settings.map_failure == "error":
                return None, error
            self._warn(str(error))
            return None, None

    def abandon(self) -> None:
        """Drop the scan's tasks and intermediate files; the raw log is the connection's."""
        self.tasks.abandon()
        self.scratch.close()
        self.preparation.close()

    def _noise_only(self, rows: NDArray[np.intp]) -> Iterator[bytes]:
        """A separate noise scan: keep its covariance for the scans that depend on it."""
        index = self.index
        source = LogSlice(str(self.raw.path), index.headers[rows], index.offsets[rows], index.payload_bytes[rows])
        measured = self.tasks.submit(estimate_noise, source, budget=self._preparing)
        estimate = Waiting(self._give_sign).result(measured)
        if self.services.noise is None or not self.header.measurement_id:
            raise SortError(
                "a noise measurement that cannot be stored", where="scan", expected="a measurementID in the header"
            )
        channels = estimate.covariance.shape[0]
        labels = self.header.labels_of(channels)
        self.services.noise.put(self.header.measurement_id, estimate.covariance, estimate.dwell_time, labels)
        yield codec.text(f"INF noise measurement stored: {channels} channels, {estimate.n_samples} samples\n")

    def _reconstruct(
        self,
        sorted_scan: SortedScan,
        rows: RowFiles,
        started: float,
        refusal: ReconError | None = None,
        given_mask: NDArray[np.bool_] | None = None,
    ) -> Iterator[bytes]:
        """With a ``refusal`` the chain is not tried: what its fallback makes is what there is."""
        white = self.preparation.whitened
        work = SliceWork(
            self.tasks,
            self.services,
            self.chain,
            self.scratch.path,
            sorted_scan,
            rows,
            whitened=white,
            given_mask=given_mask,
        )
        chain = self.chain
        writer = ImageWriter(self.header, chain.name, chain.output, changed=chain.changed, cut=self.raw.cut)
        spare: ImageWriter | None = None
        n_images = 0
        order = sending_order(sorted_scan.n_slices, scaled=writer.pixel_type.kind == "u")
        previews = Previews(self._preview_chain(), self.services.configs, writer, sorted_scan, work.reports)
        if refusal is None:
            previews.begin(order, partial(work.submit, role="preview"))
        ahead = 2 * self.services.jobs.capacity
        record = JobRecord(self.chain.name)
        try:
            for place, number in enumerate(order):
                result: Result | None = None
                failure: BaseException | None = refusal
                if refusal is None:
                    work.begin(order[place : place + ahead])
                    result, failure = yield from self._await(work, number, previews)
                name, chosen = self.chain.name, writer
                if result is None:
                    assert failure is not None
                    result, name = yield from self._fall_back(work, number, failure, previews)
                    chosen = spare = spare or writer.for_fallback(name)
                previews.over(number)
                result = from_portable(result)
                record.add(number, name, result)
                wanted = self.chain.output.phase or self.chain.output.complex
                if wanted and not any(series.data.is_complex() for series in result.images):
                    self._warn("only magnitudes exist here, no phase (fourier has one with combine = adaptive)")
                for message in chosen.images(sorted_scan, number, result):
                    n_images += 1
                    yield message
        finally:
            # pictures and files are a worker's work, and nobody waits for them
            if self.services.job_folders is not None:
                self.services.job_folders.keep(record, self.raw)
        seconds = time.perf_counter() - started
        log.info(
            "event=scan_done chain=%s images=%d previews=%d slices=%d seconds=%.3f",
            self.chain.name,
            n_images,
            previews.n_images,
            sorted_scan.n_slices,
            seconds,
        )
        yield codec.text(f"INF {self.chain.name}: {n_images} images in {seconds:.1f} s after the last readout\n")

    def _preview_chain(self) -> Chain:
        if self.services.previews:
            return self.chain
        return replace(self.chain, output=replace(self.chain.output, preview=OFF))

    def _await(
        self, work: SliceWork, number: int, previews: Previews
    ) -> Generator[bytes, None, tuple[Result | None, BaseException | None]]:
        """The slice's result or its error; meanwhile previews leave as they come, and the operator hears of progress."""
        future = work.future(number)
        while True:
            finished = wait([future, *previews.pending], timeout=0.2, return_when=FIRST_COMPLETED).done
            for warning in work.reports.warnings():
                self._warn(warning)
            yield from previews.messages()
            if future in finished:
                eased = work.ease(number)
                if eased is None:
                    break
                self._warn(eased)
                future = work.future(number)
                continue
            line = work.progress(self.chain.name)
            if line is not None:
                self.say(line)
        error = future.exception()
        return (None, error) if error is not None else (work.take(number), None)

    def _fall_back(
        self, work: SliceWork, number: int, failure: BaseException, previews: Previews
    ) -> Generator[bytes, None, tuple[Result, str]]:
        """The fallback chain's images of a slice whose method failed, loudly; or the failure itself."""
        reason = _reason(failure)
        if self.chain.fallback is None or isinstance(failure, GivenUp):
            raise failure
        log.warning("event=method_failed chain=%s slice=%d reason=%r", self.chain.name, number, reason)
        failed = f"{self.chain.name} failed in slice {number} ({reason})"
        try:
            fallback = load_chain(self.chain.fallback, directory=self.services.configs)
        except ReconError as broken:  # somebody is editing its file, or has removed it
            self._tell(f"{failed}; {self.chain.fallback} cannot stand in for it ({broken})")
            raise failure from broken
        # what the rows went through, and what the console asked for, holds for the stand-in as well
        fallback = replace(fallback, preprocess=self.chain.preprocess, maps=replace(self.chain.maps, map_failure="warn"))
        work.begin_again(number, fallback)
        result, error = yield from self._await(work, number, previews)
        # said when it is known: an announced image that does not come is worse than none
        if result is None:
            assert error is not None
            if isinstance(error, GivenUp):
                raise error
            why = "either" if _reason(error) == reason else f"({_reason(error)})"
            self._tell(f"{failed}; {fallback.name} cannot stand in for it {why}")
            raise failure from error
        log.warning("event=fallback chain=%s to=%s slice=%d", self.chain.name, fallback.name, number)
        self._tell(f"{failed}; its images come from {fallback.name}")
        self.facts.fallback = fallback.name
        expected = delivered_maps(self.chain.method)
        if expected is not None:  # a series of which some slices exist and others do not helps nobody
            result = replace(result, maps=tuple(m for m in result.maps if m.name in expected) or result.maps)
        return result, fallback.name


def _reason(failure: BaseException) -> str:
    """What may be told of a failure: our own words, or only its kind."""
    told = out_of_memory(failure) or failure
    return str(told) if isinstance(told, ReconError) else type(failure).__name__
