"""Mono-exponential multi-echo gradient echo."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from recon_core.signal_models.saturation_recovery import along_states, checked_times

Tensor = torch.Tensor


@dataclass(frozen=True)
class MultiEcho:
    """``q_i = M0 exp((-R2* + i 2 pi f) TE_i)``, complex; parameters ``(Re M0, Im M0, R2*, f)``.

    Attributes
    ----------
    times
        Echo times in s. ``R2*`` is in 1/s, the field ``f`` in Hz, positive where the phase grows with the echo time.

    Notes
    -----
    The signal is periodic in ``f`` for equally spaced echoes: a fit finds the period that it was started in.
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "times", checked_times(self.times, where="MultiEcho"))

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("m0_real", "m0_imag", "r2star", "field")

    @property
    def units(self) -> tuple[str, ...]:
        return ("1", "1", "1/s", "Hz")

    @property
    def n_states(self) -> int:
        return len(self.times)

    @property
    def is_complex(self) -> bool:
        return True

    def signal(self, parameters: Tensor) -> Tensor:
        """``q(p)``: real ``(4, *pixels)`` to complex ``(state, *pixels)``."""
        return torch.complex(parameters[0], parameters[1]) * self._evolution(parameters)[1]

    def signal_and_jacobian(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        """``q(p)`` and ``dq/dp``: ``E``, ``i E``, ``-TE q`` and ``i 2 pi TE q`` with ``E = exp((-R2* + i 2 pi f) TE)``."""
        times, evolution = self._evolution(parameters)
        signal = torch.complex(parameters[0], parameters[1]) * evolution
        grown = times * signal
        return signal, torch.stack((evolution, 1j * evolution, -grown, 2j * math.pi * grown), dim=1)

    def curvature(self, parameters: Tensor, residual: Tensor) -> Tensor:
        """``sum_i Re conj(r_i) d^2q_i/dp^2``; every derivative by R2* or f is a factor ``-TE`` or ``i 2 pi TE``."""
        times, evolution = self._evolution(parameters)
        once = (times * evolution * residual.conj()).sum(0)
        twice = torch.complex(parameters[0], parameters[1]) * (times * times * evolution * residual.conj()).sum(0)
        turn = 2 * math.pi
        entries = {
            (0, 2): -once.real,
            (0, 3): -turn * once.imag,
            (1, 2): once.imag,
            (1, 3): -turn * once.real,
            (2, 2): twice.real,
            (2, 3): turn * twice.imag,
            (3, 3): -turn * turn * twice.real,
        }
        second = parameters.new_zeros(4, *parameters.shape)
        for (i, j), value in entries.items():
            second[i, j] = second[j, i] = value
        return second

    def _evolution(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        decay, field = parameters[2], parameters[3]
        times = along_states(self.times, decay)
        return times, torch.polar(torch.exp(-times * decay), 2 * math.pi * times * field)
