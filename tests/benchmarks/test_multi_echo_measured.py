"""The benchmark of measured multi-echo data: its readers and comparisons on known data."""

from __future__ import annotations

import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from benchmarks.multi_echo_measured import PHANTOM_TIMES, phantom, plane_free, raw_images
from gadgets.simulate import _file_dtype
from gadgets.wire.dtypes import ACQUISITION_HEADER, Flag
from recon_core.errors import DataError
from recon_core.fourier import fft_centred
from recon_core.simulation.volume_files import nifti_series, read_series

N = 64


def echoes() -> torch.Tensor:
    """Two discs with another R2* and field each, ``(echo, 1, y, x)``."""
    y, x = torch.meshgrid(*[torch.arange(N) - N // 2] * 2, indexing="ij")
    left, right = ((y**2 + (x - c) ** 2) < 12**2 for c in (-14, 14))
    rate = torch.where(left, 30.0, 60.0)
    field = 12.0 * torch.sin(y / 12.0) + 0.2 * x
    t = torch.tensor(PHANTOM_TIMES)[:, None, None]
    return ((left | right) * torch.exp(-t * rate + 2j * torch.pi * t * field))[:, None].to(torch.complex64)


def write(path: Path, images: torch.Tensor, *, backwards: bool) -> None:
    kspace = fft_centred(images, (-2, -1)).numpy()[:, 0]
    rows = np.zeros(3 * N, _file_dtype(ACQUISITION_HEADER, "f4", True))
    for echo in range(3):
        for line in range(N):
            row = rows[echo * N + line]
            head = row["head"]
            head["number_of_samples"] = N
            head["idx"]["contrast"], head["idx"]["kspace_encode_step_1"] = echo, line
            samples = kspace[echo, line]
            if backwards and echo == 1:
                head["flags"] = 1 << (Flag.ACQ_IS_REVERSE - 1)
                samples = np.roll(samples, -1)[::-1]
            row["traj"], row["data"] = np.zeros(0, np.float32), np.ascontiguousarray(samples).view(np.float32)
    with h5py.File(path, "w") as file:
        file.create_group("dataset").create_dataset("data", data=rows)


def test_lines_read_backwards_are_turned_round_and_their_phase_is_found(tmp_path: Path) -> None:
    images = echoes()
    write(tmp_path / "gre_3echo_monopolar_raw.h5", images, backwards=False)
    ramp = torch.exp(1j * (0.4 + 6.0 * (torch.arange(N) - N // 2) / N))
    shifted = images.clone()
    shifted[1] *= ramp
    write(tmp_path / "gre_3echo_bipolar_raw.h5", shifted, backwards=True)
    torch.testing.assert_close(raw_images(tmp_path / "gre_3echo_bipolar_raw.h5"), shifted, atol=1e-5, rtol=0)
    found, pictures = phantom(tmp_path)
    assert found["ramp_rad"] == pytest.approx(6.0, abs=0.02)
    assert found["bipolar"]["field_difference_median_abs_hz"] > 5.0
    assert found["corrected"]["field_difference_median_abs_hz"] < 0.05
    assert found["r2star_block_difference_median_abs"] < 0.1
    assert all(np.isfinite(p).all() for p in pictures.values())


def test_a_plane_with_wrong_pixels_is_taken_off() -> None:
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, 40)] * 2, indexing="ij")
    field = 3.0 + 5.0 * y - 2.0 * x
    field[5, :9] += 200.0
    mask = torch.ones_like(field, dtype=torch.bool)
    rest, plane = plane_free(field, mask)
    assert plane == pytest.approx((3.0, 5.0, -2.0), abs=1e-3)
    assert float(rest.abs().median()) < 1e-4


def test_several_volumes_in_one_file(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(0, 4000, (3, 4, 5, 6)).astype("<i2")
    header = bytearray(352)
    header[:4] = struct.pack("<i", 348)
    header[40:56] = struct.pack("<8h", 4, 6, 5, 4, 3, 1, 1, 1)
    header[70:72] = struct.pack("<h", 4)
    header[76:92] = struct.pack("<4f", 0, 0.5, 0.75, 1.0)
    header[108:120] = struct.pack("<3f", 352.0, 0.5, 1.0)
    (tmp_path / "echoes.nii").write_bytes(bytes(header) + data.tobytes())
    found, voxel = read_series(tmp_path / "echoes.nii")
    np.testing.assert_allclose(found.astype(float), data.astype(float) * 0.5 + 1.0)
    assert voxel == pytest.approx((0.001, 0.00075, 0.0005))
    with pytest.raises(DataError, match="truncated"):
        nifti_series(bytes(header) + data.tobytes()[:-1])
