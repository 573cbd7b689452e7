"""Where commands may write: refused before they work, with the folder named, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import h5py
import pytest
from typer.testing import CliRunner

from gadgets import retry
from gadgets.cli import app
from gadgets.errors import ImageFileError, OutputError
from gadgets.image_file import ImageFile, read_images
from gadgets.outputs import RESERVE, check_file, check_folder, check_image_file
from gadgets.simulate import simulate
from gadgets.wire.framing import FrameParser
from tests.wire import streams


def test_files_that_can_be_written_are_left_alone(tmp_path: Path) -> None:
    there = tmp_path / "there.h5"
    there.write_bytes(b"kept")
    check_file(there)
    check_file(tmp_path / "new.h5", ".h5")
    check_file(Path("/dev/null"))
    assert there.read_bytes() == b"kept" and [path.name for path in tmp_path.iterdir()] == ["there.h5"]


def test_files_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, words in (
        (Path(""), "names no file; got ''"),
        (Path("/"), "names no file; got '/'"),
        (tmp_path, "is a folder"),
        (tmp_path / "lost" / "deeper" / "a.h5", f"its folder does not exist; got {tmp_path / 'lost' / 'deeper'}"),
        (tmp_path / "file" / "a.h5", f"its folder is none; got {tmp_path / 'file'}"),
        (Path("/proc/a.h5"), "cannot be written"),
        (tmp_path / "a.txt", "unknown kind of file; got .txt; expected .h5 or .csv"),
    ):
        with pytest.raises(OutputError) as found:
            check_file(path, ".h5", ".csv") if path.suffix == ".txt" else check_file(path)
        assert words in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_are_added_to_an_image_file_only(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "images.h5", "w"):
        pass
    check_image_file(tmp_path / "images.h5")
    for content in (b"", b"a text"):
        (tmp_path / "text.h5").write_bytes(content)
        with pytest.raises(ImageFileError, match="expected an HDF5 file"):
            check_image_file(tmp_path / "text.h5")
        assert (tmp_path / "text.h5").read_bytes() == content


def test_folders_are_made_unless_a_file_is_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_folder(tmp_path)
    check_folder(tmp_path / "new" / "deeper")
    for path, words in (
        (tmp_path / "file", "is no folder"),
        (tmp_path / "file" / "new", "is no folder"),
        (Path("/proc/new"), "cannot be written"),
    ):
        with pytest.raises(OutputError, match=words):
            check_folder(path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    "words",
    [
        ("run", "RAW", "-c", "llr", "-o", "LOST/o.h5"),
        ("run", "-", "-c", "llr", "-o", "LOST/o.h5"),
        ("replay", "RAW", "-c", "llr", "-p", "1", "-o", "LOST/o.h5"),
        ("simulate", "cine", "LOST/o.h5"),
    ],
)
def test_a_command_asks_for_its_folder_before_it_works(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_late(*_: object, **__: object) -> None:
        raise AssertionError("began to work")

    for place in (
        "gadgets.service.Service",
        "gadgets.replay.replay",
        "gadgets.stream.run_files",
        "gadgets.simulate.simulate",
    ):
        monkeypatch.setattr(place, too_late)
    given = [word.replace("LOST", str(tmp_path / "lost")).replace("RAW", str(tmp_path / "raw.h5")) for word in words]
    with pytest.raises(OutputError, match="its folder does not exist") as found:
        CliRunner().invoke(app, given, catch_exceptions=False)
    assert found.value.got == str(tmp_path / "lost") and not list(tmp_path.iterdir())


def test_pictures_and_the_job_s_folder_are_asked_for_as_well(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for option in ("--montage", "--job-folder"):
        given = ["run", str(tmp_path / "raw.h5"), "-c", "llr", "-o", str(tmp_path / "o.h5"), option, str(tmp_path / "file")]
        with pytest.raises(OutputError, match="is no folder"):
            CliRunner().invoke(app, given, catch_exceptions=False)


def test_a_retry_asks_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="its folder does not exist"):
        retry.retry(tmp_path, "any", output=tmp_path / "lost" / "o.h5", here=lambda row: row)
    assert not list(tmp_path.iterdir())  # no journal was made


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose disk seems to be as large as what is left for closing, and 200 KiB."""

    def left(folder: Path) -> int:
        return RESERVE + (200 << 10) - sum(path.stat().st_size for path in tmp_path.iterdir())

    monkeypatch.setattr("gadgets.outputs.free", left)
    return tmp_path


def test_images_end_before_the_disk_is_full(small_disk: Path) -> None:
    """HDF5 would neither close the file any more nor let the process end: it crashes."""
    out = small_disk / "images.h5"
    with FrameParser(role="client") as parser:
        [image] = parser.feed(streams.image((1, 1, 64, 64)))
    (small_disk / "full").write_bytes(bytes(300 << 10))
    with pytest.raises(ImageFileError, match="the disk is full"):
        ImageFile(out)
    (small_disk / "full").unlink()
    with ImageFile(out) as file, pytest.raises(ImageFileError, match=r"the disk is full; got .* KiB free") as found:
        while True:
            file.append(image)  # type: ignore[arg-type]
    assert f"The {file.n_images} images before are there" in str(found.value)
    assert len(list(read_images(out))) == file.n_images > 3 and out.stat().st_size < 200 << 10


def test_a_simulated_scan_that_has_no_room_is_refused(small_disk: Path) -> None:
    with pytest.raises(OutputError, match=r"cine\.h5: the disk is full"):
        simulate("cine", small_disk / "cine.h5", {"matrix_x": 64, "matrix_y": 64, "states": 4, "slices": 1, "coils": 4})
    assert (small_disk / "cine.h5").stat().st_size < 200 << 10
