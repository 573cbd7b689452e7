"""ESPIRiT coil maps: the vectors that every patch of calibration k-space leaves unchanged.

Uecker et al., Magn Reson Med 71:990 (2014). Deviations: one set of maps; the eigenproblem is solved on a coarse grid
(``coarse_grid``), because the operator is band-limited to twice the kernel; no anatomy is cropped. The usual crop by
eigenvalue (0.8) zeroes dim tissue; here a position is set to zero only when its eigenvalue is low *and* the calibration
image shows nothing above the known noise there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recon_core.coils.coarse_grid import (
    GridAxis,
    align_phases,
    coil_energy,
    interpolate,
    leading_eigenvector,
    low_resolution_images,
)
from recon_core.errors import CalibrationError
from recon_core.fourier import ifft_centred, resize_centred

Tensor = torch.Tensor

COARSE_2D = 48
COARSE_3D = 24
"""Grid points for each axis. With kernels of 6 a map's fastest oscillation has 8 (4) of them."""

STATIONS_3D = 32
"""k0 samples kept, and so positions along the readout at which kernels of a volume are found."""

FEWEST_LINES = 8
"""Contiguous calibration lines along a phase-encoding axis: 6 lines leave 6 % error in noise-free data, 8 leave 1.4 %."""

NOISE_MARGIN = 1.25
"""Patches overlap, so their noise is not independent: its largest singular value exceeds ``sd (sqrt(m) + sqrt(n))`` by less."""

SILENT_LEVEL = 1e-6
"""A coil with less than this part of the median energy of the coils that have any is switched off."""

DEPENDENT = 1e-13
"""Squared singular values below this part of the largest are what rounding leaves of coils that are sums of others: they show no noise."""

SIGNAL_LEVEL = 3.0
"""A calibration image above this multiple of its noise shows signal."""


