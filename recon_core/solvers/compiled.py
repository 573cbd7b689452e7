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
    """Whether kernels can be compiled here; why not is said once."""
    try:
        from recon_core.solvers import patch_kernels  # noqa: F401
    except ImportError as error:  # not installed, or not for this Python or NumPy
        log.warning(
            "event=not_compiled error=%r text='the collaborative filter takes two to three times as long'", str(error)
        )
        return False
    return True


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
