"""Pictures of a job's images: montages in the window and units that the images carry, thumbnails, and words about both.

Drawn when somebody looks, one at a time, and kept in a folder of the monitor's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gadgets.handlers import PREVIEW_SERIES
from gadgets.monitor.files import IMAGE_FILE, folder_of, is_job_id
from gadgets.montage import caption, spokesman, write_montages, write_thumbnail
from gadgets.scratch import SCRATCH_PREFIX
from gadgets.wire.events import Image
from gadgets.wire.framing import FrameParser
from recon_core.errors import ReconError

MAX_FILES = 400  # drawn pictures that are kept
MAX_MESSAGE = 256 << 20
MAX_SERIES = 64
THUMBNAIL_PIXELS = 160


@dataclass(frozen=True)
class Picture:
    """One series of a job. ``version`` changes with its images. ``n_images`` are kept for the page, of ``n_sent`` (0: not known)."""

    series: int
    label: str
    quantity: str
    unit: str
    window: str
    n_images: int
    is_map: bool
    is_preview: bool
    version: str
    n_sent: int = 0

    @property
    def count(self) -> str:
        """How many images, in words."""
        if self.n_sent > self.n_images:
            return f"{self.n_images} of {self.n_sent} images"
        return "one image" if self.n_images == 1 else f"{self.n_images} images"

    @property
    def words(self) -> str:
        """For those who do not see it."""
        what = f"map of {self.quantity}" if self.is_map else "preview images" if self.is_preview else "images"
        unit = f" in {self.unit}" if self.unit else ""
        window = f", window {self.window}{f' {self.unit}' if self.unit else ''}" if self.window else ""
        return f"{self.label}: {what}{unit}, {self.count}{window}"


class Gallery:
    """The pictures of all jobs of one spool. Every method may be called from any thread.

    Parameters
    ----------
    root
        The spool's folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._drawn = Path(tempfile.mkdtemp(prefix=f"{SCRATCH_PREFIX}{os.getpid()}-"))
        self._lock = threading.Lock()
        self._captions: dict[tuple[str, int, str], Picture] = {}

    def close(self) -> None:
        """Remove what was drawn."""
        shutil.rmtree(self._drawn, ignore_errors=True)

    def of(self, job: str) -> list[Picture]:
        """The series of a job: maps first, then images, previews only as long as there is nothing else."""
        found = [
            picture
            for series, files in self._series(job).items()
            if (picture := self._picture(job, series, files)) is not None
        ]
        final = [picture for picture in found if not picture.is_preview]
        return sorted(final or found, key=lambda picture: (not picture.is_map, picture.series))

    def best(self, job: str) -> Picture | None:
        """What stands for the job in the list."""
        pictures = self.of(job)
        return next((picture for picture in pictures if not picture.is_map), None) or next(iter(pictures), None)

    def png(self, job: str, series: int, *, thumbnail: bool = False) -> Path | None:
        """The drawn picture of a series; ``None`` when there is no such series or it cannot be drawn."""
        files = self._series(job).get(series)
        if not files:
            return None
        kind = "thumbnail" if thumbnail else "montage"
        path = self._drawn / f"{job}-{series}-{kind}-{_version(files)}.png"
        with self._lock:  # one at a time: memory, and matplotlib
            if path.exists():
                return path
            # a picture of odd images may fail in many ways; the others are still there
            with contextlib.suppress(ReconError, OSError, ValueError, KeyError, TypeError, IndexError, RuntimeError):
                self._draw(files, path, thumbnail)
                self._forget()
        return path if path.exists() else None

    def _draw(self, files: list[Path], path: Path, thumbnail: bool) -> None:
        with tempfile.TemporaryDirectory(dir=self._drawn) as folder:
            if thumbnail:
                image = _read(files[len(files) // 2])
                if image is not None:
                    write_thumbnail(image, Path(folder) / "one.png", THUMBNAIL_PIXELS)
                    (Path(folder) / "one.png").replace(path)
                return
            written = write_montages(_images(files), folder)
            if written:
                written[0].replace(path)

    def _forget(self) -> None:
        files = sorted(self._drawn.glob("*.png"), key=lambda path: path.stat().st_mtime)
        for path in files[:-MAX_FILES]:
            path.unlink(missing_ok=True)

    def _series(self, job: str) -> dict[int, list[Path]]:
        """The files of each series, in order."""
        if not is_job_id(job):
            return {}
        found: dict[int, list[Path]] = {}
        with contextlib.suppress(OSError):
            for path in sorted(folder_of(self.root, job).iterdir()):
                match = IMAGE_FILE.fullmatch(path.name)
                if match is not None and (int(match[1]) in found or len(found) < MAX_SERIES):
                    found.setdefault(int(match[1]), []).append(path)
        return found

    def _picture(self, job: str, series: int, files: list[Path]) -> Picture | None:
        key = (job, series, _version(files))
        if key not in self._captions:
            image = spokesman(_images(files))
            if image is None:
                return None
            said = caption(image)
            if len(self._captions) > 10_000:
                self._captions.clear()
            self._captions[key] = Picture(
                series,
                said.label,
                said.quantity,
                said.unit,
                said.window,
                len(files),
                said.is_map,
                series > PREVIEW_SERIES,
                key[2],
            )
        return self._captions[key]


def _version(files: list[Path]) -> str:
    """Another one when a job that is made again writes the same names."""
    said = []
    for path in files:
        with contextlib.suppress(OSError):
            said.append(f"{path.name} {path.stat().st_mtime_ns}")
    return hashlib.blake2b(" ".join(said).encode(), digest_size=6).hexdigest()


def _images(files: list[Path]) -> Iterator[Image]:
    for path in files:
        image = _read(path)
        if image is not None:
            yield image


def _read(path: Path) -> Image | None:
    """The image of a file; ``None`` when it is gone or holds none."""
    try:
        if path.stat().st_size > MAX_MESSAGE:
            return None
        with FrameParser(role="client") as parser:
            events = parser.feed(path.read_bytes())
    except OSError:
        return None
    return next((event for event in events if isinstance(event, Image)), None)
