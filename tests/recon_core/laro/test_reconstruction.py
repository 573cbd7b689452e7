"""LARO as a method: units, order of echoes, groups of planes, other echo counts and matrices, bad input."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recon_core.batches import batch_share
from recon_core.errors import DataError, SettingError
from recon_core.installed_weights import FOLDERS
from recon_core.methods import get_method, llr
from recon_core.methods.laro import Settings, reconstruct, reconstruct_with, starts
from recon_core.methods.laro.model import Laro, LaroSettings
from recon_core.methods.laro.reconstruction import rho_factor
from recon_core.methods.laro.settings import WEIGHTS_OF_PLANES
from recon_core.methods.laro.starts import planes_of_air
from recon_core.methods.laro.weights import TrainedLaro, installed_weights, load_weights, save_weights
from recon_core.problem import pose
from recon_core.settings import parse_settings
from recon_core.solvers.collaborative import PatchSettings
from recon_core.training.checkpoint import WeightError
from recon_core.types import KSpace, Report, ScanInfo
from tests.recon_core.laro.tiny import sampled, tiny_scan, without
from tests.recon_core.live_memory import peak_bytes


def idle(unrolls: int = 3, start: str = "cg_sense") -> TrainedLaro:
    """A network whose denoiser takes nothing off: what is left is data consistency."""
    torch.manual_seed(0)
    network = Laro(LaroSettings(channels=4, features=(4, 4), unrolls=unrolls, cg_iterations=50, cg_tolerance=1e-5))
    for parameter in network.denoiser.unet.last.parameters():  # type: ignore[union-attr]
        torch.nn.init.zeros_(parameter)
    return TrainedLaro(network.eval().requires_grad_(False), start, 1.0, {})


def busy() -> TrainedLaro:
    """A network that changes images."""
    torch.manual_seed(0)
    return TrainedLaro(
        Laro(LaroSettings(channels=4, features=(4, 4), unrolls=2)).eval().requires_grad_(False), "cg_sense", 1.0, {}
    )


class Fading(torch.nn.Module):
    """Takes a third of the last echo away."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.cat((torch.zeros_like(images[:, :-1]), images[:, -1:] / 3), dim=1)


def images(trained: TrainedLaro, kspace: KSpace, scan: ScanInfo, **settings: Any) -> torch.Tensor:
    """Of the network alone, unless ``low_rank_steps`` are asked for."""
    chosen = replace(Settings(), **{"low_rank_steps": 0, **settings})
    return reconstruct_with(trained, kspace, scan, chosen, Report()).images[0].data


def error(found: torch.Tensor, truth: torch.Tensor, where: torch.Tensor) -> float:
    return float((found - truth)[:, where].norm() / truth[:, where].norm())


@pytest.mark.parametrize("start", ["cg_sense", "llr", "refined", "zero_filled", "weights"])
def test_complete_data_give_the_true_images(start: str) -> None:
    scan = tiny_scan()
    kspace, info = sampled(scan, noise=0.0, full=True)
    found = images(idle(6), kspace, info, start=start)
    assert found.dtype == torch.complex64 and found.shape == scan.images.shape
    assert error(found, scan.images, scan.head) < 0.02


def test_data_consistency_beats_the_first_images() -> None:
    scan = tiny_scan()
    kspace, info = sampled(scan)
    zero = error(images(idle(1), kspace, info, start="zero_filled"), scan.images, scan.brain)
    more = error(images(idle(12), kspace, info, start="zero_filled"), scan.images, scan.brain)
    assert more < 0.75 * zero


def test_a_plane_of_air_keeps_its_first_images() -> None:
    scan = tiny_scan()
    beside = torch.ones(scan.images.shape[-1])
    beside[:3] = 0.0
    kspace, info = sampled(replace(scan, images=scan.images * beside))
    changed = images(busy(), kspace, info)
    first = images(idle(1, "cg_sense"), kspace, info, unrolls=1)
    kept = images(busy(), kspace, info, start="zero_filled")
    assert float(changed[..., :3].abs().max()) < 0.1 * float(changed.abs().max())
    # noise alone: what came in goes out, and not what data consistency or a network would make of it
    own = [
        error(x[..., :3], y[..., :3], torch.ones_like(scan.brain[..., :3])) for x, y in ((changed, first), (changed, kept))
    ]
    assert own[0] < 0.3 and own[1] > 0.3
    assert float((changed - first)[..., 3:].norm() / first[..., 3:].norm()) > 0.02


