"""The two UNets: counted by hand, the same at any size, conditioned, quiet at the start."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from recon_core.errors import DataError, SettingError
from recon_core.methods.pinqi.networks import ImageNet, ParameterNet, ParameterRange, new_embedding, ranges_of
from recon_core.networks.unet import (
    FeatureModulation,
    ResidualBlock,
    ResidualUNet,
    ScalarEmbedding,
    StateConvolution,
    Upsampling,
    _largest_of_four,
    sinusoids,
)

RANGES = ranges_of(("m0_real", "m0_imag", "r1"))


def small_parameter_net(n_states: int = 3) -> ParameterNet:
    return ParameterNet(n_states, RANGES, features=(4, 8, 8), n_groups=2, n_embedding=64)


def n_weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_the_parameter_net_has_the_published_number_of_weights() -> None:
    assert n_weights(ParameterNet(5, RANGES)) == 2_235_308


def test_a_kernel_net_differs_in_its_last_layer_alone() -> None:
    # 1 + 7 x 7 numbers a pixel instead of 3
    assert n_weights(ParameterNet(5, RANGES, prediction="kernel")) == 2_235_308 + 47 * (32 + 1)


def kernel_net() -> tuple[ParameterNet, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = ParameterNet(3, RANGES, features=(4, 8, 8), n_groups=2, n_embedding=64, prediction="kernel")
    return net, torch.zeros(1), torch.zeros(1, 64)


def test_averages_keep_what_is_uniform_and_edges_and_lose_noise() -> None:
    net, tag, embedding = kernel_net()
    nn.init.zeros_(net.unet.last.weight)
    truth = torch.ones(1, 3, 32, 32, dtype=torch.complex64)
    assert torch.allclose(net.averaged(truth, tag, embedding), truth, atol=1e-5)
    truth[..., 16:] = 0.5j
    noisy = truth + 0.02 * torch.randn(truth.shape, dtype=truth.dtype)
    with torch.no_grad():
        found = net.averaged(noisy, tag, embedding)
    assert (found - truth).abs().square().mean() < 0.3 * (noisy - truth).abs().square().mean()
    assert (found - truth)[..., 14:18].abs().max() < 0.1


def test_the_kernel_hardly_depends_on_the_amplitude_before_it_is_trained() -> None:
    net, tag, embedding = kernel_net()
    nn.init.zeros_(net.unet.last.weight)
    images = 1 + 0.1 * torch.randn(1, 3, 24, 20, dtype=torch.complex64)
    with torch.no_grad():
        assert torch.allclose(2 * net.averaged(images, tag, embedding), net.averaged(2 * images, tag, embedding), atol=1e-5)


def test_the_image_net_has_the_published_number_of_weights() -> None:
    assert n_weights(ImageNet()) == 597_323


def test_more_states_cost_one_kernel_and_one_shortcut_each() -> None:
    # two channels per state: 3 x 3 and 1 x 1 kernels to 32 features
    assert n_weights(ParameterNet(8, RANGES)) - n_weights(ParameterNet(5, RANGES)) == 3 * 2 * (9 + 1) * 32


@pytest.mark.parametrize(
    ("block", "by_hand"),
    [
        # conv 11->32, conv 32->32, two norms, shortcut, modulation 64 -> 2 x 32, residual weight
        (ResidualBlock(11, 32, n_groups=16, n_embedding=64), 3200 + 9248 + 128 + 384 + 4160 + 1),
        # no shortcut where the channels stay
        (ResidualBlock(128, 128, n_groups=16), 147584 + 147584 + 512 + 1),
        # 3 x 32 x 32 along the states, without bias
        (ResidualBlock(16, 32, n_groups=8, across_states=True), 4640 + 9248 + 128 + 544 + 3072 + 1),
        (Upsampling(96), 9 * 96 * 96),
        (new_embedding(), 32 * 64 + 64),
    ],
)
def test_blocks_counted_by_hand(block: nn.Module, by_hand: int) -> None:
    assert n_weights(block) == by_hand


@pytest.mark.parametrize(("height", "width"), [(17, 23), (16, 16), (33, 8)])
@pytest.mark.parametrize("n_states", [1, 4])
def test_any_size_and_any_number_of_states(height: int, width: int, n_states: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, n_states, height, width, dtype=torch.complex64)
    tag = torch.tensor([0.2, 0.4])
    embedding = new_embedding()
    maps = small_parameter_net(n_states)(images, tag, embedding(tag))
    assert maps.shape == (2, 3, height, width) and maps.dtype == torch.float32
    net = ImageNet(features=(4, 8, 8), n_groups=2)
    clean = net(images, tag)
    assert clean.shape == images.shape and clean.dtype == images.dtype


def test_padding_does_not_reach_the_inside() -> None:
    # an odd image is a padded even one: zeros added by the caller at the lower right change nothing far away from them
    torch.manual_seed(1)
    net = ResidualUNet(2, 1, (4, 8), n_groups=2).double()
    x = torch.randn(1, 2, 15, 15, dtype=torch.float64)
    padded = net(functional.pad(x, (0, 1, 0, 1)))
    assert torch.allclose(net(x), padded[..., :15, :15])


def test_real_images_of_a_real_model() -> None:
    images = torch.randn(1, 3, 9, 9)
    tag = torch.zeros(1)
    assert ImageNet(features=(4, 8), n_groups=2, is_complex=False)(images, tag).dtype == torch.float32
    net = ParameterNet(3, RANGES[:2], features=(4, 8), n_groups=2, is_complex=False)
    assert net(images, tag, new_embedding()(tag)).shape == (1, 2, 9, 9)


def test_wrong_input_is_refused_by_name() -> None:
    net = ResidualUNet(3, 1, (4, 8), n_groups=2, across_states=True)
    with pytest.raises(DataError, match="state"):
        net(torch.zeros(1, 3, 8, 8))
    with pytest.raises(DataError, match="3 channels"):
        net(torch.zeros(1, 2, 4, 8, 8))
    with pytest.raises(SettingError, match="multiples of 16"):
        ResidualUNet(3, 1, (24, 48), n_groups=16)
    with pytest.raises(SettingError, match="frequency"):
        ranges_of(("m0_real", "frequency"))


def test_a_block_is_its_shortcut_when_the_residual_weight_is_zero() -> None:
    torch.manual_seed(2)
    block = ResidualBlock(3, 4, n_groups=2)
    assert block.residual_weight.item() == pytest.approx(1e-3)
    with torch.no_grad():
        block.residual_weight.zero_()
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(block(x), functional.silu(block.shortcut(x)))


def test_the_state_convolution_is_a_sum_over_neighbours_with_repeated_ends() -> None:
    torch.manual_seed(3)
    conv = StateConvolution(2).double()
    x = torch.randn(2, 4, 2, 3, 5, dtype=torch.float64)
    found = conv(x.flatten(0, 1), 4).unflatten(0, (2, 4))
    for state in range(4):
        neighbours = [max(state - 1, 0), state, min(state + 1, 3)]
        wanted = sum(torch.einsum("oi,biyx->boyx", conv.weight[:, :, k], x[:, n]) for k, n in enumerate(neighbours))
        assert torch.allclose(found[:, state], wanted)


def test_upsampling_is_bilinear_with_repeated_borders() -> None:
    torch.manual_seed(4)
    up = Upsampling(2).double()
    x = torch.randn(1, 2, 5, 3, dtype=torch.float64)
    wanted = functional.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
    wanted = functional.conv2d(functional.pad(wanted, (1, 1, 1, 1), mode="replicate"), up.conv.weight)
    assert torch.allclose(up(x), wanted)


def test_pooling_takes_the_largest_of_four() -> None:
    x = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(8))
    assert torch.equal(_largest_of_four(x), functional.max_pool2d(x, 2))


def test_modulation_is_the_identity_at_first_and_then_knows_the_iteration() -> None:
    torch.manual_seed(5)
    images = torch.randn(1, 3, 8, 8, dtype=torch.complex64)
    net, embedding = small_parameter_net(), new_embedding()
    blocks = [m for m in net.modules() if isinstance(m, FeatureModulation)]
    assert len(blocks) == 4  # two encoder and two decoder blocks; the bottleneck has none
    zero, one = torch.zeros(1), torch.ones(1)
    before = net(images, zero, embedding(zero))
    assert torch.equal(before, net(images, zero, embedding(one)))  # the embedding alone changes nothing yet
    with torch.no_grad():
        for block in blocks:
            block.linear.weight.normal_(std=0.5)
        for block in net.modules():
            if isinstance(block, ResidualBlock):
                block.residual_weight.fill_(1.0)
    assert not torch.allclose(net(images, zero, embedding(zero)), net(images, zero, embedding(one)), atol=1e-3)


def test_the_embedding_is_sinusoids_of_falling_frequency() -> None:
    values = sinusoids(torch.tensor([0.0, 1.5], dtype=torch.float64))
    assert torch.equal(values[0], torch.cat((torch.zeros(16), torch.ones(16))).double())
    assert values[1, 3] == pytest.approx(torch.sin(torch.tensor(1.5 * 10 ** (-3 / 16), dtype=torch.float64)))
    assert ScalarEmbedding(8)(torch.zeros(3)).shape == (3, 8)


def test_parameters_stay_within_reach_whatever_the_images() -> None:
    torch.manual_seed(6)
    net = ParameterNet(2, (ParameterRange(0.9, 0.2), ParameterRange(0.8, 0.6, is_rate=True)), features=(4, 8), n_groups=2)
    tag = torch.zeros(1)
    maps = net(1e6 * torch.randn(1, 2, 8, 8, dtype=torch.complex64), tag, new_embedding()(tag))
    assert maps[:, 0].abs().max() <= 0.9 + 2.0 + 1e-5
    assert maps[:, 1].min() >= -0.2001 and maps[:, 1].max() <= 0.8 + 6.0 + 1e-4


def test_mixed_precision_stays_in_the_networks_and_near_single() -> None:
    torch.manual_seed(7)
    images = torch.randn(1, 5, 32, 32, dtype=torch.complex64)
    tag = torch.zeros(1)
    net, embedding, clean = ParameterNet(5, RANGES), new_embedding(), ImageNet()
    exact, exact_images = net(images, tag, embedding(tag)), clean(images, tag)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, rough_images = net(images, tag, embedding(tag)), clean(images, tag)
    assert rough.dtype == torch.float32 and rough_images.dtype == torch.complex64
    # eight bits of mantissa, on changes of order one
    assert float((rough - exact).detach().abs().max()) < 0.1
    assert float((rough_images - exact_images).detach().abs().max()) < 0.05
