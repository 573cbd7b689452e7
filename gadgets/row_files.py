"""Prepared readouts of a scan as one array: spread over files of this machine, or those of a slice in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from recon_core.errors import DataError


@dataclass(frozen=True)
class RowFiles:
    """Prepared readouts in arrival order, spread over equal chunks: a read-only, lazily mapped ``(n, coil, x)`` array."""

    paths: tuple[str, ...]
    chunk: int
    n_readouts: int
    n_coils: int
    n_x: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.n_readouts, self.n_coils, self.n_x)

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(np.complex64)

    def __len__(self) -> int:
        return self.n_readouts

    def __getitem__(self, rows: NDArray[np.integer]) -> NDArray[np.complex64]:
        rows = np.asarray(rows)
        out = np.empty((len(rows), self.n_coils, self.n_x), np.complex64)
        owner = rows // self.chunk
        for number in np.unique(owner):
            where = np.flatnonzero(owner == number)
            out[where] = self._map(int(number))[rows[where] - number * self.chunk]
        return out

    def picked(self, rows: NDArray[np.integer]) -> RowArrays:
        """Some of the readouts, in memory."""
        numbers = np.unique(rows)
        return RowArrays(numbers, self[numbers], self.n_readouts)

    def _map(self, number: int) -> NDArray[np.complex64]:
        n = min(self.chunk, self.n_readouts - number * self.chunk)
        return np.memmap(self.paths[number], np.complex64, "r", shape=(n, self.n_coils, self.n_x))


@dataclass(frozen=True)
class RowArrays:
    """Some of the prepared readouts of a scan: ``numbers`` ascending, ``data`` complex64 ``(number, coil, x)``; read like `RowFiles`."""

    numbers: NDArray[np.integer]
    data: NDArray[np.complex64]
    n_readouts: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.n_readouts, self.data.shape[1], self.data.shape[2])

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.data.dtype

    def __len__(self) -> int:
        return self.n_readouts

    def __getitem__(self, rows: NDArray[np.integer]) -> NDArray[np.complex64]:
        rows = np.asarray(rows)
        at = np.minimum(np.searchsorted(self.numbers, rows), len(self.numbers) - 1)
        if len(rows) and (self.numbers[at] != rows).any():
            missing = int(rows[self.numbers[at] != rows][0])
            raise DataError("a readout of another slice was asked for", where="packed readouts", got=missing)
        return self.data[at]
