"""The field of magnetised tissue: convolution with the unit dipole, for any direction of B0 and any voxel.

Volumes are ``(z, y, x)``, susceptibility and field in ppm, lengths in m. A volume is zero-filled before it is convolved, so that
its far side does not act on its near side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product

import torch
from scipy.fft import next_fast_len

from recon_core.errors import DataError
from recon_core.maps.finite_differences import relative_steps
from recon_core.simulation.signal import GYROMAGNETIC_RATIO

Tensor = torch.Tensor

PADDING = (
    0.25  # of the side; sources and fields at opposite faces are then this far apart, and at least LEAST_PADDING voxels
)
LEAST_PADDING = 16


def ppm_per_hz(field_strength: float) -> float:
    """Factor from a frequency in Hz to a relative field in ppm: ``1e6 / (gamma B0)``, protons.

    Raises
    ------
    DataError
        B0 is not above zero.
    """
    if not (math.isfinite(field_strength) and field_strength > 0):
        raise DataError("not a field strength", where="maps", got=field_strength, expected="above zero, in T")
    return 1e6 / (GYROMAGNETIC_RATIO * field_strength)


def unit_vector(direction: Sequence[float]) -> tuple[float, float, float]:
    """B0's direction ``(z, y, x)`` with length 1.

    Raises
    ------
    DataError
        Not three numbers, or all zero.
    """
    if len(direction) != 3 or not all(math.isfinite(d) for d in direction) or math.hypot(*direction) == 0:
        raise DataError("not a direction of B0", where="maps", got=tuple(direction), expected="(z, y, x) in the image frame")
    length = math.hypot(*direction)
    z, y, x = (float(d) / length for d in direction)
    return z, y, x


def padded_shape(shape: Sequence[int], padding: float = PADDING) -> tuple[int, int, int]:
    """The sides of the zero-filled volume: at least ``padding`` (and 16 voxels) longer, and quick to transform."""
    z, y, x = (next_fast_len(n + max(LEAST_PADDING, math.ceil(padding * n)), real=True) for n in shape)
    return z, y, x


def dipole_spectrum(shape: Sequence[int], voxel: Sequence[float], b0: Sequence[float], like: Tensor) -> Tensor:
    """``D(k) = 1/3 - (k.b)^2 / k^2``, 0 at DC, on the half spectrum of `torch.fft.rfftn`; real ``(z, y, x // 2 + 1)``.

    Parameters
    ----------
    shape, voxel
        Samples and their distance in m, ``(z, y, x)``.
    b0
        Direction of B0 in the image frame, ``(z, y, x)``; any length.
    like
        Gives dtype and device.

    References
    ----------
    Marques & Bowtell, Concepts Magn. Reson. B 25 (2005) 65; Salomir et al., ibid. 19 (2003) 26. With the sphere of Lorentz.
    """
    relative_steps(voxel)  # refuses what is not a voxel
    direction = unit_vector(b0)
    axes, odd = [], []
    for axis, (n, side) in enumerate(zip(shape, voxel, strict=True)):
        k = torch.fft.rfftfreq(n, side) if axis == 2 else torch.fft.fftfreq(n, side)
        k = k.to(like.device, like.dtype).abs() if axis == 2 else k.to(like.device, like.dtype)
        # the Nyquist frequency is +k and -k at once: mixed products average out there, and the kernel stays real in image space
        paired = torch.where(2 * torch.arange(len(k), device=k.device) == n, torch.zeros_like(k), k)
        view = [-1 if a == axis else 1 for a in range(3)]
        axes.append(k.reshape(view))
        odd.append(paired.reshape(view))
    squares = axes[0] ** 2 + axes[1] ** 2 + axes[2] ** 2
    along = sum((direction[i] * axes[i]) ** 2 for i in range(3))
    along = along + sum(2 * direction[i] * direction[j] * odd[i] * odd[j] for i in range(3) for j in range(i))
    squares[0, 0, 0] = 1.0
    spectrum = 1 / 3 - along / squares
    spectrum[0, 0, 0] = 0.0
    return spectrum


def point_dipole_spectrum(shape: Sequence[int], voxel: Sequence[float], b0: Sequence[float], like: Tensor) -> Tensor:
    """Spectrum of the field of a magnetised *point*, ``V (3 cos^2 - 1) / (4 pi r^3)``, and of all its periodic images.

    `dipole_spectrum` is band-limited: its field rings, and is not harmonic, at any distance from a voxel. This one is harmonic
    everywhere but at the points themselves, as the field of an outside source must be. Images are summed as by Ewald: a point is
    one blurred by a Gaussian, whose periodic field is known in k-space, and what the blur took away, which ends after a few voxels. (A
    sum that is cut off after some images jumps where the nearest image changes, in the midst of the mask: not harmonic either.)

    Parameters, returns and references as `dipole_spectrum`; 0 at the point. Further: Ewald, Ann. Phys. 369 (1921) 253.
    """
    relative_steps(voxel)
    b = unit_vector(b0)
    width = max(voxel) / EWALD
    places = [torch.fft.fftfreq(n, 1 / (n * side), dtype=torch.float64) for n, side in zip(shape, voxel, strict=True)]
    near = torch.zeros(tuple(shape), dtype=torch.float64, device=like.device)
    for image in product((-1, 0, 1), repeat=3):
        z, y, x = (
            (place + k * n * side).to(like.device).reshape([-1 if a == i else 1 for a in range(3)])
            for i, (place, k, n, side) in enumerate(zip(places, image, shape, voxel, strict=True))
        )
        near += _sharp_less_blurred(z, y, x, b, width)
    near[0, 0, 0] += 1 / (3 * math.pi**1.5 * width**3)  # less the blurred point's own field at its middle
    spectrum = torch.fft.rfftn(near * math.prod(voxel)).real  # the imaginary part is what an even side cannot mirror
    waves = [2 * math.pi * torch.fft.fftfreq(n, side, dtype=torch.float64) for n, side in zip(shape, voxel, strict=True)]
    waves[2] = waves[2][: int(shape[2]) // 2 + 1].abs()
    square, along = (sum_of.to(like.device) for sum_of in _square_and_along(waves, b))
    square[0, 0, 0] = 1.0  # no mean: any constant is background
    return (spectrum - along**2 / square * torch.exp(-square * width**2 / 4)).to(like.dtype)


EWALD = 0.42
"""Longest voxel side over the width of the blurred point: its spectrum ends below the highest frequency, its field after ten voxels."""


def _sharp_less_blurred(z: Tensor, y: Tensor, x: Tensor, b: Sequence[float], width: float) -> Tensor:
    """``(b . grad)^2 erfc(r / width) / (4 pi r)``, 0 at the origin."""
    r = (z**2 + y**2 + x**2).sqrt()
    r = torch.where(r == 0, math.inf, r)
    cosine = (b[0] * z + b[1] * y + b[2] * x) / r
    tail = torch.erfc(r / width)
    bell = 2 / (math.sqrt(math.pi) * width) * torch.exp(-((r / width) ** 2))
    slope = -(tail / r**2 + bell / r)  # first and second derivative of erfc(r / width) / r
    bend = 2 * tail / r**3 + bell * (2 / r**2 + 2 / width**2)
    return (bend * cosine**2 + slope / r * (1 - cosine**2)) / (4 * math.pi)


def _square_and_along(waves: Sequence[Tensor], b: Sequence[float]) -> tuple[Tensor, Tensor]:
    """``k^2`` and ``k . b`` on the half spectrum."""
    z, y, x = (k.reshape([-1 if a == i else 1 for a in range(3)]) for i, k in enumerate(waves))
    return z**2 + y**2 + x**2, b[0] * z + b[1] * y + b[2] * x


class DipoleOperator:
    """``field = D chi``, ppm to ppm, real ``(z, y, x)``; self-adjoint.

    ``forward`` fills with zeros and crops; ``convolve`` works on the padded volume itself (periodic), for algorithms that put
    sources into the margin.

    Parameters
    ----------
    shape, voxel, b0
        As in `dipole_spectrum`, of the volume without its margin.
    like
        Gives dtype and device.
    padding
        Margin as a part of every side.
    """

    def __init__(
        self, shape: Sequence[int], voxel: Sequence[float], b0: Sequence[float], like: Tensor, *, padding: float = PADDING
    ) -> None:
        if len(shape) != 3 or min(shape) < 2:
            raise DataError("not a volume", where="dipole field", got=tuple(shape), expected="(z, y, x), 2 or more each")
        self.shape = (int(shape[0]), int(shape[1]), int(shape[2]))
        self.padded = padded_shape(shape, padding)
        self.spectrum = dipole_spectrum(self.padded, voxel, b0, like)

    def convolve(self, x: Tensor) -> Tensor:
        """Periodic convolution of a padded volume."""
        return convolve_spectrum(x, self.spectrum, self.padded)

    def forward(self, x: Tensor) -> Tensor:
        """Susceptibility to field, both of the volume without margin."""
        return self.crop(self.convolve(x))

    def adjoint(self, y: Tensor) -> Tensor:
        """Equal to ``forward``: the kernel is real and even."""
        return self.forward(y)

    def normal(self, x: Tensor) -> Tensor:
        """``D^T D x``; the crop between the two keeps it from being one multiplication."""
        return self.adjoint(self.forward(x))

    def pad(self, x: Tensor) -> Tensor:
        """Zero-filled behind the last voxel of each axis: on a periodic volume that is as good as a margin on both sides."""
        out = x.new_zeros(self.padded)
        self.crop(out).copy_(x)
        return out

    def crop(self, x: Tensor) -> Tensor:
        """The volume without its margin, a view."""
        z, y, x_ = self.shape
        return x[:z, :y, :x_]


def convolve_spectrum(x: Tensor, spectrum: Tensor, shape: Sequence[int]) -> Tensor:
    """Periodic convolution on ``shape``, ``x`` zero-filled to it; ``spectrum`` as from `dipole_spectrum`."""
    return torch.fft.irfftn(torch.fft.rfftn(x, s=tuple(shape)).mul_(spectrum), s=tuple(shape))
