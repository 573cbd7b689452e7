"""Sampling masks on disk: HDF5 with everything that belongs to a mask, and CSV for sequence code and spreadsheets.

HDF5: ``mask`` uint8 ``(echo, k2, k1)``, optionally ``probability`` float32 of the same shape and ``order`` int32
``(shot, echo, 2)`` with ``(k2, k1)`` indices; how it was made in attributes. CSV: one line per readout, in the order of
acquisition where there is one. All indices start at 0, DC is at ``n // 2``.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from recon_core.errors import DataError, plain
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
    is_table = path.suffix.lower() == ".csv"
    if not is_table:
        _check_ending(path)
    try:
        return _read_csv(path) if is_table else _read_hdf5(path)
    except DataError as error:  # of the file, whoever found it: a scan is not lost to what it is compared with
        where = str(error.where) if str(error.where).startswith(path.name) else f"{path.name}, {error.where}"
        raise MaskError(error.what, where=where, got=error.got, expected=error.expected, remedy=error.remedy) from None


def _read_hdf5(path: Path) -> SamplingMask:
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
            probability = plain_dataset(file, "probability", whole=True)[()] if "probability" in file else None
            order = plain_dataset(file, "order", whole=True)[()] if "order" in file else None
            return SamplingMask(
                _whole_numbers(plain_dataset(file, "mask", whole=True)[()], "mask", most=1) != 0,
                None if probability is None else np.asarray(probability, np.float32),
                None if order is None else _whole_numbers(order, "order").astype(np.int64),
                int(file.attrs.get("n_segments", 1)),
                facts,
            )
    # the library has a RuntimeError for damage in its own structures
    except (OSError, KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise MaskError("not a readable HDF5 file", where=path.name, got=why_unreadable(error)) from None


def _whole_numbers(stored: NDArray[Any], name: str, most: int | None = None) -> NDArray[Any]:
    """What a file holds, as it is: neither 0.4 nor 7 is a sample that is taken or not."""
    values = np.asarray(stored)
    kind = "whole numbers" if most is None else f"0 to {most}"
    if values.dtype.kind not in "bui":
        raise MaskError("wrong kind of numbers", where=name, got=values.dtype, expected=kind)
    if most is not None and values.size and (values.min() < 0 or values.max() > most):
        raise MaskError("impossible values", where=name, got=f"{values.min()} to {values.max()}", expected=kind)
    return values


def _check_ending(path: Path) -> None:
    if path.suffix.lower() not in (".h5", ".hdf5"):
        raise MaskError(
            "unknown kind of file", where=path.name, got=path.suffix or "no ending", expected=".h5, .hdf5 or .csv"
        )


def _csv_text(mask: SamplingMask) -> str:
    n_echoes, n_k2, n_k1 = mask.mask.shape
    out = io.StringIO()
    ordered = "ordered" if mask.order is not None else "unordered"
    out.write(
        f"# {FORMAT} {VERSION}; echoes {n_echoes}; k2 {n_k2}; k1 {n_k1}; segments {mask.n_segments}; "
        f"readouts {int(mask.mask.sum())}; {ordered}\n"
    )
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
    """A table as :func:`_csv_text` writes it; a spreadsheet may have added a byte-order mark, empty cells and empty lines."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        got = error.strerror if isinstance(error, OSError) else "no text in UTF-8"
        raise MaskError("not a readable table", where=path.name, got=got) from None
    lines = [line.rstrip(", \t") for line in lines]
    shape, n_segments, n_stated, ordered = _csv_head(path.name, lines)
    table = _csv_rows(path.name, lines)
    if n_stated is not None and len(table) != n_stated:
        raise MaskError("not the lines that line 1 states", where=path.name, got=len(table), expected=n_stated)
    places = table[:, 2:]
    outside = np.flatnonzero(((places < 0) | (places >= np.array(shape))).any(axis=1))
    if len(outside):
        raise MaskError(
            "positions outside the matrix",
            where=path.name,
            got=f"{len(outside)}, the first {tuple(places[outside[0]].tolist())}",
            expected=f"inside {shape} (echo, k2, k1), counted from 0",
        )
    mask = np.zeros(shape, dtype=bool)
    mask[tuple(places.T)] = True
    if n_repeated := len(places) - int(mask.sum()):
        found, times = np.unique(places, axis=0, return_counts=True)
        got = f"{n_repeated}, the first {tuple(found[np.argmax(times > 1)].tolist())} (echo, k2, k1)"
        raise MaskError("positions repeated", where=path.name, got=got)
    if not ordered:
        return SamplingMask(mask)
    n_shots = len(table) // shape[0]
    if n_segments < 1 or not n_shots or n_shots % n_segments:
        raise MaskError("segments of unequal size", where=path.name, got=f"{n_shots} shots in {n_segments} segments")
    shot = np.repeat(np.arange(n_shots), shape[0])
    # sorted by another column, or cut: nobody would notice the order of the scan that was made from it
    wanted = np.stack([shot, shot // (n_shots // n_segments), np.tile(np.arange(shape[0]), n_shots)], axis=1)
    if len(table) != len(wanted) or (table[:, :3] != wanted).any():
        raise MaskError(
            "lines out of order, or some are missing",
            where=path.name,
            expected=f"shots from 0 up, of each the echoes from 0 up, in {n_segments} equal segments",
        )
    return SamplingMask(mask, order=places[:, 1:].reshape(-1, shape[0], 2), n_segments=n_segments)


def _csv_head(name: str, lines: list[str]) -> tuple[tuple[int, int, int], int, int | None, bool]:
    """Sizes, segments, lines (which older files do not state), and whether there is an order."""
    expected = f"'# {FORMAT} {VERSION}; echoes 10; k2 80; k1 206; segments 11; readouts 20680; ordered' or unordered"
    if len(lines) < 2:
        raise MaskError("not a sampling mask", where=name, got=f"{len(lines)} lines", expected=expected)
    got = lines[0].strip('"')
    head, *parts = got.removeprefix("#").strip().split("; ")
    last = parts.pop() if parts else ""
    stated = dict(part.split(" ", 1) for part in parts if " " in part)
    numbers = [stated.get(key, "") for key in ("echoes", "k2", "k1", "segments")]
    if "readouts" in stated:
        numbers.append(stated["readouts"])
    known = head == f"{FORMAT} {VERSION}" and last in ("ordered", "unordered")
    if not known or not all(n.isdecimal() and len(n) < 12 for n in numbers):
        raise MaskError("not a sampling mask", where=f"{name}, line 1", got=plain(got, 120), expected=expected)
    if lines[1] != ",".join(COLUMNS):
        raise MaskError("other columns", where=f"{name}, line 2", got=plain(lines[1], 120), expected=",".join(COLUMNS))
    n_echoes, n_k2, n_k1, n_segments, *n_readouts = (int(n) for n in numbers)
    shape = n_echoes, n_k2, n_k1
    if min(shape) < 1 or math.prod(shape) > MAX_POSITIONS:
        raise MaskError("impossible matrix", where=name, got=shape)
    return shape, n_segments, n_readouts[0] if n_readouts else None, last == "ordered"


def _csv_rows(name: str, lines: list[str]) -> NDArray[np.int64]:
    rows = []
    for number, line in enumerate(lines[2:], 3):
        if not line:
            continue
        try:
            values = [int(word) for word in line.replace('"', "").split(",")]
        except ValueError:
            values = []
        if len(values) != len(COLUMNS) or max(map(abs, values)) > MAX_POSITIONS:
            got, expected = plain(line, 60), f"{len(COLUMNS)} whole numbers, with commas between them"
            raise MaskError("not a line of a mask", where=f"{name}, line {number}", got=got, expected=expected)
        rows.append(values)
    return np.array(rows, np.int64).reshape(-1, len(COLUMNS))
