"""PINQI's two regularising networks, the images' and the parameters'."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from recon_core.errors import SettingError
from recon_core.networks.unet import ResidualUNet, ScalarEmbedding

Tensor = torch.Tensor

PARAMETER_FEATURES = (32, 64, 96, 128, 128)
"""Channels of the parameter net; the paper lists four, its 2,235,308 weights are those of five resolutions."""
IMAGE_FEATURES = (16, 32, 48, 64, 64)
"""Channels of the image net; 597,323 weights."""
PARAMETER_GROUPS, IMAGE_GROUPS = 16, 8
SOFTPLUS_BETA = 5.0
RATE_SHIFT = 0.2  # rates leave the network at no less than minus this, in 1/s
FITTED_RATES = (0.1, 10.0)
"""1/s; a fitted prediction that ran out of these, where there is no signal, is put back."""
PREDICTIONS = ("direct", "kernel")
KERNEL_WIDTH = 7
PATCH = 3  # pixels: neighbours are compared by the patches around them
MOST_DISTANCE = 2.0  # of alike neighbours, times twice the variance of the data's noise
LEAST_NOISE = 0.004  # below, what undersampling left is more than noise
LEAST_SIGNAL = 0.2
"""RMS over states of what counts as signal where images are about 1."""


@dataclass(frozen=True)
class ParameterRange:
    """Where a network looks for one parameter: ``offset + scale * 10 tanh(output)``.

    Attributes
    ----------
    offset, scale
        In the parameter's SI unit: what is expected, and the size of its variation.
    is_rate
        Bent by a softplus so that it stays above -0.2 (1/s).
    """

    offset: float
    scale: float
    is_rate: bool = False


PUBLISHED_RANGES = {
    "m0_real": ParameterRange(0.9, 0.2),
    "m0_imag": ParameterRange(0.0, 0.1),
    "r1": ParameterRange(0.8, 0.6, is_rate=True),
}
"""Of images whose proton density is about 1."""


def ranges_of(names: Sequence[str]) -> tuple[ParameterRange, ...]:
    """The published ranges of a signal model's parameters.

    Raises
    ------
    SettingError
        A parameter has none: the caller must then give ranges of its own.
    """
    if missing := [name for name in names if name not in PUBLISHED_RANGES]:
        raise SettingError(
            "no range is known for a parameter",
            where="PINQI",
            got=", ".join(missing),
            expected=", ".join(PUBLISHED_RANGES),
            remedy="give a ParameterRange for every parameter of the model",
        )
    return tuple(PUBLISHED_RANGES[name] for name in names)


class ParameterNet(nn.Module):
    """``p_reg = P(y, i)``: images of all states to parameter maps (Eq. 13's regulariser).

    Parameters
    ----------
    n_states
        Length of the state axis; the network knows their order.
    ranges
        One for each parameter.
    features, n_groups
        As published by default.
    is_complex
        Whether the images are complex: real and imaginary parts are channels of their own.
    prediction
        ``"direct"``: parameters, as published. ``"kernel"``: weights of each pixel's neighbours, see `averaged`; the model fitted to
        the averages is then the prediction.
    """

    def __init__(
        self,
        n_states: int,
        ranges: Sequence[ParameterRange],
        *,
        features: Sequence[int] = PARAMETER_FEATURES,
        n_groups: int = PARAMETER_GROUPS,
        n_embedding: int = 64,
        is_complex: bool = True,
        prediction: str = "direct",
    ) -> None:
        super().__init__()
        self.n_states = n_states
        self.is_complex = is_complex
        self.prediction = prediction
        n_in = (2 if is_complex else 1) * n_states + 1
        n_out = 1 + KERNEL_WIDTH**2 if prediction == "kernel" else len(ranges)
        self.unet = ResidualUNet(n_in, n_out, features, n_groups=n_groups, n_embedding=n_embedding)
        self._rates = [i for i, r in enumerate(ranges) if r.is_rate]
        column = (1, len(ranges), 1, 1)
        self.register_buffer("offset", torch.tensor([r.offset for r in ranges]).reshape(column), persistent=False)
        self.register_buffer("scale", torch.tensor([r.scale for r in ranges]).reshape(column), persistent=False)

    offset: Tensor
    scale: Tensor

    def forward(self, images: Tensor, tag: Tensor, embedding: Tensor) -> Tensor:
        """Images to parameters.

        Parameters
        ----------
        images
            complex or real ``(batch, state, y, x)``.
        tag
            float ``(batch,)``: where the iteration is, also as a constant channel.
        embedding
            float ``(batch, feature)`` of the same tag.

        Returns
        -------
        float32 ``(batch, parameter, y, x)`` in SI units.
        """
        parts = torch.cat((images.real, images.imag), dim=1) if images.is_complex() else images
        raw = self.unet(torch.cat((parts, _plane(tag, parts)), dim=1), embedding)
        parameters = self.offset + 10 * self.scale * torch.tanh(raw.to(self.offset.dtype))
        return self._bend(parameters)

    def averaged(self, images: Tensor, tag: Tensor, embedding: Tensor, noise: float = math.inf) -> Tensor:
        """Images, each pixel the mean of its ``KERNEL_WIDTH`` squared neighbourhood with weights of its own, the same in all states.

        The weights are ``softmax_j(b_j - exp(a) max(0, d_j - m))``: ``d_j`` the squared distance of the patches around a pixel and its
        neighbour ``j`` over all states, in units of ``m``, its median where there is signal, which is twice the noise if most
        neighbours are alike; ``a`` and ``b_j`` are what the network adds to such non-local means. Where the ``noise`` of a sample is
        known, ``m`` is at most `MOST_DISTANCE` times what it gives: texture is not noise. Distances are taken as they are: the gradient
        to the images passes through the averages alone.

        References
        ----------
        Buades et al., non-local means, CVPR 2005; Bako et al., Kernel-predicting convolutional networks, ACM Trans. Graph. 36(4),
        2017, who report far quicker learning than of direct predictions.
        """
        parts = torch.cat((images.real, images.imag), dim=1) if images.is_complex() else images
        raw = self.unet(torch.cat((parts, _plane(tag, parts)), dim=1), embedding).to(parts.dtype)
        with torch.no_grad():
            distance = _patch_distance(parts.detach(), self.n_states * max(noise, LEAST_NOISE) ** 2)
        weights = torch.softmax(raw[:, 1:] - torch.exp(raw[:, :1].clamp(-6, 6)) * distance, dim=1)
        if torch.is_grad_enabled():
            mean = (weights[:, :, None] * torch.stack(_neighbours(parts), dim=1)).sum(1)
        else:  # one after the other: all neighbours together do not fit a cache
            mean = torch.zeros_like(parts)
            for weight, neighbour in zip(weights.unbind(1), _neighbours(parts), strict=True):
                mean.addcmul_(weight[:, None], neighbour)
        if not images.is_complex():
            return mean
        return torch.complex(*mean.chunk(2, dim=1))

    def _bend(self, parameters: Tensor) -> Tensor:
        planes = list(parameters.unbind(1))
        for i in self._rates:
            planes[i] = functional.softplus(planes[i] + RATE_SHIFT, beta=SOFTPLUS_BETA) - RATE_SHIFT
        return torch.stack(planes, dim=1)


class ImageNet(nn.Module):
    """``y_reg = y + Y(y, i)``: images to artefact-free images (Eq. 12's regulariser), any number of states.

    The iteration enters as a constant channel only: with feature modulation the count would be 638,923, not the paper's 597,323.
    """

    def __init__(
        self, *, features: Sequence[int] = IMAGE_FEATURES, n_groups: int = IMAGE_GROUPS, is_complex: bool = True
    ) -> None:
        super().__init__()
        n_channels = 2 if is_complex else 1
        self.unet = ResidualUNet(n_channels + 1, n_channels, features, n_groups=n_groups, across_states=True)

    def forward(self, images: Tensor, tag: Tensor) -> Tensor:
        """``(batch, state, y, x)`` complex or real, and ``(batch,)``, to images like the input."""
        parts = torch.stack((images.real, images.imag), dim=2) if images.is_complex() else images[:, :, None]
        change = self.unet(torch.cat((parts, _plane(tag[:, None].expand(images.shape[:2]), parts)), dim=2))
        change = change.to(parts.dtype)
        if not images.is_complex():
            return images + change[:, :, 0]
        return images + torch.complex(change[:, :, 0], change[:, :, 1])


def _plane(tag: Tensor, like: Tensor) -> Tensor:
    """``tag`` ``(*batch)`` as one more constant channel of ``like`` ``(*batch, channel, y, x)``."""
    return tag.to(like.dtype)[..., None, None, None].expand(*like.shape[:-3], 1, *like.shape[-2:])


def new_embedding() -> ScalarEmbedding:
    """The embedding of the iteration that all blocks of the parameter net share; its 2,112 weights are not in the paper's count."""
    return ScalarEmbedding(64)


def _neighbours(planes: Tensor) -> list[Tensor]:
    """``(batch, channel, y, x)``, moved to every place of the neighbourhood; borders are repeated."""
    reach, (height, width) = KERNEL_WIDTH // 2, planes.shape[-2:]
    wide = functional.pad(planes, (reach,) * 4, mode="replicate")
    steps = range(KERNEL_WIDTH)
    return [wide[..., i : i + height, j : j + width] for i in steps for j in steps]


def _patch_distance(planes: Tensor, noise: float) -> Tensor:
    """``max(0, d / m - 1)``, ``(batch, neighbour, y, x)``; see `ParameterNet.averaged`; ``noise``: variance, all states together."""
    squared = torch.stack([(shifted - planes).square_().sum(1) for shifted in _neighbours(planes)], dim=1)
    distance = functional.avg_pool2d(squared, PATCH, 1, PATCH // 2, count_include_pad=False)
    signal = planes.square().sum(1) > LEAST_SIGNAL**2 * planes.shape[1] / 2
    centre = KERNEL_WIDTH**2 // 2
    medians = []
    for one, where in zip(distance, signal, strict=True):  # of the neighbours left and right
        near = one[[centre - 1, centre + 1]][:, where]
        medians.append(near.median() if near.numel() else one.new_tensor(1.0))
    most = torch.stack(medians).clamp(min=1e-12, max=MOST_DISTANCE * 2 * noise)
    return (distance / most[:, None, None, None] - 1).clamp_(min=0)
