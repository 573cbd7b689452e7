"""How noisy a field map is, and how much of it no susceptibility explains, by the map itself."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recon_core.maps.dipole_kernel import DipoleOperator
from recon_core.maps.finite_differences import periodic_laplacian, relative_steps
from recon_core.maps.spherical_mean import inner_distance

Tensor = torch.Tensor

TO_SD = 1.4826
"""Standard deviation of a Gaussian over its median magnitude."""


def field_noise(field: Tensor, inside: Tensor) -> float:
    """Typical standard deviation of the noise from voxel to voxel, field's unit; 0 where nothing is thick enough to tell.

    The median magnitude of the finest diagonal Haar coefficients: differences along all three axes at once, over blocks of
    2 x 2 x 2 voxels. Fields of sources are smooth and leave little there (1 ppb in a head of voxels of 3 mm). It knows what was
    smoothed away and what unfolding added, which the scanner's noise does not.

    Parameters
    ----------
    field, inside
        ``(z, y, x)``, real and bool; only blocks that are inside as a whole count.

    References
    ----------
    Donoho & Johnstone, Biometrika 81 (1994) 425, section 6.
    """
    difference, whole = field, inside
    for axis, n in enumerate(field.shape):
        difference = (difference.narrow(axis, 1, n - 1) - difference.narrow(axis, 0, n - 1)) * 0.5**0.5
        whole = whole.narrow(axis, 1, n - 1) & whole.narrow(axis, 0, n - 1)
    values = difference[whole]
    return TO_SD * float(values.abs().median()) if len(values) else 0.0


CONE = 0.05
"""Least magnitude of the dipole off its cone."""

SPREAD = 1 / 3
"""Part of a field's amplitude that the border of the mask spreads onto the cone: up to 0.31 in simulated heads."""

BORDER = 4.0
"""Width in voxels over which the field fades out towards the border."""

LONGEST = 12.0
"""Waves longer than this, in voxels, are what the border spreads most."""

LEAST_DEPTH = 12.0
"""Voxels; a mask whose deepest voxel lies less deep spreads more than `SPREAD` onto the cone: in slabs of a simulated head whose field is
explained, 5 to 11 voxels deep, 7 to 4 ppb would be found, from 12 voxels on none."""


HARDLY_KNOWN = 0.1
"""Weight over the mask's root mean square below which a voxel's field is what its neighbours say rather than its own: the inversion
hardly hears it either."""

AROUND = 7
"""Voxels along an axis whose mean that is."""

AWAY = 1e-3
"""Weight, over the mask's mean square, of no field at all: what counts where everything around is hardly known."""


def unexplained_field(
    field: Tensor, inside: Tensor, voxel: Sequence[float], operator: DipoleOperator, squared: Tensor | None = None
) -> float:
    """What no susceptibility explains, as the SD of the white noise that would disturb total variation as much; field's unit.

    ``sigma^2 = <|F|^2>_cone - SPREAD^2 <|F|^2>_all``, 0 if negative, means weighted by ``1 / |k|^2``. Where the dipole is zero a field of
    isotropic sources has nothing but what the border spreads there; noise, background that is left and the field of anisotropic
    tissue have as much as elsewhere. Total variation yields to a disturbance by its integral (``1 / |k|``), so that a smooth one, which
    `field_noise` does not see, does more harm. 0 where the mask is too thin to tell (`LEAST_DEPTH`).

    Parameters
    ----------
    field, inside
        ``(z, y, x)``, real and bool.
    voxel
        Sides ``(z, y, x)``, m.
    operator
        Dipole of that volume.
    squared
        ``w^2`` of `squared_weights`, ``(z, y, x)``; ``None``: one for all. What is `HARDLY_KNOWN` does not count.
    """
    if squared is not None:
        field = _known(field, squared)
    depth = inner_distance(inside, (1.0, 1.0, 1.0))
    if float(depth.max()) < LEAST_DEPTH:
        return 0.0
    fade = (depth / BORDER).clamp(0, 1).mul_(math.pi / 2).sin_().square_().to(field.dtype)
    total = fade.square().sum()
    faded = operator.pad((field - (field * fade).sum() / fade.sum()) * fade)
    power = torch.fft.rfftn(faded).abs().square_() / total
    square = periodic_laplacian(operator.padded, relative_steps(voxel), field)
    short = square > (2 * math.pi / LONGEST) ** 2
    cone = short & (operator.spectrum.abs() < CONE)
    if not bool(cone.any()):
        return 0.0
    on_cone, everywhere = (float((power[part] / square[part]).sum() / (1 / square[part]).sum()) for part in (cone, short))
    return math.sqrt(max(on_cone - SPREAD**2 * everywhere, 0.0))


def _known(field: Tensor, squared: Tensor) -> Tensor:
    """The field; where its weight is small, the weighted mean around."""
    weighted, weight = (
        torch.nn.functional.avg_pool3d(v[None, None], AROUND, stride=1, padding=AROUND // 2)[0, 0]
        for v in (field * squared, squared)
    )
    trust = squared / (squared + HARDLY_KNOWN**2)
    return trust * field + (1 - trust) * weighted / (weight + AWAY)
