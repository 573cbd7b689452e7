"""Learned sampling: renormalisation, stochastic masks, straight-through gradient, exact draws, interpolation."""

import numpy as np
import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.sampling.learned import (
    LearnedSampling,
    SamplingSettings,
    draw_mask,
    interpolate_probability,
    multilevel_density,
    renormalise,
    sample,
    samples_for,
)
from recon_core.sampling.masks import centre_block, radius

SHAPE, ACS, N = (16, 24), (4, 6), 96


def _module(spo: int, echoes: int = 3) -> LearnedSampling:
    module = LearnedSampling(SamplingSettings(SHAPE, echoes, N, ACS, spo)).double()
    if spo:
        generator = torch.Generator().manual_seed(4)
        module.weights.data = 8 * torch.randn(module.weights.shape, generator=generator, dtype=torch.float64)
    return module


def test_the_papers_number_of_samples() -> None:
    assert samples_for((80, 206), 8, 11) == 188 * 11 == 2068
    assert samples_for((80, 206), 4) == 4120 and samples_for((3, 5), 1, 4) == 12
    for wrong in ((0.5, 1), (float("nan"), 1), (2, 0), (2, 80 * 206 + 1)):
        with pytest.raises(SettingError):
            samples_for((80, 206), *wrong)


@pytest.mark.parametrize("mean", [0.01, 0.3, 0.5, 0.97])
def test_renormalisation_is_loupes(mean: float) -> None:
    p = torch.rand(2, 500, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) ** 2
    q = renormalise(p, mean)
    torch.testing.assert_close(q.mean(-1), torch.full((2,), mean, dtype=torch.float64))
    assert q.min() >= 0 and q.max() <= 1
    found = p.mean(-1, keepdim=True)
    expected = torch.where(found >= mean, p * mean / found, 1 - (1 - p) * (1 - mean) / (1 - found))
    torch.testing.assert_close(q, expected)


@pytest.mark.parametrize("spo", [1, 2])
def test_probabilities_are_the_papers(spo: int) -> None:
    """Eq. 4: a sigmoid of slope 0.25, renormalised, outside the block; weights that are zero, as at first, give equal ones."""
    fresh = LearnedSampling(SamplingSettings(SHAPE, 3, N, ACS, spo))
    free = ~torch.from_numpy(centre_block(SHAPE, ACS))
    assert bool((fresh.weights == 0).all())
    share = (N - 24) / (16 * 24 - 24)
    torch.testing.assert_close(fresh.probability()[:, free], torch.full((3, 360), share))
    module = _module(spo)
    raised = renormalise(1 / (1 + torch.exp(-0.25 * module.weights[:, free])), share)
    torch.testing.assert_close(module.probability()[:, free], raised.expand(3, -1))


@pytest.mark.parametrize("spo", [0, 1, 2])
def test_expected_count_is_the_requested_one_and_the_block_is_always_sampled(spo: int) -> None:
    module = _module(spo)
    p = module.probability()
    assert p.shape == (3, *SHAPE)
    torch.testing.assert_close(p.sum((1, 2)), torch.full((3,), float(N), dtype=p.dtype), rtol=1e-6, atol=1e-4)
    generator = torch.Generator().manual_seed(1)
    masks = torch.stack([module(generator).detach() for _ in range(400)])
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    assert bool(masks[..., torch.from_numpy(centre_block(SHAPE, ACS))].all())
    if spo:  # the mean of many masks is P: five standard errors
        limit = 5 * (p * (1 - p) / 400).sqrt() + 1e-3
        assert bool(((masks.mean(0) - p).abs() <= limit).all())
    patterns_differ = bool((masks[:, 0] != masks[:, 1]).any())
    assert patterns_differ == (spo == 2)
    assert bool((masks[0] != masks[1]).any()) == (spo > 0)


