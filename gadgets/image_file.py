"""MRD image files in the HDF5 layout of ``gadgetron_ismrmrd_client``: every tool that reads its files reads ours.

``<group>/image_<series>/{header, attributes, data}``: one chunk and one row per image; ``header`` is the packed 198-byte
structure, ``attributes`` variable-length text, ``data`` ``(image, channel, z, y, x)``; complex numbers are compounds of
``real`` and ``imag``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gadgets.errors import ImageFileError, OutputError
from gadgets.outputs import require_room
from gadgets.wire.dtypes import DATA_TYPE_CODES, IMAGE_HEADER
from gadgets.wire.events import Image
from recon_core.hdf5_input import plain_dataset, why_unreadable

_COMPLEX = {
    np.dtype("<c8"): np.dtype([("real", "<f4"), ("imag", "<f4")]),
    np.dtype("<c16"): np.dtype([("real", "<f8"), ("imag", "<f8")]),
}
_TEXT = h5py.string_dtype("ascii")  # as the client declares it; the bytes may be UTF-8


class ImageFile:
    """An image file that is open for appending.

    Parameters
    ----------
    path
        Created if it does not exist; images of earlier runs in the same group are kept and appended to.
    group
        The client calls it after its ``-G`` option or the date.
    at_once
        A new file, in memory until ``close`` writes all of it. HDF5 never lets go of a file whose disk is full: the file stays open,
        with its memory, and every later attempt in this process finds it so. ``close`` may raise an ``OSError`` then.

    Raises
    ------
    ImageFileError
        The file exists and is no HDF5 file, or cannot be written.
    """

    def __init__(self, path: Path | str, group: str = "images", *, at_once: bool = False) -> None:
        self.path, self.group = Path(path), group
        self.n_images = 0
        self._at_once = at_once
        if not at_once:
            self._require_room(None, 0)
        try:
            kept = {"driver": "core", "backing_store": False} if at_once else {}
            self._file = h5py.File(self.path, "w" if at_once else "a", **kept)
        except OSError as problem:
            raise ImageFileError("cannot be written", where=self.path.name, got=why_unreadable(problem)) from None
        self._root = self._file.require_group(group)

    def append(self, image: Image) -> None:
        """Add one image to its series.

        Raises
        ------
        ImageFileError
            Its matrix, channels or pixel type differ from those of the series (the real client aborts on a matrix and
            silently converts pixels), its data are not what its header says, or the disk has no room for it.
        """
        header, data = image.header, image.data
        name = f"image_{int(header['image_series_index'])}"
        expected = (int(header["channels"]), *(int(n) for n in header["matrix_size"][::-1]))
        if data.shape != expected or DATA_TYPE_CODES.get(data.dtype) != int(header["data_type"]):
            got = f"{data.dtype} {data.shape}"
            wanted = f"data type {int(header['data_type'])}, {expected}"
            raise ImageFileError("data and header of an image disagree", where=name, got=got, expected=wanted)
        stored = _COMPLEX.get(data.dtype, data.dtype)
        if not self._at_once:
            self._require_room(self._file, data.nbytes + len(image.attributes) + IMAGE_HEADER.itemsize)
        if name not in self._root:
            self._create(name, data.shape, stored)
        series = self._root[name]
        rows = series["data"]
        if rows.shape[1:] != data.shape or rows.dtype != stored:
            raise ImageFileError(
                "images of one series differ in matrix or pixel type",
                where=name,
                got=f"{data.dtype} {data.shape}",
                expected=f"{_plain(rows.dtype)} {rows.shape[1:]}",
                remedy="The sender has to use another image_series_index.",
            )
        n = rows.shape[0]
        for part in ("header", "attributes", "data"):
            series[part].resize(n + 1, axis=0)
        series["header"][n] = header
        series["attributes"][n] = image.attributes.replace("\0", "").encode("utf-8")  # HDF5 texts end at the first NUL
        rows[n] = np.ascontiguousarray(data).view(stored)
        self.n_images += 1

    def close(self) -> None:
        """Finish the file; may be called twice."""
        content = None
        if self._at_once and self._file:  # a closed one is false
            self._file.flush()
            content = self._file.id.get_file_image()
        self._file.close()
        if content is not None:
            self.path.write_bytes(content)

    def __enter__(self) -> ImageFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _require_room(self, file: h5py.File | None, needed: int) -> None:
        try:
            require_room(file, self.path, needed)
        except OutputError as error:
            remedy = f"Free disk space. The {self.n_images} images before are there"
            raise ImageFileError(
                error.what, where=error.where, got=error.got, expected=error.expected, remedy=remedy
            ) from None

    def _create(self, name: str, shape: tuple[int, ...], stored: np.dtype[Any]) -> None:
        series = self._root.create_group(name)
        series.create_dataset("header", (0,), IMAGE_HEADER, maxshape=(None,), chunks=(1,))
        series.create_dataset("attributes", (0,), _TEXT, maxshape=(None,), chunks=(1,))
        series.create_dataset("data", (0, *shape), stored, maxshape=(None, *shape), chunks=(1, *shape))


def image_groups(path: Path | str) -> list[str]:
    """Groups of an image file that hold image series, sorted."""
    with _open(path) as file:
        return sorted(_groups(file))


def read_images(path: Path | str, group: str | None = None) -> Iterator[Image]:
    """The images of a file, series by series in ascending order, one at a time.

    Parameters
    ----------
    path
        A file of this module, of the real client, or of ismrmrd's image writers.
    group
        Which run; ``None``: all of them.

    Raises
    ------
    ImageFileError
        No HDF5 file, no such group, or a series that is not complete.
    """
    with _open(path) as file:
        found = sorted(_groups(file))
        if group is not None and group not in found:
            raise ImageFileError(
                "no images under this name", where=Path(path).name, got=group, expected=", ".join(found) or None
            )
        for root in found if group is None else [group]:
            for name in sorted(_series(file[root]), key=lambda n: int(n[6:])):
                yield from _read_series(file[root][name], f"{root}/{name}")


def _read_series(series: h5py.Group, where: str) -> Iterator[Image]:
    headers, attributes, rows = (plain_dataset(series, name) for name in ("header", "attributes", "data"))
    if not len(headers) == len(attributes) == len(rows) or headers.dtype.itemsize != IMAGE_HEADER.itemsize:
        got = f"{len(headers)} headers of {headers.dtype.itemsize} bytes, {len(attributes)} attributes, {len(rows)} images"
        raise ImageFileError("series is not complete", where=where, got=got, expected="as many of each, 198-byte headers")
    plain = _plain(rows.dtype)
    for n in range(len(rows)):
        header = np.frombuffer(np.asarray(headers[n]).tobytes(), IMAGE_HEADER).copy()[0]
        data: NDArray[np.generic] = np.asarray(rows[n])
        text = attributes[n]
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        # the client converts a series to its first image's type and leaves the header alone: what is in the file counts
        header["data_type"] = DATA_TYPE_CODES.get(plain, int(header["data_type"]))
        yield Image(offset=0, header=header, attributes=text.rstrip("\0"), data=data.view(plain))


def _open(path: Path | str) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as problem:
        got = why_unreadable(problem)
        raise ImageFileError("cannot be read", where=Path(path).name, got=got, expected="an HDF5 file") from None


def _groups(file: h5py.File) -> set[str]:
    found: set[str] = set()
    file.visititems(lambda name, item: found.add(name) if isinstance(item, h5py.Group) and _series(item) else None)
    return found


def _series(group: h5py.Group) -> list[str]:
    return [
        name
        for name in group
        if name.startswith("image_")
        and name[6:].isdigit()
        and group.get(name, getclass=True, getlink=True) is h5py.HardLink
        and isinstance(group[name], h5py.Group)
        and {"header", "attributes", "data"} <= set(group[name])
    ]


def _plain(stored: np.dtype[Any]) -> np.dtype[Any]:
    """The numpy type of stored pixels: a compound of two floats is complex."""
    if stored.names is None:
        return stored
    return np.dtype("<c8") if stored.itemsize == 8 else np.dtype("<c16")
