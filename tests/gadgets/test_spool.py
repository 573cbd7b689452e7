"""The spool: raw bytes are on disk at once, bounded, private, and a full disk never loses a scan."""

import errno
import gc
import json
import logging
import os
import stat
from pathlib import Path

import pytest

from gadgets.capture import capture_status, sidecar
from gadgets.errors import SpoolError
from gadgets.spool import ScanLog, Spool, job_folder_of, read_capture

SESSION = b"\x01\x00" + b"fourier".ljust(1024, b"\0") + b"\x04\x00"


def make(tmp_path: Path, **options: object) -> Spool:
    temporary = tmp_path / "temporary"
    temporary.mkdir(exist_ok=True)
    chosen: dict[str, object] = {"min_free_bytes": 0, "temporary_directories": (temporary,), **options}
    return Spool(tmp_path / "spool", **chosen)  # type: ignore[arg-type]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def keep(spool: Spool, data: bytes, status: str = "complete") -> Path:
    log = spool.open()
    log.append(data)
    path = log.finish(status)  # type: ignore[arg-type]
    assert path is not None
    return path


def test_bytes_are_readable_by_others_as_soon_as_they_are_appended(tmp_path: Path) -> None:
    log = make(tmp_path).open()
    assert log.append(b"abc") == 0
    assert log.append(memoryview(bytearray(b"defg"))) == 3
    assert log.path.read_bytes() == b"abcdefg"
    assert log.size == 7


def test_capture_is_private_and_has_a_sidecar_without_the_address(tmp_path: Path) -> None:
    spool = make(tmp_path)
    log = spool.open(peer="192.0.2.77")
    log.append(SESSION)
    path = log.finish("complete", "a note", chain="fourier", readouts=3)
    assert path is not None and path.read_bytes() == SESSION
    assert mode(tmp_path / "spool") == 0o700
    assert mode(path) == 0o600 and mode(sidecar(path)) == 0o600
    text = sidecar(path).read_text()
    assert "192.0.2.77" not in text
    info = json.loads(text)
    expected = {"status": "complete", "note": "a note", "chain": "fourier", "bytes": len(SESSION), "readouts": 3}
    assert expected.items() <= info.items()
    assert info["started"] <= info["ended"] and info["versions"]["recon-gadgets"] and info["peer"]
    assert not list((tmp_path / "spool").glob(".*")), "no half-written sidecar is left"


def test_a_large_capture_takes_no_more_room_than_it_has(tmp_path: Path) -> None:
    """Blocks are reserved ahead while a scan runs, invisibly, and given back at its end."""
    block = os.urandom(1 << 20)
    log = make(tmp_path).open()
    for _ in range(3):
        log.append(block)
    assert log.path.stat().st_size == 3 << 20
    path = log.finish("complete")
    assert path is not None and path.read_bytes() == 3 * block
    assert path.stat().st_blocks * 512 <= (3 << 20) + (64 << 10)


def test_names_sort_by_time(tmp_path: Path) -> None:
    spool = make(tmp_path)
    paths = [keep(spool, SESSION) for _ in range(3)]
    assert len({path.name for path in paths}) == 3
    assert spool.captures() == paths


def test_nothing_appended_leaves_nothing(tmp_path: Path) -> None:
    spool = make(tmp_path)
    assert spool.open().finish("complete") is None
    log = spool.open()
    log.append(b"query")
    log.discard()
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_finished_log_takes_no_more(tmp_path: Path) -> None:
    log = make(tmp_path).open()
    log.append(b"x")
    log.finish("complete")
    with pytest.raises(SpoolError, match="finished"):
        log.append(b"y")


def test_oldest_complete_captures_go_first_and_running_ones_never(tmp_path: Path) -> None:
    spool = make(tmp_path, max_bytes=3500)
    failed = keep(spool, b"f" * 1000, "failed")
    first, second = keep(spool, b"1" * 1000), keep(spool, b"2" * 1000)
    running = spool.open()
    running.append(b"r" * 1000)
    spool.make_room(running.size)
    assert failed.exists(), "the raw data of a failed scan are worth more than those of one that succeeded"
    assert not first.exists() and not sidecar(first).exists()
    assert second.exists() and running.path.exists()


def test_failed_captures_do_not_take_over_the_spool(tmp_path: Path) -> None:
    spool = make(tmp_path, max_bytes=4000)
    failed = [keep(spool, b"f" * 1000, "failed") for _ in range(4)]
    good = keep(spool, b"g" * 1000)
    assert not failed[0].exists() and good.exists()


def test_a_scan_over_its_limit_is_an_error_and_keeps_what_came_before(tmp_path: Path) -> None:
    log = make(tmp_path, max_scan_bytes=10).open()
    log.append(b"12345678")
    with pytest.raises(SpoolError, match="at most 10"):
        log.append(b"90a")
    path = log.finish("failed", "too large")
    assert path is not None and path.read_bytes() == b"12345678"


