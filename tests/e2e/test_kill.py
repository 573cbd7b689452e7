"""Short form of ``benchmarks/kill.py``: a worker, the server and the client are killed once each, and no scan is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.kill import TARGETS, run


@pytest.mark.slow
@pytest.mark.timeout(900)  # half a minute on an idle machine; it starts two servers
def test_no_scan_is_lost_when_processes_are_killed(tmp_path: Path) -> None:
    reference, kills = run(tmp_path, times=1, seed=11)
    assert len(reference.images) == 4 and len(reference.session) > 100_000
    assert [kill.target for kill in kills] == list(TARGETS)
    assert not [kill for kill in kills if kill.lost]
    worker, server, client = kills
    assert worker.outcome == "client has its images"
    assert server.outcome in ("client has its images", "images in the job folder")
    assert client.outcome.startswith(("client has", "images in", "cut"))
