"""Is the centre of k-space of every state measured, or near enough to what is? T1 compares the states, and the centre is their brightness.

Where it has a gap, the coils (and, in regularised methods, the other states) have to tell how bright a state is. One coil tells nothing:
the images look sound, neighbouring pixels agree, and T1 is 10 to 140 % wrong in places, which the checks of all pixels together take
for a small error of one delay, if they see it at all (`benchmarks.t1_checks`).
"""

from __future__ import annotations

import torch

from recon_core.errors import CalibrationError

Tensor = torch.Tensor

MOST_MISSING = {"saturation": 3, "inversion": 4}
"""Positions side by side that coils tell, of which there have to be `COILS_EACH` for every one; T1 is refused beyond. In scans with
separate calibration lines (random and regular) single tubes by saturation were 35 % wrong with 4 and more, 24 % with 3 and 4 coils
(`benchmarks.t1_checks`). MOLLI forgives more, since it has more images: 7 % with 4 and 8 coils, 14 % with 3 and 4 coils."""

COILS_EACH = 2

SURE = 2
"""Up to so many T1 is as with a complete centre (2 % in nine tubes); with 3 it was 5 % wrong there, up to 13 % in a tissue of a brain."""


def missing_centre(mask: Tensor, n_coils: int, preparation: str, where: str) -> CalibrationError | None:
    """Why T1 would be wrong by a centre of k-space that some states lack and the coils cannot tell; ``None`` where it would not.

    Parameters
    ----------
    mask
        bool ``(state, k2, k1)``, DC at ``n // 2``.
    n_coils
        That are used to unfold; 1 where nothing is.
    preparation
        A key of `MOST_MISSING`.
    where
        For the error.
    """
    most = MOST_MISSING[preparation]
    missing, allowed = missing_at_centre(mask), min(n_coils // COILS_EACH, most)
    lacking = [state for state, n in enumerate(missing) if n > allowed]
    if not lacking:
        return None
    return CalibrationError(
        "the centre of k-space is not measured, and the coils cannot tell how bright images are: T1 would be wrong",
        where=where,
        got=f"up to {max(missing)} lines side by side missing at the centre in {len(lacking)} of {len(missing)} images, the first: "
        f"{lacking[0]}",
        expected=f"at most {allowed} with {n_coils} {'coil' if n_coils == 1 else 'coils'}, and never more than {most}",
        remedy="Acquire the central lines of every image (separate calibration lines do not replace them); maps = none sends images alone",
    )


def doubtful_centre(mask: Tensor) -> str:
    """What is to be said of a centre that the coils tell well enough for a map, and not for sure; empty for a good one."""
    missing = missing_at_centre(mask)
    lacking = sum(n > SURE for n in missing)
    if not lacking:
        return ""
    return (
        f"{lacking} of {len(missing)} images lack {max(missing)} lines side by side at the centre of k-space, which are unfolded: T1 may "
        "be 10 % wrong in places, and nothing in the images shows it"
    )


def missing_at_centre(mask: Tensor) -> list[int]:
    """The longest run of positions next to the centre of k-space that were not measured, for each state.

    Parameters
    ----------
    mask
        bool ``(state, k2, k1)``, DC at ``n // 2``.

    Returns
    -------
    list of int
        A run counts if it holds DC or a neighbour of DC; in a slab, a position counts by the shorter one of its two directions.
    """
    n_2, n_1 = mask.shape[1:]
    rows, columns = (range(max(0, n // 2 - 1), min(n, n // 2 + 2)) for n in (n_2, n_1))
    found = []
    for state in mask.cpu().bool():
        runs = [
            min((_run(line.tolist(), at) for line, at in ((state[z], y), (state[:, y], z)) if len(line) > 1), default=1)
            for z in rows
            for y in columns
            if not state[z, y]
        ]
        found.append(max(runs, default=0))
    return found


def _run(sampled: list[bool], at: int) -> int:
    """Positions about ``at`` that are missing without a break."""
    start, stop = at, at + 1
    while start > 0 and not sampled[start - 1]:
        start -= 1
    while stop < len(sampled) and not sampled[stop]:
        stop += 1
    return stop - start
