"""Whether a sampling pattern has holes: lines missing inside its extent alias when nothing unfolds them."""

from __future__ import annotations

import torch


def missing_lines(mask: torch.Tensor) -> tuple[int, int]:
    """Positions that are missing inside the measured extent, and positions in that extent.

    Parameters
    ----------
    mask
        bool ``(state, k2, k1)``. Each state has an extent of its own: the smallest box around its samples, or, where both
        directions are encoded, the ellipse in that box (corners are often left out, which costs resolution and aliases nothing).
    """
    missing = total = 0
    for state in mask:
        sampled = state.nonzero()
        if not len(sampled):
            continue
        (low2, low1), (high2, high1) = sampled.min(dim=0).values.tolist(), sampled.max(dim=0).values.tolist()
        box = state[low2 : high2 + 1, low1 : high1 + 1]
        inside = _ellipse(box.shape[0], box.shape[1]).to(box.device)
        missing += int((inside & ~box).sum())
        total += int(inside.sum())
    return missing, total


def _ellipse(n2: int, n1: int) -> torch.Tensor:
    if n2 == 1 or n1 == 1:
        return torch.ones(n2, n1, dtype=torch.bool)
    k2 = (torch.arange(n2) - (n2 - 1) / 2) / (n2 / 2)
    k1 = (torch.arange(n1) - (n1 - 1) / 2) / (n1 / 2)
    # a little inside, so that a discretised elliptical shutter of another convention is complete
    return k2[:, None] ** 2 + k1**2 <= 0.9
