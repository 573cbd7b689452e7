"""The collaborative filter: exact where nothing is thresholded, better than the noise where there is structure."""

from __future__ import annotations

import sys

import pytest
import torch

import recon_core.solvers
from recon_core.errors import DataError
from recon_core.solvers import collaborative, compiled, patch_kernels
from recon_core.solvers.collaborative import PatchGroups, PatchSettings, principal_images


def series(n_states: int = 5, shape: tuple[int, int] = (40, 36), seed: int = 0) -> torch.Tensor:
    """Two discs of different time courses on a ramp, with a smooth phase; complex (state, row, column)."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, shape[0]), torch.linspace(-1, 1, shape[1]), indexing="ij")
    first = ((y + 0.3) ** 2 + (x + 0.2) ** 2 < 0.2).float()
    second = ((y - 0.4) ** 2 + (x - 0.3) ** 2 < 0.1).float()
    times = torch.linspace(0, 1, n_states)
    frames = [0.3 + 0.1 * x + first * (1 - t) + second * t for t in times]
    return torch.stack(frames) * torch.exp(1j * (0.5 * x + y * y))


def noisy(clean: torch.Tensor, sigma: float, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return clean + sigma * torch.randn(clean.shape, dtype=clean.dtype, generator=generator)


def test_without_a_threshold_nothing_changes() -> None:
    images = noisy(series(), 0.1)
    filtered = PatchGroups(images, PatchSettings()).filter(images, 0.0, 2.0)
    assert torch.allclose(filtered, images, atol=2e-6)


def test_takes_away_most_of_the_noise_and_little_of_the_object() -> None:
    clean = series()
    images = noisy(clean, 0.1)
    filtered = PatchGroups(images, PatchSettings()).filter(images, 0.1, 2.5)
    before, after = (images - clean).abs().square().mean().sqrt(), (filtered - clean).abs().square().mean().sqrt()
    assert float(after) < 0.35 * float(before)


def test_filter_follows_scale_and_phase_of_the_images() -> None:
    images = noisy(series(), 0.1)
    factor = 30.0 * torch.exp(torch.tensor(0.7j))
    reference = PatchGroups(images, PatchSettings()).filter(images, 0.1, 2.0)
    moved = PatchGroups(images * factor, PatchSettings()).filter(images * factor, 3.0, 2.0)
    assert torch.allclose(moved / factor, reference, atol=1e-4)


def test_images_wrap_around() -> None:
    images = noisy(series(), 0.1)
    settings = PatchSettings(stride=1)
    reference = PatchGroups(images, settings).filter(images, 0.1, 2.0)
    rolled = torch.roll(images, (7, 11), (1, 2))
    filtered = PatchGroups(rolled, settings).filter(rolled, 0.1, 2.0)
    # partners at equal distance may be taken in another order
    difference = (torch.roll(filtered, (-7, -11), (1, 2)) - reference).abs()
    assert float(difference.square().mean().sqrt()) < 0.01


def test_similar_patches_are_found() -> None:
    """A pattern that repeats every 8 columns: partners are whole periods away."""
    row = torch.tensor([0.0, 3.0, 1.0, 7.0, 2.0, 9.0, 4.0, 5.0]).repeat(4)
    images = (row[None, None, :] * torch.linspace(1, 2, 32)[None, :, None]).to(torch.complex64)
    groups = PatchGroups(images, PatchSettings(group=2, reach=8, stride=4))
    origin = groups.corners
    rows, columns = origin // 32, origin % 32
    assert bool(((columns[:, 1] - columns[:, 0]) % 8 == 0).all())
    assert bool((rows[:, 1] == rows[:, 0]).all())


@pytest.mark.parametrize("shape", [(9, 31), (5, 5), (30, 7)])
@pytest.mark.parametrize("n_states", [1, 4])
def test_any_matrix_and_number_of_states(shape: tuple[int, int], n_states: int) -> None:
    images = noisy(series(n_states, shape), 0.05)
    filtered = PatchGroups(images, PatchSettings()).filter(images, 0.05, 2.0)
    assert filtered.shape == images.shape and bool(torch.isfinite(filtered.abs()).all())


def test_every_pixel_is_covered_whatever_the_stride() -> None:
    images = torch.ones(2, 21, 19, dtype=torch.complex64)
    filtered = PatchGroups(images, PatchSettings(side=4, stride=4)).filter(images, 0.01, 2.0)
    assert torch.allclose(filtered, images, atol=1e-5)


def by_tensors(groups: PatchGroups, images: torch.Tensor, sigma: float, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(compiled, "is_there", lambda: False)
        return groups.filter(images, sigma, 2.0)


@pytest.mark.parametrize(
    "n_states, shape, settings",
    [
        (5, (40, 36), PatchSettings()),
        (1, (9, 31), PatchSettings(side=3, group=4)),
        (4, (5, 5), PatchSettings()),
        (12, (30, 7), PatchSettings(side=5, group=16, stride=3)),
        (3, (16, 16), PatchSettings(group=1)),
    ],
)
def test_the_compiled_filter_is_the_tensors_filter(
    n_states: int, shape: tuple[int, int], settings: PatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert compiled.is_there()
    images = noisy(series(n_states, shape), 0.1)
    support = torch.zeros(shape, dtype=torch.bool)
    support[: shape[0] // 2, : shape[1] // 2] = True
    for groups in (PatchGroups(images, settings), PatchGroups(images, settings, support)):
        found, expected = groups.filter(images, 0.1, 2.0), by_tensors(groups, images, 0.1, monkeypatch)
        difference = (found - expected).abs()
        # a coefficient at the threshold may fall on either side of it
        assert float(difference.median()) < 1e-6 and float(difference.square().mean().sqrt()) < 1e-3
        assert not torch.equal(found, images)


def test_a_value_that_is_not_finite_stays_one() -> None:
    images = noisy(series(), 0.1)
    groups = PatchGroups(images, PatchSettings())
    for value in (float("nan"), float("inf")):
        spoilt = images.clone()
        spoilt[2, 20, 20] = value
        try:
            found = groups.filter(spoilt, 0.1, 2.0)
        except RuntimeError:  # no principal components
            continue
        assert not bool(torch.isfinite(found[:, 20, 20].abs()).all())


def test_the_number_of_threads_changes_no_bit() -> None:
    images, before = noisy(series(), 0.1), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            groups = PatchGroups(images, PatchSettings(), torch.ones(40, 36, dtype=torch.bool))
            found.append(groups.filter(images, 0.1, 2.0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("compiles", [True, False])
def test_many_states_take_fewer_groups_at_a_time(compiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products between states grow with their square: the same bits, and no more of them than was said, however many states."""
    images = noisy(series(12), 0.1)
    groups = PatchGroups(images, PatchSettings())
    monkeypatch.setattr(compiled, "is_there", lambda: compiles)
    whole = groups.filter(images, 0.1, 2.0)
    eigh, sizes = torch.linalg.eigh, []
    monkeypatch.setattr(collaborative, "CPU_PRODUCTS", 7 * 144)
    monkeypatch.setattr(torch.linalg, "eigh", lambda matrices: (sizes.append(matrices.numel()), eigh(matrices))[1])
    found = groups.filter(images, 0.1, 2.0)
    assert max(sizes) == 7 * 144
    torch.testing.assert_close(found, whole, rtol=0, atol=0 if compiles else 1e-6)


