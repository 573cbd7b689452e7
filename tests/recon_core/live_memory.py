"""How much memory tensors take at most while something is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveMemory(TorchDispatchMode):
    """Sum of the storages that were made inside and still live, after every operation; what came from outside does not count.

    Exact and the same on every machine, other than the process's memory; blind to what an operation uses for itself.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._outside: dict[int, StorageWeakRef] = {}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self._outside = {key: held for key, held in self._outside.items() if not held.expired()}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._made:
                self._outside.setdefault(storage._cdata, StorageWeakRef(storage))
        out = func(*args, **kwargs)
        for storage in _storages(out):
            if storage._cdata not in self._outside:
                self._made.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(n for _, n in self._made.values()))
        return out


def _storages(tree: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_iter(tree) if isinstance(leaf, torch.Tensor)]


def peak_bytes(work: Callable[[], object]) -> int:
    """Of what ``work`` makes."""
    with LiveMemory() as memory:
        work()
    return memory.peak
