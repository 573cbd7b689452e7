"""``make demo``: a server, two scans through it, pictures and a table. Nothing but what the package ships is needed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from gadgets.montage import write_montages
from gadgets.replay import ReplayResult, replay
from gadgets.simulate import simulate
from recon_core.errors import ReconError

out = Console()
MEASURED = Path(__file__).parent.parent / "tests" / "data" / "gre-2coil-raw" / "gre_phantom_raw.h5"


@dataclass(frozen=True)
class Case:
    """One replay of the demo: a title, a raw file and the chain to ask for."""

    title: str
    source: Path
    chain: str


def main(
    folder: Annotated[Path, typer.Option("--out", help="Where the images go; emptied first.")] = Path("demo-output"),
) -> None:
    """Start a server on loopback, replay a phantom and a simulated cine, leave images, pictures and a table."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    cine = folder / "cine_raw.h5"
    out.print("simulating a 12-frame cine, 4-fold undersampled ...")
    simulate("cine", cine, {"matrix_x": 160, "matrix_y": 160, "coils": 8, "mask": "vista", "acceleration": 4.0})
    cases = [
        Case("phantom", MEASURED, "fourier"),
        Case("cine, R = 4", cine, "cg_sense"),
        Case("cine, R = 4", cine, "llr"),
        Case("cine, R = 4", cine, "grasp_pro"),
        Case("cine, R = 4", cine, "moe_dqinr_cine"),
    ]
    server, port = _start_server(folder)
    try:
        rows = [(case, _replay(case, port, folder)) for case in cases]
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(30)
    _table(rows)
    pictures = sorted(folder.glob("*.png"))
    print(f"seconds are from the last readout; images: {folder / 'images.h5'}")
    for picture in pictures:
        print(f"  {picture}")


def _start_server(folder: Path) -> tuple[subprocess.Popen[str], int]:
    """The real command in a process of its own, on a free port of the loopback interface."""
    log = open(folder / "server.log", "w")  # noqa: SIM115 - the server's, for as long as it runs
    command = [sys.executable, "-m", "gadgets.cli", "serve", "--port", "0", "--spool", str(folder / "spool")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    if not line.startswith("listening on "):
        server.kill()
        raise SystemExit(f"the server did not start; see {folder / 'server.log'}")
    out.print(f"server {line.strip()}", highlight=False)
    return server, int(line.rsplit(":", 1)[1])


def _replay(case: Case, port: int, folder: Path) -> ReplayResult:
    started = time.perf_counter()
    group = f"{case.source.stem}_{case.chain}"
    result = replay(case.source, port=port, config=case.chain, out=folder / "images.h5", group=group)
    for path in write_montages(folder / "images.h5", folder, group=group):
        print(f"  {case.title}, {case.chain}: {path.name} ({time.perf_counter() - started:.1f} s)", flush=True)
    return result


def _table(rows: list[tuple[Case, ReplayResult]]) -> None:
    table = Table(title="What came back", show_edge=False)
    table.add_column("scan", no_wrap=True)
    table.add_column("chain", no_wrap=True)
    for column in ("images", "readouts/s", "s to first", "s to last"):
        table.add_column(column, justify="right", no_wrap=True)
    for case, r in rows:
        table.add_row(
            case.title, case.chain, str(r.n_images), f"{r.readouts_per_second:.0f}",
            f"{r.seconds_to_first_image:.2f}", f"{r.seconds_to_last_image:.2f}",
        )  # fmt: skip
    out.print(table)


if __name__ == "__main__":
    try:
        typer.run(main)
    except ReconError as error:
        raise SystemExit(f"demo: {error}") from None
