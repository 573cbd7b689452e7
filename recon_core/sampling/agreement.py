"""Whether a scan sampled what its mask says, and if not, what is different."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from recon_core.errors import DataError

BoolArray = NDArray[np.bool_]

MAX_NAMED = 4
"""Positions named per echo; the rest is counted."""

MAX_SHIFT = 2


def pattern_digest(mask: BoolArray) -> str:
    """SHA-256 of which samples a mask has, in hexadecimal: the same for HDF5 and CSV, with or without order and probabilities.

    Over the text ``echo k2 k1`` (the sizes, separated by blanks, with a newline) and then the samples in C order, eight to a byte, the
    first in the highest bit.
    """
    sizes = " ".join(str(n) for n in mask.shape) + "\n"
    return hashlib.sha256(sizes.encode() + np.packbits(mask).tobytes()).hexdigest()


def differences(acquired: BoolArray, told: BoolArray) -> list[str]:
    """Name every difference between the samples that exist and the mask that was told of; empty when there is none.

    Parameters
    ----------
    acquired, told
        bool ``(echo, k2, k1)``.

    Returns
    -------
    list of str
        First what explains everything (another matrix, echoes in another order, a transposed, mirrored or shifted grid), then the
        echoes one by one: how many samples are missing or not in the mask, and where the first of them are, as (k2, k1).
    """
    if acquired.ndim != 3 or told.ndim != 3:
        raise DataError("not masks", where="mask", got=(acquired.shape, told.shape), expected="(echo, k2, k1)")
    if acquired.shape[1:] != told.shape[1:]:
        text = "the scan's matrix is {} x {}, the mask's {} x {} (k2 x k1)".format(*acquired.shape[1:], *told.shape[1:])
        return [text + (": transposed" if acquired.shape[:0:-1] == told.shape[1:] else "")]
    found = []
    if len(acquired) != len(told):
        found.append(f"the scan has {len(acquired)} echoes, the mask {len(told)}")
    n = min(len(acquired), len(told))
    got, wanted = acquired[:n], told[:n]
    if (got == wanted).all():
        return found
    reason = _explanation(got, wanted)
    if reason:
        found.append(f"the samples equal the mask {reason}")
    for echo in range(n):
        parts = [
            f"{len(where)} {name} ({_places(where)})"
            for name, where in (
                ("missing", np.argwhere(wanted[echo] & ~got[echo])),
                ("not in the mask", np.argwhere(got[echo] & ~wanted[echo])),
            )
            if len(where)
        ]
        if not got[echo].any():
            parts = ["no samples at all"]
        if parts:
            found.append(f"echo {echo}: {', '.join(parts)}")
    return found


def _explanation(got: BoolArray, wanted: BoolArray) -> str:
    """One known mistake that turns the mask into the samples, or nothing."""
    if len(wanted) > 1:
        if (got == wanted[::-1]).all():
            return "with its echoes reversed"
        for by in range(1, len(wanted)):
            if (got == np.roll(wanted, by, axis=0)).all():
                return f"with its echoes moved by {by}"
        order = _echo_order(got, wanted)
        if order is not None:
            return f"with its echoes in the order {', '.join(map(str, order))}"
    if wanted.shape[1] == wanted.shape[2] and (got == wanted.transpose(0, 2, 1)).all():
        return "with k1 and k2 exchanged"
    for axes, name in (((1,), "k2"), ((2,), "k1"), ((1, 2), "k2 and k1")):
        mirrored = np.flip(wanted, axes)
        for whole, text in ((mirrored, "mirrored"), (np.roll(mirrored, [1] * len(axes), axes), "mirrored about DC")):
            if (got == whole).all():
                return f"{text} along {name}"
    reach = range(-MAX_SHIFT, MAX_SHIFT + 1)
    for d2 in reach:
        for d1 in reach:
            if (d2 or d1) and (got == np.roll(wanted, (d2, d1), (1, 2))).all():
                return f"shifted by ({d2}, {d1}) along (k2, k1)"
    return ""


def _echo_order(got: BoolArray, wanted: BoolArray) -> list[int] | None:
    """Which echo of the mask each echo of the scan has, if every one has one of its own."""
    left, order = list(range(len(wanted))), []
    for pattern in got:
        found = next((echo for echo in left if (pattern == wanted[echo]).all()), None)
        if found is None:
            return None
        left.remove(found)
        order.append(found)
    return order


def _places(where: NDArray[np.intp]) -> str:
    named = ", ".join(f"({k2}, {k1})" for k2, k1 in where[:MAX_NAMED].tolist())
    return named + (f" and {len(where) - MAX_NAMED} more" if len(where) > MAX_NAMED else "")
