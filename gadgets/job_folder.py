"""What a scan's methods tell besides images: arrays, curves and pictures in a folder beside the raw capture.

``<capture>.job/`` holds for each slice ``slice-0000.npz`` (all arrays, no pickles), a CSV for each real array that is a curve or a
small table, and pictures of the curves and weights that are known by name; ``quality.json`` has the figures of merit of all slices.
Everything is written by a worker after the last image: the connection's thread neither waits for it nor fails with it.
"""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gadgets.capture import CAPTURE_SUFFIX
from gadgets.fair_queue import HOUSEKEEPING
from gadgets.jobs import Jobs
from gadgets.spool import JOB_SUFFIX, ScanLog
from gadgets.spool import job_folder_of as job_folder_of
from recon_core.types import Result

log = logging.getLogger(__name__)

MAX_BYTES = 256 << 20
"""Arrays of one scan; what comes beyond is left out, and the log says so."""

MAX_CSV = 20_000  # values of a table that somebody may want to read
CLOSE_SECONDS = 60.0
DOTS_PER_INCH = 110

COLUMNS: dict[str, tuple[str, ...]] = {
    "loss": ("iteration", "loss"),
    "held_out": ("iteration", "relative_error"),
    "residual_per_state": ("state", "residual_per_state"),
    "singular_values": ("component", "singular_value"),
}
"""Headings of curves; others get ``index`` and their own name."""


@dataclass(frozen=True)
class SliceRecord:
    """What one slice's method told: which chain it was, figures of merit, sentences, arrays."""

    chain: str
    quality: dict[str, float]
    notes: tuple[str, ...]
    arrays: dict[str, NDArray[Any]]


@dataclass
class JobRecord:
    """What there is to keep of one scan."""

    chain: str
    slices: dict[int, SliceRecord] = field(default_factory=dict)
    n_bytes: int = 0

    def add(self, number: int, chain: str, result: Result) -> None:
        """Note a slice's result (not its images). Never raises: what cannot be kept is left out."""
        arrays: dict[str, NDArray[Any]] = {}
        for name, value in result.extras.items():
            array = np.asarray(value)
            if array.dtype.kind not in "biufc":  # texts and objects: np.savez would pickle them
                log.warning("event=extra_left_out name=%s dtype=%s", name, array.dtype)
            elif self.n_bytes + array.nbytes > MAX_BYTES:
                log.warning("event=extra_left_out name=%s bytes=%d limit=%d", name, array.nbytes, MAX_BYTES)
            else:
                self.n_bytes += array.nbytes
                arrays[name] = array
        quality = {name: float(value) for name, value in result.quality.items()}
        self.slices[number] = SliceRecord(chain, quality, tuple(result.notes), arrays)

    @property
    def has_arrays(self) -> bool:
        return any(record.arrays for record in self.slices.values())


class JobFolders:
    """Where the records of a server's scans go.

    Parameters
    ----------
    jobs
        Whose workers write.
    folder
        For every scan (``recon run --job-folder``); by default each goes beside its capture, and goes with it: a folder whose
        capture was removed is removed when the next one is written or the server starts.

    Attributes
    ----------
    problems
        What could not be kept, in words; complete after ``close``. Also in the log.
    """

    def __init__(self, jobs: Jobs, folder: Path | None = None) -> None:
        self._jobs, self._folder = jobs, folder
        self._lock = threading.Condition()
        self._writing: set[Future[list[str]]] = set()
        self.problems: list[str] = []

    def keep(self, record: JobRecord, raw: ScanLog) -> None:
        """Begin to write a scan's record; nothing is kept of a scan whose capture is not, or that told nothing."""
        if self._folder is not None and record.slices:
            folder = self._folder
        elif raw.kept and record.has_arrays:
            folder = raw.job_folder
            remove_orphans(raw.path.parent)
        else:
            return
        future = self._jobs.scope(HOUSEKEEPING).submit(write_job_folder, folder, record)
        with self._lock:
            self._writing.add(future)
        future.add_done_callback(self._written)

    def close(self) -> None:
        """Wait for what is being written, within reason."""
        with self._lock:
            if not self._lock.wait_for(lambda: not self._writing, CLOSE_SECONDS):
                log.warning("event=job_folder_incomplete scans=%d", len(self._writing))
                self.problems.append(f"not finished after {CLOSE_SECONDS:g} s")

    def _written(self, future: Future[list[str]]) -> None:
        try:
            error = future.exception()
            if error is not None:
                # a system's words are plain; those of other errors may quote what is in the scan
                problem = (error.strerror if isinstance(error, OSError) else None) or type(error).__name__
                log.warning("event=job_folder_failed error=%r", problem)
                self.problems.append(problem)
                return
            for problem in future.result():
                log.warning("event=job_folder_incomplete text=%r", problem)
                self.problems.append(problem)
        finally:  # only then `close` has nothing to wait for
            with self._lock:
                self._writing.discard(future)
                self._lock.notify_all()


def remove_orphans(root: Path) -> int:
    """Remove job folders whose capture is gone (the spool keeps to its limits by removing captures); returns how many."""
    orphans = [folder for folder in root.glob(f"*{JOB_SUFFIX}") if not folder.with_suffix(CAPTURE_SUFFIX).exists()]
    for folder in orphans:
        shutil.rmtree(folder, ignore_errors=True)
    return len(orphans)


