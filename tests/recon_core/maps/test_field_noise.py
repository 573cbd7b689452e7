"""The noise of a field by the field itself."""

from __future__ import annotations

import pytest
import torch

from recon_core.maps.field_noise import field_noise
from tests.recon_core.maps.analytic_fields import small_head


@pytest.mark.parametrize("noise", [0.005, 0.02])
def test_the_noise_of_a_head_s_field_is_found(noise: float) -> None:
    h = small_head(noise=noise)
    smooth = small_head()
    assert field_noise(smooth.field, smooth.mask) < 0.2 * noise  # what sources leave
    assert field_noise(h.field, h.mask) == pytest.approx(noise, rel=0.08)
    outside = torch.where(h.mask, h.field, 100.0)
    assert field_noise(outside, h.mask) == field_noise(h.field, h.mask)


def test_where_no_block_is_whole_nothing_is_known() -> None:
    plane = torch.zeros(5, 6, 7, dtype=torch.bool)
    plane[2] = True
    assert field_noise(torch.randn(5, 6, 7), plane) == 0.0
