"""Sampling masks on disk: HDF5 with everything that belongs to a mask, and CSV for sequence code and spreadsheets.

HDF5: ``mask`` uint8 ``(echo, k2, k1)``, optionally ``probability`` float32 of the same shape and ``order`` int32
``(shot, echo, 2)`` with ``(k2, k1)`` indices; how it was made in attributes. CSV: one line per readout, in the order of
acquisition where there is one. All indices start at 0, DC is at ``n // 2``.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray

from recon_core.errors import DataError
from recon_core.hdf5_input import plain_dataset, why_unreadable
from recon_core.sampling.ordering import check_order

FORMAT = "recon-gadgets sampling mask"
VERSION = 1
COLUMNS = ("shot", "segment", "echo", "k2", "k1")
MAX_POSITIONS = 1 << 28
"""Refuse to allocate more than this for a mask whose size a text file states."""


class MaskError(DataError):
    """A mask file is missing, damaged, or made for another scan."""


@dataclass(frozen=True)
class SamplingMask:
    """A mask and what belongs to it.

    Attributes
    ----------
    mask
        bool ``(echo, k2, k1)``.
    probability
        float32 ``(echo, k2, k1)``, what it was drawn from.
    order
        int64 ``(shot, echo, 2)``: ``(k2, k1)`` of each readout in the order of acquisition.
    n_segments
        Equal segments of the order.
    facts
        How it was made: text and numbers (acceleration, seed, kind).
    """

    mask: NDArray[np.bool_]
    probability: NDArray[np.float32] | None = None
    order: NDArray[np.int64] | None = None
    n_segments: int = 1
    facts: Mapping[str, str | float | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.mask.ndim != 3 or self.mask.dtype != np.bool_ or not self.mask.any():
            raise MaskError(
                "not a mask",
                where="mask",
                got=f"{self.mask.dtype} {self.mask.shape}",
                expected="bool (echo, k2, k1) with samples",
            )
        if self.probability is not None and self.probability.shape != self.mask.shape:
            raise MaskError("wrong shape", where="mask.probability", got=self.probability.shape, expected=self.mask.shape)
        if self.order is not None:
            check_order(self.order, self.mask)
            if self.n_segments < 1 or len(self.order) % self.n_segments:
                raise MaskError("segments of unequal size", where="mask.order", got=self.n_segments)

    @property
    def acceleration(self) -> float:
        """Grid positions over samples."""
        return float(self.mask.size / self.mask.sum())


def write_mask(path: str | Path, mask: SamplingMask) -> None:
    """Write ``.h5``/``.hdf5`` or ``.csv``, by the name's ending; whoever reads the file finds the old one or the new one, whole.

    Raises
    ------
    MaskError
        Another ending.
    """
    path = Path(path)
    is_table = path.suffix.lower() == ".csv"
    if not is_table:
        _check_ending(path)
    part = path.with_name(f".{path.name}.part")
    try:
        if is_table:
            part.write_text(_csv_text(mask), encoding="utf-8")
        else:
            _write_hdf5(part, mask)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_hdf5(path: Path, mask: SamplingMask) -> None:
    content = io.BytesIO()  # a file that cannot be closed on a full disk would take the process down at its end
    with h5py.File(content, "w") as file:
        file.attrs.update({"format": FORMAT, "version": VERSION, "axes": "echo, k2, k1", "n_segments": mask.n_segments})
        for key, value in mask.facts.items():
            file.attrs[f"fact_{key}"] = value
        file.create_dataset("mask", data=mask.mask.astype(np.uint8), compression="gzip")
        if mask.probability is not None:
            file.create_dataset("probability", data=mask.probability.astype(np.float32), compression="gzip")
        if mask.order is not None:
            file.create_dataset("order", data=mask.order.astype(np.int32), compression="gzip")
    path.write_bytes(content.getbuffer())


def read_mask(path: str | Path) -> SamplingMask:
    """Read a file of :func:`write_mask`.

    Raises
    ------
    MaskError
        No such file, another format, or a content that contradicts itself.
    """
    path = Path(path)
    if not path.is_file():
        raise MaskError("no such file", where=path.name)
    if path.suffix.lower() == ".csv":
        return _read_csv(path)
    _check_ending(path)
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT or "mask" not in file:
                raise MaskError("not a sampling mask", where=path.name, expected=f"an HDF5 file of format '{FORMAT}'")
            if int(file.attrs["version"]) > VERSION:
                raise MaskError(
                    "written by a newer version", where=path.name, got=int(file.attrs["version"]), expected=VERSION
                )
            facts = {
                name.removeprefix("fact_"): value.item() if isinstance(value, np.generic) else value
                for name, value in file.attrs.items()
                if name.startswith("fact_")
            }
            return SamplingMask(
                np.asarray(plain_dataset(file, "mask", whole=True)[()]) != 0,
                np.asarray(plain_dataset(file, "probability", whole=True)[()], np.float32)
                if "probability" in file
                else None,
                np.asarray(plain_dataset(file, "order", whole=True)[()], np.int64) if "order" in file else None,
                int(file.attrs.get("n_segments", 1)),
                facts,
            )
    # the library has a RuntimeError for damage in its own structures
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise MaskError("not a readable HDF5 file", where=path.name, got=why_unreadable(error)) from None


def _check_ending(path: Path) -> None:
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise MaskError(
            "unknown kind of file", where=path.name, got=path.suffix or "no ending", expected=".h5, .hdf5 or .csv"
        )


def _csv_text(mask: SamplingMask) -> str:
    n_echoes, n_k2, n_k1 = mask.mask.shape
    out = io.StringIO()
    ordered = "ordered" if mask.order is not None else "unordered"
    out.write(f"# {FORMAT} {VERSION}; echoes {n_echoes}; k2 {n_k2}; k1 {n_k1}; segments {mask.n_segments}; {ordered}\n")
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(COLUMNS)
    if mask.order is not None:
        per_segment = len(mask.order) // mask.n_segments
        for shot, readouts in enumerate(mask.order.tolist()):
            rows.writerows((shot, shot // per_segment, echo, k2, k1) for echo, (k2, k1) in enumerate(readouts))
    else:
        rows.writerows((-1, -1, *position) for position in np.argwhere(mask.mask).tolist())
    return out.getvalue()


def _read_csv(path: Path) -> SamplingMask:
    try:
        first, *lines = path.read_text(encoding="utf-8").splitlines()
        head, *stated = first.removeprefix("#").strip().split("; ")
        if head != f"{FORMAT} {VERSION}" or lines[0] != ",".join(COLUMNS):
            raise MaskError(
                "not a sampling mask", where=path.name, expected=f"'# {FORMAT} {VERSION}; ...' and a line of columns"
            )
        sizes = dict(part.split(" ") for part in stated[:-1])
        shape, n_segments = (int(sizes["echoes"]), int(sizes["k2"]), int(sizes["k1"])), int(sizes["segments"])
        if min(shape) < 1 or np.prod([float(n) for n in shape]) > MAX_POSITIONS:
            raise MaskError("impossible matrix", where=path.name, got=shape)
        table = np.array([[int(word) for word in row] for row in csv.reader(lines[1:])], np.int64).reshape(-1, len(COLUMNS))
    except (ValueError, KeyError, IndexError) as error:
        raise MaskError(
            "not a sampling mask", where=path.name, got=type(error).__name__, expected="a table of whole numbers"
        ) from None
    places = table[:, 2:]
    if (places < 0).any() or (places >= np.array(shape)).any():
        raise MaskError("positions outside the matrix", where=path.name, expected=f"inside {shape} (echo, k2, k1)")
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(places.T)] = True
    if int(mask.sum()) != len(places):
        raise MaskError("positions repeated", where=path.name, got=len(places) - int(mask.sum()))
    if stated[-1] != "ordered":
        return SamplingMask(mask)
    if len(table) % shape[0] or (table[:, 2].reshape(-1, shape[0]) != np.arange(shape[0])).any():
        raise MaskError("lines out of order", where=path.name, expected="every shot's echoes from 0 up")
    return SamplingMask(mask, order=places[:, 1:].reshape(-1, shape[0], 2), n_segments=n_segments)
