"""What the fit of a recovery leaves in each image, and what it takes up of a change of one image: to first order, pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.signal_models import SaturationRecovery, ThreeParameterRecovery

Tensor = torch.Tensor


@dataclass(frozen=True)
class RecoveryResidual:
    """Pixels and the recovery that was fitted to them, float64.

    Attributes
    ----------
    signal, residual
        ``(state, pixel)``: of the fit, and what the images have besides that no parameter can imitate; along the magnetisation.
    jacobian, estimate
        ``(state, parameter, pixel)``: change of the signal with each parameter, and ``(parameter, state, pixel)``: of the parameters with
        each image.
    t1_change
        ``(state, pixel)``: ``d ln T1`` with each image.
    """

    signal: Tensor
    residual: Tensor
    jacobian: Tensor
    estimate: Tensor
    t1_change: Tensor

    @classmethod
    def of(
        cls, images: Tensor, phase: Tensor | None, parameters: Tensor, times: Sequence[float], inside: Tensor
    ) -> RecoveryResidual:
        """Arguments as in `recon_core.maps.state_motion.moved_state`."""
        signal, jacobian = _model(times, parameters).signal_and_jacobian(parameters.double())
        gram = torch.einsum("spn,sqn->npq", jacobian, jacobian)
        estimate = torch.einsum("npq,sqn->psn", torch.linalg.pinv(gram, hermitian=True), jacobian)
        axis = (
            along_magnetisation(images, phase)[:, inside] if phase is not None else images[:, inside].abs() * signal.sign()
        )
        residual = axis.double() - signal
        residual = residual - torch.einsum("spn,ptn,tn->sn", jacobian, estimate, residual)
        t1_change = torch.einsum("pn,psn->sn", _relative_slope(parameters.double()), estimate)
        return cls(signal, residual, jacobian, estimate, t1_change)


def along_magnetisation(images: Tensor, phase: Tensor | None) -> Tensor:
    """Real: the part of ``(..., z, y, x)`` that has the magnetisation's phase, or the magnitude."""
    if phase is None:
        return images.abs() if images.is_complex() else images
    return (images * torch.polar(torch.ones_like(phase), -phase)).real


def _model(times: Sequence[float], parameters: Tensor) -> SaturationRecovery | ThreeParameterRecovery:
    if len(parameters) == 2:
        return SaturationRecovery(tuple(times), is_complex=False)
    return ThreeParameterRecovery(tuple(times))


def _relative_slope(parameters: Tensor) -> Tensor:
    """``d ln T1 / dp``, ``(parameter, pixel)``."""
    rate = parameters[-1]
    if len(parameters) == 2:
        return torch.stack((torch.zeros_like(rate), -1 / rate))
    a, b, _ = parameters
    return torch.stack((-b / (a * (b - a)), 1 / (b - a), -1 / rate))