def test_double_precision_stays_double() -> None:
    images = noisy(series(), 0.1).to(torch.complex128)
    groups = PatchGroups(images.to(torch.complex64), PatchSettings())
    groups.transform = groups.transform.double()
    assert groups.filter(images, 0.1, 2.0).dtype == torch.complex128


def test_without_numba_it_is_said_and_computed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    images = noisy(series(), 0.1)
    groups = PatchGroups(images, PatchSettings())
    expected = by_tensors(groups, images, 0.1, monkeypatch)
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "recon_core.solvers.patch_kernels", raising=False)
    monkeypatch.delattr(recon_core.solvers, "patch_kernels", raising=False)
    compiled.is_there.cache_clear()
    try:
        assert torch.equal(groups.filter(images, 0.1, 2.0), expected)
        assert torch.equal(groups.filter(images, 0.1, 2.0), expected)
    finally:
        compiled.is_there.cache_clear()
    assert caplog.text.count("event=not_compiled") == 1


def test_trying_the_compiler_draws_no_random_numbers() -> None:
    """Else the first scan of a process would not be that of the second."""
    before = torch.random.get_rng_state()
    compiled.is_there.cache_clear()
    assert compiled.is_there()
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("LLVM")])
def test_a_compiler_that_fails_costs_no_scan(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    images = noisy(series(), 0.1)
    groups = PatchGroups(images, PatchSettings())
    expected = by_tensors(groups, images, 0.1, monkeypatch)

    def fails(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(patch_kernels, "filter_groups", fails)
    compiled.is_there.cache_clear()
    try:
        assert torch.equal(groups.filter(images, 0.1, 2.0), expected)
    finally:
        compiled.is_there.cache_clear()
    assert f"error={str(error)!r}" in caplog.text


def test_kernels_that_answer_wrongly_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch_kernels, "filter_groups", lambda *arguments: arguments[-1].fill(1.0))
    compiled.is_there.cache_clear()
    try:
        assert not compiled.is_there()
    finally:
        compiled.is_there.cache_clear()


def test_groups_that_cannot_be_transformed_are_refused() -> None:
    with pytest.raises(DataError, match="power of two"):
        PatchGroups(series(), PatchSettings(group=6))
    with pytest.raises(DataError, match="do not fit"):
        PatchGroups(series(), PatchSettings(side=64))


def test_images_of_another_matrix_are_refused() -> None:
    groups = PatchGroups(series(), PatchSettings())
    for shape in ((40, 18), (20, 36), (36, 40)):
        with pytest.raises(DataError, match="do not fit the groups"):
            groups.filter(series(shape=shape), 0.1, 2.0)


def test_principal_images_hold_the_energy_of_a_low_rank_series() -> None:
    clean = series()  # rank 2 in real terms: constant and slope in time
    strongest = principal_images(clean, 2)
    assert float(strongest.abs().square().sum()) == pytest.approx(float(clean.abs().square().sum()), rel=1e-5)
