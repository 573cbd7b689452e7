"""The 2016 challenge's folder, its scores of known maps, and the command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from scipy.ndimage import correlate

from benchmarks import qsm_challenge_2016 as benchmark
from benchmarks.qsm_challenge_2016 import challenge_scores, consistency, laplacian_filtered, line, row
from benchmarks.qsm_head import ECHO_2016, FIELD_STRENGTH_2016, VOXEL_2016, challenge_2016
from recon_core.errors import DataError
from recon_core.maps.dipole_kernel import DipoleOperator
from tests.recon_core.volume_writers import nifti

SHAPE = (16, 17, 18)


def write_folder(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """A ball of 100 ppb in its own dipole field; chi33 is a MATLAB file, and a tenth above COSMOS."""
    folder.mkdir(exist_ok=True)
    z, y, x = np.ogrid[-8:8, -8:9, -9:9]
    chi = (z**2 + y**2 + x**2 < 16).astype(np.float32) * 0.1
    mask = np.zeros(SHAPE, np.float32)
    mask[2:-2, 2:-2, 2:-2] = 1
    nifti(folder / "chi_cosmos.nii.gz", chi)
    savemat(folder / "chi_33.mat", {"chi_33": 1.1 * chi.transpose(2, 1, 0)})
    field = DipoleOperator(SHAPE, VOXEL_2016, (1.0, 0.0, 0.0), torch.zeros(())).forward(torch.from_numpy(chi))
    nifti(folder / "phs_tissue.nii", field.numpy())
    nifti(folder / "msk.nii.gz", mask)
    return chi, mask > 0.5


def test_the_folder_as_the_archive_has_it(tmp_path: Path) -> None:
    chi, mask = write_folder(tmp_path / "data")
    brain = challenge_2016(tmp_path)
    np.testing.assert_allclose(brain.cosmos.numpy(), np.where(mask, chi, 0))
    np.testing.assert_allclose(brain.head.chi.numpy(), 1.1 * np.where(mask, chi, 0), rtol=1e-6)  # x, y, z in MATLAB
    assert brain.head.b0 == (1.0, 0.0, 0.0) and brain.head.voxel[0] > brain.head.voxel[1] == brain.head.voxel[2]
    assert brain.head.radians_per_ppm == pytest.approx(2 * np.pi * ECHO_2016 * 42.577478518 * FIELD_STRENGTH_2016)
    assert bool((brain.head.magnitude == 1).all()) and torch.equal(brain.head.weights, brain.head.mask.float())
    assert not bool(brain.regions.any()) and not bool(brain.head.csf.any())
    assert consistency(brain)["COSMOS"] == pytest.approx(
        {"correlation": 1.0, "slope": 1.0, "left_ppb": 0.0, "left_part": 0.0}, abs=1e-4
    )
    assert consistency(brain)["chi33"]["slope"] == pytest.approx(1 / 1.1, abs=1e-4)


def test_magnitude_and_regions_are_read_where_they_are(tmp_path: Path) -> None:
    _, mask = write_folder(tmp_path)
    magnitude = np.linspace(1, 2, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    labels = np.zeros(SHAPE, np.uint8)
    labels[5, 5:8, 5:8], labels[9, 5:8, 5:8], labels[0, 0, 0] = 3, 11, 1  # the last one outside the brain
    nifti(tmp_path / "magn.nii.gz", magnitude)
    savemat(tmp_path / "evaluation_mask.mat", {"evaluation_mask": labels.transpose(2, 1, 0)})
    brain = challenge_2016(tmp_path)
    np.testing.assert_allclose(brain.head.weights.numpy(), magnitude * mask)
    np.testing.assert_array_equal(brain.regions.numpy(), labels * mask)


def test_the_volumes_are_cut_to_the_mask(tmp_path: Path) -> None:
    write_folder(tmp_path)
    mask = np.zeros(SHAPE, np.float32)
    mask[0:3, 2, 14] = 1
    nifti(tmp_path / "msk.nii.gz", mask)
    brain = challenge_2016(tmp_path)
    assert brain.head.mask.shape == brain.cosmos.shape == brain.regions.shape == (11, 11, 12)
    assert torch.equal(brain.head.mask.nonzero(), torch.tensor([[0, 2, 8], [1, 2, 8], [2, 2, 8]]))


@pytest.mark.parametrize("name", ["phs_tissue.nii", "msk.nii.gz", "chi_cosmos.nii.gz", "chi_33.mat"])
def test_a_folder_that_lacks_one_of_its_volumes(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=f"no such file.*{name.partition('.')[0]}"):
        challenge_2016(tmp_path)


def test_damaged_misnamed_and_misfitting_volumes(tmp_path: Path) -> None:
    chi, _ = write_folder(tmp_path)
    for content in (b"MATLAB 5.0 MAT-file".ljust(128), b"", (tmp_path / "chi_33.mat").read_bytes()[:600]):
        (tmp_path / "chi_33.mat").write_bytes(content)
        with pytest.raises(DataError, match="chi_33"):
            challenge_2016(tmp_path)
    for content in ({"chi": chi}, {"chi_33": chi[0]}):
        savemat(tmp_path / "chi_33.mat", content)
        with pytest.raises(DataError, match=r"not the volume.*chi_33"):
            challenge_2016(tmp_path)
    savemat(tmp_path / "chi_33.mat", {"chi_33": chi})  # z, y, x: the axes of no file of the challenge
    with pytest.raises(DataError, match="differ in size"):
        challenge_2016(tmp_path)


def test_an_empty_mask(tmp_path: Path) -> None:
    write_folder(tmp_path)
    nifti(tmp_path / "msk.nii.gz", np.zeros(SHAPE, np.float32))
    with pytest.raises(DataError, match="mask is empty"):
        challenge_2016(tmp_path)


def test_scores_of_known_maps() -> None:
    rng = np.random.default_rng(3)
    truth = rng.standard_normal(SHAPE)
    mask = np.zeros(SHAPE, bool)
    mask[2:-2, 2:-2, 2:-2] = True
    assert challenge_scores(truth, truth, mask) == pytest.approx((0, 0, 1))
    half = challenge_scores(0.5 * truth, truth, mask)
    assert half[:2] == pytest.approx((50, 50)) and half[2] < 0.99
    shifted = row(0.5 * truth + 1, truth, mask, np.zeros(SHAPE, np.int64))
    assert shifted[0] > 60 and shifted[1] == pytest.approx(50)  # the challenge counts a constant, demeaned does not
    assert shifted[4:6] == pytest.approx((0.5, 1.0)) and np.isnan(shifted[6])
    regions = np.zeros(SHAPE, np.int64)
    regions[4], regions[6], regions[8] = 1, 2, 5
    assert row(0.8 * truth + 1, truth, mask, regions)[6] == pytest.approx(0.8)
    assert line(2 - 3 * truth[mask], truth[mask]) == pytest.approx((-3, -1))


def test_the_laplacian_of_gaussian_is_the_three_dimensional_one() -> None:
    r = np.arange(15) - 7
    squares = r[:, None, None] ** 2 + r[:, None] ** 2 + r**2
    gauss = np.exp(-squares / (2 * 1.5**2))
    kernel = gauss / gauss.sum() * (squares / 1.5**4 - 3 / 1.5**2)
    kernel -= kernel.mean()
    volume = np.random.default_rng(4).standard_normal((9, 10, 11))
    np.testing.assert_allclose(laplacian_filtered(volume), correlate(volume, kernel, mode="constant"), atol=1e-12)


def test_similarity_against_its_definition_in_one_voxel() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.uniform(1, 2, (2, 5, 5, 5))
    inside, middle = np.ones((5, 5, 5), bool), np.zeros((5, 5, 5), bool)
    middle[2, 2, 2] = True
    r = np.arange(5) - 2
    window = np.exp(-(r[:, None, None] ** 2 + r[:, None] ** 2 + r**2) / (2 * 1.5**2))
    window /= window.sum()
    p, q = (part - min(a.min(), b.min()) for part in (a, b))
    peak = max(p.max(), q.max())
    mean_p, mean_q = (window * p).sum(), (window * q).sum()
    var_p, var_q, cov = ((window * x * y).sum() for x, y in ((p, p), (q, q), (p, q)))
    var_p, var_q, cov = var_p - mean_p**2, var_q - mean_q**2, cov - mean_p * mean_q
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    expected = (2 * mean_p * mean_q + c1) * (2 * cov + c2) / ((mean_p**2 + mean_q**2 + c1) * (var_p + var_q + c2))
    assert benchmark._similarity(p, q, middle) == pytest.approx(expected)
    assert challenge_scores(b, b, inside)[2] == pytest.approx(1)


def test_the_command_scores_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    written: dict[str, Any] = {}
    monkeypatch.setattr(benchmark, "write_result", lambda name, result: written.update({name: result}))
    picture = tmp_path / "maps.png"
    words = [
        "qsm",
        str(tmp_path),
        "--methods",
        "TKD,TV-ADMM",
        "--weights",
        "1e-3",
        "--iterations",
        "60",
        "--picture",
        str(picture),
    ]
    monkeypatch.setattr("sys.argv", words)
    assert benchmark.main() == 0
    rows = {(one["method"], one["reference"]): one for one in written["qsm_challenge_2016"]["rows"]}
    assert {name for name, _ in rows} == {"TKD", "TV-ADMM", "TV, weight 0.001"}
    assert rows["TV-ADMM", "COSMOS"]["demeaned %"] < rows["TKD", "COSMOS"]["demeaned %"] < 90
    slopes = [rows["TV-ADMM", name]["slope"] for name in ("COSMOS", "chi33")]
    assert slopes[0] == pytest.approx(1.1 * slopes[1], rel=1e-3) and 0.5 < slopes[0] < 1.1
    assert [run["method"] for run in written["qsm_challenge_2016"]["runs"]] == ["TV-ADMM", "TKD", "TV, weight 0.001"]
    assert picture.read_bytes()[:4] == b"\x89PNG"
