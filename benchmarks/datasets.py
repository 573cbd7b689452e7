"""Fully sampled scans of public datasets as benchmark cells: CMRxRecon (``.mat`` v7.3) and OCMR (ISMRMRD HDF5).

The data have to be fetched by the site (synapse.org, ocmr.info); give the folder to ``benchmarks.moe_dqinr``. Layouts:

``CMRxRecon``  ``.../{Cine,Mapping}/TrainingSet/FullSample/P001/{cine_sax,cine_lax,T1map}.mat``. HDF5 dataset ``kspace_full`` (2023) or
               ``kspace`` (2024, 2025), compound of ``real`` and ``imag``, axes as HDF5 sees them ``(t, slice, coil, ky, kx)``; kx is
               the readout, DC at ``n // 2``. ``T1map.csv``: a header row, then one row per image with a label and one inversion
               time in ms per slice.
``OCMR``       ``fs_*.h5``, fully sampled cine: ISMRMRD group ``dataset``; ``idx.phase`` is the cardiac frame; 2x readout oversampling,
               asymmetric echoes in some.

Images are cropped to the paper's matrices (section 4.1), coils compressed, coil maps estimated by ESPIRiT from the calibration
lines, and the truth is the coil combination of the full data with those maps. The noise level is not known.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, label

from benchmarks.cell import Array, Cell, box, centred_ifft, undersample
from benchmarks.dynamic_cells import ACS
from benchmarks.series import centred_fft
from recon_core.coils.estimate import estimate_coil_maps
from recon_core.errors import DataError
from recon_core.preprocess.coil_compression import compress, compression_matrix

CROP = {"cine": (204, 204), "molli": (144, 144)}
"""k1 and x, pixels (section 4.1)."""
COILS = 10
FILES = {"cine": "cine_sax.mat", "molli": "T1map.mat"}
"""Of one CMRxRecon subject."""
FULL_KEYS = ("kspace_full", "kspace")
SKIPPED_FLAGS = (19, 20, 23, 24, 27)
"""ISMRMRD: noise, calibration only, navigation, phase correction, dummy."""


@dataclass(frozen=True)
class FullScan:
    """One slice, complete: ``kspace`` complex64 hybrid ``(state, coil, 1, k1, x)``; ``times`` in s or empty; ``fov`` in m."""

    name: str
    kind: str
    kspace: Array
    times: tuple[float, ...] = ()
    fov: tuple[float, float, float] = (0.008, 0.306, 0.306)


def crop(kspace: Array, matrix: tuple[int, int]) -> Array:
    """Hybrid k-space of the central ``(y, x)`` pixels; smaller images are left as they are."""
    n_y, n_x = (min(a, b) for a, b in zip(matrix, kspace.shape[-2:], strict=True))
    first = kspace.shape[-1] // 2 - n_x // 2
    kspace = kspace[..., first : first + n_x]
    if n_y == kspace.shape[-2]:
        return kspace
    images = centred_ifft(kspace, -2)
    first = images.shape[-2] // 2 - n_y // 2
    return np.asarray(centred_fft(images[..., first : first + n_y, :], -2), dtype=np.complex64)


def read_mat(path: Path, slice_index: int) -> NDArray[np.complex64]:
    """One slice of a CMRxRecon file, complex64 k-space ``(state, coil, k1, k0)``.

    Raises
    ------
    DataError
        Not such a file: no complete k-space in it, other axes, or a slice that it does not have.
    """
    with h5py.File(path, "r") as file:
        key = next((key for key in FULL_KEYS if key in file), None)
        if key is None:
            raise DataError(
                "no complete k-space in this file", where=path.name, got=sorted(file), expected=" or ".join(FULL_KEYS)
            )
        data = file[key]
        if data.ndim != 5 or data.dtype.names is None or set(data.dtype.names) != {"real", "imag"}:
            raise DataError(
                "not a CMRxRecon k-space",
                where=path.name,
                got=f"{data.shape} {data.dtype}",
                expected="(t, slice, coil, ky, kx) of real and imag",
            )
        if not 0 <= slice_index < data.shape[1]:
            raise DataError("no such slice", where=path.name, got=slice_index, expected=f"0 to {data.shape[1] - 1}")
        part = data[:, slice_index]
    return np.asarray(part["real"] + 1j * part["imag"], dtype=np.complex64)


def read_inversion_times(path: Path, n_states: int, slice_index: int) -> tuple[float, ...]:
    """Inversion times in s of one slice from a CMRxRecon ``T1map.csv``.

    Raises
    ------
    DataError
        Fewer rows than images, or no number for this slice.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [row for row in list(csv.reader(file))[1:] if any(cell.strip() for cell in row[1:])]
    try:
        values = [float(row[1 + slice_index]) / 1000 for row in rows[:n_states]]
    except (IndexError, ValueError):
        values = []
    if len(values) != n_states:
        raise DataError(
            "inversion times do not fit the images",
            where=path.name,
            got=f"{len(values)} times for slice {slice_index}",
            expected=f"{n_states} rows with a label and one time in ms per slice",
        )
    return tuple(values)


