"""A residual UNet on planes, optionally with a convolution along the states and conditioned on a scalar.

Two layouts share the code: a *plane* network sees ``(batch, channel, y, x)``; a *2.5D* network sees
``(batch, state, channel, y, x)``, treats the states as further batch entries in space, and mixes them by a convolution of three
states in every block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional

from recon_core.errors import DataError, SettingError

Tensor = torch.Tensor

FIRST_RESIDUAL_WEIGHT = 1e-3  # near zero: at the start every block is its shortcut, pixel by pixel (ReZero)
N_FREQUENCIES = 16


def sinusoids(values: Tensor, period: float = 10.0) -> Tensor:
    """Sine and cosine of ``value * period**(-k / 16)``, ``k = 0..15``.

    Parameters
    ----------
    values
        float ``(batch,)``.

    Returns
    -------
    float ``(batch, 32)``
    """
    exponents = torch.arange(N_FREQUENCIES, device=values.device, dtype=values.dtype) / N_FREQUENCIES
    angles = values[:, None] * period ** (-exponents)
    return torch.cat((angles.sin(), angles.cos()), dim=-1)


class ScalarEmbedding(nn.Module):
    """A scalar to a feature vector: sinusoids, one linear layer, SiLU.

    Parameters
    ----------
    n_features
        Length of the vector.
    """

    def __init__(self, n_features: int = 64) -> None:
        super().__init__()
        self.n_features = n_features
        self.linear = nn.Linear(2 * N_FREQUENCIES, n_features)
        nn.init.kaiming_normal_(self.linear.weight, nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, values: Tensor) -> Tensor:
        """``(batch,)`` to ``(batch, feature)``."""
        return functional.silu(self.linear(sinusoids(values)))


class FeatureModulation(nn.Module):
    """``x (1 + s) + t`` with ``s`` and ``t`` linear in an embedding; the identity at the start.

    References
    ----------
    Perez et al., FiLM, AAAI 2018.
    """

    def __init__(self, n_embedding: int, n_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_embedding, 2 * n_channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``(batch, channel, y, x)`` with ``(batch, feature)``."""
        scale, shift = self.linear(embedding)[..., None, None].chunk(2, dim=1)
        return x * (1 + scale) + shift


class StateConvolution(nn.Module):
    """Convolution over three neighbouring states, every pixel alike; the first and last states are repeated at the ends."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_channels, n_channels, 3))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, n_states: int) -> Tensor:
        """``(batch * state, channel, y, x)`` to the same.

        A 2D convolution of 3 x 1 over (state, pixel): measured twice as fast on a CPU as 1x1 convolutions on shifted states, and
        four times as fast as a 3D convolution.
        """
        rows = x.unflatten(0, (-1, n_states)).flatten(3).movedim(1, 2)  # (batch, channel, state, pixel)
        padded = torch.cat((rows[:, :, :1], rows, rows[:, :, -1:]), dim=2)
        return functional.conv2d(padded, self.weight[..., None]).movedim(2, 1).reshape(x.shape)


class ResidualBlock(nn.Module):
    """``SiLU(shortcut(x) + alpha F(x))``, ``F`` = conv 3x3, norm, (modulation), SiLU, conv 3x3, (state conv), norm.

    Parameters
    ----------
    n_in, n_out
        Channels; a 1x1 convolution is the shortcut where they differ.
    n_groups
        Groups of the normalisation.
    n_embedding
        Length of the conditioning vector, 0 for none.
    across_states
        Mix neighbouring states after the second convolution.

    References
    ----------
    PINQI (Zimmermann et al., doi:10.1109/TCI.2024.3388869), section III-B; the weight ``alpha`` is ReZero's (Bachlechner et al.).
    """

    def __init__(self, n_in: int, n_out: int, *, n_groups: int, n_embedding: int = 0, across_states: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_in, n_out, 3, padding=1)
        self.norm1 = nn.GroupNorm(n_groups, n_out)
        self.modulation = FeatureModulation(n_embedding, n_out) if n_embedding else None
        self.conv2 = nn.Conv2d(n_out, n_out, 3, padding=1)
        self.state_conv = StateConvolution(n_out) if across_states else None
        self.norm2 = nn.GroupNorm(n_groups, n_out)
        self.shortcut: nn.Module = nn.Identity() if n_in == n_out else nn.Conv2d(n_in, n_out, 1)
        self.residual_weight = nn.Parameter(torch.tensor(FIRST_RESIDUAL_WEIGHT))

    def forward(self, x: Tensor, embedding: Tensor | None = None, n_states: int = 1) -> Tensor:
        """``(batch * state, n_in, y, x)`` to ``(batch * state, n_out, y, x)``."""
        y = self.norm1(self.conv1(x))
        if self.modulation is not None and embedding is not None:
            y = self.modulation(y, embedding)
        y = self.conv2(functional.silu(y))
        if self.state_conv is not None:
            y = self.state_conv(y, n_states)
        return functional.silu(self.shortcut(x) + self.residual_weight * self.norm2(y))


class Upsampling(nn.Module):
    """Bilinear by two (corners not aligned), then a 3x3 convolution without bias and with repeated borders."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(n_channels, n_channels, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(_repeat_ends(_repeat_ends(_twice(_twice(x, -2), -1), -2), -1))


