"""Where pixels lie: point sources in patient space, encoded with the acquisition's directions, must be found again."""

from __future__ import annotations

import ismrmrd
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray

from gadgets.geometry import (
    AXIAL,
    Geometry,
    field_of_view_mm,
    image_position_patient,
    orthonormal_directions,
    pixel_spacing,
    pixel_to_patient,
    read_geometry,
)
from gadgets.images import ImageWriter, OutputSettings
from gadgets.wire.dtypes import ACQUISITION_HEADER, IMAGE_HEADER
from gadgets.wire.header import Encoding, MrdHeader
from recon_core.errors import DataError
from recon_core.types import ImageSeries, Result, ScanInfo

Array = NDArray[np.float64]


def rotation(seed: int) -> Array:
    """Random oblique directions as rows: read, phase, slice."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q if np.linalg.det(q) > 0 else q * np.array([[1.0], [1.0], [-1.0]])


def point_kspace(
    points: Array, position: Array, axes: Array, fov: Array, matrix: tuple[int, int, int]
) -> NDArray[np.complex128]:
    """``s(k) = sum_p exp(-2 pi i k . (p - position))``, axes ``(z, y, x)``; ``matrix`` and ``fov`` are x, y, z.

    The scanner's demodulation puts the coordinate zero at ``position``; k is sampled at ``(j - N // 2) / FOV``.
    """
    local = (points - position) @ axes.T
    kx, ky, kz = ((np.arange(n) - n // 2) / extent for n, extent in zip(matrix, fov, strict=True))
    phase = np.zeros((len(points), matrix[2], matrix[1], matrix[0]))
    for n, (x, y, z) in enumerate(local):
        phase[n] = kx[None, None] * x + ky[None, :, None] * y + kz[:, None, None] * z
    return np.exp(-2j * np.pi * phase).sum(axis=0)


def reconstruct(kspace: NDArray[np.complex128]) -> NDArray[np.complex64]:
    axes = tuple(range(kspace.ndim - 3 if kspace.shape[-3] > 1 else kspace.ndim - 2, kspace.ndim))
    image = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(kspace, axes), axes=axes, norm="ortho"), axes)
    return image.astype(np.complex64)


def scan_info(matrix: tuple[int, int, int], fov_mm: Array, slice_index: int = 0) -> ScanInfo:
    nx, ny, nz = matrix
    fov = (fov_mm[2] * 1e-3, fov_mm[1] * 1e-3, fov_mm[0] * 1e-3)
    return ScanInfo(matrix=(nz, ny, nx), fov=fov, recon_matrix=(nz, ny, nx), recon_fov=fov, slice_index=slice_index)


def send(image: NDArray[np.complex64], scan: ScanInfo, position: Array, axes: Array) -> ismrmrd.Image:
    """Through the writer and the wire, read back by ismrmrd-python."""
    encoding = Encoding("cartesian", scan.matrix, scan.fov, scan.recon_matrix, scan.recon_fov)
    writer = ImageWriter(MrdHeader((encoding,)), "fourier", OutputSettings(pixel_type="float32"))
    geometry = Geometry(tuple(position), *(tuple(row) for row in axes))
    result = Result((ImageSeries("image", torch.from_numpy(image[np.newaxis])),))
    (message,) = writer.messages(result, scan, geometry)
    assert message[:2] == (1022).to_bytes(2, "little")
    return ismrmrd.Image.from_bytes(message[2:])


def raw_header(image: ismrmrd.Image) -> np.void:
    return np.frombuffer(bytes(image.getHead()), IMAGE_HEADER)[0]


MATRICES = [(48, 32, 1), (33, 48, 1), (27, 35, 1), (24, 20, 12), (24, 15, 9), (16, 16, 7)]


@pytest.mark.parametrize("matrix", MATRICES, ids=str)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_point_is_found_where_it_was_put(matrix: tuple[int, int, int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes, position = rotation(seed), rng.uniform(-60, 60, 3)
    step = np.array([1.3, 1.9, 4.0 if matrix[2] == 1 else 2.2])
    fov = step * matrix
    index = np.array([int(rng.integers(n)) for n in matrix])
    truth = position + (index - np.array(matrix) // 2) * step @ axes
    image = reconstruct(point_kspace(truth[None], position, axes, fov, matrix))

    received = send(image, scan_info(matrix, fov), position, axes)
    _, z, y, x = np.unravel_index(int(np.argmax(received.data)), received.data.shape)
    assert (x, y, z) == tuple(index)

    head = raw_header(received)
    np.testing.assert_allclose(pixel_to_patient(head, (x, y, z), "fft"), truth, atol=2e-4)
    # by the rule of MRD and DICOM: half a pixel off along axes of even length, exact along odd ones
    error = (pixel_to_patient(head, (x, y, z), "fov") - truth) @ axes.T / step
    half = np.array([0.5 if n % 2 == 0 else 0.0 for n in matrix])
    np.testing.assert_allclose(error, half, atol=1e-4)


def test_an_arbitrary_point_is_found_within_half_a_pixel() -> None:
    matrix, axes, position = (40, 28, 1), rotation(5), np.array([11.0, -35.0, 60.0])
    fov = np.array([240.0, 196.0, 6.0])
    rng = np.random.default_rng(0)
    for _ in range(20):
        local = rng.uniform(-0.4, 0.4, 3) * fov * (1, 1, 0)
        truth = position + local @ axes
        received = send(
            reconstruct(point_kspace(truth[None], position, axes, fov, matrix)), scan_info(matrix, fov), position, axes
        )
        _, z, y, x = np.unravel_index(int(np.argmax(received.data)), received.data.shape)
        error = (pixel_to_patient(raw_header(received), (x, y, z), "fft") - truth) @ axes.T
        assert (np.abs(error) <= 0.5 * fov / matrix + 1e-3).all()


def test_each_slice_of_an_oblique_stack_lies_where_its_point_was() -> None:
    matrix, axes = (30, 44, 1), rotation(9)
    fov = np.array([150.0, 264.0, 5.0])
    for number in range(3):
        centre = np.array([20.0, -10.0, 5.0]) + (number - 1) * 7.5 * axes[2]
        truth = centre + np.array([-4.0, 9.0, 0.0]) * (fov / matrix) @ axes
        image = reconstruct(point_kspace(truth[None], centre, axes, fov, matrix))
        received = send(image, scan_info(matrix, fov, number), centre, axes)
        _, z, y, x = np.unravel_index(int(np.argmax(received.data)), received.data.shape)
        np.testing.assert_allclose(pixel_to_patient(raw_header(received), (x, y, z), "fft"), truth, atol=2e-4)
        assert received.slice == number and received.image_index == number + 1


@pytest.mark.parametrize(("full", "part"), [(48, 32), (45, 32), (48, 31)])
def test_a_centre_crop_does_not_move_the_point(full: int, part: int) -> None:
    axes, position = rotation(4), np.array([5.0, 6.0, 7.0])
    step = np.array([2.0, 2.0, 5.0])
    truth = position + np.array([3, -6, 0]) * step @ axes
    image = reconstruct(point_kspace(truth[None], position, axes, step * (full, full, 1), (full, full, 1)))
    start = full // 2 - part // 2
    cropped = image[:, start : start + part, start : start + part]
    received = send(cropped, scan_info((part, part, 1), step * (part, part, 1)), position, axes)
    _, z, y, x = np.unravel_index(int(np.argmax(received.data)), received.data.shape)
    np.testing.assert_allclose(pixel_to_patient(raw_header(received), (x, y, z), "fft"), truth, atol=2e-4)


def header(matrix: tuple[int, int, int], fov: tuple[float, float, float], position: Array, axes: Array) -> np.void:
    head = np.zeros(1, IMAGE_HEADER)
    head["matrix_size"], head["field_of_view"], head["position"] = matrix, fov, position
    head["read_dir"], head["phase_dir"], head["slice_dir"] = axes
    return head[0]


def test_dicom_position_and_spacing_of_a_non_square_image() -> None:
    head = header((64, 48, 1), (320.0, 192.0, 8.0), np.array([10.0, 20.0, 30.0]), np.eye(3))
    assert pixel_spacing(head) == (4.0, 5.0)  # between rows first
    assert image_position_patient(head) == (10.0 - 31.5 * 5, 20.0 - 23.5 * 4, 30.0)
    assert image_position_patient(head, centre="fft") == (10.0 - 160.0, 20.0 - 96.0, 30.0)


def test_planes_of_a_slab_are_symmetric_about_its_centre() -> None:
    axes = rotation(3)
    head = header((16, 16, 6), (160.0, 160.0, 12.0), np.array([1.0, 2.0, 3.0]), axes)
    first, last = np.array(image_position_patient(head, 0)), np.array(image_position_patient(head, 5))
    np.testing.assert_allclose(last - first, 10.0 * axes[2], atol=1e-5)
    np.testing.assert_allclose(
        (pixel_to_patient(head, (7.5, 7.5, 0)) + pixel_to_patient(head, (7.5, 7.5, 5))) / 2, (1, 2, 3), atol=1e-5
    )


@settings(max_examples=300)
@given(
    npst.arrays(np.float32, (3, 3), elements=st.floats(-2, 2, width=32) | st.sampled_from([0.0, float("nan"), float("inf")]))
)
def test_directions_are_always_orthonormal_and_never_nan(given_dirs: NDArray[np.float32]) -> None:
    directions, notes = orthonormal_directions(*given_dirs)
    np.testing.assert_allclose(np.array(directions) @ np.array(directions).T, np.eye(3), atol=2.1e-3)
    if not np.allclose(np.array(directions), given_dirs, atol=1e-6):
        assert notes


def test_sound_directions_are_untouched_whatever_their_handedness() -> None:
    for axes in (rotation(1), rotation(1) * np.array([[1.0], [1.0], [-1.0]])):
        axes = axes.astype(np.float32).astype(np.float64)
        directions, notes = orthonormal_directions(*axes)
        assert np.array_equal(np.array(directions), axes) and notes == ()


def test_repairs_are_said() -> None:
    axes = rotation(2)
    assert orthonormal_directions(*np.zeros((3, 3))) == (AXIAL, ("acquisition directions are missing: axial ones assumed",))
    directions, (note,) = orthonormal_directions(axes[0], axes[1], np.zeros(3))
    np.testing.assert_allclose(directions, axes, atol=1e-9)
    assert "slice direction is missing" in note
    directions, (note,) = orthonormal_directions(2 * axes[0], axes[1] + 0.2 * axes[0], -axes[2])
    np.testing.assert_allclose(directions, axes * np.array([[1.0], [1.0], [-1.0]]), atol=1e-9)
    assert "orthonormal" in note
    assert "parallel" in orthonormal_directions(axes[0], axes[0], axes[0])[1][0]


def test_geometry_of_a_readout_with_nothing_in_it() -> None:
    readout = np.zeros(1, ACQUISITION_HEADER)
    readout["position"] = (np.nan, 1.0, 2.0)
    geometry = read_geometry(readout[0])
    assert geometry.position == (0.0, 0.0, 0.0) and (geometry.read_dir, geometry.phase_dir, geometry.slice_dir) == AXIAL
    assert len(geometry.notes) == 2


def test_field_of_view_follows_the_grid_of_the_image() -> None:
    scan = ScanInfo(matrix=(1, 60, 64), fov=(0.006, 0.3, 0.32), recon_matrix=(1, 48, 64), recon_fov=(0.005, 0.24, 0.32))
    assert field_of_view_mm(scan, (1, 48, 64)) == pytest.approx((320, 240, 5))
    assert field_of_view_mm(scan, (1, 60, 64)) == pytest.approx((320, 300, 6))
    with pytest.raises(DataError, match="neither matrix"):
        field_of_view_mm(scan, (1, 50, 64))
