"""Composite messages that Gadgetron sends to external nodes: ReconData (1023) and AcquisitionBucket (1050).

They carry no total length, so their size is known only while they are read. Each reader is a generator that yields how many
bytes it needs next and is sent exactly these by ``FrameParser``.

Gadgetron's arrays are column-major with the first axis fastest; here the axes are reversed (C order, last fastest).
"""

from __future__ import annotations

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gadgets.errors import Disconnected, MalformedMessage, Oversized
from gadgets.wire.dtypes import ACQUISITION_HEADER, WAVEFORM_HEADER

Parts = Generator[int, bytes, Any]

SAMPLING_DESCRIPTION = np.dtype(
    {
        "names": ["encoded_fov", "recon_fov", "encoded_matrix", "recon_matrix", "limits"],
        "formats": [("<f4", 3), ("<f4", 3), ("<u2", 3), ("<u2", 3), ("<u2", (3, 3))],
        "offsets": [0, 12, 24, 30, 36],
        "itemsize": 56,
    }
)
"""Fields of view in mm; ``limits`` is ``(axis, minimum/center/maximum)``. Written as one C structure, 2 bytes of padding."""

_MAX_DIMS = 10
STATISTICS = (
    "kspace_encode_step_1",
    "kspace_encode_step_2",
    "slice",
    "phase",
    "contrast",
    "repetition",
    "set",
    "segment",
    "average",
)


@dataclass(frozen=True)
class ReconBuffer:
    """One buffer of a ReconData bit.

    ``data`` complex64 ``(loc, s, n, coil, e2, e1, e0)``; ``trajectory`` and ``density`` float32 or ``None``; ``headers``
    ``(loc, s, n, e2, e1)``; ``sampling`` of ``SAMPLING_DESCRIPTION``.
    """

    data: NDArray[np.complex64]
    trajectory: NDArray[np.float32] | None
    density: NDArray[np.float32] | None
    headers: NDArray[np.void]
    sampling: np.void


@dataclass(frozen=True)
class ReconData:
    """Message 1023: for each encoding space the data buffer and, if there is one, the reference buffer."""

    bits: tuple[tuple[ReconBuffer, ReconBuffer | None], ...]


