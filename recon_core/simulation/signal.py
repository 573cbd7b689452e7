"""Signal equations of the simulated sequences. SI units; the arguments broadcast; complex64 or float32 out.

The equations are written once more in ``recon_core.signal_models`` as differentiable operators for fitting. They are kept
apart on purpose: a fit that is tested against its own forward model proves little.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from recon_core.errors import SettingError

FloatArray = NDArray[np.float32]
ComplexArray = NDArray[np.complex64]

GYROMAGNETIC_RATIO = 42.577478518e6
"""Of the proton, Hz/T (CODATA 2018)."""


def bssfp(
    pd: FloatArray,
    r1: FloatArray,
    r2: FloatArray,
    off_resonance: FloatArray,
    *,
    flip_angle: float,
    repetition_time: float,
    echo_time: float,
) -> ComplexArray:
    """Steady state of balanced SSFP with alternating radiofrequency phase, off-resonance included.

    ``M = pd (1-E1) sin(a) (1 - E2 exp(-i t)) / (C cos t + D) exp(-TE R2) exp(i 2 pi f TE)``, ``t = 2 pi f TR + pi``,
    ``C = E2 (E1-1)(1+cos a)``, ``D = (1 - E1 cos a) - (E1 - cos a) E2^2``.

    Parameters
    ----------
    pd, r1, r2
        Proton density, relaxation rates in 1/s.
    off_resonance
        Hz.
    flip_angle, repetition_time, echo_time
        rad, s, s.

    Source
    ------
    Freeman and Hill 1971; in this form Haacke et al., Magnetic Resonance Imaging, eq. 18.29; phase at the echo added.
    """
    e1, e2 = np.exp(-repetition_time * r1), np.exp(-repetition_time * r2)
    ca, sa = np.cos(flip_angle), np.sin(flip_angle)
    precession = 2 * np.pi * off_resonance * repetition_time + np.pi
    c = e2 * (e1 - 1) * (1 + ca)
    d = (1 - e1 * ca) - (e1 - ca) * e2**2
    steady = pd * (1 - e1) * sa * (1 - e2 * np.exp(-1j * precession)) / (c * np.cos(precession) + d)
    return np.asarray(steady * np.exp(echo_time * (2j * np.pi * off_resonance - r2)), dtype=np.complex64)


def look_locker(m0: ComplexArray, t1: FloatArray, inversion_time: float, *, b_over_a: float = 1.9) -> ComplexArray:
    """MOLLI: ``S = m0 (1 - (B/A) exp(-TI / T1*))`` with ``T1* = T1 / (B/A - 1)``.

    Three-parameter recovery (Messroghli et al., Magn Reson Med 2004, doi:10.1002/mrm.20110; Deichmann and Haase
    1992), so that the usual
    correction ``T1 = T1* (B/A - 1)`` is exact here. ``B/A`` below 2 stands for imperfect inversion and readout saturation.

    Raises
    ------
    SettingError
        ``B/A`` not in (1, 2].
    """
    if not 1.0 < b_over_a <= 2.0:
        raise SettingError("not an inversion", where="signal.b_over_a", got=b_over_a, expected="above 1, up to 2")
    return np.asarray(m0 * (1.0 - b_over_a * np.exp(-inversion_time * (b_over_a - 1.0) / t1)), dtype=np.complex64)


def molli_inversion_times(
    scheme: Sequence[int] = (5, 3), *, rr: float = 1.0, first: float = 0.100, increment: float = 0.080
) -> tuple[float, ...]:
    """Inversion times in s in the order of acquisition: 5(3)3 with ``scheme=(5, 3)``, 4(1)3(1)2 with ``(4, 3, 2)``.

    Images follow their inversion once per heartbeat (``rr`` in s); every further inversion starts ``increment`` later.
    """
    if not scheme or min(scheme) < 1 or not rr > 0:
        raise SettingError(
            "not a MOLLI scheme", where="signal.scheme", got=tuple(scheme), expected="images per inversion, e.g. 5, 3"
        )
    return tuple(first + i * increment + n * rr for i, count in enumerate(scheme) for n in range(count))


def saturation_recovery(m0: ComplexArray, t1: FloatArray, delay: float, *, left: float | FloatArray = 0.0) -> ComplexArray:
    """``S = m0 (1 - (1 - left) exp(-tau / T1))``, PINQI, Eq. 19, with ``left`` of M0 unsaturated (-1: inverted)."""
    return np.asarray(m0 * (1.0 - (1.0 - left) * np.exp(-delay / t1)), dtype=np.complex64)


def after_pulses(
    signal: ComplexArray, m0: ComplexArray, t1: FloatArray, n_pulses: int, *, flip_angle: float, repetition_time: float
) -> ComplexArray:
    """What spoiled readout pulses make of a longitudinal magnetisation: ``S_ss + (S - S_ss) (cos(a) E1)^n``, ``E1 = exp(-TR / T1)``.

    Parameters
    ----------
    signal, m0, t1
        Before the first pulse; fully recovered; s.
    flip_angle, repetition_time
        rad, s.

    Source
    ------
    Look and Locker 1970, doi:10.1063/1.1684482; ``S_ss = m0 (1 - E1) / (1 - cos(a) E1)``.
    """
    if n_pulses == 0:
        return signal
    e1 = np.exp(-repetition_time / t1)
    kept = np.cos(flip_angle) * e1
    steady = m0 * (1 - e1) / (1 - kept)
    return np.asarray(steady + (signal - steady) * kept**n_pulses, dtype=np.complex64)


def multi_echo(m0: ComplexArray, r2star: FloatArray, field: FloatArray, echo_time: float) -> ComplexArray:
    """``S = m0 exp(-TE R2*) exp(i 2 pi f TE)``; ``m0`` carries the phase at TE = 0; ``field`` in Hz, positive means
    faster."""
    return np.asarray(m0 * np.exp(echo_time * (2j * np.pi * field - r2star)), dtype=np.complex64)


def spoiled_gradient_echo(pd: FloatArray, r1: FloatArray, *, flip_angle: float, repetition_time: float) -> FloatArray:
    """Steady state of a spoiled gradient echo at TE = 0: ``pd sin(a) (1 - E1) / (1 - E1 cos a)``, ``E1 = exp(-TR R1)``.

    Parameters
    ----------
    pd, r1
        Proton density; relaxation rate in 1/s.
    flip_angle, repetition_time
        rad, s.

    Source
    ------
    Ernst and Anderson 1966, doi:10.1063/1.1719961.
    """
    e1 = np.exp(-repetition_time * r1)
    return np.asarray(pd * np.sin(flip_angle) * (1 - e1) / (1 - e1 * np.cos(flip_angle)), dtype=np.float32)


def dipole_field(
    chi: FloatArray,
    voxel: tuple[float, float, float],
    b0_direction: tuple[float, float, float],
    field_strength: float,
) -> FloatArray:
    """Frequency shift in Hz that a susceptibility distribution makes: convolution with the unit dipole, ``1/3 -
    (k.b)^2/k^2``.

    Parameters
    ----------
    chi
        ppm, ``(z, y, x)``; zero-padded to avoid wrap-around.
    voxel
        Sample distances ``(z, y, x)`` in m.
    b0_direction
        Unit vector of B0 in the image frame, ``(z, y, x)``.
    field_strength
        T.

    Source
    ------
    Marques and Bowtell 2005, doi:10.1002/cmr.b.20034 (Lorentz-corrected).
    """
    padded = tuple(n + max(16, n // 2) for n in chi.shape)
    axes = [np.fft.fftfreq(n, d).astype(np.float32) for n, d in zip(padded, voxel, strict=True)]
    axes[2] = np.abs(np.fft.rfftfreq(padded[2], voxel[2])).astype(np.float32)
    kz, ky, kx = np.meshgrid(*axes, indexing="ij", sparse=True)
    k2 = kz**2 + ky**2 + kx**2
    along = kz * b0_direction[0] + ky * b0_direction[1] + kx * b0_direction[2]
    with np.errstate(invalid="ignore", divide="ignore"):
        kernel = np.where(k2 > 0, 1.0 / 3.0 - along**2 / k2, 0.0).astype(np.float32)
    spectrum = np.fft.rfftn(chi.astype(np.float32), s=padded, axes=(0, 1, 2))
    shift = np.fft.irfftn(spectrum * kernel, s=padded, axes=(0, 1, 2))[tuple(slice(n) for n in chi.shape)]
    return np.asarray(shift * (1e-6 * GYROMAGNETIC_RATIO * field_strength), dtype=np.float32)
