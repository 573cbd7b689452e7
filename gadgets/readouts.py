"""What each readout is and where its samples lie on the readout grid, from its header alone.

Nothing here needs the rest of the scan, so it runs while the scan is still streaming. All is vectorised over headers.

Centre of the readout
---------------------
``center_sample`` counts all samples, discarded ones included, *in the order of increasing k0*: for a reversed readout after
the flip. It is the one reading that a measured bipolar three-echo scan allows: its reversed echo has ``center_sample = 128``
of 256 like the others, its peak lies between acquired samples 127 and 128, and only the plain flip onto the whole grid puts
it where the monopolar scan of the same phantom has it.

The kept samples begin, after the flip, at

``k0_start = n // 2 - center_sample + discarded samples before them``

with these exceptions, because writers disagree about the centre of symmetric readouts:

* as many kept samples as grid points: ``k0_start = 0``, whatever ``center_sample`` says;
* ``center_sample = 0``: not set; the readout is symmetric (no Cartesian readout has its centre at the first sample);
* as many samples as grid points, and the position above would leave the grid: ``center_sample`` is ignored.

Imaging readouts about the centre that have just as many samples as the image has pixels, on a grid that is oversampled, are refused:
somebody took the oversampling off the samples and left the header as it was (Gadgetron's RemoveROOversamplingGadget does). Taken
by that header they would be the centre of k-space, and the object twice as large.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.errors import SortError
from gadgets.wire.dtypes import ACQUISITION_HEADER
from gadgets.wire.header import Encoding, MrdHeader

Headers = NDArray[np.void]
"""Structured array of ``gadgets.wire.dtypes.ACQUISITION_HEADER``."""

MAX_MATRIX = 65535
"""Counters and sample numbers are 16-bit: no larger matrix can be filled."""


MAX_READOUTS = 8_000_000
"""Of one scan, several times as many as a long 4D flow has. Their headers stay in memory, 356 bytes each: a stream of empty readouts would
fill it long before the disk."""


class Kind(IntEnum):
    """What a readout is used for."""

    IMAGING = 0
    CALIBRATION = 1
    CALIBRATION_AND_IMAGING = 2
    NOISE = 3
    OTHER_ENCODING = 4
    SKIPPED = 5


def flag_mask(bit: int) -> np.uint64:
    """The value of a one-based MRD flag number."""
    return np.uint64(1 << (bit - 1))


NOISE = flag_mask(19)
CALIBRATION = flag_mask(20)
CALIBRATION_AND_IMAGING = flag_mask(21)
REVERSE = flag_mask(22)

# what mrpro's acquisition filters drop as well; Gadgetron puts most of these into the images
SKIP_FLAGS = {
    23: "navigation",
    24: "phase correction",
    26: "HP feedback",
    27: "dummy scan",
    28: "RT feedback",
    29: "surface coil correction",
    30: "phase stabilisation reference",
    31: "phase stabilisation",
}
SKIP = flag_mask(23)
for _bit in SKIP_FLAGS:
    SKIP = SKIP | flag_mask(_bit)


class ReadoutIndex:
    """Headers of all readouts of a scan in arrival order, and where their samples lie in the log.

    Grows by doubling. Not thread-safe: it belongs to the thread that reads the connection. The properties are read-only
    views of what has arrived so far; they stay valid when more is appended.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._n = 0
        self._headers = np.zeros(max(capacity, 1), ACQUISITION_HEADER)
        self._offsets = np.zeros(max(capacity, 1), np.int64)
        self._payload_bytes = np.zeros(max(capacity, 1), np.int64)

    def __len__(self) -> int:
        return self._n

    def append(self, headers: Headers, offsets: NDArray[np.int64], payload_bytes: NDArray[np.int64]) -> None:
        """Add a batch; the arrays are copied.

        Raises
        ------
        ValueError
            Arrays of different lengths.
        SortError
            More than ``MAX_READOUTS``.
        """
        if not len(headers) == len(offsets) == len(payload_bytes):
            raise ValueError(f"{len(headers)} headers, {len(offsets)} offsets, {len(payload_bytes)} payload sizes")
        end = self._n + len(headers)
        if end > MAX_READOUTS:
            raise SortError("too many readouts", where="scan", got=f"at least {end}", expected=f"at most {MAX_READOUTS}")
        if end > len(self._headers):
            size = max(end, 2 * len(self._headers))
            self._headers = _grown(self._headers, self._n, size)
            self._offsets = _grown(self._offsets, self._n, size)
            self._payload_bytes = _grown(self._payload_bytes, self._n, size)
        self._headers[self._n : end] = headers
        self._offsets[self._n : end] = offsets
        self._payload_bytes[self._n : end] = payload_bytes
        self._n = end

    @property
    def headers(self) -> Headers:
        """``ACQUISITION_HEADER``, ``(readout,)``."""
        return _read_only(self._headers[: self._n])

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Position of each message's id in the stream, bytes."""
        return _read_only(self._offsets[: self._n])

    @property
    def payload_bytes(self) -> NDArray[np.int64]:
        """Bytes behind each 340-byte header."""
        return _read_only(self._payload_bytes[: self._n])


