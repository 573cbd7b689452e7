"""The commands ``recon dicom`` and ``recon pacs``: images into DICOM files, DICOM files into an archive."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from gadgets.capture import capture_beside
from gadgets.clock import utc
from gadgets.errors import MissingExtra
from gadgets.log_lines import log_to_stderr
from gadgets.outputs import check_folder

if TYPE_CHECKING:  # neither pydicom nor pynetdicom is needed for --help
    from gadgets.pacs import Destination

pacs_app = typer.Typer(name="pacs", help="Send DICOM files to an archive, and keep trying.", no_args_is_help=True)
PIPE_COLUMNS = 200
out, err = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS), Console(stderr=True)

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@contextlib.contextmanager
def dicom_packages() -> Iterator[None]:
    """Around imports of DICOM's packages: a missing one is a ``MissingExtra``."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in ("pydicom", "pynetdicom", "highdicom"):
            raise
        remedy = "pip install 'recon-gadgets[dicom]'"
        raise MissingExtra("package is not installed", where="DICOM", got=error.name, remedy=remedy) from None


def default_queue() -> Path:
    """``$XDG_STATE_HOME/recon-gadgets/pacs``, by default below ``~/.local/state``."""
    from gadgets.noise_store import default_noise_root

    return default_noise_root().parent / "pacs"


def dicom(
    source: Annotated[Path, typer.Argument(help="MRD image file (.h5).")],
    output: Annotated[Path, typer.Option("--out", "-o", help="New folder for the DICOM files.")] = Path("dicom"),
    header: Annotated[
        Path | None,
        typer.Option(
            help="Where patient and study come from: MRD raw file, raw capture or XML. "
            "Default: of images in a job's folder the capture beside it; of others they are left empty."
        ),
    ] = None,
    group: Annotated[str | None, typer.Option(help="Run in the image file, if it has several.")] = None,
    previews: Annotated[bool, typer.Option("--previews/--no-previews", help="Convert previews, too.")] = False,
    parametric_maps: Annotated[
        bool, typer.Option("--parametric-maps", help="Write each map also as a Parametric Map object.")
    ] = False,
) -> None:
    """Turn an MRD image file into DICOM series (classic MR images)."""
    with dicom_packages():
        from gadgets.dicom import convert
        from gadgets.dicom_identity import read_header_text

        check_folder(output)
        header = _header_beside(source) if header is None else header
        text = None if header is None else read_header_text(header)
        made = convert(source, output, header=text, group=group, previews=previews, parametric_maps=parametric_maps)
    for note in (*made.notes, *(f"no Parametric Map: {why}" for why in made.unmade)):
        _say(err, note)
    for name, count in made.series:
        _say(out, f"{count:>6}  {output / name}")


def _header_beside(images: Path) -> Path | None:
    """The capture of a job's images; said, because it decides whose images these are."""
    capture = capture_beside(images)
    if capture is None:
        return None
    if not capture.is_file():
        _say(err, f"the raw data of this job are not there any more: {capture}")
        return None
    _say(err, f"patient and study from {capture}")
    return capture


HostOption = Annotated[str, typer.Option("--host", "-a", help="The archive's address.")]
PortOption = Annotated[int, typer.Option("--port", "-p", min=1, max=65535, help="Its DICOM port: often 104, 4242 or 11112.")]
AetOption = Annotated[str, typer.Option("--aet", help="Its AE title.")]
CallingOption = Annotated[str, typer.Option("--calling", help="Our AE title, as the archive knows it.")]
TlsOption = Annotated[bool, typer.Option("--tls", help="Encrypted; the archive's certificate is verified.")]
CaOption = Annotated[Path | None, typer.Option("--tls-ca", help="PEM of who signed it. Default: the system's.")]
CertificateOption = Annotated[Path | None, typer.Option("--tls-certificate", help="PEM of our own certificate.")]
KeyOption = Annotated[Path | None, typer.Option("--tls-key", help="PEM of our own key.")]
NameOption = Annotated[str | None, typer.Option("--tls-name", help="Name in its certificate, if not the host's.")]
QueueOption = Annotated[Path | None, typer.Option("--queue", help="Folder of the queue. Default: the state folder.")]


@pacs_app.command()
def send(
    sources: Annotated[list[Path], typer.Argument(help="DICOM files, or folders of them.")],
    host: HostOption,
    aet: AetOption,
    port: PortOption = 104,
    calling: CallingOption = "RECONGADGETS",
    tls: TlsOption = False,
    tls_ca: CaOption = None,
    tls_certificate: CertificateOption = None,
    tls_key: KeyOption = None,
    tls_name: NameOption = None,
    queue: QueueOption = None,
    without_patient: Annotated[
        bool, typer.Option("--without-patient", help="Send also objects that have neither a patient's name nor an id.")
    ] = False,
) -> None:
    """Queue files and try at once. What the archive does not confirm stays queued: recon pacs work (or queue --send) goes on."""
    _quiet()
    with dicom_packages():
        from gadgets.pacs import require_patient
        from gadgets.pacs_queue import Queue, QueueBusy

        destination = make_destination(host, port, aet, calling, tls, tls_ca, tls_certificate, tls_key, tls_name)
        files = _files(sources)
        if not without_patient:
            require_patient(files)
        waiting = Queue(queue or default_queue())
        job = waiting.put(files, destination)
        try:
            finished = waiting.send_due(only=job.id)
        except QueueBusy:
            _say(out, f"{job.id}: {job.n_files} objects queued; another process is sending")
            return
    for one in finished or [job]:
        if one.left:
            _say(err, f"{one.id}: {one.left} of {one.n_files} objects stay queued: {one.problem}")
            raise typer.Exit(1)
        _say(out, f"{one.id}: {one.n_files} objects stored in {destination}")


