"""Mono-exponential decay of magnitudes, with the noise floor of the Rice distribution when the noise is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from recon_core.signal_models.saturation_recovery import along_states, checked_times

Tensor = torch.Tensor


@dataclass(frozen=True)
class MagnitudeDecay:
    """``q_i = m(S0 exp(-R2* TE_i))``, parameters ``(S0, R2*)``; ``m`` is the identity or, with noise, the mean magnitude.

    ``m(A) = s sqrt(pi/2) L(x)`` with ``x = A^2 / 2 s^2`` and ``L(x) = (1 + x) I0e(x/2) + x I1e(x/2)``, ``I0e`` and ``I1e``
    scaled Bessel functions; ``dL/dx = (I0e + I1e) / 2`` and ``d2L/dx2 = -I1e(x/2) / 2x``.

    Attributes
    ----------
    times
        Echo times in s.
    noise_std
        ``s``: SD of the noise of the real part, images' unit; ``None``: none, the plain exponential.

    References
    ----------
    Rice, Bell Syst. Tech. J. 24 (1945) 46, Eq. 3.10-12; Gudbjartsson & Patz, Magn. Reson. Med. 34 (1995) 910.
    """

    times: tuple[float, ...]
    noise_std: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", checked_times(self.times, where="MagnitudeDecay"))

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("s0", "r2star")

    @property
    def units(self) -> tuple[str, ...]:
        return ("1", "1/s")

    @property
    def n_states(self) -> int:
        return len(self.times)

    @property
    def is_complex(self) -> bool:
        return False

    def signal(self, parameters: Tensor) -> Tensor:
        """``q(p)``: ``(2, *pixels)`` to ``(state, *pixels)``."""
        _, decay = self._decay(parameters)
        return self._mean(parameters[0] * decay)[0]

    def signal_and_jacobian(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """``q(p)`` and ``dq/dp``: ``m' E`` and ``-TE m' A`` with ``E = exp(-R2* TE)``, ``A = S0 E``."""
        times, decay = self._decay(parameters)
        amplitude = parameters[0] * decay
        mean, slope, _ = self._mean(amplitude)
        return mean, torch.stack((slope * decay, -times * slope * amplitude), dim=1)

    def curvature(self, parameters: Tensor, residual: Tensor) -> Tensor:
        """``sum_i r_i d^2q_i/dp^2`` with ``d^2q = m'' dA dA + m' d^2A``."""
        times, decay = self._decay(parameters)
        amplitude = parameters[0] * decay
        _, slope, bend = self._mean(amplitude)
        by_rate = -times * amplitude
        second = parameters.new_zeros(2, *parameters.shape)
        second[0, 0] = (residual * bend * decay * decay).sum(0)
        second[0, 1] = second[1, 0] = (residual * (bend * decay * by_rate - slope * times * decay)).sum(0)
        second[1, 1] = (residual * (bend * by_rate * by_rate + slope * times * times * amplitude)).sum(0)
        return second

    def _decay(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        times = along_states(self.times, parameters[1])
        return times, torch.exp(-times * parameters[1])

    def _mean(self, amplitude: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``m(A)`` and its first two derivatives."""
        if self.noise_std is None:
            return amplitude, torch.ones_like(amplitude), torch.zeros_like(amplitude)
        s = self.noise_std
        x = amplitude.square() / (2 * s * s)
        i0, i1 = torch.special.i0e(x / 2), torch.special.i1e(x / 2)
        first = (i0 + i1) / 2
        second = torch.where(x > 1e-6, -i1 / (2 * x.clamp_min(1e-6)), -0.125)
        scale = s * math.sqrt(math.pi / 2)
        mean = scale * ((1 + x) * i0 + x * i1)
        grown = amplitude / (s * s)
        return mean, scale * first * grown, scale * (second * grown.square() + first / (s * s))
