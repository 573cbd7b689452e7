import math

import pytest
import torch

from recon_core.coils.coarse_grid import GridAxis, align_phases, interpolate
from recon_core.coils.espirit import espirit_maps
from recon_core.errors import CalibrationError
from tests.recon_core.coil_phantom import calibration_block, combination_error, phantom, positions, smooth_maps


def largest_jump(maps: torch.Tensor, where: torch.Tensor) -> float:
    """Largest distance between the coil vectors of neighbouring pixels inside ``where``."""
    jumps = []
    for axis in range(where.ndim):
        n = where.shape[axis] - 1
        step = torch.linalg.vector_norm(maps.narrow(axis + 1, 1, n) - maps.narrow(axis + 1, 0, n), dim=0)
        jumps.append(float((step * (where.narrow(axis, 1, n) & where.narrow(axis, 0, n))).max()))
    return max(jumps)


@pytest.mark.parametrize("lines", [24, 16, 12, 8])
def test_fully_sampled_data_are_explained(lines: int) -> None:
    images = smooth_maps(8, (96, 88)) * phantom((96, 88))
    maps = espirit_maps(calibration_block(images, (lines, 24)), (96, 88))
    assert maps.dtype == torch.complex64
    assert combination_error(maps, images) < 0.015
    torch.testing.assert_close(torch.linalg.vector_norm(maps, dim=0), torch.ones(96, 88))


def test_maps_are_the_true_ones_up_to_a_smooth_phase() -> None:
    truth = smooth_maps(8, (96, 96))
    image = phantom((96, 96))
    maps = espirit_maps(calibration_block(truth * image, (24, 24)), (96, 96))
    inside = image.abs() > 0.1
    overlap = (truth.conj() * maps).sum(dim=0)
    assert float(overlap.abs()[inside].min()) > 0.998
    assert largest_jump(maps, inside) < 1.5 * largest_jump(truth, inside)


@pytest.mark.parametrize("noise", [0.01, 0.03])
def test_anatomy_is_never_cropped(noise: float) -> None:
    # a dim disc (2 % of the object's brightness) beside the object and noise everywhere
    shape = (96, 96)
    y, x = positions(shape)
    dim = ((y / 0.05) ** 2 + ((x - 0.42) / 0.03) ** 2 < 1) * 0.1
    image = phantom(shape) + dim
    g = torch.Generator().manual_seed(1)
    images = smooth_maps(8, shape) * image
    noisy = (images + noise * torch.randn(images.shape, dtype=torch.complex64, generator=g)).to(torch.complex64)
    block = calibration_block(noisy, (24, 24))
    maps = espirit_maps(block, shape, noise_std=noise)
    defined = torch.linalg.vector_norm(maps, dim=0) > 0
    assert bool(defined[image.abs() > 0].all())
    # and yet some of the air is recognised
    assert float(defined[image.abs() == 0].float().mean()) < 0.9
    # noise is the only thing that the maps leave unexplained
    unexplained = math.sqrt(7 / 8) * noise * math.sqrt(noisy.numel()) / float(noisy.norm())
    everywhere = espirit_maps(block, shape, noise_std=noise, background=0.0)
    assert combination_error(everywhere, noisy) < 1.03 * unexplained + 0.002
    assert bool((torch.linalg.vector_norm(everywhere, dim=0) > 0.99).all())


@pytest.mark.parametrize("shape", [(24, 40, 48), (6, 40, 48)])
def test_volumes(shape: tuple[int, int, int]) -> None:
    images = smooth_maps(8, shape) * phantom(shape)
    maps = espirit_maps(calibration_block(images, (min(16, shape[0]), 16, 32)), shape)
    assert combination_error(maps, images) < 0.015
    inside = phantom(shape).abs() > 0.1
    assert largest_jump(maps, inside) < 2 * largest_jump(smooth_maps(8, shape), inside)


def test_scale_and_block_position_do_not_matter() -> None:
    images = smooth_maps(4, (64, 64)) * phantom((64, 64))
    block = calibration_block(images, (28, 24))
    maps = espirit_maps(block, (64, 64), noise_std=1e-3)
    torch.testing.assert_close(espirit_maps(1e5 * block, (64, 64), noise_std=1e2), maps, rtol=0, atol=1e-3)
    torch.testing.assert_close(espirit_maps(1e-25 * block, (64, 64), noise_std=1e-28), maps, rtol=0, atol=1e-3)
    torch.testing.assert_close(espirit_maps(block, (64, 64), noise_std=1e-3), maps, rtol=0, atol=0)
    assert combination_error(espirit_maps(block[:, 3:27], (64, 64)), images) < 0.015


def test_permuted_coils_give_permuted_maps() -> None:
    images = smooth_maps(5, (64, 64)) * phantom((64, 64))
    block = calibration_block(images, (24, 24))
    order = [3, 0, 4, 1, 2]
    inside = phantom((64, 64)).abs() > 0.1
    overlap = (espirit_maps(block, (64, 64))[order].conj() * espirit_maps(block[order], (64, 64))).sum(dim=0)
    assert float(overlap.abs()[inside].min()) > 0.999


