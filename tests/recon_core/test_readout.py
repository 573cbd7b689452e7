import numpy as np
import pytest
import torch

from recon_core.errors import DataError
from recon_core.fourier import centre_slice
from recon_core.preprocess import readout
from recon_core.preprocess.readout import all_finite, finite_readouts, prepare_readouts


def complex_noise(*shape: int, seed: int = 0) -> np.ndarray:
    g = np.random.default_rng(seed)
    return (g.standard_normal(shape) + 1j * g.standard_normal(shape)).astype(np.complex64)


def reference(samples: np.ndarray, first: int, last: int, reverse: bool, start: int, n: int, n_x: int) -> np.ndarray:
    """One readout ``(coil, sample)`` by the defining sum, in double precision."""
    grid = np.zeros((samples.shape[0], n), complex)
    valid = samples[:, first:last].astype(complex)
    grid[:, start : start + last - first] = valid[:, ::-1] if reverse else valid
    j = np.arange(n) - n // 2
    image = grid @ np.exp(2j * np.pi * np.outer(j, j) / n) / np.sqrt(n)
    return image[:, centre_slice(n, n_x)]


@pytest.mark.parametrize(("n", "n_x"), [(16, 8), (16, 16), (16, 7), (18, 9), (18, 1), (15, 8), (15, 15), (1, 1)])
def test_complete_readouts(n: int, n_x: int) -> None:
    samples = complex_noise(5, 3, n)
    samples.flags.writeable = False
    out = prepare_readouts(samples, first=0, last=n, reverse=False, k0_start=0, n_encoded=n, n_x=n_x)
    assert out.dtype == torch.complex64
    expected = np.stack([reference(s, 0, n, False, 0, n, n_x) for s in samples])
    np.testing.assert_allclose(out.numpy(), expected, atol=2e-6)


def test_every_layout_of_a_mixed_batch_and_whitening() -> None:
    n, n_x = 20, 10
    samples = complex_noise(6, 4, 24)
    first, last = np.array([0, 2, 2, 4, 4, 0]), np.array([20, 22, 22, 18, 18, 1])
    reverse = np.array([False, True, True, True, False, False])
    start = np.array([0, 0, 0, 6, 3, 10])
    w = complex_noise(2, 4, seed=1)
    out = prepare_readouts(
        torch.from_numpy(samples),
        first=first,
        last=torch.from_numpy(last),
        reverse=reverse,
        k0_start=start,
        n_encoded=n,
        n_x=n_x,
        whitening=torch.from_numpy(w),
    )
    layouts = zip(samples, first, last, reverse, start, strict=True)
    expected = np.stack([w @ reference(s, f, e, r, k, n, n_x) for s, f, e, r, k in layouts])
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n_encoded", [32, 31])
def test_echo_lands_on_the_image_without_phase(reverse: bool, n_encoded: int) -> None:
    # an echo (all signal in the centre sample) is a flat, real image only when it lies exactly on n // 2
    samples = np.zeros((1, 1, 28), np.complex64)
    centre = 13
    samples[..., centre] = 1
    start = n_encoded // 2 - (25 - centre if reverse else centre - 3)
    out = prepare_readouts(samples, first=3, last=26, reverse=reverse, k0_start=start, n_encoded=n_encoded, n_x=16)
    np.testing.assert_allclose(out.numpy(), np.full((1, 1, 16), n_encoded**-0.5), atol=1e-7)


def test_reversed_readout_equals_the_forward_one() -> None:
    forward = complex_noise(1, 2, 16)
    a = prepare_readouts(forward, first=0, last=16, reverse=False, k0_start=0, n_encoded=16, n_x=8)
    b = prepare_readouts(forward[..., ::-1].copy(), first=0, last=16, reverse=True, k0_start=0, n_encoded=16, n_x=8)
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_strided_unaligned_view_into_a_byte_stream() -> None:
    samples = complex_noise(7, 2, 12)
    message = np.zeros((7, 342 + 2 * 12 * 8), np.uint8)
    message[:, 342:] = samples.reshape(7, -1).view(np.uint8)
    view = np.ndarray((7, 2, 12), np.complex64, buffer=message.data, offset=342, strides=(message.shape[1], 96, 8))
    kwargs = {"first": 0, "last": 12, "reverse": False, "k0_start": 0, "n_encoded": 12, "n_x": 6}
    torch.testing.assert_close(prepare_readouts(view, **kwargs), prepare_readouts(samples, **kwargs), rtol=0, atol=0)


