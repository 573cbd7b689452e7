"""The images that PINQI begins with: each step of making them brings them nearer to the truth, and the weights say which they want."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_core.errors import SettingError
from recon_core.methods.pinqi.reconstruction import apply_network, state_order
from recon_core.methods.pinqi.start import first_images
from recon_core.problem import pose
from recon_core.types import Report
from tests.recon_core.pinqi.saturation_scan import PHYSICS_ALONE, TIMES, SaturationScan, saturation_scan, saved_network


@pytest.fixture(scope="module")
def scan() -> SaturationScan:
    return saturation_scan((72, 64), noise=0.05, keep=0.25)


def truth(s: SaturationScan) -> np.ndarray:
    return np.stack([s.m0 * (1 - np.exp(-t / s.t1)) for t in TIMES])


def error(found: np.ndarray, s: SaturationScan) -> float:
    return float(np.linalg.norm(found - truth(s)) / np.linalg.norm(truth(s)))


def test_refined_images_are_nearer_to_the_truth_than_low_rank_ones(scan: SaturationScan) -> None:
    problem = pose(scan.kspace, "test", Report())
    low_rank, refined = (error(first_images(problem, start).numpy(), scan) for start in ("llr", "refined"))
    assert refined < 0.8 * low_rank


@pytest.mark.parametrize("start", ["adjoint", "other"])
def test_images_that_nobody_makes_are_refused(scan: SaturationScan, start: str) -> None:
    with pytest.raises(SettingError, match="unknown start"):
        first_images(pose(scan.kspace, "test", Report()), start)


def test_the_weights_say_which_images_their_network_begins_with(scan: SaturationScan, tmp_path: Path) -> None:
    """Each network is given the images of its start."""
    found = {}
    for start in ("llr", "refined"):
        trained = saved_network(tmp_path / start, replace(PHYSICS_ALONE, start=start, n_iterations=1))
        given: list[torch.Tensor] = []

        def seen(module: torch.nn.Module, arguments: tuple, given: list[torch.Tensor] = given) -> None:
            given.append(arguments[2])

        trained.network.register_forward_pre_hook(seen)
        applied = apply_network(trained, scan.kspace, state_order(trained, TIMES), "test", Report())
        found[start] = error(np.abs(given[0].numpy()[0].swapaxes(-1, -2)) * applied.scale, replace(scan, m0=np.abs(scan.m0)))
    assert found["refined"] < 0.8 * found["llr"]
