"""Inversion recovery: with a known pulse (two unknowns) and with three free parameters, as MOLLI and Look-Locker need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.errors import DataError
from recon_core.signal_models.saturation_recovery import Recovery, along_states, checked_times

Tensor = torch.Tensor


class InversionRecovery(Recovery):
    """``q_i = M0 (1 - (1 + e) exp(-TI_i R1))`` with a known inversion efficiency ``e``.

    Parameters ``(Re M0, Im M0, R1)``, or ``(M0, R1)`` when the signal is real (phase-corrected). An efficiency of 1 is the
    ideal inversion ``M0 (1 - 2 exp(-TI R1))``; 0 would be saturation. Where it is not known, use `ThreeParameterRecovery`.

    Parameters
    ----------
    times
        Inversion times in s.
    is_complex
        Whether the signal is complex.
    efficiency
        ``-Mz / M0`` just after the pulse, above 0 and at most 1.

    Raises
    ------
    DataError
        A time is not finite or negative, the efficiency is out of its range.
    """

    def __init__(self, times: Sequence[float], is_complex: bool = True, efficiency: float = 1.0) -> None:
        if not (math.isfinite(efficiency) and 0 < efficiency <= 1):
            raise DataError("not an efficiency", where="InversionRecovery", got=efficiency, expected="above 0, at most 1")
        super().__init__(tuple(times), is_complex, 1 + efficiency)

    @property
    def efficiency(self) -> float:
        """``-Mz / M0`` just after the pulse."""
        return self.factor - 1


@dataclass(frozen=True)
class ThreeParameterRecovery:
    """``q_i = A - B exp(-TI_i R)``, real; parameters ``(A, B, R)``.

    Inversion recovery with unknown efficiency: ``A = M0``, ``B = (1 + e) M0``, ``R = R1``. Look-Locker and MOLLI, where the
    readout drives the recovery: ``A = M0*``, ``B = M0 + M0*``, ``R = R1*``, see `look_locker_t1`.

    Attributes
    ----------
    times
        Inversion times in s.

    References
    ----------
    Look & Locker, Rev. Sci. Instrum. 41 (1970) 250; Messroghli et al., MRM 52 (2004) 141, Eq. (1).
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", checked_times(self.times, where="ThreeParameterRecovery"))

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("a", "b", "rate")

    @property
    def units(self) -> tuple[str, ...]:
        return ("1", "1", "1/s")

    @property
    def n_states(self) -> int:
        return len(self.times)

    @property
    def is_complex(self) -> bool:
        return False

    def signal(self, parameters: Tensor) -> Tensor:
        """``q(p)``: real ``(A, B, R)`` of ``(3, *pixels)`` to ``(state, *pixels)``."""
        a, b, rate = parameters
        return a - b * torch.exp(-along_states(self.times, rate) * rate)

    def signal_and_jacobian(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """``q(p)`` and ``dq/dp``: 1, ``-exp(-TI R)`` and ``B TI exp(-TI R)``."""
        a, b, rate = parameters
        times = along_states(self.times, rate)
        decay = torch.exp(-times * rate)
        return a - b * decay, torch.stack((torch.ones_like(decay), -decay, b * times * decay), dim=1)

    def curvature(self, parameters: Tensor, residual: Tensor) -> Tensor:
        """``sum_i r_i d^2q_i/dp^2``: ``TI exp(-TI R)`` for B with R, ``-B TI^2 exp(-TI R)`` for R twice."""
        _, b, rate = parameters
        times = along_states(self.times, rate)
        slope = times * torch.exp(-times * rate) * residual
        second = rate.new_zeros(3, *parameters.shape)
        second[1, 2] = second[2, 1] = slope.sum(0)
        second[2, 2] = -b * (times * slope).sum(0)
        return second


def look_locker_t1(parameters: Tensor, covariance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """``T1 = T1* (B/A - 1)`` and its standard deviation, both ``(*pixels)`` in s.

    Parameters
    ----------
    parameters
        ``(A, B, R*)`` of `ThreeParameterRecovery`, ``(3, *pixels)``, ``R* = 1/T1*`` in 1/s.
    covariance
        ``(3, 3, *pixels)``; the deviation is by linear propagation, ``sqrt(g^T C g)``. Without it there is no deviation.

    References
    ----------
    Deichmann & Haase, J. Magn. Reson. 96 (1992) 608; Messroghli et al., MRM 52 (2004) 141. The correction assumes a perfect
    inversion; an efficiency ``e < 1`` makes T1 too small by about the factor ``e``.
    """
    a, b, rate = parameters
    t1 = (b / a - 1) / rate
    return t1, _propagated(torch.stack((-b / (a * a * rate), 1 / (a * rate), -t1 / rate)), covariance)


def relaxation_time(rate: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """``T = 1/R`` in s and its standard deviation from the variance of ``R``, both of ``rate``'s shape."""
    time = 1 / rate
    return time, None if variance is None else variance.sqrt() * time * time


def _propagated(gradient: Tensor, covariance: Tensor | None) -> Tensor | None:
    if covariance is None:
        return None
    return (gradient[:, None] * covariance * gradient[None]).sum(dim=(0, 1)).clamp_min(0).sqrt()
