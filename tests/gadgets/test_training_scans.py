"""Measured raw data become training scans: images and noise are the true ones; what cannot be used is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.errors import OutputError
from gadgets.simulate import simulate
from gadgets.training_scans import training_scan
from recon_core.errors import DataError, ReconError
from recon_core.simulation.scan_folder import ScanFolder
from recon_core.training.laro_tasks import plane_sample
from tests.e2e.scans import SimulatedScan, error, simulated

SMALL: dict[str, Any] = {"matrix_x": 40, "matrix_y": 36, "partitions": 16, "states": 3, "coils": 6, "snr": 60.0}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    """Every position of three echoes, with a noise scan; oblique."""
    return simulated("mgre", tmp_path_factory.mktemp("full") / "DOE_JOHN.h5", orientation="oblique", **SMALL)


def test_images_maps_and_noise_are_those_of_the_scan(full: SimulatedScan) -> None:
    scan = training_scan(full.path, coils=6)
    truth = full.stream.truth
    assert scan.images.shape == truth.images[0].shape and scan.images.dtype == torch.complex64
    assert scan.echo_times == pytest.approx(truth.states, abs=1e-8)
    assert scan.voxel == pytest.approx((0.003, 0.23 / 36, 0.23 / 40))
    assert error(scan.images[None].numpy(), full.truth, full.tissue) < 0.04
    assert float(torch.quantile(scan.images[0].abs()[scan.brain], 0.99)) == pytest.approx(1.0, abs=1e-5)
    # what maps of unit norm combine has the noise of a single whitened sample; in the corners there is nothing else
    corners = scan.coil_maps.abs().square().sum(0) > 0.5
    corners[:, 4:-4] = corners[:, :, 4:-4] = False
    assert int(corners.sum()) > 100
    assert scan.images[-1][corners].abs().square().mean().sqrt().item() == pytest.approx(scan.noise_std, rel=0.15)
    assert scan.brain.any() and not (scan.brain & ~scan.head).sum() > 0.02 * scan.brain.sum()
    assert float(scan.chi.abs().max()) == float(scan.r2star.abs().max()) == 0.0


@pytest.mark.parametrize(
    ("factor", "said"), [(10.0, "times louder than the outer k-space"), (0.1, "times quieter than the noise")]
)
def test_a_noise_scan_that_contradicts_the_samples_is_not_trained_on(
    full: SimulatedScan, factor: float, said: str, tmp_path: Path
) -> None:
    """As in use: its scaling or bandwidth is another one, and training would add so many times the scan's noise."""
    other = shutil.copy(full.path, tmp_path / "other.h5")
    with h5py.File(other, "r+") as file:
        readouts = file["dataset/data"]
        for number, readout in enumerate(readouts[:64]):
            assert readout["head"]["flags"] >> 18 & 1  # ACQ_IS_NOISE_MEASUREMENT
            readout["data"][:] *= factor
            readouts[number] = readout
    told: list[str] = []
    scan = training_scan(other, coils=6, tell=told.append)
    assert scan.noise_std == pytest.approx(training_scan(full.path, coils=6).noise_std, rel=0.5)
    assert len(told) == 1 and said in told[0]


def test_echoes_are_in_the_order_of_their_times(full: SimulatedScan, tmp_path: Path) -> None:
    """As the method has them in use."""
    first, second, third = training_scan(full.path, coils=2).images
    turned = shutil.copy(full.path, tmp_path / "turned.h5")
    with h5py.File(turned, "r+") as file:
        header = file["dataset/xml"][0].decode()
        times = re.findall("<TE>.*?</TE>", header)
        turn = iter((times[2], times[0], times[1]))
        header = re.sub("<TE>.*?</TE>", lambda _: next(turn), header)
        file["dataset/xml"][0] = header.encode()
    scan = training_scan(turned, coils=2)
    assert scan.echo_times == pytest.approx(full.stream.truth.states, abs=1e-8)
    scale = scan.images[0].abs().max() / second.abs().max()  # the second readout is now of the shortest time
    for found, true in zip(scan.images, (second, third, first), strict=True):
        assert float((found.abs() - scale * true.abs()).norm() / found.norm()) < 0.02


def test_the_command_fills_a_folder_that_trainings_read(full: SimulatedScan, tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    for times in (1, 2):  # what is there stays
        result = CliRunner().invoke(
            app, ["train", "laro-scan", *[str(full.path)] * times, "--output", str(folder), "--coils", "4"]
        )
        assert result.exit_code == 0, result.output
    assert sorted(path.stem for path in folder.glob("*.json")) == ["measured_0000", "measured_0001", "measured_0002"]
    assert not any(b"DOE" in path.read_bytes() for path in folder.iterdir())  # nobody's name
    supply = ScanFolder(folder)
    with pytest.raises(DataError, match=r"measured_0001\.json: a scan that is there twice; got that of measured_0000\.json"):
        supply.require((16, 36), 1, 3)  # what was learned from would judge what was learned
    scan = supply.scan("train", 0)
    assert len(scan.coil_maps) == 4
    sample = plane_sample(scan, torch.tensor([18, 20]), 1.0, 0, torch.device("cpu"))
    assert sample.images.shape[:2] == (2, 3) and bool(sample.brain.any())


def test_what_cannot_be_trained_on_is_refused_in_words(full: SimulatedScan, tmp_path: Path) -> None:
    undersampled = tmp_path / "undersampled.h5"
    simulate("mgre", undersampled, {**SMALL, "mask": "poisson", "acceleration": 3.0})
    with pytest.raises(DataError, match=r"not fully sampled.*of 1728 positions missing"):
        training_scan(undersampled)
    cine = tmp_path / "cine.h5"
    simulate("cine", cine, {"matrix_x": 32, "matrix_y": 32, "coils": 3, "states": 3, "waveforms": False})
    with pytest.raises(DataError, match="not a slab"):
        training_scan(cine)
    slices = tmp_path / "slices.h5"
    simulate("mgre", slices, {**SMALL, "partitions": 1, "slices": 2})
    with pytest.raises(DataError, match="not one slab"):
        training_scan(slices)
    (tmp_path / "text.h5").write_text("no raw data")
    for path in (tmp_path / "text.h5", tmp_path / "missing.h5"):
        with pytest.raises(ReconError):
            training_scan(path)
    result = CliRunner().invoke(app, ["train", "laro-scan", str(undersampled), "--output", str(tmp_path / "none")])
    assert result.exit_code != 0 and not (tmp_path / "none").exists()
    with pytest.raises(OutputError, match="is no folder"):  # before anything is read
        CliRunner().invoke(
            app, ["train", "laro-scan", "nowhere.h5", "--output", str(tmp_path / "text.h5")], catch_exceptions=False
        )
