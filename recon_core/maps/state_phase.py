"""Phase by which whole states differ: a field that drifts, or a scanner that starts every image with another phase.

All states of a saturation recovery have one phase in a pixel, that of M0, and a model with one complex M0 takes a state that is turned by
0.3 rad for one that is 4 % darker. A turn of a whole state is no property of the object: it is taken out before the model sees the
state, and put back into the images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

Tensor = torch.Tensor

LEAST, MOST = 0.02, 1.0
"""rad; smaller turns do no harm, and larger ones (a sign, say) may be of the object: then no state is turned."""

WORTH_A_WORD = 0.1
"""rad."""


def turns_of_states(states: Tensor, reference: int) -> Tensor:
    """By how much each state is turned against one of them, rad ``(state,)``; zeros where nothing is to be done.

    The phase of ``sum s_i conj(s_reference)``, which the strong signals rule.

    Parameters
    ----------
    states
        Complex ``(state, ...)``: images, or samples of positions that all states share.
    reference
        The state with most signal.
    """
    flat = states.flatten(1)
    turns = (flat @ flat[reference].conj()).angle()
    largest = float(turns.abs().max()) if turns.numel() else 0.0
    return turns if LEAST < largest < MOST else torch.zeros_like(turns)


def turn_back(states: Tensor, turns: Tensor) -> Tensor:
    """``states`` ``(state, ...)`` without their ``turns``; unchanged where these are all zero."""
    if not bool((turns != 0).any()):
        return states
    factor = torch.polar(torch.ones_like(turns), -turns).to(states.dtype)
    return states * factor.reshape(-1, *(1,) * (states.ndim - 1))


def note_of(turns: Tensor, times: Sequence[float]) -> str:
    """A word about the state that is turned most, or nothing."""
    most = int(turns.abs().argmax())
    size = float(turns[most])
    if not (math.isfinite(size) and abs(size) > WORTH_A_WORD):
        return ""
    return f"the phase of the delay {times[most]:g} s differs by {size:.2f} rad from that of the longest one: taken out for the fit"
