"""Images of a job on disk: their messages as they were sent, then an MRD image file.

Appending a message costs the connection's thread a copy into the page cache; a worker makes the image file afterwards.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

from gadgets.capture import windows
from gadgets.errors import ImageFileError
from gadgets.wire import events
from gadgets.wire.framing import FrameParser

log = logging.getLogger(__name__)

IMAGES = "images.h5"
MESSAGES = "images.messages"
GROUP = "images"
AT_ONCE_BYTES = 512 << 20  # of messages whose image file is made in memory; it takes a worker twice as much


class ImageLog:
    """The messages of one job's images, in the order in which they went out. Never raises: a full disk costs no scan.

    Parameters
    ----------
    folder
        The job's folder; made with the first image.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / MESSAGES
        self.failed = False
        self._fd = -1

    def append(self, message: bytes | bytearray | memoryview) -> None:
        """Add one message."""
        if self.failed:
            return
        try:
            if self._fd < 0:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._fd = os.open(self.path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            view = memoryview(message).cast("B")
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            self.failed = True
            log.error("event=images_not_kept folder=%s error=%s", self.path.parent.name, error.strerror)
            self.discard()

    def close(self) -> None:
        """Nothing more comes."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Remove what there is: the images will be made again, or cannot be kept."""
        self.close()
        with contextlib.suppress(OSError):
            self.path.unlink()


def write_image_file(folder: Path) -> int:
    """Make the image file of the messages in a job's folder; returns how many images it has.

    A worker's task, which may be run again: the file appears whole, and the messages go when it is there.

    Raises
    ------
    ImageFileError
        There is nothing to make it of, or it cannot be written.
    """
    from gadgets.image_file import ImageFile  # h5py: not for the server's process

    source, target = folder / MESSAGES, folder / IMAGES
    if not source.exists():
        if target.exists():
            return 0
        raise ImageFileError("no images of this job are kept", where=folder.name)
    part = folder / f".{IMAGES}.part"
    part.unlink(missing_ok=True)
    n_images = 0
    try:
        at_once = source.stat().st_size <= AT_ONCE_BYTES
        with ImageFile(part, GROUP, at_once=at_once) as file, FrameParser(role="client") as parser:
            for window in windows(source) if source.stat().st_size else ():
                for event in parser.feed(window):
                    if isinstance(event, events.Image):
                        file.append(event)
                        n_images += 1
        part.chmod(0o600)
        part.replace(target)
    except OSError as error:
        raise ImageFileError("cannot be written", where=f"{folder.name}/{IMAGES}", got=error.strerror) from None
    finally:
        part.unlink(missing_ok=True)
    source.unlink(missing_ok=True)
    return n_images
