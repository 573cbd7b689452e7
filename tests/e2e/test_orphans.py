"""kill -9 of the server: no process of it stays behind, whatever its workers were doing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from gadgets.wire import codec
from tests.e2e.scans import SimulatedScan, in_memory
from tests.e2e.slow_chain import site_chains
from tests.waiting import PATIENCE, until

RECON = Path(sys.executable).with_name("recon")
pytestmark = pytest.mark.timeout(600)


@dataclass
class Server:
    """``recon serve`` and whatever it starts, told from all other processes by their environment."""

    process: subprocess.Popen[str]
    mark: str

    def family(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("TMPDIR") == self.mark:
                    found.append(process)
            except psutil.Error:  # it ended meanwhile, or is another user's
                continue
        return found

    def workers(self, kind: str) -> list[psutil.Process]:
        found = []
        for process in self.family():
            try:
                words = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if kind in words and "resource_tracker" not in words:
                found.append(process)
        return found

    def port(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline().rsplit(":", 1)[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def require_nobody_left(self) -> None:
        until(lambda: not self.family(), lambda: f"still there: {[' '.join(p.cmdline()) for p in self.family()]}")


@contextmanager
def serve(folder: Path, *options: str) -> Iterator[Server]:
    temporary = folder / "tmp"
    temporary.mkdir()
    command = [str(RECON), "serve", "--port", "0", "--workers", "1", "--threads", "1", "--spool", str(folder / "spool")]
    environment = {**os.environ, "TMPDIR": str(temporary), "XDG_STATE_HOME": str(folder / "state")}
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as process,
    ):
        server = Server(process, str(temporary))
        try:
            yield server
        finally:
            for left in server.family():
                left.kill()


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=3, slices=2, calibration="separate", acs=16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options"), [("loky", ()), ("spawn_main", ("--scheduler", "local:2"))], ids=["here", "dask"]
)
def test_workers_that_compute_end_with_their_server(
    kind: str, options: tuple[str, ...], scan: SimulatedScan, tmp_path: Path
) -> None:
    with serve(tmp_path, "--configs", str(site_chains(tmp_path / "configs")), *options) as server:
        session = codec.config_file("endless") + codec.header(scan.header) + b"".join(scan.messages) + codec.close()
        with socket.create_connection(("127.0.0.1", server.port()), timeout=PATIENCE) as connection:
            connection.sendall(session)
            heard = b""
            while b"DBG endless" not in heard:  # a worker says how far it is
                heard += connection.recv(1 << 16) or pytest.fail("the server left")
            assert server.workers(kind)
            server.kill()
        server.require_nobody_left()


@pytest.mark.parametrize("kind", ["loky", "spawn_main"])
@pytest.mark.parametrize("seconds", [0.0, 0.3])
def test_workers_that_are_starting_end_with_their_server(kind: str, seconds: float, tmp_path: Path) -> None:
    """They have imported nothing yet, and do not know who their server was."""
    options = ("--scheduler", "local:1") if kind == "spawn_main" else ()
    with serve(tmp_path, *options) as server:
        until(lambda: server.workers(kind) or server.process.poll() is not None)
        assert server.process.poll() is None, (tmp_path / "log").read_text()
        moment = time.monotonic() + seconds
        until(lambda: time.monotonic() >= moment)
        server.kill()
        server.require_nobody_left()
