"""``recon replay`` and ``recon run``: a file through a server, or through none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from gadgets.errors import ImageFileError, ReplayFailed
from gadgets.jobs_cli import name_value_pairs
from gadgets.outputs import check_folder, check_image_file
from gadgets.state_folder import compiler_caches, state_folder
from gadgets.terminal import err, log_from, out

if TYPE_CHECKING:  # it imports torch
    from gadgets.service import ServiceOptions

STANDARD = "-"
"""In the place of a file: stdin or stdout."""

STYLES = {"INF": "green", "WRN": "yellow", "ERR": "red", "ERROR": "red"}
"""Colours of what a server says, on a terminal."""


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
    urgent: Annotated[
        bool,
        typer.Option(
            "--urgent/--behind",
            help="Compute it like a scanner's scan, or let those go first. Other makers' servers: --urgent.",
        ),
    ] = False,
) -> None:
    """Send raw data to a running server and keep the images that come back. Scans of scanners go first, unless this is --urgent."""
    from gadgets.replay import replay as run_replay
    from gadgets.tls import client_tls

    if STANDARD in (str(source), str(output)):
        raise ImageFileError(
            "stdin and stdout are for streams", where="replay", got=STANDARD, remedy="recon run - makes images of one"
        )
    check_image_file(output)
    if montage is not None:
        check_folder(montage)
    log_from("warning")
    with _said_before_it_failed(), _progress() as bar:
        result = run_replay(
            source, host=host, port=port, config=config, out=output, rate=rate, parameters=name_value_pairs(settings or []),
            tls=client_tls(tls, tls_ca, tls_cert, tls_key, tls_name), behind=not urgent,
            progress=readouts_bar(bar), on_text=reconstruction_bar(bar),
        )  # fmt: skip
    _show(result, output, montage)


def run(
    source: Annotated[
        Path, typer.Argument(help="MRD raw file (.h5), a raw capture of the spool (.mrd), or -: an MRD stream on stdin.")
    ],
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Chain to reconstruct with; a capture brings its own.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="MRD image file to write, or -: an MRD stream on stdout. Default: out.h5; of a stream, a stream.",
        ),
    ] = None,
    montage: Annotated[Path | None, typer.Option(help="Folder for a PNG of each series of an image file.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE; repeat for several.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda[:n].")] = "auto",
    configs: Annotated[Path | None, typer.Option(help="Folder of chain files instead of the shipped ones.")] = None,
    masks: Annotated[Path | None, typer.Option(help="Folder of sampling masks. Default: in the state folder.")] = None,
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
    """Reconstruct a file, or an MRD stream, here and now, through the same pipeline as the server, without one."""
    from gadgets.devices import choose_device
    from gadgets.raw_source import open_source
    from gadgets.replay import replay as run_replay
    from gadgets.service import Service, ServiceOptions

    if montage is not None and (str(output) == STANDARD or (output is None and str(source) == STANDARD)):
        raise ImageFileError("pictures are made of an image file", where="--montage", remedy="Name one: --out FILE.h5")
    piped = str(source) == STANDARD
    output = output or Path(STANDARD if piped else "out.h5")
    if str(output) != STANDARD:
        check_image_file(output)
    for folder in (montage, job_folder):
        if folder is not None:
            check_folder(folder)
    choose_device(device)
    compiler_caches()
    log_from("error")  # warnings come as the server's words as well
    # the server's own defaults: sums depend on the number of threads in their last bits
    options = ServiceOptions(
        port=0, workers=workers, threads=threads, spool=None, configs=configs, device=device, previews=previews,
        job_folder=job_folder, masks=masks or state_folder() / "masks", rehearse=False,
    )  # fmt: skip
    if piped or str(output) == STANDARD:
        _run_stream(source, output, montage, config, settings, options)
        return
    # before the workers are started, which takes seconds
    played = open_source(source, config=config, parameters=name_value_pairs(settings or []))
    try:
        with Service(options) as service, _said_before_it_failed(), _progress() as bar:
            result = run_replay(
                played, host=service.host, port=service.port, out=output, progress=readouts_bar(bar),
                on_text=reconstruction_bar(bar),
            )  # fmt: skip
    except ReplayFailed as failure:  # nobody started a server or named an address
        words = getattr(failure.result, "errors", ())
        raise (ReplayFailed(" | ".join(word.removeprefix("ERROR ") for word in words)) if words else failure) from None
    _show(result, output, montage)
    _tell_of_folder(job_folder, service.job_folders.problems)


def _run_stream(
    source: Path, output: Path, montage: Path | None, config: str | None, settings: list[str] | None, options: ServiceOptions
) -> None:
    from gadgets.stream import run_files

    result = run_files(source, output, config=config, settings=name_value_pairs(settings or []), options=options)
    if str(output) != STANDARD and result.group is not None and result.n_images:
        _tell(f"{result.n_images} images in {output} (group {result.group})")
        _draw(output, montage, result.group)
    _tell_of_folder(options.job_folder, result.job_folder_problems, err if str(output) == STANDARD else out)


class Count(MofNCompleteColumn):
    """Pieces, or per cent where the total is no number of pieces."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.percentage:.0f} %") if "left" in task.fields else super().render(task)


