"""Where an image lies in the patient: millimetres, DICOM's patient coordinates (LPS: left, posterior, superior).

MRD stores the *centre* of the excited slice or slab and the acquisition's directions; our images are never flipped or
rotated, so row, column and slice directions of the image are read, phase and slice directions of the acquisition.

The half pixel
--------------
A scanner demodulates so that the gradient-encoded coordinate is zero at ``position``. After a centred Fourier transform
the coordinate zero is pixel ``N // 2``; the geometric centre of the pixel grid is at ``(N - 1) / 2``. For odd N they are the
same. For even N they differ by half a pixel along that axis (for a 3D slab also half a partition):

* ``"fft"``: ``r(i) = position + (i - N // 2) d``: where the signal really came from.
* ``"fov"``: ``r(i) = position + (i - (N - 1) / 2) d``: what MRD and DICOM define (``position`` is the middle of the field of
  view), and what a console computes from the header that it receives.

``position`` is sent exactly as it was acquired, because the console places the vendor's own images of the same raw data by
the same rule, and overlays have to match; Gadgetron and ICE chains do the same. The price is that our images, like
theirs, lie half a pixel away from the truth along axes of even length. Whoever needs the exact place (a mask exported to
another scan, registration with a navigator) uses ``"fft"``. A centre crop or zero-filled interpolation from N to M
keeps pixel ``N // 2`` on ``M // 2``, so neither moves the ``"fft"`` centre.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from recon_core.errors import DataError

if TYPE_CHECKING:  # it imports torch, which the client of `recon replay` does without
    from recon_core.types import ScanInfo

Vector = tuple[float, float, float]
Centre = Literal["fov", "fft"]

AXIAL: tuple[Vector, Vector, Vector] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
"""Read, phase and slice direction that are assumed when the raw data carry none."""

ASSUMED = "axial ones assumed"

DIRECTION_TOLERANCE = 1e-3
"""Largest error of a length or a scalar product that is float32 noise and not worth a word; about 0.06 degrees."""


@dataclass(frozen=True)
class Geometry:
    """Place and orientation of one slice or slab; unit vectors, mm, LPS.

    ``notes`` says in words what was repaired; empty for sound data. ``directions_known`` is ``False`` where axial ones are a guess.
    """

    position: Vector
    read_dir: Vector
    phase_dir: Vector
    slice_dir: Vector
    table_position: Vector = (0.0, 0.0, 0.0)
    notes: tuple[str, ...] = ()
    directions_known: bool = True

    @property
    def b0_direction(self) -> Vector | None:
        """B0 in the image frame ``(z, y, x)``: the patient's head-feet axis lies along the bore; ``None`` where nothing is known."""
        known = (self.slice_dir[2], self.phase_dir[2], self.read_dir[2])
        return known if self.directions_known else None


def read_geometry(header: Any) -> Geometry:
    """The geometry in an acquisition or image header (structured array element with the MRD field names).

    Zero, unnormalised, skewed or non-finite directions and positions, as phantom and simulated data often have, are repaired
    as in `orthonormal_directions`; the result never contains NaN, and ``notes`` says what was done.
    """
    directions, notes = orthonormal_directions(header["read_dir"], header["phase_dir"], header["slice_dir"])
    known = not any(note.endswith(ASSUMED) for note in notes)
    position, table = _vector(header["position"]), _vector(header["patient_table_position"])
    if not np.isfinite(position).all():
        position, notes = (0.0, 0.0, 0.0), (*notes, "slice position is not finite: isocentre assumed")
    if not np.isfinite(table).all():
        table = (0.0, 0.0, 0.0)
    return Geometry(position, *directions, table_position=table, notes=notes, directions_known=known)


