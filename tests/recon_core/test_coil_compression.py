import pytest
import torch

from recon_core.errors import DataError
from recon_core.fourier import fft_centred
from recon_core.preprocess.coil_compression import compress, compress_geometric, compression_matrix, geometric_compression
from tests.recon_core.coil_phantom import phantom, smooth_maps

SHAPE = (8, 24, 32)


def coil_images(n_coils: int = 12) -> torch.Tensor:
    return smooth_maps(n_coils, SHAPE) * phantom(SHAPE)


def rss(images: torch.Tensor, axis: int = 0) -> torch.Tensor:
    return torch.linalg.vector_norm(images, dim=axis)


def test_known_rank_is_found_and_nothing_is_lost() -> None:
    g = torch.Generator().manual_seed(0)
    sources = torch.randn(3, 500, dtype=torch.complex64, generator=g)
    data = torch.randn(10, 3, dtype=torch.complex64, generator=g) @ sources
    matrix = compression_matrix(data, energy=0.999999)
    assert matrix.shape == (3, 10)
    torch.testing.assert_close(matrix.mH @ (matrix @ data), data, rtol=0, atol=1e-4)


def test_rows_are_orthonormal_strongest_first_and_repeatable() -> None:
    data = coil_images()
    matrix = compression_matrix(data, 5)
    torch.testing.assert_close(matrix @ matrix.mH, torch.eye(5, dtype=torch.complex64), atol=1e-5, rtol=0)
    energy = compress(data, matrix, 0).abs().square().flatten(1).sum(dim=1)
    assert bool((energy[:-1] >= energy[1:]).all())
    torch.testing.assert_close(compression_matrix(data, 5), matrix, rtol=0, atol=0)
    # the phase convention leaves nothing to the solver: data times a phase have the same matrix
    torch.testing.assert_close(compression_matrix(1j * data, 5), matrix, rtol=0, atol=1e-4)
    largest = matrix.gather(1, matrix.abs().argmax(dim=1, keepdim=True))
    assert bool((largest.real > 0).all())
    assert float(largest.imag.abs().max()) < 1e-6


def test_k_space_and_images_agree_and_energy_is_kept() -> None:
    images = coil_images()
    a = compression_matrix(images, 6)
    b = compression_matrix(fft_centred(images, (1, 2)), 6)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)
    matrix = compression_matrix(images, energy=0.99)
    kept = compress(images, matrix, 0).abs().square().sum() / images.abs().square().sum()
    assert float(kept) >= 0.99
    fewer = compress(images, matrix[:-1], 0).abs().square().sum() / images.abs().square().sum()
    assert float(fewer) < 0.99


def test_compress_along_any_axis() -> None:
    g = torch.Generator().manual_seed(0)
    data = torch.randn(2, 5, 4, 3, 6, dtype=torch.complex64, generator=g)
    matrix = torch.randn(2, 5, dtype=torch.complex64, generator=g)
    torch.testing.assert_close(compress(data, matrix, -4), torch.einsum("vc,scabx->svabx", matrix, data))
    torch.testing.assert_close(compress(data[0], matrix, 0), torch.einsum("vc,cabx->vabx", matrix, data[0]))


def test_more_virtual_coils_than_coils_means_all() -> None:
    data = coil_images(4)
    assert compression_matrix(data, 9).shape == (4, 4)
    torch.testing.assert_close(rss(compress(data, compression_matrix(data, 9), 0)), rss(data), rtol=0, atol=1e-5)


def test_geometric_loses_less_than_one_matrix() -> None:
    images = coil_images()
    matrices = geometric_compression(images, 4)
    assert matrices.shape == (32, 4, 12)
    assert matrices.dtype == torch.complex64
    geometric = compress_geometric(images, matrices)
    single = compress(images, compression_matrix(images, 4), 0)
    lost_geometric = 1 - float(geometric.abs().square().sum() / images.abs().square().sum())
    lost_single = 1 - float(single.abs().square().sum() / images.abs().square().sum())
    assert lost_geometric < 0.5 * lost_single


def test_geometric_rows_are_orthonormal_and_smooth_along_x() -> None:
    images = coil_images()
    images[..., :3] = 0
    matrices = geometric_compression(images, 6)
    eye = torch.eye(6, dtype=torch.complex64).expand(32, 6, 6)
    torch.testing.assert_close(matrices @ matrices.mH, eye, atol=1e-5, rtol=0)
    # where there is signal; unaligned neighbours differ by more than 1
    inside = matrices[7:-7]
    assert float((inside[1:] - inside[:-1]).flatten(1).norm(dim=1).max()) < 0.3
    torch.testing.assert_close(geometric_compression(images, 6), matrices, rtol=0, atol=0)


def test_geometric_with_all_coils_keeps_everything() -> None:
    images = coil_images(5)
    out = compress_geometric(images, geometric_compression(images, 8))
    torch.testing.assert_close(rss(out), rss(images), rtol=0, atol=1e-5)


def test_white_noise_stays_white() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(12, 40, 50, 32, dtype=torch.complex64, generator=g)
    out = compress_geometric(noise, geometric_compression(coil_images(), 4)).reshape(4, -1)
    covariance = out @ out.mH / out.shape[1]
    torch.testing.assert_close(covariance, torch.eye(4, dtype=torch.complex64), atol=0.02, rtol=0)


def test_states_in_front_of_the_coils() -> None:
    images = coil_images(5)
    matrices = geometric_compression(images, 3)
    both = compress_geometric(torch.stack([images, 2 * images]), matrices)
    torch.testing.assert_close(both[1], 2 * compress_geometric(images, matrices))


def test_errors() -> None:
    data = coil_images(4)
    with pytest.raises(DataError, match="one of n_virtual and energy"):
        compression_matrix(data)
    with pytest.raises(DataError, match="one of n_virtual and energy"):
        compression_matrix(data, 3, energy=0.9)
    with pytest.raises(DataError, match="at least one"):
        compression_matrix(data, 0)
    with pytest.raises(DataError, match="energy out of range"):
        compression_matrix(data, energy=1.5)
    with pytest.raises(DataError, match="no signal"):
        compression_matrix(torch.zeros_like(data), 2)
    with pytest.raises(DataError, match="wrong shape"):
        geometric_compression(data[0], 2)
    with pytest.raises(DataError, match="out of range"):
        geometric_compression(data, 2, window=4)
    with pytest.raises(DataError, match="do not fit"):
        compress_geometric(data[..., :8], geometric_compression(data, 2))
