"""The images that PINQI begins with: each step of making them brings them nearer to the truth, and the weights say which they want."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from recon_core.errors import SettingError
from recon_core.methods.pinqi.reconstruction import apply_network, network_order
from recon_core.methods.pinqi.start import first_images, object_columns
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


def with_signal_in(columns: slice, n: int = 100, noise: float = 0.01) -> torch.Tensor:
    """Working images ``(state, x, z, y)``."""
    images = noise * torch.randn(3, n, 1, 40, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    images[1, columns, 0, 20] += 1.0
    return images


@pytest.mark.parametrize(
    "signal, expected",
    [
        (slice(40, 60), slice(32, 80)),  # 20 and a margin of 8 on both sides, to the next multiple of 16
        (slice(0, 20), slice(0, 32)),
        (slice(85, 100), slice(68, 100)),
        (slice(5, 97), slice(0, 100)),  # no multiple fits
        (slice(0, 0), slice(0, 100)),  # nothing found: all
    ],
)
def test_the_object_is_found_along_the_readout(signal: slice, expected: slice) -> None:
    assert object_columns(with_signal_in(signal), 0.01) == expected


def test_noise_is_no_object() -> None:
    assert object_columns(with_signal_in(slice(40, 60), noise=0.04), 0.04) == slice(32, 80)


def test_air_beside_the_object_changes_no_map(tmp_path: Path) -> None:
    """The object in a field of view twice as wide; the answer there is the same, and nothing beside it."""
    scan = saturation_scan((48, 64), noise=0.02, keep=0.4)
    trained = saved_network(tmp_path / "trained", replace(PHYSICS_ALONE, start="refined", n_iterations=1))
    wide = replace(
        scan.kspace,
        data=functional.pad(scan.kspace.data, (48, 48)),
        coil_maps=functional.pad(scan.kspace.coil_maps, (48, 48), mode="constant", value=0.5),
    )
    found = [
        apply_network(trained, kspace, network_order(trained, TIMES), "test", Report()).found
        for kspace in (scan.kspace, wide)
    ]
    narrow_rate, wide_rate = (f.parameters[0, 2] for f in found)  # (x, y)
    assert wide_rate.shape[0] == 64 + 96
    inside = torch.as_tensor(scan.t1 > 0).T & torch.as_tensor(np.abs(scan.m0) > 0.2).T
    assert float((wide_rate[48:112] / narrow_rate - 1)[inside].abs().median()) < 0.01
    beside = torch.cat((found[1].parameters[0, :2, :32], found[1].parameters[0, :2, 128:]), dim=1)
    assert not bool(beside.any())
    assert found[1].nonlinear[-1].converged.shape == (1, 160, 48) and bool(found[1].nonlinear[-1].converged[:, :32].all())


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
        applied = apply_network(trained, scan.kspace, network_order(trained, TIMES), "test", Report())
        found[start] = error(np.abs(given[0].numpy()[0].swapaxes(-1, -2)) * applied.scale, replace(scan, m0=np.abs(scan.m0)))
    assert found["refined"] < 0.8 * found["llr"]
