"""Holes in sampling patterns."""

from __future__ import annotations

import numpy as np
import torch

from recon_core.sampling.coverage import missing_lines
from recon_core.sampling.masks import elliptical


def test_a_complete_or_partial_fourier_pattern_has_no_holes() -> None:
    mask = torch.zeros(2, 1, 32, dtype=torch.bool)
    mask[:, :, 8:] = True
    assert missing_lines(mask) == (0, 48)


def test_undersampling_is_counted_per_state() -> None:
    mask = torch.zeros(2, 1, 9, dtype=torch.bool)
    mask[0, :, ::2] = True
    mask[1] = True
    assert missing_lines(mask) == (4, 18)


def test_an_elliptical_shutter_is_complete_and_a_hole_in_it_is_not() -> None:
    mask = torch.from_numpy(np.asarray(elliptical((24, 40)), bool))[None]
    assert missing_lines(mask)[0] == 0
    mask[0, 12, 20] = False
    assert missing_lines(mask)[0] == 1
