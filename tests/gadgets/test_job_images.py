"""Images of a job on disk: a full disk costs them and nothing else, and an image file is there whole or not at all."""

from __future__ import annotations

import errno
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gadgets.errors import ImageFileError
from gadgets.image_file import read_images
from gadgets.job_images import MESSAGES, ImageLog, write_image_file
from gadgets.wire import codec
from tests.gadgets.serving import count_image
from tests.waiting import PATIENCE


def kept(folder: Path, *messages: bytes) -> Path:
    log = ImageLog(folder)
    for message in messages:
        log.append(message)
    log.close()
    return folder


def test_an_image_file_of_what_was_sent(tmp_path: Path) -> None:
    folder = kept(tmp_path / "a.job", count_image(1, series=1), count_image(2, series=1), count_image(3, series=1002))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and stat.S_IMODE((folder / MESSAGES).stat().st_mode) == 0o600
    assert write_image_file(folder) == 3
    assert [complex(image.data.flat[0]) for image in read_images(folder / "images.h5")] == [1, 2, 3]
    assert [path.name for path in folder.iterdir()] == ["images.h5"]
    assert stat.S_IMODE((folder / "images.h5").stat().st_mode) == 0o600
    assert write_image_file(folder) == 0, "a task that is run again finds its work done"


def test_a_file_of_an_earlier_attempt_is_replaced(tmp_path: Path) -> None:
    folder = kept(tmp_path / "a.job", count_image(1))
    write_image_file(folder)
    (folder / ".images.h5.part").write_bytes(b"of a worker that died")
    write_image_file(kept(folder, count_image(5)))
    assert [complex(image.data.flat[0]) for image in read_images(folder / "images.h5")] == [5]


def test_messages_that_end_in_the_middle_give_the_whole_images(tmp_path: Path) -> None:
    folder = kept(tmp_path / "a.job", count_image(1), count_image(2)[:-3])
    assert write_image_file(folder) == 1


def test_words_are_no_images(tmp_path: Path) -> None:
    assert write_image_file(kept(tmp_path / "a.job", codec.text("INF\n"), count_image(1))) == 1


def test_nothing_to_make_it_of(tmp_path: Path) -> None:
    with pytest.raises(ImageFileError, match="no images"):
        write_image_file(tmp_path / "missing.job")


def test_no_image_makes_no_folder(tmp_path: Path) -> None:
    log = ImageLog(tmp_path / "a.job")
    log.close()
    log.discard()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_loud_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = ImageLog(tmp_path / "a.job")
    log.append(count_image(1))
    really_write = os.write

    def full(fd: int, data: bytes) -> int:
        if os.fstat(fd).st_ino == log.path.stat().st_ino:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return really_write(fd, data)

    monkeypatch.setattr("gadgets.job_images.os.write", full)
    with caplog.at_level(logging.ERROR):
        log.append(count_image(2))
        log.append(count_image(3))
    assert log.failed and caplog.text.count("event=images_not_kept") == 1
    assert not (tmp_path / "a.job" / MESSAGES).exists(), "half of the images is no result"


def test_a_place_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "a.job").write_text("in the way")
    log = ImageLog(tmp_path / "a.job")
    log.append(count_image(1))
    log.close()
    assert log.failed


NO_ROOM = """
import os, resource, signal, sys
from pathlib import Path
from gadgets.errors import ImageFileError
from gadgets.job_images import write_image_file

folder, before = Path(sys.argv[1]), len(os.listdir("/proc/self/fd"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, most))
try:
    write_image_file(folder)
except ImageFileError as error:
    print(type(error).__name__)
assert [path.name for path in folder.iterdir()] == ["images.messages"], "to be tried again"
assert len(os.listdir("/proc/self/fd")) == before
resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
print(write_image_file(folder))
"""


def test_a_disk_that_fills_up_while_the_image_file_is_written(tmp_path: Path) -> None:
    """HDF5 would keep the file open, say so again and again, and refuse to make it when there is room."""
    folder = kept(tmp_path / "a.job", *(count_image(n) for n in range(1, 21)))
    command = [sys.executable, "-c", NO_ROOM, str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert ended.stdout.split() == ["ImageFileError", "20"], ended.stderr
    assert ended.stderr == ""
    assert len(list(read_images(folder / "images.h5"))) == 20
