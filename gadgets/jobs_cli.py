"""The commands ``recon jobs`` and ``recon retry``, and what ``recon serve`` offers for running unattended."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer
from rich.console import Console
from rich.table import Table

from gadgets.clock import utc
from gadgets.journal import JobRow, Journal, State
from gadgets.log_lines import log_to_stderr
from recon_core.errors import SettingError

if TYPE_CHECKING:
    from gadgets.results import Archives

PIPE_COLUMNS = 200
out = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)

SpoolOption = Annotated[Path | None, typer.Option("--spool", help="The server's spool. Default: the state folder.")]
KeepImages = Annotated[
    bool, typer.Option("--keep-images/--no-keep-images", help="Keep each scan's images beside its raw data.")
]
KeepDays = Annotated[float | None, typer.Option(help="Raw data older than this many days are removed.", min=0.001)]
MinFree = Annotated[float, typer.Option(help="With less free disk, GB, no more raw data are kept; scans go on.", min=0.0)]
Pacs = Annotated[
    list[str] | None, typer.Option(help="AET@HOST:PORT of an archive that gets every scan's images; repeat for several.")
]
PacsCalling = Annotated[str, typer.Option(help="Our AE title, as the archive knows it.")]
PacsTls = Annotated[bool, typer.Option("--pacs-tls", help="Encrypted; the archive's certificate is verified.")]
PacsCa = Annotated[Path | None, typer.Option("--pacs-tls-ca", help="PEM of who signed it. Default: the system's.")]
PacsCertificate = Annotated[Path | None, typer.Option("--pacs-tls-certificate", help="PEM of our own certificate.")]
PacsKey = Annotated[Path | None, typer.Option("--pacs-tls-key", help="PEM of our own key.")]
PacsName = Annotated[str | None, typer.Option("--pacs-tls-name", help="Name in their certificates, if not the host's.")]
PacsMaps = Annotated[
    bool,
    typer.Option(
        "--pacs-parametric-maps", help="Send each map also as a Parametric Map object, for viewers that know them."
    ),
]


def jobs(
    spool: SpoolOption = None,
    state: Annotated[str | None, typer.Option(help="received, reconstructing, sent or failed.")] = None,
    limit: Annotated[int, typer.Option(help="The newest so many; 0 lists all.", min=0)] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, with settings and versions.")] = False,
) -> None:
    """List scans and what became of them, newest first."""
    if state is not None and state not in get_args(State):
        raise typer.BadParameter(f"got {state!r}, expected one of {', '.join(get_args(State))}", param_hint="--state")
    root = _root(spool)
    journal = Journal.open(root)
    try:
        rows = journal.rows(limit or None, state)  # type: ignore[arg-type]  # checked above
        counts = journal.counts()
    finally:
        journal.close()
    if as_json:
        print(json.dumps([_document(row, root) for row in rows], indent=1))
        return
    table = Table("job", "state", "chain", "received", "readouts", "images", "seconds", "archive", "what happened")
    table.columns[0].no_wrap = True
    for row in rows:
        table.add_row(
            row.id, row.state, row.chain, _time(row.received), str(row.n_readouts), str(row.n_images), _seconds(row), row.archive,
            _story(row, root),
        )  # fmt: skip
    out.print(table, markup=False)
    out.print(", ".join(f"{n} {name}" for name, n in counts.items()), highlight=False)


def retry(
    job: Annotated[str, typer.Argument(help="Id of a job (recon jobs), or enough of its beginning.")],
    config: Annotated[str | None, typer.Option("--config", "-c", help="Another chain than the scanner asked for.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE; repeat for several.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Image file to write. Default: images.h5 in the job's folder.")
    ] = None,
    spool: SpoolOption = None,
    configs: Annotated[Path | None, typer.Option(help="Folder of chain files, where no server runs.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n], where no server runs.")] = "auto",
    workers: Annotated[int | None, typer.Option(help="Compute processes, where no server runs.", min=0)] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of each, where no server runs.", min=1)] = None,
) -> None:
    """Reconstruct a scan again from its raw data: by the running server, or here when there is none."""
    from gadgets.retry import retry as run

    log_to_stderr("ERROR")
    root = _root(spool)

    def here(row: JobRow) -> JobRow:
        from gadgets.service import ServiceOptions, reconstruct_row

        options = ServiceOptions(
            port=0,
            spool=root,
            noise=root.parent / "noise",
            masks=root.parent / "masks",
            configs=configs,
            device=device,
            workers=workers,
            threads=threads,
            rehearse=False,
        )
        return reconstruct_row(options, row)

    row, images = run(root, job, config=config, settings=name_value_pairs(settings or []), output=output, here=here)
    for warning in row.warnings:
        print(f"WRN {warning}", file=sys.stderr)
    print(f"{row.n_images} images in {images} (job {row.id}, chain {row.chain}, {_seconds(row)} s)")


def archives(
    spool: Path | None, destinations: list[str] | None, calling: str, tls: bool, ca: Path | None, certificate: Path | None,
    key: Path | None, name: str | None = None, *, parametric_maps: bool = False,
) -> Archives | None:  # fmt: skip
    """What ``--pacs`` and its companions ask for; ``None`` without any.

    Raises
    ------
    MissingExtra, PacsError
        DICOM's packages are not installed, or a destination that is none.
    SettingError
        Companions without a destination.
    """
    if not destinations:
        values = {
            "tls": tls,
            "ca": ca,
            "certificate": certificate,
            "key": key,
            "name": name,
            "parametric-maps": parametric_maps,
        }
        alone = [f"--pacs-{option}" for option, value in values.items() if value]
        if alone:
            raise SettingError(
                "no archive to send to", where="pacs", got=", ".join(alone), remedy="Name it: --pacs AET@host:port"
            )
        return None
    from gadgets.dicom_cli import dicom_packages, make_destination

    with dicom_packages():
        from gadgets.pacs import read_address
        from gadgets.results import Archives

        if parametric_maps:  # now, and not after the first scan
            importlib.import_module("highdicom")
        found = []
        for text in destinations:
            aet, host, port = read_address(text)
            found.append(make_destination(host, port, aet, calling, tls, ca, certificate, key, name))
        return Archives(tuple(found), _root(spool).parent / "pacs", parametric_maps)


def _root(spool: Path | None) -> Path:
    from gadgets.spool import default_spool_root

    return default_spool_root() if spool is None else spool.expanduser()


def name_value_pairs(texts: list[str]) -> dict[str, str]:
    """What ``--set NAME=VALUE`` says, given several times.

    Raises
    ------
    BadParameter
        No name, no equals sign, or one name with two values.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise typer.BadParameter(f"got {text!r}, expected NAME=VALUE", param_hint="--set")
        if found.get(name, value) != value:
            raise typer.BadParameter(f"{name} is both {found[name]!r} and {value!r}", param_hint="--set")
        found[name] = value
    return found


def _document(row: JobRow, root: Path) -> dict[str, Any]:
    images = row.images(root)
    kept = bool(row.capture) and (root / row.capture).is_file()
    return {**asdict(row), "images": None if images is None else str(images), "raw_kept": kept}


def _time(moment: float | None) -> str:
    return "-" if moment is None else utc(moment)


def _seconds(row: JobRow) -> str:
    return "-" if row.finished is None or row.started is None else f"{row.finished - row.started:.1f}"


def _story(row: JobRow, root: Path) -> str:
    parts = [] if row.origin == "connection" else [row.origin]
    parts += [row.why] if row.why else []
    parts += [f"images from {row.fallback}"] if row.fallback else []
    parts += [f"{n} warning{'s' if n > 1 else ''}"] if (n := len(row.warnings)) else []
    if not row.capture:
        parts.append("raw data not kept")
    elif not (root / row.capture).is_file():
        parts.append("raw data removed")
    return "; ".join(parts)
