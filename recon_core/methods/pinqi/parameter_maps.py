"""From PINQI's parameters to maps with an error for every pixel, and a judgement of the whole against the measured data.

The network's prediction ends in a regularised fit, so neither its own residual nor its spread under noise tells how wrong it is: a
regulariser makes results *agree*. What is known is what the data alone can say. Hence

* the standard deviation of T1 is the Cramer-Rao bound of an unregularised fit at the solution, from the measured noise, as if the
  images had been unfolded without loss (geometry factor 1);
* where the maps contradict the data by more than noise does, it grows by that factor;
* the signal of the *maps*, ``A q(p)``, is compared with all measured samples: only the maps reach the reader.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional

from recon_core.methods.pinqi.model import PinqiOutput
from recon_core.methods.pinqi.settings import Settings
from recon_core.operators.batched_sense import BatchedSense
from recon_core.signal_models import SignalModel, relaxation_time
from recon_core.solvers.normal_equations import normal_equations
from recon_core.solvers.small_systems import cholesky, substitute
from recon_core.types import ParameterMap

Tensor = torch.Tensor

WINDOW = 7  # pixels: a residual is judged as a mean over so many squared
SIGNAL_QUANTILE = 0.999
LEAST_RESIDUAL = 0.8
"""Of the maps over a measured noise: good scans leave about 1 and more, however undersampled: maps are few numbers."""
AT_END = 0.01
"""Part of a limit of the predicted rate from which on a pixel counts as held by it: the fit is drawn there and ends close by."""


@dataclass(frozen=True)
class Agreement:
    """How well a solution explains one slice's data; noise-free data give a residual of 0 over a noise of 0, called 0.

    Attributes
    ----------
    images, maps
        RMS of ``A y - b`` and of ``A q(p) - b`` over all measured samples, as multiples of the noise.
    unexplained
        What noise does not explain of the maps' residual, as a part of the data's RMS.
    local
        float ``(y, x)``: RMS over states of the maps' residual, back-projected and averaged over a window, over what noise gives.
    misfit
        float ``(y, x)``: the same as a part of the local signal.
    """

    images: float
    maps: float
    unexplained: float
    local: Tensor
    misfit: Tensor

    @property
    def noise_too_loud(self) -> bool:
        """Whether even the noise in the data is less than was measured."""
        return 0 < self.maps < LEAST_RESIDUAL

    def fails(self, settings: Settings) -> bool:
        """Whether the maps contradict the data."""
        return self.maps > settings.quality_noise and self.unexplained > settings.quality_signal


def agreement(operator: BatchedSense, data: Tensor, found: PinqiOutput, signal: Tensor, noise: float) -> Agreement:
    """Compare images and maps with the measured samples of one slice.

    Parameters
    ----------
    operator
        Of one sample.
    data
        Weighted working data ``b``.
    found, signal
        What the network gave, and ``q(p)``, ``(1, state, x, y)``.
    noise
        SD of a complex sample of ``data``.
    """
    sampled = operator.weights[0] > 0  # (state, k1)
    n_samples = int(sampled.sum()) * data.shape[2] * data.shape[3]

    def rms(values: Tensor) -> float:
        return math.sqrt(float(values.abs().square().double().sum()) / n_samples)

    residual = operator.forward(signal) - data
    of_images, of_maps, of_data = rms(operator.forward(found.images) - data), rms(residual), rms(data)
    unexplained = math.sqrt(max(0.0, of_maps**2 - noise**2)) / of_data if of_data > 0 else 0.0
    share = operator.weights[0].square().mean(-1)[:, None, None]
    projected = operator.adjoint(residual)[0].abs().square()
    # A^H of noise has the variance noise^2 times the share of positions that were sampled
    over_noise = _windowed((projected / share).mean(0)).sqrt()
    strength = _windowed(signal[0].abs().square().mean(0)).sqrt()
    misfit = _windowed(projected.mean(0)).sqrt() / strength.clamp_min(1e-6)
    return Agreement(
        _over(of_images, noise), _over(of_maps, noise), unexplained, _over_noise(over_noise, noise).mT, misfit.mT
    )


def _over(value: float, noise: float) -> float:
    return value / noise if noise > 0 else (math.inf if value > 0 else 0.0)


def _over_noise(values: Tensor, noise: float) -> Tensor:
    return values / noise if noise > 0 else torch.zeros_like(values)


def _windowed(plane: Tensor) -> Tensor:
    """Mean over ``WINDOW`` pixels squared; at the border over those that exist."""
    return functional.avg_pool2d(plane[None, None], WINDOW, 1, WINDOW // 2, count_include_pad=False)[0, 0]


def image_noise_variance(operator: BatchedSense, noise: float) -> Tensor:
    """Variance of one real number of an unfolded image, per state, ``(state,)``: geometry factor 1.

    ``noise^2 / 2 / mean(w^2)``: an orthonormal FFT keeps the noise, and a state with one sample for R positions has R times as much.
    """
    return noise**2 / 2 / operator.weights[0].square().mean(-1)


def relaxation_deviation(model: SignalModel, parameters: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """T1 in s and its Cramer-Rao standard deviation, from the Fisher information ``sum_i Re J_i^H J_i / s_i^2`` at ``p``.

    Parameters
    ----------
    model
        Its last parameter is a rate in 1/s.
    parameters
        ``(parameter, *pixels)``.
    variance
        ``(state,)``, of the real (and of the imaginary) part of a sample; zeros give zeros.

    Returns
    -------
    t1, t1_sd
        ``(*pixels)``; infinite where the data do not determine the rate.

    References
    ----------
    Kay, Fundamentals of Statistical Signal Processing I (1993), Eq. 3.31 (Gaussian noise).
    """
    p = parameters.flatten(1)
    signal, jacobian = model.signal_and_jacobian(p)
    mean = variance.double().mean()
    relative = torch.where(mean > 0, variance.double() / mean.clamp_min(1e-300), 1.0)
    whitening = relative.rsqrt().to(p.dtype)  # relative, so that tiny noise stays within float32
    zero = torch.zeros_like(p)
    _, _, fisher = normal_equations((signal, jacobian * whitening[:, None, None]), signal, p, zero, zero, torch.float64)
    n = len(p)
    factor = cholesky(list(fisher.unbind(0)), n)
    unit = [torch.full_like(fisher[0], float(i == n - 1)) for i in range(n)]
    of_rate = substitute(factor, unit)[-1] * mean
    determined = factor[-1] > 0
    t1, t1_sd = relaxation_time(p[-1].double(), torch.where(determined, of_rate, torch.inf))
    assert t1_sd is not None
    shape = parameters.shape[1:]
    return t1.reshape(shape).to(parameters.dtype), t1_sd.reshape(shape).to(parameters.dtype)


def parameter_maps(
    model: SignalModel,
    operator: BatchedSense,
    found: PinqiOutput,
    agreed: Agreement,
    noise: float,
    scale: float,
    settings: Settings,
    comment: str,
    rates: tuple[float, float] | None = None,
    *,
    believed: bool = True,
) -> tuple[tuple[ParameterMap, ...], float]:
    """T1 and its SD (s), M0's magnitude (images' unit) and phase (rad): float32 ``(1, y, x)``, one common ``valid``, 0 elsewhere.

    Also the part of the pixels with signal that are valid. Not valid: no signal, a fit that did not converge or ended on a bound, an
    implausible or undetermined T1, and, where the maps as a whole contradict the data, pixels whose surroundings do.

    Parameters
    ----------
    scale
        Measured units per unit of the network's images.
    comment
        Said with every map.
    rates
        Between which the network's prediction is held, in 1/s: a pixel at an end of it is as little believed as one on a bound of the fit.
    believed
        False: no pixel is.
    """
    parameters = operator.leave_image(found.parameters)[0]  # (parameter, y, x)
    t1, crlb = relaxation_deviation(model, parameters, image_noise_variance(operator, noise))
    deviation = crlb * agreed.local.clamp_min(1.0)
    m0 = torch.complex(parameters[0], parameters[1])
    strength = operator.leave_image(found.images)[0].abs().square().mean(0).sqrt()
    has_signal = (strength >= settings.signal_floor * _quantile(strength)) & (strength > 0)
    valid = has_signal & believed & (parameters[-1] > 0) & (t1 >= settings.t1_min) & (t1 <= settings.t1_max)
    if rates is not None:
        valid &= (parameters[-1] > rates[0] * (1 + AT_END)) & (parameters[-1] < rates[1] * (1 - AT_END))
    valid &= deviation <= settings.max_relative_sd * t1
    if found.nonlinear:
        last = found.nonlinear[-1]
        valid &= last.converged[0].mT & ~last.at_bound[0].any(0).mT
    if agreed.fails(settings) and settings.quality_failure != "tell":
        valid &= (agreed.local <= settings.quality_noise) | (agreed.misfit <= settings.quality_signal)

    shown = valid[None]

    def full(name: str, values: Tensor, unit: str, more: str = "") -> ParameterMap:
        data = torch.where(shown, values, 0.0).to(torch.float32)
        return ParameterMap(name, data, unit, shown, "; ".join(part for part in (comment, more) if part))

    source = "Cramer-Rao bound of an unregularised fit, larger where the maps contradict the data"
    maps = (
        full("T1", t1, "s"),
        full("T1_SD", deviation, "s", source),
        full("M0", m0.abs() * scale, "1"),
        full("M0_phase", m0.angle(), "rad"),
    )
    return maps, float(valid.sum()) / max(1, int(has_signal.sum()))


def _quantile(values: Tensor) -> float:
    flat = values.flatten()
    return float(flat.kthvalue(max(1, math.ceil(SIGNAL_QUANTILE * flat.numel()))).values)