class Left(TimeRemainingColumn):
    """The server's own estimate where it has one: it knows how many slices wait."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["left"]) if "left" in task.fields else super().render(task)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), Count(), TimeElapsedColumn(), Left(),
        console=err, disable=not err.is_terminal,
    )  # fmt: skip


def readouts_bar(bar: Progress) -> Any:
    """Follows the readouts that have been sent."""
    task = bar.add_task("readouts", total=None)

    def advance(done: int, total: int | None) -> None:
        bar.update(task, completed=done, total=total)

    return advance


def reconstruction_bar(bar: Progress) -> Any:
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


def show_line(line: str, where: Console) -> None:
    """One line of the server, in the colour of its kind."""
    where.print(line.rstrip(), style=STYLES.get(line.split(" ", 1)[0]), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _said_before_it_failed() -> Iterator[None]:
    """The warnings of a scan that fails are part of the reason, so they are shown as well."""
    try:
        yield
    except ReplayFailed as failure:
        said = str(failure)
        _show_lines(line for line in getattr(failure.result, "texts", ()) if line.strip() not in said)
        raise


def _show_lines(lines: Iterable[str]) -> None:
    from gadgets.progress import read_progress_line

    for line in lines:
        if read_progress_line(line) is None:  # how far it was is no news now
            show_line(line, err)


def _show(result: Any, output: Path, montage: Path | None) -> None:
    _show_lines(result.texts)
    quick = f"; {result.n_previews} previews, first {result.seconds_to_first_preview:.3f} s" if result.n_previews else ""
    _tell(
        f"{result.n_images} images in {output} (group {result.group}); {result.readouts_per_second:.0f} readouts/s, "
        f"first image {result.seconds_to_first_image:.3f} s and last {result.seconds_to_last_image:.3f} s after the last readout{quick}"
    )
    _draw(output, montage, result.group)


def _draw(images: Path, folder: Path | None, group: str) -> None:
    if folder is None:
        return
    from gadgets.montage import write_montages

    for path in write_montages(images, folder, group=group):
        _tell(str(path))


def _tell_of_folder(folder: Path | None, problems: list[str], where: Console = out) -> None:
    """Where what the method tells besides is, or that it is not all there."""
    if folder is None:
        return
    for problem in problems:
        show_line(f"WRN not all that the method tells besides is in {folder}: {problem}", err)
    if not problems and folder.is_dir():
        _tell(f"what the method tells besides: {folder}", where)


def _tell(text: str, where: Console = out) -> None:
    where.print(text, markup=False, highlight=False, soft_wrap=True)
