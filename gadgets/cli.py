"""The command ``recon``: serve, monitor, jobs, retry, replay, run, simulate, mask, dicom, pacs, train, chains, info."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import platform
import signal
import sys
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from gadgets import __version__
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
    PacsTls,
    archives,
    jobs,
    name_value_pairs,
    retry,
)
from gadgets.log_lines import log_to_stderr
from gadgets.mask_cli import app as mask_app
from gadgets.monitor.command import monitor
from gadgets.package_cli import manifest, package_app
from gadgets.train_cli import app as train_app
from recon_core.errors import ReconError

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
PIPE_COLUMNS = 160
out = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
err = Console(stderr=True)

for _name, _value in {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}.items():
    os.environ.setdefault(_name, _value)  # before numpy and torch are imported: see gadgets.compute_local.WORKER_ENVIRONMENT


def main() -> None:
    """Entry point: every expected failure is one line on stderr and a non-zero exit code, never a traceback."""
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


def _state_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "recon-gadgets"


def _torch_cache() -> None:
    """Where torch's compiler keeps things: importing it (every optimiser does) makes a folder, by default in temporary storage."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "recon-gadgets" / "torch"
    with contextlib.suppress(OSError):  # a home that cannot be written: temporary storage it is
        base.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(base))  # the workers inherit it


def _log_to_stderr(level: str) -> None:
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise typer.BadParameter(f"got {level!r}, expected debug, info, warning or error", param_hint="--log-level")
    log_to_stderr(level.upper())
    from gadgets.compute_local import log_python_warnings

    log_python_warnings()


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
    masks: Annotated[Path | None, typer.Option(help="Folder of sampling masks. [in the state folder]")] = None,
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
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Listen for scans until interrupted."""
    from gadgets.listener import Access
    from gadgets.monitor.child import monitor_beside
    from gadgets.peer import Timing
    from gadgets.scheduler_options import SchedulerOptions
    from gadgets.service import Service, ServiceOptions
    from gadgets.tls import server_tls

    _log_to_stderr(log_level)
    _torch_cache()
    cluster = None
    if scheduler is not None:
        cluster = SchedulerOptions(scheduler, scheduler_ca, scheduler_cert, scheduler_key, scheduler_insecure)
    options = ServiceOptions(
        host=host,
        port=port,
        workers=workers,
        threads=threads,
        spool=(spool or _state_directory() / "spool") if keep_raw else None,
        noise=_state_directory() / "noise" if spool is None else spool.parent / "noise",
        masks=masks or _state_directory() / "masks",
        spool_bytes=int(spool_gb * 1e9),
        scan_bytes=int(scan_gb * 1e9),
        configs=configs,
        device=device,
        scheduler=cluster,
        time_limit=time_limit,
        observe=keep_raw,
        keep_images=keep_images,
        keep_days=keep_days,
        min_free_bytes=int(min_free_gb * 1e9),
        archives=archives(spool, pacs, pacs_calling, pacs_tls, pacs_ca, pacs_certificate, pacs_key),
        timing=Timing(idle=idle_seconds, stall=stall_seconds),
        access=Access(tuple(allow or ()), allow_any, tls=server_tls(tls_cert, tls_key, tls_client_ca)),
    )
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    beside = monitor_beside(options.spool, monitor, monitor_token_file)
    with Service(options) as service, beside:
        print(f"listening on {service.host}:{service.port}", flush=True)
        stop.wait()
        logging.getLogger(__name__).info("event=stopping")


@app.command()
def replay(
    source: Annotated[Path, typer.Argument(help="MRD raw file (.h5) or a raw capture of the spool (.mrd).")],
    config: Annotated[str | None, typer.Option("--config", "-c", help="Chain to ask for; a capture brings its own.")] = None,
    host: Annotated[str, typer.Option("--host", "-a")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", "-p", min=1, max=65535)] = 9002,
    output: Annotated[Path, typer.Option("--out", "-o", help="MRD image file to write.")] = Path("out.h5"),
    rate: Annotated[float | None, typer.Option(help="Readouts per second, to play at scanner speed.", min=0.1)] = None,
    montage: Annotated[Path | None, typer.Option(help="Folder for a PNG of each series.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE; repeat for several.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Speak TLS; the server's certificate is verified.")] = False,
    tls_ca: Annotated[Path | None, typer.Option(help="Authority (PEM) of the server's certificate; implies --tls.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="Our own certificate (PEM), where the server wants one.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, where that is another file.")] = None,
    tls_name: Annotated[str | None, typer.Option(help="Name in the server's certificate, where not the host's.")] = None,
) -> None:
    """Send raw data to a running server and keep the images that come back."""
    from gadgets.replay import replay as run_replay
    from gadgets.tls import client_tls

    _log_to_stderr("warning")
    with _progress() as bar:
        result = run_replay(
            source, host=host, port=port, config=config, out=output, rate=rate, parameters=name_value_pairs(settings or []),
            tls=client_tls(tls, tls_ca, tls_cert, tls_key, tls_name),
            progress=_readouts_bar(bar), on_text=_reconstruction_bar(bar),
        )  # fmt: skip
    _show(result, output, montage)


@app.command()
def run(
    source: Annotated[
        Path, typer.Argument(help="MRD raw file (.h5), a raw capture of the spool (.mrd), or -: an MRD stream on stdin.")
    ],
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Chain to reconstruct with; a capture brings its own.")
    ] = None,
    output: Annotated[Path, typer.Option("--out", "-o", help="MRD image file to write.")] = Path("out.h5"),
    montage: Annotated[Path | None, typer.Option(help="Folder for a PNG of each series.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE; repeat for several.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")] = "auto",
    configs: Annotated[Path | None, typer.Option(help="Folder of chain files instead of the shipped ones.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of sampling masks. [in the state folder]")] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Compute processes; 0 computes in this one. Default: as many as the server has.", min=0),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Compute threads of each worker. As many as the server's give the same bits.", min=1)
    ] = None,
    job_folder: Annotated[
        Path | None, typer.Option(help="Folder for loss curves, weights and figures of merit of the method.")
    ] = None,
    previews: Annotated[
        bool, typer.Option("--previews/--no-previews", help="Put the chain's previews into the image file as well.")
    ] = False,
) -> None:
    """Reconstruct a file here and now, through the same pipeline as the server, without one."""
    from gadgets.replay import replay as run_replay
    from gadgets.service import Service, ServiceOptions

    _torch_cache()
    _log_to_stderr("error")  # warnings come as the server's words as well
    # the server's own defaults: sums depend on the number of threads in their last bits
    options = ServiceOptions(
        port=0, workers=workers, threads=threads, spool=None, configs=configs, device=device, previews=previews,
        job_folder=job_folder, masks=masks or _state_directory() / "masks",
    )  # fmt: skip
    if str(source) == "-":
        from gadgets.stream import run_files

        # a stream in, a stream out, unless a file was named
        target = Path("-") if output == Path("out.h5") else output
        run_files(source, target, config=config, settings=name_value_pairs(settings or []), options=options)
        return
    with Service(options) as service, _progress() as bar:
        result = run_replay(
            source, host=service.host, port=service.port, config=config, out=output,
            parameters=name_value_pairs(settings or []), progress=_readouts_bar(bar), on_text=_reconstruction_bar(bar),
        )  # fmt: skip
    _show(result, output, montage)
    if job_folder is not None and job_folder.is_dir():
        out.print(f"what the method tells besides: {job_folder}", markup=False, highlight=False, soft_wrap=True)


class _Count(MofNCompleteColumn):
    """Pieces, or per cent where the total is no number of pieces."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.percentage:.0f} %") if "left" in task.fields else super().render(task)