@pytest.mark.parametrize("spo", [1, 2])
def test_straight_through_gradient_is_that_of_the_probabilities(spo: int) -> None:
    module = _module(spo)
    direction = torch.randn(3, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (module(torch.Generator().manual_seed(3)) * direction).sum().backward()
    (expected,) = torch.autograd.grad((module.probability() * direction).sum(), module.weights)
    assert module.weights.grad is not None
    torch.testing.assert_close(module.weights.grad, expected)
    assert expected.abs().max() > 1e-3
    assert bool((expected[:, torch.from_numpy(centre_block(SHAPE, ACS))] == 0).all())
    # and the probabilities' own gradient is right
    small = LearnedSampling(SamplingSettings((3, 4), 2, 5, (1, 1), spo)).double()

    def probability(weights: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(_Probability(small), {"inner.weights": weights}, ())

    start = torch.randn(small.weights.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    assert torch.autograd.gradcheck(probability, start.requires_grad_())


class _Probability(torch.nn.Module):
    def __init__(self, inner: LearnedSampling) -> None:
        super().__init__()
        self.inner = inner

    def forward(self) -> torch.Tensor:
        return self.inner.probability()


def test_sample_compares_and_passes_the_gradient() -> None:
    p = torch.tensor([0.0, 0.4, 0.6, 1.0], requires_grad=True)
    u = torch.tensor([0.0, 0.5, 0.5, 0.999])
    drawn = sample(p, u)
    assert drawn.tolist() == [0, 0, 1, 1]
    drawn.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert p.grad is not None and p.grad.tolist() == [1, 2, 3, 4]


def test_learning_moves_samples_to_where_they_help() -> None:
    """The reward of a mask is the energy that it samples; the energy lies left of the centre in echo 0, right in echo 1."""
    module = LearnedSampling(SamplingSettings((12, 12), 2, 30, (2, 2), 2))
    energy = torch.zeros(2, 12, 12)
    energy[0, :, :4] = energy[1, :, 8:] = 1
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.5)
    for _ in range(60):
        optimiser.zero_grad()
        loss = -(module(generator) * energy).sum()
        loss.backward()
        optimiser.step()
    mask = torch.from_numpy(module.draw(0))
    assert mask.sum((1, 2)).tolist() == [30, 30]
    assert ((mask * energy).sum((1, 2)) >= 24).all()  # of 26 outside the block; 10 by chance


@pytest.mark.parametrize("spo", [0, 1, 2])
def test_draws_are_exact_and_reproducible(spo: int) -> None:
    module = _module(spo)
    first, again = module.draw(7), module.draw(7)
    np.testing.assert_array_equal(first, again)
    assert first.dtype == bool and (first.sum((1, 2)) == N).all()
    assert first[:, centre_block(SHAPE, ACS)].all()
    assert (first[0] != first[1]).any() == (spo == 2)
    assert (first != module.draw(8)).any() == (spo > 0)


def test_draws_follow_the_probabilities_and_echoes_do_not_depend_on_their_number() -> None:
    density = multilevel_density(SHAPE, N, ACS)
    masks = np.concatenate([draw_mask(density[None], N, seed, ACS) for seed in range(1500)])
    assert (masks.sum((1, 2)) == N).all()
    limit = 5 * np.sqrt(density * (1 - density) / 1500) + 1e-9
    assert (np.abs(masks.mean(0) - density) <= limit).all()
    many, few = (draw_mask(np.repeat(density[None], n, 0), N, 3, ACS) for n in (5, 2))
    np.testing.assert_array_equal(many[:2], few)
    assert all((many[0] != other).any() for other in many[1:])  # alike are their densities, not their draws


@pytest.mark.parametrize("n", [24, 25, 100, 383, 384])
def test_extreme_counts(n: int) -> None:
    spiky = np.zeros((1, *SHAPE))
    spiky[0, 0] = 1.0
    for p in (spiky, np.full((1, *SHAPE), 0.5), 1 - spiky, multilevel_density(SHAPE, n, ACS)[None]):
        assert draw_mask(p, n, 0, ACS).sum() == n


@pytest.mark.parametrize("n", [24, 40, 96, 300, 384])
def test_hand_made_density_is_level_falls_outwards_and_adds_up(n: int) -> None:
    density = multilevel_density(SHAPE, n, ACS, levels=6)
    assert density.sum() == pytest.approx(n, abs=1e-6) and density.min() >= 0 and density.max() <= 1
    outside = ~centre_block(SHAPE, ACS)
    r, values = radius(SHAPE)[outside], density[outside]
    assert len(np.unique(values.round(12))) <= 7
    order = np.argsort(r)
    assert (np.diff(values[order]) <= 1e-12).all()


def test_interpolation_keeps_dc_mean_and_shape_of_the_density() -> None:
    p = multilevel_density((80, 206), 2068)[None].repeat(2, 0)
    n = samples_for((112, 258), 8, 11)
    q = interpolate_probability(p, (112, 258), n)
    assert q.shape == (2, 112, 258) and q.sum((1, 2)) == pytest.approx([n, n]) and q.max() <= 1
    assert q[0, 56, 129] == q.max() and q[0, 0, 0] < 0.02
    np.testing.assert_allclose(interpolate_probability(p, (80, 206), 2068), p, atol=1e-9)
    # each echo's own, and neither turned round nor transposed: the upper left and the lower right quarter come out at the same places
    p[0, :40, :103], p[1, 40:, 103:] = 0.9, 0.9
    upper, lower = interpolate_probability(p, (112, 258), n)
    for echo, dense, thin in ((upper, (8, 20), (100, 240)), (lower, (100, 240), (8, 20)), (upper, (50, 20), (70, 20))):
        assert echo[dense] > 5 * echo[thin]
    one = np.zeros((1, 8, 8))
    one[0, 4, 4] = 1.0  # DC alone stays at DC
    assert np.unravel_index(interpolate_probability(one, (7, 13), 1).argmax(), (1, 7, 13)) == (0, 3, 6)
    assert (draw_mask(q, n, 0).sum((1, 2)) == n).all()


def test_state_dict_has_the_weights_or_the_fixed_mask() -> None:
    assert set(_module(2).state_dict()) == {"weights"} and _module(2).weights.shape == (3, *SHAPE)
    assert _module(1).weights.shape == (1, *SHAPE)
    assert set(_module(0).state_dict()) == {"fixed"} and not list(_module(0).parameters())


def test_refusals() -> None:
    for wrong in ({"n_samples": 23}, {"n_samples": 385}, {"spo": 3}, {"slope": 0.0}, {"n_echoes": 0}, {"acs": (17, 1)}):
        with pytest.raises(SettingError):
            SamplingSettings(**{"shape": SHAPE, "n_echoes": 2, "n_samples": N, "acs": ACS, **wrong})  # type: ignore[arg-type]
    for p in (np.full((1, *SHAPE), 1.1), np.full((1, *SHAPE), np.nan), np.zeros(SHAPE)):
        with pytest.raises(DataError):
            draw_mask(p, N, 0, ACS)
    with pytest.raises(DataError):
        interpolate_probability(np.zeros(SHAPE), (3, 3), 2)
