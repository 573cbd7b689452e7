"""PINQI's two regularising networks, the images' and the parameters'."""

from __future__ import annotations

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
FITTED_RATES = (0.1, 5.0)
"""1/s; a fit that ran out of these, where there is no signal, is put back before a network sees it."""
PREDICTIONS = ("direct", "offset")


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
        ``"direct"``: as published. ``"offset"``: the network is also shown a fit of each pixel (one more channel per parameter, a
        rate as its logarithm) and predicts what to change of it: ``p_fit + 10 scale tanh(output)``, and rates times
        ``exp(2 tanh(output / 2))``. It then has to learn to smooth, not to fit.
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
        n_in = (2 if is_complex else 1) * n_states + 1 + (len(ranges) if prediction == "offset" else 0)
        self.unet = ResidualUNet(n_in, len(ranges), features, n_groups=n_groups, n_embedding=n_embedding)
        self._rates = [i for i, r in enumerate(ranges) if r.is_rate]
        column = (1, len(ranges), 1, 1)
        self.register_buffer("offset", torch.tensor([r.offset for r in ranges]).reshape(column), persistent=False)
        self.register_buffer("scale", torch.tensor([r.scale for r in ranges]).reshape(column), persistent=False)
        if prediction == "offset":
            nn.init.zeros_(self.unet.last.weight)  # at the start the fit is the prediction

    offset: Tensor
    scale: Tensor

    def forward(self, images: Tensor, tag: Tensor, embedding: Tensor, fitted: Tensor | None = None) -> Tensor:
        """Images to parameters.

        Parameters
        ----------
        images
            complex or real ``(batch, state, y, x)``.
        tag
            float ``(batch,)``: where the iteration is, also as a constant channel.
        embedding
            float ``(batch, feature)`` of the same tag.
        fitted
            ``(batch, parameter, y, x)``, SI units: the fit of each pixel that an offset refers to.

        Returns
        -------
        float32 ``(batch, parameter, y, x)`` in SI units.
        """
        parts = torch.cat((images.real, images.imag), dim=1) if images.is_complex() else images
        if self.prediction == "offset":
            assert fitted is not None
            return self._changed(parts, tag, embedding, fitted)
        raw = self.unet(torch.cat((parts, _plane(tag, parts)), dim=1), embedding)
        parameters = self.offset + 10 * self.scale * torch.tanh(raw.to(self.offset.dtype))
        return self._bend(parameters)

    def _changed(self, parts: Tensor, tag: Tensor, embedding: Tensor, fitted: Tensor) -> Tensor:
        planes = list(fitted.unbind(1))
        for i in self._rates:
            planes[i] = planes[i].clamp(*FITTED_RATES)
        shown = [plane.log() if i in self._rates else plane for i, plane in enumerate(planes)]
        raw = self.unet(torch.cat((parts, torch.stack(shown, dim=1), _plane(tag, parts)), dim=1), embedding)
        raw = raw.to(self.offset.dtype)
        change = 10 * self.scale * torch.tanh(raw)
        for i, plane in enumerate(planes):
            planes[i] = plane * torch.exp(2 * torch.tanh(raw[:, i] / 2)) if i in self._rates else plane + change[:, i]
        return torch.stack(planes, dim=1)

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
