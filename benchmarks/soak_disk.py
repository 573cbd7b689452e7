"""A small disk that can be filled: a tmpfs where mounting is allowed, else a folder whose spool keeps to its own small limit."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

SIZE = 2300 << 20
"""Above the 2 GB that the spool leaves free; a tmpfs takes memory only for what is written."""

BALLAST = 450 << 20
SPOOL_GB = 0.25


class Disk:
    """Where the spool is. ``kind`` says what "full" means here."""

    def __init__(self, root: Path, mounted: bool) -> None:
        self.root, self.mounted = root, mounted
        self.kind = "tmpfs" if mounted else "the spool's own limit"
        self.spool = root / "spool"
        self.is_full = False
        self._freed = float("-inf")

    def was_full_since(self, moment: float) -> bool:
        """Whether it is full, or was after ``moment`` (monotonic)."""
        return self.is_full or self._freed >= moment

    def fill(self, how: str) -> str:
        """``watermark``: less is free than the spool wants; ``full``: not a byte. Returns what was really done."""
        if not self.mounted:
            return "limited_by_the_spool"
        self.is_full = True
        if how == "watermark":
            with (self.root / "ballast").open("wb") as file:
                for _ in range(BALLAST >> 20):
                    file.write(bytes(1 << 20))
        else:
            state = os.statvfs(self.root)
            used = (state.f_blocks - state.f_bfree) * state.f_frsize
            self._resize(used + 4096)
        return how

    def free(self) -> None:
        """As it was."""
        if self.mounted and self.is_full:
            self._resize(SIZE)
            (self.root / "ballast").unlink(missing_ok=True)
            self.is_full, self._freed = False, time.monotonic()

    def _resize(self, size: int) -> None:
        # a moment before, more may have been written than fits: then it is full already
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.root)], check=False, capture_output=True)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Disk]:
    """A disk below ``folder``, gone afterwards."""
    root = folder / "disk"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE},mode=0700", "tmpfs", str(root)]
    try:
        mounted = subprocess.run(command, check=False, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    try:
        yield Disk(root, mounted)
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(root)], check=False, capture_output=True)
