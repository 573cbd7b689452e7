"""Masks that somebody made, for susceptibility maps: files ``NAME.npy`` in the server's masks folder, which a setting names.

A file holds bool, or 0 and 1, ``(z, y, x)`` on the console's matrix: voxel by voxel the images that the server sends. Files of numpy can
hold pickled objects, which are never loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from gadgets.errors import SortError
from gadgets.mask_check import mask_names
from gadgets.readouts import chosen_encoding
from gadgets.sorted_scan import SortedScan
from gadgets.wire.header import MrdHeader
from recon_core.errors import DataError, ReconError
from recon_core.maps.brain_mask import given_mask
from recon_core.maps.settings import MapSettings
from recon_core.sampling.mask_files import MaskError

if TYPE_CHECKING:
    from gadgets.chain import Chain

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
    path = _named(name, folder)
    if scan.n_slices > 1:
        raise MaskError("a mask is of one slab", where=f"mask {name!r}", got=f"{scan.n_slices} slabs")
    return read_given_mask(path, scan.scan_info(0).recon_matrix)


def named_mask(settings: MapSettings) -> str:
    """The mask that maps with these settings are made in; empty where they need none."""
    return settings.map_mask_file if settings.maps == "qsm" else ""


def require_given_mask(chain: Chain, folder: Path | None) -> None:
    """A mask that was chosen for this scan is there, and one. (One of a chain's file that is gone costs no scan: it is said.)

    Raises
    ------
    MaskError, DataError
        As `given_mask_of`, as far as no scan is needed to tell.
    """
    if "map_mask_file" in chain.overrides and (name := named_mask(chain.maps)):
        read_given_mask(_named(name, folder))


def doubt_of_mask(chain: Chain, header: MrdHeader, folder: Path | None) -> str:
    """Why a chain's mask will make no map, as far as the header tells, in words for the operator; empty: nothing speaks against it."""
    name = named_mask(chain.maps)
    if not name:
        return ""
    try:
        read_given_mask(_named(name, folder), chosen_encoding(header, chain.acquisition).recon_matrix)
    except SortError:
        return ""  # of the header: whoever sorts the readouts says so
    except ReconError as error:
        return str(error)
    return ""


def _named(name: str, folder: Path | None) -> Path:
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
    return known[name]


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
