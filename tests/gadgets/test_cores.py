"""As many workers as there are processors for them, not as the machine has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gadgets import cores as counting
from gadgets.cores import cores
from gadgets.service import Service, ServiceOptions
from tests.waiting import PATIENCE


@pytest.mark.parametrize(
    ("own", "limits", "expected"),
    [
        ("0::/", {"": "400000 100000"}, 4),  # docker run --cpus=4
        ("0::/", {"": "150000 100000"}, 1),
        ("0::/", {"": "20000 100000"}, 1),
        ("0::/system.slice/recon.service", {"system.slice": "300000 100000", "system.slice/recon.service": "max 100000"}, 3),
        ("12:cpu:/x\n0::/a", {"a": "max 100000"}, 64),
        ("12:cpu:/x", {}, 64),
        ("0::/gone", {"": "no number"}, 64),
    ],
)
def test_time_on_processors_that_a_group_gets(
    own: str, limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, words in limits.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "cpu.max").write_text(f"{words}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(counting, "GROUPS", tmp_path)
    monkeypatch.setattr(counting, "OWN_GROUP", tmp_path / "own")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert cores() == expected
    service = Service(ServiceOptions(port=0, rehearse=False))
    assert (service.jobs.workers, service.jobs.threads) == (max(1, expected // 2), expected // max(1, expected // 2))
    service.close()


def test_processors_that_may_run_this_process() -> None:
    one = min(os.sched_getaffinity(0))
    program = f"import os; os.sched_setaffinity(0, {{{one}}}); from gadgets.cores import cores; print(cores())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "1\n"
