"""Recovery of the longitudinal magnetisation after a preparation pulse; saturation is its simplest case."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.errors import DataError

Tensor = torch.Tensor


def checked_times(times: Sequence[float], *, where: str) -> tuple[float, ...]:
    """``times`` in s as a tuple.

    Raises
    ------
    DataError
        None at all, or one that is negative or not finite.
    """
    checked = tuple(float(t) for t in times)
    if not checked:
        raise DataError("no times", where=where, expected="one time per state in s")
    if wrong := [t for t in checked if not (math.isfinite(t) and t >= 0)]:
        raise DataError("not a time", where=where, got=wrong[0], expected="finite and not negative, in s")
    return checked


def along_states(times: Sequence[float], like: Tensor) -> Tensor:
    """``(state, 1, ...)`` that broadcasts against one parameter ``like`` of shape ``(*pixels)``."""
    return torch.as_tensor(times, dtype=like.dtype, device=like.device).reshape(-1, *(1,) * like.ndim)


@dataclass(frozen=True)
class Recovery:
    """``q_i = M0 (1 - f exp(-t_i R1))``: the magnetisation starts at ``(1 - f) M0`` and recovers to ``M0``.

    Attributes
    ----------
    times
        Delay ``t_i`` between preparation and readout of every state in s.
    is_complex
        ``True``: parameters ``(Re M0, Im M0, R1)``, complex signal. ``False``: ``(M0, R1)``, real signal.
    factor
        ``f``: 1 after saturation, 2 after a perfect inversion.
    """

    times: tuple[float, ...]
    is_complex: bool = True
    factor: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", checked_times(self.times, where=type(self).__name__))

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("m0_real", "m0_imag", "r1") if self.is_complex else ("m0", "r1")

    @property
    def units(self) -> tuple[str, ...]:
        return ("1", "1", "1/s") if self.is_complex else ("1", "1/s")

    @property
    def n_states(self) -> int:
        return len(self.times)

    def signal(self, parameters: Tensor) -> Tensor:
        """``q(p)``: ``(parameter, *pixels)`` real to ``(state, *pixels)``, complex if ``is_complex``."""
        rate = parameters[-1]
        weight = 1 - self.factor * torch.exp(-along_states(self.times, rate) * rate)
        if not self.is_complex:
            return parameters[0] * weight
        return torch.complex(parameters[0] * weight, parameters[1] * weight)

    def signal_and_jacobian(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """``q(p)`` and ``dq/dp``: ``w``, ``i w`` and ``M0 f t exp(-t R1)`` with ``w = 1 - f exp(-t R1)``."""
        rate = parameters[-1]
        times = along_states(self.times, rate)
        decay = self.factor * torch.exp(-times * rate)
        weight, slope = 1 - decay, times * decay
        if not self.is_complex:
            return parameters[0] * weight, torch.stack((weight, parameters[0] * slope), dim=1)
        real, imag = parameters[0], parameters[1]
        zero = torch.zeros_like(weight)
        parts = (torch.stack((weight, zero, real * slope), dim=1), torch.stack((zero, weight, imag * slope), dim=1))
        return torch.complex(real * weight, imag * weight), torch.complex(*parts)

    def curvature(self, parameters: Tensor, residual: Tensor) -> Tensor:
        """``sum_i Re conj(r_i) d^2q_i/dp^2``: ``f t exp(-t R1)`` for M0 with R1, ``-M0 f t^2 exp(-t R1)`` for R1 twice."""
        rate = parameters[-1]
        times = along_states(self.times, rate)
        slope = self.factor * times * torch.exp(-times * rate)
        parts = (residual.real, residual.imag) if self.is_complex else (residual,)
        second = rate.new_zeros(len(parameters), *parameters.shape)
        for i, part in enumerate(parts):
            second[i, -1] = second[-1, i] = (slope * part).sum(0)
            second[-1, -1] -= parameters[i] * (times * slope * part).sum(0)
        return second


@dataclass(frozen=True)
class SaturationRecovery(Recovery):
    """``q_i = M0 (1 - exp(-tau_i R1))``, parameters ``(Re M0, Im M0, R1)`` or, real, ``(M0, R1)``.

    Attributes
    ----------
    times
        Saturation delays ``tau_i`` in s.

    References
    ----------
    PINQI (Zimmermann et al.), Eq. (19), there in T1; the authors' code solves for R1 = 1/T1 as we do.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.factor != 1.0:
            raise DataError("saturation has the factor 1", where="SaturationRecovery", got=self.factor)
