"""A monitor as a process, requests to it, and a real server with one beside it."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tests.waiting import PATIENCE

T = TypeVar("T")
RECON = Path(sys.executable).with_name("recon")
TOKEN = "a-token-of-twenty-nine-letters"


@dataclass
class Answer:
    """What came back."""

    code: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Site:
    """A monitor that answers."""

    port: int
    spool: Path
    process: subprocess.Popen[str]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str, *, method: str = "GET", body: str | None = None, **headers: str) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()


@dataclass
class Watched(Site):
    """A server with its monitor."""

    server_port: int = 0
    log: Path = field(default_factory=Path)


def environment(folder: Path) -> dict[str, str]:
    temporary = folder / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    return {**os.environ, "TMPDIR": str(temporary), "XDG_STATE_HOME": str(folder / "state"), "OMP_NUM_THREADS": "1"}


@contextmanager
def monitoring(folder: Path, spool: Path, *options: str) -> Iterator[Site]:
    """``recon monitor`` on a free port of loopback."""
    command = [str(RECON), "monitor", "--spool", str(spool), "--listen", "127.0.0.1:0", *options]
    with (folder / "monitor.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(folder))
        try:
            yield Site(_port(process, "monitor on http://127.0.0.1:", folder / "monitor.log"), spool, process)
        finally:
            process.terminate()
            process.communicate(timeout=PATIENCE)


@contextmanager
def watched(folder: Path, *options: str) -> Iterator[Watched]:
    """``recon serve --monitor``, both on free ports of loopback, one worker."""
    spool = folder / "spool"
    command = [
        str(RECON), "serve", "--port", "0", "--monitor", "127.0.0.1:0", "--spool", str(spool), "--workers", "1",
        "--threads", "1", *options,
    ]  # fmt: skip
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment(folder))
        try:
            server = _port(process, "listening on 127.0.0.1:", folder / "server.log")
            monitor = _port(process, "monitor on http://127.0.0.1:", folder / "server.log")
            yield Watched(monitor, spool, process, server, folder / "server.log")
        finally:
            if process.poll() is None:
                process.terminate()
            process.communicate(timeout=PATIENCE)


def _port(process: subprocess.Popen[str], words: str, log: Path) -> int:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.fullmatch(re.escape(words) + r"(\d+)/?\n", line)
    assert found is not None, (line, log.read_text())
    return int(found[1])
