"""Samples of framed readouts, read from the verbatim log of the stream.

A log is a file whose byte ``i`` is byte ``i`` of the stream (``gadgets.spool``), so the offsets of a ``Readouts`` event are
file positions. Reads are large and in file order; readouts at a constant distance are decoded by one strided view.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gadgets.errors import SpoolError
from gadgets.wire import compression
from gadgets.wire.dtypes import READOUT_RECORD, Flag, has_flag
from recon_core.errors import DataError

BLOCK_BYTES = 4 << 20
"""One read. Small enough to stay in the processor's cache until it is decoded."""

GAP_BYTES = 64 << 10
"""Bytes between two wanted pieces that are read and thrown away rather than skipped."""

_HEAD = READOUT_RECORD.itemsize
_SHAPE_FIELDS = ("number_of_samples", "active_channels", "trajectory_dimensions")


def groups(headers: NDArray[np.void]) -> Iterator[NDArray[np.intp]]:
    """Indices of readouts that have the same samples, active channels, trajectory dimensions and NHLBI flag.

    Yields
    ------
    Ascending index arrays; together they hold every readout once. Groups come in the order of their first readout.
    """
    if not len(headers):
        return
    packed = has_flag(headers, Flag.ACQ_COMPRESSION2).astype(np.uint64)
    key = packed
    for name in _SHAPE_FIELDS:
        key = (key << np.uint64(16)) | headers[name]
    if (key == key[0]).all():
        yield np.arange(len(key))
        return
    _, first, inverse = np.unique(key, return_index=True, return_inverse=True)
    for group in np.argsort(first):
        yield np.flatnonzero(inverse == group)


def read_samples(
    log: str | os.PathLike[str] | int,
    headers: NDArray[np.void],
    offsets: NDArray[np.int64],
    payload_bytes: NDArray[np.int64],
    out: NDArray[np.complex64] | None = None,
) -> NDArray[np.complex64]:
    """Samples of readouts with the same number of samples and active channels.

    Parameters
    ----------
    log
        Path or open file descriptor of the verbatim log.
    headers, offsets, payload_bytes
        ``(n,)``, of a ``Readouts`` event or a selection from several; any order. NHLBI-compressed ones are decoded.
    out
        Where to put them, complex64 ``(n, coil, sample)``; allocated when ``None``.

    Returns
    -------
    complex64 ``(n, coil, sample)``.

    Raises
    ------
    DataError
        The readouts differ in shape (see ``groups``).
    SpoolError
        The log ends before a readout does.
    MalformedMessage
        A compressed buffer contradicts its header.
    """
    n = len(headers)
    channels, samples = _common(headers, "active_channels"), _common(headers, "number_of_samples")
    if out is None:
        out = np.empty((n, channels, samples), np.complex64)
    elif out.shape != (n, channels, samples) or out.dtype != np.complex64:
        raise DataError(
            "no place for the samples", got=f"{out.dtype} {out.shape}", expected=f"complex64 {(n, channels, samples)}"
        )
    packed = has_flag(headers, Flag.ACQ_COMPRESSION2)
    skip = _HEAD + 4 * samples * headers["trajectory_dimensions"].astype(np.int64)
    sizes = np.where(packed, _HEAD + payload_bytes, skip + 8 * channels * samples)
    with _descriptor(log) as fd:
        for where, view, starts in _blocks(fd, offsets, sizes):
            plain = where[~packed[where]]
            at = starts[~packed[where]] + skip[plain]
            for rows, run in _even_runs(at):
                shape, strides = (len(rows), channels, samples), (run, 8 * samples, 8)
                # complex64 may lie at any byte here; numpy copies such views correctly
                source = (
                    np.ndarray(shape, "<c8", view, offset=int(at[rows.start]), strides=strides) if samples * channels else 0
                )
                out[_slice(plain[rows.start : rows.stop])] = source
            for i, start in zip(where[packed[where]], starts[packed[where]], strict=True):
                first = int(start + skip[i]) + 4
                buffer = view[first : int(start + _HEAD + payload_bytes[i])]
                out[i] = compression.decode(buffer, 2 * channels * samples).view(np.complex64).reshape(channels, samples)
    return out


def _common(headers: NDArray[np.void], field: str) -> int:
    values = headers[field]
    if not len(values):
        return 0
    if (values != values[0]).any():
        raise DataError(
            f"readouts differ in {field}", got=sorted(set(values.tolist()))[:8], expected="readouts of one shape"
        )
    return int(values[0])


@contextmanager
def _descriptor(log: str | os.PathLike[str] | int) -> Iterator[int]:
    if isinstance(log, int):
        yield log
        return
    try:
        fd = os.open(log, os.O_RDONLY)
    except OSError as error:
        raise SpoolError("the capture cannot be opened", where=Path(log).name, got=error.strerror) from None
    try:
        yield fd
    finally:
        os.close(fd)


def _blocks(
    fd: int, offsets: NDArray[np.int64], sizes: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.intp], memoryview, NDArray[np.int64]]]:
    """Read pieces of a file in file order, neighbours together.

    Yields
    ------
    Which pieces, the bytes that hold them (valid until the next step), and where in these bytes each begins.
    """
    order = np.argsort(offsets, kind="stable")
    starts, ends = offsets[order], (offsets + sizes)[order]
    breaks = np.append(np.flatnonzero(starts[1:] - ends[:-1] > GAP_BYTES) + 1, len(order))
    buffer = bytearray(0)
    i = 0
    while i < len(order):
        j = max(i + 1, int(np.searchsorted(ends, starts[i] + BLOCK_BYTES, side="right")))
        j = min(j, int(breaks[np.searchsorted(breaks, i, side="right")]))
        low, high = int(starts[i]), int(ends[i:j].max())
        if high - low > len(buffer):
            buffer = bytearray(max(high - low, min(BLOCK_BYTES, int(ends[-1]) - low)))
        view = memoryview(buffer)[: high - low]
        _read_exactly(fd, view, low)
        yield order[i:j], view, starts[i:j] - low
        i = j


def _read_exactly(fd: int, view: memoryview, position: int) -> None:
    got = 0
    while got < len(view):
        n = os.preadv(fd, [view[got:]], position + got)
        if n == 0:
            raise SpoolError(
                "the capture ends before a readout does",
                where=f"byte {position}",
                got=f"{got} bytes",
                expected=f"{len(view)} bytes",
                remedy="The disk may have been full, or the capture was cut",
            )
        got += n


def _even_runs(at: NDArray[np.int64]) -> Iterator[tuple[range, int]]:
    """Split ascending positions into runs of constant distance: ``(indices, distance)``."""
    n = len(at)
    if n == 0:
        return
    gaps = np.diff(at)
    cuts = np.flatnonzero(np.diff(gaps)) + 1
    i = 0
    while i < n:
        k = int(np.searchsorted(cuts, i, side="right"))
        last = int(cuts[k]) if k < len(cuts) else n - 1
        last = max(last, i)
        yield range(i, last + 1), int(gaps[i]) if last > i else 0
        i = last + 1


def _slice(indices: NDArray[np.intp]) -> slice | NDArray[np.intp]:
    """The same selection as a slice where possible: numpy then copies once instead of twice."""
    first, last = int(indices[0]), int(indices[-1])
    if last - first == len(indices) - 1 and (np.diff(indices) == 1).all():
        return slice(first, last + 1)
    return indices
