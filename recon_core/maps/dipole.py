"""Dipole inversion: local field to susceptibility, both in ppm.

The dipole has no response on a cone in k-space, so every method adds an assumption: none but a threshold (TKD), few edges
(TV-ADMM), or edges only where the magnitude has them (`recon_core.maps.medi`). Fields are ``(z, y, x)``, lengths m. A field
says nothing about the mean of the susceptibility: every map states the region whose mean is its zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.errors import DataError, NumericalError
from recon_core.maps.dipole_kernel import DipoleOperator
from recon_core.maps.field_checks import checked_field, checked_mask, squared_weights
from recon_core.maps.field_noise import field_noise, unexplained_field
from recon_core.maps.finite_differences import divergence, gradient, periodic_laplacian, relative_steps
from recon_core.settings import setting
from recon_core.types import ParameterMap

Tensor = torch.Tensor


ROUGH = 2.0
"""Times the tolerance at which a minimisation ends that another one goes on from."""


@dataclass(frozen=True)
class TKDSettings:
    """Thresholded k-space division."""

    threshold: float = setting(0.2, "Least magnitude of the dipole that is divided by", low=0.01, high=0.6)
    correct: bool = setting(True, "Divide by the mean response, so that contrasts are not underestimated")


@dataclass(frozen=True)
class TVSettings:
    """Total variation by ADMM. Weights multiply ``|gradient|`` in ppm per mean voxel side; data are in ppm."""

    weight: float = setting(1.5e-4, "Weight of the total variation", unit="ppm", low=1e-8, high=1.0)
    noise_weight: float = setting(
        0.1, "The weight's square is greater by that of this many SD of the field's disturbance", low=0.0, high=10.0
    )
    added_back: int = setting(1, "Bregman iterations: how often the field's residual is added to it", low=0, high=10)
    shrinkage: float = setting(
        0.011, "ADMM: what a step takes off the gradient's copy: speed only", unit="ppm", low=1e-6, high=10.0
    )
    data_penalty: float = setting(0.1, "ADMM penalty of the field's copy: speed only", low=1e-6, high=100.0)
    max_iterations: int = setting(400, "Most steps", low=1, high=10000)
    tolerance: float = setting(2e-3, "Relative change of the map to stop at", low=0.0, high=1.0)


@dataclass(frozen=True)
class Susceptibility:
    """A susceptibility map and how it came about.

    Attributes
    ----------
    chi
        ``QSM`` in ppm, valid inside the mask, zero outside; mean zero in ``reference``.
    reference
        Name of the reference region, as it is reported.
    iterations, change, converged
        Of the solver; ``change`` is the last relative change of the map.
    """

    chi: ParameterMap
    reference: str
    iterations: int
    change: float
    converged: bool


def tkd(
    local: Tensor,
    mask: Tensor,
    voxel: Sequence[float],
    b0: Sequence[float],
    *,
    reference: Tensor | None = None,
    reference_name: str = "",
    settings: TKDSettings | None = None,
) -> Susceptibility:
    """Thresholded k-space division: ``chi = F^-1 [F f / D]`` with ``|D|`` held at the threshold or above.

    Where it is held the response ``D / held D`` is below 1 and a contrast loses about the mean of that; ``correct`` divides by
    it.

    Parameters
    ----------
    local
        Local field in ppm, real ``(z, y, x)``; only values inside ``mask`` are used.
    mask
        bool ``(z, y, x)``.
    voxel, b0
        ``(z, y, x)``: sides in m, direction of B0 in the image frame.
    reference, reference_name
        Region whose mean is zero, bool ``(z, y, x)``, and what to call it; the whole mask if ``None``.

    Raises
    ------
    DataError
        Shapes that do not fit, empty masks, a field that is not finite.

    References
    ----------
    Shmueli et al., Magn. Reson. Med. 62 (2009) 1510; Schweser et al., ibid. 69 (2013) 1581 (correction).
    """
    s = settings or TKDSettings()
    inside, data = checked_field(local, mask, "TKD")
    operator = DipoleOperator(local.shape, voxel, b0, data)
    d = operator.spectrum
    held = torch.where(d < 0, -1.0, 1.0) * d.abs().clamp_min(s.threshold)
    chi = torch.fft.irfftn(torch.fft.rfftn(data, s=operator.padded) / held, s=operator.padded)
    if s.correct:
        chi /= mean_response(d / held, operator.padded[2])
    return referenced(operator.crop(chi), inside, reference, reference_name, "TKD")


def mean_response(response: Tensor, n: int) -> float:
    """Mean over all of k-space of a real response that is given on the half spectrum of ``n`` samples along x."""
    twice = torch.full((response.shape[2],), 2.0, dtype=torch.float64, device=response.device)
    twice[0] = 1.0
    if n % 2 == 0:
        twice[-1] = 1.0
    total = (response.double() * twice).sum()
    return float(total) / (response.shape[0] * response.shape[1] * n)


def tv_admm(
    local: Tensor,
    mask: Tensor,
    voxel: Sequence[float],
    b0: Sequence[float],
    *,
    weights: Tensor | None = None,
    reference: Tensor | None = None,
    reference_name: str = "",
    settings: TVSettings | None = None,
) -> Susceptibility:
    """``min_chi 1/2 |w (D chi - f)|^2 + lambda sum |grad chi|`` by ADMM, twice: the second time of ``f + (f - D chi)``.

    ``lambda^2 = weight^2 + (noise_weight sigma)^2``, ``sigma`` the noise of the field (`field_noise`) or, if that is more, what no
    susceptibility explains of it (`unexplained_field`). Total variation takes that much off every contrast; adding the residual to the
    data (a Bregman iteration) gives it back, and less of the noise. The second minimisation goes on from where the first one ends.
    ``max_iterations`` are of both together.

    Two copies, ``z = grad chi`` and ``y = D chi``, leave only closed forms: a division in k-space for ``chi``, shrinkage of the
    gradient's length, a weighted mean for ``y``. Outside the mask ``w`` is 0, so nothing is claimed about the field there.

    Parameters
    ----------
    weights
        Proportional to 1 / SD of the field, any scale (brought to mean square 1 inside the mask); 1 if ``None``.
    local, mask, voxel, b0, reference, reference_name
        As in `tkd`.

    Raises
    ------
    DataError
        As `tkd`.
    NumericalError
        The iteration diverged.

    References
    ----------
    Bilgic et al., Magn. Reson. Med. 72 (2014) 1444; Milovic et al., ibid. 80 (2018) 814 (both copies); Osher et al., Multiscale Model.
    Simul. 4 (2005) 460 (Bregman iterations).
    """
    s = settings or TVSettings()
    inside, data = checked_field(local, mask, "TV-ADMM")
    operator = DipoleOperator(local.shape, voxel, b0, data)
    known = squared_weights(weights, inside, data)
    squared = operator.pad(known)
    given = operator.pad(data).mul_(squared)  # w^2 f
    disturbance = max(field_noise(data, inside), unexplained_field(data, inside, voxel, operator, known))
    weight = math.hypot(s.weight, s.noise_weight * disturbance)
    split = _Splitting(operator, relative_steps(voxel), squared, given, weight, s)
    seen, done = given, 0
    for stage in range(s.added_back + 1):
        left = s.added_back - stage  # a minimisation whose residual is only added back need not be as close
        done += split.minimise(seen, max(1, (s.max_iterations - done) // (left + 1)), s.tolerance * (ROUGH if left else 1))
        seen = seen + given - squared * split.field
    name = "TV-ADMM"
    return referenced(
        operator.crop(split.chi), inside, reference, reference_name, name, done, split.change, split.change <= s.tolerance
    )


class _Splitting:
    """ADMM's copies and multipliers on the padded volume, from which a second minimisation, of other data, goes on.

    Attributes
    ----------
    chi, field
        Susceptibility and ``D chi``, ppm.
    change
        Last relative change of ``chi``.
    """

    def __init__(
        self,
        operator: DipoleOperator,
        steps: Sequence[float],
        squared: Tensor,
        seen: Tensor,
        weight: float,
        settings: TVSettings,
    ) -> None:
        s, shape, d = settings, operator.padded, operator.spectrum
        self._settings, self._steps, self._d, self._shape = s, steps, d, shape
        self._denominator = squared + s.data_penalty  # of y's update
        self._penalty = weight / s.shrinkage  # a weight that follows the noise then needs no more steps
        self._system = self._penalty * periodic_laplacian(shape, steps, squared) + s.data_penalty * d.square()
        self._system[0, 0, 0] = 1.0  # DC: no data, no edges; stays zero
        self._z, self._z_dual = (squared.new_zeros((3, *shape)) for _ in range(2))
        self._y, self._y_dual = seen / self._denominator, squared.new_zeros(shape)
        self.chi, self.field = squared.new_zeros(shape), squared.new_zeros(shape)
        self.change = math.inf

    def minimise(self, seen: Tensor, max_iterations: int, tolerance: float) -> int:
        """How many steps it took, two or more where allowed (the first knows nothing of other data); ``seen`` is ``w^2 f``."""
        for done in range(1, max_iterations + 1):
            self._step(seen)
            if not self.change < math.inf:
                raise NumericalError("not finite", where="TV-ADMM", got=f"iteration {done}")
            if done > 1 and self.change <= tolerance:
                return done
        return max_iterations

    def _step(self, seen: Tensor) -> None:
        s, steps = self._settings, self._steps
        spectrum = torch.fft.rfftn(divergence(self._z - self._z_dual, steps, periodic=True)).mul_(-self._penalty)
        spectrum += torch.fft.rfftn(self._y - self._y_dual).mul_(s.data_penalty * self._d)
        spectrum /= self._system
        spectrum[0, 0, 0] = 0.0
        chi = torch.fft.irfftn(spectrum, s=self._shape)
        self.field = torch.fft.irfftn(spectrum.mul_(self._d), s=self._shape)
        size = float(torch.linalg.vector_norm(chi))
        self.change = float(torch.linalg.vector_norm(chi - self.chi)) / size if size > 0 else 0.0
        self.chi = chi
        self._z_dual += gradient(chi, steps, periodic=True)
        length = self._z_dual.square().sum(0).sqrt_()  # five times quicker than vector_norm over the first axis
        tiny = torch.finfo(length.dtype).tiny
        self._z = self._z_dual * (1 - s.shrinkage / length.clamp_min(tiny)).clamp_min(0)
        self._z_dual -= self._z
        self._y_dual += self.field
        self._y = (seen + s.data_penalty * self._y_dual) / self._denominator
        self._y_dual -= self._y


def referenced(
    chi: Tensor,
    inside: Tensor,
    reference: Tensor | None,
    reference_name: str,
    method: str,
    iterations: int = 0,
    change: float = 0.0,
    converged: bool = True,
) -> Susceptibility:
    """The map with its mean over the reference region taken off, zero outside ``inside``.

    Raises
    ------
    DataError
        The reference region is empty inside the mask.
    NumericalError
        The map is not finite.
    """
    region = inside if reference is None else checked_mask(reference, chi.shape, f"{method} reference region") & inside
    if not bool(region.any()):
        raise DataError("reference region lies outside the mask", where=method)
    name = reference_name or ("whole mask" if reference is None else "given region")
    data = torch.where(inside, chi - float(chi[region].double().mean()), 0.0).to(torch.float32)
    if not bool(torch.isfinite(data).all()):
        raise NumericalError("susceptibility is not finite", where=method)
    result = ParameterMap("QSM", data, "ppm", inside, f"{method}, zero: mean of {name}")
    return Susceptibility(result, name, iterations, change, converged)
