"""What the server notes of one scan for the monitor, and how it is written beside the scan's capture."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from gadgets.capture import write_sidecar
from gadgets.image_attributes import PLANES_KEY
from gadgets.meta import read_meta, write_meta
from gadgets.monitor.files import IMAGE_FILE, LOG_FILE, TOLD_FILE, begun, image_name, job_of
from gadgets.progress import read_progress_line
from gadgets.scan_log import ScanLog
from gadgets.wire import codec
from gadgets.wire.dtypes import DATA_TYPES, IMAGE_HEADER
from recon_core.errors import ReconError

MAX_PER_SERIES = 24
"""Images of a series that are kept for the page. When there are more, every second one goes: they stay evenly spread."""

MAX_IMAGE_BYTES = 64 << 20  # of one scan; images leave half of it to the maps, which come after them
MAX_PLANES = 48
"""Of a slab: as many as a montage shows."""

MAX_SERIES = 64
MAX_LINES = 500  # of a scan's log; the beginning is worth most
MAX_WARNINGS = 100
MAX_TEXT = 500


_ATTRIBUTES = 2 + IMAGE_HEADER.itemsize + 8  # where they begin in a message


def fewer_planes(message: bytes | memoryview) -> bytes | memoryview:
    """The same image with at most `MAX_PLANES` planes, evenly chosen, first and last included; `PLANES_KEY` says which."""
    head = np.frombuffer(message, IMAGE_HEADER, count=1, offset=2)[0]
    x, y, n_planes = (int(n) for n in head["matrix_size"])
    if n_planes <= MAX_PLANES:
        return message
    end = _ATTRIBUTES + int(head["attribute_string_len"])
    try:
        meta = read_meta(memoryview(message)[_ATTRIBUTES:end].tobytes().decode())
        pixels = np.frombuffer(message, DATA_TYPES[int(head["data_type"])], offset=end).reshape(-1, n_planes, y, x)
    except (ReconError, ValueError, KeyError):  # a scan is none the worse for it
        return message
    kept = np.unique(np.linspace(0, n_planes - 1, MAX_PLANES).round().astype(int))
    return codec.image(head, write_meta({**meta, PLANES_KEY: [int(n) for n in kept]}), pixels[:, kept])


class JobRecorder:
    """One scan. Its connection's thread notes, the observer's thread writes (``write``, ``settle``).

    Parameters
    ----------
    raw
        The scan's capture.
    chain
        Name of the chain that reconstructs it.
    """

    def __init__(self, raw: ScanLog, chain: str) -> None:
        self._raw = raw
        self.capture, self.kept, self.chain = raw.path, raw.kept, chain
        self.folder, self.replayed = raw.job_folder, raw.replayed
        self.id = job_of(self.folder)
        self.state = "receiving"
        self.seemed = "failed"
        self.n_readouts = 0
        self.ended: float | None = None
        self.closed = False
        self.seconds: dict[str, float] = {}
        now = time.time()
        # the first byte; the first readout comes later
        self._started = now if self.replayed else begun(self.id) or now
        self._began, self._received = time.monotonic() - max(0.0, now - self._started), 0.0
        self._fraction, self._left = 0.0, ""
        self._n_images: dict[int, int] = {}
        self._kept_images: dict[int, _Thinned] = {}
        self._image_bytes = 0
        self._left_out = 0
        self._queue: deque[tuple[int, int, bytes]] = deque()
        self._warnings: list[str] = []
        self._words: list[str] = []
        self._lines: deque[str] = deque()
        self._n_lines = 0
        self._lock = threading.Lock()
        self._written: dict[str, Any] = {}

    @property
    def n_bytes(self) -> int:
        """Received so far."""
        return self._raw.size

    # -- in the connection's thread --------------------------------------------------------------------------------------

    def received(self) -> None:
        """The last readout is there."""
        self._received = time.monotonic()
        self.seconds["receive"] = self._received - self._began
        self.state = "reconstructing"

    def say(self, text: str) -> None:
        """One line that the operator got: progress, a warning, or news."""
        progress = read_progress_line(text)
        if progress is not None:
            self._fraction, self._left = progress
            return
        kind, _, words = text.strip().partition(" ")
        target = self._warnings if kind in ("WRN", "ERROR", "ERR") else self._words
        if len(target) < MAX_WARNINGS:
            target.append((words if kind in ("WRN", "INF") else text.strip())[:MAX_TEXT])

    def image(self, message: bytes | memoryview) -> None:
        """One encoded image on its way to the peer."""
        self.seconds.setdefault("first_image", time.monotonic() - self._received)
        head = np.frombuffer(message, IMAGE_HEADER, count=1, offset=2)[0]
        message, room = fewer_planes(message), MAX_IMAGE_BYTES
        if (
            b"Quantitative"
            not in memoryview(message)[_ATTRIBUTES : _ATTRIBUTES + int(head["attribute_string_len"])].tobytes()
        ):
            room //= 2
        series = int(head["image_series_index"])
        number = self._n_images[series] = self._n_images.get(series, 0) + 1
        with self._lock:
            chosen = self._kept_images.get(series)
            if chosen is None and len(self._kept_images) < MAX_SERIES:
                chosen = self._kept_images[series] = _Thinned()
            wanted = chosen is not None and chosen.wants(number)
            if wanted and self._image_bytes + len(message) > room:
                wanted = False
                self._left_out += 1
            if wanted:
                self._image_bytes += len(message)
                self._queue.append((series, number, bytes(message)))

    def log(self, record: logging.LogRecord, line: str) -> None:
        """One line of the server's log about this scan; the last one is that its connection is closed."""
        self._n_lines += 1
        if self._n_lines <= MAX_LINES:
            when = datetime.fromtimestamp(record.created, UTC)
            self._lines.append(f"{when:%H:%M:%S}.{when.microsecond // 1000:03d} {record.levelname} {line[:2000]}\n")
        self.closed = self.closed or line.startswith("event=closed ")  # only now: who sees it finds the line

    def end(self, seemed: str, sending: float = 0.0) -> None:
        """Nothing more comes. Called again, it changes nothing."""
        if self.ended is not None:
            return
        self.seemed, self.ended = seemed, time.monotonic()
        if self._received:
            self.seconds["reconstruct"] = self.ended - self._received
            self.seconds["send"] = sending

    # -- in the observer's thread ----------------------------------------------------------------------------------------

    def settle(self, status: str) -> None:
        """It is known how the scan ended: as its capture's sidecar says it."""
        self.state = "sent" if status == "complete" else status
        if status == "complete":
            self._fraction, self._left = 1.0, ""

    def summary(self) -> dict[str, Any]:
        """What the list of jobs shows."""
        return {
            "id": self.id,
            "chain": self.chain,
            "state": self.state,
            "started": self._started,
            "readouts": self.n_readouts,
            "bytes": self.n_bytes,
            "images": sum(dict(self._n_images).values()),
            "fraction": self._fraction,
            "left": self._left,
            "warnings": len(self._warnings),
            "seconds": (self.ended or time.monotonic()) - self._began,
        }

    def write(self, room: bool) -> None:
        """Bring the job's folder up to date; nothing is kept of a scan whose capture is not.

        Raises
        ------
        OSError
            The folder cannot be written.
        """
        images, lines = self._taken()
        if not self.kept:
            return
        folder = self.folder
        if not self._written:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in folder.iterdir():  # of a server that died at it: what it had begun may not come again
                if IMAGE_FILE.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        for series, number, message in images:
            if room:
                self._write_image(folder, series, number, message)
            else:
                self._left_out += 1
        if lines:
            with open(
                os.open(folder / LOG_FILE, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), "a", encoding="utf-8"
            ) as file:
                file.writelines(lines)
        told = self._document()
        if told != self._written:
            write_sidecar(folder / TOLD_FILE, told)
            self._written = told

    def _taken(self) -> tuple[list[tuple[int, int, bytes]], list[str]]:
        images, lines = [], []
        with contextlib.suppress(IndexError):
            while True:
                images.append(self._queue.popleft())
        with contextlib.suppress(IndexError):
            while True:
                lines.append(self._lines.popleft())
        return images, lines

    def _write_image(self, folder: Path, series: int, number: int, message: bytes) -> None:
        with self._lock:
            thinned = self._kept_images[series]
            if not thinned.wants(number):
                return
            gone = thinned.take(number, len(message))
            self._image_bytes -= sum(size for _, size in gone)
        path = folder / image_name(series, number)
        part = path.with_suffix(".part")
        try:
            with open(os.open(part, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
                file.write(message)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        for other, _ in gone:
            (folder / image_name(series, other)).unlink(missing_ok=True)

    def _document(self) -> dict[str, Any]:
        return {
            **self.summary(),
            "seconds": {name: round(value, 3) for name, value in dict(self.seconds).items()},
            "warnings": list(self._warnings),
            "words": list(self._words),
            "series": [[series, n] for series, n in sorted(dict(self._n_images).items())],
            "left_out": self._left_out,
            "lines": self._n_lines,
        }


class _Thinned:
    """Which images of a series are kept: every ``stride``-th, the stride doubling whenever there are too many."""

    def __init__(self) -> None:
        self.stride = 1
        self._sizes: dict[int, int] = {}

    def wants(self, number: int) -> bool:
        return (number - 1) % self.stride == 0

    def take(self, number: int, size: int) -> list[tuple[int, int]]:
        """Keep one more; returns number and size of those that have to go."""
        self._sizes[number] = size
        gone: list[tuple[int, int]] = []
        if len(self._sizes) > MAX_PER_SERIES:
            self.stride *= 2
            gone = [(n, s) for n, s in self._sizes.items() if not self.wants(n)]
            self._sizes = {n: s for n, s in self._sizes.items() if self.wants(n)}
        return gone