def fill_disk_at(monkeypatch: pytest.MonkeyPatch, log: ScanLog, limit: int) -> None:
    """Let the file system that the log lies on be full at ``limit`` bytes; partial writes happen, as on a real one."""
    full = log.path.stat().st_ino
    really_write = os.write

    def write(fd: int, data: bytes) -> int:
        if os.fstat(fd).st_ino != full:
            return really_write(fd, data)
        room = limit - os.fstat(fd).st_size
        if room <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really_write(fd, bytes(data)[:room])

    monkeypatch.setattr("gadgets.spool.os.write", write)


def test_a_full_disk_moves_the_log_and_no_byte_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = make(tmp_path).open()
    log.append(b"a" * 1000)
    fill_disk_at(monkeypatch, log, 1500)
    before = log.path
    with caplog.at_level(logging.ERROR):
        assert log.append(b"b" * 1000) == 1000
    log.append(b"c" * 10)
    assert log.path != before
    assert log.path.read_bytes() == b"a" * 1000 + b"b" * 1000 + b"c" * 10
    assert before.read_bytes()[:1000] == b"a" * 1000, "whoever still reads the old file can"
    assert "event=spool_move" in caplog.text and "temporary_storage" in caplog.text
    assert log.finish("complete") is None
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [], "nothing is left of a scan that succeeded"


def test_a_failed_scan_on_a_full_disk_leaves_what_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = make(tmp_path).open()
    log.append(SESSION)
    fill_disk_at(monkeypatch, log, len(SESSION) + 1)
    log.append(b"x" * 100)
    path = log.finish("failed", "no such chain")
    assert path is not None and path.parent == tmp_path / "spool"
    info = read_capture(path).info
    assert "disk was full" in info["note"] and info["bytes"] == len(SESSION) + 1


def test_too_little_free_space_goes_to_temporary_storage(tmp_path: Path) -> None:
    log = make(tmp_path, min_free_bytes=1 << 62).open()
    log.append(b"abc")
    assert not log.kept and log.path.read_bytes() == b"abc"
    assert mode(log.path) == 0o600 and mode(log.path.parent) == 0o700
    log.finish("complete")
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_disk_that_others_have_filled_costs_no_captures(tmp_path: Path) -> None:
    path = keep(make(tmp_path), SESSION)
    log = make(tmp_path, min_free_bytes=1 << 62).open()
    log.append(b"abc")
    assert path.exists() and not log.kept


def test_captures_make_room_for_new_ones_when_that_helps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = make(tmp_path, min_free_bytes=1500)
    old, new = keep(spool, b"o" * 1000), keep(spool, b"n" * 1000)
    monkeypatch.setattr("gadgets.spool._free", lambda folder: 3000 - sum(p.stat().st_size for p in folder.glob("*.mrd")))
    log = spool.open()
    log.append(b"abc")
    assert log.kept and not old.exists() and new.exists()


def test_spool_off_keeps_nothing(tmp_path: Path) -> None:
    spool = Spool(None, temporary_directories=(tmp_path,))
    log = spool.open()
    log.append(b"abc")
    assert log.path.read_bytes() == b"abc"
    assert log.finish("failed", "even then") is None
    assert list(tmp_path.iterdir()) == []


def test_a_forgotten_log_leaves_no_temporary_file(tmp_path: Path) -> None:
    log = Spool(None, temporary_directories=(tmp_path,)).open()
    log.append(b"abc")
    del log
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_no_room_anywhere_is_a_typed_error(tmp_path: Path) -> None:
    spool = make(tmp_path, min_free_bytes=1 << 62, temporary_directories=(tmp_path / "missing",))
    with pytest.raises(SpoolError, match="no room"):
        spool.open().append(b"abc")


def test_captures_of_a_server_that_died_become_truncated_ones(tmp_path: Path) -> None:
    spool = make(tmp_path)
    running = spool.open()
    running.append(SESSION)
    left = tmp_path / "spool" / "20200101T000000.000Z-00000000.mrd"
    left.write_bytes(SESSION)
    make(tmp_path)
    assert read_capture(left).status == "truncated"
    assert not sidecar(running.path).exists(), "a log that is being written is somebody's"


def test_read_capture_refuses_what_is_none(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="cannot read"):
        read_capture(tmp_path / "missing.mrd")
    empty = tmp_path / "empty.mrd"
    empty.write_bytes(b"")
    with pytest.raises(SpoolError, match="nor the capture"):
        read_capture(empty)
    page = tmp_path / "page.mrd"
    page.write_bytes(b"GET / HTTP/1.1\r\n")
    with pytest.raises(SpoolError, match="nor the capture"):
        read_capture(page)


def test_read_capture_notices_a_file_that_changed(tmp_path: Path) -> None:
    path = keep(make(tmp_path), SESSION)
    assert read_capture(path).size == len(SESSION)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(SpoolError, match="not as long"):
        read_capture(path)


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolError, match="cannot make the folder"):
        Spool(tmp_path / "file" / "spool")


