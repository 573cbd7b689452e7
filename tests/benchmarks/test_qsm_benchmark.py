"""The benchmark of dipole inversion: figures of known maps, and the challenge's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.qsm import scores
from benchmarks.qsm_head import challenge_head
from recon_core.errors import DataError
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


def test_missing_and_misfitting_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        challenge_head(tmp_path)
    write_folder(tmp_path)
    nifti(tmp_path / "Frequency.nii", np.zeros((4, 4, 4), np.float32))
    with pytest.raises(DataError, match="differ in size"):
        challenge_head(tmp_path)
