"""Losses by hand, and pictures that others can read."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from recon_core.training.losses import deep_supervision, weighted_mse
from recon_core.training.png import write_png


def test_weighted_mse_by_hand() -> None:
    x, t = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert weighted_mse(x, t, torch.tensor([0.5, 2.0])).item() == pytest.approx((0.5 * 1 + 2 * 4) / 2)
    # a complex value counts as its two parts
    assert weighted_mse(torch.tensor([3 + 4j]), torch.tensor([0j])).item() == pytest.approx(25 / 2)


def test_deep_supervision_weighs_first_middle_and_last() -> None:
    truth = torch.zeros(4)
    predictions = [torch.full((4,), v) for v in (1.0, 2.0, 3.0)]
    assert deep_supervision(predictions, truth, 1.0, first=0.1, others=0.05).item() == pytest.approx(9 + 0.1 * 1 + 0.05 * 4)
    assert deep_supervision(predictions[:1], truth, 1.0, first=0.1, others=0.05).item() == pytest.approx(1)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png(tmp_path: Path, shape: tuple[int, ...]) -> None:
    image = np.random.default_rng(0).uniform(-0.2, 1.2, shape)
    image[0, 0] = np.nan
    write_png(tmp_path / "a.png", image)
    found = matplotlib.image.imread(tmp_path / "a.png")
    assert found.shape == shape
    assert np.allclose(found, np.clip(np.nan_to_num(image), 0, 1), atol=0.5 / 255 + 1e-6)
