"""A running service with real worker processes, and simulated scans small enough for tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gadgets.service import Service, ServiceOptions
from tests.e2e.scans import SimulatedScan, simulated


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The server on a free port with one worker process, spool and noise store in temporary folders."""
    folder = tmp_path_factory.mktemp("service")
    options = ServiceOptions(port=0, workers=1, threads=1, spool=folder / "spool", noise=folder / "noise")
    with Service(options) as running:
        yield running


@pytest.fixture(scope="session")
def cine(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    """Two slices, six phases, four-fold undersampled, with a noise scan and embedded calibration lines."""
    folder: Path = tmp_path_factory.mktemp("cine")
    return simulated(
        "cine", folder / "cine.h5", matrix_x=96, matrix_y=96, coils=6, states=6, slices=2, mask="vista", acceleration=3.0
    )


@pytest.fixture(scope="session")
def full_cine(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    """One slice, four phases, fully sampled."""
    folder: Path = tmp_path_factory.mktemp("full")
    return simulated("cine", folder / "full.h5", matrix_x=64, matrix_y=64, coils=4, states=4)


@pytest.fixture(scope="session")
def mgre(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    """A slab, four echoes, about three-fold undersampled in both phase-encoding directions."""
    folder: Path = tmp_path_factory.mktemp("mgre")
    return simulated(
        "mgre", folder / "mgre.h5", matrix_x=48, matrix_y=40, partitions=12, coils=6, states=4, mask="poisson", acceleration=3.0,
        acs=12, acs_partitions=8,
    )  # fmt: skip
