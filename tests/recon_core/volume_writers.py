"""Small volumes in the formats that atlases come in, written from the formats' own definitions."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.io import netcdf_file


def store(path: Path, content: bytes) -> None:
    """Plain or compressed, by the name."""
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def nifti(path: Path, data: NDArray[np.generic], slope: float = 1.0, intercept: float = 0.0, order: str = "<") -> None:
    """NIfTI-1 of ``(z, y, x)`` data."""
    code = {"u1": 2, "i2": 4, "f4": 16, "f8": 64, "u2": 512}[data.dtype.str[1:]]
    header = bytearray(352)
    struct.pack_into(order + "i", header, 0, 348)
    struct.pack_into(order + "8h", header, 40, 3, *data.shape[::-1], 1, 1, 1, 1)
    struct.pack_into(order + "2h", header, 70, code, 8 * data.dtype.itemsize)
    struct.pack_into(order + "3f", header, 108, 352.0, slope, intercept)
    header[344:348] = b"n+1\0"
    store(path, bytes(header) + data.astype(data.dtype.newbyteorder(order)).tobytes())


def minc1(path: Path, stored: NDArray[np.generic], low: float, high: float, valid: tuple[float, float]) -> None:
    """MINC 1: netCDF-3 with one range for the whole volume; unsigned bytes are signed ones with a note."""
    plain = path.with_suffix(".part")
    with netcdf_file(plain, "w") as file:
        for name, n in zip(("zspace", "yspace", "xspace"), stored.shape, strict=True):
            file.createDimension(name, n)
        signed = stored.dtype.kind == "i"
        image = file.createVariable("image", stored.dtype.str.replace("u", "i")[1:], ("zspace", "yspace", "xspace"))
        image.signtype = b"signed__" if signed else b"unsigned"
        image.valid_range = np.array(valid, np.float64)
        image[:] = stored.view(stored.dtype.str.replace("u", "i"))
        for name, value in (("image-min", low), ("image-max", high)):
            file.createVariable(name, "d", ()).data[...] = value
    store(path, plain.read_bytes())
    plain.unlink()


def minc2(path: Path, stored: NDArray[np.generic], low: NDArray[np.floating], high: NDArray[np.floating]) -> None:
    """MINC 2: HDF5 with a range for every slice."""
    with h5py.File(path, "w") as file:
        group = file.create_group("minc-2.0/image/0")
        group["image"] = stored
        group["image-min"], group["image-max"] = low, high
