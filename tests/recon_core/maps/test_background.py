"""Background removal: exact on harmonic fields, a projection, and faithful to sources inside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon_core.errors import DataError
from recon_core.maps.background import BackgroundSettings, pdf, resharp, v_sharp
from recon_core.maps.dipole_kernel import DipoleOperator
from recon_core.maps.spherical_mean import SphericalMean
from tests.recon_core.maps.analytic_fields import positions, sphere_field

SHAPE, VOXEL, B0 = (28, 28, 28), (0.002, 0.002, 0.002), (0.8, 0.6, 0.0)
SETTINGS = BackgroundSettings(pdf_tolerance=5e-3, pdf_iterations=300, resharp_weight=1e-4, vsharp_radius=0.010)
DOUBLE = torch.zeros((), dtype=torch.float64)


def ball(radius: float = 0.018) -> torch.Tensor:
    z, y, x = positions(SHAPE, VOXEL)
    return torch.from_numpy(z**2 + y**2 + x**2 < radius**2)


def background() -> torch.Tensor:
    """Fields of dipoles outside the mask, closed form: harmonic inside."""
    z, y, x = positions(SHAPE, VOXEL)
    total = np.zeros(SHAPE)
    for cz, cy, cx, chi in ((0.0, 0.025, 0.004, 9.0), (0.024, 0.0, -0.004, -6.0), (-0.014, -0.020, 0.006, 7.0)):
        total += chi * sphere_field((z - cz, y - cy, x - cx), 0.003, B0)
    return torch.from_numpy(total)


def local(mask: torch.Tensor) -> torch.Tensor:
    """Field of two blobs deep inside."""
    z, y, x = positions(SHAPE, VOXEL)
    chi = 0.3 * np.exp(-(z**2 + y**2 + x**2) / (2 * 0.003**2)) - 0.2 * np.exp(
        -((z - 0.006) ** 2 + y**2 + x**2) / (2 * 0.003**2)
    )
    source = torch.from_numpy(chi)
    return DipoleOperator(SHAPE, VOXEL, B0, source).forward(source) * mask


def relative(a: torch.Tensor, b: torch.Tensor, mask: torch.Tensor) -> float:
    difference = (a - b)[mask]
    return float(torch.linalg.vector_norm(difference - difference.mean()) / torch.linalg.vector_norm(b[mask]))


@pytest.mark.parametrize(("method", "error"), [("pdf", 0.42), ("v_sharp", 0.30), ("resharp", 0.25)])
def test_local_field_is_recovered(method: str, error: float) -> None:
    mask = ball()
    inside, outside = local(mask), background() * mask
    ratio = float(outside[mask].square().mean().sqrt() / inside[mask].square().mean().sqrt())
    assert ratio > 2.5  # rms of the background over that of the local field: what makes this a test
    total = inside + outside
    kept = total.clone()
    if method == "pdf":
        found = pdf(total, mask, VOXEL, B0, settings=SETTINGS)
        assert found.converged and found.iterations > 30
    else:
        found = {"v_sharp": v_sharp, "resharp": resharp}[method](total, mask, VOXEL, settings=SETTINGS)
        assert found.mask.sum() < mask.sum()
    assert torch.equal(total, kept)
    assert (found.field[~found.mask] == 0).all()
    assert relative(found.field, inside, found.mask) < error


def test_projection() -> None:
    """The minimum is orthogonal to every dipole outside as far as it claims, and a second projection finds little more."""
    mask = ball()
    total = local(mask) + background() * mask
    found = pdf(total, mask, VOXEL, B0, settings=SETTINGS)
    operator = DipoleOperator(SHAPE, VOXEL, B0, total)
    outside = operator.pad(mask.double()) == 0
    correlation = operator.convolve(operator.pad(found.field)) * outside
    of_total = operator.convolve(operator.pad(total)) * outside
    ratio = float(torch.linalg.vector_norm(correlation) / torch.linalg.vector_norm(of_total))
    assert ratio == pytest.approx(found.residual, rel=1e-3) and ratio <= SETTINGS.pdf_tolerance
    again = pdf(found.field, mask, VOXEL, B0, settings=SETTINGS)
    assert relative(again.field, found.field, mask) < 0.25


def test_the_projection_theorem_in_a_ball() -> None:
    """A dipole of radius ``a`` in the middle of a ball of radius ``R``: the part of its field that dipoles outside explain.

    Of the harmonic functions only ``r^2 Y2`` meets ``Y2 / r^3``: the squared cosine between both over ``a < r < R`` is
    ``21/4 (a/R)^3`` for ``a`` much smaller than ``R``, 10.6 % here. So much, at least, is lost from a field without any
    background (a little more: next to the mask the field of a voxel is not quite harmonic inside it), and no more.
    """
    mask, radius = ball(0.022), 0.006
    z, y, x = positions(SHAPE, VOXEL)
    field = torch.from_numpy(sphere_field((z, y, x), radius, B0)) * mask
    found = pdf(field, mask, VOXEL, B0, settings=SETTINGS)
    lost = 1 - float(found.field.square().sum() / field.square().sum())
    theory = 21 / 4 * (radius / 0.022) ** 3
    assert 0.9 * theory < lost < theory + 0.1
    harmonic = torch.from_numpy(3 * (z * B0[0] + y * B0[1] + x * B0[2]) ** 2 - (z**2 + y**2 + x**2)) * mask
    left, before = (float((f * harmonic).sum() / (f.norm() * harmonic.norm())) for f in (found.field, field))
    assert abs(left) < 0.02 < 0.25 < abs(before)


def test_few_steps_leave_background_behind() -> None:
    mask, outside = ball(), background()
    size = float(torch.linalg.vector_norm(outside[mask]))
    left = []
    for steps in (5, 200):
        found = pdf(outside, mask, VOXEL, B0, settings=BackgroundSettings(pdf_iterations=steps, pdf_tolerance=2e-3))
        left.append(float(torch.linalg.vector_norm(found.field)) / size)
    assert left[1] < 0.05
    assert left[0] > 3 * left[1]


def test_spherical_mean() -> None:
    sphere = SphericalMean(SHAPE, VOXEL, 0.006, DOUBLE)
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(SHAPE, dtype=torch.float64, generator=generator) for _ in range(2))
    assert torch.sum(sphere.forward(a) * b).item() == pytest.approx(torch.sum(a * sphere.adjoint(b)).item(), abs=1e-9)
    z, y, x = (torch.from_numpy(p) for p in positions(SHAPE, VOXEL))
    harmonic = 1e3 * (x * y + 2 * z**2 - x**2 - y**2) + z - 3.0 * x + 0.5
    core = (slice(4, -4),) * 3
    torch.testing.assert_close(sphere.mean(harmonic)[core], harmonic[core], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(sphere.normal(a), sphere.adjoint(sphere.forward(a)))
    one = torch.zeros(SHAPE, dtype=torch.float64)
    one[14, 14, 14] = 1.0
    assert sphere.mean(one).sum().item() == pytest.approx(1.0)


def test_nonsense_is_refused() -> None:
    field, mask = background(), ball()
    with pytest.raises(DataError, match="mask is empty"):
        pdf(field, mask & False, VOXEL, B0)
    with pytest.raises(DataError, match="do not fit"):
        v_sharp(field, mask[1:], VOXEL)
    with pytest.raises(DataError, match="not finite"):
        resharp(field * float("nan"), mask, VOXEL)
    with pytest.raises(DataError, match="no sphere fits"):
        resharp(field, ball(0.003), VOXEL)
    with pytest.raises(DataError, match="weights"):
        pdf(field, mask, VOXEL, B0, weights=-torch.ones(SHAPE))
