"""A training's log as CSV: a row per report, consistent also after a crash."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from recon_core.training.checkpoint import writing


class TrainingLog:
    """Rows by step number; the last column holds validation figures as ``name=value`` words.

    Parameters
    ----------
    path
        The file; begun, folder and all, by the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, step: int, figures: Mapping[str, float], validation: Mapping[str, float]) -> None:
        """Append a row; a file that an earlier version began keeps its columns.

        Raises
        ------
        WriteError
            It cannot be written.
        """
        columns = self._columns()
        with writing(self.path), self._opened() as file:
            writer = csv.writer(file)
            if columns is None:
                columns = list(figures)
                writer.writerow(["step", *columns, "validation"])
            texts = " ".join(f"{name}={value:.6g}" for name, value in validation.items())
            writer.writerow([step, *(f"{figures.get(name, math.nan):.6g}" for name in columns), texts])

    def _opened(self) -> TextIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return open(self.path, "a", newline="", encoding="utf-8")

    def _columns(self) -> list[str] | None:
        """Names of the figures, as the file began; ``None`` if it has not begun."""
        if not self.path.is_file():
            return None
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            header = next(csv.reader(file), None)
        return header[1:-1] if header else None

    def forget_after(self, step: int) -> None:
        """Drop the rows of later steps: a crash undid them, and they will be written again.

        Raises
        ------
        WriteError
            It cannot be written.
        """
        if not self.path.is_file():
            return
        with open(self.path, newline="", encoding="utf-8", errors="replace") as file:
            rows = list(csv.reader(file))
        kept = rows[:1] + [row for row in rows[1:] if row and row[0].isdigit() and int(row[0]) <= step]
        part = self.path.with_suffix(".csv.part")
        with writing(self.path):
            if len(kept) < 2:  # nothing but a header, of which a full disk may have taken a part
                self.path.unlink()
                return
            with open(part, "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows(kept)
            part.replace(self.path)
