"""Short form of ``benchmarks/kill.py``: a worker, the server and the client are killed twice each, and no scan is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kill import run


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute or two on an idle machine; it starts three servers
def test_no_scan_is_lost_when_processes_are_killed(tmp_path: Path) -> None:
    reference, kills = run(tmp_path, times=2, seed=11)
    assert len(reference.images) == 12 and len(reference.session) > 100_000
    assert [(kill.target, kill.phase) for kill in kills] == [
        ("worker", "receiving"), ("worker", "computing"), ("server", "computing"), ("server", "computing"),
        ("client", "receiving"), ("client", "computing"),
    ]  # fmt: skip
    assert not [kill for kill in kills if kill.lost]
    # a scan may be over before its killer has its turn; it is never less far than it was waited for
    assert all(kill.fell in ("computing", "over") for kill in kills if kill.phase == "computing")
    receiving, computing = kills[-2:]
    assert all(kill.outcome == "client has its images" for kill in kills[:2])
    assert all(kill.outcome in ("client has its images", "images in the job folder") for kill in (*kills[2:4], computing))
    assert receiving.outcome.startswith(("client has", "images in", "cut"))
