"""What a running task says: progress, warnings and previews, as files that cross the process border without locks or pickles."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
from pathlib import Path

import numpy as np

from gadgets.errors import GivenUp
from recon_core.types import ImageSeries, Report

log = logging.getLogger(__name__)


def given_up(task: str) -> GivenUp:
    """What a task of an abandoned scan answers with."""
    return GivenUp("the scan was given up", where=task)


class FileReport(Report):
    """A method's report, written to files so that it crosses the process border without locks or pickles.

    Raises
    ------
    GivenUp
        From ``progress``, when the folder is gone: the scan was given up, and so is the task.
    """

    def __init__(self, folder: Path, tag: str) -> None:
        self.folder, self.tag = folder, tag
        self._last = 0.0
        self._warnings = 0
        self._previews = 0

    def progress(self, fraction: float, message: str = "") -> None:
        now = time.monotonic()
        if fraction < 1.0 and now - self._last < 0.1:
            return
        self._last = now
        self._write(f"{self.tag}.progress", json.dumps([float(fraction), message]).encode())

    def warn(self, message: str) -> None:
        self._warnings += 1
        self._write(f"{self.tag}.warning-{self._warnings:04d}", message.encode())

    def preview(self, series: ImageSeries) -> None:
        self._previews += 1
        content = io.BytesIO()
        np.savez(content, name=series.name, comment=series.comment, data=series.data.detach().cpu().numpy())
        self._write(f"{self.tag}.preview-{self._previews:04d}", content.getbuffer())

    def _write(self, name: str, data: bytes | memoryview) -> None:
        path = self.folder / name
        part = path.with_name(path.name + ".part")
        try:
            part.write_bytes(data)
            os.replace(part, path)
        except OSError:  # a report must never fail a reconstruction, nor fill memory that is short already
            with contextlib.suppress(OSError):
                part.unlink()
        if not self.folder.is_dir():
            raise given_up(self.tag)


class ReportReader:
    """The server's side of ``FileReport``: news since the last look."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: set[str] = set()

    def fractions(self) -> dict[str, float]:
        """Progress of each task by its tag."""
        found: dict[str, float] = {}
        for path in self.folder.glob("*.progress"):
            with contextlib.suppress(OSError, ValueError):
                found[path.stem] = float(json.loads(path.read_bytes())[0])
        return found

    def warnings(self) -> list[str]:
        """Warnings not read yet, in order."""
        return [path.read_text(encoding="utf-8") for path in self._new("*.warning-????")]

    def previews(self) -> list[tuple[str, ImageSeries]]:
        """Previews not read yet: task's tag and series. Their files are removed: they may be large."""
        import torch

        found = []
        for path in self._new("*.preview-????"):
            try:
                with np.load(path, allow_pickle=False) as file:
                    series = ImageSeries(str(file["name"]), torch.from_numpy(file["data"]), str(file["comment"]))
            except Exception as error:  # numpy and zipfile raise many kinds; the final images do not need this one
                log.warning("event=preview_unreadable file=%s error=%s", path.name, type(error).__name__)
            else:
                found.append((path.name.partition(".")[0], series))
            path.unlink(missing_ok=True)
        return found

    def _new(self, pattern: str) -> list[Path]:
        fresh = sorted(p for p in self.folder.glob(pattern) if p.name not in self._seen)
        self._seen.update(p.name for p in fresh)
        return fresh
