"""Background field removal: what sources outside the mask add to the field inside it.

All fields are real ``(z, y, x)`` in one unit (ppm here, but nothing depends on it), masks bool, lengths m. Every method returns
the local field, zero outside the mask that it is valid on, which is smaller than the given one for the methods of spheres.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from scipy.fft import next_fast_len
from scipy.ndimage import binary_dilation, distance_transform_edt

from recon_core.errors import DataError
from recon_core.maps.dipole_kernel import convolve_spectrum, point_dipole_spectrum
from recon_core.maps.field_checks import checked_field, squared_weights
from recon_core.maps.finite_differences import relative_steps
from recon_core.maps.spherical_mean import SphericalMean, inner_distance
from recon_core.settings import setting
from recon_core.solvers.cg import conjugate_gradient

Tensor = torch.Tensor


SURFACE = 0.008
"""Outliers are looked for in the outermost part of a mask that is as thick as this, m."""

DEEP, LEAST_DEEP = 0.010, 100
"""Voxels deeper than this, m, tell what a local field is like inside; fewer of them than this tell nothing."""

MOST_OUTLIERS = 0.05
"""Part of the voxels; more of them are no outliers."""


@dataclass(frozen=True)
class BackgroundSettings:
    """Of the three methods; each reads its own."""

    pdf_iterations: int = setting(300, "PDF: most steps of conjugate gradients", low=1, high=10000)
    pdf_tolerance: float = setting(1e-3, "PDF: relative residual of the normal equations to stop at", low=1e-8, high=1.0)
    pdf_gap: float = setting(
        1.2, "PDF: sources lie farther than this from the mask, in units of the mean voxel side", low=0.0, high=10.0
    )
    pdf_shell: float = setting(4.0, "PDF: and no farther than this, in the same unit", low=1.0, high=100.0)
    vsharp_radius: float = setting(0.014, "V-SHARP: radius of the largest sphere", unit="m", low=0.001, high=0.05)
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
    """Projection onto dipole fields: ``min_x |w (f - D x)|^2`` over sources ``x`` around the mask; local is ``f - D x``.

    Inside, the fields of outside sources are exactly the harmonic functions, and those of inside sources are nearly orthogonal
    to them. Two things keep it so on a grid. The sources are points (`point_dipole_spectrum`): with the band-limited kernel their
    ringing explains part of any field, and twice as much of the local one is lost (test_background.py). And they lie in a
    shell that does not touch the mask: what is farther out is some harmonic function as well, and what is nearer acts on single
    voxels. Conjugate gradients must arrive: hence the tolerance, and ``converged`` in the result.

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
    squared = squared_weights(weights, inside, data)
    box = _SourceBox(inside, voxel, b0, data, s)

    def normal(x: Tensor) -> Tensor:
        # the sources are zero outside the shell, and stay so: every product ends with it
        return box.sources(box.field(x).mul_(box.cut(squared)))

    rhs = box.sources(box.cut(data * squared))
    found = conjugate_gradient(normal, rhs, max_iterations=s.pdf_iterations, tolerance=s.pdf_tolerance, n_batch_axes=0)
    local = data.clone()
    box.cut(local).sub_(box.field(found.solution))
    return LocalField(local * inside, inside, int(found.iterations), float(found.residual), found.all_converged)


