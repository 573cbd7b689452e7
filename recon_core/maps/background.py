"""Background field removal: what sources outside the mask add to the field inside it.

All fields are real ``(z, y, x)`` in one unit (ppm here, but nothing depends on it), masks bool, lengths m. Every method returns
the local field, zero outside the mask that it is valid on, which is smaller than the given one for the methods of spheres.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.errors import DataError
from recon_core.maps.dipole_kernel import DipoleOperator
from recon_core.maps.field_checks import checked_field, squared_weights
from recon_core.maps.spherical_mean import SphericalMean, inner_distance
from recon_core.settings import setting
from recon_core.solvers.cg import conjugate_gradient

Tensor = torch.Tensor


@dataclass(frozen=True)
class BackgroundSettings:
    """Of the three methods; each reads its own."""

    pdf_iterations: int = setting(400, "PDF: most steps of conjugate gradients", low=1, high=10000)
    pdf_tolerance: float = setting(3e-3, "PDF: relative residual of the normal equations to stop at", low=1e-8, high=1.0)
    vsharp_radius: float = setting(0.012, "V-SHARP: radius of the largest sphere", unit="m", low=0.001, high=0.05)
    vsharp_threshold: float = setting(0.05, "V-SHARP: truncation of the inverse filter", low=0.0, high=1.0)
    resharp_radius: float = setting(0.006, "RESHARP: radius of the sphere", unit="m", low=0.001, high=0.05)
    resharp_weight: float = setting(1e-3, "RESHARP: Tikhonov weight", low=0.0, high=1.0)
    resharp_iterations: int = setting(100, "RESHARP: most steps of conjugate gradients", low=1, high=10000)
    resharp_tolerance: float = setting(1e-3, "RESHARP: relative residual to stop at", low=1e-8, high=1.0)


@dataclass(frozen=True)
class LocalField:
    """The result of a background removal.

    Attributes
    ----------
    field
        Local field ``(z, y, x)``, input's unit, zero outside ``mask``.
    mask
        bool ``(z, y, x)``: where it is valid.
    iterations
        Of conjugate gradients; 0 for V-SHARP.
    residual
        Relative residual of the normal equations at the end; 0 for V-SHARP.
    converged
        ``False``: the steps ran out before the tolerance.
    """

    field: Tensor
    mask: Tensor
    iterations: int
    residual: float
    converged: bool


def pdf(
    field: Tensor,
    mask: Tensor,
    voxel: Sequence[float],
    b0: Sequence[float],
    *,
    weights: Tensor | None = None,
    settings: BackgroundSettings | None = None,
) -> LocalField:
    """Projection onto dipole fields: ``min_x |w (f - D x)|^2`` over sources ``x`` outside the mask; local is ``f - D x``.

    The field of a dipole inside is nearly orthogonal to all fields of dipoles outside, so at the minimum it stays. The margin
    around the volume holds sources too (air, shoulders). Conjugate gradients must arrive: some 30 steps leave most of a strong
    background behind, hence the tolerance, and ``converged`` in the result.

    Parameters
    ----------
    field, mask
        Total field, unwrapped, and the region of interest.
    voxel, b0
        ``(z, y, x)``: sides in m, direction of B0 in the image frame.
    weights
        ``w``, proportional to 1 / SD of the field, any scale; 1 inside the mask if ``None``.

    Raises
    ------
    DataError
        Shapes that do not fit, an empty mask, a field that is not finite inside it.

    References
    ----------
    Liu et al., NMR Biomed. 24 (2011) 1129, Eqs. 4-6.
    """
    s = settings or BackgroundSettings()
    inside, data = checked_field(field, mask, "PDF")
    operator = DipoleOperator(field.shape, voxel, b0, data)
    squared = squared_weights(weights, inside, data)
    outside = operator.pad(inside.to(data.dtype)).eq(0).to(data.dtype)

    def normal(x: Tensor) -> Tensor:
        # the sources are zero inside, and stay so: every product ends with ``outside``
        seen = operator.pad(operator.crop(operator.convolve(x)) * squared)
        return operator.convolve(seen).mul_(outside)

    rhs = operator.convolve(operator.pad(data * squared)).mul_(outside)
    found = conjugate_gradient(normal, rhs, max_iterations=s.pdf_iterations, tolerance=s.pdf_tolerance, n_batch_axes=0)
    local = (data - operator.crop(operator.convolve(found.solution))) * inside
    return LocalField(local, inside, int(found.iterations), float(found.residual), found.all_converged)


def v_sharp(
    field: Tensor, mask: Tensor, voxel: Sequence[float], *, settings: BackgroundSettings | None = None
) -> LocalField:
    """SHARP with spheres that shrink towards the surface: ``f - S_r f``, the largest r that fits, deconvolved once.

    Valid on the mask without a layer as thick as the smallest sphere (one voxel of the longest side).

    References
    ----------
    Wu et al., Magn. Reson. Med. 67 (2012) 137; Schweser et al., NeuroImage 54 (2011) 2789.
    """
    s = settings or BackgroundSettings()
    inside, data = checked_field(field, mask, "V-SHARP")
    depth = inner_distance(inside, voxel)
    step = max(voxel)
    largest = min(s.vsharp_radius, float(depth.max()) - step)
    if largest < step:
        raise DataError("no sphere fits the mask", where="V-SHARP", got=f"{float(depth.max()) * 1e3:.3g} mm deep")
    filtered = torch.zeros_like(data)
    valid = torch.zeros_like(inside)
    outermost: SphericalMean | None = None
    n_radii = int((largest - step) / step + 1e-6)
    for radius in [largest - i * step for i in range(n_radii + 1)]:
        sphere = SphericalMean(field.shape, voxel, radius, data)
        outermost = outermost or sphere
        fits = (depth > radius) & ~valid  # the nearest voxel outside is out of reach
        filtered = torch.where(fits, sphere.forward(data), filtered)
        valid |= fits
    assert outermost is not None
    return LocalField(outermost.deconvolve(filtered, s.vsharp_threshold) * valid, valid, 0, 0.0, True)


def resharp(
    field: Tensor, mask: Tensor, voxel: Sequence[float], *, settings: BackgroundSettings | None = None
) -> LocalField:
    """``min_x |M' C (f - x)|^2 + weight |x|^2`` with ``C = 1 - S`` and ``M'`` the mask without a layer of the radius.

    References
    ----------
    Sun & Wilman, Magn. Reson. Med. 71 (2014) 1151, Eq. 5.
    """
    s = settings or BackgroundSettings()
    inside, data = checked_field(field, mask, "RESHARP")
    radius = max(s.resharp_radius, max(voxel))
    valid = inner_distance(inside, voxel) > radius
    if not bool(valid.any()):
        raise DataError("no sphere fits the mask", where="RESHARP", got=f"radius {radius * 1e3:.3g} mm")
    sphere = SphericalMean(field.shape, voxel, radius, data)
    rhs = sphere.adjoint(sphere.forward(data) * valid)
    found = conjugate_gradient(
        lambda x: sphere.adjoint(sphere.forward(x) * valid) + s.resharp_weight * x,
        rhs,
        max_iterations=s.resharp_iterations,
        tolerance=s.resharp_tolerance,
        n_batch_axes=0,
    )
    return LocalField(found.solution * valid, valid, int(found.iterations), float(found.residual), found.all_converged)
