"""Loaders on small files of the datasets' layouts, written here; the truth is the series that went into them."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks import common, moe_dqinr
from benchmarks.cell import Cell
from benchmarks.datasets import cmrxrecon_scans, crop, ocmr_scans, read_inversion_times, read_mat, read_ocmr, to_cell
from benchmarks.dynamic_cells import make_cell
from recon_core.errors import DataError
from recon_core.metrics import psnr
from tests.recon_core.small_series import centred_fft

Array = NDArray[np.complexfloating]
COMPOUND = np.dtype([("real", "<f4"), ("imag", "<f4")])


@pytest.fixture(scope="module")
def source() -> Cell:
    """A simulated series whose coil images go into the files."""
    return make_cell("molli", 30, 4, 0.002, matrix=(64, 80), n_coils=5)


def coil_images(cell: Cell) -> Array:
    """``(state, coil, y, x)``."""
    return cell.images[:, None, 0] * cell.coil_maps[:, 0]


def write_cmrxrecon(path: Path, images: Array, n_slices: int = 3, key: str = "kspace_full") -> None:
    """As h5py sees a MATLAB v7.3 file: ``(t, slice, coil, ky, kx)`` of real and imag; slice ``i`` is scaled by ``i + 1``."""
    kspace = centred_fft(images, (-2, -1))
    data = np.empty((len(kspace), n_slices, *kspace.shape[1:]), COMPOUND)
    for z in range(n_slices):
        data["real"][:, z], data["imag"][:, z] = kspace.real * (z + 1), kspace.imag * (z + 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file[key] = data


def write_times(path: Path, times: tuple[float, ...]) -> None:
    rows = [["", "slice1", "slice2", "slice3"]]
    rows += [[f"TI{i}", *(f"{1000 * t + 10 * z:g}" for z in range(3))] for i, t in enumerate(times)]
    path.write_text("\n".join(",".join(row) for row in [*rows, ["", "", "", ""]]) + "\n", encoding="utf-8")


@pytest.fixture
def cmrxrecon(tmp_path: Path, source: Cell) -> Path:
    folder = tmp_path / "MultiCoil" / "Mapping" / "TrainingSet"
    subject = folder / "FullSample" / "P007"
    write_cmrxrecon(subject / "T1map.mat", coil_images(source))
    write_times(subject / "T1map.csv", source.times)
    write_cmrxrecon(subject / "cine_sax.mat", coil_images(source), n_slices=1)
    other = folder / "AccFactor04" / "P007"
    write_cmrxrecon(other / "T1map.mat", coil_images(source), key="kspace_sub04")
    return tmp_path


def test_cmrxrecon_mapping_is_read_as_it_was_written(cmrxrecon: Path, source: Cell) -> None:
    scans = list(cmrxrecon_scans(cmrxrecon, "molli", slices=2))
    assert [scan.name for scan in scans] == ["CMRxRecon P007 slice 1", "CMRxRecon P007 slice 0"]
    assert scans[0].times == pytest.approx([t + 0.01 for t in source.times])
    hybrid = centred_fft(coil_images(source), (-2,))[:, :, None] * 2  # slice 1
    assert scans[0].kspace == pytest.approx(hybrid, abs=1e-5 * np.abs(hybrid).max())


def test_cmrxrecon_cine_becomes_a_cell_whose_truth_is_the_series(cmrxrecon: Path, source: Cell) -> None:
    (scan,) = cmrxrecon_scans(cmrxrecon, "cine")
    assert scan.times == ()
    cell = to_cell(scan, 4, n_coils=5)
    assert (cell.kind, cell.origin, cell.maps_used) == ("cine", "measured", "estimated")
    assert psnr(cell.images / np.abs(cell.images).max(), source.images / np.abs(source.images).max()) > 30
    assert cell.mask[:, cell.acs_mask].all()
    assert cell.effective_acceleration == pytest.approx(64 / (64 / 4 + 16))
    assert cell.roi.any() and cell.support.any()
    kspace, _ = cell.problem()
    assert kspace.noise_std is None
    encoded = centred_fft(cell.images[:, None] * cell.coil_maps, (-2,)) * cell.mask[:, None, :, :, None]
    assert np.linalg.norm(encoded - cell.kspace) < 0.15 * np.linalg.norm(cell.kspace)


def test_inversion_times_that_do_not_fit_are_an_error(cmrxrecon: Path) -> None:
    path = next(cmrxrecon.rglob("T1map.csv"))
    with pytest.raises(DataError, match="inversion times"):
        read_inversion_times(path, 12, 0)
    with pytest.raises(DataError, match="inversion times"):
        read_inversion_times(path, 9, 5)


def test_files_of_another_kind_are_errors(cmrxrecon: Path, tmp_path: Path) -> None:
    undersampled = next(path for path in cmrxrecon.rglob("T1map.mat") if "AccFactor04" in path.parts)
    with pytest.raises(DataError, match="no complete k-space"):
        read_mat(undersampled, 0)
    complete = next(path for path in cmrxrecon.rglob("T1map.mat") if "FullSample" in path.parts)
    with pytest.raises(DataError, match="no such slice"):
        read_mat(complete, 3)
    with h5py.File(tmp_path / "flat.mat", "w") as file:
        file["kspace_full"] = np.zeros((3, 4))
    with pytest.raises(DataError, match="not a CMRxRecon"):
        read_mat(tmp_path / "flat.mat", 0)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(DataError, match="no CMRxRecon files"):
        next(cmrxrecon_scans(empty, "cine"))
    with pytest.raises(DataError, match="no OCMR files"):
        next(ocmr_scans(empty))


def test_cropping_keeps_the_middle(source: Cell) -> None:
    images = coil_images(source)
    small = crop(centred_fft(images, (-2,))[:, :, None].astype(np.complex64), (40, 50))
    back = centred_fft(images[:, :, 12:52, 15:65], (-2,))[:, :, None]
    assert small == pytest.approx(back, abs=1e-5)
    assert crop(small, (204, 204)) is not None and crop(small, (204, 204)).shape == small.shape


def write_ocmr(path: Path, images: Array, *, lost: int = 0, discarded: int = 0) -> None:
    """2x readout oversampling, every line twice (averages), a noise readout first; ``discarded`` samples of the echo's beginning."""
    n_states, n_coils, n_y, n_x = images.shape
    wide = np.zeros((n_states, n_coils, n_y, 2 * n_x), complex)
    wide[..., n_x // 2 : n_x // 2 + n_x] = images
    kspace = centred_fft(wide, (-2, -1)).astype(np.complex64)
    space = "<matrixSize><x>{}</x><y>{}</y><z>1</z></matrixSize><fieldOfView_mm><x>{}</x><y>{}</y><z>6</z></fieldOfView_mm>"
    header = (
        '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'
        "<experimentalConditions><H1resonanceFrequency_Hz>63500000</H1resonanceFrequency_Hz></experimentalConditions>"
        f"<encoding><encodedSpace>{space.format(2 * n_x, n_y, 600, 240)}</encodedSpace>"
        f"<reconSpace>{space.format(n_x, n_y, 300, 240)}</reconSpace><encodingLimits><kspace_encoding_step_1>"
        f"<minimum>0</minimum><maximum>{n_y - 1}</maximum><center>{n_y // 2}</center></kspace_encoding_step_1>"
        "</encodingLimits><trajectory>cartesian</trajectory></encoding></ismrmrdHeader>"
    )
    with ismrmrd.Dataset(str(path), "dataset", create_if_needed=True) as file:
        file.write_xml_header(header.encode())
        noise = ismrmrd.Acquisition.from_array(np.full((n_coils, 2 * n_x), 99, np.complex64))
        noise.set_flag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
        file.append_acquisition(noise)
        for average, sign in ((0, 0.5), (1, 1.5)):
            for state in range(n_states):
                for line in range(n_y - lost):
                    samples = np.ascontiguousarray(kspace[state, :, line, discarded:] * sign)
                    one = ismrmrd.Acquisition.from_array(samples)
                    one.center_sample = n_x - discarded
                    one.idx.kspace_encode_step_1, one.idx.phase, one.idx.average = line, state, average
                    file.append_acquisition(one)


@pytest.fixture(scope="module")
def beating() -> Array:
    cell = make_cell("cine", 31, 4, 0.002, matrix=(40, 48), n_coils=3, frames=3)
    return cell.images[:, None, 0] * cell.coil_maps[:, 0]


def test_ocmr_is_read_as_it_was_written(tmp_path: Path, beating: Array) -> None:
    write_ocmr(tmp_path / "fs_0001_1_5T.h5", beating)
    (scan,) = ocmr_scans(tmp_path)
    assert (scan.name, scan.kind) == ("OCMR fs_0001_1_5T slice 0", "cine")
    assert scan.fov == pytest.approx((0.006, 0.24, 0.3))
    expected = centred_fft(beating, (-2,))[:, :, None]
    assert scan.kspace == pytest.approx(expected, abs=1e-5)


def test_an_asymmetric_echo_keeps_its_centre(tmp_path: Path, beating: Array) -> None:
    write_ocmr(tmp_path / "fs_0002_3T.h5", beating, discarded=24)
    found = read_ocmr(tmp_path / "fs_0002_3T.h5").kspace
    expected = centred_fft(beating, (-2,))[:, :, None]
    # resolution is lost, position is not
    assert np.abs(np.vdot(found, expected)) > 0.95 * np.linalg.norm(found) * np.linalg.norm(expected)


def test_an_undersampled_ocmr_file_is_an_error(tmp_path: Path, beating: Array) -> None:
    write_ocmr(tmp_path / "fs_0003_3T.h5", beating, lost=4)
    with pytest.raises(DataError, match="not fully sampled"):
        read_ocmr(tmp_path / "fs_0003_3T.h5")
    with pytest.raises(DataError, match="no such slice"):
        read_ocmr(tmp_path / "fs_0003_3T.h5", 2)


def test_one_command_makes_the_tables_from_a_site_s_folders(
    cmrxrecon: Path, tmp_path: Path, beating: Array, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "ocmr"
    folder.mkdir()
    write_ocmr(folder / "fs_0004_3T.h5", beating)
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    words = ["--cmrxrecon", str(cmrxrecon), "--ocmr", str(folder), "--methods", "cg_sense", "--accelerations", "2"]
    assert moe_dqinr.main([*words, "--threads", "1", "--name", "tables"]) == 0
    rows = json.loads((tmp_path / "results" / "tables.json").read_text(encoding="utf-8"))["cells"]
    assert [row["cell"].split()[0] for row in rows] == ["CMRxRecon", "CMRxRecon", "OCMR"]
    assert {row["origin"] for row in rows} == {"measured"}
    assert [row["t1_nmse"] is not None for row in rows] == [False, True, False]
    assert all(row["psnr"] > 20 for row in rows)


def test_an_odd_number_of_lines_is_no_missing_line(tmp_path: Path, beating: Array) -> None:
    write_ocmr(tmp_path / "fs_0005_3T.h5", beating[:, :, :39])
    assert read_ocmr(tmp_path / "fs_0005_3T.h5").kspace.shape[-2] == 39
