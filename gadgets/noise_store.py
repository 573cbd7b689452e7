"""Noise covariances by measurement id, for scans that name a noise measurement as their dependency.

One ``.npz`` without pickles per measurement. The file's name is the SHA-256 of the id: safe as a path, and no id can be read
from a listing. Entries are valid for a limited time, because coils are re-plugged and gains change.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import threading
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from gadgets.errors import SpoolError
from gadgets.private_folder import make_private
from gadgets.state_folder import state_folder

logger = logging.getLogger(__name__)

MAX_AGE = 48 * 3600.0
"""Seconds; Gadgetron's storage server keeps noise measurements as long."""
MAX_CHANNELS = 1024


def default_noise_root() -> Path:
    """``$XDG_STATE_HOME/recon-gadgets/noise``, by default below ``~/.local/state``."""
    return state_folder() / "noise"


@dataclass(frozen=True)
class StoredNoise:
    """One noise measurement.

    Attributes
    ----------
    covariance
        complex128 ``(coil, coil)``, of one complex sample (divided by N-1), in the square of the raw data's unit.
    dwell_time
        Dwell time of the noise readouts in s; whitening scales with it.
    coil_labels
        Names of the coil elements in the order of ``covariance``; empty when unknown.
    stored_at
        Seconds since the epoch.
    """

    covariance: NDArray[np.complex128]
    dwell_time: float
    coil_labels: tuple[str, ...] = ()
    stored_at: float = 0.0

    def of_coils(self, labels: Sequence[str], n_channels: int) -> NDArray[np.complex128] | None:
        """The covariance of a scan's channels in their order; ``None`` where not all of them were measured.

        Noise is often measured with all elements, and another scan uses some of them or has them in another order. Where either side
        has no ``labels``, only the number of channels can be compared.
        """
        if not labels or not self.coil_labels:
            return self.covariance if len(self.covariance) == n_channels else None
        place = {label: i for i, label in enumerate(self.coil_labels)}
        if not place.keys() >= set(labels):
            return None
        order = [place[label] for label in labels]
        return self.covariance[np.ix_(order, order)]

    def meta(self) -> str:
        """The ismrmrdMeta document that answers a dependency query (id 1019); sigmas are per complex sample."""
        sigma = np.sqrt(np.diagonal(self.covariance).real)
        return _meta(
            {
                "status": "success",
                "channels": str(len(sigma)),
                "min_sigma": f"{sigma.min():.9g}",
                "max_sigma": f"{sigma.max():.9g}",
                "mean_sigma": f"{sigma.mean():.9g}",
                "noise_dwell_time_us": f"{self.dwell_time * 1e6:.9g}",
            }
        )


class NoiseStore:
    """Files below ``root``; several servers may share the folder. ``max_age`` in seconds."""

    def __init__(self, root: Path, max_age: float = MAX_AGE) -> None:
        self.root = Path(root).expanduser()
        self.max_age = max_age
        self._lock = threading.Lock()
        try:
            make_private(self.root)
        except OSError as error:
            raise SpoolError("cannot make the folder", where=f"noise store {self.root}", got=error.strerror) from error

    def put(
        self,
        measurement_id: str,
        covariance: NDArray[np.complexfloating],
        dwell_time: float,
        coil_labels: Sequence[str] = (),
    ) -> None:
        """Store one measurement, in place of an older one of the same id.

        Parameters
        ----------
        measurement_id
            As in the header's ``measurementInformation``.
        covariance
            ``(coil, coil)``, Hermitian.
        dwell_time
            Of the noise readouts, in s.
        coil_labels
            In the order of ``covariance``.

        Raises
        ------
        SpoolError
            No id, a covariance that is not a finite Hermitian matrix, labels that do not fit, or a full disk.
        """
        matrix = np.asarray(covariance, dtype=np.complex128)
        _check(measurement_id, matrix, dwell_time, coil_labels)
        path = self._path(measurement_id)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            fd = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            with os.fdopen(fd, "wb") as file:
                np.savez(
                    file,
                    covariance=matrix,
                    dwell_time=np.float64(dwell_time),
                    coil_labels=np.array(list(coil_labels), dtype=np.str_),
                    stored_at=np.float64(time.time()),
                )
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise SpoolError("cannot store the noise measurement", where="noise store", got=error.strerror) from error
        self.prune()

    def get(self, measurement_id: str) -> StoredNoise | None:
        """The measurement, or ``None`` when it is unknown, too old or unreadable (the latter is logged)."""
        if not measurement_id:
            return None
        path = self._path(measurement_id)
        try:
            with np.load(path, allow_pickle=False) as stored:
                noise = StoredNoise(
                    covariance=stored["covariance"],
                    dwell_time=float(stored["dwell_time"]),
                    coil_labels=tuple(str(label) for label in stored["coil_labels"]),
                    stored_at=float(stored["stored_at"]),
                )
            _check(measurement_id, noise.covariance, noise.dwell_time, noise.coil_labels)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, SpoolError) as error:
            logger.warning("event=noise_unreadable file=%s error=%s", path.name[:16], type(error).__name__)
            return None
        return noise if time.time() - noise.stored_at <= self.max_age else None

    def prune(self) -> int:
        """Remove what is too old (and temporary files that a dead process left); returns how many files."""
        removed = 0
        oldest = time.time() - self.max_age
        with self._lock:
            for path in [*self.root.glob("*.npz"), *self.root.glob(".*.npz.*")]:
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        path.unlink()
                        removed += 1
        return removed

    def _path(self, measurement_id: str) -> Path:
        return self.root / (hashlib.sha256(measurement_id.encode("utf-8", "surrogatepass")).hexdigest() + ".npz")


def _check(measurement_id: str, matrix: NDArray[np.complex128], dwell_time: float, labels: Sequence[str]) -> None:
    where = "noise store"
    if not measurement_id:
        raise SpoolError("a noise measurement needs an id", where=where)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not 0 < len(matrix) <= MAX_CHANNELS:
        raise SpoolError("not a covariance matrix", where=where, got=f"shape {matrix.shape}", expected="(coil, coil)")
    diagonal = np.diagonal(matrix).real
    if not np.isfinite(matrix).all() or (diagonal < 0).any():
        raise SpoolError("a covariance has to be finite, with variances on its diagonal", where=where)
    if not np.allclose(matrix, matrix.conj().T, rtol=1e-6, atol=1e-6 * float(diagonal.max(initial=0.0))):
        raise SpoolError("the covariance is not Hermitian", where=where)
    if not (np.isfinite(dwell_time) and dwell_time > 0):
        raise SpoolError("not a dwell time", where=where, got=dwell_time, expected="seconds above 0")
    if labels and len(labels) != len(matrix):
        raise SpoolError("coil labels do not fit", where=where, got=len(labels), expected=len(matrix))


def _meta(values: dict[str, str]) -> str:
    entries = "".join(
        f"<meta><name>{escape(name)}</name><value>{escape(value)}</value></meta>" for name, value in values.items()
    )
    return f'<?xml version="1.0"?><ismrmrdMeta>{entries}</ismrmrdMeta>'