def test_low_rank_steps_give_back_what_the_network_took() -> None:
    """A network that pulls the last echo towards another: R2* would be too low, and unsampled k-space cannot say no."""
    scan = tiny_scan()
    kspace, info = sampled(scan)
    off = busy()
    off.network.denoiser = Fading()
    took = []
    for steps in (0, 2, 8):
        with_it, honest = (
            error(images(network, kspace, info, start="llr", low_rank_steps=steps), scan.images, scan.brain)
            for network in (off, idle(1))
        )
        took.append(with_it - honest)
    assert took[0] > 0.01 and took[1] < 0.9 * took[0] and took[2] < 0.65 * took[0]


def test_data_of_less_noise_than_the_training_s_are_trusted_more() -> None:
    """Complete data: what the network takes off is put back, and the more so the less noise; above the training's nothing changes."""
    scan = tiny_scan()
    kspace, info = sampled(scan, full=True)
    off = busy()
    off.network.denoiser = Fading()
    unknown, quiet, loud = (
        error(images(replace(off, noise=noise), kspace, info), scan.images, scan.brain) for noise in (0.0, 0.05, 0.001)
    )
    assert quiet < 0.5 * unknown and loud == unknown
    assert rho_factor(0.005, 0.01) == pytest.approx(0.25) and rho_factor(1e-6, 0.01) == 0.01


def test_low_rank_steps_leave_planes_of_air_and_single_echoes_alone() -> None:
    scan = tiny_scan()
    beside = torch.ones(scan.images.shape[-1])
    beside[:3] = 0.0
    kspace, info = sampled(replace(scan, images=scan.images * beside))
    without_steps, with_steps = (images(busy(), kspace, info, low_rank_steps=n) for n in (0, 4))
    torch.testing.assert_close(with_steps[..., :3], without_steps[..., :3])
    assert error(with_steps[..., 3:], without_steps[..., 3:], scan.brain[..., 3:]) > 0.01
    one, info = replace(kspace, data=kspace.data[:1], counts=kspace.counts[:1]), replace(info, echo_times=())
    assert torch.equal(images(busy(), one, info, low_rank_steps=4), images(busy(), one, info))


def test_where_nothing_stands_out_from_the_noise_somebody_is_told() -> None:
    kspace, info = sampled(tiny_scan())
    loud = replace(kspace, noise_std=0.5)
    result = reconstruct_with(busy(), loud, info, Settings(), Report())
    assert result.notes == ("laro: no plane stands out from the noise: the first images (cg_sense) are sent",)
    assert not reconstruct_with(busy(), kspace, info, Settings(), Report()).notes


@pytest.mark.parametrize(("noise", "kept"), [(0.0, [True, False, False]), (0.2, [True, True, False])])
def test_what_counts_as_air(noise: float, kept: list[bool]) -> None:
    planes = torch.zeros(3, 2, 10, 10, dtype=torch.complex64)
    planes[0] += 0.01
    planes[1] += 0.3j
    planes[2] -= 0.6
    assert planes_of_air(planes, noise).tolist() == kept


def test_groups_of_planes_change_nothing() -> None:
    kspace, info = sampled(tiny_scan())
    whole, small = (images(busy(), kspace, info, memory_mb=mb) for mb in (512.0, 1.0))
    assert torch.allclose(whole, small, atol=1e-4 * float(whole.abs().max()))


