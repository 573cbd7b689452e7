"""Does a susceptibility look turned round, as a phase of the other sign makes it? Nothing in a header tells, and no fit is worse for it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from recon_core.maps.spherical_mean import inner_distance
from recon_core.types import ParameterMap, Tensor

DEEP = 0.010
"""m; nearer to the surface air raises R2* as well, and gives the field either sign."""

FASTEST = 0.98
"""Quantile of R2* above which voxels hold iron or blood: nuclei and veins."""

LARGEST_VOXEL = 100e-9
"""m³; in larger ones neither nuclei nor veins are seen, and R2* is highest where the field bends within a voxel, beside air."""

LARGEST_RATE = 25.0
"""1/(s T), at which the fastest voxels may begin; iron and veins have less, a field that bends within a voxel gives more. So does bone,
which is diamagnetic and bright in trains of early echoes: what decays faster is no iron and does not count."""

LEAST_VOXELS = 1000
"""Deep voxels; of fewer the fastest tell nothing."""

TURNED = -2.0
"""Robust SD: simulated heads have 4.2 to 11.6 (SNR 20 to 140), and the negative of that where the sign is wrong."""

WORDS = (
    "R2* is highest where the susceptibility is low ({:.1f} SD below the brain's): iron and veins raise both. If veins and deep nuclei are "
    "dark in this map, the scanner's phase has the other sign: map_phase_sign = {} (docs/qsm.md)"
)


def iron_contrast(
    chi: ParameterMap, r2star: ParameterMap, mask: Tensor, voxel: Sequence[float], field_strength: float
) -> float | None:
    """Mean susceptibility of the voxels whose R2* is highest (`FASTEST`) less the median of all, over their robust SD.

    Iron and venous blood are paramagnetic and raise R2*; what raises it and is diamagnetic, calcium, is rare.

    Parameters
    ----------
    chi, r2star
        ``(z, y, x)``; what is invalid in either does not count.
    mask
        bool ``(z, y, x)``, of the brain; its outer `DEEP` do not count.
    voxel
        ``(z, y, x)`` in m.
    field_strength
        In T.

    Returns
    -------
    float or None
        ``None`` where too little is deep enough, all is uniform, voxels are too large (`LARGEST_VOXEL`), or what is fastest is not iron
        (`LARGEST_RATE`).
    """
    if math.prod(voxel) > LARGEST_VOXEL:
        return None
    deep = (inner_distance(mask, voxel) > DEEP) & chi.valid & r2star.valid
    if int(deep.sum()) < LEAST_VOXELS:
        return None
    values, rates = chi.data[deep].cpu().numpy(), r2star.data[deep].cpu().numpy()
    middle = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - middle)))
    most = LARGEST_RATE * field_strength
    if float(np.quantile(rates, FASTEST)) > most:
        return None
    iron = rates <= most
    fastest = iron & (rates > float(np.quantile(rates[iron], FASTEST)))
    if not (spread > 0 and fastest.any()):
        return None
    return (float(values[fastest].mean()) - middle) / spread


def note_of_sign(contrast: float | None, chosen: str) -> str:
    """What to tell of an `iron_contrast` that looks turned round, where the phase sign is ``chosen``; empty where it does not."""
    if contrast is None or contrast > TURNED:
        return ""
    return WORDS.format(-contrast, "positive" if chosen == "negative" else "negative")
