"""The Slurm job, as it is, on this machine: scheduler, workers and server over TLS, a scan through them, and an end without a rest.

Slurm itself is missing: ``srun`` is a script that starts one task.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.relay import answers
from gadgets.service import ServiceOptions, compute
from tests.deploy.test_docker import DOCKER, TIDYING
from tests.e2e.scans import in_memory, stack
from tests.ports import free_ports
from tests.strict_client import StrictClient
from tests.waiting import PATIENCE

SRUN = """#!/usr/bin/env bash
for argument in "$@"; do case "$argument" in --*) shift ;; *) break ;; esac; done
exec "$@"
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    srun = tmp_path / "bin" / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    subprocess.run(
        [str(DOCKER / "make-certificates.sh"), str(tmp_path / "tls")], check=True, capture_output=True, timeout=60
    )
    port, scheduler = free_ports(2)
    return {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "RECON_ENV": sys.prefix,
        "RECON_TLS": str(tmp_path / "tls"),
        "RECON_ALLOW": "127.0.0.1",
        "RECON_LISTEN": "127.0.0.1",
        "RECON_HOST": "127.0.0.1",
        "RECON_PORT": str(port),
        "RECON_SCHEDULER_PORT": str(scheduler),
        "RECON_STATE": str(tmp_path / "state"),
        "SLURM_TMPDIR": str(tmp_path),
        "HOME": str(tmp_path),
    }


def descendants_of(family: list[psutil.Process], command: str) -> list[psutil.Process]:
    """The processes of a family below the one that was started with these words."""
    found: dict[int, psutil.Process] = {}
    for process in family:
        with contextlib.suppress(psutil.Error):  # it ended meanwhile
            words = process.cmdline()[1:]  # behind the interpreter
            if words and " ".join([Path(words[0]).name, *words[1:]]).startswith(command):
                found |= {child.pid: child for child in process.children(recursive=True)}
    return list(found.values())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_job_reconstructs_and_ends(tmp_path: Path, environment: dict[str, str]) -> None:
    scan = in_memory("cine", matrix_x=32, matrix_y=32, coils=4, states=1, slices=2)
    log = tmp_path / "log"
    with log.open("wb") as out, subprocess.Popen([str(DOCKER / "slurm.sh")], env=environment, stdout=out, stderr=out) as job:
        try:
            address = f"127.0.0.1:{environment['RECON_PORT']}"
            until = time.monotonic() + 400.0
            # the server answers before it has found the scheduler, which starts at the same moment
            while not (answers(address) and "event=cluster_size tasks=1" in log.read_text()):
                assert job.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.5)
            client = StrictClient("127.0.0.1", int(environment["RECON_PORT"]), timeout=120.0)
            answer = client.scan("fourier", header=scan.header, messages=scan.messages)
            family = psutil.Process(job.pid).children(recursive=True)
            workers = {process.pid for process in descendants_of(family, "dask worker")}
        finally:
            job.send_signal(signal.SIGTERM)
        assert job.wait(120.0) == 0, log.read_text()[-3000:]
    assert len(answer.images) == 2, answer.texts
    assert np.isfinite(stack(answer.images, 1)).all()
    said = log.read_text()
    done = re.findall(r"event=done_by_cluster task=slice-(\d+) by=\S+:(\d+) failed=False", said)
    assert sorted(number for number, _ in done) == ["0000", "0001"], "each slice once, on the cluster and not in the server"
    assert {int(process) for _, process in done} <= workers
    assert len(family) >= 3
    _, alive = psutil.wait_procs(family, timeout=PATIENCE)
    assert not alive


STAND_INS = {
    "recon": """printf '%s\\0' "${CUDA_VISIBLE_DEVICES-all}" "$@" > "$HOME/called" """,
    "dask": "exec sleep 600",
}


def server_command(environment: dict[str, str], folder: Path) -> tuple[str, list[str]]:
    """How the job starts the server: the GPUs that it sees, and its words."""
    (folder / "env" / "bin").mkdir(parents=True)
    for name, body in STAND_INS.items():
        (folder / "env" / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / "env" / "bin" / name).chmod(0o755)
    environment = {**environment, "RECON_ENV": str(folder / "env"), "CUDA_VISIBLE_DEVICES": "0,1"}
    # the server ends when it has written down how it was called, and takes the job with it
    done = subprocess.run([str(DOCKER / "slurm.sh")], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "a part of the server has ended" in done.stderr
    sees, *words = (folder / "called").read_text().split("\0")[:-1]
    return sees, words


class Recorded:
    """In the place of a cluster: how it was asked for."""

    capacity = 0

    def __init__(self, options: object, threads: int, device: str, events: object, *, rehearse: bool = True) -> None:
        self.device = device

    def close(self) -> None:
        """There is nothing."""


def test_slices_are_computed_on_gpus_and_scans_under_way_are_answered(
    tmp_path: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sees, words = server_command(environment, tmp_path)
    assert sees == "", "the GPUs are the workers'"
    asked: list[ServiceOptions] = []

    def take(options: ServiceOptions) -> None:
        asked.append(options)
        raise Started

    monkeypatch.setattr("gadgets.service.Service", lambda options, hurry=None: take(options))
    monkeypatch.setattr("gadgets.compute_dask.DaskPool", Recorded)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert isinstance(CliRunner().invoke(app, words).exception, Started)
    warned = re.search(r"^#SBATCH --signal=B:TERM@(\d+)$", (DOCKER / "slurm.sh").read_text(), re.MULTILINE)
    assert warned is not None and 300 <= asked[0].stop_seconds <= int(warned[1]) - TIDYING
    jobs = compute(asked[0], workers=0)
    remote: Any = jobs._remote
    jobs.close()
    assert remote.device == "auto", "what a task is told: a GPU where the worker sees one"


class Started(Exception):
    """A server would run now."""


@pytest.mark.parametrize("missing", ["RECON_ENV", "RECON_TLS", "RECON_ALLOW"])
def test_the_job_says_what_it_needs(environment: dict[str, str], missing: str) -> None:
    del environment[missing]
    done = subprocess.run([str(DOCKER / "slurm.sh")], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode and missing in done.stderr


def test_without_certificates_there_is_no_cluster(environment: dict[str, str]) -> None:
    Path(environment["RECON_TLS"], "key.pem").unlink()
    done = subprocess.run([str(DOCKER / "slurm.sh")], env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 1 and "key.pem" in done.stderr


def test_certificates_are_never_replaced(environment: dict[str, str]) -> None:
    folder = Path(environment["RECON_TLS"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    done = subprocess.run(
        [str(DOCKER / "make-certificates.sh"), str(folder)], capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.returncode == 1 and "is there already" in done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert set(before) == {"ca.pem", "cert.pem", "key.pem"}
    assert {path.stat().st_mode & 0o077 for path in folder.iterdir()} == {0}
