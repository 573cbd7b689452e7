import pytest
import torch

from recon_core.coils.walsh import walsh_maps
from recon_core.errors import CalibrationError
from tests.recon_core.coil_phantom import calibration_block, combination_error, phantom, smooth_maps


@pytest.mark.parametrize(("lines", "limit"), [(32, 0.03), (24, 0.045), (8, 0.12)])
def test_maps_explain_the_data(lines: int, limit: float) -> None:
    images = smooth_maps(8, (96, 88)) * phantom((96, 88))
    maps = walsh_maps(calibration_block(images, (lines, 32)), (96, 88))
    assert maps.dtype == torch.complex64
    assert combination_error(maps, images) < limit
    torch.testing.assert_close(torch.linalg.vector_norm(maps, dim=0), torch.ones(96, 88))


def test_a_flat_object_gives_the_true_maps() -> None:
    # without the object's own edges the low-resolution images are the maps themselves
    truth = smooth_maps(6, (80, 80))
    maps = walsh_maps(calibration_block(truth, (40, 40)), (80, 80))
    inner = slice(20, 60)
    overlap = (truth.conj() * maps).sum(dim=0).abs()[inner, inner]
    assert float(overlap.min()) > 0.999


def test_scale_does_not_matter() -> None:
    block = calibration_block(smooth_maps(3, (24, 24)) * phantom((24, 24)), (12, 12))
    maps = walsh_maps(block, (24, 24))
    torch.testing.assert_close(walsh_maps(1e-25 * block, (24, 24)), maps, rtol=0, atol=1e-3)


def test_larger_blocks_are_calmer_in_noise() -> None:
    truth = smooth_maps(6, (80, 80))
    g = torch.Generator().manual_seed(0)
    noisy = truth + 2.0 * torch.randn(truth.shape, dtype=torch.complex64, generator=g)
    inner = slice(20, 60)

    def worst(block: int) -> float:
        maps = walsh_maps(calibration_block(noisy, (24, 24)), (80, 80), block=block)
        return float((truth.conj() * maps).sum(dim=0).abs()[inner, inner].mean())

    assert worst(4) > worst(1)


def test_volume() -> None:
    shape = (16, 40, 48)
    images = smooth_maps(6, shape) * phantom(shape)
    assert combination_error(walsh_maps(calibration_block(images, (16, 24, 32)), shape), images) < 0.03


def test_errors() -> None:
    with pytest.raises(CalibrationError, match="no signal"):
        walsh_maps(torch.zeros(4, 24, 24, dtype=torch.complex64), (64, 64))
    with pytest.raises(CalibrationError, match="wrong shape"):
        walsh_maps(torch.ones(4, 24, dtype=torch.complex64), (64, 64))
