"""MEDI: dipole inversion whose edges lie where the magnitude has edges, and MEDI+0, whose fluid is uniform and zero."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from scipy import ndimage

from recon_core.errors import DataError
from recon_core.maps.dipole import Susceptibility, referenced
from recon_core.maps.dipole_kernel import DipoleOperator
from recon_core.maps.field_checks import checked_field, checked_mask, squared_weights
from recon_core.maps.finite_differences import divergence, gradient, relative_steps
from recon_core.settings import setting
from recon_core.solvers.cg import conjugate_gradient

Tensor = torch.Tensor

SMOOTHING = 1e-6  # ppm: below it the norm of an edge is a parabola


@dataclass(frozen=True)
class MEDISettings:
    """Of `medi`; the weight has the meaning of `TVSettings.weight`."""

    weight: float = setting(2e-4, "Weight of the edges that the magnitude lacks", unit="ppm", low=1e-8, high=1.0)
    csf_weight: float = setting(0.1, "Weight of the variance of the fluid (MEDI+0)", low=0.0, high=100.0)
    edge_fraction: float = setting(0.1, "Part of the magnitude's differences that count as edges", low=0.0, high=0.9)
    max_iterations: int = setting(10, "Most Gauss-Newton steps", low=1, high=1000)
    tolerance: float = setting(0.005, "Relative change of the map to stop at", low=0.0, high=1.0)
    cg_iterations: int = setting(100, "Most steps of conjugate gradients in each", low=1, high=10000)
    cg_tolerance: float = setting(0.1, "Relative residual of each linear system", low=1e-8, high=1.0)


def medi(
    local: Tensor,
    mask: Tensor,
    magnitude: Tensor,
    voxel: Sequence[float],
    b0: Sequence[float],
    *,
    weights: Tensor | None = None,
    csf: Tensor | None = None,
    radians_per_ppm: float | None = None,
    settings: MEDISettings | None = None,
) -> Susceptibility:
    """``min 1/2 |w (e^{i k D chi} - e^{i k f}) / k|^2 + weight |M grad chi|_1 + csf_weight/2 sum_csf (chi - mean_csf chi)^2``.

    ``M`` is 0 where the magnitude has an edge along that axis and 1 elsewhere. The exponentials (``k`` = ``radians_per_ppm``)
    make voxels with a wrong wrap harmless; without ``k`` the data term is ``1/2 |w (D chi - f)|^2``. Gauss-Newton with lagged
    weights of the edges, each step by conjugate gradients. Works on the volume with its margin, with the field outside the
    mask left open.

    Parameters
    ----------
    magnitude
        Any unit, ``(z, y, x)``, for the edges.
    weights
        As in `recon_core.maps.dipole.tv_admm`.
    csf
        Fluid, bool ``(z, y, x)`` (`csf_region`): made uniform, and its mean is the zero. ``None``: MEDI without it, zero is the
        mean of the mask.
    radians_per_ppm
        Phase per ppm at the echo time (or spacing) whose wraps are to be tolerated: ``2 pi gamma B0 TE 1e-6``.
    local, mask, voxel, b0
        As in `recon_core.maps.dipole.tkd`.

    Raises
    ------
    DataError
        Shapes that do not fit, empty masks, values that are not finite.
    NumericalError
        The iteration diverged.

    References
    ----------
    Liu T. et al., Magn. Reson. Med. 66 (2011) 777 and 69 (2013) 467 (nonlinear); Liu Z. et al., ibid. 79 (2018) 2795 (MEDI+0,
    Eq. 2). There lambda multiplies the data term; here the weight multiplies the edges, ``weight = 1 / (2 lambda)``.
    """
    s = settings or MEDISettings()
    inside, data = checked_field(local, mask, "MEDI")
    if magnitude.shape != local.shape or not bool(torch.isfinite(magnitude[inside]).all()):
        raise DataError("magnitude does not fit", where="MEDI", got=tuple(magnitude.shape), expected=tuple(local.shape))
    if radians_per_ppm is not None and not (math.isfinite(radians_per_ppm) and radians_per_ppm > 0):
        raise DataError("not a phase per ppm", where="MEDI", got=radians_per_ppm, expected="above zero")
    problem = _Problem(
        DipoleOperator(local.shape, voxel, b0, data),
        data,
        squared_weights(weights, inside, data),
        relative_steps(voxel),
        radians_per_ppm,
        None if csf is None else checked_mask(csf, local.shape, "MEDI cerebrospinal fluid") & inside,
        s,
    )
    smooth = smooth_places(magnitude, inside, problem.steps, s.edge_fraction)
    padded = data.new_ones((3, *problem.operator.padded))  # the margin has no edges: chi fades out in it
    z, y, x = local.shape
    padded[:, :z, :y, :x] = smooth

    chi = data.new_zeros(problem.operator.padded)
    change, done = float("inf"), 0
    for done in range(1, s.max_iterations + 1):
        grad = gradient(chi, problem.steps, periodic=True).mul_(padded)
        lagged = padded / (grad.square().sum(0) + SMOOTHING**2).sqrt() if done > 1 else padded / _typical(data, inside)
        step = problem.step(chi, lagged)
        chi = chi + step
        size = float(torch.linalg.vector_norm(chi))
        change = float(torch.linalg.vector_norm(step)) / size if size > 0 else 0.0
        if change <= s.tolerance:
            break
    method = "MEDI" if csf is None else "MEDI+0"
    name = "" if csf is None else "cerebrospinal fluid"
    cropped = problem.operator.crop(chi)
    return referenced(cropped, inside, problem.csf, name, method, done, change, change <= s.tolerance)


@dataclass(frozen=True)
class _Problem:
    operator: DipoleOperator
    field: Tensor
    squared: Tensor
    steps: tuple[float, float, float]
    scale: float | None
    csf: Tensor | None
    settings: MEDISettings

    def step(self, chi: Tensor, lagged: Tensor) -> Tensor:
        """One step of Gauss-Newton, by conjugate gradients with the diagonal as preconditioner.

        The lagged weights differ by four orders of magnitude between edges and plain tissue: without it most steps go there.
        """
        scale = self.diagonal(lagged).rsqrt_()
        hessian = self.hessian(lagged)
        s = self.settings
        found = conjugate_gradient(
            lambda x: hessian(x * scale).mul_(scale),
            self.descent(chi, lagged).mul_(scale),
            max_iterations=s.cg_iterations,
            tolerance=s.cg_tolerance,
            n_batch_axes=0,
        )
        return found.solution * scale

    def diagonal(self, lagged: Tensor) -> Tensor:
        """Of Gauss-Newton's matrix; the dipole's part by its mean, the fluid's left out."""
        total = torch.full_like(lagged[0], float(self.operator.spectrum.square().mean()))
        for axis, step in enumerate(self.steps):
            total += (self.settings.weight / step**2) * (lagged[axis] + lagged[axis].roll(1, axis))
        return total

    def descent(self, chi: Tensor, lagged: Tensor) -> Tensor:
        """Minus the gradient of the objective, on the padded volume."""
        misfit = self.field - self.operator.crop(self.operator.convolve(chi))
        if self.scale is not None:
            misfit = torch.sin(self.scale * misfit) / self.scale
        out = self.operator.convolve(self.operator.pad(misfit * self.squared))
        return out - self._regularised(chi, lagged)

    def hessian(self, lagged: Tensor) -> Callable[[Tensor], Tensor]:
        """Gauss-Newton's matrix (cosine of the misfit taken as 1), a function."""

        def apply(x: Tensor) -> Tensor:
            seen = self.operator.pad(self.operator.crop(self.operator.convolve(x)) * self.squared)
            return self.operator.convolve(seen) + self._regularised(x, lagged)

        return apply

    def _regularised(self, x: Tensor, lagged: Tensor) -> Tensor:
        out = divergence(gradient(x, self.steps, periodic=True).mul_(lagged), self.steps, periodic=True)
        out.mul_(-self.settings.weight)
        if self.csf is not None and self.settings.csf_weight:
            part = self.operator.crop(x)
            fluid = part[self.csf]
            self.operator.crop(out)[self.csf] += self.settings.csf_weight * (fluid - fluid.mean())
        return out


