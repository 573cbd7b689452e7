"""First images: refined ones are nearer to the truth, and what is not refined stays what it was."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch

from benchmarks.laro_cases import acquire, held_out, pattern
from recon_core.batches import batch_share
from recon_core.methods.laro import Settings, reconstruct_with
from recon_core.methods.laro.model import Laro, LaroSettings
from recon_core.methods.laro.starts import low_rank_or_refined
from recon_core.methods.laro.weights import TrainedLaro, load_weights, save_weights
from recon_core.problem import Problem, pose
from recon_core.simulation.multi_echo_brain import BrainScan, ScanRecipe
from recon_core.types import KSpace, Report, ScanInfo

RECIPE = ScanRecipe(matrix=(16, 40, 14), voxel=(5.4, 5.6), n_echoes=4, n_coils=6, noise=(0.01, 0.01))


@cache
def scan() -> BrainScan:
    return held_out(RECIPE, 1)[0]


def measured(truth: BrainScan | None = None) -> tuple[KSpace, ScanInfo]:
    case = acquire(truth or scan(), pattern((16, 40), 4, 4.0, 0), 4.0, 0)
    return case.kspace, case.info


def posed(kspace: KSpace) -> Problem:
    return pose(kspace, "test", Report())


def error(found: torch.Tensor, truth: BrainScan) -> float:
    difference = (found - truth.images)[:, truth.brain]
    return float(difference.norm() / truth.images[:, truth.brain].norm())


def starts(kspace: KSpace) -> dict[str, torch.Tensor]:
    problem = posed(kspace)
    return {s: problem.leave(low_rank_or_refined(s, problem, Report())) for s in ("llr", "refined")}


def test_refined_images_of_a_slab_are_nearer_to_the_truth() -> None:
    found = starts(measured()[0])
    assert error(found["refined"], scan()) < 0.9 * error(found["llr"], scan())


def test_planes_of_air_keep_their_images() -> None:
    beside = torch.ones(scan().images.shape[-1])
    beside[:3] = 0.0
    truth = replace(scan(), images=scan().images * beside)
    found = starts(measured(truth)[0])
    assert torch.equal(found["refined"][..., :3], found["llr"][..., :3])
    assert error(found["refined"], truth) < error(found["llr"], truth)
    nothing = replace(truth, images=0.01 * truth.images)
    air = starts(replace(measured(nothing)[0], noise_std=1.0))
    assert torch.equal(air["refined"], air["llr"])


def test_a_slice_and_a_single_echo_pass() -> None:
    kspace, _ = measured()
    middle = slice(8, 9)
    # the middle plane, as a slice with its own phase encoding
    truth = replace(
        scan(), images=scan().images[:, middle], brain=scan().brain[middle], coil_maps=scan().coil_maps[:, middle]
    )
    mask = torch.zeros(4, 1, 40)
    for echo in range(4):
        mask[echo, 0, echo % 2 :: 2] = 1
        mask[echo, 0, 16:24] = 1
    coils = truth.images[:, None] * truth.coil_maps
    full = torch.fft.fftshift(torch.fft.fft(torch.fft.ifftshift(coils, dim=-2), dim=-2, norm="ortho"), dim=-2)
    noise = 0.01 * torch.randn(full.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    one = KSpace((full + noise) * mask[:, None, :, :, None], mask, coil_maps=truth.coil_maps, noise_std=0.01)
    found = starts(one)
    assert found["refined"].shape == truth.images.shape
    assert error(found["refined"], truth) < error(found["llr"], truth) < 0.3
    single = replace(kspace, data=kspace.data[:1], counts=kspace.counts[:1])
    assert torch.isfinite(torch.view_as_real(low_rank_or_refined("refined", posed(single), Report()))).all()


def test_less_memory_changes_nothing() -> None:
    kspace, _ = measured()
    usual = starts(kspace)["refined"]
    with batch_share(1 / 256):
        short = starts(kspace)["refined"]
    # thresholds are steps: a coefficient beside one can fall either way, and nine iterations carry it on
    assert float((usual - short).norm() / usual.norm()) < 3e-3


def test_the_weights_say_which_first_images(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Laro(LaroSettings(channels=4, features=(4, 4), unrolls=1)).eval().requires_grad_(False)
    stated = load_weights(save_weights(tmp_path, "mine", network, "refined", {"amplitude": 1.0}))
    kspace, info = measured()

    def images(trained: TrainedLaro, start: str) -> torch.Tensor:
        settings = replace(Settings(), start=start, low_rank_steps=0)
        return reconstruct_with(trained, kspace, info, settings, Report()).images[0].data

    assert stated.start == "refined"
    found = {start: images(stated, start) for start in ("weights", "refined", "llr")}
    assert torch.equal(found["weights"], found["refined"])
    assert not torch.allclose(found["weights"], found["llr"], atol=1e-3)


def test_progress_rises_to_its_end() -> None:
    class Heard(Report):
        def __init__(self) -> None:
            self.fractions: list[float] = []

        def progress(self, fraction: float, message: str = "") -> None:
            self.fractions.append(fraction)

    heard = Heard()
    low_rank_or_refined("refined", posed(measured()[0]), heard)
    assert heard.fractions == sorted(heard.fractions) and heard.fractions[-1] == 1.0
