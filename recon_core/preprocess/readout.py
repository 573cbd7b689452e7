"""The streaming hot path: raw readouts to whitened hybrid space, while the scan still runs."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch

from recon_core.errors import DataError
from recon_core.fourier import centre_slice

Tensor = torch.Tensor

CHUNK_SAMPLES = 1 << 18
"""Complex samples handled at a time (2 MiB): intermediate results stay in the cache and in reused pages. Fresh pages for a
whole batch cost more than the transform itself."""

PerReadout = int | np.ndarray | Tensor


def prepare_readouts(
    samples: Tensor | np.ndarray,
    *,
    first: PerReadout,
    last: PerReadout,
    reverse: bool | np.ndarray | Tensor,
    k0_start: PerReadout,
    n_encoded: int,
    n_x: int,
    whitening: Tensor | None = None,
) -> Tensor:
    """Discard, flip, place on the k0 grid, transform, crop and whiten.

    ``out[i] = whitening @ crop(IFFT(grid_i))``, where the grid of length ``n_encoded`` holds the samples
    ``first..last-1`` (flipped when ``reverse``) from index ``k0_start`` on and zeros elsewhere. The inverse transform is
    centred and orthonormal over ``n_encoded``; the crop keeps values (Gadgetron does the same).

    Parameters
    ----------
    samples
        complex64 ``(readout, coil, sample)`` as acquired; a NumPy view into a receive buffer will do. Not modified.
    first, last
        Range of valid samples in the order of acquisition; ``discard_pre`` and ``number_of_samples - discard_post``.
    reverse
        The readout was acquired from +k0 to -k0.
    k0_start
        Grid index of the valid sample that comes first after the flip: ``n_encoded // 2`` less the valid samples before k0 = 0.
        ``first``, ``last``, ``reverse`` and ``k0_start`` are one value, or one for each readout.
    n_encoded, n_x
        Length of the k0 grid and of the cropped image axis.
    whitening
        complex64 ``(virtual coil, coil)``; may have a coil compression folded in (``compression @ whitening``).

    Returns
    -------
    complex64 ``(readout, coil or virtual coil, x)``. A readout's result depends on the others of its batch by rounding only.

    Raises
    ------
    DataError
        Shapes that do not fit, an empty range, or a readout that leaves the grid (its position in the batch is named).
    """
    if samples.ndim != 3:
        raise DataError("wrong shape", where="readouts", got=tuple(samples.shape), expected="(readout, coil, sample)")
    n, n_coils, n_samples = (int(s) for s in samples.shape)
    if not 0 < n_x <= n_encoded:
        raise DataError("cannot crop the readout", where="readouts", got=n_x, expected=f"1 to {n_encoded} samples")
    if whitening is not None and (whitening.ndim != 2 or whitening.shape[1] != n_coils):
        raise DataError(
            "whitening does not fit the coils", where="readouts", got=tuple(whitening.shape), expected=f"(any, {n_coils})"
        )
    device = samples.device if isinstance(samples, Tensor) else torch.device("cpu")
    layout = np.stack([_per_readout(v, n) for v in (first, last, reverse, k0_start)])
    _check_layout(layout, n_samples, n_encoded)

    n_out = n_coils if whitening is None else int(whitening.shape[0])
    out = torch.empty(n, n_out, n_x, dtype=torch.complex64, device=device)
    if not n:
        return out
    matrix = None if whitening is None else whitening.to(device=device, dtype=torch.complex64)
    phase = _output_phase(n_encoded, n_x, device)
    step = max(1, CHUNK_SAMPLES // (n_coils * n_encoded))
    for start, stop in _runs(layout, step):
        grid = _place(samples[start:stop], layout[:, start], n_encoded)
        image = _transform_and_crop(grid, n_x, phase)
        if matrix is None:
            out[start:stop] = image
        else:
            torch.matmul(matrix, image, out=out[start:stop])
    return out


def all_finite(samples: Tensor | np.ndarray) -> bool:
    """No NaN and no infinity. One pass of additions; the far slower test runs only where a sum overflowed or failed."""
    if isinstance(samples, Tensor):
        return bool(torch.isfinite(samples.sum())) or bool(torch.isfinite(samples).all())
    with np.errstate(invalid="ignore", over="ignore"):
        return bool(np.isfinite(samples.sum())) or bool(np.isfinite(samples).all())


def finite_readouts(samples: Tensor | np.ndarray) -> np.ndarray:
    """bool ``(readout,)``: which readouts of ``(readout, coil, sample)`` have only finite samples."""
    values = samples.cpu().numpy() if isinstance(samples, Tensor) else samples
    return np.asarray(np.isfinite(values).all(axis=(1, 2)))


def _per_readout(value: PerReadout | bool, n: int) -> np.ndarray:
    array = np.asarray(value.cpu() if isinstance(value, Tensor) else value).astype(np.int64)
    if array.ndim and array.shape != (n,):
        raise DataError("not one value for each readout", where="readouts", got=array.shape, expected=f"({n},)")
    return np.broadcast_to(array, (n,))


def _check_layout(layout: np.ndarray, n_samples: int, n_encoded: int) -> None:
    first, last, _, k0_start = layout
    bad = (first < 0) | (last > n_samples) | (first >= last) | (k0_start < 0) | (k0_start + last - first > n_encoded)
    if bad.any():
        i = int(np.flatnonzero(bad)[0])
        raise DataError(
            "samples do not fit the readout grid",
            where=f"readout {i} of the batch",
            got=f"samples {first[i]} to {last[i]} of {n_samples} from grid index {k0_start[i]}",
            expected=f"a range inside {n_samples} samples and inside a grid of {n_encoded}",
            remedy="Check center_sample, discard_pre, discard_post and the encoded matrix",
        )


def _runs(layout: np.ndarray, step: int) -> list[tuple[int, int]]:
    """Consecutive readouts of one layout, ``step`` at most: a whole batch usually has one layout."""
    n = layout.shape[1]
    edges = [0, *(np.flatnonzero((layout[:, 1:] != layout[:, :-1]).any(axis=0)) + 1).tolist(), n]
    return [(a, min(a + step, e)) for b, e in pairwise(edges) for a in range(b, e, step)]


def _place(samples: Tensor | np.ndarray, layout: np.ndarray, n_encoded: int) -> Tensor:
    first, last, reverse, k0_start = (int(v) for v in layout)
    valid = _as_tensor(samples)[..., first:last]
    if reverse:
        valid = valid.flip(-1)
    if valid.shape[-1] == n_encoded:
        return valid
    grid = torch.zeros(*valid.shape[:-1], n_encoded, dtype=torch.complex64, device=valid.device)
    grid[..., k0_start : k0_start + valid.shape[-1]] = valid
    return grid


def _as_tensor(samples: Tensor | np.ndarray) -> Tensor:
    """A view where torch can have one; a copy of this chunk where the bytes are unaligned, read-only or of another dtype."""
    if isinstance(samples, Tensor):
        return samples.to(torch.complex64)
    whole = all(s % 8 == 0 and s >= 0 for s in samples.strides)
    if samples.dtype != np.complex64 or not (samples.flags.aligned and samples.flags.writeable and whole):
        samples = np.array(samples, dtype=np.complex64)
    return torch.from_numpy(samples)


def _output_phase(n: int, n_x: int, device: torch.device) -> Tensor:
    """What turns a plain inverse FFT of an unshifted grid into the centred, orthonormal one, on the kept pixels.

    With c = n//2, ``exp(2 pi i (k-c)(x-c)/n) = exp(2 pi i k (x-c)/n) * exp(-2 pi i c (x-c)/n)``: reading the output from
    index ``x - c`` (two slices) and multiplying by a phase replaces both shifts. The phase is +-1 for even n.
    """
    crop = centre_slice(n, n_x)
    x = torch.arange(crop.start, crop.stop, dtype=torch.int64) - n // 2
    turns = (n // 2) * x % n
    factor = torch.polar(torch.full((n_x,), math.sqrt(n), dtype=torch.float64), -2 * math.pi * turns.double() / n)
    if n % 2 == 0:
        return factor.real.to(device=device, dtype=torch.float32)
    return factor.to(device=device, dtype=torch.complex64)


def _transform_and_crop(grid: Tensor, n_x: int, phase: Tensor) -> Tensor:
    image = torch.fft.ifft(grid, dim=-1)
    before = n_x // 2
    cropped = torch.empty(*image.shape[:-1], n_x, dtype=torch.complex64, device=image.device)
    if before:
        torch.mul(image[..., image.shape[-1] - before :], phase[:before], out=cropped[..., :before])
    torch.mul(image[..., : n_x - before], phase[before:], out=cropped[..., before:])
    return cropped
