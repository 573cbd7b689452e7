import math

import pytest
import torch

from recon_core.errors import DataError
from recon_core.preprocess.oversampling import to_recon_matrix

FOV = (0.005, 0.24, 0.24)


def test_identity_returns_the_same_image() -> None:
    image = torch.randn(2, 1, 12, 10, dtype=torch.complex64)
    out = to_recon_matrix(image, (1, 12, 10), FOV, (1, 12, 10), FOV)
    assert out is image


def test_phase_oversampling_is_a_centre_crop() -> None:
    image = torch.randn(1, 24, 10, dtype=torch.complex64)
    out = to_recon_matrix(image, (1, 24, 10), (0.005, 0.48, 0.24), (1, 12, 10), (0.006, 0.24, 0.24))
    torch.testing.assert_close(out, image[:, 6:18], rtol=0, atol=0)


@pytest.mark.parametrize("new", [(1, 16, 16), (1, 15, 9), (1, 8, 8), (1, 11, 13), (1, 30, 31)])
def test_a_constant_stays_that_constant(new: tuple[int, int, int]) -> None:
    image = torch.full((2, 1, 12, 11), 3 - 2j, dtype=torch.complex64)
    out = to_recon_matrix(image, (1, 12, 11), FOV, new, FOV)
    torch.testing.assert_close(out, torch.full((2, *new), 3 - 2j, dtype=torch.complex64))


@pytest.mark.parametrize(
    ("n", "fov", "new", "new_fov"),
    [
        (24, 0.24, 48, 0.24),
        (24, 0.24, 36, 0.18),
        (25, 0.25, 40, 0.2),
        (24, 0.24, 20, 0.24),
        (20, 0.2, 30, 0.3),
        (32, 0.32, 45, 0.3),
    ],
)
def test_a_band_limited_object_keeps_its_values_and_its_place(n: int, fov: float, new: int, new_fov: float) -> None:
    # known truth: cosines evaluated at the physical positions of the pixels, centre pixel n // 2 at zero
    def truth(count: int, width: float) -> torch.Tensor:
        x = (torch.arange(count, dtype=torch.float64) - count // 2) * width / count
        y = 1 + 0.5 * torch.cos(2 * math.pi * 2 * x / fov + 0.3) + 0.25 * torch.sin(2 * math.pi * 3 * x / fov)
        return torch.where((x >= -fov / 2 - 1e-9) & (x < fov / 2 - 1e-9), y, 0)

    image = truth(n, fov).reshape(1, 1, n).to(torch.complex64)
    out = to_recon_matrix(image, (1, 1, n), (0.005, 0.2, fov), (1, 1, new), (0.005, 0.2, new_fov))
    torch.testing.assert_close(out[0, 0].real.double(), truth(new, new_fov), rtol=0, atol=2e-6)


def test_partitions_and_magnitudes() -> None:
    z = torch.cos(2 * math.pi * (torch.arange(8) - 4) / 8).reshape(8, 1, 1) + 2
    image = z.expand(8, 6, 6).contiguous()
    image_before = image.clone()
    out = to_recon_matrix(image, (8, 6, 6), (0.08, 0.2, 0.2), (8, 6, 6), (0.04, 0.2, 0.2))
    expected = torch.cos(2 * math.pi * (torch.arange(8) - 4) / 16) + 2
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, expected.reshape(8, 1, 1).expand(8, 6, 6))
    torch.testing.assert_close(image, image_before, rtol=0, atol=0)


def test_rounded_header_values_do_not_resample() -> None:
    image = torch.randn(1, 160, 8, dtype=torch.complex64)
    out = to_recon_matrix(image, (1, 160, 8), (0.005, 0.30001, 0.24), (1, 160, 8), (0.005, 0.3, 0.24))
    torch.testing.assert_close(out, image, rtol=0, atol=0)


def test_errors() -> None:
    image = torch.ones(1, 4, 4)
    with pytest.raises(DataError, match="recon_fov"):
        to_recon_matrix(image, (1, 4, 4), FOV, (1, 4, 4), (0.005, 0.0, 0.2))
    with pytest.raises(DataError, match="encoded grid"):
        to_recon_matrix(image, (1, 4, 5), FOV, (1, 4, 4), FOV)
    with pytest.raises(DataError, match="one partition"):
        to_recon_matrix(image, (1, 4, 4), FOV, (2, 4, 4), FOV)