class _SourceBox:
    """The mask's bounding box with room for the shell of sources on all sides, periodic: images of sources stay outside the mask."""

    def __init__(
        self, inside: Tensor, voxel: Sequence[float], b0: Sequence[float], like: Tensor, settings: BackgroundSettings
    ) -> None:
        relative_steps(voxel)
        side = math.prod(voxel) ** (1 / 3)
        places = inside.nonzero()
        low, high = places.amin(0).tolist(), (places.amax(0) + 1).tolist()
        self._room = [math.ceil(settings.pdf_shell * side / v) for v in voxel]
        self._box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        self.shape = tuple(next_fast_len(b - a + 2 * r, real=True) for a, b, r in zip(low, high, self._room, strict=True))
        self._spectrum = point_dipole_spectrum(self.shape, voxel, b0, like)
        far = torch.from_numpy(
            distance_transform_edt(~(self._put(inside.to(like.dtype)) > 0).cpu().numpy(), sampling=tuple(voxel))
        )
        self._shell = ((far > settings.pdf_gap * side) & (far <= settings.pdf_shell * side)).to(like.device, like.dtype)

    def cut(self, x: Tensor) -> Tensor:
        """The bounding box of a volume, a view."""
        return x[self._box]

    def field(self, sources: Tensor) -> Tensor:
        """In the bounding box, of sources in the larger one."""
        room = tuple(slice(r, r + s.stop - s.start) for r, s in zip(self._room, self._box, strict=True))
        return convolve_spectrum(sources, self._spectrum, self.shape)[room]

    def sources(self, field: Tensor) -> Tensor:
        """Adjoint of `field`, restricted to the shell."""
        return convolve_spectrum(self._put_box(field), self._spectrum, self.shape).mul_(self._shell)

    def _put(self, x: Tensor) -> Tensor:
        return self._put_box(self.cut(x))

    def _put_box(self, x: Tensor) -> Tensor:
        out = x.new_zeros(self.shape)
        room = tuple(slice(r, r + n) for r, n in zip(self._room, x.shape, strict=True))
        out[room] = x
        return out


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
        raise _too_thin("V-SHARP", depth, 2 * step)
    filtered = torch.zeros_like(data)
    valid = torch.zeros_like(inside)
    outermost: SphericalMean | None = None
    # always down to one voxel: how thick a layer is lost must not depend on what is left over when radii are counted from the largest
    smaller = [k * step for k in range(int(largest / step + 1e-6), 0, -1)]
    for radius in [largest, *(r for r in smaller if r < largest - 1e-6 * step)]:
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
    depth = inner_distance(inside, voxel)
    valid = depth > radius
    if not bool(valid.any()):
        raise _too_thin("RESHARP", depth, radius)
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


def _too_thin(method: str, depth: Tensor, least: float) -> DataError:
    return DataError(
        "no sphere fits the mask",
        where=method,
        got=f"{float(depth.max()) * 1e3:.3g} mm deep",
        expected=f"more than {least * 1e3:.3g} mm",
        remedy="map_background = pdf keeps the whole of any mask",
    )


def without_outliers(local: LocalField, mask: Tensor, voxel: Sequence[float], most: float = 4.0) -> LocalField:
    """A local field without those places at the surface where it stands out from what it is inside.

    A mask that was found in magnitudes holds, here and there, a voxel of skull, sinus or vein, hundreds of times as magnetic as tissue. Its
    field is not what the inversion's model says, and the streaks it leaves cross the whole map.

    Parameters
    ----------
    mask
        bool ``(z, y, x)``: the one that the background was removed with; its surface is meant.
    voxel
        ``(z, y, x)`` in m.
    most
        Robust standard deviations of the deep voxels' field that are still believed. Left out is what exceeds them, with the voxels that
        touch it (sharing a face).

    Returns
    -------
    LocalField
        The same, if more than `MOST_OUTLIERS` of it stand out, if nothing is deep, or if the field inside is uniform.
    """
    out = outliers(local, mask, voxel, most)
    if out is None or int(out.sum()) > MOST_OUTLIERS * int(local.mask.sum()):
        return local
    out = torch.from_numpy(binary_dilation(out.cpu().numpy())).to(out.device) & local.mask
    return replace(local, field=local.field.masked_fill(out, 0.0), mask=local.mask & ~out)


def outliers(local: LocalField, mask: Tensor, voxel: Sequence[float], most: float = 4.0) -> Tensor | None:
    """Where a local field stands out at the surface: bool ``(z, y, x)``; ``None`` if nothing is deep, or the field inside is uniform.

    Parameters as in `without_outliers`.
    """
    depth = inner_distance(mask, voxel)
    inside = local.field[local.mask & (depth > DEEP)]
    if len(inside) < LEAST_DEEP:
        return None
    spread = 1.4826 * float((inside - inside.median()).abs().median())
    return local.mask & (depth < SURFACE) & (local.field.abs() > most * spread) if spread > 0 else None
