"""Raw data that the spool has no room for: on a disk before in memory, and never until a disk or the machine is full."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gadgets import storage_room
from gadgets.errors import SpoolError
from gadgets.spool import ScanLog, Spool
from gadgets.storage_room import is_in_memory, memory_room, room
from tests.gadgets.serving import HEADER, data, serving

AHEAD = 1000
LIMIT = 20_000


@pytest.fixture
def full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Spool:
    """A spool without room, and two places besides: one of `LIMIT` bytes, and one of twice as many."""
    places = tmp_path / "first", tmp_path / "second"
    for place in places:
        place.mkdir()
    monkeypatch.setattr("gadgets.spool.TEMPORARY_AHEAD", AHEAD)
    monkeypatch.setattr("gadgets.scan_log.TEMPORARY_AHEAD", AHEAD)
    monkeypatch.setattr("gadgets.spool.room", lambda folder: limit(folder) - taken(folder))
    # a log's file lies in a folder of its own
    monkeypatch.setattr("gadgets.spool.Spool.has_room", by_place(Spool.has_room, places))
    return Spool(tmp_path / "spool", min_free_bytes=1 << 62, temporary_directories=places)


def by_place(has_room: Callable[[Spool, Path, int], bool], places: tuple[Path, ...]) -> Callable[[Spool, Path, int], bool]:
    def asked(spool: Spool, folder: Path, needed: int = 0) -> bool:
        return has_room(spool, next(place for place in places if folder.is_relative_to(place)), needed)

    return asked


def limit(place: Path) -> int:
    return LIMIT if place.name == "first" else 2 * LIMIT


def taken(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.mrd"))


def test_disks_come_before_memory(tmp_path: Path) -> None:
    memory, disk = Path("/dev/shm"), Path(tempfile.gettempdir())
    assert Spool(tmp_path).temporary_directories == (disk, memory)
    assert Spool(None).temporary_directories == (memory, disk), "nothing is to be kept: not on a disk either"


def test_a_log_that_outgrows_its_place_goes_on_in_another(full: Spool, tmp_path: Path) -> None:
    log, piece = full.open(), bytes(range(250))
    for _ in range(60):  # 15 000 bytes: room for another one of the kind is no condition
        log.append(piece)
    assert log.path.is_relative_to(tmp_path / "first")
    with pytest.raises(SpoolError, match="no room"):
        while True:
            log.append(piece)
    assert log.path.is_relative_to(tmp_path / "second")
    assert log.path.read_bytes() == piece * (log.size // len(piece)), "what came until then is whole"
    assert 2 * (LIMIT - AHEAD) <= taken(tmp_path / "second") <= 2 * LIMIT
    log.discard()


def test_many_logs_at_once_do_not_fill_a_place(full: Spool, tmp_path: Path) -> None:
    logs: list[ScanLog] = [full.open() for _ in range(4)]
    refused = 0
    while logs:
        for log in list(logs):
            try:
                log.append(bytes(250))
            except SpoolError as error:
                assert "MiB" in str(error.got) and error.remedy
                log.finish("failed", str(error))
                logs.remove(log)
                refused += 1
        for place in (tmp_path / "first", tmp_path / "second"):
            assert taken(place) <= limit(place) + 4 * (AHEAD + 250), "what each may write until it looks again"
    assert refused == 4


def test_the_operator_is_told_and_the_server_goes_on(full: Spool, tmp_path: Path) -> None:
    with serving(tmp_path, spool=full) as served:
        large = served.client().scan("fourier", header=HEADER, messages=[data(20, samples=32)] * 8)
        assert any(text.startswith("ERROR SpoolError") and "no room for the raw data" in text for text in large.texts)
        small = served.client().scan("fourier", header=HEADER, messages=[data(3)])
        assert len(small.images) == 1


# -- how much room there is ------------------------------------------------------------------------------------------------------


def test_files_in_memory_leave_memory_for_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_room, "free", lambda folder: 50 << 30)
    monkeypatch.setattr(storage_room, "memory_room", lambda: 3 << 30)
    monkeypatch.setattr(storage_room, "is_in_memory", lambda folder: folder.name == "shm")
    assert room(Path("/dev/shm")) == 3 << 30
    assert room(tmp_path) == (50 << 30) - storage_room.MIN_DISK


def test_memory_is_told_from_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = tmp_path.stat().st_dev
    number = f"{storage_room.os.major(device)}:{storage_room.os.minor(device)}"
    monkeypatch.setattr(storage_room, "MOUNTS", tmp_path / "mountinfo")
    assert not is_in_memory(tmp_path), "no such list: not Linux"
    for kind, expected in (("tmpfs", True), ("ext4", False)):
        lines = [f"22 28 0:999 / /proc rw - proc proc rw\n36 35 {number} / /mnt rw,noatime shared:1 - {kind} name rw\n"]
        (tmp_path / "mountinfo").write_text("".join(lines))
        assert is_in_memory(tmp_path) is expected
    assert not is_in_memory(tmp_path / "missing")


def test_the_memory_of_a_container_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemFree: 1 kB\nMemAvailable: {40 << 20} kB\n")
    monkeypatch.setattr(storage_room, "MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(storage_room, "GROUP", tmp_path)
    assert memory_room() == 40 * gib - int(6.4 * gib)
    (tmp_path / "memory.current").write_text(f"{5 * gib}\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_room() == 40 * gib - int(6.4 * gib)
    (tmp_path / "memory.max").write_text(f"{8 * gib}\n")
    assert memory_room() == 3 * gib - gib
    (tmp_path / "memory.stat").write_text(f"anon 1\ninactive_file {2 * gib}\n")
    assert memory_room() == 5 * gib - gib
