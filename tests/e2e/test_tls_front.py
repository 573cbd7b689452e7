"""The real commands with TLS and an allow-list: `recon serve`, `recon replay`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.replay import replay
from gadgets.service import Service
from recon_core.errors import ReconError
from tests.e2e.scans import SimulatedScan
from tests.gadgets.certificates import Authority, authority
from tests.waiting import PATIENCE

RECON = Path(sys.executable).with_name("recon")


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority(tmp_path_factory.mktemp("authority"))


@contextmanager
def served(folder: Path, *options: str) -> Iterator[int]:
    """The port of a `recon serve` process."""
    command = [
        str(RECON),
        "serve",
        "--port",
        "0",
        "--workers",
        "0",
        "--threads",
        "1",
        "--spool",
        str(folder / "spool"),
        *options,
    ]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("listening on "), (folder / "log").read_text()
            yield int(line.rpartition(":")[2])
        finally:
            process.terminate()
            process.wait(PATIENCE)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(RECON), *map(str, arguments)], capture_output=True, text=True, timeout=120)


def pixels(path: Path) -> np.ndarray:
    with h5py.File(path) as file:
        return np.concatenate([file[group][name]["data"][:] for group in file for name in sorted(file[group])])


def test_images_over_tls_are_those_without(
    full_cine: SimulatedScan, ours: Authority, service: Service, tmp_path: Path
) -> None:
    certificate, key = ours.issue("server")
    ours_cert, ours_key = ours.issue("scanner")
    tls = ["--tls-cert", certificate, "--tls-key", key, "--tls-client-ca", ours.certificate]
    with served(tmp_path, *tls, "--allow", "127.0.0.0/8") as port:
        ask = ["replay", full_cine.path, "--config", "fourier", "--port", port, "--out", tmp_path / "tls.h5"]
        done = run(*ask, "--tls-ca", ours.certificate, "--tls-cert", ours_cert, "--tls-key", ours_key)
        assert done.returncode == 0, done.stderr + (tmp_path / "log").read_text()
        stranger = run(*ask, "--tls-ca", ours.certificate)
        assert stranger.returncode == 1
    replay(full_cine.path, port=service.port, config="fourier", out=tmp_path / "plain.h5")
    np.testing.assert_array_equal(pixels(tmp_path / "tls.h5"), pixels(tmp_path / "plain.h5"))
    assert "tls=with-certificates allow=127.0.0.0/8" in (tmp_path / "log").read_text()


def test_a_peer_outside_the_allow_list(full_cine: SimulatedScan, tmp_path: Path) -> None:
    with served(tmp_path, "--allow", "127.0.0.2/32") as port:
        done = run("replay", full_cine.path, "--config", "fourier", "--port", port, "--out", tmp_path / "out.h5")
    assert done.returncode == 1 and not (tmp_path / "out.h5").exists()
    assert "event=peer_refused address=127.0.0.1" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "0.0.0.0"], "nothing says who may connect"),
        (["--host", "::"], "nothing says who may connect"),
        (["--allow", "10.1.2.3/24"], "neither an address nor a network"),
        (["--tls-client-ca", "ca.pem"], "no certificate"),
        (["--tls-cert", "missing.pem"], "cannot use the TLS files"),
    ],
)
def test_what_the_command_refuses(options: list[str], words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["serve", "--port", "0", "--workers", "0", "--spool", str(tmp_path / "spool"), *options])
    assert isinstance(done.exception, ReconError) and words in str(done.exception)
