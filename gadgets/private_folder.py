"""Folders that hold patient data: for their owner alone, whoever made them first."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def make_private(folder: Path) -> None:
    """Make a folder of mode 0700, or make an existing one so.

    Raises
    ------
    OSError
        It cannot be made, is no folder, or belongs to another user, who could read what is put in.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)  # what is judged is what is changed
    try:
        if os.fstat(handle).st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "it belongs to another user", str(folder))
        os.fchmod(handle, 0o700)
    finally:
        os.close(handle)
