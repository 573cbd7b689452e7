"""The reconstruction service: server, spool, noise store and workers put together."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from gadgets.chain import Chain, chain_faults, chain_from_script, chain_names, load_chain, require_chains
from gadgets.compute_pool import Events
from gadgets.connection import ChainRequest
from gadgets.cores import cores
from gadgets.devices import choose_device
from gadgets.given_masks import require_given_mask
from gadgets.handlers import Scan as OpenedScan
from gadgets.job_folder import JobFolders, remove_orphans
from gadgets.jobs import Jobs
from gadgets.journal import JobRow
from gadgets.listener import Access
from gadgets.mask_check import require_sampling_mask
from gadgets.monitor.observer import Observer
from gadgets.noise_store import NoiseStore
from gadgets.pacs_backlog import key_of
from gadgets.peer import Timing
from gadgets.pipeline import Scan, Services
from gadgets.previews import require_preview
from gadgets.results import Archives
from gadgets.scheduler_options import SchedulerOptions
from gadgets.scratch import remove_stale_scratch
from gadgets.server import Server
from gadgets.spool import ScanLog, Spool
from gadgets.unattended import Unattended
from gadgets.wire.framing import Limits
from gadgets.wire.header import parse_header

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceOptions:
    """How a service runs. Sizes in bytes; ``spool=None`` keeps no raw data, ``workers=None`` takes one for two cores.

    ``previews=False`` sends final images only. ``job_folder`` takes what methods tell besides images (arrays, curves, pictures); by
    default each scan's goes beside its raw data. ``observe`` writes what the monitor shows (``gadgets.monitor``) into the spool.
    ``keep_images`` keeps every scan's images in its job folder, ``keep_days`` removes captures by age, below ``min_free_bytes`` of free
    disk no capture is begun, and ``archives`` get the images of every scan by themselves. ``masks`` is the folder of sampling masks.
    ``scheduler`` names a Dask cluster for the slices; ``time_limit`` bounds a chain's computing for one scan, in s (0: not).
    ``rehearse=False`` starts workers sooner and makes their first scans slower. When the service ends, scans under way may take
    ``stop_seconds`` more; what is not done then is left to the next one.
    """

    host: str = "127.0.0.1"
    port: int = 9002
    workers: int | None = None
    threads: int | None = None
    spool: Path | None = None
    noise: Path | None = None
    spool_bytes: int = 50_000_000_000
    scan_bytes: int = 20_000_000_000
    configs: Path | None = None
    device: str = "auto"
    previews: bool = True
    job_folder: Path | None = None
    observe: bool = False
    keep_images: bool = False
    keep_days: float | None = None
    min_free_bytes: int = 2 * 10**9
    archives: Archives | None = None
    masks: Path | None = None
    scheduler: SchedulerOptions | None = None
    time_limit: float = 0.0
    stop_seconds: float = 10.0
    rehearse: bool = True
    limits: Limits = field(default_factory=Limits)
    timing: Timing = field(default_factory=Timing)
    access: Access = field(default_factory=Access)


def reconstruct_row(options: ServiceOptions, row: JobRow) -> JobRow:
    """Reconstruct a waiting job of a spool that no server keeps; the row as it is afterwards."""
    import torch

    service = Service(options)
    try:
        if service.jobs.workers == 0:
            torch.set_num_threads(service.jobs.threads)  # sums depend on their number in the last bits
        return service.reconstruct(row)
    finally:
        service.close()


def server_device(options: ServiceOptions) -> str:
    """Which device this machine's own workers take: with a scheduler, a GPU that is asked for may be elsewhere."""
    return choose_device(options.device if options.scheduler is None or options.device == "cpu" else "auto")


def compute(options: ServiceOptions, workers: int) -> Jobs:
    """The workers of this machine, and those of a Dask cluster where one is named."""
    devices = 0
    if server_device(options) == "cuda":  # no number: each worker gets a GPU of its own
        import torch

        devices = torch.cuda.device_count()
    scheduler = options.scheduler
    if scheduler is None:
        return Jobs(workers, threads=options.threads, devices=devices, rehearse=options.rehearse)
    from gadgets.compute_dask import DaskPool

    def cluster(events: Events, threads: int) -> DaskPool:
        return DaskPool(scheduler, threads, options.device, events, rehearse=options.rehearse)

    return Jobs(workers, threads=options.threads, remote=cluster, devices=devices, rehearse=options.rehearse)