def espirit_maps(
    calibration: Tensor,
    shape: Sequence[int],
    *,
    kernel: int = 6,
    threshold: float = 0.01,
    background: float = 0.9,
    noise_std: float | None = None,
) -> Tensor:
    """Coil maps from a fully sampled block of k-space.

    2D: kernels over both axes. 3D: kernels over the two phase-encoding axes, found at ``STATIONS_3D`` positions along the
    readout from its low-resolution image, and joined by their common smooth phase.

    Parameters
    ----------
    calibration
        complex64 ``(coil, k1, k0)`` or ``(coil, k2, k1, k0)``: a block without holes on the grid of ``shape``; where it lies
        in k-space changes no map.
    shape
        ``(y, x)`` or ``(z, y, x)`` of the maps.
    kernel
        Side of the k-space kernel in samples; at most a third of the block.
    threshold
        Singular values below this part of the largest are the null space; so are, with ``noise_std``, those of noise.
    background
        A map is zero where the eigenvalue is below this *and* the calibration image is below ``SIGNAL_LEVEL`` times the
        noise. 0, or no ``noise_std``: maps are nowhere zero.
    noise_std
        SD of a complex sample of ``calibration``.

    Returns
    -------
    complex64 ``(coil, *shape)``, unit root sum of squares (zero in the background), with a smooth common phase; zero for coils that are
    switched off (``SILENT_LEVEL``).

    Raises
    ------
    CalibrationError
        The block is too small (``FEWEST_LINES``) or holds no signal.
    """
    got = tuple(calibration.shape)
    if len(got) != len(shape) + 1 or len(got) not in (3, 4):
        raise CalibrationError("wrong shape", where="ESPIRiT", got=got, expected=f"(coil, {len(shape)} axes)")
    energy, peak = coil_energy(calibration, "ESPIRiT")
    heard = energy > SILENT_LEVEL * energy[energy > 0].median()
    if not bool(heard.all()):
        # the noise is what the weaker half of the singular values show, and those of coils without any would be taken for it
        maps = calibration.new_zeros(got[0], *shape)
        maps[heard] = espirit_maps(
            calibration[heard], shape, kernel=kernel, threshold=threshold, background=background, noise_std=noise_std
        )
        return maps
    rms = math.sqrt(float(energy.sum()) / calibration.numel())
    block = calibration / peak / rms
    sd = None if noise_std is None else noise_std / peak / rms
    if calibration.ndim == 3:
        axes = [GridAxis.spanning(n, COARSE_2D) for n in shape]
        operators = _operator(block, axes, kernel, threshold, sd)
    else:
        n_x = int(shape[-1])
        n_stations = min(STATIONS_3D, int(calibration.shape[-1]), n_x)
        along_x = GridAxis.low_resolution(n_x, n_stations)
        axes = [*(GridAxis.spanning(n, COARSE_3D) for n in shape[:2]), along_x]
        stations = ifft_centred(resize_centred(block, -1, n_stations), -1)
        empty = 1e-3 * torch.linalg.vector_norm(stations) / math.sqrt(n_stations)
        parts = []
        for i in range(n_stations):
            station = stations[..., i]
            if torch.linalg.vector_norm(station) < empty:
                # air: borrow the whole slab's average, there is no signal to be hurt
                station = block[..., block.shape[-1] // 2]
            parts.append(_operator(station, axes[:2], kernel, threshold, sd))
        operators = torch.stack(parts, dim=2)
    value, vector = leading_eigenvector(operators)
    low_image, low_noise = _low_resolution(block, axes, sd)
    vector = align_phases(vector, low_image.square())
    maps = interpolate(torch.movedim(vector, -1, 0).contiguous(), axes)
    maps = maps / torch.linalg.vector_norm(maps, dim=0).clamp_min(1e-12)
    if background > 0 and low_noise is not None:
        kept = _dilate((value >= background) | (low_image > SIGNAL_LEVEL * low_noise))
        maps = maps * (interpolate(kept.float(), axes) > 0.25)
    return maps


def _operator(block: Tensor, axes: Sequence[GridAxis], kernel: int, threshold: float, noise_std: float | None) -> Tensor:
    """The average over all shifts of the projector on the patches' subspace, as a coil matrix at each coarse position.

    ``G(r) = 1/|K| sum_j u_j(r) u_j(r)^H`` with ``u_j(r) = sum_p u_j[p] exp(2 pi i p r / n)`` (Uecker et al., eq. 15-18).
    Its eigenvalues lie between 0 and 1. complex64 ``(a, b, coil, coil)``.
    """
    n_coils = int(block.shape[0])
    sides = [_kernel_side(int(block.shape[1 + i]), axes[i].n, kernel) for i in range(2)]
    patches = block.unfold(1, sides[0], 1).unfold(2, sides[1], 1)
    patches = patches.permute(0, 3, 4, 1, 2).reshape(n_coils * sides[0] * sides[1], -1)
    vectors = _signal_space(patches, threshold, noise_std).reshape(n_coils, *sides, -1)
    # G has lags -(K-1)..K-1 only: 2K-1 positions determine it, and a small Fourier sum gives it anywhere
    n_lags = [2 * s - 1 for s in sides]
    hats = torch.fft.ifft2(vectors, s=n_lags, dim=(1, 2), norm="forward").permute(1, 2, 0, 3)
    lags = torch.fft.fftshift(torch.fft.ifft2(hats @ hats.mH, dim=(0, 1)), dim=(0, 1)) / (sides[0] * sides[1])
    waves = []
    for axis, n in zip(axes, n_lags, strict=True):
        d = torch.arange(n, dtype=torch.float64) - n // 2
        waves.append(torch.exp(-2j * math.pi * torch.outer(axis.positions, d) / axis.n).to(block.device, torch.complex64))
    inner = torch.einsum("xe,deij->dxij", waves[1], lags)
    operator = torch.einsum("yd,dxij->yxij", waves[0], inner)
    return 0.5 * (operator + operator.mH)


def _signal_space(patches: Tensor, threshold: float, noise_std: float | None) -> Tensor:
    """Left singular vectors of ``(feature, patch)`` above ``threshold`` and noise, from the smaller of the two Gram matrices.

    Where noise vectors are kept the projector is the identity, every vector its eigenvector, and the maps are random.
    """
    wide = patches.shape[0] <= patches.shape[1]
    # double precision: a Gram matrix squares the singular values
    p = patches.to(torch.complex128)
    values, vectors = torch.linalg.eigh(p @ p.mH if wide else p.mH @ p)
    least = threshold**2 * float(values[-1])
    # averaged lines have less noise than one sample, and the noise may be unknown: what the weaker half of the spectrum shows
    shown = values[values > DEPENDENT * values[-1]]
    weak = math.sqrt(float(shown[: (len(shown) + 1) // 2].median()) / max(p.shape))
    noise = weak if noise_std is None else min(noise_std, weak)
    least = max(least, (NOISE_MARGIN * noise * sum(math.sqrt(n) for n in p.shape)) ** 2)
    kept = values > min(least, float(values[-1]) * 0.999)
    if wide:
        return vectors[:, kept].to(torch.complex64)
    return (p @ (vectors[:, kept] / values[kept].sqrt())).to(torch.complex64)


def _kernel_side(n_block: int, n_grid: int, kernel: int) -> int:
    # a third of the block: with fewer shifts the patches of one image do not span the subspace (measured: 12 lines and a
    # kernel of 6 leave 1.8 % error, of 4 0.6 %)
    side = min(kernel, max(3, round(n_block / 3)), n_block)
    if n_block == n_grid:
        return min(side, (n_block + 1) // 2)  # a thin slab is fully sampled along z however few partitions it has
    if n_block < FEWEST_LINES:
        raise CalibrationError(
            "too few calibration lines",
            where="ESPIRiT",
            got=f"{n_block} contiguous lines",
            expected=f"at least {FEWEST_LINES}, better 24",
            remedy="Acquire more calibration lines, or choose the coil map method walsh",
        )
    return side


def _low_resolution(block: Tensor, axes: Sequence[GridAxis], noise_std: float | None) -> tuple[Tensor, float | None]:
    """Root sum of squares of the windowed calibration image at the coarse positions, and the noise in it."""
    images, gain = low_resolution_images(block, axes)
    rss = torch.linalg.vector_norm(images, dim=0)
    if noise_std is None:
        return rss, None
    # calibration lines averaged over states have less noise than one sample: never assume more than the darkest places show
    darkest = float(rss.reshape(-1).sort().values[rss.numel() // 20])
    return rss, min(noise_std * gain * math.sqrt(block.shape[0]), darkest)


def _dilate(mask: Tensor) -> Tensor:
    """One coarse cell in every direction."""
    out = mask.float()
    for axis in range(mask.ndim):
        moved = torch.movedim(out, axis, -1)
        flat = moved.reshape(-1, 1, moved.shape[-1])
        out = torch.movedim(torch.nn.functional.max_pool1d(flat, 3, 1, 1).reshape(moved.shape), -1, axis)
    return out > 0
