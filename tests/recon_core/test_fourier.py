import numpy as np
import pytest
import torch

from recon_core.errors import DataError
from recon_core.fourier import centre_slice, fft_centred, ifft_centred, resize_centred


def dft_matrix(n: int) -> torch.Tensor:
    j = torch.arange(n, dtype=torch.float64) - n // 2
    return torch.exp(-2j * torch.pi * torch.outer(j, j) / n) / n**0.5


@pytest.mark.parametrize("n", [1, 2, 5, 8, 9])
def test_equals_the_defining_sum(n: int) -> None:
    x = torch.randn(3, n, dtype=torch.complex128, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(fft_centred(x, -1), x @ dft_matrix(n).T)
    torch.testing.assert_close(ifft_centred(x, 1), x @ dft_matrix(n).conj().T)


@pytest.mark.parametrize("axes", [-1, (-2, -1), (0, 2), (-3, -2, -1)])
def test_inverse_adjoint_and_norm(axes: int | tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=torch.complex128, generator=g)
    y = torch.randn(4, 5, 6, dtype=torch.complex128, generator=g)
    torch.testing.assert_close(ifft_centred(fft_centred(x, axes), axes), x)
    torch.testing.assert_close(
        torch.vdot(fft_centred(x, axes).ravel(), y.ravel()), torch.vdot(x.ravel(), ifft_centred(y, axes).ravel())
    )
    assert float(fft_centred(x, axes).norm()) == pytest.approx(float(x.norm()))


def test_precision_is_kept_and_input_untouched() -> None:
    x = torch.ones(4, 4, dtype=torch.complex64)
    assert fft_centred(x, -1).dtype == torch.complex64
    assert fft_centred(torch.ones(4), -1).dtype == torch.complex64
    assert bool((x == 1).all())


@pytest.mark.parametrize(("n", "kept"), [(8, 4), (8, 5), (9, 4), (9, 5), (7, 7), (5, 1)])
def test_crop_and_pad_keep_the_centre(n: int, kept: int) -> None:
    x = torch.zeros(2, n)
    x[:, n // 2] = 1
    small = resize_centred(x, 1, kept)
    assert small.shape == (2, kept)
    assert bool((small[:, kept // 2] == 1).all())
    back = resize_centred(small, -1, n)
    torch.testing.assert_close(back, x)
    np.testing.assert_array_equal(np.arange(n)[centre_slice(n, kept)][kept // 2], n // 2)


def test_errors_name_the_axes() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(DataError, match="no such axis"):
        fft_centred(x, 2)
    with pytest.raises(DataError, match="twice"):
        ifft_centred(x, (1, -1))
    with pytest.raises(DataError, match="crop"):
        centre_slice(4, 5)
