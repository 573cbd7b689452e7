"""From a mask to maps without a scanner: the sequence file is played by another program, its signal goes through the running server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest

from gadgets.errors import ReplayFailed
from gadgets.replay import ReplayResult, replay
from gadgets.service import Service, ServiceOptions
from gadgets.wire.header import parse_header
from recon_core.sampling.mask_files import SamplingMask, read_mask, write_mask
from tests.prospective import phantom as ph
from tests.prospective.chain import Case, acquire, insert_errors, recon, stored_maps

pytestmark = pytest.mark.timeout(900)  # half a minute of simulation, on a busy machine much more

PHANTOM = ph.Phantom(
    semi_axes=(0.036, 0.044, 0.060),
    r2star=15.0,
    inserts=(
        ph.Sphere((0.0, 0.0, -0.022), 0.013, chi=0.30, r2star=60.0),
        ph.Sphere((0.0, 0.0, 0.022), 0.013, chi=-0.20, r2star=30.0),
    ),
    outside=(ph.Sphere((0.1, 0.04, -0.04), 0.012, chi=8.0, r2star=0.0),),
    t1=0.3,  # doped water
    n_coils=6,
)
CASE = Case(PHANTOM, matrix=(20, 24, 32), voxel=0.004, n_echoes=4, acceleration=2.5, segments=4, acs=(8, 8))
# V-SHARP: the phantom is some twenty voxels wide, where a projection onto outer dipoles explains the inserts away
SETTINGS = {"map_background": "v_sharp", "map_mask": "object", "map_phase_sign": "negative"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything from the mask to the raw data."""
    made = tmp_path_factory.mktemp("prospective")
    acquire(CASE, made)
    return made


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Service]:
    options = ServiceOptions(port=0, workers=1, threads=1, spool=folder / "spool", masks=folder / "masks", rehearse=False)
    with Service(options) as running:
        yield running


def test_the_simulator_is_no_part_of_the_product() -> None:
    """Its licence is the AGPL: a program of the tests, not a library of ours."""
    root = Path(__file__).parents[2]
    sources = [path for folder in ("gadgets", "recon_core") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 100 and not [path.name for path in sources if "import MRzeroCore" in path.read_text()]


def test_what_was_played_is_what_the_header_and_the_mask_say(folder: Path) -> None:
    """MRzeroCore's own reading of the gradients and of the pulses, against the side file and the ordered mask."""
    mask = read_mask(folder / "mask.h5")
    header = parse_header((folder / "scan.mrd.xml").read_text())
    encoding = header.encodings[0]
    assert encoding.encoded_matrix == CASE.matrix and encoding.recon_fov == pytest.approx(CASE.fov)
    played = np.load(folder / "played.npz")
    assert mask.order is not None
    n_shots, n_x = len(mask.order), CASE.matrix[2]
    k = played["k"].reshape(n_shots, CASE.n_echoes, n_x, 3)  # x, y, z in 1/m
    z, y, x = encoding.encoded_fov
    grid = np.array(encoding.encoded_matrix)
    for axis, (fov, index) in enumerate(
        ((x, np.arange(n_x)), (y, mask.order[:, :, 1, None]), (z, mask.order[:, :, 0, None]))
    ):
        position = k[..., axis] * fov + grid[2 - axis] // 2
        assert np.abs(position - index).max() < 5e-3, axis
    times = played["time"].reshape(n_shots, CASE.n_echoes, n_x)[:, :, n_x // 2]
    np.testing.assert_allclose(times, np.broadcast_to(header.echo_times, times.shape), atol=1e-6)
    np.testing.assert_allclose(played["flip_angle"], header.flip_angles[0], rtol=1e-4)
    np.testing.assert_allclose(played["tr"][:-1], header.repetition_times[0], atol=1e-6)
    assert len(played["flip_angle"]) == CASE.dummies + n_shots and played["shot"].min() == CASE.dummies


def test_r2star_and_susceptibility_of_the_inserts(folder: Path, server: Service) -> None:
    images = folder / "images.h5"
    chosen = [word for name, value in SETTINGS.items() for word in ("--set", f"{name}={value}")]
    recon("replay", folder / "raw.h5", "--port", server.port, "--config", "llr_qsm", "--out", images, *chosen)
    maps = stored_maps(images)
    for found in insert_errors(CASE, maps["R2STAR"], 1e-3 * maps["QSM"]):
        assert abs(found["r2star_error"]) < 0.03, found
        assert abs(found["chi_error"]) < 0.10, found


def _ask(server: Service, raw: Path, **settings: str) -> ReplayResult:
    return replay(raw, port=server.port, config="llr", parameters=settings, connect_seconds=30.0)


def test_the_samples_are_compared_with_the_mask(folder: Path, server: Service) -> None:
    told = " ".join(_ask(server, folder / "raw.h5").texts)
    count = int(read_mask(folder / "mask.h5").mask.sum())
    assert f"INF all {count} samples are those of mask 'mask'" in told and "not those of" not in told


def test_lost_readouts_are_named_and_images_come(folder: Path, server: Service) -> None:
    """Three readouts of echo 2 never arrive."""
    lost = folder / "lost.h5"
    lost.write_bytes((folder / "raw.h5").read_bytes())
    with h5py.File(lost, "r+") as file:
        rows = file["dataset/data"][:]
        noise = (rows["head"]["flags"] & (1 << 18)) != 0
        gone = np.flatnonzero(~noise & (rows["head"]["idx"]["contrast"] == 2))[5:8]
        places = [(int(i["kspace_encode_step_2"]), int(i["kspace_encode_step_1"])) for i in rows["head"]["idx"][gone]]
        del file["dataset/data"]
        file["dataset"].create_dataset("data", data=np.delete(rows, gone), maxshape=(None,))
    result = _ask(server, lost)
    assert result.n_images == CASE.n_echoes
    (told,) = [text for text in result.texts if "not those of mask" in text]
    assert told.startswith("WRN") and "echo 2: 3 missing" in told and "echo 1" not in told
    assert all(str(place) in told for place in places)


def test_a_mask_of_another_matrix_leaves_the_fallback_images(folder: Path, server: Service) -> None:
    mask = read_mask(folder / "mask.h5").mask
    write_mask(folder / "masks" / "wide.h5", SamplingMask(np.pad(mask, ((0, 0), (0, 0), (1, 1)))))
    result = _ask(server, folder / "raw.h5", sampling_mask="wide")
    told = " ".join(result.texts)
    assert "the scan's matrix is 20 x 24, the mask's 20 x 26 (k2 x k1)" in told and "its images come from cg_sense" in told
    assert result.n_images == CASE.n_echoes


def test_the_scanners_own_header_is_refused(folder: Path, server: Service) -> None:
    """A matrix of two partitions and 128 lines: nothing is made of it, and nothing is lost."""
    with pytest.raises(ReplayFailed) as failed:
        _ask(server, folder / "scanned.h5")
    result = failed.value.result
    assert isinstance(result, ReplayResult) and result.errors and result.n_images == 0
    assert len(list((folder / "spool").glob("*.mrd"))) >= 1
