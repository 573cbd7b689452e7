"""A brain between scalp and ventricles is found; noise, emptiness and crumbs are not brains."""

from __future__ import annotations

import math

import pytest
import torch

from recon_core.errors import DataError
from recon_core.maps.brain_mask import BrainMaskSettings, brain_mask, object_mask, with_later_echoes
from recon_core.maps.r2star import R2StarMaps
from recon_core.types import ParameterMap

SHAPE, SIDE = (40, 48, 40), 0.003


def head(noise: float = 0.03) -> tuple[torch.Tensor, torch.Tensor]:
    """Two echoes with brain, fluid inside, dark skull and a bright scalp; and the brain."""
    axes = [(torch.arange(n) - n / 2 + 0.5) * SIDE for n in SHAPE]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    level = torch.sqrt((z / 0.040) ** 2 + (y / 0.050) ** 2 + (x / 0.040) ** 2)
    image = torch.zeros(SHAPE)
    image[level < 1.36] = 1.3  # scalp
    image[level < 1.22] = 0.05  # skull
    brain = level < 1
    image[brain] = 1.0
    image[torch.sqrt((z / 0.008) ** 2 + (y / 0.016) ** 2 + (x / 0.005) ** 2) < 1] = 0.1  # a dark hole
    generator = torch.Generator().manual_seed(0)
    noisy = [image * f + noise * torch.randn(SHAPE, dtype=torch.complex64, generator=generator) for f in (1.0, 0.7)]
    return torch.stack(noisy), brain


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_brain_without_scalp_and_without_holes(noise: float) -> None:
    images, brain = head(noise)
    mask = brain_mask(images, (SIDE,) * 3)
    overlap = 2 * (mask & brain).sum() / (mask.sum() + brain.sum())
    assert overlap > 0.995
    assert mask[20, 24, 20]  # the hole
    torch.testing.assert_close(brain_mask(images * 1e5, (SIDE,) * 3), mask)


@pytest.mark.parametrize("factor", [5.0, 15.0])
@pytest.mark.parametrize("coil", ["behind the head", "around the head"])
def test_strong_receive_shading_costs_no_brain(factor: float, coil: str) -> None:
    """Without it half of the brain is missed: the front by a surface coil, the middle by an array."""
    images, brain = head(0.005)
    _, y, x = torch.meshgrid(*[(torch.arange(n) - n / 2 + 0.5) * SIDE for n in SHAPE], indexing="ij")
    nearness = (y / 0.050 + 1) / 2 if coil == "behind the head" else ((y / 0.050) ** 2 + (x / 0.040) ** 2).clamp_max(1.5)
    shading = factor**nearness if coil == "behind the head" else 1 + (factor - 1) * nearness
    mask = brain_mask(images * shading, (SIDE,) * 3)
    assert 2 * (mask & brain).sum() / (mask.sum() + brain.sum()) > 0.97
    assert mask[brain].float().mean() > 0.98


def test_a_bridge_of_aliasing_through_the_skull_does_not_let_the_scalp_in() -> None:
    """Three voxels wide (7.5 mm), as eight-fold undersampled heads have them; 4 mm of opening let 7000 voxels of scalp in."""
    side = 0.0025
    z, y, x = torch.meshgrid(*[(torch.arange(n) - n // 2) * side for n in SHAPE], indexing="ij")
    brain = torch.sqrt((z / 0.030) ** 2 + (y / 0.030) ** 2 + (x / 0.030) ** 2) < 1
    bridge = (z.abs() < 1.5 * side) & (x.abs() < 1.5 * side) & (y > 0) & (y < 0.05)
    scalp = (y > 0.040) & (y < 0.056) & (z.abs() < 0.03) & (x.abs() < 0.03)
    images = (brain | bridge | scalp).float()
    mask = brain_mask(images, (side,) * 3)
    assert not (mask & scalp).any() and 2 * (mask & brain).sum() / (mask.sum() + brain.sum()) > 0.98
    leaking = brain_mask(images, (side,) * 3, settings=BrainMaskSettings(opening=0.004))
    assert (leaking & scalp).sum() > 1000


@pytest.mark.parametrize(("times", "continued"), [((0.002, 0.0054), True), ((0.0054, 0.002), True), ((0.002, 0.012), False)])
def test_bone_that_early_echoes_leave_bright_is_no_brain(times: tuple[float, ...], continued: bool) -> None:
    """A layer of 6 mm around the brain whose signal is 0.8 of the brain's and decays with 130 1/s, as where bone and dura share voxels."""
    z, y, x = torch.meshgrid(*[(torch.arange(n) - n / 2 + 0.5) * SIDE for n in SHAPE], indexing="ij")
    level = torch.sqrt((z / 0.040) ** 2 + (y / 0.050) ** 2 + (x / 0.040) ** 2)
    brain, bone = level < 1, (level >= 1) & (level < 1.15)
    rate = torch.where(bone, 130.0, 20.0)
    images = torch.stack([torch.where(brain, 1.0, torch.where(bone, 0.8, 0.0)) * torch.exp(-t * rate) for t in times])
    found, sd = (ParameterMap("R2star", data, "1/s", brain | bone) for data in (rate, torch.full(SHAPE, 3.0)))
    train = with_later_echoes(images, times, R2StarMaps(found, sd, found))
    assert (len(train) > 2) == continued
    if continued:
        assert (brain_mask(images, (SIDE,) * 3) & bone).sum() > 0.5 * bone.sum()
        assert torch.equal(brain_mask(train, (SIDE,) * 3), brain)
    else:
        assert torch.equal(train, images)


def test_what_is_not_a_brain() -> None:
    noise = torch.randn(2, *SHAPE, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    crumbs = torch.zeros(SHAPE)
    crumbs[10:16, 10:16, 10:16] = 1.0
    for images in (noise, crumbs, torch.zeros(SHAPE)):
        with pytest.raises(DataError, match="no brain found"):
            brain_mask(images, (SIDE,) * 3)
    small = BrainMaskSettings(min_volume=1e-6, opening=0.004)  # a cube keeps its corners
    assert brain_mask(crumbs, (SIDE,) * 3, settings=small).sum() == 216
    with pytest.raises(DataError, match="not finite"):
        brain_mask(torch.full(SHAPE, math.nan), (SIDE,) * 3)
    with pytest.raises(DataError, match="wrong axes"):
        brain_mask(torch.zeros(4, 4), (SIDE,) * 3)


def test_an_object_is_whatever_has_signal() -> None:
    parts = torch.zeros(2, *SHAPE, dtype=torch.complex64)
    parts[:, 2:8, 3:12, 4:14] = 2.0
    parts[:, 20:30, 20:30, 20:30] = torch.tensor(0.5j)  # another part, darker
    parts[:, 35, 35, 35] = 0.1
    expected = parts[0].abs() > 0.2
    assert torch.equal(object_mask(parts), expected)
    with pytest.raises(DataError, match="no signal"):
        object_mask(torch.zeros(SHAPE))
    with pytest.raises(DataError, match="not finite"):
        object_mask(torch.full(SHAPE, math.nan))
