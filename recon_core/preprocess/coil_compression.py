"""Fewer, virtual coils: one matrix for the whole volume (SVD), or one for each readout position (geometric).

Rows are orthonormal, so white noise stays white. Rotating virtual coils by a phase changes nothing physical; it is fixed so
that the same data give the same matrix.
"""

from __future__ import annotations

import torch

from recon_core.errors import DataError

Tensor = torch.Tensor

LOADING = 1e-3
"""Part of the volume's mean coil covariance that is added at each position: where there is only air, the volume decides."""


def compression_matrix(calibration: Tensor, n_virtual: int | None = None, *, energy: float | None = None) -> Tensor:
    """SVD coil compression.

    The leading left singular vectors of the ``coil x everything`` matrix of calibration data, conjugate transposed.

    Parameters
    ----------
    calibration
        complex64 ``(coil, ...)``, prewhitened, k-space or image (an orthonormal transform changes nothing).
    n_virtual, energy
        Exactly one of the two: the number of virtual coils (more than there are coils means all), or the part of the signal
        energy, 0 to 1, that they have to keep.

    Returns
    -------
    complex64 ``(virtual coil, coil)``, orthonormal rows, strongest first.

    Raises
    ------
    DataError
        No signal, not finite, or a setting out of its range.

    Source: Huang et al., Magn Reson Imaging 26:133 (2008).
    """
    covariance = _covariance(calibration)
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    n = _n_virtual(values, n_virtual, energy)
    return _fix_phase(vectors[:, :n].mH).to(torch.complex64)


def compress(data: Tensor, matrix: Tensor, coil_axis: int) -> Tensor:
    """Apply ``(virtual coil, coil)`` along ``coil_axis`` of ``data``."""
    moved = torch.movedim(data, coil_axis, -2) if data.ndim > 1 else data
    return torch.movedim(matrix.to(data.device) @ moved, -2, coil_axis)


def geometric_compression(acs: Tensor, n_virtual: int, *, window: int = 3) -> Tensor:
    """Geometric coil compression: a matrix for every position along the fully sampled readout, aligned between neighbours.

    At each x the leading eigenvectors of the coil covariance over ``window`` positions; then, outward from the strongest
    position, each matrix is rotated within its subspace to be as close as possible to its inner neighbour's
    (``A <- V U^H A`` with ``A A_neighbour^H = U S V^H``), so that virtual coils vary smoothly with x.

    Parameters
    ----------
    acs
        complex64 ``(coil, k2, k1, x)``, hybrid space, prewhitened.
    n_virtual
        Number of virtual coils; more than there are coils means all.
    window
        Positions pooled for one matrix, odd.

    Returns
    -------
    complex64 ``(x, virtual coil, coil)``, orthonormal rows at every x.

    Source: Zhang et al., Magn Reson Med 69:571 (2013), eqs 3-8. We add ``LOADING`` of the volume's covariance.
    """
    if acs.ndim != 4:
        raise DataError(
            "wrong shape", where="geometric coil compression", got=tuple(acs.shape), expected="(coil, k2, k1, x)"
        )
    if n_virtual < 1 or window < 1 or window % 2 == 0:
        raise DataError(
            "setting out of range",
            where="geometric coil compression",
            got=f"n_virtual {n_virtual}, window {window}",
            expected="at least one virtual coil and an odd window",
        )
    n_coils, n_x = int(acs.shape[0]), int(acs.shape[-1])
    n = min(n_virtual, n_coils)
    mean = _covariance(acs) / n_x
    lines = acs.permute(3, 0, 1, 2).reshape(n_x, n_coils, -1)
    cov = (lines @ lines.mH).to(torch.complex128)
    strength = cov.diagonal(dim1=1, dim2=2).real.sum(dim=1)
    # moving sum over x by differences of a running sum; positions beyond the ends do not exist and are left out
    running = torch.cat([torch.zeros_like(cov[:1]), cov.cumsum(dim=0)])
    index = torch.arange(n_x, device=acs.device)
    half = window // 2
    pooled = running[(index + half + 1).clamp_max(n_x)] - running[(index - half).clamp_min(0)]
    _, vectors = torch.linalg.eigh(pooled + LOADING * mean)
    matrices = vectors.flip(2)[:, :, :n].mH.clone()

    centre = int(strength.argmax())
    matrices[centre] = _fix_phase(matrices[centre])
    for order in (range(centre + 1, n_x), range(centre - 1, -1, -1)):
        neighbour = matrices[centre]
        for x in order:
            u, _, vh = torch.linalg.svd(matrices[x] @ neighbour.mH)
            neighbour = matrices[x] = vh.mH @ u.mH @ matrices[x]
    return matrices.to(torch.complex64)


def compress_geometric(data: Tensor, matrices: Tensor) -> Tensor:
    """Apply ``(x, virtual coil, coil)`` to hybrid ``(..., coil, k2, k1, x)``: ``(..., virtual coil, k2, k1, x)``."""
    if data.shape[-1] != matrices.shape[0] or data.shape[-4] != matrices.shape[2]:
        raise DataError(
            "matrices do not fit the data",
            where="geometric coil compression",
            got=tuple(data.shape),
            expected=f"(..., {matrices.shape[2]}, k2, k1, {matrices.shape[0]})",
        )
    return torch.einsum("xvc,...cabx->...vabx", matrices.to(data.device), data)


def _covariance(calibration: Tensor) -> Tensor:
    samples = calibration.reshape(calibration.shape[0], -1)
    covariance = (samples @ samples.mH).to(torch.complex128)
    total = covariance.diagonal().real.sum()
    if not bool(torch.isfinite(total)) or float(total) <= 0:
        raise DataError("no signal, or not finite", where="coil compression", got=f"energy {float(total)}")
    return 0.5 * (covariance + covariance.mH)


def _n_virtual(values: Tensor, n_virtual: int | None, energy: float | None) -> int:
    if (n_virtual is None) == (energy is None):
        raise DataError("give one of n_virtual and energy", where="coil compression")
    if n_virtual is not None:
        if n_virtual < 1:
            raise DataError("at least one virtual coil", where="coil compression", got=n_virtual)
        return min(n_virtual, len(values))
    assert energy is not None
    if not 0 < energy <= 1:
        raise DataError("energy out of range", where="coil compression", got=energy, expected="above 0 up to 1")
    kept = values.cumsum(0) / values.sum()
    return min(int((kept < energy * (1 - 1e-12)).sum()) + 1, len(values))


def _fix_phase(rows: Tensor) -> Tensor:
    """Make the largest coefficient of each row real and positive."""
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * torch.sgn(largest).conj()