@pytest.mark.parametrize("start", ["refined"])  # which begins with llr
def test_memory_grows_with_the_slab_by_its_images_only(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by another k-space (four coils: four times the images), nor by the network's features, nor by patches."""
    monkeypatch.setattr(starts, "REFINEMENT", replace(starts.REFINEMENT, iterations=3, patches=PatchSettings(reach=1)))
    kspace, info = sampled(tiny_scan())
    assert kspace.coil_maps is not None
    peaks = []
    for times in (2, 4):
        longer = replace(
            kspace, data=kspace.data.repeat(1, 1, 1, 1, times), coil_maps=kspace.coil_maps.repeat(1, 1, 1, times), acs=None
        )
        with batch_share(1 / 64):
            peaks.append(peak_bytes(partial(images, busy(), longer, info, start=start, memory_mb=1.0)))
    slab = kspace.data[:, 0].numel() * kspace.data.element_size()
    assert peaks[1] - peaks[0] < 11 * 2 * slab


def test_echoes_are_fused_in_the_order_of_their_times() -> None:
    kspace, info = sampled(tiny_scan())
    order = [2, 0, 1]
    shuffled = replace(kspace, data=kspace.data[order], counts=kspace.counts[order])
    times = replace(info, echo_times=tuple(info.echo_times[i] for i in order))
    expected = images(busy(), kspace, info)[order]
    assert torch.allclose(images(busy(), shuffled, times), expected, atol=1e-4 * float(expected.abs().max()))


def test_first_images_may_be_given() -> None:
    kspace, info = sampled(tiny_scan())
    problem = pose(kspace, "test", Report())
    given = problem.leave(starts.low_rank_or_refined("llr", problem, Report()))
    expected = images(busy(), kspace, info, start="llr")
    found = reconstruct_with(busy(), kspace, info, Settings(low_rank_steps=0), Report(), given).images[0].data
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    backwards = replace(kspace, data=kspace.data.flip(0), counts=kspace.counts.flip(0))
    times = replace(info, echo_times=info.echo_times[::-1])
    again = reconstruct_with(busy(), backwards, times, Settings(low_rank_steps=0), Report(), given.flip(0)).images[0].data
    torch.testing.assert_close(again.flip(0), found, rtol=1e-3, atol=1e-4)


def test_fewer_echoes_another_matrix_and_one_coil_pass() -> None:
    kspace, info = sampled(tiny_scan())
    two = replace(kspace, data=kspace.data[:2], counts=kspace.counts[:2])
    assert images(busy(), two, replace(info, echo_times=info.echo_times[:2])).shape[0] == 2
    assert images(busy(), two, replace(info, echo_times=())).shape[0] == 2
    maps = kspace.coil_maps
    assert maps is not None and kspace.acs is not None
    one = replace(
        kspace, data=kspace.data[:1, :1], counts=kspace.counts[:1], acs=kspace.acs[:1], coil_maps=torch.ones_like(maps[:1])
    )
    assert torch.isfinite(torch.view_as_real(images(busy(), one, replace(info, echo_times=()), start="llr"))).all()


def test_a_missing_echo_and_times_that_do_not_fit_are_named() -> None:
    kspace, info = sampled(tiny_scan())
    with pytest.raises(DataError, match=r"without any sample.*1"):
        images(busy(), without(kspace, 1), info)
    with pytest.raises(DataError, match="2 times, 3 states"):
        images(busy(), kspace, replace(info, echo_times=info.echo_times[:2]))
    with pytest.raises(DataError, match="twice"):
        images(busy(), kspace, replace(info, echo_times=(0.01, 0.01, 0.02)))


def test_a_network_for_other_echoes_is_refused() -> None:
    kspace, info = sampled(tiny_scan())
    network = Laro(LaroSettings(kind="modl", features=(4,), n_echoes=5, unrolls=1)).eval()
    with pytest.raises(DataError, match="number of echoes"):
        images(TrainedLaro(network, "cg_sense", 1.0, {}), kspace, info)


def test_weights_come_back_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = busy()
    path = save_weights(tmp_path, "mine", trained.network, "cg_sense", {"amplitude": 1.0, "seed": 3})
    again = load_weights(path)
    assert again.network.settings == trained.network.settings and again.facts["seed"] == 3
    kspace, info = sampled(tiny_scan())
    assert torch.equal(images(again, kspace, info), images(trained, kspace, info))
    monkeypatch.setenv(FOLDERS, str(tmp_path))
    found = reconstruct(kspace, info, replace(Settings(), weights="mine", low_rank_steps=0), Report())
    assert torch.equal(found.images[0].data, images(trained, kspace, info))
    with pytest.raises(WeightError, match="mine"):
        reconstruct(kspace, info, replace(Settings(), weights="other"), Report())
    with pytest.raises(WeightError, match="not a name"):
        reconstruct(kspace, info, replace(Settings(), weights="../mine"), Report())


@pytest.mark.parametrize(
    ("plane", "name"),
    [
        ((32, 64), "laro"),
        ((12, 20), "laro"),
        ((40, 80), "laro"),
        ((80, 206), "laro_206x80"),
        ((206, 80), "laro_206x80"),
        ((128, 256), "laro_206x80"),
        ((0, 0), "laro"),
        (None, "laro"),
    ],
)
def test_the_nearest_weights_are_taken(plane: tuple[int, int] | None, name: str) -> None:
    assert Settings().weights_for(plane) == name
    assert Settings(weights="mine").weights_for(plane) == "mine"


@pytest.mark.parametrize("name", WEIGHTS_OF_PLANES)
def test_weights_were_trained_on_the_planes_that_they_are_taken_for(name: str) -> None:
    trained = installed_weights(name, torch.device("cpu"), "float32")
    assert tuple(trained.facts["recipe"]["matrix"][:2]) == WEIGHTS_OF_PLANES[name] and trained.start == "refined"


def test_images_say_which_weights_made_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WEIGHTS_OF_PLANES:
        save_weights(tmp_path, name, busy().network, "zero_filled", {"amplitude": 1.0})
    monkeypatch.setenv(FOLDERS, str(tmp_path))
    settings = Settings(low_rank_steps=0)
    kspace, info = sampled(tiny_scan())
    comment = reconstruct(kspace, info, settings, Report()).images[0].comment
    assert "weights laro " in comment and comment.endswith("2 iterations, from zero_filled images")
    other = replace(settings, start="cg_sense", unrolls=1)
    assert reconstruct(kspace, info, other, Report()).images[0].comment.endswith(", 1 iteration, from cg_sense images")
    maps = torch.ones(1, 80, 206, 2, dtype=torch.complex64)
    data = torch.randn(2, 1, 80, 206, 2, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    large = KSpace(data, torch.ones(2, 80, 206), acs=data.mean(0), acs_mask=torch.ones(80, 206).bool(), coil_maps=maps)
    info = replace(info, echo_times=(0.002, 0.006))
    assert "weights laro_206x80 " in reconstruct(large, info, settings, Report()).images[0].comment


def test_weights_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = save_weights(tmp_path, "mine", busy().network, "cg_sense", {"amplitude": 1.0})
    text = path.read_text()
    for old, new in (
        ('"laro",\n "format"', '"pinqi",\n "format"'),
        ('"amplitude": 1.0', '"amplitude": -1'),
        ('"channels": 4', '"channels": 8'),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        with pytest.raises(WeightError):
            load_weights(path)


def test_the_shipped_network_is_better_than_llr_on_a_held_out_head() -> None:
    from benchmarks.laro_cases import acquire, held_out, pattern
    from recon_core.metrics import psnr
    from recon_core.simulation.multi_echo_brain import ScanRecipe

    scan = held_out(ScanRecipe(matrix=(32, 64, 12), noise=(0.012, 0.012)), 1)[0]
    case = acquire(scan, pattern((32, 64), len(scan.images), 8.0, 2), 8.0, 2)
    truth, brain = scan.images.abs().square().sum(0).sqrt(), scan.brain
    figures = {}
    for name, method in (("laro", get_method("laro")), ("llr", llr)):
        found = method.reconstruct(case.kspace, case.info, method.Settings(), Report()).images[0].data
        figures[name] = psnr(found.abs().square().sum(0).sqrt(), truth, brain)
    assert figures["laro"] > figures["llr"] + 2.0


def test_settings_are_checked() -> None:
    for wrong in ({"start": "yesterday"}, {"unrolls": -1}, {"memory_mb": 0.0}, {"precision": "int8"}):
        with pytest.raises(SettingError):
            parse_settings(Settings, wrong)
