"""One pipeline behind every front: the same scan gives the same bits through the server, ``recon run`` and a capture."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.raw_source import open_source
from gadgets.replay import replay
from gadgets.service import Service
from tests.e2e.scans import SimulatedScan, ask, one_by_one, simulated, stack

RECON = Path(sys.executable).with_name("recon")
CHAINS = ("fourier", "llr")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    return simulated(
        "cine", tmp_path_factory.mktemp("scan") / "scan.h5", matrix_x=64, matrix_y=64, coils=5, states=4, slices=3,
        mask="vista", acceleration=2.0,
    )  # fmt: skip


def pixels(path: Path) -> dict[str, NDArray[np.floating]]:
    """Every image of the one group of an image file, by series."""
    with h5py.File(path) as file:
        (group,) = file
        return {name: file[group][name]["data"][:] for name in file[group]}


def assert_same(one: Path, other: Path) -> None:
    a, b = pixels(one), pixels(other)
    assert a.keys() == b.keys() and a
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def served(service: Service, scan: SimulatedScan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images of each chain by the running server."""
    folder = tmp_path_factory.mktemp("served")
    for chain in CHAINS:
        replay(scan.path, port=service.port, config=chain, out=folder / f"{chain}.h5")
    return {chain: folder / f"{chain}.h5" for chain in CHAINS}


@pytest.mark.parametrize("chain", CHAINS)
def test_twice_the_same(chain: str, service: Service, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path) -> None:
    replay(scan.path, port=service.port, config=chain, out=tmp_path / "again.h5")
    assert_same(served[chain], tmp_path / "again.h5")


@pytest.mark.parametrize(("chain", "workers"), [("fourier", "0"), ("llr", "0"), ("llr", "2")])
def test_without_a_server(chain: str, workers: str, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    # as many threads as the server of these tests has: sums depend on their number in the last bits
    command = [RECON, "run", scan.path, "--config", chain, "--out", out, "--threads", "1", "--workers", workers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same(served[chain], out)


def test_the_capture_is_what_was_sent(service: Service, scan: SimulatedScan, tmp_path: Path) -> None:
    replay(scan.path, port=service.port, config="fourier", out=tmp_path / "out.h5")
    sent = b"".join(bytes(piece.data) for piece in open_source(scan.path, config="fourier").pieces())
    assert wait_for_capture(service, len(sent)).read_bytes() == sent


def wait_for_capture(service: Service, size: int) -> Path:
    """The newest finished capture, once no connection is at work any more."""
    for thread in threading.enumerate():
        if re.fullmatch(r"c\d+", thread.name):  # one for each connection
            thread.join(30)
    path: Path = service.spool.captures()[-1]
    assert path.stat().st_size == size
    return path


@pytest.mark.parametrize("chain", CHAINS)
def test_a_capture_repeats_the_scan(
    chain: str, service: Service, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path
) -> None:
    first = replay(scan.path, port=service.port, config=chain, out=tmp_path / "first.h5")
    capture = wait_for_capture(service, first.bytes_sent)
    again = replay(capture, port=service.port, out=tmp_path / "again.h5")
    assert again.bytes_sent == first.bytes_sent and again.n_images == first.n_images
    assert_same(served[chain], tmp_path / "again.h5")


def test_a_capture_through_another_chain(
    service: Service, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path
) -> None:
    first = replay(scan.path, port=service.port, config="fourier", out=tmp_path / "first.h5")
    capture = wait_for_capture(service, first.bytes_sent)
    replay(capture, port=service.port, config="llr", out=tmp_path / "llr.h5")
    assert_same(served["llr"], tmp_path / "llr.h5")


def test_a_capture_by_the_command_line(
    service: Service, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path
) -> None:
    first = replay(scan.path, port=service.port, config="fourier", out=tmp_path / "first.h5")
    capture = wait_for_capture(service, first.bytes_sent)
    command = [RECON, "replay", capture, "--port", str(service.port), "--out", tmp_path / "again.h5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same(served["fourier"], tmp_path / "again.h5")


def test_in_pieces_of_one_readout(service: Service, scan: SimulatedScan) -> None:
    whole = ask(service, "llr", scan)
    pieces = ask(service, "llr", scan, messages=one_by_one(scan.stream.batches))
    np.testing.assert_array_equal(stack(pieces.images, 4), stack(whole.images, 4))
    assert [i.attributes for i in pieces.images] == [i.attributes for i in whole.images]
