"""What the samples say of readouts and their headers do not: lines that hold nothing, signal at a receiver's limit, and a coil that failed.

Some converters write the whole grid, with zeros where nothing was measured. Taken for measured, such lines alias, and no coil unfolds
them: T1 is wrong in places, and hardly anything says so. Receivers that are driven too far, and converters to integers, cut samples off at
one largest value. That makes the centre of k-space, and of a recovery the bright images most, darker than they are, which a fit takes up.
A channel that has signal in some images of a recovery and hardly any in others (a coil that was detuned, a cable) makes T1 wrong where that
coil is near: its coil map is that of the images with signal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gadgets.sorted_scan import Placement, SortedScan

NEAR = 0.98
"""Real and imaginary parts from this part of a channel's largest value on are near its limit ..."""

FEWEST_AT_LIMIT = 6
"""... and the largest value is one if it comes so often, and more than `OFTENER` times as often as all others near it. In whole scans
without a limit it comes once or twice, and others near it at least as often."""

OFTENER = 2

LOST = 0.1
"""Part of a channel's largest share in the signal of all channels, below which an image has lost it. Tissues that differ in T1 change
shares as well, to half at most in the sound scans of the tests."""

FAINT = 0.25
"""Part of an equal share, below which a channel is never asked: it may hold noise alone."""


@dataclass(frozen=True)
class Samples:
    """What is known of the samples of some readouts.

    Attributes
    ----------
    empty
        int64, arrival numbers of those that hold nothing but zeros.
    largest
        Largest absolute value of a real or imaginary part, float32 ``(coil,)``.
    n_largest, n_near
        How often it comes, and how many others are near it, int64 ``(coil,)``.
    step
        Smallest value that is not zero in readouts that come near the largest one, float32 ``(coil,)``.
    rows, peaks
        int64, arrival numbers, and the largest absolute value of a real or imaginary part in each, float32 ``(readout, coil)``.
    """

    empty: NDArray[np.int64]
    largest: NDArray[np.float32]
    n_largest: NDArray[np.int64]
    n_near: NDArray[np.int64]
    step: NDArray[np.float32]
    rows: NDArray[np.int64]
    peaks: NDArray[np.float32]

    @property
    def limited(self) -> NDArray[np.intp]:
        """Channels whose largest value is a limit. Of whole numbers as small as a silent coil's none is near the largest but itself."""
        often = (self.n_largest >= FEWEST_AT_LIMIT) & (self.n_largest > OFTENER * self.n_near)
        return np.flatnonzero(often & (self.step < np.float32(1 - NEAR) * self.largest))

    @property
    def note(self) -> str:
        """What the operator has to know of signal at a limit; empty for none."""
        channels = self.limited
        if not len(channels):
            return ""
        named = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
        return (
            f"{int(self.n_largest[channels].sum())} samples are at one largest value (channels {named}): the receiver or the conversion "
            "cut the signal off there, so that bright images are too dark, and T1 and other maps wrong; repeat the scan with less gain"
        )


def look_at(samples: NDArray[np.complex64], rows: NDArray[np.integer]) -> Samples:
    """`Samples` of readouts ``(readout, coil, sample)`` whose arrival numbers are ``rows``; all finite."""
    middle = samples[:, :, samples.shape[2] // 2]
    empty = np.flatnonzero(~middle.any(axis=1))  # most have none: no second pass of all samples
    empty = empty[~samples[empty].any(axis=(1, 2))]
    parts = np.ascontiguousarray(samples).view(np.float32)  # real and imaginary parts in turn
    peaks = np.maximum(parts.max(axis=2), -parts.min(axis=2))
    largest = peaks.max(axis=0)
    level = np.float32(NEAR) * largest
    readout, coil = np.nonzero(peaks >= level)  # few readouts have to be looked at again
    size, most = np.abs(parts[readout, coil]), largest[coil, None]
    n_largest = np.bincount(coil, (size == most).sum(1), len(largest)).astype(np.int64)
    n_near = np.bincount(coil, (size >= level[coil, None]).sum(1), len(largest)).astype(np.int64)
    step = np.full(len(largest), np.inf, np.float32)
    np.minimum.at(step, coil, np.where(size > 0, size, np.inf).min(axis=1))
    numbers = np.asarray(rows, np.int64)
    return Samples(numbers[empty], largest, n_largest, n_near - n_largest, step, numbers, peaks)


def together(found: Sequence[Samples]) -> Samples:
    """`Samples` of all of them, at least one; their channels are the same."""
    largest = np.maximum.reduce([one.largest for one in found])
    n_largest, n_near = np.zeros((2, len(largest)), np.int64)
    for one in found:
        equal, near = one.largest == largest, one.largest >= np.float32(NEAR) * largest
        n_largest += np.where(equal, one.n_largest, 0)
        n_near += np.where(equal, one.n_near, np.where(near, one.n_largest, 0))
    step = np.minimum.reduce([one.step for one in found])
    empty, rows, peaks = (np.concatenate([getattr(one, name) for one in found]) for name in ("empty", "rows", "peaks"))
    return Samples(empty, largest, n_largest, n_near, step, rows, peaks)


def unmeasured(scan: SortedScan, empty: NDArray[np.int64]) -> NDArray[np.int64]:
    """Arrival numbers of the readouts among ``empty`` that were not measured: others of the same image hold something.

    Of lines for calibration alone: others of the same slice do. An image without any signal stays one.
    """
    imaging = scan.imaging
    calibration = scan.calibration.take(~np.isin(scan.calibration.rows, imaging.rows))
    of_image = _lacking(imaging, imaging.slice.astype(np.int64) * scan.n_states + imaging.state, empty)
    return np.union1d(of_image, _lacking(calibration, calibration.slice.astype(np.int64), empty))


def lost_channels(scan: SortedScan, samples: Samples) -> str:
    """What the operator has to know of channels that some images of a recovery have lost; empty for none.

    Shares of all channels are compared, as the whole object becomes dark where its magnetisation crosses zero.
    """
    if not (any(scan.inversion_times) or scan.saturation_times):
        return ""  # late echoes may well lose the signal near one coil
    imaging = scan.imaging
    peaks = np.zeros((scan.n_readouts, scan.n_channels), np.float32)
    peaks[samples.rows] = samples.peaks
    largest = np.zeros((scan.n_slices, scan.n_states, scan.n_channels), np.float32)
    np.maximum.at(largest, (imaging.slice, imaging.state), peaks[imaging.rows])
    total = largest.sum(axis=2, keepdims=True)
    share = np.divide(largest, total, out=np.zeros_like(largest), where=total > 0)
    most = share.max(axis=1, keepdims=True)
    lost = np.argwhere((share < LOST * most) & (total > 0) & (most > FAINT / scan.n_channels))
    if not len(lost):
        return ""
    number, state, _ = (int(n) for n in lost[0])
    channels = sorted(set(lost[:, 2].tolist()))
    named = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
    n_images = len(np.unique(lost[:, :2], axis=0))
    return (
        f"{n_images} of {scan.n_slices * scan.n_states} images have hardly any signal in channels that others have (channels {named}; the "
        f"first: {scan.name(number, state)}): a coil failed, and T1 is wrong where it is near; repeat the scan, without it if need be"
    )


def _lacking(lines: Placement, group: NDArray[np.int64], empty: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of ``lines`` that are empty in a group that is not."""
    is_empty = np.isin(lines.rows, empty)
    return lines.rows[is_empty & np.isin(group, group[~is_empty])].astype(np.int64)
