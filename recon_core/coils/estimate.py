"""Coil maps of one slice or slab from its calibration lines."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from recon_core.coils.espirit import espirit_maps
from recon_core.coils.walsh import walsh_maps
from recon_core.errors import CalibrationError
from recon_core.fourier import fft_centred
from recon_core.settings import setting
from recon_core.types import KSpace, Report

Tensor = torch.Tensor

FEWEST_LINES = 4
"""Contiguous calibration lines below which no method is tried."""


@dataclass(frozen=True)
class CoilSettings:
    """How coil maps are estimated."""

    method: str = setting("espirit", "how coil maps are estimated", choices=("espirit", "walsh"))
    calibration_lines: int = setting(24, "most calibration lines used along each axis", unit="samples", low=8, high=64)
    kernel: int = setting(6, "ESPIRiT: side of the k-space kernel", unit="samples", low=3, high=9)
    threshold: float = setting(0.01, "ESPIRiT: singular values below this part of the largest are noise", low=1e-4, high=0.5)
    background: float = setting(
        0.9,
        "ESPIRiT: maps are zero where the eigenvalue is below this and the calibration image is noise (0: nowhere zero)",
        low=0.0,
        high=1.0,
    )
    walsh_block: int = setting(1, "Walsh: averaging block in pixels of the calibration image", unit="pixels", low=1, high=9)


def estimate_coil_maps(kspace: KSpace, settings: CoilSettings | None = None, report: Report | None = None) -> Tensor:
    """Coil maps for ``kspace.coil_maps``.

    The readout is transformed back to k-space and the largest gap-free rectangle of calibration lines about the centre, at
    most ``calibration_lines`` on a side, goes to the method.

    Parameters
    ----------
    kspace
        With ``acs``; prewhitened, so that coils weigh by their noise. ``noise_std`` lets ESPIRiT tell air from dim tissue.
    settings, report
        Defaults and silence when ``None``.

    Returns
    -------
    complex64 ``(coil, z, y, x)``, unit root sum of squares; zero only in ESPIRiT's background. One coil: ones.

    Raises
    ------
    CalibrationError
        No calibration lines, too few contiguous ones, none at the centre, or no signal in them.
    """
    settings = settings or CoilSettings()
    report = report or Report()
    n_coils, n_2, n_1, n_x = (int(s) for s in kspace.data.shape[1:])
    if n_coils == 1:
        return torch.ones(1, n_2, n_1, n_x, dtype=torch.complex64, device=kspace.data.device)
    if kspace.acs is None:
        raise CalibrationError(
            "no calibration lines",
            where="coil maps",
            got="none in this scan",
            expected="fully sampled lines at the centre of k-space",
            remedy="Acquire calibration lines, or use a chain without coil maps (fourier)",
        )
    acs = kspace.acs
    if tuple(acs.shape) != (n_coils, n_2, n_1, n_x):
        raise CalibrationError(
            "calibration lines are not on the grid of the data",
            where="coil maps",
            got=tuple(acs.shape),
            expected=(n_coils, n_2, n_1, n_x),
        )
    mask = kspace.acs_mask if kspace.acs_mask is not None else (acs != 0).any(dim=-1).any(dim=0)
    rows, columns = _central_rectangle(mask, settings.calibration_lines)
    block = fft_centred(acs[:, rows, columns, :], -1)
    block = block[..., _readout_range(kspace.common_readout, n_x, settings.calibration_lines)]
    report.progress(0.0, f"coil maps ({settings.method})")
    shape: tuple[int, ...] = (n_2, n_1, n_x)
    if n_2 == 1:
        block, shape = block[:, 0], shape[1:]
    if settings.method == "walsh":
        maps = walsh_maps(block, shape, block=settings.walsh_block)
    else:
        maps = espirit_maps(
            block,
            shape,
            kernel=settings.kernel,
            threshold=settings.threshold,
            background=settings.background,
            noise_std=kspace.noise_std,
        )
    return maps.reshape(n_coils, n_2, n_1, n_x)


def _central_rectangle(mask: Tensor, most: int) -> tuple[slice, slice]:
    """The largest rectangle of sampled positions that contains the centre, no side longer than ``most``.

    Both axes end up as centred as the sampling allows. Every height is tried (elliptical and cross-shaped calibration).
    """
    sampled = mask.cpu().bool()
    n_2, n_1 = (int(s) for s in sampled.shape)
    centre_2, centre_1 = n_2 // 2, n_1 // 2
    best: tuple[int, slice, slice] | None = None
    for height in range(1, min(n_2, most) + 1):
        for top in range(max(0, centre_2 - height + 1), min(centre_2, n_2 - height) + 1):
            line = sampled[top : top + height].all(dim=0)
            if not bool(line[centre_1]):
                continue
            gaps = torch.nonzero(~line)[:, 0]
            left = int(gaps[gaps < centre_1].max()) + 1 if bool((gaps < centre_1).any()) else 0
            right = int(gaps[gaps > centre_1].min()) if bool((gaps > centre_1).any()) else n_1
            columns = _shorten(left, right, centre_1, most)
            # ties go to the most centred rows
            score = 1000 * height * (columns.stop - columns.start) - abs(2 * (centre_2 - top) - height)
            if best is None or score > best[0]:
                best = (score, slice(top, top + height), columns)
    if best is None:
        raise CalibrationError(
            "the centre of k-space is not among the calibration lines",
            where="coil maps",
            got=f"{int(sampled.sum())} calibration lines",
            expected=f"line {centre_1}, partition {centre_2}",
            remedy="Check the calibration flags and the encoding limits' centre",
        )
    _, rows, columns = best
    for name, n, found in (("k2", n_2, rows), ("k1", n_1, columns)):
        size = found.stop - found.start
        if size < min(FEWEST_LINES, n):
            raise CalibrationError(
                f"too few contiguous calibration lines along {name}",
                where="coil maps",
                got=size,
                expected=f"at least {FEWEST_LINES}, better 24",
                remedy="Acquire more calibration lines",
            )
    return rows, columns


def _shorten(start: int, stop: int, centre: int, most: int) -> slice:
    if stop - start <= most:
        return slice(start, stop)
    first = min(max(start, centre - most // 2), stop - most)
    return slice(first, first + most)


def _readout_range(measured: tuple[int, int], n_x: int, most: int) -> slice:
    start, stop = measured
    if not start <= n_x // 2 < stop:
        raise CalibrationError(
            "the readout's centre was not measured",
            where="coil maps",
            got=(start, stop),
            expected=f"a range around {n_x // 2}",
        )
    # along the fully sampled readout more costs little; 32 is what the volume's stations need
    return _shorten(start, stop, n_x // 2, max(most, 32))
