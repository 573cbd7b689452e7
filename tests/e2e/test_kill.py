"""Short form of ``benchmarks/kill.py``: a worker, the server and the client are killed twice each, and no scan is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import kill


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute or two on an idle machine; it starts three servers
def test_no_scan_is_lost_when_processes_are_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kill, "SCAN", {**kill.SCAN, "matrix_x": 64, "matrix_y": 64, "coils": 6})
    reference, kills = kill.run(tmp_path, times=2, seed=11)
    assert len(reference.images) == 12 and len(reference.session) > 100_000
    assert [(one.target, one.phase) for one in kills] == [
        ("worker", "receiving"), ("worker", "computing"), ("server", "computing"), ("server", "computing"),
        ("client", "receiving"), ("client", "computing"),
    ]  # fmt: skip
    assert not [one for one in kills if one.lost]
    # a scan may be over before its killer has its turn; it is never less far than it was waited for
    assert all(one.fell in ("computing", "over") for one in kills if one.phase == "computing")
    receiving, computing = kills[-2:]
    assert all(one.outcome == "client has its images" for one in kills[:2])
    assert all(one.outcome in ("client has its images", "images in the job folder") for one in (*kills[2:4], computing))
    assert receiving.outcome.startswith(("client has", "images in", "cut"))
