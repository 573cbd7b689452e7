"""The dipole operator against closed forms, its adjoint, and the differences that total variation is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from recon_core.errors import DataError
from recon_core.maps.dipole_kernel import DipoleOperator, dipole_spectrum, point_dipole_spectrum, ppm_per_hz
from recon_core.maps.finite_differences import divergence, gradient, periodic_laplacian, relative_steps
from recon_core.simulation.signal import dipole_field
from tests.recon_core.maps.analytic_fields import mean_of_parts, positions, sphere_field

OBLIQUE = (0.8, 0.5, -0.33)
DOUBLE = torch.zeros((), dtype=torch.float64)


@pytest.mark.parametrize(("b0", "voxel"), [((1.0, 0.0, 0.0), (1e-3, 1e-3, 2e-3)), (OBLIQUE, (1e-3, 1.25e-3, 1e-3))])
def test_sphere(b0: tuple[float, float, float], voxel: tuple[float, float, float]) -> None:
    shape = tuple(2 * round(0.024 / v) for v in voxel)
    radius, unit = 0.008, tuple(b / np.linalg.norm(b0) for b in b0)
    z, y, x = positions(shape, voxel, 4)  # type: ignore[arg-type]
    chi = torch.from_numpy(mean_of_parts((z**2 + y**2 + x**2 <= radius**2).astype(np.float32), 4))
    found = DipoleOperator(shape, voxel, b0, chi, padding=1.0).forward(chi).numpy()
    where = positions(shape, voxel)  # type: ignore[arg-type]
    truth = sphere_field(where, radius, unit)  # type: ignore[arg-type]
    r = np.sqrt(sum(w**2 for w in where))
    shell = (r > 1.4 * radius) & (r < 2.2 * radius)
    assert np.linalg.norm((found - truth)[shell]) < 0.03 * np.linalg.norm(truth[shell])
    assert abs(found[r < 0.7 * radius].mean()) < 0.001
    assert np.abs(found[r < 0.7 * radius]).max() < 0.04


def test_a_point_has_the_field_of_a_small_sphere_of_its_volume_everywhere() -> None:
    """Next to the point as well as far away, where the band-limited kernel rings."""
    shape, voxel, unit = (
        (32, 30, 36),
        (2e-3, 2e-3, 2e-3),
        tuple(float(b) for b in np.array(OBLIQUE) / np.linalg.norm(OBLIQUE)),
    )
    point = torch.zeros(shape, dtype=torch.float64)
    point[10, 9, 11] = 1.0
    grid = tuple(2 * n for n in shape)
    spectra = [make(grid, voxel, unit, point) for make in (point_dipole_spectrum, dipole_spectrum)]
    exact, limited = (
        torch.fft.irfftn(torch.fft.rfftn(point, s=grid) * f, s=grid)[: shape[0], : shape[1], : shape[2]] for f in spectra
    )
    where = [(np.arange(n) - c) * d for n, c, d in zip(shape, (10, 9, 11), voxel, strict=True)]
    z, y, x = np.meshgrid(*where, indexing="ij", sparse=True)
    radius = (np.prod(voxel) * 3 / (4 * np.pi)) ** (1 / 3)
    truth = torch.from_numpy(sphere_field((z, y, x), radius, unit))  # type: ignore[arg-type]
    r = torch.from_numpy(np.sqrt(z**2 + y**2 + x**2))
    near, far = (r > 1e-3) & (r < 9e-3), (r > 15e-3) & (r < 25e-3)
    exact -= (exact - truth)[near].mean()  # of all the images there is a field without a mean
    for shell, bound in ((near, 1e-4), (far, 0.02)):
        assert (exact - truth)[shell].norm() < bound * truth[shell].norm()
        assert (limited - truth)[shell].norm() > 10 * (exact - truth)[shell].norm()


def test_the_field_of_a_point_is_harmonic_where_its_nearest_image_changes_too() -> None:
    """Half a box away from the point, a sum of the 27 nearest images has a jump there that many steps of PDF would blow up."""
    shape, voxel = (40, 36, 44), (2e-3, 3e-3, 2.5e-3)
    kernel = torch.fft.irfftn(point_dipole_spectrum(shape, voxel, OBLIQUE, DOUBLE), s=shape)
    curvature = [(kernel.roll(1, axis) + kernel.roll(-1, axis) - 2 * kernel) / side**2 for axis, side in enumerate(voxel)]
    middle = tuple(slice(n // 2 - 3, n // 2 + 3) for n in shape)
    for axis in range(3):
        plane = tuple(middle[a] if a == axis else slice(None) for a in range(3))  # far from the point, around the change
        laplacian = sum(curvature)[plane]
        assert laplacian.norm() < 0.02 * curvature[axis][plane].norm(), axis


@pytest.mark.parametrize("angle", [0.0, 54.7356, 90.0])
def test_long_cylinder(angle: float) -> None:
    """Inside ``(3 cos^2 - 1) / 6``; outside ``sin^2 / 2 (a/r)^2 cos 2 phi``: along z, in a volume that is periodic along z."""
    theta = np.deg2rad(angle)
    b0 = (np.cos(theta), 0.0, np.sin(theta))
    shape, side, radius = (4, 96, 96), 1e-3, 0.010
    _, y, x = positions((1, 96, 96), (side,) * 3, 4)
    disc = (y**2 + x**2 <= radius**2).astype(np.float32)[0]
    chi = torch.from_numpy(disc.reshape(96, 4, 96, 4).mean((1, 3))).double()
    spectrum = dipole_spectrum(shape, (side,) * 3, b0, chi)  # no margin: a cylinder without ends
    found = torch.fft.irfftn(torch.fft.rfftn(chi.expand(shape)) * spectrum, s=shape)[1].numpy()
    _, y, x = positions((1, 96, 96), (side,) * 3)
    r = np.sqrt(y**2 + x**2)[0]
    # the mean over the periodic plane is lost: 1/3 - (k.b)^2/k^2 is 0 at DC
    offset = float(chi.mean()) * (3 * np.cos(theta) ** 2 - 1) / 6
    inside = (3 * np.cos(theta) ** 2 - 1) / 6
    assert found[r < 0.8 * radius].mean() + offset == pytest.approx(inside, abs=1e-6)
    outside = np.sin(theta) ** 2 / 2 * (radius**2 / np.maximum(r, side) ** 2) * ((x**2 - y**2)[0] / np.maximum(r, side) ** 2)
    shell = (r > 1.3 * radius) & (r < 2.2 * radius)
    assert np.sqrt(np.mean((found + offset - outside)[shell] ** 2)) < 0.0016


def test_agrees_with_the_simulator_of_fields() -> None:
    # smooth and away from the faces: the two fill with zeros differently
    chi = np.zeros((20, 18, 22), np.float32)
    chi[8:12, 7:12, 9:13] = gaussian_filter(np.random.default_rng(0).standard_normal((4, 5, 4)), 1.0)
    chi = gaussian_filter(chi, 1.0)
    voxel, b0 = (2e-3, 1e-3, 1.5e-3), tuple(float(v) for v in np.array(OBLIQUE) / np.linalg.norm(OBLIQUE))
    theirs = dipole_field(chi, voxel, b0, 3.0) * ppm_per_hz(3.0)  # type: ignore[arg-type]
    operator = DipoleOperator(chi.shape, voxel, b0, torch.from_numpy(chi), padding=0.8)
    ours = operator.forward(torch.from_numpy(chi)).numpy()
    assert np.linalg.norm(ours - theirs) < 0.005 * np.linalg.norm(theirs)


@pytest.mark.parametrize("shape", [(12, 15, 10), (9, 8, 13)])
def test_operator_is_its_own_adjoint(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    operator = DipoleOperator(shape, (1e-3, 2e-3, 1.3e-3), OBLIQUE, a)
    kept = a.clone()
    assert torch.sum(operator.forward(a) * b).item() == pytest.approx(torch.sum(a * operator.adjoint(b)).item(), abs=1e-12)
    torch.testing.assert_close(operator.normal(a), operator.adjoint(operator.forward(a)))
    torch.testing.assert_close(operator.forward(2 * a + b), 2 * operator.forward(a) + operator.forward(b))
    assert torch.equal(a, kept)
    whole = [torch.randn(operator.padded, dtype=torch.float64, generator=generator) for _ in range(2)]
    left, right = torch.sum(operator.convolve(whole[0]) * whole[1]), torch.sum(whole[0] * operator.convolve(whole[1]))
    assert left.item() == pytest.approx(right.item(), abs=1e-11)


def test_operator_gradient() -> None:
    x = torch.randn(4, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    operator = DipoleOperator(x.shape, (1e-3,) * 3, OBLIQUE, DOUBLE)
    assert torch.autograd.gradcheck(lambda v: (operator.forward(v) ** 2).sum(), x)


@pytest.mark.parametrize("periodic", [False, True])
def test_differences_and_their_adjoint(periodic: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 6, 7, dtype=torch.float64, generator=generator)
    v = torch.randn(3, 5, 6, 7, dtype=torch.float64, generator=generator)
    steps, kept = relative_steps((1e-3, 2e-3, 4e-3)), v.clone()
    assert steps == pytest.approx((0.5, 1.0, 2.0))
    left = torch.sum(gradient(x, steps, periodic=periodic) * v)
    right = -torch.sum(x * divergence(v, steps, periodic=periodic))
    assert left.item() == pytest.approx(right.item(), abs=1e-12)
    assert torch.equal(v, kept)
    ramp = torch.arange(7, dtype=torch.float64).expand(5, 6, 7)
    assert torch.allclose(gradient(ramp, steps)[2][..., :-1], torch.tensor(0.5, dtype=torch.float64))


def test_laplacian_eigenvalues() -> None:
    x = torch.randn(6, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    steps = (1.0, 0.5, 2.0)
    direct = -divergence(gradient(x, steps, periodic=True), steps, periodic=True)
    spectral = torch.fft.irfftn(torch.fft.rfftn(x) * periodic_laplacian(x.shape, steps, x), s=x.shape)
    torch.testing.assert_close(direct, spectral)


def test_nonsense_is_refused() -> None:
    with pytest.raises(DataError, match="direction of B0"):
        DipoleOperator((4, 4, 4), (1e-3,) * 3, (0.0, 0.0, 0.0), DOUBLE)
    with pytest.raises(DataError, match="voxel size"):
        DipoleOperator((4, 4, 4), (1e-3, 0.0, 1e-3), (1.0, 0.0, 0.0), DOUBLE)
    with pytest.raises(DataError, match="not a volume"):
        DipoleOperator((4, 1, 4), (1e-3,) * 3, (1.0, 0.0, 0.0), DOUBLE)
    with pytest.raises(DataError, match="field strength"):
        ppm_per_hz(0.0)
    assert ppm_per_hz(3.0) == pytest.approx(1 / (42.577478518 * 3))