@dataclass(frozen=True)
class ReadoutGeometry:
    """How the per-readout stage places the samples; one value per readout in arrival order.

    Attributes
    ----------
    kind
        uint8, `Kind`.
    first, last
        int32, kept samples ``[first, last)`` in the order of acquisition.
    reverse
        bool, the kept samples are flipped before they are placed.
    k0_start
        int32, where the first kept sample (after the flip) goes on the encoded grid, whose centre is ``n_encoded // 2``.
        Only meaningful where ``is_image``; 0 elsewhere.
    n_encoded, n_x
        Length of the encoded grid, and of the image-space readout after the crop to the reconstructed field of view.
    """

    kind: NDArray[np.uint8]
    first: NDArray[np.int32]
    last: NDArray[np.int32]
    reverse: NDArray[np.bool_]
    k0_start: NDArray[np.int32]
    n_encoded: int
    n_x: int

    @property
    def is_image(self) -> NDArray[np.bool_]:
        """Readouts that belong to the grid: imaging and calibration."""
        return self.kind <= Kind.CALIBRATION_AND_IMAGING


def chosen_encoding(header: MrdHeader, settings: AcquisitionSettings) -> Encoding:
    """The encoding to reconstruct, checked.

    Raises
    ------
    SortError
        No such encoding, a trajectory that is not Cartesian, a matrix or field of view that cannot be.
    """
    if not 0 <= settings.encoding_space < len(header.encodings):
        raise SortError(
            "no such encoding space",
            where="header",
            got=settings.encoding_space,
            expected=f"below {len(header.encodings)}",
            remedy="Check the setting encoding_space",
        )
    encoding = header.encodings[settings.encoding_space]
    if encoding.trajectory.strip().lower() != "cartesian":
        raise SortError(
            "trajectory is not supported", where="header", got=encoding.trajectory or "none", expected="cartesian"
        )
    matrices = (*encoding.encoded_matrix, *encoding.recon_matrix)
    if not all(1 <= n <= MAX_MATRIX for n in matrices):
        raise SortError("matrix is impossible", where="header", got=matrices, expected=f"1 to {MAX_MATRIX} each")
    if not (encoding.encoded_fov[2] > 0 and encoding.recon_fov[2] > 0):
        fovs = (encoding.encoded_fov[2], encoding.recon_fov[2])
        raise SortError("readout field of view is missing", where="header", got=fovs, expected="positive")
    return encoding


def cropped_readout(encoding: Encoding) -> int:
    """Pixels of the readout after the crop to the reconstructed field of view (readout oversampling removed)."""
    n, ratio = encoding.encoded_matrix[2], encoding.recon_fov[2] / encoding.encoded_fov[2]
    return min(n, max(1, round(n * ratio)))


def classify(
    headers: Headers, header: MrdHeader, settings: AcquisitionSettings, *, first_index: int = 0
) -> NDArray[np.uint8]:
    """`Kind` of each readout. Noise goes before the skip set, the skip set before calibration and encoding space.

    Raises
    ------
    SortError
        ``encoding_space_ref`` of an imaging or calibration readout that the header does not have.
    """
    flags = headers["flags"]
    kind = np.full(len(headers), Kind.IMAGING, np.uint8)
    kind[(flags & CALIBRATION) != 0] = Kind.CALIBRATION
    kind[(flags & CALIBRATION_AND_IMAGING) != 0] = Kind.CALIBRATION_AND_IMAGING
    space = headers["encoding_space_ref"]
    kind[space != settings.encoding_space] = Kind.OTHER_ENCODING
    kind[(flags & SKIP) != 0] = Kind.SKIPPED
    kind[(flags & NOISE) != 0] = Kind.NOISE
    bad = (kind <= Kind.OTHER_ENCODING) & (kind != Kind.NOISE) & (space >= len(header.encodings))
    if bad.any():
        i = int(np.argmax(bad))
        raise SortError(
            "encoding_space_ref is out of range",
            where=readout_name(headers, i, first_index),
            got=int(space[i]),
            expected=f"below {len(header.encodings)}",
        )
    return kind