# Interpolation, padding and pooling by slices: PyTorch's own may add up their gradients on a GPU in an order that changes from run to
# run, and then a resumed training would not equal an uninterrupted one.


def _largest_of_four(x: Tensor) -> Tensor:
    """Max-pooling with stride and kernel 2; even sizes."""
    rows = torch.maximum(x[..., ::2, :], x[..., 1::2, :])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def _repeat_ends(x: Tensor, axis: int) -> Tensor:
    """One more entry at both ends of ``axis``."""
    return torch.cat((x.narrow(axis, 0, 1), x, x.narrow(axis, x.shape[axis] - 1, 1)), dim=axis)


def _twice(x: Tensor, axis: int) -> Tensor:
    """Linear interpolation to twice as many entries along ``axis``, at a quarter and three quarters of every entry."""
    n, axis = x.shape[axis], axis % x.ndim
    ends = _repeat_ends(x, axis)
    before, after = (torch.lerp(ends.narrow(axis, k, n), x, 0.75) for k in (0, 2))
    return torch.stack((before, after), dim=axis + 1).flatten(axis, axis + 1)


class ResidualUNet(nn.Module):
    """Encoder, bottleneck and decoder of residual blocks; max-pooling down, bilinear up, skips by concatenation.

    Parameters
    ----------
    n_in, n_out
        Channels of input and output.
    features
        Channels of every resolution, finest first; the last one is the bottleneck.
    n_groups
        Groups of every normalisation.
    n_embedding
        Length of the conditioning vector, 0 for none. The bottleneck is not conditioned.
    across_states
        2.5D: input ``(batch, state, channel, y, x)``.

    Raises
    ------
    SettingError
        Fewer than two resolutions, or features that the groups do not divide.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        features: Sequence[int],
        *,
        n_groups: int,
        n_embedding: int = 0,
        across_states: bool = False,
    ) -> None:
        super().__init__()
        if len(features) < 2 or any(f < n_groups or f % n_groups for f in features):
            raise SettingError(
                "impossible features", where="UNet", got=tuple(features), expected=f"two or more multiples of {n_groups}"
            )
        self.across_states = across_states
        self.n_in = n_in

        def block(a: int, b: int, conditioned: bool = True) -> ResidualBlock:
            embedding = n_embedding if conditioned else 0
            return ResidualBlock(a, b, n_groups=n_groups, n_embedding=embedding, across_states=across_states)

        encoder = [n_in, *features[:-1]]
        self.encoder = nn.ModuleList(block(a, b) for a, b in pairwise(encoder))
        self.bottleneck = block(features[-2], features[-1], conditioned=False)
        decoder = list(pairwise(reversed(features)))
        self.up = nn.ModuleList(Upsampling(a) for a, _ in decoder)
        self.decoder = nn.ModuleList(block(a + b, b) for a, b in decoder)
        self.last = nn.Conv2d(features[0], n_out, 1)
        nn.init.normal_(self.last.weight, std=0.05)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """``(batch, [state,] n_in, y, x)`` to ``(batch, [state,] n_out, y, x)``; any y and x.

        Parameters
        ----------
        embedding
            ``(batch, feature)``, for a conditioned network only.

        Raises
        ------
        DataError
            Wrong number of axes or channels.
        """
        if x.ndim != 4 + self.across_states or x.shape[-3] != self.n_in:
            axes = "(batch, state, channel, y, x)" if self.across_states else "(batch, channel, y, x)"
            raise DataError("wrong input", where="UNet", got=tuple(x.shape), expected=f"{axes} with {self.n_in} channels")
        n_states = x.shape[1] if self.across_states else 1
        if self.across_states and embedding is not None:
            embedding = embedding.repeat_interleave(n_states, dim=0)
        y = self._planes(x.flatten(0, 1) if self.across_states else x, embedding, n_states)
        return y.unflatten(0, (-1, n_states)) if self.across_states else y

    def _planes(self, x: Tensor, embedding: Tensor | None, n_states: int) -> Tensor:
        # zero-filled at the lower right to a multiple of the coarsest pixel, cropped at the end
        step = 2 ** len(self.encoder)
        height, width = x.shape[-2:]
        x = functional.pad(x, (0, -width % step, 0, -height % step))
        skips = []
        for block in self.encoder:
            x = block(x, embedding, n_states)
            skips.append(x)
            x = _largest_of_four(x)
        x = self.bottleneck(x, None, n_states)
        for up, block, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = block(torch.cat((up(x), skip), dim=1), embedding, n_states)
        return self.last(x)[..., :height, :width]
