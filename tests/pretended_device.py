"""A device that is none: its tensors say that they lie elsewhere, and are computed on the CPU.

What a GPU refuses is refused here too: tensors of two devices in one operation, indices of the wrong one, a tensor that is taken for
NumPy's. So code for a GPU can be run where there is none, values included; speed, streams, memory and random
number generators of the wrong device cannot be seen.

PyTorch lets one process have one such device, for good: whoever imports this module should be a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self
from unittest import mock

import torch
import torch.utils.backend_registration as registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretended"
aten = torch.ops.aten

ACROSS = (aten.copy_.default, aten._to_copy.default)
"""May see both devices."""
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""May have indices of the CPU where the tensor is elsewhere, not the other way."""
LAZY = {aten._conj.default: aten.conj_physical.default, aten._neg_view.default: aten.neg.default}
"""Views with a flag that the tensor underneath would hide."""


class _Module(registration._DummyBackendModule):  # type: ignore[misc, name-defined]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
DEVICE = torch.device(NAME, 0)


class Elsewhere(torch.Tensor):
    """A tensor of the device; ``values`` on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, values.shape, values.stride(), values.storage_offset(), dtype=values.dtype, device=DEVICE
        )
        made.values = values
        return made  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{NAME}: {self.values!r}"


def _leaves(value: Any) -> Iterator[Any]:
    """What lies in nested sequences and mappings, as an operation's arguments do.

    PyTorch's own trees know more kinds, and would take most of the time.
    """
    if isinstance(value, (list, tuple)):
        for one in value:
            yield from _leaves(one)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _changed(change: Callable[[Any], Any], value: Any) -> Any:
    """The same nesting of changed leaves."""
    if isinstance(value, (list, tuple)):
        return type(value)([_changed(change, one) for one in value])
    if isinstance(value, dict):
        return {key: _changed(change, one) for key, one in value.items()}
    return change(value)


def _values(value: Any) -> Any:
    return value.values if isinstance(value, Elsewhere) else value


def _computed(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    func = LAZY.get(func, func)
    tensors = [t for t in _leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, Elsewhere)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
    indexed_here = func in INDEXING and not isinstance(args[0], Elsewhere)
    if there and (indexed_here or (here and func not in ACROSS + INDEXING)):
        raise RuntimeError(f"Expected all tensors to be on the same device: {func}")
    kwargs = dict(kwargs)
    if kwargs.get("device") is not None:
        elsewhere = torch.device(kwargs["device"]).type == NAME
        kwargs["device"] = torch.device("cpu")
    else:
        elsewhere = isinstance(args[0], Elsewhere) if func is aten.copy_.default else bool(there)
    if elsewhere:
        kwargs.pop("pin_memory", None)
    found = func(*_changed(_values, tuple(args)), **_changed(_values, kwargs))
    changed = {id(t.values): t for t in there}  # of an operation in place, the tensor itself

    def wrapped(value: Any) -> Any:
        if not elsewhere or not isinstance(value, torch.Tensor):
            return value
        return changed.get(id(value)) if id(value) in changed else Elsewhere(value)

    return _changed(wrapped, found)


class _Generator(torch.Generator):
    """One of the device is the CPU's."""

    def __new__(cls, device: torch.device | str = "cpu") -> Self:
        return super().__new__(cls, "cpu" if torch.device(device).type == NAME else device)


class Pretending(TorchDispatchMode):
    """While it lasts, `DEVICE` is one."""

    def __enter__(self) -> Self:
        self._patch = mock.patch("torch.Generator", _Generator)
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *failure: Any) -> None:
        super().__exit__(*failure)
        self._patch.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


# where torch makes tensors beneath what a mode sees
_library = torch.library.Library("aten", "IMPL")


def _implemented(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _library.impl(name, function, "PrivateUse1")
        return function

    return register


@_implemented("empty_strided")
def _empty_strided(size: Any, stride: Any, dtype: Any = None, **others: Any) -> torch.Tensor:
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


@_implemented("empty.memory_format")
def _empty(size: Any, dtype: Any = None, memory_format: Any = None, **others: Any) -> torch.Tensor:
    return Elsewhere(torch.empty(size, dtype=dtype, memory_format=memory_format))


@_implemented("_copy_from")
def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _values(target).copy_(_values(source))
    return target