def orthonormal_directions(
    read_dir: ArrayLike, phase_dir: ArrayLike, slice_dir: ArrayLike
) -> tuple[tuple[Vector, Vector, Vector], tuple[str, ...]]:
    """Three orthonormal directions from three that may be missing or sloppy, and notes on the repairs.

    Sound directions (within `DIRECTION_TOLERANCE`) come back untouched. A single missing one is the right-handed cross
    product of the others; with two or three missing, axial ones are assumed. Skewed ones are made orthogonal keeping the
    read direction (Gram-Schmidt); a left-handed triple stays left-handed.
    """
    given = np.array([_vector(read_dir), _vector(phase_dir), _vector(slice_dir)])
    usable = np.isfinite(given).all(axis=1)
    lengths = np.where(usable, np.linalg.norm(np.where(usable[:, None], given, 0.0), axis=1), 0.0)
    usable &= lengths > 1e-6
    if usable.sum() < 2:
        return AXIAL, (f"acquisition directions are missing: {ASSUMED}",)
    if usable.all() and np.abs(given @ given.T - np.eye(3)).max() < DIRECTION_TOLERANCE:
        return (_vector(given[0]), _vector(given[1]), _vector(given[2])), ()

    unit = np.where(usable[:, None], given, 0.0) / np.where(usable, lengths, 1.0)[:, None]
    notes = []
    for axis, name in enumerate(("read", "phase", "slice")):
        if not usable[axis]:
            unit[axis] = np.cross(unit[(axis + 1) % 3], unit[(axis + 2) % 3])
            notes.append(f"{name} direction is missing: cross product of the others used")
    read = unit[0] / max(float(np.linalg.norm(unit[0])), 1e-30)
    phase = unit[1] - (unit[1] @ read) * read
    normal = np.cross(read, phase)
    if np.linalg.norm(unit[0]) < 1e-3 or np.linalg.norm(normal) < 1e-3:
        return AXIAL, (f"acquisition directions are parallel: {ASSUMED}",)
    phase, normal = phase / np.linalg.norm(phase), normal / np.linalg.norm(normal)
    if normal @ unit[2] < 0:
        normal = -normal
    if usable.all():
        notes.append("acquisition directions are not orthonormal: made so, keeping the read direction")
    return (_vector(read), _vector(phase), _vector(normal)), tuple(notes)


def field_of_view_mm(scan: ScanInfo, shape: Sequence[int]) -> Vector:
    """Field of view ``(x, y, z)`` in mm of an image of ``shape`` ``(z, y, x)``; of the full slab for a 3D image.

    Images are on the prescribed (reconstructed) grid, or, from a method called directly, on the encoded one. Going from one
    to the other happens about pixel ``N // 2`` and never moves the centre, so ``position`` holds for both.

    Raises
    ------
    DataError
        The image is on neither grid, or the header's field of view is not positive.
    """
    got = tuple(int(n) for n in shape)
    if got == tuple(scan.recon_matrix):
        fov = scan.recon_fov
    elif got == tuple(scan.matrix):
        fov = scan.fov
    else:
        expected = f"{tuple(scan.recon_matrix)} or {tuple(scan.matrix)}"
        raise DataError("image grid fits neither matrix of the header", where="output geometry", got=got, expected=expected)
    if not all(np.isfinite(extent) and extent > 0 for extent in fov):
        raise DataError("no usable field of view", where="output geometry", got=fov, expected="three positive lengths in m")
    return 1e3 * fov[2], 1e3 * fov[1], 1e3 * fov[0]


def pixel_to_patient(header: Any, index: ArrayLike, centre: Centre = "fov") -> NDArray[np.float64]:
    """Patient coordinates in mm of (fractional) pixel indices ``(..., 3)`` in the order x, y, z.

    ``header`` is an MRD image header; ``centre`` is explained at the top of this file.
    """
    matrix = np.asarray(header["matrix_size"], dtype=np.int64)
    step = np.asarray(header["field_of_view"], dtype=np.float64) / matrix
    origin = (matrix - 1) / 2 if centre == "fov" else matrix // 2
    axes = np.array([header["read_dir"], header["phase_dir"], header["slice_dir"]], dtype=np.float64)
    offset = (np.asarray(index, dtype=np.float64) - origin) * step
    return np.asarray(header["position"], dtype=np.float64) + offset @ axes


def image_position_patient(header: Any, z: int = 0, centre: Centre = "fov") -> Vector:
    """DICOM's ImagePositionPatient (0020,0032): the centre of the first transmitted pixel of plane ``z``, mm.

    ``IPP = position - (Nx-1)/2 dx read - (Ny-1)/2 dy phase + (z - (Nz-1)/2) dz slice`` (DICOM PS3.3 C.7.6.2.1.1) for
    ``"fov"``; Gadgetron's own DICOM writer subtracts FOV/2, which is the ``"fft"`` form for even matrices.
    """
    return _vector(pixel_to_patient(header, (0, 0, z), centre))


def pixel_spacing(header: Any) -> tuple[float, float]:
    """DICOM's PixelSpacing (0028,0030) in mm: between rows (dy) first, then between columns (dx)."""
    return (
        float(header["field_of_view"][1]) / int(header["matrix_size"][1]),
        float(header["field_of_view"][0]) / int(header["matrix_size"][0]),
    )


def _vector(values: ArrayLike) -> Vector:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x, y, z = np.asarray(values, dtype=np.float64).tolist()
    return x, y, z