def test_a_sidecar_that_the_disk_did_not_take_is_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one a capture counts as running, and would be kept for ever."""

    def full(path: Path, info: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = Spool(tmp_path, min_free_bytes=0)
    log = spool.open()
    log.append(b"\x01\x00 data")
    with monkeypatch.context() as patched:
        patched.setattr("gadgets.scan_log.write_sidecar", full)
        patched.setattr("gadgets.spool.write_sidecar", full)
        log.finish("complete", chain="fourier")
        assert spool.captures() == []
    spool.make_room()
    (capture,) = spool.captures()
    assert capture_status(capture) == "complete"


def made_older(path: Path, seconds: float) -> None:
    moment = path.stat().st_mtime - seconds
    os.utime(sidecar(path), (moment, moment))


def test_captures_go_by_age(tmp_path: Path) -> None:
    spool = make(tmp_path, max_age=3600.0)
    old_good, old_failed, new = keep(spool, SESSION), keep(spool, SESSION, "failed"), keep(spool, SESSION)
    for path in (old_good, old_failed):
        made_older(path, 3700.0)
        job_folder_of(path).mkdir()
        (job_folder_of(path) / "images.h5").write_bytes(b"x")
    running = spool.open()
    running.append(SESSION)
    again = make(tmp_path, max_age=3600.0)
    assert again.make_room()
    assert again.captures() == [new] and running.path.exists()
    assert not job_folder_of(old_good).exists() and not sidecar(old_failed).exists()


def evictions(caplog: pytest.LogCaptureFixture) -> dict[str, tuple[int, str]]:
    """Level and words of what the log says about each capture that was removed."""
    lines = [record for record in caplog.records if "event=capture_evicted" in record.getMessage()]
    found = {}
    for record in lines:
        _, name, _, words = record.getMessage().split(" ", 3)
        found[name.removeprefix("file=")] = (record.levelno, words)
    assert len(found) == len(lines)
    return found


def test_what_is_removed_is_said_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Loudly where raw data of a scan that failed go, or those of today."""
    spool = make(tmp_path, max_age=10 * 86400.0)
    aged, aged_failed, full_old, full_today, left = (
        keep(spool, b"x" * 1000, status) for status in ("complete", "failed", "complete", "complete", "truncated")
    )
    for path, days in ((aged, 11), (aged_failed, 11), (full_old, 2), (left, 1)):
        made_older(path, days * 86400.0)
    assert spool.evicted() == []
    with caplog.at_level(logging.INFO, "gadgets.spool"):
        spool.max_bytes, spool._counted = 1500, float("-inf")
        spool.make_room()
    said = evictions(caplog)
    assert said == {
        aged.name: (logging.INFO, "reason=age status=complete hours=264.0"),
        aged_failed.name: (logging.WARNING, "reason=age status=failed hours=264.0"),
        full_old.name: (logging.INFO, "reason=size status=complete hours=48.0"),
        full_today.name: (logging.WARNING, "reason=size status=complete hours=0.0"),
    }
    assert spool.captures() == [left]
    expected = [("age", "complete", 1), ("age", "failed", 1), ("size", "complete", 2)]
    assert spool.evicted() == expected
    caplog.clear()
    with caplog.at_level(logging.INFO, "gadgets.spool"):
        spool.max_bytes, spool._counted = 1, float("-inf")
        spool.make_room()
    assert evictions(caplog) == {left.name: (logging.WARNING, "reason=size status=truncated hours=24.0")}
    assert spool.evicted() == [*expected, ("size", "truncated", 1)]


def test_a_disk_that_fills_is_another_reason_than_a_spool_that_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = make(tmp_path, min_free_bytes=1500)
    keep(spool, b"o" * 1000), keep(spool, b"n" * 1000)
    monkeypatch.setattr("gadgets.spool._free", lambda folder: 3000 - sum(p.stat().st_size for p in folder.glob("*.mrd")))
    spool.make_room()
    assert spool.evicted() == [("disk", "complete", 1)]


def test_without_an_age_nothing_goes_by_it(tmp_path: Path) -> None:
    path = keep(make(tmp_path), SESSION)
    made_older(path, 1e9)
    assert make(tmp_path).make_room() and path.exists()


def test_captures_that_somebody_needs_stay(tmp_path: Path) -> None:
    spool = make(tmp_path, max_bytes=1, max_age=3600.0)
    spool.max_bytes = 1 << 30
    path = keep(spool, SESSION)
    made_older(path, 3700.0)
    spool.max_bytes, spool.held = 1, lambda: {path.name}
    spool._counted = float("-inf")
    spool.make_room()
    assert path.exists()
    spool.held = frozenset
    spool._counted = float("-inf")
    spool.make_room()
    assert not path.exists()


def test_what_came_of_a_capture_counts_as_part_of_it(tmp_path: Path) -> None:
    spool = make(tmp_path, max_bytes=5000)
    first = keep(spool, b"1" * 1000)
    nested = job_folder_of(first) / "r1"
    nested.mkdir(parents=True)
    (nested / "images.h5").write_bytes(b"x" * 4000)
    second = keep(spool, b"2" * 1000)
    spool._counted = float("-inf")
    spool.make_room()
    assert not first.exists() and not job_folder_of(first).exists() and second.exists()
