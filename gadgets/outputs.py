"""Where a command may write, asked before it works: hours of computing are not lost to a folder that does not exist.

One rule for all commands: a *file* goes into a folder that exists, since a missing one is most often a name misspelt; a *folder* that
is asked for as one is made.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from gadgets.errors import ImageFileError, OutputError
from gadgets.storage_room import free

if TYPE_CHECKING:
    import h5py


def check_file(path: Path, *endings: str) -> None:
    """Refuse a file that cannot be written, without touching what is there.

    Parameters
    ----------
    endings
        The kinds of file that may be asked for, such as ``.h5``; none given: any.

    Raises
    ------
    OutputError
        No name, a folder, another ending, a folder that does not exist, is none, or cannot be written to.
    """
    if not path.name:
        raise OutputError("names no file", where="output", got=repr("" if path == Path() else str(path)))
    if endings and path.suffix.lower() not in endings:
        raise OutputError(
            "unknown kind of file", where=str(path), got=path.suffix or "no ending", expected=" or ".join(endings)
        )
    if path.is_dir():
        raise OutputError("is a folder", where=str(path), expected="the name of a file")
    folder = path.parent
    if not folder.is_dir():
        what = "its folder is none" if folder.exists() else "its folder does not exist"
        raise OutputError(what, where=str(path), got=str(folder), remedy="Files go into folders that exist")
    try:
        if path.is_file():
            with path.open("ab"):
                return
        elif not path.exists():
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise OutputError("cannot be written", where=str(path), got=error.strerror) from None


def check_image_file(path: Path) -> None:
    """As `check_file`, for MRD images that are appended to what the file has.

    Raises
    ------
    OutputError
        As `check_file`.
    ImageFileError
        The file exists, and is no HDF5 file.
    """
    import h5py

    from recon_core.hdf5_input import why_unreadable

    check_file(path)
    if not path.is_file():
        return
    try:
        h5py.File(path, "r").close()
    except OSError as error:
        raise ImageFileError(
            "exists, and images cannot be added",
            where=str(path),
            got=why_unreadable(error),
            expected="an HDF5 file, or a new name",
        ) from None


def check_folder(path: Path) -> None:
    """Refuse a folder that can be neither used nor made.

    Raises
    ------
    OutputError
        It, or one that it would lie in, is a file or cannot be written to.
    """
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not there.is_dir():
        raise OutputError("is no folder", where=str(path), got=f"the file {there}")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise OutputError("cannot be written", where=str(path), got=f"{there}: {error.strerror}") from None


COMFORT, RESERVE = 256 << 20, 1 << 20
"""Bytes free on a disk below which HDF5 has to write out what it holds back, and those that it needs to close a file."""


def require_room(file: h5py.File | None, path: Path, needed: int) -> None:
    """Before so many bytes more go into an HDF5 file that is open for writing at ``path``, or is to be opened there.

    HDF5 never gets over a full disk: it cannot even close the file any more, and ends the process by a segmentation fault.

    Raises
    ------
    OutputError
        The disk has no room for them.
    """
    left = free(path.parent)
    if file is not None and left < needed + COMFORT:
        file.flush()
        left = free(path.parent)
    if left < needed + RESERVE:
        got, expected = (f"{max(0, n) >> 10} KiB" for n in (left, needed + RESERVE))
        raise OutputError(
            "the disk is full", where=str(path), got=f"{got} free", expected=expected, remedy="Free disk space"
        )
