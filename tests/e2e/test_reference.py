"""The integration gold standard: a real Gadgetron's images of the same raw data."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np

from gadgets.replay import replay
from gadgets.service import Service
from tests.e2e.scans import file_images

REFERENCE = Path(__file__).parent.parent / "data" / "gadgetron-reference"
MEASURED = Path(__file__).parent.parent / "data" / "gre-2coil-raw" / "gre_phantom_raw.h5"


def test_fourier_equals_the_real_gadgetron(service: Service, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    result = replay(REFERENCE / "shepp_logan_raw.h5", port=service.port, config="fourier", out=out)
    with h5py.File(REFERENCE / "gadgetron_default_images.h5") as file:
        theirs = file["images/image_0/data"][:]
    assert result.group is not None
    ours = file_images(out, result.group)
    assert ours.shape == theirs.shape
    assert np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 1e-5


def test_a_measured_phantom_through_the_server(service: Service, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    result = replay(MEASURED, port=service.port, config="fourier", out=out)
    assert result.group is not None
    image = file_images(out, result.group)[0, 0, 0]
    with h5py.File(MEASURED) as file:
        rows = file["dataset/data"][:]
    kspace = np.zeros((2, 160, 320), complex)
    for row in rows:
        kspace[:, row["head"]["idx"]["kspace_encode_step_1"]] = row["data"].view(np.complex64).reshape(2, 320)
    coils = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes=(1, 2)), norm="ortho"), axes=(1, 2))[:, :, 80:240]
    expected = np.sqrt((np.abs(coils) ** 2).sum(axis=0))
    assert np.linalg.norm(image - expected) / np.linalg.norm(expected) < 1e-5
