"""Masks that somebody made, for susceptibility maps: files ``NAME.npy`` in the server's masks folder, which a setting names.

A file holds bool, or 0 and 1, ``(z, y, x)`` on the console's matrix: voxel by voxel the images that the server sends. Files of numpy can
hold pickled objects, which are never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError

import numpy as np
import torch
from numpy.typing import NDArray

from gadgets.mask_check import mask_names
from gadgets.sorted_scan import SortedScan
from recon_core.errors import DataError
from recon_core.maps.brain_mask import given_mask
from recon_core.sampling.mask_files import MaskError

ENDING = ".npy"

UNREADABLE = (OSError, ValueError, TypeError, OverflowError, EOFError, SyntaxError, TokenError)
"""What numpy raises at a damaged file: its header is the text of a Python dictionary."""


def given_mask_of(scan: SortedScan, name: str, folder: Path | None) -> NDArray[np.bool_]:
    """The mask called ``name`` of a folder, for a scan of one slab.

    Raises
    ------
    MaskError
        No such mask, not readable, several slabs.
    DataError
        As `recon_core.maps.brain_mask.given_mask`.
    """
    known = mask_names(folder, (ENDING,))
    # looked up among the names that exist: a path can never match
    if name not in known:
        raise MaskError(
            "no such mask on this server",
            where="maps.map_mask_file",
            got=repr(name[:64]),
            expected="one of " + ", ".join(known) if known else f"a {ENDING} file in the masks folder, which has none",
            remedy=f"recon mask install FILE{ENDING} puts one there",
        )
    if scan.n_slices > 1:
        raise MaskError("a mask is of one slab", where=f"mask {name!r}", got=f"{scan.n_slices} slabs")
    return read_given_mask(known[name], scan.scan_info(0).recon_matrix)


def read_given_mask(path: Path, shape: Sequence[int] | None = None) -> NDArray[np.bool_]:
    """bool ``(z, y, x)`` of a file; its sizes are compared with ``shape`` before it is read.

    Raises
    ------
    MaskError
        No such file, or none of numpy with three axes of numbers.
    DataError
        As `recon_core.maps.brain_mask.given_mask`.
    """
    if not path.is_file():
        raise MaskError("no such file", where=path.name)
    try:
        stored = np.lib.format.open_memmap(path, mode="r")
    except UNREADABLE as error:
        raise MaskError("not a readable mask", where=path.name, got=type(error).__name__, expected="a .npy file") from None
    if stored.ndim != 3 or stored.dtype.kind not in "buif" or not stored.size:
        raise MaskError("not a mask", where=path.name, got=f"{stored.dtype} {stored.shape}", expected="bool (z, y, x)")
    if shape is not None and stored.shape != tuple(shape):
        given_mask(torch.zeros((), dtype=torch.bool).expand(stored.shape), shape, path.name)
    if stored.dtype.kind != "b" and not bool(((stored == 0) | (stored == 1)).all()):
        raise DataError("not a mask", where=path.name, got=f"values of {stored.dtype}", expected="bool, or 0 and 1")
    values = np.array(stored, dtype=bool, order="C")  # a copy: not the file's memory
    return given_mask(torch.from_numpy(values), values.shape, path.name).numpy()
