"""Pictures of sampling masks, as arrays for `recon_core.training.png`."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recon_core.sampling.mask_files import SamplingMask


def mask_picture(mask: SamplingMask) -> NDArray[np.float64]:
    """RGB ``(y, x, 3)`` in [0, 1]: rows are echoes; k2 downwards, k1 to the right."""
    rows = []
    for echo, pattern in enumerate(mask.mask):
        before = mask.mask[echo - 1] if echo else pattern
        shared = 0.25 * (pattern & before)
        change = np.stack([np.maximum(pattern & ~before, shared), shared, np.maximum(before & ~pattern, shared)], axis=-1)
        tiles = [np.repeat(pattern[..., None].astype(float), 3, axis=-1), change]
        if mask.probability is not None:
            tiles.append(np.repeat(mask.probability[echo][..., None].astype(float), 3, axis=-1))
        rows.append(np.concatenate([np.pad(tile, ((2, 2), (2, 2), (0, 0)), constant_values=0.5) for tile in tiles], axis=1))
    return _enlarged(np.concatenate(rows))


def order_picture(mask: SamplingMask) -> NDArray[np.float64]:
    """RGB ``(y, x, 3)``: the first echo's samples, darker where they are acquired earlier in their segment."""
    assert mask.order is not None
    rank = np.arange(len(mask.order)) % (len(mask.order) // mask.n_segments)
    segment = np.arange(len(mask.order)) // (len(mask.order) // mask.n_segments)
    grey = 0.25 + 0.75 * rank / max(1, rank.max())
    picture = np.zeros((*mask.mask.shape[1:], 3))
    first = mask.order[:, 0]
    # neighbouring segments differ in tint, so that their borders can be seen
    tints = np.array([[1.0, 1.0, 1.0], [1.0, 0.75, 0.4], [0.45, 0.8, 1.0]])
    picture[first[:, 0], first[:, 1]] = grey[:, None] * tints[segment % 3]
    return _enlarged(picture)


def _enlarged(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every position at least three pixels wide, since a viewer would blur single ones."""
    return picture.repeat(3, axis=0).repeat(3, axis=1)