def _typical(data: Tensor, inside: Tensor) -> float:
    """A length for the gradients of the first step, when there is no map yet: the field's RMS."""
    return max(float(data[inside].square().mean().sqrt()), SMOOTHING)


def smooth_places(magnitude: Tensor, inside: Tensor, steps: Sequence[float], edge_fraction: float) -> Tensor:
    """1 where the magnitude has no edge along an axis, 0 at the steepest ``edge_fraction`` of the mask's differences: ``(3, z, y, x)``."""
    steep = gradient(torch.where(inside, magnitude, 0.0), steps).abs_()
    # the step from the mask to the outside is no edge of the magnitude: it neither counts nor frees
    within = torch.stack([inside & inside.roll(-1, axis) for axis in range(3)])
    values = steep[within]
    if edge_fraction <= 0 or not len(values):
        return torch.ones_like(steep)
    rank = max(1, min(len(values), round(len(values) * (1 - edge_fraction))))
    threshold = values.kthvalue(rank).values
    return ((steep <= threshold) | ~within).to(magnitude.dtype)


def csf_region(
    r2star: Tensor, mask: Tensor, voxel: Sequence[float], *, threshold: float = 5.0, radius: float = 0.030, n_parts: int = 3
) -> Tensor:
    """Fluid of the ventricles: R2* below ``threshold`` within ``radius`` of the mask's centre, its largest connected parts.

    Parameters
    ----------
    r2star
        1/s, ``(z, y, x)``; 0 counts as unknown, not as fluid.
    voxel, radius
        m.
    threshold
        1/s.
    n_parts
        How many parts are kept.

    Raises
    ------
    DataError
        No fluid is found.

    References
    ----------
    Liu Z. et al., Magn. Reson. Med. 79 (2018) 2795, Fig. 1.
    """
    inside = checked_mask(mask, r2star.shape, "cerebrospinal fluid")
    places = inside.nonzero().double()
    centre = places.mean(0)
    sides = torch.tensor(tuple(voxel), dtype=torch.float64, device=r2star.device)
    grids = torch.meshgrid(
        *[
            (torch.arange(n, device=r2star.device) - c) * side
            for n, c, side in zip(r2star.shape, centre, sides, strict=True)
        ],
        indexing="ij",
    )
    near = grids[0] ** 2 + grids[1] ** 2 + grids[2] ** 2 <= radius**2
    candidates = (inside & near & (r2star > 0) & (r2star < threshold)).cpu().numpy()
    parts, n = ndimage.label(candidates)
    if n == 0:
        raise DataError(
            "no cerebrospinal fluid found",
            where="cerebrospinal fluid",
            expected=f"R2* below {threshold:g} 1/s within {radius * 1e3:g} mm of the brain's centre",
            remedy="The mean of the brain can be the zero: map_reference = brain, with map_inversion = tv, medi or tkd",
        )
    sizes = torch.bincount(torch.from_numpy(parts).reshape(-1))
    sizes[0] = 0
    kept = torch.argsort(sizes, descending=True)[: min(n_parts, n)]
    return torch.isin(torch.from_numpy(parts), kept).to(r2star.device)
