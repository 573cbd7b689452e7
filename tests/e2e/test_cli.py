"""The command ``recon`` as a user has it: processes, their words, their exit codes, and what they leave behind."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from rich.console import Console
from rich.progress import Progress, TextColumn
from typer.testing import CliRunner

from gadgets import replay_cli
from gadgets.chain import chain_names, load_chain
from gadgets.cli import app
from gadgets.wire import codec
from recon_core.simulation.options import KINDS, USED_BY, ScanSettings
from tests.e2e.scans import SimulatedScan, simulated
from tests.waiting import PATIENCE, until

RECON = Path(sys.executable).with_name("recon")


@dataclass
class Serving:
    """A running ``recon serve``: its process, port, and where its log, its spool and its temporary files go."""

    process: subprocess.Popen[str]
    port: int
    log: Path
    spool: Path
    temporary: Path

    def scratch(self) -> list[Path]:
        """What is left of it in shared memory and in temporary storage."""
        return [*Path("/dev/shm").glob(f"*{self.process.pid}*"), *self.temporary.iterdir()]


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[Serving]:
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    environment = {**os.environ, "TMPDIR": str(temporary), "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [RECON, "serve", "--port", "0", *options], stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            listening = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", line)
            assert listening is not None, (line, (folder / "log").read_text())
            spool = folder / "state" / "recon-gadgets" / "spool"
            yield Serving(process, int(listening[1]), folder / "log", spool, temporary)
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=PATIENCE)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """As ``recon serve`` is started without any option but the port."""
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    return simulated(
        "cine", tmp_path_factory.mktemp("scan") / "scan.h5", matrix_x=48, matrix_y=48, coils=4, states=3, slices=2
    )


def recon(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([RECON, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE)


# ---- serve and replay ------------------------------------------------------------------------------------------------------


def test_replay_writes_images_and_says_how_it_went(server: Serving, scan: SimulatedScan, tmp_path: Path) -> None:
    out, pictures = tmp_path / "out.h5", tmp_path / "pictures"
    done = recon("replay", scan.path, "--config", "cg_sense", "--port", server.port, "--out", out, "--montage", pictures)
    assert done.returncode == 0, done.stderr
    assert re.search(r"6 images in .*out\.h5 \(group .*\); \d+ readouts/s, first image \d", done.stdout)
    assert "INF cg_sense: 6 images" in done.stderr
    with h5py.File(out) as file:
        (group,) = file.values()
        assert sum(len(series["data"]) for series in group.values()) == 6
    (picture,) = pictures.glob("*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_replay_shows_its_progress_on_a_terminal(server: Serving, scan: SimulatedScan, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [RECON, "replay", scan.path, "-c", "fourier", "-p", str(server.port), "-o", tmp_path / "out.h5"],
        stdout=subprocess.DEVNULL, stderr=theirs, env={**os.environ, "COLUMNS": "120", "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # a pseudo-terminal ends with an error
        pass
    os.close(ours)
    assert process.wait(PATIENCE) == 0
    with h5py.File(scan.path) as file:
        n = len(file["dataset/data"])
    assert f"{n}/{n}" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())


def test_replay_fails_with_the_server_s_words(server: Serving, scan: SimulatedScan, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    done = recon("replay", scan.path, "--config", "no_such_chain", "--port", server.port, "--out", out)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "UnknownChain" in line and "cg_sense" in line
    assert not out.exists()


def test_replay_refuses_a_bad_setting(server: Serving, scan: SimulatedScan, tmp_path: Path) -> None:
    arguments = ("replay", scan.path, "-c", "cg_sense", "-p", server.port, "-o", tmp_path / "out.h5")
    done = recon(*arguments, "--set", "iterations=several")
    assert done.returncode == 1 and "SettingError" in done.stderr
    assert recon(*arguments, "--set", "iterations").returncode == 2


def test_replay_of_what_is_no_raw_file(server: Serving, tmp_path: Path) -> None:
    done = recon("replay", tmp_path / "missing.h5", "-c", "fourier", "-p", server.port)
    assert done.returncode == 1 and "missing.h5" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("replay", "missing.h5", "-c", "fourier"), "RawFileError: missing.h5: cannot read the file"),
        (("replay", "words.h5", "-c", "fourier"), "neither an MRD raw file"),
        (("replay", ".", "-c", "fourier"), "Is a directory"),
        # looked at before anything is started, chains included
        (("run", "missing.h5", "-c", "fourier", "--configs", "."), "RawFileError: missing.h5: cannot read the file"),
        (("simulate", "cine", "words.h5/simulated.h5"), "words.h5"),
        (("simulate", "spiral"), "expected cine, molli, satrec, mgre"),
        (("chains", "no_such_chain"), "UnknownChain"),
        (("serve", "--port", "0", "--workers", "0", "--spool", "words.h5/spool"), "SpoolError"),
        (("serve", "--log-level", "loud"), "expected debug, info, warning or error"),
    ],
)
def test_a_mistake_is_answered_without_a_traceback(tmp_path: Path, arguments: tuple[str, ...], words: str) -> None:
    (tmp_path / "words.h5").write_text("not HDF5")
    done = subprocess.run(
        [RECON, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert words in done.stderr


def test_replay_at_the_scanner_s_pace(server: Serving, scan: SimulatedScan, tmp_path: Path) -> None:
    done = recon("replay", scan.path, "-c", "fourier", "-p", server.port, "-o", tmp_path / "out.h5", "--rate", 400)
    assert done.returncode == 0, done.stderr
    pace = re.search(r"(\d+) readouts/s", done.stdout)
    assert pace is not None and int(pace[1]) <= 420


def test_run_gives_the_server_s_bits_with_the_defaults_of_both(server: Serving, scan: SimulatedScan, tmp_path: Path) -> None:
    served, here = tmp_path / "served.h5", tmp_path / "here.h5"
    assert recon("replay", scan.path, "-c", "llr", "-p", server.port, "-o", served).returncode == 0
    done = recon("run", scan.path, "--config", "llr", "--out", here, "--montage", tmp_path / "pictures")
    assert done.returncode == 0, done.stderr
    assert "6 images" in done.stdout and list((tmp_path / "pictures").glob("*.png"))
    with h5py.File(served) as one, h5py.File(here) as other:
        (a,), (b,) = one.values(), other.values()
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name]["data"][:], b[name]["data"][:])


def test_run_keeps_what_the_method_tells_and_counts_previews_apart(scan: SimulatedScan, tmp_path: Path) -> None:
    folder, out = tmp_path / "new" / "job", tmp_path / "out.h5"
    asked = ("run", scan.path, "-c", "llr", "--out", out, "--set", "preview=cg_sense", "--job-folder", folder)
    done = recon(*asked, "--previews")
    assert done.returncode == 0, done.stderr
    assert re.search(r"6 images in .*; 6 previews, first \d+\.\d+ s", done.stdout) and str(folder) in done.stdout
    assert not re.search(r"DBG \S+ \d+ %", done.stderr)
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["chain"] == "llr" and quality["slices"]["1"]["quality"]["iterations"] == 30.0
    with h5py.File(out) as file:
        (group,) = file.values()
        assert {name: len(series["data"]) for name, series in group.items()} == {"image_1": 6, "image_1001": 6}


@pytest.mark.parametrize(
    ("line", "colour"),
    [("INF llr: 6 images\n", 32), ("WRN thin coils\n", 33), ("ERROR no memory\n", 31), ("DBG [red]x[/]", None)],
)
def test_what_a_server_says_is_coloured_by_kind_on_a_terminal(line: str, colour: int | None) -> None:
    shown, plain = io.StringIO(), io.StringIO()
    replay_cli.show_line(line, Console(file=shown, force_terminal=True, color_system="standard"))
    replay_cli.show_line(line, Console(file=plain, force_terminal=False))
    assert shown.getvalue() == (f"\x1b[{colour}m{line.rstrip()}\x1b[0m\n" if colour else line.rstrip() + "\n")
    assert plain.getvalue() == line.rstrip() + "\n"


def test_the_bar_follows_the_servers_words() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=120, color_system=None)
    with Progress(
        TextColumn("{task.description}"), replay_cli.Count(), replay_cli.Left(), console=console, auto_refresh=False
    ) as bar:
        sent, tell = replay_cli.readouts_bar(bar), replay_cli.reconstruction_bar(bar)
        sent(5, 10)
        tell("WRN something else\n")
        assert len(bar.tasks) == 1
        tell("DBG llr 40 %, about 25 s left\n")
        bar.refresh()
        tell("DBG llr 80 %\n")
        bar.refresh()
        tell("INF llr: 6 images in 3.0 s after the last readout\n")
        bar.refresh()
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.getvalue())
    lines = [" ".join(line.split()) for line in plain.splitlines()]
    assert any(line.startswith("readouts 5/10") for line in lines)
    seen = [line for line in lines if line.startswith("reconstruction")]
    assert {"reconstruction 40 % about 25 s left", "reconstruction 80 %"} <= set(seen)
    assert seen[-1] == "reconstruction 100 %"


def test_run_fails_in_one_line(scan: SimulatedScan, tmp_path: Path) -> None:
    asked = ("run", scan.path, "--config", "cg_sense", "--out", tmp_path / "out.h5", "--workers", 0)
    done = recon(*asked, "--set", "nonsense=1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("recon: ReplayFailed: SettingError: chain cg_sense: unknown setting; got nonsense"), line


# ---- the other commands ----------------------------------------------------------------------------------------------------


def test_simulate_lists_its_settings_and_writes_a_scan(tmp_path: Path) -> None:
    described = recon("simulate", "mgre", "--describe")
    assert described.returncode == 0
    for name in (setting.name for setting in fields(ScanSettings)):
        listed = re.search(rf"│ {name} +│", described.stdout) is not None
        assert listed == ("mgre" in USED_BY.get(name, KINDS)), name
    out = tmp_path / "satrec.h5"
    done = recon("simulate", "satrec", out, "--set", "matrix_x=48", "--set", "matrix_y=48", "--set", "coils=2")
    assert done.returncode == 0, done.stderr
    assert out.exists() and out.with_name("satrec.truth.h5").exists()
    assert re.search(r"n_readouts\s+\d+", done.stdout)
    wrong = recon("simulate", "satrec", out, "--set", "matrix_x=1e9")
    assert wrong.returncode == 1 and "SettingError" in wrong.stderr


def test_chains_lists_every_setting_for_people_and_for_programs() -> None:
    listed = recon("chains", "--json")
    assert listed.returncode == 0
    chains = {chain["name"]: chain for chain in json.loads(listed.stdout)}
    assert set(chains) == set(chain_names())
    for name, told in chains.items():
        chain = load_chain(name)
        assert told["method"] == chain.method and told["fallback"] == chain.fallback and told["summary"]
        groups = {"acquisition": chain.acquisition, "preprocess": chain.preprocess, "coils": chain.coils,
                  "output": chain.output, "method": chain.settings}  # fmt: skip
        for group, settings in groups.items():
            by_name = {info["name"]: info for info in told["settings"][group]}
            assert set(by_name) == {f.name for f in fields(settings)}
            assert all(by_name[key]["default"] == getattr(settings, key) for key in by_name)
            assert all(info["help"] and info["kind"] in ("bool", "int", "float", "str") for info in by_name.values())
    described = CliRunner().invoke(app, ["chains", "llr", "--describe"])
    assert described.exit_code == 0
    for infos in chains["llr"]["settings"].values():
        for info in infos:
            assert re.search(rf"\b{info['name']}\b", described.stdout), info["name"]


def test_info_tells_versions() -> None:
    done = recon("info")
    assert done.returncode == 0
    for word in ("recon-gadgets", "python", "torch", "ismrmrd", "cores", "chains"):
        assert re.search(rf"^{word}\s+\S", done.stdout, re.MULTILINE), word


# ---- the end of a server ---------------------------------------------------------------------------------------------------


def started_scan(server: Serving, scan: SimulatedScan) -> socket.socket:
    """A connection in mid-scan."""
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    start = struct.pack("<H1024s", 1, b"llr") + codec.header(scan.header)
    connection.sendall(start + b"".join(scan.messages[:-1]))
    return connection


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "in mid-scan"])
def test_sigterm_ends_a_server_cleanly(busy: bool, scan: SimulatedScan, tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children  # worker processes
        recon("replay", scan.path, "-c", "cg_sense", "-p", server.port, "-o", tmp_path / "out.h5")
        known = list(server.spool.glob("*.mrd"))
        connection = started_scan(server, scan) if busy else None
        if busy:
            begin = 2 + 1024 + len(codec.header(scan.header)) + len(scan.messages[0])
            until_capture(server.spool, server.process, begin, known)
        server.process.send_signal(signal.SIGTERM)
        if connection is not None:
            connection.close()
        assert server.process.wait(PATIENCE) == 0
        _, alive = psutil.wait_procs(children, timeout=PATIENCE)
        assert not alive
        until(lambda: not server.scratch(), lambda: str(server.scratch()))
        log = server.log.read_text()
        assert "Traceback" not in log and "event=stopping" in log
        states = sorted(json.loads(path.read_text())["status"] for path in server.spool.glob("*.json"))
        assert states == ["complete", "truncated"][: 1 + busy]


def test_a_killed_server_leaves_nothing_that_its_successor_does_not_clear(scan: SimulatedScan, tmp_path: Path) -> None:
    with serving(tmp_path / "first", "--spool", str(tmp_path / "spool")) as first:
        children = psutil.Process(first.process.pid).children(recursive=True)
        connection = started_scan(first, scan)
        try:
            until_capture(tmp_path / "spool", first.process)
            first.process.kill()
            first.process.wait(PATIENCE)
        finally:
            connection.close()
        _, alive = psutil.wait_procs(children, timeout=PATIENCE)
        assert not alive, [p.cmdline() for p in alive]
        with serving(tmp_path / "second", "--spool", str(tmp_path / "spool"), "--workers", "0"):
            until(lambda: not first.scratch(), lambda: str(first.scratch()))
            (told,) = (json.loads(path.read_text()) for path in (tmp_path / "spool").glob("*.json"))
            assert told["status"] == "truncated"


def until_capture(spool: Path, process: subprocess.Popen[str], n_bytes: int = 1, known: Sequence[Path] = ()) -> None:
    """Returns when the server has written so many bytes of a capture that is none of the ``known``."""

    def look() -> bool:
        assert process.poll() is None
        return any(path.stat().st_size >= n_bytes for path in spool.glob("*.mrd") if path not in known)

    until(look)
