"""Unrolled reconstruction of multi-echo images: deep ADMM with temporal feature fusion, and MoDL beside it.

    z = x + w,   v = z - D(TFF(z)),   x = argmin |A x - b|^2 + rho |x - (v - w)|^2,   w = w + x - v        (Eq. 7, w = u / rho)

Images are complex ``(plane, echo, z, y)``; networks see ``(..., (Re, Im), z, y)``. All unrolled iterations share their weights.

References
----------
LARO (Zhang et al., doi:10.1002/mrm.29582), Eqs. 7 and 8. As in the authors' practice rather than in the text: features of the echoes
lie on the batch axis, so that any number of echoes works; fusion runs both ways and is summed; the denoiser is residual.
Deviations: rho is ``exp`` of what is learned (never negative) and begins at 0.1, with which few CG steps converge, so that the
layer's gradient is that of its solution; residual blocks (as in PINQI) make the denoiser, which begins near zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from recon_core.errors import DataError, SettingError
from recon_core.networks.unet import ResidualBlock, ResidualUNet
from recon_core.operators.planes import Planes
from recon_core.solvers.linear_layer import LinearSettings, solve_linear

Tensor = torch.Tensor

DIRECTIONS = ("both", "forward")
KINDS = ("laro", "modl")
FIRST_RHO = 0.1
FIRST_BLOCK_WEIGHT = 0.3
STARTS = ("refined", "llr", "cg_sense", "zero_filled")
PRECISIONS = ("float32", "bfloat16")
LEAST_SQUARES_WEIGHT, LEAST_SQUARES_STEPS, LEAST_SQUARES_TOLERANCE = 0.03, 24, 2e-2
"""Of the first images ``cg_sense``."""


@dataclass(frozen=True)
class LaroSettings:
    """An architecture.

    Attributes
    ----------
    kind
        ``"laro"``: deep ADMM; ``"modl"``: the comparator, echoes as channels.
    fusion
        TFF of the paper: 1 recurrent over echoes, 0 two convolutions per echo instead.
    direction
        Of the recurrence: ``"both"`` or ``"forward"`` (Eq. 8 to the letter).
    channels
        Of the features that are fused (64 in the paper).
    features
        Of the denoiser's resolutions, finest first; MoDL: width of its layers is the first.
    unrolls
        N_I: iterations when it is trained last, and by default when it is used.
    n_echoes
        MoDL only: its channels fix the number of echoes.
    cg_iterations, cg_tolerance
        Of the data consistency.
    recompute
        Trade time for memory in training.
    precision
        Of the denoiser; the data consistency keeps float32.
    """

    kind: str = "laro"
    fusion: int = 1
    direction: str = "both"
    channels: int = 64
    features: tuple[int, ...] = (64, 128, 256)
    unrolls: int = 10
    n_echoes: int = 0
    cg_iterations: int = 8
    cg_tolerance: float = 1e-2
    recompute: bool = False
    precision: str = "float32"

    def __post_init__(self) -> None:
        known = {"kind": KINDS, "fusion": (0, 1), "direction": DIRECTIONS, "precision": PRECISIONS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                got, expected = f"{name} {getattr(self, name)!r}", ", ".join(map(str, values))
                raise SettingError("unknown architecture", where="LARO", got=got, expected=expected)
        if self.unrolls < 1 or self.channels < 1 or (self.kind == "modl") != (self.n_echoes > 0):
            raise SettingError("impossible architecture", where="LARO", got=self)


class TemporalFusion(nn.Module):
    """``h_j = ReLU(N_s(s_j) + N_h(h_{j-1}))`` (Eq. 8), forwards and backwards over echoes by the same cell, summed.

    Both convolutions are normalised per image and channel. Without recurrence ``N_s`` has two layers (the paper's TFF = 0).
    """

    def __init__(self, channels: int, *, recurrent: bool, direction: str) -> None:
        super().__init__()
        self.direction = direction
        self.from_image = nn.Conv2d(2, channels, 3, padding=1)
        self.norm_image = nn.GroupNorm(channels, channels)
        self.from_state: nn.Conv2d = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm_state = nn.GroupNorm(channels, channels)
        self.recurrent = recurrent

    def forward(self, images: Tensor) -> Tensor:
        """``(plane, echo, 2, z, y)`` to ``(plane, echo, channel, z, y)``."""
        seen = self.norm_image(self.from_image(images.flatten(0, 1)))
        if not self.recurrent:
            return functional.relu(self.norm_state(self.from_state(functional.relu(seen)))).unflatten(0, images.shape[:2])
        seen = seen.unflatten(0, images.shape[:2])
        echoes = range(images.shape[1])
        total = self._run(seen, echoes)
        if self.direction == "both":
            total = [a + b for a, b in zip(total, self._run(seen, echoes[::-1])[::-1], strict=True)]
        return torch.stack(total, dim=1)

    def _run(self, seen: Tensor, echoes: range) -> list[Tensor]:
        state, found = None, []
        for j in echoes:
            # h_0 = 0: its convolution is a bias, which the normalisation removes
            past = 0 if state is None else self.norm_state(self.from_state(state))
            state = functional.relu(seen[:, j] + past)
            found.append(state)
        return found


class EchoDenoiser(nn.Module):
    """``D(TFF(z))``: what is to be taken off every echo."""

    def __init__(self, settings: LaroSettings) -> None:
        super().__init__()
        self.fusion = TemporalFusion(settings.channels, recurrent=settings.fusion == 1, direction=settings.direction)
        # the echo itself goes in beside its features: normalised features have lost its scale
        self.unet = ResidualUNet(settings.channels + 2, 2, settings.features, n_groups=settings.features[0])
        nn.init.normal_(self.unet.last.weight, std=5e-3)
        for block in self.unet.modules():
            if isinstance(block, ResidualBlock):
                # PINQI's thousandth takes hundreds of steps to grow, and until then every block is blind to its neighbours
                nn.init.constant_(block.residual_weight, FIRST_BLOCK_WEIGHT)

    def forward(self, images: Tensor) -> Tensor:
        """complex ``(plane, echo, z, y)`` to the same."""
        channels = _to_channels(images)
        features = torch.cat((self.fusion(channels), channels), dim=2)
        return _to_complex(self.unet(features.flatten(0, 1)).unflatten(0, images.shape[:2]))


class JointDenoiser(nn.Module):
    """MoDL's denoiser as the paper uses it: five convolutions over all echoes' real and imaginary parts as channels."""

    def __init__(self, n_echoes: int, width: int) -> None:
        super().__init__()
        self.n_echoes = n_echoes
        layers: list[nn.Module] = []
        for n_in in (2 * n_echoes, width, width, width):
            layers += [nn.Conv2d(n_in, width, 3, padding=1), nn.GroupNorm(width, width), nn.ReLU()]
        last = nn.Conv2d(width, 2 * n_echoes, 3, padding=1)
        nn.init.normal_(last.weight, std=1e-3)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, images: Tensor) -> Tensor:
        """complex ``(plane, echo, z, y)`` to the same.

        Raises
        ------
        DataError
            Another number of echoes than it was made for.
        """
        if images.shape[1] != self.n_echoes:
            raise DataError(
                "another number of echoes",
                where="MoDL",
                got=images.shape[1],
                expected=self.n_echoes,
                remedy="Use LARO's network",
            )
        channels = _to_channels(images)
        return _to_complex(self.layers(channels.flatten(1, 2)).reshape(channels.shape))


class Laro(nn.Module):
    """Unrolled iterations of either kind: same data consistency, same interface."""

    def __init__(self, settings: LaroSettings | None = None) -> None:
        super().__init__()
        self.settings = s = settings or LaroSettings()
        self.denoiser: nn.Module = JointDenoiser(s.n_echoes, s.features[0]) if s.kind == "modl" else EchoDenoiser(s)
        self.log_rho = nn.Parameter(torch.tensor(math.log(FIRST_RHO)))

    @property
    def rho(self) -> Tensor:
        """Penalty of the data consistency, against ``A^H A`` of norm 1."""
        return self.log_rho.exp()

    def forward(
        self, operator: Planes, rhs: Tensor, start: Tensor, unrolls: int = 0, rho_factor: float = 1.0
    ) -> list[Tensor]:
        """Images after every iteration.

        Parameters
        ----------
        operator, rhs
            ``A`` and ``A^H b``, complex ``(plane, echo, z, y)``.
        start
            First images, the same shape.
        unrolls
            Iterations; 0: the settings' number.
        rho_factor
            On the learned penalty, for data of another noise than the training's.
        """
        s, rho = self.settings, self.rho * rho_factor
        linear = LinearSettings(s.cg_tolerance, s.cg_iterations, 5 * s.cg_tolerance, 2 * s.cg_iterations, n_batch_axes=2)
        x, dual, found = start, torch.zeros_like(start), []
        for _ in range(unrolls or s.unrolls):
            noisy = x if s.kind == "modl" else x + dual
            v = noisy - self._denoise(noisy)
            x, _ = solve_linear(
                operator, rhs, [(rho, v if s.kind == "modl" else v - dual)], initial=v.detach(), settings=linear
            )
            if s.kind != "modl":
                dual = dual + x - v
            found.append(x)
        return found

    def _denoise(self, images: Tensor) -> Tensor:
        if self.settings.precision == "bfloat16":
            with torch.autocast(images.device.type, torch.bfloat16):
                return self._recomputed(images)
        return self._recomputed(images)

    def _recomputed(self, images: Tensor) -> Tensor:
        if self.settings.recompute and torch.is_grad_enabled():
            found: Tensor = checkpoint(self.denoiser, images, use_reentrant=False)
            return found
        denoised: Tensor = self.denoiser(images)
        return denoised


def least_squares_start(operator: Planes, rhs: Tensor) -> Tensor:
    """A few steps of CG-SENSE: ``argmin |A x - b|^2 + weight |x|^2``; differentiable in the sampling."""
    settings = LinearSettings(LEAST_SQUARES_TOLERANCE, LEAST_SQUARES_STEPS, n_batch_axes=2)
    return solve_linear(operator, rhs, [(LEAST_SQUARES_WEIGHT, torch.zeros_like(rhs))], settings=settings)[0]


def _to_channels(images: Tensor) -> Tensor:
    return torch.view_as_real(images.resolve_conj()).movedim(-1, -3)


def _to_complex(channels: Tensor) -> Tensor:
    whole = channels.float() if channels.dtype == torch.bfloat16 else channels
    return torch.view_as_complex(whole.movedim(-3, -1).contiguous())
