"""Synthetic quantitative brains: within the published ranges, reproducible, and never shared between splits."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from recon_core.errors import SettingError
from recon_core.simulation.anatomy import CLASSES, SPLITS, draw_plane
from recon_core.simulation.head_atlas import AXIAL_RANGE, GUARD, HeadAtlas, atlas_from_folder, load_atlas, pack_atlas, slabs
from recon_core.simulation.quantitative_brain import (
    EMPTY_R1,
    TISSUE_RANGES,
    BrainBatch,
    QuantitativeBrains,
    SampleRecipe,
    all_tissue,
    birdcage_maps,
    tissue_parameters,
    vary,
)
from recon_core.simulation.random_fields import Draws, gaussian_blur, sample_seed

SIZE = 64


@pytest.fixture(scope="module")
def atlas() -> HeadAtlas:
    return HeadAtlas()


@pytest.fixture(scope="module")
def brains(atlas: HeadAtlas) -> QuantitativeBrains:
    return QuantitativeBrains(atlas, SampleRecipe(size=SIZE, accelerations=(4.0, 6.0)), seed=5)


@pytest.fixture(scope="module")
def batch(brains: QuantitativeBrains) -> BrainBatch:
    return brains.batch("train", range(24))


def test_tissue_is_what_has_tissue_all_round() -> None:
    fractions = torch.zeros(1, len(CLASSES), 12, 12)
    fractions[0, CLASSES.index("fat"), 2:9, 2:9] = 0.4
    fractions[0, CLASSES.index("white"), 2:9, 2:9] = 0.3
    fractions[0, :, 5, 3] = 0.0
    fractions[0, CLASSES.index("grey"), 5, 3] = 150 / 255  # not more than that
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[3:8, 3:8] = True
    expected[4:7, 3:5] = False  # the neighbours of (5, 3)
    assert torch.equal(all_tissue(fractions)[0], expected)
    fractions[:] = 0.2
    assert torch.equal(all_tissue(fractions)[0], torch.nn.functional.pad(torch.ones(10, 10, dtype=torch.bool), (1, 1, 1, 1)))


def test_a_sample_depends_on_its_key_alone(brains: QuantitativeBrains, atlas: HeadAtlas) -> None:
    one, again = brains.batch("train", [7]), brains.batch("train", [7])
    for name in ("parameters", "images", "kspace", "mask", "coil_maps", "noise_std"):
        assert torch.equal(getattr(one, name), getattr(again, name)), name
    among = brains.batch("train", [3, 7, 11])
    assert torch.allclose(among.parameters[1], one.parameters[0], atol=1e-5)
    assert torch.equal(among.mask[1], one.mask[0])
    other = QuantitativeBrains(atlas, brains.recipe, seed=6).batch("train", [7])
    for different in (brains.batch("train", [8]), brains.batch("test", [7]), other):
        assert not torch.allclose(different.parameters, one.parameters, atol=0.1)


def test_splits_never_share_a_place() -> None:
    for a, b in itertools.combinations(SPLITS, 2):
        gaps = [max(low2 - high1, low1 - high2) for low1, high1 in slabs(a) for low2, high2 in slabs(b)]
        assert min(gaps) >= (GUARD if "train" in (a, b) else GUARD / 2), (a, b)
    with pytest.raises(SettingError, match="train, validation, test"):
        slabs("holdout")


@pytest.mark.parametrize("split", SPLITS)
def test_slices_stay_in_the_slabs_of_their_split(atlas: HeadAtlas, split: str) -> None:
    draws = Draws([sample_seed(split, i) for i in range(200)])
    height = atlas._height(draws, 8, split)
    inside = torch.zeros_like(height, dtype=torch.bool)
    for low, high in slabs(split):
        inside |= (height >= low - 1e-4) & (height <= high + 1e-4)
    assert inside.all()
    # every slab is visited
    assert all(((height[:, 0, 0] >= low) & (height[:, 0, 0] <= high)).any() for low, high in slabs(split))
    assert AXIAL_RANGE[0] <= float(height.min()) and float(height.max()) <= AXIAL_RANGE[1]


def test_seeds_of_neighbouring_keys_are_unrelated() -> None:
    seeds = [sample_seed(s, split, i) for s in range(5) for split in SPLITS for i in range(50)]
    assert len(set(seeds)) == len(seeds) and max(seeds) < 2**63 and np.std(seeds) > 2e18


def test_fractions_are_fractions_and_every_tissue_occurs(atlas: HeadAtlas) -> None:
    fractions = atlas.fractions(Draws([sample_seed("f", i) for i in range(24)]), SIZE, "train")
    assert fractions.shape == (24, len(CLASSES), SIZE, SIZE)
    assert float(fractions.min()) >= 0 and float(fractions.sum(1).max()) <= 1 + 1e-5
    share = dict(zip(CLASSES, fractions.mean((0, 2, 3)).tolist(), strict=True))
    assert all(value > 1e-4 for value in share.values()), share
    assert share["grey"] + share["white"] > 0.15 and share["grey"] > share["csf"]
    with_lesions = (fractions[:, CLASSES.index("lesion")].amax((1, 2)) > 0.3).float().mean()
    assert 0.1 < float(with_lesions) < 0.6


def test_draws_of_the_same_slab_have_different_gyri(atlas: HeadAtlas) -> None:
    # in the same undeformed plane: what differs is the anatomy, not the view
    draws = Draws([sample_seed("g", i) for i in range(6)])
    grey, white, _ = atlas._sample(torch.full((6, SIZE, SIZE), 40.0), draw_plane(Draws([1] * 6), SIZE)).unbind(1)
    tissues = atlas._tissues(draws, SIZE, grey, white)
    likely = (tissues.amax(1) > 0.9).all(0) & (grey[0] + white[0] > 0.5)
    assert float(likely.float().mean()) > 0.02  # clear tissue stays clear
    different = (tissues.argmax(1)[0] != tissues.argmax(1)[1]) & (grey[0] > 0.2)
    assert float(different.float().sum() / (grey[0] > 0.2).sum()) > 0.05


@pytest.mark.parametrize("name", CLASSES)
def test_values_of_a_class_are_uniform_in_the_published_range(name: str) -> None:
    n = 400
    fractions = torch.zeros(n, len(CLASSES), 6, 6)
    fractions[:, CLASSES.index(name)] = 1.0
    parameters = tissue_parameters(Draws([sample_seed(name, i) for i in range(n)]), fractions)[:, :, 3, 3]
    (shortest, longest), (low, high) = TISSUE_RANGES[name]
    t1 = 1 / parameters[:, 2]
    assert t1.min() >= shortest * (1 - 1e-5) and t1.max() <= longest * (1 + 1e-5)
    assert float(t1.mean()) == pytest.approx((shortest + longest) / 2, abs=0.06 * (longest - shortest))
    assert parameters[:, 0].min() >= low - 1e-5 and parameters[:, 0].max() <= high + 1e-5
    assert (
        0.09 * high < parameters[:, 1].max() <= high / 10 + 1e-5
        and -high / 10 - 1e-5 <= parameters[:, 1].min() < -0.09 * high
    )


def test_partial_volumes_mix_in_the_rate_not_in_the_time() -> None:
    fractions = torch.zeros(1, len(CLASSES), 8, 8)
    white, fluid = CLASSES.index("white"), CLASSES.index("csf")
    fractions[:, white, :, :4], fractions[:, fluid, :, 4:] = 1.0, 1.0
    pure = tissue_parameters(Draws([3]), fractions)[0, 2]
    half = torch.full_like(fractions, 0.0)
    half[:, white], half[:, fluid] = 0.5, 0.5
    mixed = tissue_parameters(Draws([3]), half)[0, 2, 4, 4]
    assert float(mixed) == pytest.approx(float(pure[4, 0] + pure[4, 7]) / 2, rel=1e-4)


def test_air_is_empty_and_keeps_its_rate(batch: BrainBatch) -> None:
    corner = batch.parameters[:, :, 0, 0]
    dark = corner[:, :2].abs().amax(1) < 1e-3
    assert dark.float().mean() > 0.5
    assert torch.allclose(corner[dark, 2], torch.tensor(EMPTY_R1))


def test_fields_are_smooth_and_bounded() -> None:
    n = 200
    plain = torch.zeros(n, 3, SIZE, SIZE)
    plain[:, 0], plain[:, 2] = 0.8, 1.0
    changed = vary(Draws([sample_seed("v", i) for i in range(n)]), plain)
    density = torch.complex(changed[:, 0], changed[:, 1])
    assert float(density.abs().max()) <= 0.8 * 1.3 + 1e-5 and float(density.abs().min()) >= 0.8 * 0.5 - 1e-5
    spread = density.abs().flatten(1).amax(1) / density.abs().flatten(1).amin(1)
    assert 1.2 < float(spread.median()) < 2.6  # a bias field within each sample
    phase = density.angle().mean((1, 2))
    assert 0.15 < float(phase.std()) < 0.25
    t1 = 1 / changed[:, 2]
    assert float(t1.min()) > 0.5 and float(t1.max()) < 1.7
    assert 0.08 < float(t1.std()) < 0.2
    assert float((t1[:, 1:] - t1[:, :-1]).square().mean().sqrt()) < 0.3 * float(t1.std())


def test_coil_maps_have_unit_norm_and_differ(batch: BrainBatch) -> None:
    norm = batch.coil_maps.abs().square().sum(1)
    assert torch.allclose(norm, torch.ones_like(norm), atol=1e-4)
    maps = birdcage_maps(Draws([1, 2]), 32, 8)
    where = maps.abs().flatten(2).argmax(-1)
    assert all(len(set(row.tolist())) >= 6 for row in where)  # around the head, not on one side
    step = (maps[..., 1:] - maps[..., :-1]).abs().max()
    assert float(step) < 0.6
    first = birdcage_maps(Draws(range(40)), 32, 8)[:, 0].abs().flatten(1).argmax(-1)
    angle = torch.atan2((first // 32 - 15.5).float(), (first % 32 - 15.5).float())
    assert int(torch.histc(angle, 4, -math.pi, math.pi).min()) >= 3  # the cage is turned at random


def test_masks_have_the_exact_number_of_lines_and_differ_by_state(batch: BrainBatch) -> None:
    counts = batch.mask.sum(-1)
    assert set(counts.unique().tolist()) == {SIZE // 4, round(SIZE / 6)}
    assert (counts == counts[:, :1]).all()
    assert batch.mask[:, :, SIZE // 2 - 4 : SIZE // 2 + 4].all()
    assert (batch.mask[:, 0] != batch.mask[:, 1]).any(-1).float().mean() > 0.9


def test_kspace_is_the_truth_plus_complex_noise_of_the_stated_size(batch: BrainBatch) -> None:
    operator = batch.operator()
    measured = operator.enter_data(batch.kspace)
    noise = measured - operator.forward(operator.enter_image(batch.images))
    sampled = torch.fft.ifftshift(batch.mask, dim=-1)[:, :, None, None].expand(noise.shape)
    assert float(noise[~sampled].abs().max()) == 0 and float(batch.kspace.movedim(3, 2)[~batch.mask].abs().max()) == 0
    for i in range(len(batch)):
        values = noise[i][sampled[i]]
        assert float(values.abs().square().mean().sqrt()) == pytest.approx(float(batch.noise_std[i]), rel=0.03)
        assert float(values.real.std()) == pytest.approx(float(values.imag.std()), rel=0.06)
    low, high = SampleRecipe().noise
    assert float(batch.noise_std.min()) >= low and float(batch.noise_std.max()) <= high


def test_images_are_the_model_of_the_maps_and_about_one(batch: BrainBatch) -> None:
    model = SampleRecipe().model
    assert torch.allclose(batch.images, model.signal(batch.parameters.movedim(1, 0)).movedim(0, 1))
    peak = torch.quantile(batch.images[:, -1].abs().flatten(1), 0.99, dim=1)
    assert float(peak.min()) > 0.5 and float(peak.max()) < 1.4
    assert (batch.solid & ~batch.brain).float().mean() < 1e-3
    assert 0.05 < float(batch.brain.float().mean()) < 0.6


def test_recipes_and_splits_that_make_no_sense_are_refused(brains: QuantitativeBrains) -> None:
    with pytest.raises(SettingError, match="split"):
        brains.batch("training", [0])
    with pytest.raises(SettingError, match="recipe"):
        SampleRecipe(n_coils=0)
    with pytest.raises(SettingError, match="calibration"):
        brains.with_recipe(accelerations=(16.0,)).batch("train", [0])


def test_a_strip_is_a_complete_acquisition_of_its_columns(brains: QuantitativeBrains) -> None:
    whole = brains.with_recipe(noise=(0.0, 0.0)).batch("train", [0, 1, 2])
    strip = brains.with_recipe(noise=(0.0, 0.0), columns=20).batch("train", [0, 1, 2])
    assert strip.kspace.shape == (3, 5, 8, SIZE, 20) and strip.brain.shape == (3, SIZE, 20)
    places = []
    for i in range(3):
        misfit = [float((whole.kspace[i, ..., x : x + 20] - strip.kspace[i]).abs().max()) for x in range(SIZE - 19)]
        places.append(int(np.argmin(misfit)))
        assert misfit[places[-1]] < 1e-5
        assert torch.allclose(whole.t1[i, :, places[-1] : places[-1] + 20], strip.t1[i])
    assert len(set(places)) > 1
    with pytest.raises(SettingError, match="recipe"):
        SampleRecipe(size=32, columns=33)


def test_eight_states_and_other_sizes(brains: QuantitativeBrains) -> None:
    other = brains.with_recipe(size=45, times=(0.5, 0.7, 0.9, 1.1, 1.3, 1.6, 2.0, 8.0), n_coils=1).batch(
        "validation", [0, 1]
    )
    assert other.kspace.shape == (2, 8, 1, 45, 45)
    assert torch.allclose(other.coil_maps.abs(), torch.ones(2, 1, 45, 45), atol=1e-5)


def test_blur_keeps_the_sum_and_takes_one_width_per_sample() -> None:
    images = torch.zeros(2, 1, 11, 11)
    images[:, :, 5, 5] = 1.0
    blurred = gaussian_blur(images, torch.tensor([0.01, 1.0]))
    assert torch.allclose(blurred.sum((1, 2, 3)), torch.ones(2), atol=1e-6)
    assert float(blurred[0, 0, 5, 5]) == pytest.approx(1.0)
    weights = np.exp(-0.5 * np.arange(-2, 3) ** 2)
    weights /= weights.sum()
    assert torch.allclose(blurred[1, 0, 3:8, 3:8], torch.from_numpy(np.outer(weights, weights)).float(), atol=1e-6)


def test_packing_keeps_places(tmp_path: object, atlas: HeadAtlas) -> None:
    from pathlib import Path

    from recon_core.simulation.head_atlas import AtlasVolume, packed_atlas

    shape = (24, 30, 26)
    z, y, x = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    ball = (((z - 12) ** 2 + (y - 14) ** 2 + (x - 13) ** 2) < 64).astype(np.uint8) * 255
    volume = AtlasVolume(ball, ball // 2, ball, 1.0, (-5.0, -7.0, -3.0))
    path = Path(str(tmp_path)) / "atlas.npz"
    pack_atlas(volume, path, voxel=1.5)
    found = load_atlas(path)
    assert found.voxel == 1.5
    for axis, (origin, wanted) in enumerate(zip(found.origin, (-5 + 12, -7 + 14, -3 + 13), strict=True)):
        centre = np.average(np.arange(found.brain.shape[axis]), weights=found.brain.sum(axis=tuple({0, 1, 2} - {axis})))
        assert origin + 1.5 * centre == pytest.approx(wanted, abs=0.3)
    shipped = packed_atlas()
    assert shipped.voxel == 1.5 and shipped.brain.max() == 255 and 1.2e6 < (shipped.brain > 127).sum() * 1.5**3 < 2.3e6


def test_the_maps_of_a_folder_are_read_with_their_place(tmp_path: object) -> None:
    from pathlib import Path

    from tests.recon_core.volume_writers import nifti

    folder = Path(str(tmp_path))
    data = np.zeros((5, 6, 7), np.uint8)
    data[2, 3, 4] = 200
    for name in ("gm", "wm", "t1"):
        nifti(folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz", data)
    volume = atlas_from_folder(folder)
    assert volume.grey[2, 3, 4] == 200 and volume.brain[2, 3, 4] == 255 and volume.brain.sum() == 255