def noisy_coils(n_coils: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Coil images ``(coil, 64, 64)``, without and with noise."""
    images = smooth_maps(n_coils, (64, 64)) * phantom((64, 64))
    return images, images + noise * torch.randn(
        images.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("faint", [0.0, 1e-4])
@pytest.mark.parametrize("noise_std", [None, 0.1])
def test_coils_that_are_switched_off_change_nothing_for_the_others(noise_std: float | None, faint: float) -> None:
    _, noisy = noisy_coils(6, 0.1)
    noisy[[2, 5]] *= faint
    heard = [0, 1, 3, 4]
    maps = espirit_maps(calibration_block(noisy, (24, 24)), (64, 64), noise_std=noise_std)
    alone = espirit_maps(calibration_block(noisy[heard], (24, 24)), (64, 64), noise_std=noise_std)
    torch.testing.assert_close(maps[heard], alone, rtol=0, atol=0)
    assert not bool(maps[[2, 5]].any())


def test_coils_that_are_sums_of_others_show_no_noise() -> None:
    images, noisy = noisy_coils(6, 0.2)
    sums = torch.randn(4, 6, dtype=torch.complex64, generator=torch.Generator().manual_seed(2)) / 3
    images, noisy = (torch.cat([coils, torch.einsum("vc,cyx->vyx", sums, coils)]) for coils in (images, noisy))
    assert combination_error(espirit_maps(calibration_block(noisy, (24, 24)), (64, 64)), images) < 0.08


def test_input_is_not_edited() -> None:
    block = calibration_block(smooth_maps(4, (48, 48)) * phantom((48, 48)), (24, 24))
    before = block.clone()
    espirit_maps(block, (48, 48), noise_std=0.01)
    torch.testing.assert_close(block, before, rtol=0, atol=0)


def test_bad_calibration() -> None:
    block = torch.ones(4, 6, 24, dtype=torch.complex64)
    with pytest.raises(CalibrationError, match="got 6 contiguous lines; expected at least 8"):
        espirit_maps(block, (64, 64))
    with pytest.raises(CalibrationError, match="no signal"):
        espirit_maps(torch.zeros(4, 24, 24, dtype=torch.complex64), (64, 64))
    with pytest.raises(CalibrationError, match="no signal, or not finite"):
        espirit_maps(torch.full((4, 24, 24), math.nan, dtype=torch.complex64), (64, 64))
    with pytest.raises(CalibrationError, match="wrong shape"):
        espirit_maps(torch.ones(4, 24, 24, dtype=torch.complex64), (1, 64, 64))


def test_phases_are_chosen_together_even_where_the_principal_coil_vanishes() -> None:
    # either coil has a zero inside: with its phase as the reference, the other would flip its sign there
    y, x = positions((21, 20))
    angle = math.radians(200) * x
    truth = torch.stack([torch.cos(angle) + 0j, torch.sin(angle) * torch.exp(1j * y)], dim=-1).to(torch.complex64)
    g = torch.Generator().manual_seed(0)
    scrambled = truth * torch.exp(2j * math.pi * torch.rand(21, 20, 1, generator=g))
    found = torch.movedim(align_phases(scrambled, torch.ones(21, 20)), -1, 0)
    everywhere = torch.ones(21, 20, dtype=torch.bool)
    assert largest_jump(found, everywhere) < 1.2 * largest_jump(torch.movedim(truth, -1, 0), everywhere)


def test_interpolation_reproduces_quadratics_at_the_right_places() -> None:
    axis = GridAxis.spanning(50, 12)
    p = axis.positions / 25
    fine = (torch.arange(50, dtype=torch.float64) - 25) / 25
    values = (1 + 0.5 * p - 2 * p**2).float()
    expected = (1 + 0.5 * fine - 2 * fine**2).float()
    inner = slice(5, 45)
    torch.testing.assert_close(interpolate(values, [axis])[inner], expected[inner], rtol=0, atol=1e-5)
    low = GridAxis.low_resolution(48, 16)
    assert float(low.positions[8]) == 0.0
    assert float(low.step) == 3.0


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("lines", [8, 24])
def test_noise_is_not_taken_for_signal(lines: int, known: bool) -> None:
    """Singular values of noise above ``threshold`` made the projector the identity and the maps random (found with a raw file
    that the real client sent: SENSE images were folded)."""
    shape, noise = (32, 32), 0.05
    truth = smooth_maps(4, shape)
    g = torch.Generator().manual_seed(2)
    images = truth * phantom(shape)
    noisy = images + noise * torch.randn(images.shape, dtype=torch.complex64, generator=g)
    maps = espirit_maps(calibration_block(noisy, (lines, 32)), shape, noise_std=noise if known else None, background=0.0)
    assert combination_error(maps, images) < 0.1