def readout_geometry(
    headers: Headers, header: MrdHeader, settings: AcquisitionSettings, *, first_index: int = 0
) -> ReadoutGeometry:
    """Where the samples of each readout go, by the rules at the top of this file.

    Parameters
    ----------
    headers
        A batch in arrival order; not modified.
    header, settings
        Of the scan.
    first_index
        Arrival index of the batch's first readout, for error texts.

    Raises
    ------
    SortError
        No samples left after the discarded ones, samples beyond the encoded grid, oversampling that the samples lack, an unknown
        encoding space.
    """
    encoding = chosen_encoding(header, settings)
    n, n_x = encoding.encoded_matrix[2], cropped_readout(encoding)
    kind = classify(headers, header, settings, first_index=first_index)
    used = kind <= Kind.CALIBRATION_AND_IMAGING
    n_samples, pre, post, centre = (
        headers[name].astype(np.int32) for name in ("number_of_samples", "discard_pre", "discard_post", "center_sample")
    )
    reverse = (headers["flags"] & REVERSE) != 0
    kept = n_samples - pre - post
    lead = np.where(reverse, post, pre)
    start = n // 2 - np.where(centre == 0, n_samples // 2, centre) + lead
    start = np.where((n_samples == n) & ((start < 0) | (start + kept > n)), lead, start)
    start = np.where(kept == n, 0, start)

    empty = used & (kept < 1)
    _refuse(empty, headers, first_index, "no samples left", [n_samples, pre, post], "more samples than discarded ones")
    beyond = used & ((start < 0) | (start + kept > n))
    _refuse(beyond, headers, first_index, "samples beyond the readout grid", [start, start + kept], f"inside 0 to {n}")
    is_image = (kind == Kind.IMAGING) | (kind == Kind.CALIBRATION_AND_IMAGING)
    cropped = is_image & (kept == n_x) & (n_x < n) & (start == n // 2 - n_x // 2)
    remedy = "Correct encodedSpace (matrix and field of view of the readout), or send the samples as they were acquired"
    _refuse(cropped, headers, first_index, "readout oversampling is in the header alone", [kept], f"{n} samples", remedy)
    return ReadoutGeometry(
        kind=kind,
        first=pre,
        last=np.maximum(n_samples - post, pre),
        reverse=reverse,
        k0_start=np.where(used, start, 0).astype(np.int32),
        n_encoded=n,
        n_x=n_x,
    )


def check_channels(headers: Headers, kind: NDArray[np.uint8]) -> int:
    """The number of channels of all imaging, calibration and noise readouts.

    Raises
    ------
    SortError
        It changes, is zero or more than the available ones, or is not the number of bits in a ``channel_mask`` that is set.
    """
    used = (kind <= Kind.CALIBRATION_AND_IMAGING) | (kind == Kind.NOISE)
    active, available = headers["active_channels"], headers["available_channels"]
    if not used.any():
        return 0
    n_channels = int(active[np.argmax(used)])
    _refuse(used & (active == 0), headers, 0, "no active channels", [active], "at least 1")
    _refuse(used & (active != n_channels), headers, 0, "the number of channels changes", [active], str(n_channels))
    too_many = used & (available > 0) & (active > available)
    _refuse(too_many, headers, 0, "more active than available channels", [active, available], "active <= available")
    bits = np.zeros(len(headers), np.int64)
    masks = headers["channel_mask"]
    for word in range(masks.shape[1]):  # by word: no (readout, 16) temporary of a large scan
        bits += np.bitwise_count(masks[:, word])
    wrong = used & (bits > 0) & (bits != active)
    _refuse(wrong, headers, 0, "channel_mask does not fit active_channels", [bits, active], "as many bits as channels")
    return n_channels


def readout_name(headers: Headers, i: int, first_index: int = 0) -> str:
    """``"readout 12 (scan counter 13)"``."""
    return f"readout {first_index + i} (scan counter {int(headers['scan_counter'][i])})"


def _refuse(
    bad: NDArray[np.bool_], headers: Headers, first: int, what: str, values: list[NDArray], expected: str, remedy: str = ""
) -> None:
    if bad.any():
        i = int(np.argmax(bad))
        got = ", ".join(str(int(v[i])) for v in values)
        raise SortError(what, where=readout_name(headers, i, first), got=got, expected=expected, remedy=remedy)


def _grown(array: NDArray, n: int, size: int) -> NDArray:
    # a new array, not resize(): earlier views stay valid
    new = np.zeros(size, array.dtype)
    new[:n] = array[:n]
    return new


def _read_only(view: NDArray) -> NDArray:
    view.flags.writeable = False
    return view
