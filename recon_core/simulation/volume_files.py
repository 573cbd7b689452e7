"""Tissue volumes from files: NIfTI-1, MINC 1 and 2, and headerless bytes; also compressed by gzip.

Small readers for what atlases come in: one volume, no time axis. Data are returned ``(z, y, x)``.
"""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path

import h5py
import numpy as np
from numpy.typing import NDArray
from scipy.io import netcdf_file

from recon_core.errors import DataError

NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4"}
NIFTI_HEADER = 352
MAX_BYTES = 1 << 30  # a compressed file may not unfold into more


def read_volume(path: str | Path, raw_shape: tuple[int, int, int] | None = None) -> NDArray[np.generic]:
    """One volume ``(z, y, x)`` in its stored numbers, MINC and NIfTI scaling applied where the file states one.

    Parameters
    ----------
    path
        ``.nii``, ``.mnc``, ``.rawb`` (unsigned bytes), ``.raws`` (unsigned little-endian 16-bit), each with or without ``.gz``.
    raw_shape
        ``(z, y, x)`` of a headerless file.

    Raises
    ------
    DataError
        An unknown kind of file, a size that does not fit, a damaged header.
    """
    path = Path(path)
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    content = _content(path)
    if kind in ("nii", "mnc"):
        try:
            return read_nifti(content) if kind == "nii" else _read_minc(content)
        except DataError as error:
            raise DataError(error.what, where=path.name, got=error.got, expected=error.expected) from None
        except (ArithmeticError, AssertionError, LookupError, OSError, TypeError, ValueError) as error:  # of the readers
            raise DataError("damaged volume", where=path.name, got=type(error).__name__, expected="a whole file") from None
    if kind in ("rawb", "raws") and raw_shape is not None:
        data = np.frombuffer(content, dtype="u1" if kind == "rawb" else "<u2")
        if data.size != np.prod(raw_shape):
            raise DataError("wrong size", where=path.name, got=f"{data.size} voxels", expected=f"{np.prod(raw_shape)}")
        return data.reshape(raw_shape)
    raise DataError("unknown kind of volume", where=path.name, expected=".nii, .mnc, .rawb or .raws, with or without .gz")


def read_nifti(content: bytes) -> NDArray[np.generic]:
    """A single NIfTI-1 volume; axes as stored, reversed to ``(z, y, x)``, orientation not applied.

    Raises
    ------
    DataError
        Not NIfTI-1, another type of numbers, too short, or several volumes.
    """
    series, _ = nifti_series(content)
    if len(series) > 1:
        raise DataError("not one volume of plain numbers", where="NIfTI", got=f"{len(series)} volumes")
    return series[0]


def read_series(path: str | Path) -> tuple[NDArray[np.generic], tuple[float, float, float]]:
    """All volumes of a NIfTI-1 file, for instance echoes, and its voxel; see `nifti_series`."""
    return nifti_series(_content(Path(path)))


def nifti_series(content: bytes) -> tuple[NDArray[np.generic], tuple[float, float, float]]:
    """The volumes of a NIfTI-1 file ``(t, z, y, x)``, axes as stored, scaling applied; sides of the voxel ``(z, y, x)`` in m (from mm).

    Raises
    ------
    DataError
        Not NIfTI-1, another type of numbers, more than four axes, or too short.
    """
    order = "<" if content[:4] == struct.pack("<i", 348) else ">"
    if len(content) < NIFTI_HEADER or struct.unpack(order + "i", content[:4])[0] != 348:
        raise DataError("not a NIfTI-1 file", where="volume")
    dims = struct.unpack(order + "8h", content[40:56])
    code = struct.unpack(order + "h", content[70:72])[0]
    sides = struct.unpack(order + "4f", content[76:92])
    offset, slope, intercept = struct.unpack(order + "3f", content[108:120])
    shape = (dims[4] if dims[0] > 3 else 1, *dims[3:0:-1])
    if code not in NIFTI_TYPES or dims[0] < 3 or min(shape) < 1 or any(d > 1 for d in dims[5 : dims[0] + 1]):
        raise DataError("not volumes of plain numbers", where="NIfTI", got=f"type {code}, sizes {dims}")
    dtype = np.dtype(order + NIFTI_TYPES[code])
    n = int(np.prod(shape, dtype=np.int64))
    if len(content) < offset + n * dtype.itemsize:
        needed = f"{offset + n * dtype.itemsize:.0f} bytes for sizes {shape}"
        raise DataError("truncated", where="NIfTI", got=f"{len(content)} bytes", expected=needed)
    data = np.frombuffer(content, dtype, count=n, offset=int(offset)).reshape(shape)
    scaled = data if slope in (0.0, 1.0) and intercept == 0.0 else data * slope + intercept
    return scaled, (sides[3] * 1e-3, sides[2] * 1e-3, sides[1] * 1e-3)


def _read_minc(content: bytes) -> NDArray[np.generic]:
    if content[:3] == b"CDF":
        with netcdf_file(io.BytesIO(content), "r", mmap=False) as file:
            image = file.variables["image"]
            data = np.array(image.data)
            signed = getattr(image, "signtype", b"signed__").startswith(b"signed")
            low, high = (np.array(file.variables[f"image-{end}"].data) for end in ("min", "max"))
            valid = np.array(getattr(image, "valid_range", [])).ravel()
    elif content[:4] == b"\x89HDF":
        with h5py.File(io.BytesIO(content), "r") as file:
            group = file["minc-2.0/image/0"]
            data = group["image"][:]
            signed = data.dtype.kind == "i"
            low, high = group["image-min"][()], group["image-max"][()]
            valid = np.array(group["image"].attrs.get("valid_range", [])).ravel()
    else:
        raise DataError("neither MINC 1 (netCDF) nor MINC 2 (HDF5)", where="MINC", got=content[:4])
    if data.dtype.kind == "f":
        return data
    if not signed:
        data = data.view(data.dtype.str.replace("i", "u"))
    limits = np.iinfo(data.dtype)
    bottom, top = (valid[0], valid[1]) if valid.size == 2 else (limits.min, limits.max)
    extra = (1,) * (data.ndim - np.ndim(low))
    low, high = (np.asarray(end, float).reshape(np.shape(end) + extra) for end in (low, high))
    return (data.astype(np.float64) - bottom) * (high - low) / max(float(top) - float(bottom), 1.0) + low


def _content(path: Path) -> bytes:
    if not path.is_file():
        raise DataError("no such file", where="volume", got=path.name)
    if path.suffix != ".gz":
        return path.read_bytes()
    try:
        with gzip.open(path) as file:
            content = file.read(MAX_BYTES + 1)
    except (OSError, EOFError) as error:
        raise DataError("damaged compressed file", where=path.name, got=type(error).__name__) from None
    if len(content) > MAX_BYTES:
        raise DataError("file is too large", where=path.name, expected=f"at most {MAX_BYTES} bytes")
    return content
