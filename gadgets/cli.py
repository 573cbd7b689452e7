"""The command ``recon``: serve, monitor, jobs, retry, replay, run, simulate, mask, dicom, pacs, train, chains, info."""

from __future__ import annotations

import logging
import os
import platform
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from gadgets import __version__, process_memory
from gadgets.chains_cli import chains, simulate
from gadgets.cores import cores
from gadgets.dicom_cli import dicom, pacs_app
from gadgets.install_gadgetron import install_gadgetron
from gadgets.jobs_cli import (
    KeepDays,
    KeepImages,
    MinFree,
    Pacs,
    PacsCa,
    PacsCalling,
    PacsCertificate,
    PacsKey,
    PacsMaps,
    PacsName,
    PacsTls,
    archives,
    jobs,
    retry,
)
from gadgets.mask_cli import app as mask_app
from gadgets.monitor.command import monitor
from gadgets.package_cli import manifest, package_app
from gadgets.replay_cli import replay, run
from gadgets.state_folder import compiler_caches, state_folder
from gadgets.terminal import err, log_from
from gadgets.train_cli import app as train_app
from recon_core.errors import ReconError, SettingError

app = typer.Typer(
    name="recon",
    help="MR reconstruction server: readouts in over the MRD/Gadgetron protocol, images and maps out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # locals hold MRD headers, and those hold patient data
)
app.add_typer(train_app, name="train")
app.command()(dicom)
app.command("install-gadgetron")(install_gadgetron)
app.command()(monitor)
app.command()(jobs)
app.command()(retry)
app.add_typer(pacs_app, name="pacs")
app.add_typer(mask_app, name="mask")
app.command()(manifest)
app.add_typer(package_app, name="package")

for _name, _value in {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}.items():
    os.environ.setdefault(_name, _value)  # before numpy and torch are imported: see gadgets.compute_local.WORKER_ENVIRONMENT


