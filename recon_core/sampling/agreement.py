"""Whether a scan sampled what its mask says, and if not, what is different."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from recon_core.errors import DataError

BoolArray = NDArray[np.bool_]

MAX_NAMED = 4
"""Positions named per echo; the rest is counted."""

MAX_SHIFT = 2

FEW, FEW_OF_DIFFERENT = 0.05, 0.25
"""What a mistake may leave unexplained: of the mask's samples, and of what differs without it."""

MAX_ECHOES_MATCHED = 64


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
        found.append(reason)
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
    """The one known mistake that turns the mask into the samples, but for a few that were lost besides; or nothing."""
    differing, reason = min(
        ((int((got != changed).sum()), reason) for reason, changed in _mistakes(got, wanted)), key=lambda found: found[0]
    )
    few = min(FEW * int(wanted.sum()), FEW_OF_DIFFERENT * int((got != wanted).sum()))
    if differing > few:
        return ""
    but = f"but for {differing}, " if differing else ""
    return f"{but}the samples equal the mask {reason}"


def _mistakes(got: BoolArray, wanted: BoolArray) -> Iterator[tuple[str, BoolArray]]:
    """Masks that a mistake makes of the mask, likely ones first."""
    yield "with its echoes reversed", wanted[::-1]
    for by in range(1, len(wanted)):
        yield f"with its echoes moved by {by}", np.roll(wanted, by, axis=0)
    if 1 < len(wanted) <= MAX_ECHOES_MATCHED:
        both = got.reshape(len(got), -1).astype(np.float32) @ wanted.reshape(len(wanted), -1).astype(np.float32).T
        order = linear_sum_assignment(both, maximize=True)[1].tolist()
        yield f"with its echoes in the order {', '.join(map(str, order))}", wanted[order]
    if wanted.shape[1] == wanted.shape[2]:
        yield "with k1 and k2 exchanged", wanted.transpose(0, 2, 1)
    for axes, name in (((1,), "k2"), ((2,), "k1"), ((1, 2), "k2 and k1")):
        mirrored = np.flip(wanted, axes)
        yield f"mirrored along {name}", mirrored
        yield f"mirrored about DC along {name}", np.roll(mirrored, [1] * len(axes), axes)
    reach = range(-MAX_SHIFT, MAX_SHIFT + 1)
    for d2 in reach:
        for d1 in reach:
            if d2 or d1:
                yield f"shifted by ({d2}, {d1}) along (k2, k1)", np.roll(wanted, (d2, d1), (1, 2))


def _places(where: NDArray[np.intp]) -> str:
    named = ", ".join(f"({k2}, {k1})" for k2, k1 in where[:MAX_NAMED].tolist())
    return named + (f" and {len(where) - MAX_NAMED} more" if len(where) > MAX_NAMED else "")