def write_job_folder(folder: Path, record: JobRecord) -> list[str]:
    """Write everything of a scan into ``folder``; returns what could not be drawn.

    Raises
    ------
    OSError
        The folder or a file cannot be written.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _write(folder / "quality.json", partial(_document, _quality(record)))
    for number, part in sorted(record.slices.items()):
        stem = f"slice-{number:04d}"
        if part.arrays:
            _write(folder / f"{stem}.npz", partial(_save, part.arrays))
        for name, array in part.arrays.items():
            if array.dtype.kind in "biuf" and array.ndim in (1, 2) and 0 < array.size <= MAX_CSV:
                _write(folder / f"{stem}_{name}.csv", partial(_table, name, array))
    problems = []
    for number, part in sorted(record.slices.items()):  # last: pictures are the first thing that one can do without
        for name, draw in PICTURES.items():
            if name not in part.arrays:
                continue
            title = f"{part.chain}, slice {number}"
            try:
                _write(folder / f"slice-{number:04d}_{name}.png", partial(draw, part.arrays, title))
            except Exception as error:  # the arrays are kept: a picture of odd ones may fail in many ways
                problems.append(f"slice {number} {name}: not drawn ({type(error).__name__})")
    return problems


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """A file that is there whole or not at all, for this user only."""
    part = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _document(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")


def _save(arrays: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _quality(record: JobRecord) -> dict[str, Any]:
    def plain(value: float) -> float | None:
        return value if math.isfinite(value) else None  # JSON has no word for it

    slices = {
        str(number): {
            "chain": part.chain,
            "quality": {name: plain(value) for name, value in part.quality.items()},
            "notes": list(part.notes),
        }
        for number, part in sorted(record.slices.items())
    }
    return {"chain": record.chain, "slices": slices}


def _table(name: str, array: NDArray[Any], path: Path) -> None:
    """Curves with their index; a table of pairs as it is; other tables row by row."""
    headings = COLUMNS.get(name, ("index", name))
    if array.ndim == 1:
        rows: Any = enumerate(array.tolist())
    elif array.shape[1] == len(headings) and name in COLUMNS:
        rows = array.tolist()
    else:
        headings = ("index", *(f"{name}_{column}" for column in range(array.shape[1])))
        rows = ((number, *row) for number, row in enumerate(array.tolist()))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(headings)
        writer.writerows(rows)


def draw_routing(arrays: Mapping[str, NDArray[Any]], title: str, path: Path) -> None:
    """Heat map of routing weights ``(state, expert)``: rows are experts, columns are states.

    As Fig. 5 of the MoE-dqINR paper. Weights lie between 0 and 1.
    """
    weights = np.asarray(arrays["routing_weights"], dtype=float)
    n_states, n_experts = weights.shape
    figure, axes = _figure(max(4.0, 0.32 * n_states + 2.0), max(2.2, 0.32 * n_experts + 1.4))
    shown = axes.imshow(weights.T, vmin=0.0, vmax=1.0, cmap="viridis", aspect="auto", interpolation="nearest")
    axes.set_title(f"routing weights: {title}", fontsize=9)
    axes.set_xlabel("state")
    axes.set_ylabel("expert")
    axes.set_xticks(_ticks(n_states))
    axes.set_yticks(_ticks(n_experts))
    figure.colorbar(shown, ax=axes).set_label("weight")
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


def draw_loss(arrays: Mapping[str, NDArray[Any]], title: str, path: Path) -> None:
    """The loss by iteration and, on an axis of its own, the relative error of the samples that were held out."""
    loss = np.asarray(arrays["loss"], dtype=float).ravel()
    figure, axes = _figure(5.5, 3.4)
    lines = axes.plot(np.arange(len(loss)), loss, color="tab:blue", linewidth=1.0, label="loss")
    axes.set_title(f"loss: {title}", fontsize=9)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss")
    _scale(axes, loss)
    held_out = np.asarray(arrays.get("held_out", np.empty((0, 2))), dtype=float)
    if len(held_out):
        other = axes.twinx()
        lines += other.plot(held_out[:, 0], held_out[:, 1], "o-", color="tab:orange", markersize=3, label="held-out error")
        other.set_ylabel("relative error of held-out samples")
        _scale(other, held_out[:, 1])
    axes.legend(lines, [line.get_label() for line in lines], fontsize=8)
    figure.savefig(path, dpi=DOTS_PER_INCH, metadata={"Software": None})


PICTURES: dict[str, Callable[[Mapping[str, NDArray[Any]], str, Path], None]] = {
    "routing_weights": draw_routing,
    "loss": draw_loss,
}
"""What is drawn, by the name of the array that it needs."""


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # imported here: matplotlib takes half a second, and most scans draw nothing
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(min(width, 24.0), min(height, 24.0)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _scale(axes: Any, values: NDArray[Any]) -> None:
    finite = values[np.isfinite(values)]
    if finite.size and finite.min() > 0:
        axes.set_yscale("log")


def _ticks(n: int) -> NDArray[Any]:
    return np.arange(0, n, max(1, -(-n // 24)))
