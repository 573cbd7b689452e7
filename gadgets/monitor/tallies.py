"""Counts and histograms of a server's scans, kept by the server and written into its status."""

from __future__ import annotations

import bisect
import threading
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 900.0, 3600.0)
"""Upper edges in s: a plain image takes 0.1 s, a network on a CPU minutes."""


@dataclass
class Histogram:
    """Seconds of one stage: how many up to each edge (the last count is of all beyond), and their sum."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds


class Tallies:
    """All counters of a server; every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._scans: Counter[tuple[str, str]] = Counter()
        self._plain: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._stages: dict[tuple[str, str], Histogram] = {}

    def scan(self, chain: str, state: str) -> None:
        """One scan of ``chain`` has ended as ``state``."""
        with self._lock:
            self._scans[chain, state] += 1

    def add(self, name: str, n: int = 1) -> None:
        """``name`` is ``readouts``, ``bytes`` or ``images``."""
        with self._lock:
            self._plain[name] += n

    def event(self, name: str) -> None:
        """One event of the log, for example ``worker_died``."""
        with self._lock:
            self._events[name] += 1

    def seconds(self, stage: str, chain: str, seconds: float) -> None:
        """What one scan took in ``stage``.

        ``receive``; ``first_image`` and ``reconstruct``, from the last readout to the first and to the last image; ``send``, the
        part of that spent on sending.
        """
        with self._lock:
            self._stages.setdefault((stage, chain), Histogram()).add(seconds)

    def document(self) -> dict[str, Any]:
        """Everything as JSON can hold it."""
        with self._lock:
            return {
                "scans": [[chain, state, n] for (chain, state), n in sorted(self._scans.items())],
                "counts": dict(self._plain),
                "events": dict(self._events),
                "buckets": list(BUCKETS),
                "stages": [[stage, chain, list(h.counts), h.total] for (stage, chain), h in sorted(self._stages.items())],
            }