@dataclass(frozen=True)
class BucketPart:
    """Readouts of a bucket: headers ``(n,)``, one ``(coil, sample)`` array and one trajectory (or ``None``) per readout.

    ``statistics`` holds, for each encoding space, the set of values of each counter in ``STATISTICS``.
    """

    headers: NDArray[np.void]
    samples: tuple[NDArray[np.complex64], ...]
    trajectories: tuple[NDArray[np.float32] | None, ...]
    statistics: tuple[dict[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Bucket:
    """Message 1050: imaging readouts, reference readouts and waveforms ``(header, uint32 (channel, sample))``."""

    data: BucketPart
    reference: BucketPart
    waveforms: tuple[tuple[np.void, NDArray[np.uint32]], ...]


class _Budget:
    """The bytes that one message may still have; spent before they are asked for."""

    def __init__(self, limit: int, what: str) -> None:
        self.left, self.limit, self.what = limit, limit, what

    def spend(self, n: int) -> int:
        if n > self.left:
            raise Oversized(
                f"{self.what} is larger than this side accepts", got=f"over {n} bytes", expected=f"{self.limit} bytes"
            )
        self.left -= n
        return n


def recon_data(limit: int) -> Parts:
    """Parts of a 1023 message behind its id; returns ``ReconData``. ``limit`` caps all of it in bytes."""
    budget = _Budget(limit, "ReconData")
    n_bits = yield from _u64(budget)
    bits = []
    for _ in range(n_bits):
        buffer = yield from _recon_buffer(budget)
        reference = (yield from _recon_buffer(budget)) if (yield from _present(budget)) else None
        bits.append((buffer, reference))
    return ReconData(tuple(bits))


def bucket(limit: int) -> Parts:
    """Parts of a 1050 message behind its id; returns ``Bucket``. ``limit`` caps all of it in bytes."""
    budget = _Budget(limit, "AcquisitionBucket")
    meta = np.frombuffer((yield budget.spend(104)), "<u8").tolist()
    budget.spend(sum(meta[1:4]) + sum(meta[5:8]) + meta[8] + meta[9] + meta[11] + meta[12])  # all of it, at once
    data = yield from _bucket_part(meta[0:4], meta[8])
    reference = yield from _bucket_part(meta[4:8], meta[9])
    _agree("waveform headers", meta[11], meta[10] * WAVEFORM_HEADER.itemsize)
    headers = np.frombuffer((yield meta[11]), WAVEFORM_HEADER)
    counts = headers["channels"].astype(np.int64) * headers["number_of_samples"]
    _agree("waveform data", meta[12], 4 * int(counts.sum()))
    values = np.frombuffer((yield meta[12]), "<u4")
    pieces = np.split(values, np.cumsum(counts)[:-1]) if len(counts) else []
    shaped = (p.reshape(int(h["channels"]), int(h["number_of_samples"])) for h, p in zip(headers, pieces, strict=True))
    return Bucket(data, reference, tuple(zip(headers, shaped, strict=True)))


def _drive(parts: Parts, buffer: bytes | memoryview, what: str) -> tuple[object, int]:
    view, at = memoryview(buffer).cast("B"), 0
    try:
        need = next(parts)
        while True:
            if need > len(view) - at:
                raise Disconnected(
                    f"the bytes end in the middle of {what}", got=f"{len(view) - at} more", expected=f"{need} more"
                )
            at += need
            need = parts.send(bytes(view[at - need : at]))
    except StopIteration as done:
        return done.value, at


def _u64(budget: _Budget) -> Generator[int, bytes, int]:
    return int.from_bytes((yield budget.spend(8)), "little")


def _present(budget: _Budget) -> Generator[int, bytes, bool]:
    return (yield budget.spend(1)) != b"\0"


def _array(budget: _Budget, dtype: np.dtype[Any]) -> Generator[int, bytes, NDArray[Any]]:
    n_dims = yield from _u64(budget)
    if n_dims > _MAX_DIMS:
        raise Oversized("an array has too many axes", where=budget.what, got=n_dims, expected=f"at most {_MAX_DIMS}")
    shape = np.frombuffer((yield budget.spend(8 * n_dims)), "<u8").tolist()[::-1]
    if max(shape, default=0) > budget.limit:
        raise Oversized("an array's axis is too long", where=budget.what, got=max(shape), expected=f"at most {budget.limit}")
    raw = yield budget.spend(dtype.itemsize * math.prod(shape))
    return np.frombuffer(raw, dtype).reshape(shape)


def _recon_buffer(budget: _Budget) -> Generator[int, bytes, ReconBuffer]:
    data = yield from _array(budget, np.dtype("<c8"))
    trajectory = (yield from _array(budget, np.dtype("<f4"))) if (yield from _present(budget)) else None
    density = (yield from _array(budget, np.dtype("<f4"))) if (yield from _present(budget)) else None
    headers = yield from _array(budget, ACQUISITION_HEADER)
    sampling = np.frombuffer((yield budget.spend(SAMPLING_DESCRIPTION.itemsize)), SAMPLING_DESCRIPTION)[0]
    return ReconBuffer(data, trajectory, density, headers, sampling)


def _bucket_part(meta: list[int], stats_bytes: int) -> Generator[int, bytes, BucketPart]:
    count, header_bytes, data_bytes, trajectory_bytes = meta
    _agree("readout headers", header_bytes, count * ACQUISITION_HEADER.itemsize)
    headers = np.frombuffer((yield header_bytes), ACQUISITION_HEADER)
    samples = headers["number_of_samples"].astype(np.int64)
    n_samples, n_points = samples * headers["active_channels"], samples * headers["trajectory_dimensions"]
    _agree("trajectories", trajectory_bytes, 4 * int(n_points.sum()))
    _agree("samples", data_bytes, 8 * int(n_samples.sum()))
    points = np.frombuffer((yield trajectory_bytes), "<f4")
    values = np.frombuffer((yield data_bytes), "<c8")
    statistics = _statistics((yield stats_bytes))
    split_points = np.split(points, np.cumsum(n_points)[:-1]) if count else []
    split_values = np.split(values, np.cumsum(n_samples)[:-1]) if count else []
    return BucketPart(
        headers=headers,
        samples=tuple(
            v.reshape(int(h["active_channels"]), int(h["number_of_samples"]))
            for h, v in zip(headers, split_values, strict=True)
        ),
        trajectories=tuple(
            p.reshape(int(h["number_of_samples"]), int(h["trajectory_dimensions"])) if p.size else None
            for h, p in zip(headers, split_points, strict=True)
        ),
        statistics=statistics,
    )


def _statistics(raw: bytes) -> tuple[dict[str, tuple[int, ...]], ...]:
    value, taken = _drive(_statistics_parts(len(raw)), raw, "bucket statistics")
    _agree("bucket statistics", taken, len(raw))
    assert isinstance(value, tuple)
    return value


def _statistics_parts(limit: int) -> Parts:
    budget = _Budget(limit, "bucket statistics")
    if not limit:
        return ()
    spaces = []
    for _ in range((yield from _u64(budget))):
        counters = {}
        for name in STATISTICS:
            n = yield from _u64(budget)
            counters[name] = tuple(np.frombuffer((yield budget.spend(2 * n)), "<u2").tolist())
        spaces.append(counters)
    return tuple(spaces)


def _agree(what: str, got: int, expected: int) -> None:
    if got != expected:
        raise MalformedMessage(
            f"the sizes of the {what} contradict each other", where="AcquisitionBucket", got=got, expected=expected
        )
