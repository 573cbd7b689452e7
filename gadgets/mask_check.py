"""Did the scan sample the mask it was told of? Which samples exist is always read from the readouts; the mask is only compared.

A scan is told of its mask by its MRD header (user parameters ``SamplingMask``, a name, and ``SamplingMaskSHA256``, the digest of the
pattern; the header that ``recon mask export`` writes has both) or by the chain's setting ``sampling_mask``. The mask itself is a file of
that name in the server's masks folder.

Missing or additional samples are said, echo by echo: the method works on what was measured. A mask for another matrix or for another
number of echoes belongs to another scan: the chain is refused, and its fallback's images are what the operator gets.
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gadgets.sorted_scan import SortedScan
from gadgets.spool import default_spool_root
from gadgets.wire.header import MrdHeader
from recon_core.errors import ReconError
from recon_core.sampling.agreement import differences, pattern_digest
from recon_core.sampling.mask_files import MaskError, SamplingMask, read_mask

if TYPE_CHECKING:
    from gadgets.chain import Chain

NAME_PARAMETER, DIGEST_PARAMETER = "SamplingMask", "SamplingMaskSHA256"
BY_HEADER, UNCHECKED = "auto", "none"
MASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
ENDINGS = (".h5", ".hdf5", ".csv")
MAX_TOLD = 600
"""Characters of the differences that an operator is shown."""

MAX_POSITIONS = 1 << 28
"""Bytes that a comparison may take over all slices: counters and matrix are what a peer says."""


@dataclass(frozen=True)
class MaskReport:
    """What the comparison found: sentences for the operator, good news, and the error that refuses the chain."""

    notes: tuple[str, ...] = ()
    agreement: str | None = None
    refusal: ReconError | None = None


@dataclass(frozen=True)
class _Told:
    name: str
    digest: str | None
    by_operator: bool


def default_folder() -> Path:
    """``$XDG_STATE_HOME/recon-gadgets/masks``, by default below ``~/.local/state``."""
    return default_spool_root().parent / "masks"


def mask_names(folder: Path | None, endings: tuple[str, ...] = ENDINGS) -> dict[str, Path]:
    """The masks of a folder by name; none where there is no folder.

    Raises
    ------
    MaskError
        What is there cannot be read, or is no folder.
    """
    try:
        found = [] if folder is None else sorted(folder.iterdir())
        files = [path for path in found if path.suffix.lower() in endings and path.is_file()]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise MaskError(
            "the server's masks cannot be read",
            where="masks folder",
            got=os.strerror(error.errno or 0),
            expected="a folder that the server may read",
            remedy="recon serve --masks DIR names it",
        ) from None
    return {path.stem: path for path in files if MASK_NAME.fullmatch(path.stem)}


def check_name(file: Path) -> None:
    """Refuse a file whose mask no header could name.

    Raises
    ------
    MaskError
        Blanks, other signs, or too long.
    """
    if not MASK_NAME.fullmatch(file.stem):
        raise MaskError(
            "not a name for a mask",
            where=file.name,
            got=repr(file.stem[:80]),
            expected="letters, digits, '_', '-' and '.', at most 64",
            remedy="rename the file: its name is what scans and server call the mask",
        )


def install_mask(file: Path, folder: Path, endings: tuple[str, ...] = ENDINGS) -> list[str]:
    """Copy a mask's file into a server's folder, whole or not at all: a scan may read it at any moment.

    Parameters
    ----------
    endings
        Of the masks that share the name: one of them is what a scan is told of, so the others make way.

    Returns
    -------
    list of str
        Names of the files that were removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / file.name
    if not (target.exists() and target.samefile(file)):
        part = folder / f".{file.name}.part"
        try:
            shutil.copyfile(file, part)
            os.replace(part, target)
        except OSError:
            part.unlink(missing_ok=True)
            raise
    same_name = [path for path in folder.iterdir() if path.stem == file.stem and path.suffix.lower() in endings]
    others = sorted(path for path in same_name if path.name != file.name and path.is_file())
    for path in others:
        path.unlink()
    return [path.name for path in others]


def check_samples(scan: SortedScan, folder: Path | None) -> MaskReport:
    """Compare the sorted readouts with the mask that the scan was told of; nothing is said when it was told of none.

    Parameters
    ----------
    scan
        All readouts in their places.
    folder
        The server's masks.
    """
    told = _told(scan.header, scan.settings.sampling_mask)
    if told is None:
        return MaskReport()
    if "contrast" not in scan.states[0]:
        return MaskReport((f"mask {told.name!r}: not compared, the echoes are averaged into one image",))
    shape = _shape(scan)
    try:
        mask = _read(told.name, folder)
    except MaskError as error:
        return MaskReport(refusal=error) if told.by_operator else _by_digest(scan, shape, told, error)
    if shape != mask.mask.shape:
        return MaskReport(refusal=_of_another_scan(told.name, shape, mask))
    if _too_many(scan, shape):
        return MaskReport((f"mask {told.name!r}: not compared, too many slices and states",))
    notes = []
    if told.digest is not None and pattern_digest(mask.mask) != told.digest:
        notes.append(
            f"mask {told.name!r} on this server is not the one that the sequence was made from "
            f"(sha256 {pattern_digest(mask.mask)[:12]}, the header says {told.digest[:12]})"
        )
    compared = 0
    for place, acquired in _acquired(scan, shape):
        found = differences(acquired, mask.mask)
        if found:
            text = "; ".join(found)
            shown = text if len(text) <= MAX_TOLD else f"{text[:MAX_TOLD]}..."
            notes.append(f"{place}the samples are not those of mask {told.name!r}: {shown}")
        compared += int(acquired.sum())
    good = f"all {compared} samples are those of mask {told.name!r}" if not notes else None
    return MaskReport(tuple(notes), agreement=good)