def cmrxrecon_scans(folder: Path, kind: str, *, slices: int = 1, most: int = 0) -> Iterator[FullScan]:
    """Fully sampled short-axis cines (``cine``) or T1 series (``molli``) of a CMRxRecon folder, however deep they lie.

    Parameters
    ----------
    slices
        Of each subject, from the middle outwards.
    most
        Subjects; 0 is all.
    """
    found = sorted(folder.rglob(FILES[kind]))
    complete = [path for path in found if "FullSample" in path.parts] or found
    if not complete:
        raise DataError("no CMRxRecon files", where="benchmarks.datasets", expected=f"{FILES[kind]} below the folder given")
    for path in complete[: most or None]:
        with h5py.File(path, "r") as file:
            key = next((key for key in FULL_KEYS if key in file), None)
            n_slices = file[key].shape[1] if key else 0
        middle = sorted(range(n_slices), key=lambda z: abs(z - n_slices // 2))
        for z in middle[:slices]:
            kspace = centred_ifft(read_mat(path, z), -1)[:, :, None]
            times = read_inversion_times(path.with_suffix(".csv"), len(kspace), z) if kind == "molli" else ()
            yield FullScan(f"CMRxRecon {path.parent.name} slice {z}", kind, crop(kspace, CROP[kind]), times)


def read_ocmr(path: Path, slice_index: int = 0) -> FullScan:
    """One slice of an OCMR file, averages and repetitions averaged, readout oversampling removed.

    Raises
    ------
    DataError
        Lines are missing (a prospectively undersampled file), or the slice does not exist.
    """
    from defusedxml import ElementTree  # only here: a GPU machine that reads CMRxRecon has no need of it

    with h5py.File(path, "r") as file:
        records = file["dataset/data"][:]
        header = ElementTree.fromstring(file["dataset/xml"][0])
    space = {"m": "http://www.ismrm.org/ISMRMRD"}

    def number(path_in_header: str, default: float | None = None) -> float:
        found = header.findtext(f".//m:encoding/m:{path_in_header.replace('/', '/m:')}", namespaces=space)
        if found is None and default is None:
            raise DataError("a header field is missing", where=path.name, expected=path_in_header)
        return float(found if found is not None else default)  # type: ignore[arg-type]

    head = records["head"]
    skipped = sum(1 << (flag - 1) for flag in SKIPPED_FLAGS)
    use = ((head["flags"] & np.uint64(skipped)) == 0) & (head["idx"]["slice"] == slice_index)
    if not use.any():
        raise DataError("no such slice", where=path.name, got=slice_index, expected="a slice counter of the file")
    n_0 = int(number("encodedSpace/matrixSize/x"))
    n_x = int(number("reconSpace/matrixSize/x", n_0))
    lines = int(number("encodingLimits/kspace_encoding_step_1/maximum")) + 1
    centre = int(number("encodingLimits/kspace_encoding_step_1/center", lines // 2))
    n_1 = max(2 * centre, 2 * (lines - centre) - 1)  # DC goes to n_1 // 2
    kspace = _sort(records[use], n_0, n_1, n_1 // 2 - centre)
    missing = int((np.abs(kspace).max(axis=(1, 3)) == 0).sum())
    if missing:
        raise DataError(
            "not fully sampled",
            where=path.name,
            got=f"{missing} empty lines of {kspace.shape[0] * n_1}",
            expected="a file named fs_*, without partial Fourier",
        )
    fov_y, fov_0 = (number(f"encodedSpace/fieldOfView_mm/{axis}") / 1000 for axis in "yx")
    hybrid = centred_ifft(kspace, -1)[:, :, None]
    hybrid = hybrid[..., n_0 // 2 - n_x // 2 : n_0 // 2 - n_x // 2 + n_x]
    fov = (number("encodedSpace/fieldOfView_mm/z", 8.0) / 1000, fov_y, fov_0 * n_x / n_0)
    return FullScan(f"OCMR {path.stem} slice {slice_index}", "cine", hybrid, fov=fov)


def _sort(records: NDArray[Any], n_0: int, n_1: int, shift: int) -> NDArray[np.complex64]:
    """Readouts to ``(phase, coil, k1, k0)``, repeated ones averaged; the echo's centre goes to ``n_0 // 2``."""
    head = records["head"]
    phases, n_coils = int(head["idx"]["phase"].max()) + 1, int(head["active_channels"].max())
    total = np.zeros((phases, n_coils, n_1, n_0), np.complex64)
    counts = np.zeros((phases, n_1), np.float32)
    for one, samples in zip(head, records["data"], strict=True):
        n = int(one["number_of_samples"])
        readout = np.asarray(samples, np.float32).view(np.complex64).reshape(-1, n)
        first = n_0 // 2 - int(one["center_sample"])
        kept = slice(max(0, -first), min(n, n_0 - first))
        phase, line = int(one["idx"]["phase"]), int(one["idx"]["kspace_encode_step_1"]) + shift
        total[phase, :, line, first + kept.start : first + kept.stop] += readout[:, kept]
        counts[phase, line] += 1
    return np.asarray(total / np.maximum(counts, 1)[:, None, :, None], dtype=np.complex64)


def ocmr_scans(folder: Path, *, most: int = 0) -> Iterator[FullScan]:
    """The first slice of each fully sampled cine of an OCMR folder, cropped."""
    found = sorted(folder.rglob("fs_*.h5"))
    if not found:
        raise DataError("no OCMR files", where="benchmarks.datasets", expected="fs_*.h5 below the folder given")
    for path in found[: most or None]:
        scan = read_ocmr(path)
        yield FullScan(scan.name, scan.kind, crop(scan.kspace, CROP["cine"]), fov=scan.fov)


def to_cell(scan: FullScan, acceleration: float, *, acs: int = ACS, n_coils: int = COILS, seed: int = 0) -> Cell:
    """A measured cell: fewer coils, ESPIRiT maps, the full data's coil combination as truth, then the mask."""
    data = torch.from_numpy(np.ascontiguousarray(scan.kspace, dtype=np.complex64))
    if data.shape[1] > n_coils:
        data = compress(data, compression_matrix(data.movedim(1, 0), n_coils), 1)
    full = data.numpy()
    empty = np.zeros(full.shape[-2:], bool)[None]
    cell = Cell(
        name=f"{scan.name}, {acceleration:g}x",
        images=full[:, 0],
        coil_maps=full[0],
        kspace=full,
        mask=np.ones((len(full), 1, full.shape[-2]), bool),
        acs_mask=np.zeros((1, full.shape[-2]), bool),
        noise_std=0.0,
        support=empty,
        kind=scan.kind,
        origin="measured",
        roi=empty,
        times=scan.times,
        t1=None,
        look_locker=True,
        acceleration=float(acceleration),
        fov=scan.fov,
        maps_used="estimated",
    )
    cell = undersample(cell, full, acceleration, acs, np.random.default_rng(seed))
    maps = estimate_coil_maps(cell.problem()[0]).numpy()
    images = (centred_ifft(full, -2) * maps.conj()).sum(1)
    peak = float(np.percentile(np.abs(images), 99.9))
    support, roi = regions(images, scan.kind)
    return replace(cell, coil_maps=maps, images=images / peak, kspace=cell.kspace / peak, support=support, roi=roi)


def regions(images: Array, kind: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Support and region of interest ``(z, y, x)``: of a cine the rectangle that moves most, else the central quarter."""
    magnitude = np.abs(images)
    mean = gaussian_filter(magnitude.mean(0), (0, 1.5, 1.5))
    support = mean > 0.08 * np.percentile(mean, 99)
    roi = np.zeros(support.shape, bool)
    if kind == "cine":
        motion = gaussian_filter(magnitude.std(0), (0, 3, 3))
        found, _ = label(motion > 0.5 * motion.max())
        return support, box(found == found[np.unravel_index(np.argmax(motion), motion.shape)], 6)
    n_y, n_x = support.shape[1:]
    roi[:, n_y // 4 : 3 * n_y // 4, n_x // 4 : 3 * n_x // 4] = True
    return support, roi
