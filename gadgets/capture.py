"""Files of the spool: a scan's raw bytes, verbatim, and the JSON beside them that says what became of the scan."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadgets.errors import SpoolError

CAPTURE_SUFFIX, JOB_SUFFIX = ".mrd", ".job"
WINDOW_BYTES = 32 << 20


@dataclass(frozen=True)
class Capture:
    """A finished capture: its file, its size and what the sidecar says (empty when there is none)."""

    path: Path
    size: int
    info: Mapping[str, Any]

    @property
    def status(self) -> str:
        return str(self.info.get("status", "unknown"))


def read_capture(path: Path | str) -> Capture:
    """Look at a capture and check that it is one.

    Raises
    ------
    SpoolError
        No such file, an empty one, one that does not begin like an MRD session, or a size other than its sidecar's.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(2)
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise SpoolError("cannot read the capture", where=str(path), got=error.strerror) from error
    if int.from_bytes(start, "little") not in range(1, 9) or len(start) < 2:
        raise SpoolError(
            "neither an MRD raw file (HDF5) nor the capture of a session",
            where=str(path),
            got=start.hex() or "nothing",
            expected="ids 1 to 8 first",
        )
    info: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError):
        try:
            loaded = json.loads(sidecar(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise SpoolError("the sidecar is not JSON", where=str(sidecar(path))) from error
        if not isinstance(loaded, dict):
            raise SpoolError("the sidecar is not a JSON object", where=str(sidecar(path)))
        info = loaded
    if info and info.get("bytes") != size:
        raise SpoolError(
            "the file is not as long as it was", where=str(path), got=f"{size} bytes", expected=f"{info.get('bytes')}"
        )
    return Capture(path, size, info)


def sidecar(path: Path) -> Path:
    """Where a capture's description lies."""
    return path.with_suffix(".json")


def write_sidecar(path: Path, info: Mapping[str, Any]) -> None:
    """Write ``info`` so that the file is there whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(info, file, indent=1)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def capture_status(path: Path) -> str:
    """How a capture ended, ``"unknown"`` when its sidecar cannot be read."""
    try:
        return str(json.loads(sidecar(path).read_text(encoding="utf-8")).get("status", "unknown"))
    except (OSError, ValueError, AttributeError, RecursionError):
        return "unknown"


def amend_sidecar(capture: Path, **changes: Any) -> None:
    """Change what the sidecar says, if there is one and the disk allows it."""
    path = sidecar(capture)
    with contextlib.suppress(OSError, ValueError):
        write_sidecar(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def job_folder_of(capture: Path) -> Path:
    """The folder of what came of a capture: part of it, in size and in when it is removed."""
    return capture.with_suffix(JOB_SUFFIX)


def capture_beside(images: Path) -> Path | None:
    """Where the capture lies of which a file in a job's folder was made, there or not; ``None`` for a file anywhere else."""
    folder = images.resolve().parent
    if re.fullmatch(r"r\d+", folder.name):  # a retry
        folder = folder.parent
    return folder.with_suffix(CAPTURE_SUFFIX) if folder.suffix == JOB_SUFFIX else None


def windows(path: Path, size: int = WINDOW_BYTES) -> Iterator[memoryview]:
    """A file in large pieces, mapped: the parser touches only headers, the socket reads the page cache."""
    with path.open("rb") as file:
        mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    for start in range(0, len(mapped), size):
        yield mapped[start : start + size]


def sync(path: Path) -> None:
    """Force a file, or the names of the files in a folder, to the device.

    Raises
    ------
    OSError
        The file system cannot.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def size_of(path: Path) -> int:
    """Bytes; none where there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def folder_size(folder: Path) -> int:
    """Bytes of the files in it and below; none where there is no such folder."""
    total = 0
    for home, _, names in os.walk(folder):
        total += sum(size_of(Path(home) / name) for name in names)
    return total
