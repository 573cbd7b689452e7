"""Compiled arithmetic for the CPU, where Numba works: `recon_core.solvers.patch_kernels` on tensors, and threads for it.

Numba is loaded at the first use. Without it callers take their tensor operations, to the same result up to rounding.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

Tensor = torch.Tensor
Part = TypeVar("Part")
Found = TypeVar("Found")


@cache
def is_there() -> bool:
    """Whether kernels can be compiled here; if not, why is said once.

    They are tried, so that nothing of the compiler (not installed, not for this Python or processor, no room for its files) comes up
    within a scan.
    """
    try:
        _try()
    except Exception as error:
        log.warning(
            "event=not_compiled error=%r text='the collaborative filter takes two to three times as long'", str(error)
        )
        return False
    return True


def _try() -> None:
    """One patch that is the whole image, and nothing to take off.

    Raises
    ------
    RuntimeError
        The answer is wrong.
    """
    pixels, corners = torch.arange(1.0, 9.0).reshape(2, 2, 2), torch.zeros(1, 1, dtype=torch.int32)
    products, total, weights = torch.zeros(1, 1, 1, 2), torch.zeros(2, 2, 2), torch.zeros(2, 2)
    grams(pixels, corners, 2, products)
    cosine = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) * 0.5**0.5
    filter_groups(pixels, corners, torch.ones(1, 1, 1, dtype=torch.complex64), cosine, 0.0, total, weights)
    if not torch.allclose(total / weights[..., None], pixels) or not torch.allclose(products.sum(), pixels.square().sum()):
        raise RuntimeError("the kernels were compiled to something else")


def grams(pixels: Tensor, corners: Tensor, side: int, products: Tensor) -> None:
    """See `recon_core.solvers.patch_kernels.grams`."""
    from recon_core.solvers import patch_kernels

    patch_kernels.grams(pixels.numpy(), corners.numpy(), side, products.numpy())


def filter_groups(
    pixels: Tensor, corners: Tensor, vectors: Tensor, cosine: Tensor, level: float, total: Tensor, weights: Tensor
) -> None:
    """See `recon_core.solvers.patch_kernels.filter_groups`."""
    from recon_core.solvers import patch_kernels

    arrays = (pixels.numpy(), corners.numpy(), torch.view_as_real(vectors).numpy(), cosine.numpy())
    patch_kernels.filter_groups(*arrays, level, total.numpy(), weights.numpy())


def side_by_side(call: Callable[[Part], Found], parts: Sequence[Part]) -> list[Found]:
    """``call`` of every part, in as many threads as torch has; results in the parts' order.

    Kernels let go of the interpreter's lock. Numba's own threads are not used: two of a process's threads at once would end it.
    """
    threads = min(torch.get_num_threads(), len(parts))
    if threads == 1:
        return [call(part) for part in parts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, parts))
