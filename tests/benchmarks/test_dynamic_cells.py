"""The cells on which methods are compared are what they claim: data, masks, truths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from benchmarks.cell import Cell, fit_t1
from benchmarks.dynamic_cells import DONORS, NOISES, cells, make_cell
from benchmarks.measured_series import NAMES, measured, restore_polarity
from benchmarks.semi_measured import resample
from recon_core.metrics import map_nmse, psnr
from tests.recon_core.small_series import centred_fft

SMALL: dict[str, Any] = {"matrix": (48, 56), "n_coils": 4}


def residual_over_noise(cell: Cell) -> float:
    """RMS of the sampled data minus the encoded truth, over the noise. Encoded by NumPy, not by the code under test."""
    encoded = centred_fft(cell.images[:, None].astype(np.complex128) * cell.coil_maps, (-2,))
    difference = np.abs(cell.kspace - encoded) ** 2 * cell.mask[:, None, :, :, None]
    n_samples = cell.mask.sum() * cell.coil_maps.shape[0] * cell.images.shape[-1]
    return float(np.sqrt(difference.sum() / n_samples)) / cell.noise_std


@pytest.mark.parametrize("kind", ["cine", "molli"])
@pytest.mark.parametrize("breathing", [0.0, 0.002])
def test_simulated_data_are_the_encoded_truth_and_the_noise(kind: str, breathing: float) -> None:
    cell = make_cell(kind, 5, 4, 0.02, breathing=breathing, **SMALL)
    # the truth is multiplied by coil maps before it is truncated: a little more than noise, never less
    assert 0.97 < residual_over_noise(cell) < 1.1
    assert cell.images.shape == ({"cine": 12, "molli": 9}[kind], 1, 48, 56)
    assert np.all(cell.kspace[~np.broadcast_to(cell.mask[:, None, :, :, None], cell.kspace.shape)] == 0)
    assert np.percentile(np.abs(cell.images), 99.9) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_semi_measured_data_are_the_encoded_truth_and_the_noise(name: str) -> None:
    cell = make_cell("molli", name, 6, 0.005, n_coils=3)
    assert residual_over_noise(cell) == pytest.approx(1, abs=0.02)
    assert cell.origin == "semi-measured"


@pytest.mark.parametrize(("kind", "acceleration"), [("cine", 4), ("cine", 8), ("molli", 6)])
def test_masks_hold_calibration_lines_and_the_nominal_share_besides(kind: str, acceleration: int) -> None:
    cell = make_cell(kind, 0, acceleration, 0.005, **SMALL, acs=10)
    assert cell.acs_mask.sum() == 10
    assert cell.mask[:, cell.acs_mask].all()
    outside = cell.mask & ~cell.acs_mask
    assert np.all(outside.sum(axis=(1, 2)) == round(48 / acceleration))
    assert len({state.tobytes() for state in cell.mask}) == len(cell.mask), "states share a mask"


def test_a_cell_is_reproducible_and_its_arguments_matter() -> None:
    one, two = (make_cell("molli", 1, 6, 0.01, **SMALL) for _ in range(2))
    assert np.array_equal(one.kspace, two.kspace)
    other = make_cell("molli", 2, 6, 0.01, **SMALL)
    assert psnr(other.images, one.images) < 30


def test_breathing_moves_what_is_still_otherwise() -> None:
    def still_part(cell: Cell) -> NDArray[np.float64]:
        outside = ~np.broadcast_to(cell.roi, cell.images.shape)
        magnitudes = np.abs(np.where(outside, cell.images, 0))
        return np.asarray(magnitudes.std(0).sum() / magnitudes.mean(0).sum())

    rest, moving = (make_cell("cine", 1, 4, 0.005, breathing=b, **SMALL) for b in (0.0, 0.002))
    assert still_part(moving) > 3 * still_part(rest)


@pytest.mark.parametrize("donor", DONORS)
def test_coil_maps_have_unit_length(donor: str) -> None:
    cell = make_cell("molli", "brain", 4, 0.005, donor=donor)
    assert np.linalg.norm(cell.coil_maps, axis=0) == pytest.approx(np.ones((1, 128, 128)), abs=1e-3)
    assert len(cell.coil_maps) == {"simulated": 10, "heart": 10, "brain": 4}[donor]


def test_t1_of_the_true_images_is_the_tissue_s_where_pixels_are_pure() -> None:
    cell = make_cell("molli", 0, 4, 0.005, matrix=(96, 96), n_coils=4)
    assert cell.t1 is not None
    t1, valid = cell.reference_t1()
    inside = cell.roi & valid & cell.support
    deviation = np.abs(t1[inside] / cell.t1[inside] - 1)
    assert valid[cell.support].mean() > 0.9
    # textured tissue: few pixels are pure at this matrix
    assert np.median(deviation) < 0.05
    assert map_nmse(fit_t1(cell, cell.images)[0], t1, inside) == 0


def test_a_method_takes_a_cell() -> None:
    cell = make_cell("molli", 0, 4, 0.005, **SMALL)
    kspace, scan = cell.problem()
    assert tuple(kspace.data.shape) == (9, 4, 1, 48, 56)
    assert scan.inversion_times == cell.times
    assert kspace.acs is not None and kspace.acs_mask is not None
    state = int(np.argmax([np.abs(cell.kspace[i] * cell.acs_mask[None, :, :, None]).sum() for i in range(9)]))
    assert np.array_equal(kspace.acs.numpy(), cell.kspace[state] * cell.acs_mask[None, :, :, None])
    estimated = make_cell("molli", 0, 4, 0.005, **SMALL, estimated_maps=True)
    assert not np.array_equal(estimated.coil_maps, cell.coil_maps)
    # the same up to a phase of each pixel
    agreement = np.abs((estimated.coil_maps.conj() * cell.coil_maps).sum(0))[cell.support]
    assert np.median(agreement) > 0.98


def test_the_default_grid_sees_every_acceleration_and_noise_level() -> None:
    grid = list(cells("molli", first_anatomy=20))
    assert {cell.acceleration for cell in grid} == {4, 6, 8}
    assert {cell.noise_std for cell in grid} == set(NOISES)
    assert len({cell.name for cell in grid}) == len(grid)


def test_polarity_comes_back() -> None:
    rng = np.random.default_rng(3)
    times = np.array([0.1, 1.1, 2.1, 0.2, 1.2, 3.1, 0.3, 4.0])
    t1 = np.linspace(0.4, 1.6, 24)[None, :, None] * np.ones((1, 24, 24))
    signed = 1 - 1.9 * np.exp(-times[:, None, None] * 0.9 / t1)
    magnitudes = np.abs(signed + 0.005 * rng.standard_normal(signed.shape))
    found = restore_polarity(magnitudes, times)
    clear = np.abs(signed) > 0.05
    assert np.mean(np.sign(found[clear]) == np.sign(signed[clear])) > 0.99
    assert np.array_equal(np.abs(found), magnitudes)


def test_polarity_of_a_series_that_never_recovers_is_negative() -> None:
    times = np.linspace(0.3, 1.7, 9)
    signed = 1 - 2 * np.exp(-times[:, None, None] / np.full((1, 8, 8), 4.0))
    assert np.all(signed < 0)
    assert np.all(restore_polarity(np.abs(signed), times) < 0)


def test_resampling_keeps_what_the_smaller_matrix_can_show() -> None:
    y, x = np.meshgrid(np.arange(60) - 30, np.arange(80) - 40, indexing="ij")
    image = 2 + np.cos(2 * np.pi * 3 * x / 80) * np.sin(2 * np.pi * 2 * y / 60)
    small = resample(image, (30, 48))
    y, x = np.meshgrid(np.arange(30) - 15, np.arange(48) - 24, indexing="ij")
    assert small == pytest.approx(2 + np.cos(2 * np.pi * 3 * x / 48) * np.sin(2 * np.pi * 2 * y / 30))
    with pytest.raises(ValueError, match="finer"):
        resample(image, (61, 48))


def test_measured_series_are_signed_and_have_regions() -> None:
    for name in NAMES:
        series = measured(name)
        assert len(series.times) == len(series.images)
        first = np.argmin(series.times)
        assert (
            np.median(series.images[first][series.roi]) < 0 < np.median(series.images[np.argmax(series.times)][series.roi])
        )
        assert series.support[series.roi].mean() > 0.9
