"""The reconstruction service: server, spool, noise store and workers put together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from gadgets.chain import Chain, chain_from_script, chain_names, load_chain
from gadgets.connection import ChainRequest
from gadgets.job_folder import JobFolders, remove_orphans
from gadgets.jobs import Jobs, remove_stale_scratch
from gadgets.noise_store import NoiseStore
from gadgets.peer import Timing
from gadgets.pipeline import Scan, Services
from gadgets.server import Server
from gadgets.spool import ScanLog, Spool
from gadgets.wire.framing import Limits
from gadgets.wire.header import parse_header
from recon_core.errors import SettingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServiceOptions:
    """How a service runs. Sizes in bytes; ``spool=None`` keeps no raw data, ``workers=None`` takes one for two cores.

    ``previews=False`` sends final images only. ``job_folder`` takes what methods tell besides images (arrays, curves, pictures); by
    default each scan's goes beside its raw data.
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
    limits: Limits = field(default_factory=Limits)
    timing: Timing = field(default_factory=Timing)


class Service:
    """A running reconstruction server; a context manager."""

    def __init__(self, options: ServiceOptions) -> None:
        self.options = options
        cores = os.cpu_count() or 1
        workers = max(1, cores // 2) if options.workers is None else options.workers
        stale = remove_stale_scratch()
        if stale:
            log.info("event=stale_scratch_removed folders=%d", stale)
        self.jobs = Jobs(workers, threads=options.threads)
        self.noise = NoiseStore(options.noise) if options.noise is not None else None
        self.spool = Spool(options.spool, max_bytes=options.spool_bytes, max_scan_bytes=options.scan_bytes)
        if self.spool.root is not None:
            remove_orphans(self.spool.root)
        self.job_folders = JobFolders(self.jobs, options.job_folder)
        self.services = Services(
            self.jobs,
            self.noise,
            options.configs,
            device=choose_device(options.device),
            previews=options.previews,
            job_folders=self.job_folders,
        )
        self.server = Server(
            options.host,
            options.port,
            open_scan=self._open_scan,
            check_config=self._chain,
            spool=self.spool,
            limits=options.limits,
            timing=options.timing,
            noise_store=self.noise,
            chain_names=lambda: chain_names(options.configs),
        )

    @property
    def host(self) -> str:
        return self.options.host

    @property
    def port(self) -> int:
        """The port that is really listened on."""
        return self.server.port

    def start(self) -> Service:
        """Warm the workers, then listen."""
        self.jobs.warm()
        self.server.start()
        return self

    def close(self) -> None:
        """Stop listening, end the scans, stop the workers."""
        self.server.close()
        self.job_folders.close()
        self.jobs.close()

    def __enter__(self) -> Service:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _chain(self, request: ChainRequest) -> Chain:
        if request.script is not None and request.name is None:
            return chain_from_script(request.script, request.overrides, directory=self.options.configs)
        return load_chain(request.name or "", request.overrides, directory=self.options.configs)

    def _open_scan(self, request: ChainRequest, header_text: str, raw: ScanLog, say: Callable[[str], None]) -> Scan:
        return Scan(self._chain(request), parse_header(header_text), raw, self.services, say)


def choose_device(wanted: str) -> str:
    """``auto`` takes the first CUDA device when torch sees one, else the CPU.

    Raises
    ------
    SettingError
        CUDA was asked for by name and is not there.
    """
    import torch

    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise SettingError("no CUDA device", where="device", got=wanted, expected="auto or cpu on this machine")
    return wanted
