"""HDF5 from somebody else: data sets that lie in the file itself, as large as they say, and need no code from elsewhere.

An HDF5 file may refer to other files (external links, external storage, virtual data sets) and so put their content into images; it
may claim shapes that nothing fills; and it may name filters that the library would load from a plug-in folder. None of that
occurs in raw data, images or masks.
"""

from __future__ import annotations

import math

import h5py

from recon_core.errors import DataError

MAX_BYTES = 8 << 30
"""Of a data set that is read whole."""

MAX_CHUNK_BYTES = 256 << 20
"""Uncompressed: what one access may unpack."""

MAX_ELEMENT_BYTES = 64 << 20

BUILT_IN_FILTERS = {
    h5py.h5z.FILTER_DEFLATE,
    h5py.h5z.FILTER_SHUFFLE,
    h5py.h5z.FILTER_FLETCHER32,
    h5py.h5z.FILTER_SCALEOFFSET,
    h5py.h5z.FILTER_LZF,
}


class UnsafeFile(DataError):
    """A file that refers to others, claims what it has not, or needs code from elsewhere."""


def why_unreadable(error: Exception) -> str:
    """What h5py's error about a whole file means, in words; the error's kind where they are not known."""
    known = {"truncated file": "a file that is cut short", "file signature not found": "no HDF5 file"}
    return next((words for said, words in known.items() if said in str(error)), type(error).__name__)


def plain_item(group: h5py.Group, path: str) -> h5py.Group | h5py.Dataset | None:
    """What lies at ``path`` below ``group`` in this very file; ``None`` when nothing does.

    Parameters
    ----------
    group
        Where the path begins.
    path
        Names with ``/`` between them.

    Raises
    ------
    UnsafeFile
        A link on the way is no hard link, or a data set is not one that can be trusted (see the module's text).
    """
    here: h5py.Group | h5py.Dataset = group
    for name in [part for part in path.split("/") if part]:
        if not isinstance(here, h5py.Group):
            return None
        link = here.get(name, getlink=True)
        if link is None:
            return None
        if not isinstance(link, h5py.HardLink):
            raise UnsafeFile("a link that leads elsewhere", where=_where(here, name), got=type(link).__name__)
        here = here[name]
    if isinstance(here, h5py.Dataset):
        _check(here)
    return here


def plain_dataset(group: h5py.Group, path: str, *, whole: bool = False) -> h5py.Dataset:
    """As `plain_item`, where there has to be a data set. ``whole``: it will be read at once.

    Raises
    ------
    UnsafeFile
        As `plain_item`, or it is too large to be read at once.
    KeyError
        There is none.
    """
    found = plain_item(group, path)
    if not isinstance(found, h5py.Dataset):
        raise KeyError(path)
    if whole and found.nbytes > MAX_BYTES:
        raise UnsafeFile("too large", where=_where(group, path), got=found.nbytes, expected=f"at most {MAX_BYTES} bytes")
    return found


def _check(data: h5py.Dataset) -> None:
    where, plan = str(data.name)[:200], data.id.get_create_plist()
    if data.is_virtual or plan.get_external_count():
        raise UnsafeFile("the data lie in another file", where=where, expected="data in this file")
    if data.dtype.itemsize > MAX_ELEMENT_BYTES:
        raise UnsafeFile(
            "elements are too large", where=where, got=data.dtype.itemsize, expected=f"{MAX_ELEMENT_BYTES} bytes"
        )
    filters = {plan.get_filter(number)[0] for number in range(plan.get_nfilters())}
    if not filters <= BUILT_IN_FILTERS:
        got = sorted(filters - BUILT_IN_FILTERS)
        raise UnsafeFile(
            "packed by a filter that is not built in", where=where, got=got, remedy="Repack it: h5repack -f NONE"
        )
    n_stored = _stored(data)
    if n_stored is not None:
        raise UnsafeFile("the file claims more than it has", where=where, got=n_stored, expected=f"all of {data.shape}")


def _stored(data: h5py.Dataset) -> str | None:
    """What is there of a data set, in words, when that is not all of it."""
    if not data.size:
        return None
    if data.chunks is None:
        there = data.id.get_storage_size()
        return None if there >= data.size * data.id.get_type().get_size() else f"{there} bytes"
    if math.prod(data.chunks) * data.dtype.itemsize > MAX_CHUNK_BYTES:
        return f"pieces of {math.prod(data.chunks) * data.dtype.itemsize} bytes"
    wanted = math.prod(-(-extent // piece) for extent, piece in zip(data.shape, data.chunks, strict=True))
    there = data.id.get_num_chunks()
    return None if there >= wanted else f"{there} of {wanted} pieces"


def _where(group: h5py.Group, name: str) -> str:
    return f"{group.name}/{name}"[:200]
