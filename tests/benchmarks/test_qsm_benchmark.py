"""The benchmark of dipole inversion: figures of known maps, and the challenge's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import common, qsm
from benchmarks.qsm import scores
from benchmarks.qsm_head import challenge_head
from recon_core.errors import DataError
from recon_core.maps.dipole_kernel import DipoleOperator
from tests.recon_core.volume_writers import nifti

SHAPE = (16, 17, 18)


def write_folder(folder: Path) -> np.ndarray:
    rng = np.random.default_rng(0)
    chi = rng.standard_normal(SHAPE).astype(np.float32)
    mask = np.zeros(SHAPE, np.uint8)
    mask[2:-2, 2:-2, 2:-2] = 1
    nifti(folder / "Chi.nii.gz", chi)
    nifti(folder / "Frequency.nii", (chi * 42.577478518 * 7.0).astype(np.float32))
    nifti(folder / "MaskBrainExtracted.nii.gz", mask)
    return chi


def test_challenge_folder_and_figures(tmp_path: Path) -> None:
    chi = write_folder(tmp_path)
    head = challenge_head(tmp_path)
    assert not bool(head.deep.any())
    torch.testing.assert_close(head.field, head.chi)  # Hz at 7 T became ppm
    assert float(head.chi[5, 6, 7]) == pytest.approx(float(chi[5, 6, 7]))
    plain, detrended, deep, high = scores(0.5 * head.chi + 3.0, head)
    assert plain == pytest.approx(50.0, abs=1e-3)  # the constant does not count
    assert detrended == pytest.approx(0.0, abs=1e-3)
    assert np.isnan(deep)
    assert high == pytest.approx(50.0, abs=0.1)


def test_magnitude_and_segmentation_are_read_where_they_are(tmp_path: Path) -> None:
    write_folder(tmp_path)
    plain = challenge_head(tmp_path)
    assert bool((plain.magnitude == 1).all()) and torch.equal(plain.weights, plain.mask.float())
    labels = np.zeros(SHAPE, np.uint8)
    labels[5:8, 5:8, 5:8], labels[9:12, 5:8, 5:8] = 6, 7
    labels[0, 0, 0] = 1  # outside the brain
    magnitude = np.linspace(1, 2, np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    nifti(tmp_path / "Segmentation.nii.gz", labels)
    nifti(tmp_path / "Magnitude.nii", magnitude)
    head = challenge_head(tmp_path)
    assert np.array_equal(head.deep.numpy(), labels == 6)
    np.testing.assert_allclose(head.magnitude.numpy(), magnitude)
    np.testing.assert_allclose(head.weights.numpy(), magnitude * head.mask.numpy())
    *_, deep, _ = scores(1.25 * head.chi, head)
    assert deep == pytest.approx(25.0, abs=0.1)
    assert head.b0 == (1.0, 0.0, 0.0) and head.radians_per_ppm == pytest.approx(2 * np.pi * 0.004 * 42.577478518 * 7.0)


@pytest.mark.parametrize("name", ["Magnitude.nii", "Segmentation.nii.gz"])
def test_optional_files_of_another_size_are_named(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path)
    nifti(tmp_path / name, np.zeros((4, 4, 4), np.float32))
    with pytest.raises(DataError, match="differ in size"):
        challenge_head(tmp_path)


def test_a_folder_without_its_mask_or_its_truth(tmp_path: Path) -> None:
    for name in ("MaskBrainExtracted.nii.gz", "Chi.nii.gz"):
        write_folder(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(DataError, match=name.removesuffix(".gz")):
            challenge_head(tmp_path)


def test_the_command_scores_a_challenge_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field that is the truth's own dipole field: TKD's map resembles it; what is written is what was asked for."""
    write_folder(tmp_path)
    z, y, x = np.ogrid[-8:8, -8:9, -9:9]
    chi = (z**2 + y**2 + x**2 < 16).astype(np.float32) * 0.1
    field = DipoleOperator(SHAPE, (1e-3,) * 3, (1.0, 0.0, 0.0), torch.zeros(())).forward(torch.from_numpy(chi))
    nifti(tmp_path / "Chi.nii.gz", chi)
    nifti(tmp_path / "Frequency.nii", (field.numpy() * 42.577478518 * 7.0).astype(np.float32))
    written: dict[str, Any] = {}
    monkeypatch.setattr(qsm, "write_result", lambda name, result: written.update({name: result}))
    monkeypatch.setattr("sys.argv", ["qsm", "--challenge", str(tmp_path), "--methods", "TKD,TV-ADMM", "--iterations", "60"])
    status = qsm.main()
    (head,) = written["qsm_challenge"]["heads"]
    rows = {row["method"]: row for row in head["rows"]}
    assert set(rows) == {"TKD", "TV-ADMM"} and head["snr"] is None
    assert rows["TV-ADMM"]["nRMSE %"] < rows["TKD"]["nRMSE %"] < 90
    assert {name: row["published %"] for name, row in rows.items()} == {"TKD": 36.3, "TV-ADMM": 26.5}
    assert status == int(rows["TV-ADMM"]["nRMSE %"] > qsm.GOAL)


def test_missing_and_misfitting_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        challenge_head(tmp_path)
    write_folder(tmp_path)
    nifti(tmp_path / "Frequency.nii", np.zeros((4, 4, 4), np.float32))
    with pytest.raises(DataError, match="differ in size"):
        challenge_head(tmp_path)


def test_a_thin_slab_keeps_less_of_the_contrast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, qsm):
        monkeypatch.setattr(module, "RESULTS", tmp_path, raising=False)
    monkeypatch.setattr("sys.argv", ["qsm", "--side", "4", "--slabs", "32", "160"])
    assert qsm.main() == 0
    (thin, whole) = json.loads((tmp_path / "qsm_slabs_1.json").read_text(encoding="utf-8"))["rows"]
    assert thin[3] == pytest.approx(32) and whole[3] == pytest.approx(160)
    assert 0 < thin[1] < 0.9 * whole[1] and thin[2] < 1