class _Left(TimeRemainingColumn):
    """The server's own estimate where it has one: it knows how many slices wait."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["left"]) if "left" in task.fields else super().render(task)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), _Count(), TimeElapsedColumn(), _Left(),
        console=err, disable=not err.is_terminal,
    )  # fmt: skip


def _readouts_bar(bar: Progress) -> Any:
    task = bar.add_task("readouts", total=None)

    def advance(done: int, total: int | None) -> None:
        bar.update(task, completed=done, total=total)

    return advance


def _reconstruction_bar(bar: Progress) -> Any:
    """Follows the server's words about its progress; appears with the first of them."""
    from gadgets.progress import read_progress_line

    tasks: list[Any] = []

    def tell(text: str) -> None:
        said = read_progress_line(text)
        if said is not None:
            fraction, left = said
            if not tasks:
                tasks.append(bar.add_task("reconstruction", total=1.0, left=""))
            bar.update(tasks[0], completed=fraction, left=f"about {left} left" if left else "")
        elif tasks and text.startswith("INF "):
            bar.update(tasks[0], completed=1.0, left="")

    return tell


def _show(result: Any, output: Path, montage: Path | None) -> None:
    from gadgets.progress import read_progress_line

    for line in result.texts:
        if read_progress_line(line) is None:  # how far it was is no news now
            err.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)
    quick = f"; {result.n_previews} previews, first {result.seconds_to_first_preview:.3f} s" if result.n_previews else ""
    out.print(
        f"{result.n_images} images in {output} (group {result.group}); {result.readouts_per_second:.0f} readouts/s, "
        f"first image {result.seconds_to_first_image:.3f} s and last {result.seconds_to_last_image:.3f} s after the last readout{quick}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if montage is not None:
        from gadgets.montage import write_montages

        for path in write_montages(output, montage, group=result.group):
            out.print(str(path), markup=False, highlight=False, soft_wrap=True)


@app.command()
def simulate(
    kind: Annotated[str, typer.Argument(help="cine, molli, satrec or mgre.")],
    output: Annotated[Path, typer.Argument(help="MRD raw file to write; the truth goes beside it.")] = Path("simulated.h5"),
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE; repeat for several.")] = None,
    describe: Annotated[bool, typer.Option("--describe", help="List this kind's settings and stop.")] = False,
) -> None:
    """Write a full MRD raw file of a simulated scan, with the ground truth beside it."""
    from gadgets.simulate import simulate as run_simulation
    from recon_core.simulation.options import settings_for

    values = settings_for(kind, name_value_pairs(settings or []))
    if describe:
        _print_settings(f"simulate {kind}", values)
        return
    summary = run_simulation(kind, output, values)
    for key, value in asdict(summary).items():
        print(f"{key:<16}  {value}")


def _print_settings(title: str, values: Any) -> None:
    from recon_core.settings import describe

    table = _table("setting", "type", "default", "range", "help", title=title)
    for info in describe(type(values)):
        table.add_row(info.name, info.kind.__name__, str(getattr(values, info.name)), _range(info), info.help)
    out.print(table)


def _table(*columns: str, title: str | None = None) -> Table:
    """A table whose names stay in one piece, so that they can be copied."""
    table = Table(title=title)
    for column in columns:
        table.add_column(column, no_wrap=column in ("chain", "setting"))
    return table


def _range(info: Any) -> str:
    if info.choices:
        return " | ".join(info.choices)
    if info.low is None and info.high is None:
        return info.unit
    low = "" if info.low is None else f"{info.low:g}"
    high = "" if info.high is None else f"{info.high:g}"
    return f"{low} .. {high} {info.unit}".strip()


@app.command()
def chains(
    name: Annotated[str | None, typer.Argument(help="One chain; without it, all.")] = None,
    describe: Annotated[bool, typer.Option("--describe", help="List every setting.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
    docs: Annotated[bool, typer.Option("--docs", help="The page docs/chains.md.")] = False,
    configs: Annotated[Path | None, typer.Option(help="Folder of chain files instead of the shipped ones.")] = None,
) -> None:
    """List the chains that a scanner can ask for, and their settings."""
    from gadgets.chain import chain_names, describe_chain, load_chain

    if docs:
        from gadgets.manifest_formats import markdown

        print(markdown([name] if name else None, directory=configs), end="")
        return

    names = [name] if name else list(chain_names(configs))
    loaded = [load_chain(n, directory=configs) for n in names]
    if as_json:
        document = [
            {
                "name": c.name, "summary": c.summary, "method": c.method, "fallback": c.fallback,
                "settings": {
                    group: [{**asdict(info), "kind": info.kind.__name__} for info in infos]
                    for group, infos in describe_chain(c.name, directory=configs).items()
                },
            }
            for c in loaded
        ]  # fmt: skip
        print(json.dumps(document, indent=2))
        return
    table = _table("chain", "method", "fallback", "what it does")
    for c in loaded:
        table.add_row(c.name, c.method, c.fallback or "-", c.summary)
    out.print(table)
    if describe:
        for c in loaded:
            _print_chain_settings(c.name, describe_chain(c.name, directory=configs))


def _print_chain_settings(name: str, groups: Any) -> None:
    table = _table("group", "setting", "type", "default", "range", "help", title=f"settings of {name}")
    for group, infos in groups.items():
        for info in infos:
            table.add_row(group, info.name, info.kind.__name__, str(info.default), _range(info), info.help)
    out.print(table)


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
        "cores": str(os.cpu_count()),
        "cuda": f"{torch.cuda.get_device_name(0)} (CUDA {torch.version.cuda})" if torch.cuda.is_available() else "none",
        "chains": ", ".join(chain_names()),
        "chain files": str(config_directory()),
        "spool": str(_state_directory() / "spool"),
    }
    width = max(map(len, rows))
    for key, value in rows.items():
        print(f"{key:<{width}}  {value}")


if __name__ == "__main__":
    main()
