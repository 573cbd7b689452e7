"""What every linear operator offers, and the two small ones that the methods compose with the acquisition model."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from recon_core.errors import DataError

Tensor = torch.Tensor


@runtime_checkable
class LinearOperator(Protocol):
    """A linear map ``A`` with its adjoint; ``normal`` is ``A^H A``, fused where that is cheaper.

    Contract, tested for every member: ``<A x, y> = <x, A^H y>``, linearity, ``normal = adjoint after forward``, and
    gradients that agree with finite differences in float64. No member edits its argument.
    """

    def forward(self, x: Tensor) -> Tensor: ...

    def adjoint(self, y: Tensor) -> Tensor: ...

    def normal(self, x: Tensor) -> Tensor: ...


class Subspace:
    """Coefficient images to states: ``x[s] = sum_k basis[s, k] c[k]``.

    Parameters
    ----------
    basis
        ``(state, component)`` with orthonormal columns, complex or real.

    Raises
    ------
    DataError
        Not a matrix, or more components than states.
    """

    def __init__(self, basis: Tensor) -> None:
        if basis.ndim != 2 or basis.shape[1] > basis.shape[0]:
            raise DataError("not a basis of states", where="subspace", got=tuple(basis.shape), expected="(state, component)")
        self.basis = basis

    def forward(self, x: Tensor) -> Tensor:
        """``(component, ...)`` to ``(state, ...)``."""
        return torch.tensordot(self.basis.to(x.dtype), x, dims=([1], [0]))

    def adjoint(self, y: Tensor) -> Tensor:
        """``(state, ...)`` to ``(component, ...)``."""
        return torch.tensordot(self.basis.to(y.dtype).conj(), y, dims=([0], [0]))

    def normal(self, x: Tensor) -> Tensor:
        """``A^H A x``; the identity when the basis is orthonormal, computed all the same."""
        return self.adjoint(self.forward(x))


class Composed:
    """``outer after inner``: ``forward(x) = outer.forward(inner.forward(x))``; uses the fused normal of ``outer``."""

    def __init__(self, outer: LinearOperator, inner: LinearOperator) -> None:
        self.outer, self.inner = outer, inner

    def forward(self, x: Tensor) -> Tensor:
        return self.outer.forward(self.inner.forward(x))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.adjoint(y))

    def normal(self, x: Tensor) -> Tensor:
        return self.inner.adjoint(self.outer.normal(self.inner.forward(x)))
