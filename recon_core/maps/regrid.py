"""Maps that a method delivers on the encoded grid, moved to the console's matrix.

Images are interpolated by zero-filling, which is exact for what was measured. A map is no linear function of the signal: across
an edge sinc interpolation would ring with values that no tissue has, and empty pixels (0) would bleed into their neighbours. So
maps are interpolated linearly between *valid* neighbours, and phases (unit rad) take the nearest pixel, because they wrap.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from recon_core.types import ParameterMap, ScanInfo

Tensor = torch.Tensor


def map_on_recon_matrix(parameter: ParameterMap, scan: ScanInfo) -> ParameterMap:
    """A map ``(z, y, x)`` of ``scan.matrix`` on ``scan.recon_matrix``, at the same places as `to_recon_matrix` puts images.

    A new pixel is valid where at least half of the weight of its (up to 8) neighbours is; their weighted mean is its value.
    """
    if scan.matrix == scan.recon_matrix and scan.fov[1:] == scan.recon_fov[1:]:
        return parameter
    nearest = parameter.unit == "rad"
    weight = parameter.valid.to(torch.float32)
    data = torch.where(parameter.valid, parameter.data, 0.0)
    for i, axis in enumerate((-3, -2, -1)):
        n, recon_n = scan.matrix[i], scan.recon_matrix[i]
        if n == 1 and recon_n == 1:
            continue
        fine = max(1, round(recon_n * scan.fov[i] / scan.recon_fov[i]))
        position = (torch.arange(recon_n, device=data.device, dtype=torch.float64) - recon_n // 2) * n / fine + n // 2
        data, weight = (_sample(a, axis, position, nearest=nearest) for a in (data, weight))
    valid = weight >= 0.5
    return replace(parameter, data=torch.where(valid, data / weight.clamp_min(1e-6), 0.0), valid=valid)


def _sample(array: Tensor, axis: int, position: Tensor, *, nearest: bool) -> Tensor:
    """Linear interpolation along one axis at fractional indices; outside there is nothing (0)."""
    n = int(array.shape[axis])
    position = position.round() if nearest else position
    low = position.floor()
    share = (position - low).to(array.dtype)
    shape = [-1 if a == axis % array.ndim else 1 for a in range(array.ndim)]
    below, above = (
        array.index_select(axis, index.clamp(0, n - 1).long()) * (part * ((index >= 0) & (index < n))).reshape(shape)
        for index, part in ((low, 1 - share), (low + 1, share))
    )
    return below + above
