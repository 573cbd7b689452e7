"""The server's side: what is noted of a scan is right, and nothing about it can harm the scan."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gadgets.handlers import ScanFacts
from gadgets.meta import read_meta
from gadgets.monitor import record as recording
from gadgets.monitor.files import IMAGE_FILE, LOG_FILE, STATUS_FILE, TOLD_FILE, read_object
from gadgets.monitor.observer import Observer
from gadgets.monitor.pictures import Gallery
from gadgets.montage import MAX_TILES, _tile_labels
from gadgets.spool import ScanLog, Spool
from gadgets.wire import codec
from gadgets.wire.events import Image, Readouts
from gadgets.wire.framing import FrameParser
from tests.monitor.spools import image
from tests.waiting import until


class Played:
    """A scan that sends what it was given."""

    def __init__(self, messages: list[bytes], say: Callable[[str], None], failure: Exception | None = None) -> None:
        self.messages, self.say, self.failure = messages, say, failure
        self.facts = ScanFacts(chain="llr")
        self.n_readouts, self.abandoned = 0, False

    def readouts(self, event: Readouts) -> None:
        self.n_readouts += len(event)

    def waveform(self, event: Any) -> None:
        pass

    def finish(self) -> Iterator[bytes]:
        self.say("WRN <b>thin</b> coils\n")
        self.say("DBG llr 43 %, about 25 s left\n")
        yield from self.messages
        if self.failure is not None:
            raise self.failure

    def abandon(self) -> None:
        self.abandoned = True


def readouts(n: int) -> Readouts:
    return Readouts(0, np.zeros(n, np.void(1).dtype), np.zeros(n, np.int64), np.zeros(n, np.int64))


def pictures(n: int, series: int = 1, size: int = 8) -> list[bytes]:
    return [image(series, number, np.full((1, size, size), number, np.uint16)) for number in range(1, n + 1)]


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", min_free_bytes=0)


@pytest.fixture
def observer(spool: Spool) -> Iterator[Observer]:
    assert spool.root is not None
    made = Observer(spool.root, lambda: {"workers": 1}).start()
    yield made
    made.close()


def played(
    observer: Observer, spool: Spool, messages: list[bytes], said: list[str] | None = None, **options: Any
) -> tuple[Any, ScanLog]:
    raw = spool.open()
    raw.append(b"\1\0")
    texts = [] if said is None else said
    return observer.open(lambda say: Played(messages, say, **options), "llr", raw, texts.append), raw


def served(root: Path) -> dict[str, Any]:
    return {"last": None, **read_object(root / STATUS_FILE)}


def told(raw_folder: Path) -> dict[str, Any]:
    return dict(read_object(raw_folder / TOLD_FILE))


def test_a_scan_passes_through_unchanged_and_is_noted(observer: Observer, spool: Spool) -> None:
    messages, said = [*pictures(3), codec.text("INF llr: 3 images\n")], list[str]()
    scan, raw = played(observer, spool, messages, said)
    folder = raw.job_folder
    scan.readouts(readouts(7))
    assert scan.facts.chain == "llr"
    logging.getLogger("gadgets.connection").warning("event=fallback chain=%s", "llr")
    assert list(scan.finish()) == messages
    assert said == ["WRN <b>thin</b> coils\n", "DBG llr 43 %, about 25 s left\n"]
    raw.finish("complete")
    until(lambda: told(folder).get("state") == "sent")
    seen = told(folder)
    logging.getLogger("gadgets.connection").warning("event=closed connection=c00001")
    assert (seen["readouts"], seen["images"], seen["fraction"], seen["bytes"]) == (7, 3, 1.0, 2)
    assert seen["warnings"] == ["<b>thin</b> coils"] and seen["words"] == ["llr: 3 images"]
    assert set(seen["seconds"]) == {"receive", "first_image", "reconstruct", "send"}
    words = ["WARNING event=fallback chain=llr", "WARNING event=closed connection=c00001"]
    until(lambda: [line.split(" ", 1)[1] for line in (folder / LOG_FILE).read_text().splitlines()] == words)
    status = until(lambda: served(raw.path.parent) if served(raw.path.parent)["last"] else None)
    assert status is not None
    assert status["active"] == [] and status["last"]["state"] == "sent" and status["server"] == {"workers": 1}
    assert status["tallies"]["scans"] == [["llr", "sent", 1]] and status["tallies"]["events"]["fallback"] == 1
    assert status["tallies"]["counts"] == {"readouts": 7, "bytes": 2, "images": 3}
    for path in (*folder.iterdir(), raw.path.parent / STATUS_FILE):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0 and ".part" not in path.name


def test_images_are_kept_evenly_and_can_be_drawn(observer: Observer, spool: Spool) -> None:
    empty, full = (np.full((1, 8, 8), code, np.uint16) for code in (0, 7))
    # the first slice of a map had no value to choose a unit by
    maps = [
        image(2, 1, empty, QuantityName="M0", PixelPaddingValue=0),
        image(2, 2, full, QuantityName="M0", PixelPaddingValue=0, QuantityUnit="1e-3"),
    ]
    scan, raw = played(observer, spool, [*pictures(100), *maps, *pictures(1, series=1001)])
    folder, root = raw.job_folder, raw.path.parent
    folder.mkdir()
    (folder / "image-0003-000001.mrd").write_bytes(pictures(1, series=3)[0])  # of a server that died at this scan
    list(scan.finish())
    raw.finish("complete")
    until(lambda: told(folder).get("state") == "sent")
    kept = sorted(path.name for path in folder.iterdir() if IMAGE_FILE.fullmatch(path.name))
    first = [int(name[11:17]) for name in kept if name.startswith("image-0001")]
    assert first == list(range(1, 101, 8)) and len(kept) == len(first) + 3
    assert told(folder)["series"] == [[1, 100], [2, 2], [1001, 1]]
    gallery = Gallery(root)
    job = raw.path.stem
    assert [picture.series for picture in gallery.of(job)] == [2, 1]  # the preview is over
    before = gallery.of(job)[0]
    assert before.unit == "1e-3"
    os.utime(folder / "image-0002-000002.mrd", (1.0, 1.0))
    assert gallery.of(job)[0].version != before.version
    drawn = gallery.png(job, 1)
    assert drawn is not None and drawn.read_bytes().startswith(b"\x89PNG")
    assert gallery.png(job, 3) is None and gallery.png("../" + job, 1) is None
    gallery.close()


def test_images_have_a_limit_in_bytes(observer: Observer, spool: Spool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "MAX_IMAGE_BYTES", 6000)
    slab = np.arange(101, dtype=np.uint16).repeat(12).reshape(101, 3, 4)  # 2.4 kB, and half of that in 48 planes
    sent = [*pictures(4, size=32), image(2, 1, slab, DataRole="Quantitative", QuantityName="QSM")]
    scan, raw = played(observer, spool, sent)  # images of 2 kB each, and a map that comes last
    folder = raw.job_folder
    assert list(scan.finish()) == sent
    raw.finish("complete")
    until(lambda: told(folder).get("state") == "sent")
    kept = sorted(path.name for path in folder.iterdir() if IMAGE_FILE.fullmatch(path.name))
    assert kept == ["image-0001-000001.mrd", "image-0002-000001.mrd"] and told(folder)["left_out"] == 3
    with FrameParser(role="client") as parser:
        (thin,) = (event for event in parser.feed((folder / kept[1]).read_bytes()) if isinstance(event, Image))
    planes = [int(n) for n in read_meta(thin.attributes)["ReconPlanes"]]
    assert (
        thin.data[0, :, 0, 0].tolist() == planes and len(planes) == 48 == MAX_TILES and (planes[0], planes[-1]) == (0, 100)
    )
    assert read_meta(thin.attributes)["QuantityName"] == ("QSM",)
    assert _tile_labels([thin], [(0, 0), (0, 47)]) == ["z 0", "z 100"]


@pytest.mark.parametrize("way", ["fails", "left", "abandoned"])
def test_scans_that_end_badly_are_noted_as_such(way: str, observer: Observer, spool: Spool) -> None:
    failure = RuntimeError("as planned") if way == "fails" else None
    scan, raw = played(observer, spool, pictures(2), failure=failure)
    folder = raw.job_folder
    if way == "fails":
        with pytest.raises(RuntimeError, match="as planned"):
            list(scan.finish())
    elif way == "left":
        answer = scan.finish()
        next(answer)
        answer.close()
    scan.abandon()
    assert scan._scan.abandoned
    raw.finish("failed" if way == "fails" else "truncated", "words")
    until(lambda: told(folder).get("state") == ("failed" if way == "fails" else "truncated"))


def test_a_disk_that_takes_nothing_costs_no_scan(
    observer: Observer, spool: Spool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with caplog.at_level(logging.INFO):
        monkeypatch.setattr("gadgets.monitor.record.write_sidecar", full)
        monkeypatch.setattr("gadgets.monitor.observer.write_sidecar", full)
        for _ in range(3):
            scan, raw = played(observer, spool, pictures(3))
            assert len(list(scan.finish())) == 3
            raw.finish("complete")
        until(lambda: "event=monitor_file_failed" in caplog.text)
        until(lambda: not observer._active)  # nor is anything of them held for ever
    assert caplog.text.count("event=monitor_file_failed") < 5  # said once, not twice a second


def test_without_a_capture_nothing_is_kept(tmp_path: Path) -> None:
    spool = Spool(None, temporary_directories=(tmp_path,))
    (tmp_path / "root").mkdir()
    observer = Observer(tmp_path / "root", dict).start()
    scan, raw = played(observer, spool, pictures(2))
    folder = raw.job_folder
    assert len(list(scan.finish())) == 2
    observer.close()
    assert not folder.exists() and not (tmp_path / "root" / STATUS_FILE).exists()
    raw.discard()


def test_a_scan_that_cannot_be_noted_is_a_scan_all_the_same(observer: Observer, spool: Spool) -> None:
    class Broken:
        path = property(lambda self: 1 / 0)

    made = observer.open(lambda say: Played(pictures(1), say), "llr", Broken(), list[str]().append)  # type: ignore[arg-type]
    assert isinstance(made, Played) and len(list(made.finish())) == 1
