"""Signal models ``q(p)``: from parameters to the images of all states, with closed-form Jacobians.

Conventions of every model
--------------------------
* Parameters are real, ``(parameter, *pixels)``; a complex amplitude is two parameters, its real and its imaginary part.
* The signal is ``(state, *pixels)``, the Jacobian ``(state, parameter, *pixels)``: complex where the signal is. The
  parameter axis is outermost so that each parameter is a contiguous image and every operation runs over pixels.
* Relaxation is a *rate* in 1/s (``R1 = 1/T1``), times are in s, frequencies in Hz: the signal is smooth in the rate through
  zero, where the time has a pole, and least squares in it needs fewer steps.
* Models are frozen, know no device and no dtype (they follow the parameters') and keep no state.
"""

from __future__ import annotations

from typing import Protocol

import torch

from recon_core.signal_models.inversion_recovery import (
    InversionRecovery,
    ThreeParameterRecovery,
    look_locker_t1,
    relaxation_time,
)
from recon_core.signal_models.multi_echo import MultiEcho
from recon_core.signal_models.saturation_recovery import SaturationRecovery

__all__ = [
    "InversionRecovery",
    "MultiEcho",
    "SaturationRecovery",
    "SignalModel",
    "ThreeParameterRecovery",
    "look_locker_t1",
    "relaxation_time",
]


class SignalModel(Protocol):
    """What a solver needs to know of a model."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """One name for each entry of the parameter axis."""

    @property
    def units(self) -> tuple[str, ...]:
        """Their SI units; ``"1"`` for the images' own arbitrary unit."""

    @property
    def n_states(self) -> int:
        """Length of the state axis."""

    @property
    def is_complex(self) -> bool:
        """Whether the signal is complex."""

    def signal(self, parameters: torch.Tensor) -> torch.Tensor:
        """``q(p)``, ``(state, *pixels)``."""

    def signal_and_jacobian(self, parameters: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``q(p)`` and ``dq/dp``, ``(state, *pixels)`` and ``(state, parameter, *pixels)``."""

    def curvature(self, parameters: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """``sum_i Re conj(r_i) d^2q_i/dp^2``, real ``(parameter, parameter, *pixels)``, for any ``r`` of the signal's shape.

        With ``r = q(p) - y`` this is what Gauss-Newton leaves out of half the Hessian of ``sum |q - y|^2``.
        """
