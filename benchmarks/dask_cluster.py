"""A Dask cluster of separate processes, as a site starts it: ``dask scheduler`` and ``dask worker``, over TLS or not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

DEADLINE = 120.0
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "false"}


@contextmanager
def dask_cluster(folder: Path, n_workers: int, tls: Sequence[str] = (), port: int = 0) -> Iterator[str]:
    """The scheduler's address. ``tls`` are the options of both commands: ``--tls-ca-file`` and so on; port 0 is any."""
    folder.mkdir(parents=True, exist_ok=True)
    started: list[subprocess.Popen[bytes]] = []
    log = (folder / "dask.log").open("wb")
    contact = folder / "scheduler.json"

    def start(what: str, *options: str) -> None:
        module = f"distributed.cli.dask_{what}"
        command = [
            sys.executable,
            "-m",
            module,
            "--host",
            "127.0.0.1",
            "--no-dashboard",
            "--dashboard-address",
            "127.0.0.1:0",
            *tls,
            *options,
        ]
        started.append(subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **ENVIRONMENT}, cwd=folder))

    try:
        protocol = ["--protocol", "tls"] if tls else []
        start("scheduler", "--port", str(port), "--scheduler-file", str(contact), *protocol)
        address = _address(contact, started[0], folder)
        for _ in range(n_workers):
            start("worker", address, "--nthreads", "1", "--memory-limit", "0", "--local-directory", str(folder), *protocol)
        yield address
    finally:
        for process in reversed(started):
            process.terminate()
        for process in reversed(started):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        log.close()


def _address(contact: Path, scheduler: subprocess.Popen[bytes], folder: Path) -> str:
    import json

    end = time.monotonic() + DEADLINE
    while time.monotonic() < end and scheduler.poll() is None:
        try:
            return str(json.loads(contact.read_text())["address"])
        except (OSError, ValueError):
            time.sleep(0.05)
    raise AssertionError((folder / "dask.log").read_text()[-2000:])


def tls_options(ca: str, certificate: str, key: str) -> list[str]:
    """Options of ``dask scheduler`` and ``dask worker``."""
    return ["--tls-ca-file", ca, "--tls-cert", certificate, "--tls-key", key]
