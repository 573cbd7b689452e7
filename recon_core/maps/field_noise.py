"""How noisy a field map is, by the map itself."""

from __future__ import annotations

import torch

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
