"""Gauss-Newton's equations of ``F(p) = sum_i |q_i(p) - y_i|^2 + sum_j lambda_j (p_j - p_reg_j)^2``, for every pixel at once."""

from __future__ import annotations

import torch

from recon_core.signal_models import SignalModel

Tensor = torch.Tensor


def normal_equations(
    linearised: tuple[Tensor, Tensor],
    data: Tensor,
    parameters: Tensor,
    weight: Tensor,
    reference: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """``F``, half its gradient and half its Hessian without curvature, added up in ``dtype``.

    Parameters
    ----------
    linearised
        ``q(p)``, ``(state, pixel)``, and ``dq/dp``, ``(state, parameter, pixel)``.
    data
        ``y``, ``(state, pixel)``.
    parameters, weight, reference
        ``p``, ``lambda`` and ``p_reg``, real ``(parameter, pixel)``.

    Returns
    -------
    cost, gradient, hessian
        ``(pixel,)``; ``Re J^H (q - y) + lambda (p - p_reg)``, ``(parameter, pixel)``; ``Re J^H J + lambda``, packed
        ``(pair, pixel)`` as in `small_systems`.
    """
    signal, jacobian = linearised
    residual = real_rows(signal - data).to(dtype)
    columns = real_rows(jacobian).to(dtype)
    n_states, n_parameters = columns.shape[:2]
    away = (parameters - reference).to(dtype)
    pulled = weight.to(dtype) * away

    def dot(a: Tensor, b: Tensor) -> Tensor:
        # added up state by state: the order, and so the rounding, is the same for any number of pixels
        total = a[0] * b[0]
        for i in range(1, n_states):
            total += a[i] * b[i]
        return total[..., 0] + total[..., 1] if total.shape[-1] == 2 else total[..., 0]

    cost = dot(residual, residual)
    gradient, hessian = [], []
    for i in range(n_parameters):
        cost = cost + pulled[i] * away[i]
        gradient.append(dot(columns[:, i], residual) + pulled[i])
        for j in range(i + 1):
            entry = dot(columns[:, i], columns[:, j])
            hessian.append(entry + weight[i] if i == j else entry)
    return cost, torch.stack(gradient), torch.stack(hessian)


def packed_curvature(model: SignalModel, parameters: Tensor, residual: Tensor, dtype: torch.dtype) -> Tensor:
    """What Gauss-Newton leaves out of half the Hessian, packed ``(pair, pixel)``; ``residual`` is ``q(p) - y``."""
    second = model.curvature(parameters, residual)
    n = len(parameters)
    return torch.stack([second[i, j] for i in range(n) for j in range(i + 1)]).to(dtype)


def real_rows(t: Tensor) -> Tensor:
    """Real rows: the real and imaginary parts as a trailing axis (of length 1 for real tensors)."""
    return torch.view_as_real(t) if t.is_complex() else t[..., None]
