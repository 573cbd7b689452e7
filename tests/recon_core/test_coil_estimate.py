from dataclasses import replace

import pytest
import torch

from recon_core.coils.estimate import CoilSettings, estimate_coil_maps
from recon_core.errors import CalibrationError
from recon_core.fourier import fft_centred
from recon_core.types import KSpace
from tests.recon_core.coil_phantom import combination_error, phantom, smooth_maps


def scan(shape: tuple[int, int, int], mask: torch.Tensor, n_coils: int = 6) -> tuple[KSpace, torch.Tensor]:
    """Hybrid k-space with the calibration lines in ``mask`` ``(k2, k1)``, and the coil images that it came from."""
    image = phantom(shape[1:])[None] if shape[0] == 1 else phantom(shape)
    maps = smooth_maps(n_coils, shape[1:])[:, None] if shape[0] == 1 else smooth_maps(n_coils, shape)
    images = maps * image
    kspace = fft_centred(images, (1, 2))
    acs = kspace * mask[None, :, :, None]
    return KSpace(data=acs[None], counts=mask[None].float(), acs=acs, acs_mask=mask), images


def lines(n_2: int, n_1: int, wanted: range) -> torch.Tensor:
    mask = torch.zeros(n_2, n_1, dtype=torch.bool)
    mask[:, list(wanted)] = True
    return mask


@pytest.mark.parametrize(("method", "limit"), [("espirit", 0.015), ("walsh", 0.05)])
def test_slice(method: str, limit: float) -> None:
    kspace, images = scan((1, 72, 80), lines(1, 72, range(24, 50)))
    maps = estimate_coil_maps(kspace, CoilSettings(method=method))
    assert maps.shape == (6, 1, 72, 80)
    assert maps.dtype == torch.complex64
    assert combination_error(maps, images) < limit


def test_stray_lines_are_left_out_and_the_mask_may_be_missing() -> None:
    mask = lines(1, 72, range(26, 47))
    mask[0, ::4] = True
    kspace, images = scan((1, 72, 80), mask)
    for k in (kspace, replace(kspace, acs_mask=None)):
        assert combination_error(estimate_coil_maps(k), images) < 0.015


def test_off_centre_calibration() -> None:
    kspace, images = scan((1, 72, 80), lines(1, 72, range(30, 60)))
    assert combination_error(estimate_coil_maps(kspace), images) < 0.015


def test_elliptical_calibration_of_a_volume() -> None:
    shape = (24, 40, 40)
    k2, k1 = torch.meshgrid(torch.arange(24) - 12, torch.arange(40) - 20, indexing="ij")
    mask = (k2 / 9) ** 2 + (k1 / 12) ** 2 < 1
    kspace, images = scan(shape, mask)
    assert combination_error(estimate_coil_maps(kspace), images) < 0.015


def test_thin_slab() -> None:
    kspace, images = scan((4, 40, 40), lines(4, 40, range(10, 30)))
    assert combination_error(estimate_coil_maps(kspace), images) < 0.02


def test_asymmetric_echo() -> None:
    kspace, images = scan((1, 72, 80), lines(1, 72, range(24, 48)))
    assert kspace.acs is not None
    k0 = fft_centred(kspace.acs, -1)
    k0[..., :31] = 0
    partial = replace(kspace, acs=torch.fft.fftshift(torch.fft.ifft(torch.fft.ifftshift(k0, dim=-1), norm="ortho"), dim=-1))
    assert combination_error(estimate_coil_maps(replace(partial, readout_ranges=((31, 80),))), images) < 0.015
    with pytest.raises(CalibrationError, match="centre was not measured"):
        estimate_coil_maps(replace(partial, readout_ranges=((45, 80),)))


def test_single_coil_is_all_ones() -> None:
    kspace, _ = scan((1, 32, 32), lines(1, 32, range(16, 17)), n_coils=1)
    maps = estimate_coil_maps(replace(kspace, acs=None, acs_mask=None))
    torch.testing.assert_close(maps, torch.ones(1, 1, 32, 32, dtype=torch.complex64))


def test_missing_or_insufficient_calibration_is_named() -> None:
    kspace, _ = scan((1, 72, 80), lines(1, 72, range(24, 48)))
    with pytest.raises(CalibrationError, match="no calibration lines"):
        estimate_coil_maps(replace(kspace, acs=None))
    with pytest.raises(CalibrationError, match="along k1; got 3; expected at least 4"):
        estimate_coil_maps(scan((1, 72, 80), lines(1, 72, range(35, 38)))[0])
    with pytest.raises(CalibrationError, match=r"got 6 contiguous lines; expected at least 8.*walsh"):
        estimate_coil_maps(scan((1, 72, 80), lines(1, 72, range(33, 39)))[0])
    with pytest.raises(CalibrationError, match="centre of k-space"):
        estimate_coil_maps(scan((1, 72, 80), lines(1, 72, range(24)))[0])
    assert kspace.acs is not None
    with pytest.raises(CalibrationError, match="not on the grid"):
        estimate_coil_maps(replace(kspace, acs=kspace.acs[:, :, :, :40]))