@pacs_app.command()
def queue(
    folder: QueueOption = None,
    try_now: Annotated[bool, typer.Option("--send", help="One attempt for every job that is due.")] = False,
    retry: Annotated[str | None, typer.Option(help="Id of a job that is to be tried again, failed ones as well.")] = None,
    remove: Annotated[
        str | None, typer.Option(help="Id of a failed job that is to be thrown away, files and record.")
    ] = None,
) -> None:
    """List what waits for an archive, and why."""
    _quiet()
    with dicom_packages():
        from gadgets.pacs_queue import Queue

        waiting = Queue(_existing(folder or default_queue()))
        if remove is not None:
            waiting.remove(remove)
        if retry is not None:
            waiting.retry(retry)
        if try_now or retry is not None:
            for job in waiting.send_due(only=retry):
                if not job.left:
                    _say(out, f"{job.id}: {job.n_files} objects stored in {job.destination}")
        jobs = waiting.jobs()
    table = Table("job", "state", "destination", "left", "attempts", "next try", "problem")
    table.columns[0].no_wrap = True
    for job in jobs:
        due = "-" if job.state == "failed" else utc(job.next_try)
        left = f"{job.left}/{job.n_files}"
        table.add_row(job.id, job.state, str(job.destination), left, str(job.attempts), due, job.problem)
    out.print(table)


@pacs_app.command()
def work(
    folder: QueueOption = None,
    keep_days: Annotated[float, typer.Option(help="Files of failed jobs are kept for so many days.", min=0.001)] = 30.0,
) -> None:
    """Send what is queued, with growing pauses between attempts, until interrupted."""
    log_to_stderr("INFO")
    with dicom_packages():
        from gadgets.pacs_queue import Queue

        stop = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        Queue(folder or default_queue()).work(stop, keep_failed=keep_days * 86400)


@pacs_app.command()
def echo(
    host: HostOption,
    aet: AetOption,
    port: PortOption = 104,
    calling: CallingOption = "RECONGADGETS",
    tls: TlsOption = False,
    tls_ca: CaOption = None,
    tls_certificate: CertificateOption = None,
    tls_key: KeyOption = None,
    tls_name: NameOption = None,
) -> None:
    """Ask the archive whether it is there and knows us (C-ECHO)."""
    _quiet()
    with dicom_packages():
        from gadgets.pacs import echo as ask

        destination = make_destination(host, port, aet, calling, tls, tls_ca, tls_certificate, tls_key, tls_name)
        ask(destination)
    _say(out, f"{destination} answers")


def make_destination(
    host: str, port: int, aet: str, calling: str, tls: bool,
    ca: Path | None, certificate: Path | None, key: Path | None, name: str | None,
) -> Destination:  # fmt: skip
    """An archive as options name it; said when patient data would go unencrypted."""
    from gadgets.pacs import Destination, Tls

    secure = None
    if tls or ca or certificate or key or name:
        # the queue is worked off later, from another folder
        files = [None if path is None else str(path.resolve()) for path in (ca, certificate, key)]
        secure = Tls(files[0], files[1], files[2], name)
        secure.context()  # files that cannot be used are said now, not when images wait
    elif host not in LOOPBACK:
        _say(err, "patient data go over the network unencrypted: --tls if the archive can")
    return Destination(host, port, aet, calling, secure)


def _existing(folder: Path) -> Path:
    """A queue that is there: who only looks must not make one, and must not read "nothing waits" of a wrong folder."""
    from gadgets.pacs import PacsError

    if not folder.is_dir():
        raise PacsError(
            "no queue",
            where=str(folder),
            expected="the folder 'pacs' beside the server's --spool",
            remedy="Name it with --queue; a server that never had images for an archive has none",
        )
    return folder


def _files(sources: list[Path]) -> list[Path]:
    from gadgets.pacs import PacsError

    found: list[Path] = []
    for source in sources:
        if not source.exists():
            raise PacsError("no such file", where=str(source), expected="DICOM files, or folders of them")
        found += sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    return found


def _quiet() -> None:
    log_to_stderr("ERROR")


def _say(where: Console, text: str) -> None:
    where.print(text, markup=False, highlight=False, soft_wrap=True)
