"""Did the object move in one state of a recovery? Its T1 is wrong then, most at edges, and the fit takes much of it up.

What is left of the fit is compared with what a displacement of one state would leave: the gradient of that state's image, as far as the
fit's parameters cannot imitate it. The displacement is one of the whole object, ``u(r) = a + B r`` in the plane (shift, rotation, scale).
Noise, aliases and tissues that share a pixel disturb edges as well, but alike on both sides of a structure, where gradients have opposite
signs. The uncertainty comes from leaving out parts of the object in turn (jackknife), and so contains what is no white noise.

A displacement of a small part (one organ in a body at rest) is none of the whole, and hardly found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from recon_core.maps.recovery_residual import RecoveryResidual, along_magnetisation
from recon_core.maps.saturation import MOST_WRONG
from recon_core.maps.saturation_places import parts

Tensor = torch.Tensor

LEAST_MOVED = 0.15
"""Pixels beyond doubt from which on the operator is told. Good scans show at most 0.10, and 0.14 where states lack the centre of k-space;
a state moved by a pixel or two 0.14 to 1.3 (trials with some 75 scans; fewer in `benchmarks.t1_checks`)."""

FEWEST_PARTS = 9
"""Of the object, below which nothing can be said of the uncertainty of six numbers."""


@dataclass(frozen=True)
class Motion:
    """Displacement of the object in one state.

    Attributes
    ----------
    state, time
        Which one, and its time in s.
    pixels, doubt
        RMS displacement over the object, and two standard errors of it. To first order: too small where it is more than half a pixel.
    explained
        Part of the energy of what the fit leaves.
    t1_quartile
        Relative error of T1 that follows and that a quarter of the pixels exceed.
    """

    state: int
    time: float
    pixels: float
    doubt: float
    explained: float
    t1_quartile: float

    @property
    def matters(self) -> bool:
        """Whether the operator has to know."""
        return self.pixels - self.doubt > LEAST_MOVED

    @property
    def forbids_map(self) -> bool:
        """Whether T1 is too wrong to be shown."""
        return self.matters and self.t1_quartile > MOST_WRONG

    @property
    def note(self) -> str:
        """What the operator has to know; empty where that is nothing."""
        if not self.matters:
            return ""
        return (
            f"the object seems to have moved at {self.time:g} s, by {self.pixels:.1f} pixels or more: T1 is wrong, most at edges, a "
            f"quarter of the pixels by about {max(1, round(100 * self.t1_quartile))} % or more"
        )


def moved_state(
    images: Tensor, phase: Tensor | None, parameters: Tensor, times: Sequence[float], inside: Tensor
) -> Motion | None:
    """The state in which a displacement of the object explains most of what the fit leaves.

    Parameters
    ----------
    images
        ``(state, z, y, x)``, complex or magnitudes; such as were not drawn towards the recovery.
    phase
        Of the magnetisation, rad ``(z, y, x)``; ``None`` for magnitudes.
    parameters
        Of the fit, ``(parameter, pixel)``: ``(M0, R1)`` of a saturation recovery, or ``(A, B, R)`` of ``A - B exp(-t R)`` with
        ``T1 = (B / A - 1) / R``.
    times
        s, one per state.
    inside
        bool ``(z, y, x)``: where the pixels lie, in the order of its true ones.

    Returns
    -------
    Motion
        ``None`` where too few pixels or no degree of freedom can tell.
    """
    pieces = parts(inside)
    if len(pieces) < FEWEST_PARTS or len(set(times)) <= len(parameters):
        return None
    fitted = RecoveryResidual.of(images, phase, parameters, times, inside)
    signal, residual = fitted.signal, fitted.residual
    # of a change of one state: what the fit leaves there, over its size
    tells = 1 - torch.einsum("spn,psn->sn", fitted.jacobian, fitted.estimate)
    energy = float(residual.square().sum())
    found = []
    for state, time in enumerate(times):
        slopes = [along_magnetisation(_central_difference(images[state], dim), phase)[inside].double() for dim in (-2, -1)]
        if phase is None:
            slopes = [slope * signal[state].sign() for slope in slopes]
        changes = _displacements(inside, *slopes)  # (6, pixel)
        normal = torch.stack([changes[:, piece] * tells[state, piece] @ changes[:, piece].T for piece in pieces])
        right = torch.stack([changes[:, piece] @ residual[state, piece] for piece in pieces])
        size = _solved(normal.sum(0), right.sum(0))
        without = torch.stack([_solved(normal.sum(0) - n, right.sum(0) - r) for n, r in zip(normal, right, strict=True)])
        deviations = without - without.mean(0)
        along = float((deviations @ size).square().sum() / size.square().sum())
        variance = (len(pieces) - 1) / len(pieces) * along
        error = (fitted.t1_change[state] * (size @ changes)).abs().sort().values
        found.append(
            Motion(
                state,
                float(time),
                float(size.norm()),
                2 * math.sqrt(variance),
                float(right.sum(0) @ size) / energy if energy > 0 else 0.0,
                float(error[3 * len(error) // 4]),
            )
        )
    return max(found, key=lambda motion: motion.explained)


def _central_difference(image: Tensor, dim: int) -> Tensor:
    """Change per pixel; without the pixel itself, whose noise is in the residual. Zero at the image's border."""
    slope = torch.zeros_like(image)
    n = image.shape[dim]
    if n > 2:
        slope.narrow(dim, 1, n - 2).copy_((image.narrow(dim, 2, n - 2) - image.narrow(dim, 0, n - 2)) / 2)
    return slope


def _displacements(inside: Tensor, slope_y: Tensor, slope_x: Tensor) -> Tensor:
    """Change of an image by shifts along y and x, and by both growing with y and x: ``(6, pixel)``, RMS displacement 1 pixel each."""
    y, x = inside.nonzero()[:, -2:].double().T
    y, x = ((c - c.mean()) / c.std(correction=0).clamp_min(1e-9) for c in (y, x))
    one = torch.ones_like(y)
    return -torch.stack([slope * factor for slope in (slope_y, slope_x) for factor in (one, y, x)])


def _solved(normal: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.pinv(normal, hermitian=True) @ right