class Service:
    """A running reconstruction server; a context manager.

    Whoever ends it and does not want to wait for its scans sets ``hurry``.
    """

    def __init__(self, options: ServiceOptions, hurry: threading.Event | None = None) -> None:
        self.options, self._hurry = options, hurry
        require_chains(options.configs)
        if options.configs is not None:  # better now than while a patient lies in the scanner
            for name, fault in chain_faults(options.configs):
                log.warning("event=chain_faulty chain=%s reason=%r", name, fault)
        workers = max(1, cores() // 2) if options.workers is None else options.workers
        stale = remove_stale_scratch()
        if stale:
            log.info("event=stale_scratch_removed folders=%d", stale)
        self.jobs = compute(options, workers)
        self.noise = NoiseStore(options.noise) if options.noise is not None else None
        self.spool = Spool(
            options.spool,
            max_bytes=options.spool_bytes,
            max_scan_bytes=options.scan_bytes,
            min_free_bytes=options.min_free_bytes,
            max_age=None if options.keep_days is None else options.keep_days * 86400.0,
        )
        if self.spool.root is not None:
            remove_orphans(self.spool.root)
        self.job_folders = JobFolders(self.jobs, options.job_folder)
        self.services = Services(
            self.jobs,
            self.noise,
            options.configs,
            device=server_device(options),
            previews=options.previews,
            job_folders=self.job_folders,
            time_limit=options.time_limit,
            masks=options.masks,
        )
        self.server = Server(
            options.host,
            options.port,
            open_scan=self._open_scan,
            check_config=self._chain,
            spool=self.spool,
            limits=options.limits,
            timing=options.timing,
            access=options.access,
            noise_store=self.noise,
            chain_names=lambda: chain_names(options.configs),
        )
        self.unattended = Unattended(self.spool, self.jobs, keep_images=options.keep_images, archives=options.archives)
        self.server.handlers = self.unattended.handlers(self.server.handlers)
        self.observer: Observer | None = None
        if options.observe and self.spool.root is not None:
            self.observer = Observer(self.spool.root, self._describe, min_free_bytes=self.spool.min_free_bytes)

    @property
    def host(self) -> str:
        return self.options.host

    @property
    def port(self) -> int:
        """The port that is really listened on."""
        return self.server.port

    def start(self) -> Service:
        """Take the port, warm the workers, then listen.

        Raises
        ------
        WireError
            The port is taken: said before the workers are started, which takes a while.
        """
        self.server.claim()
        self.jobs.warm()
        self.server.start()
        if self.observer is not None:
            self.observer.start()
        self.unattended.start(self.server.handlers, self.options.limits)
        return self

    def close(self) -> None:
        """Stop listening, end the scans, stop the workers."""
        self.unattended.stop()
        self.server.close(self.options.stop_seconds, self._hurry)
        self.job_folders.close()
        self.unattended.settle()
        self.jobs.close()
        self.unattended.close()
        if self.observer is not None:
            self.observer.close()

    def __enter__(self) -> Service:
        try:
            return self.start()
        except BaseException:
            self.close()
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def reconstruct(self, row: JobRow) -> JobRow:
        """A waiting job, in the caller's thread; for processes that do not serve."""
        return self.unattended.reconstruct(row, self.server.handlers, self.options.limits)

    def _chain(self, request: ChainRequest) -> Chain:
        folder = self.options.configs
        if request.script is not None and request.name is None:
            chain = chain_from_script(request.script, request.overrides, directory=folder)
        else:
            chain = load_chain(request.name or "", request.overrides, directory=folder)
        if "preview" in chain.overrides:
            require_preview(chain, folder)
        require_given_mask(chain, self.options.masks)
        require_sampling_mask(chain, self.options.masks)
        return chain

    def _open_scan(self, request: ChainRequest, header_text: str, raw: ScanLog, say: Callable[[str], None]) -> OpenedScan:
        chain, header = self._chain(request), parse_header(header_text)

        def make(say: Callable[[str], None]) -> Scan:
            return Scan(chain, header, raw, self.services, say)

        return make(say) if self.observer is None else self.observer.open(make, chain.name, raw, say)

    def _describe(self) -> dict[str, Any]:
        """For the monitor: what a server knows of itself."""
        state, archives = self.jobs.state, self.options.archives
        return {
            "archives": [] if archives is None else [key_of(archive) for archive in archives.destinations],
            "archive_queue": "" if archives is None else str(archives.queue.absolute()),
            "queued": state.waiting,
            "stalled": state.stalled,
            "capacity": state.capacity,
            "deaths": state.deaths,
            "host": self.host,
            "port": self.port,
            "listening": self.server.is_listening,
            "connections": self.server.n_connections,
            "workers": self.jobs.workers,
            "cluster": state.remote,
            "cluster_wanted": state.remote_wanted,
            "device": self.services.device,
            "versions": self.spool.versions,
            "spool_bytes": self.spool.max_bytes,
            "min_free_bytes": self.spool.min_free_bytes,
            "evicted": self.spool.evicted(),
        }
