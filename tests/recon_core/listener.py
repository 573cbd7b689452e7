"""A report that remembers what it was told."""

from __future__ import annotations

from recon_core.types import Report


class Listener(Report):
    """Fractions of progress and warnings, in order."""

    def __init__(self) -> None:
        self.fractions: list[float] = []
        self.warnings: list[str] = []

    def progress(self, fraction: float, message: str = "") -> None:
        self.fractions.append(fraction)

    def warn(self, message: str) -> None:
        self.warnings.append(message)
