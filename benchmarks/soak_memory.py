"""Memory of a server and its workers over time, and whether it grows."""

from __future__ import annotations

import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

import psutil

WARM_UP = 0.2
"""Part of the samples before the first window: caches and allocators reach their size."""

WINDOW = 0.2
"""Part of the samples in each window."""


def workers_of(server: psutil.Process) -> list[psutil.Process]:
    """The compute processes of a server (not the helper that watches over shared resources)."""
    found = []
    with contextlib.suppress(psutil.Error):
        for child in server.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                words = " ".join(child.cmdline())
                if "loky" in words and "resource_tracker" not in words:
                    found.append(child)
    return found


def own_bytes(pid: int) -> float:
    """Memory that a process has filled itself: its PSS without files. Pages of libraries count the more, the fewer other programs of the
    machine use them: measured with them, a server "grew" by 20 MB when another test on the machine ended.
    """
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, *_ = line.split()
        found[name.rstrip(":")] = 1024.0 * int(value)
    return found["Pss_Anon"] + found["Pss_Shmem"]


class Memory:
    """Samples of `own_bytes`: the server alone, and the largest of its workers."""

    def __init__(self, server: psutil.Process) -> None:
        self._server = server
        self._started = time.monotonic()
        self.samples: list[dict[str, float]] = []
        self.threads_and_files: list[tuple[int, int]] = []

    def sample(self) -> None:
        """Take one."""
        with contextlib.suppress(psutil.Error, OSError, KeyError):
            found = {"at": time.monotonic() - self._started, "server": own_bytes(self._server.pid)}
            each = []
            for worker in workers_of(self._server):
                with contextlib.suppress(OSError, KeyError):
                    each.append(own_bytes(worker.pid))
            if each:
                found["largest worker"] = max(each)
            self.samples.append(found)
            self.threads_and_files.append((self._server.num_threads(), self._server.num_fds()))

    def last(self) -> None:
        """Forget the process; it is about to end."""
        self.sample()

    def verdict(self) -> dict[str, Any]:
        """Medians of a window after the warm-up and of one at the end, MB, and how much more the latter is."""
        growth, text, medians = {}, {}, {}
        for who in ("server", "largest worker"):
            series = [sample[who] / 1e6 for sample in self.samples if who in sample]
            n = max(1, int(WINDOW * len(series)))
            first = int(WARM_UP * len(series))
            if len(series) < 3:
                continue
            before, after = statistics.median(series[first : first + n]), statistics.median(series[-n:])
            growth[who], medians[who] = after / before - 1, [before, after]
            text[who] = f"{before:.1f}, {after:.1f}"
        half = self.threads_and_files[len(self.threads_and_files) // 2 :] or [(0, 0)]
        return {
            "growth": growth, "text": text, "medians_mb": medians,
            "threads_and_files_at_the_end": half[-1], "n_samples": len(self.samples),
            "series_mb": [{k: round(v / 1e6 if k != "at" else v, 1) for k, v in s.items()} for s in self._thinned()],
        }  # fmt: skip

    def _thinned(self) -> list[dict[str, float]]:
        return self.samples[:: max(1, len(self.samples) // 60)]