def require_sampling_mask(chain: Chain, folder: Path | None) -> None:
    """A sampling mask that was chosen for this scan is there, and one. (One of a chain's file that is gone costs no scan.)

    Raises
    ------
    MaskError
        It is not.
    """
    name = chain.acquisition.sampling_mask
    if "sampling_mask" in chain.overrides and name not in (BY_HEADER, UNCHECKED):
        _read(name, folder)


def _told(header: MrdHeader, setting: str) -> _Told | None:
    if setting == UNCHECKED:
        return None
    if setting != BY_HEADER:
        return _Told(setting, None, by_operator=True)
    name = header.user_string.get(NAME_PARAMETER)
    digest = header.user_string.get(DIGEST_PARAMETER, "").strip().lower()
    return _Told(name[:64], digest or None, by_operator=False) if name else None


def _read(name: str, folder: Path | None) -> SamplingMask:
    known = mask_names(folder)
    # looked up among the names that exist: a path can never match
    if name not in known:
        raise MaskError(
            "no such mask on this server",
            where="sampling mask",
            got=repr(name[:64]),
            expected="one of " + ", ".join(known) if known else "a file in the masks folder, which has none",
            remedy="recon mask install FILE puts one there",
        )
    return read_mask(known[name])


def _by_digest(scan: SortedScan, shape: tuple[int, int, int], told: _Told, error: MaskError) -> MaskReport:
    """Without the file the digest still tells whether the samples are right, though not which are wrong."""
    if told.digest is None or _too_many(scan, shape):
        return MaskReport((f"the samples were not compared with mask {told.name!r}: {error}",))
    wrong = [place for place, acquired in _acquired(scan, shape) if pattern_digest(acquired) != told.digest]
    if not wrong:
        return MaskReport(agreement=f"the samples are those of mask {told.name!r}, by its digest")
    return MaskReport((f"{wrong[0]}the samples are not those of mask {told.name!r}; what differs is not known: {error}",))


def _shape(scan: SortedScan) -> tuple[int, int, int]:
    """``(echo, k2, k1)`` of the scan, echoes that the header announces and that never came included."""
    limit = scan.encoding.limits.get("contrast")
    last = max(max(state["contrast"] for state in scan.states), 0 if limit is None else limit.maximum)
    return (1 + last - _first_echo(scan), *scan.grid)


def _first_echo(scan: SortedScan) -> int:
    """The contrast counter of the mask's first echo: 0, unless the header counts from 1."""
    limit = scan.encoding.limits.get("contrast")
    return 0 if limit is None else min(limit.minimum, *(state["contrast"] for state in scan.states))


def _too_many(scan: SortedScan, shape: tuple[int, int, int]) -> bool:
    return math.prod(shape) * scan.n_slices * scan.n_states > MAX_POSITIONS


def _acquired(scan: SortedScan, shape: tuple[int, int, int]) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """``(echo, k2, k1)`` of each slice and of each combination of the other counters, and where that is (empty for the only one)."""
    rest = [tuple((name, value) for name, value in state.items() if name != "contrast") for state in scan.states]
    groups = {key: number for number, key in enumerate(dict.fromkeys(rest))}
    varying = [name for name in dict(rest[0]) if len({dict(key)[name] for key in groups}) > 1]
    echo_of = np.array([state["contrast"] for state in scan.states]) - _first_echo(scan)
    group_of = np.array([groups[key] for key in rest])
    at = scan.imaging
    for number, counter in enumerate(scan.slices):
        for key, which in groups.items():
            acquired = np.zeros(shape, dtype=bool)
            own = np.flatnonzero((at.slice == number) & (group_of[at.state] == which))
            acquired[echo_of[at.state[own]], at.k2[own], at.k1[own]] = True
            place = " ".join([f"slice {counter}", *(f"{name} {value}" for name, value in key if name in varying)])
            yield (f"{place}: " if len(scan.slices) * len(groups) > 1 else ""), acquired


def _of_another_scan(name: str, shape: tuple[int, int, int], mask: SamplingMask) -> MaskError:
    n_echoes, *matrix = mask.mask.shape
    got = f"the scan has {shape[0]} echoes, the mask {n_echoes}"
    if shape[1:] != tuple(matrix):
        transposed = ": transposed" if shape[:0:-1] == tuple(matrix) else ""
        got = f"the scan's matrix is {shape[1]} x {shape[2]}, the mask's {matrix[0]} x {matrix[1]} (k2 x k1){transposed}"
    return MaskError(
        "the mask belongs to another scan",
        where=f"sampling mask {name!r}",
        got=got,
        remedy="Tell the chain the right one (sampling_mask), or none: which samples exist is read from the data",
    )