def main() -> None:
    """Entry point: every expected failure is one line on stderr and a non-zero exit code, never a traceback."""
    process_memory.end_at_once()
    try:
        app()
    except ReconError as error:
        err.print(f"[red]recon: {type(error).__name__}:[/red] ", end="", soft_wrap=True)
        err.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except OSError as error:  # a file that cannot be written, a full disk
        err.print(f"recon: {error.strerror or error}: {error.filename or ''}", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@app.command()
def serve(
    host: Annotated[
        str, typer.Option(help="Address to listen on. MRD has neither encryption nor passwords: keep to loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="TCP port; 0 takes a free one.", min=0, max=65535)] = 9002,
    workers: Annotated[
        int | None, typer.Option(help="Compute processes; 0 computes in the server. Default: one for each two cores.", min=0)
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Compute threads of each worker. Default: the cores, shared out.", min=1)
    ] = None,
    spool: Annotated[
        Path | None, typer.Option(help="Folder for the verbatim raw data of every scan. Default: the state folder.")
    ] = None,
    keep_raw: Annotated[
        bool, typer.Option("--keep-raw/--no-keep-raw", help="Keep captured raw data after the scan.")
    ] = True,
    spool_gb: Annotated[float, typer.Option(help="Raw data kept at most, GB; the oldest go first.", min=0.1)] = 50.0,
    scan_gb: Annotated[float, typer.Option(help="Largest scan accepted, GB.", min=0.001)] = 20.0,
    configs: Annotated[Path | None, typer.Option(help="Folder of chain files instead of the shipped ones.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of sampling masks. Default: in the state folder.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")] = "auto",
    idle_seconds: Annotated[
        float, typer.Option(help="Longest pause of a scanner between two messages of a scan.", min=1.0)
    ] = 3600.0,
    stall_seconds: Annotated[float, typer.Option(help="Longest wait for the rest of a message.", min=0.1)] = 30.0,
    allow: Annotated[
        list[str] | None, typer.Option(help="Network or address that may connect (10.1.2.0/24, ::1); repeat for several.")
    ] = None,
    allow_any: Annotated[
        bool, typer.Option("--allow-any", help="Let in everyone who can reach the port, also beyond loopback.")
    ] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate (PEM): the port then speaks TLS only.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, where that is another file.")] = None,
    tls_client_ca: Annotated[
        Path | None, typer.Option(help="Authority (PEM) of the peers' certificates: nobody else gets in.")
    ] = None,
    monitor: Annotated[
        str | None, typer.Option(help="HOST:PORT of the web page, /healthz and /metrics, for example 127.0.0.1:9100.")
    ] = None,
    monitor_token_file: Annotated[
        Path | None, typer.Option(help="File with the page's token; needed on any address but loopback.")
    ] = None,
    keep_images: KeepImages = True,
    keep_days: KeepDays = None,
    min_free_gb: MinFree = 2.0,
    pacs: Pacs = None,
    pacs_calling: PacsCalling = "RECONGADGETS",
    pacs_tls: PacsTls = False,
    pacs_ca: PacsCa = None,
    pacs_certificate: PacsCertificate = None,
    pacs_key: PacsKey = None,
    pacs_name: PacsName = None,
    pacs_parametric_maps: PacsMaps = False,
    scheduler: Annotated[
        str | None, typer.Option(help="Dask cluster for the slices: tls://HOST:PORT, tcp://127.0.0.1:PORT or local:N.")
    ] = None,
    scheduler_ca: Annotated[Path | None, typer.Option(help="The cluster's certificate authority (PEM).")] = None,
    scheduler_cert: Annotated[Path | None, typer.Option(help="This server's certificate of it (PEM).")] = None,
    scheduler_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    scheduler_insecure: Annotated[
        bool, typer.Option("--scheduler-insecure", help="Allow a cluster without TLS beyond loopback.")
    ] = False,
    time_limit: Annotated[
        float, typer.Option(help="Longest time in s that a chain may compute for one scan; 0: no limit.", min=0.0)
    ] = 21_600.0,
    stop_seconds: Annotated[
        float, typer.Option(help="Longest time in s for scans under way when the server is told to stop.", min=0.0)
    ] = 60.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Listen for scans until interrupted. Scans under way are answered first; a second interrupt abandons them."""
    log_from(log_level)
    process_memory.bound_allocator()  # before the imports below begin threads
    with process_memory.importing():
        from gadgets.listener import Access
        from gadgets.monitor.child import monitor_beside
        from gadgets.peer import Timing
        from gadgets.scheduler_options import SchedulerOptions
        from gadgets.service import Service, ServiceOptions
        from gadgets.tls import server_tls

    compiler_caches()
    cluster = None
    if scheduler is None and (scheduler_ca or scheduler_cert or scheduler_key or scheduler_insecure):
        raise SettingError("no cluster to send to", where="scheduler", remedy="Name it: --scheduler tls://HOST:PORT")
    if scheduler is not None:
        cluster = SchedulerOptions(scheduler, scheduler_ca, scheduler_cert, scheduler_key, scheduler_insecure)
    options = ServiceOptions(
        host=host,
        port=port,
        workers=workers,
        threads=threads,
        spool=(spool or state_folder() / "spool") if keep_raw else None,
        noise=state_folder() / "noise" if spool is None else spool.parent / "noise",
        masks=masks or state_folder() / "masks",
        spool_bytes=int(spool_gb * 1e9),
        scan_bytes=int(scan_gb * 1e9),
        configs=configs,
        device=device,
        scheduler=cluster,
        time_limit=time_limit,
        stop_seconds=stop_seconds,
        observe=keep_raw,
        keep_images=keep_images,
        keep_days=keep_days,
        min_free_bytes=int(min_free_gb * 1e9),
        archives=archives(
            spool,
            pacs,
            pacs_calling,
            pacs_tls,
            pacs_ca,
            pacs_certificate,
            pacs_key,
            pacs_name,
            parametric_maps=pacs_parametric_maps,
        ),
        timing=Timing(idle=idle_seconds, stall=stall_seconds),
        access=Access(tuple(allow or ()), allow_any, tls=server_tls(tls_cert, tls_key, tls_client_ca)),
    )
    stop, hurry = threading.Event(), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: (hurry if stop.is_set() else stop).set())
    beside = monitor_beside(options.spool, monitor, monitor_token_file)
    with Service(options, hurry) as service, beside:
        print(f"listening on {service.host}:{service.port}", flush=True)
        process_memory.settle()
        process_memory.tidy_until(stop)
        logging.getLogger(__name__).info("event=stopping")


app.command()(replay)
app.command()(run)
app.command()(simulate)
app.command()(chains)


@app.command()
def info() -> None:
    """Versions, devices and folders: what to send along with a question."""
    import h5py
    import ismrmrd
    import numpy as np
    import torch

    from gadgets.chain import chain_names, config_directory

    rows = {
        "recon-gadgets": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "ismrmrd": getattr(ismrmrd, "__version__", "unknown"),
        "cores": str(cores()),
        "cuda": f"{torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda})" if torch.cuda.is_available() else "none",
        "chains": ", ".join(chain_names()),
        "chain files": str(config_directory()),
        "spool": str(state_folder() / "spool"),
    }
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")


if __name__ == "__main__":
    main()