def test_result_does_not_depend_on_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = complex_noise(40, 3, 64)
    w = torch.from_numpy(complex_noise(3, 3, seed=2))
    kwargs = {"first": 0, "last": 64, "reverse": False, "k0_start": 0, "n_encoded": 64, "n_x": 32, "whitening": w}
    together = prepare_readouts(samples, **kwargs)
    torch.testing.assert_close(together, prepare_readouts(samples, **kwargs), rtol=0, atol=0)
    alone = torch.cat([prepare_readouts(samples[i : i + 1], **kwargs) for i in range(40)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    monkeypatch.setattr(readout, "CHUNK_SAMPLES", 7 * 3 * 64)
    torch.testing.assert_close(together, prepare_readouts(samples, **kwargs), rtol=1e-5, atol=1e-5)


def test_white_noise_keeps_its_deviation_through_transform_and_crop() -> None:
    samples = complex_noise(200, 2, 128)  # E|n|^2 = 2
    out = prepare_readouts(samples, first=0, last=128, reverse=False, k0_start=0, n_encoded=128, n_x=64)
    assert float(out.abs().square().mean()) == pytest.approx(2.0, rel=0.02)


def test_empty_batch() -> None:
    out = prepare_readouts(complex_noise(0, 3, 8), first=0, last=8, reverse=False, k0_start=0, n_encoded=8, n_x=4)
    assert out.shape == (0, 3, 4)


@pytest.mark.parametrize(
    "change",
    [
        {"last": 17},
        {"first": -1},
        {"first": 9, "last": 9},
        {"k0_start": 1},
        {"k0_start": -1},
        {"k0_start": np.array([0, 0, 5])},
    ],
)
def test_misfits_are_named(change: dict[str, object]) -> None:
    kwargs: dict = {"first": 0, "last": 16, "reverse": False, "k0_start": 0, "n_encoded": 16, "n_x": 8} | change
    with pytest.raises(DataError, match=r"readout [02] of the batch"):
        prepare_readouts(complex_noise(3, 2, 16), **kwargs)


def test_other_errors() -> None:
    kwargs: dict = {"first": 0, "last": 16, "reverse": False, "k0_start": 0, "n_encoded": 16, "n_x": 8}
    with pytest.raises(DataError, match="wrong shape"):
        prepare_readouts(complex_noise(2, 16), **kwargs)
    with pytest.raises(DataError, match="whitening"):
        prepare_readouts(complex_noise(3, 2, 16), **kwargs, whitening=torch.eye(3, dtype=torch.complex64))
    with pytest.raises(DataError, match="crop"):
        prepare_readouts(complex_noise(3, 2, 16), **(kwargs | {"n_x": 17}))
    with pytest.raises(DataError, match="one value for each"):
        prepare_readouts(complex_noise(3, 2, 16), **(kwargs | {"first": np.zeros(2, int)}))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1j * np.inf])
def test_finite_checks(bad: complex) -> None:
    samples = complex_noise(4, 2, 16)
    assert all_finite(samples)
    samples[2, 1, 7] = bad
    for form in (samples, torch.from_numpy(samples)):
        assert not all_finite(form)
        np.testing.assert_array_equal(finite_readouts(form), [True, True, False, True])


def test_large_finite_values_are_finite() -> None:
    samples = np.full((2, 2, 16), 3e38, np.complex64)
    assert all_finite(samples)
    assert all_finite(torch.from_numpy(samples))
    samples[0, 0, 0] = np.inf
    samples[0, 0, 1] = -np.inf
    assert not all_finite(samples)
