"""The soak in its short form: mixed scans with a killed worker, clients that leave, malformed peers and a full disk."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.soak import Soak, never_full, soak, table
from benchmarks.soak_disk import Disk
from benchmarks.soak_memory import Memory, own_bytes


@pytest.mark.slow
def test_a_quarter_of_a_minute_of_everything(tmp_path: Path) -> None:
    """Growth of memory is judged by the long form only: caches are not warm so soon."""
    result = soak(0.25, workers=1, scanners=1, kill_every=5.0, keep_log=tmp_path / "log", full_disk=False)
    failures = [text for text in result["failures"] if not text.startswith("memory")]
    assert failures == [], (result["examples"], result["log_errors"])
    counts = result["counts"]
    assert counts["scans_identical"] == counts["scan_connections"] > 0
    assert counts["clients_that_left"] > 0 and counts["hostile_connections"] > 0
    assert ["scans lost", 0, 0] in table(result)


def test_a_disk_that_cannot_be_filled_is_a_failure() -> None:
    assert len(never_full(Disk(Path("unused"), mounted=False))) == 1
    assert never_full(Disk(Path("unused"), mounted=True)) == []


class _Process:
    """Not asked here."""


def test_a_leak_is_seen_and_warming_up_is_none() -> None:
    memory = Memory(_Process())  # type: ignore[arg-type]
    memory.samples = [
        {"at": i, "server": 100e6 + (50e6 if i > 10 else 0)} for i in range(100)
    ]  # caches fill at the beginning
    assert memory.verdict()["growth"]["server"] == 0
    memory.samples = [{"at": i, "server": 100e6 + 1e5 * i} for i in range(100)]
    assert 0.05 < memory.verdict()["growth"]["server"] < 0.08


def test_a_connection_that_never_ends_is_seen_although_it_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one did whose worker was killed in the middle of its result: progress for ever, and no images."""
    monkeypatch.setattr("benchmarks.soak.make_kinds", list)
    limits = {"sample": 0.01, "stuck": 0.2}
    given: Any = {"seed": 0, "limits": limits, "scanners": 1}
    run = Soak(0, psutil.Process(), Disk(Path("unused"), mounted=False), **given)
    done = threading.Event()
    monkeypatch.setattr(run, "_scanner", lambda rng: done.wait(60.0))
    for name in ("_leaver", "_attacker", "_killer", "_filler"):
        monkeypatch.setattr(run, name, lambda rng: run.stop.wait(0.01))
    run.run(3600.0)
    assert [words.split(";")[0][-1] for words in run.tally.problems["never_answered"]] == ["0"], "the scanner is the first"
    done.set()


def test_memory_that_a_process_fills_counts_and_libraries_do_not() -> None:
    me = psutil.Process()
    before = own_bytes(me.pid)
    held = bytearray(b"x") * (64 << 20)
    assert 60e6 < own_bytes(me.pid) - before < 80e6
    assert own_bytes(me.pid) < me.memory_info().rss
    del held
