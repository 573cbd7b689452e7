"""The LARO benchmark's masks, cases and figures, on heads small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bart
from benchmarks.laro import Comparison
from benchmarks.laro_cases import BART_WEIGHT, acquire, acs_block, available, held_out, pattern, with_estimated_maps
from benchmarks.laro_gpu import large_scan, speed
from benchmarks.laro_masks import DENSITY, SHIPPED, compared, figures_of, probabilities, profiles
from benchmarks.laro_scores import Maps, maps_of, regional, regression, scores, true_regional
from recon_core.errors import SettingError
from recon_core.methods.laro.model import Laro, LaroSettings
from recon_core.methods.laro.weights import TrainedLaro, save_weights
from recon_core.sampling.mask_files import MaskError, SamplingMask, write_mask
from recon_core.simulation.multi_echo_brain import BrainScan, ScanRecipe
from recon_core.training.laro import mask_name

RECIPE = ScanRecipe(matrix=(16, 40, 36), voxel=(5.0, 5.2), n_echoes=4, noise=(0.01, 0.01))


@cache
def head() -> BrainScan:
    return held_out(RECIPE, 1)[0]


@cache
def reference() -> Maps:
    return maps_of(head().images, head())


@pytest.mark.parametrize("spo", [0, 1, 2])
@pytest.mark.parametrize("shape", [(32, 64), (40, 80)])
def test_masks_of_every_kind_and_matrix(spo: int, shape: tuple[int, int]) -> None:
    mask = pattern(shape, 7, 8.0, spo)
    n = -(-shape[0] * shape[1] // 8)
    assert mask.shape == (7, *shape) and set(mask.sum((1, 2))) == {n}
    assert bool((mask == mask[:1]).all()) == (spo < 2)
    block = acs_block(shape, n)
    middle = mask[:, shape[0] // 2 - block[0] // 2 :, shape[1] // 2 - block[1] // 2 :][:, : block[0], : block[1]]
    assert middle.all()


def test_masks_that_are_compared(tmp_path: Path) -> None:
    for kind, n_patterns in (("8/2", 6), ("8/1", 1)):
        for source in (SHIPPED, DENSITY):
            found = probabilities(source, kind, (80, 206), 6)
            assert found.shape == (n_patterns, 80, 206) and found.mean() == pytest.approx(1 / 8, rel=0.01)
    write_mask(tmp_path / mask_name("4/2"), SamplingMask(np.ones((4, 16, 40), bool), np.full((4, 16, 40), 0.25, np.float32)))
    sources = {"hand-made": DENSITY, "flat": str(tmp_path)}
    hand, flat = profiles(["4/2"], sources, (16, 40), 4)
    assert hand["mean change"] == 0 and flat["mean change"] > 0.1
    assert hand["rings"][0] == 1 and hand["rings"][0] > hand["rings"][4] > hand["rings"][8] and set(flat["rings"]) == {0.25}
    rows = figures_of(head(), "4/2", sources, ["llr"], [1], 0)
    assert [r["masks"] for r in rows] == ["hand-made", "flat"]
    # samples that are spread over all of k-space are worse for a smooth object
    assert rows[0]["magnitude PSNR"] > rows[1]["magnitude PSNR"] + 1


def test_masks_are_compared_case_by_case() -> None:
    """A difference that is the same in every head has no error, however much the heads differ."""
    base = {"R/SPO": "8/2", "method": "llr", "r2star PSNR": 30.0, "local field PSNR": 40.0, "QSM RMSE": 20.0}
    rows = [
        {**base, "masks": masks, "head": head, "draw": 1, "magnitude PSNR": 40.0 + 3 * head + 0.5 * (masks == "new")}
        for masks in ("old", "new")
        for head in (3, 4)
    ]
    old, new = compared(rows, "old")
    assert (old["magnitude PSNR"], old["magnitude PSNR, difference"]) == (50.5, 0) and old["cases"] == 2
    assert (new["magnitude PSNR, difference"], new["magnitude PSNR, its error"]) == (0.5, 0)


def test_no_learned_mask_of_that_acceleration(tmp_path: Path) -> None:
    with pytest.raises(MaskError, match="r3"):
        pattern((32, 64), 6, 3.0, 2, tmp_path)


def test_a_case_holds_the_samples_of_its_mask_and_the_scan_s_noise() -> None:
    scan = head()
    mask = pattern((16, 40), 4, 4.0, 0)
    case = acquire(scan, mask, 4.0, 0)
    assert torch.equal(case.kspace.mask, torch.from_numpy(mask))
    assert bool((case.kspace.data.movedim(1, -1)[~case.kspace.mask] == 0).all())
    full = acquire(scan, np.ones_like(mask), 1.0, 0)
    again = full.kspace.data * case.kspace.counts[:, None, :, :, None]
    assert torch.equal(again, case.kspace.data)


def test_maps_may_be_estimated_from_the_block_that_was_sampled() -> None:
    scan = head()
    case = acquire(scan, np.ones((4, 16, 40), bool), 1.0, 0)
    own = with_estimated_maps(case).kspace.coil_maps
    assert own is not None
    agree = (own.conj() * scan.coil_maps).sum(0).abs()[scan.brain]
    assert 0.97 < float(agree.mean()) < 0.9999  # the same but for a phase, and not the very same


def test_speed_is_measured_part_by_part() -> None:
    torch.manual_seed(0)
    network = Laro(LaroSettings(channels=4, features=(4, 4), unrolls=1)).eval().requires_grad_(False)
    trained = TrainedLaro(network, "cg_sense", 1.0, {"sha256": "initial values"})
    case = acquire(head(), pattern((16, 40), 4, 4.0, 0), 4.0, 0)
    rows = speed(case, {"float32": trained}, "cpu", 1, "weights", with_pdf=False)
    seconds = {str(row[0]): float(str(row[2])) for row in rows}
    parts = [v for k, v in seconds.items() if k not in ("images", "maps")]
    assert len(parts) == 4 and seconds["maps"] == pytest.approx(sum(parts)) and min(seconds.values()) > 0


def test_a_large_scan_has_unit_coil_maps_and_the_same_head() -> None:
    scan = large_scan((16, 40, 36), 2, 4)
    assert scan.images.shape == (2, 16, 40, 36) and scan.brain.shape == (16, 40, 36)
    torch.testing.assert_close(torch.linalg.vector_norm(scan.coil_maps, dim=0), torch.ones(16, 40, 36))
    assert 0.5 < float(scan.images[0][scan.brain].abs().mean()) < 1.1
    assert 0.2 < scan.voxel[1] * 40 < 0.3  # m: a head with its margin


def test_the_reference_is_perfect_and_noise_is_not() -> None:
    same = scores(reference(), reference(), head())
    assert same["magnitude PSNR"] == np.inf and same["QSM RMSE"] == 0 and same["QSM SSIM"] == pytest.approx(1)
    simulated = replace(reference(), chi=head().chi.numpy())
    assert (
        scores(simulated, reference(), head())["QSM RMSE, truth"] == pytest.approx(0, abs=1e-4)
        and same["QSM RMSE, truth"] > 1
    )
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(head().images.shape, dtype=torch.complex64, generator=generator)
    figures = [scores(maps_of(head().images + std * noise, head()), reference(), head()) for std in (0.005, 0.05)]
    for key in figures[0]:
        better, worse = (f[key] for f in figures)
        assert (better > worse) if "PSNR" in key or "SSIM" in key else (better < worse), key


def test_regression_and_regions() -> None:
    truth = {"a": 0.1, "b": -0.05, "c": 0.0, "d": 0.2}
    slope, r2, n = regression({k: 0.9 * v + 0.01 for k, v in truth.items()} | {"only here": 3.0}, truth)
    assert slope == pytest.approx(0.9) and r2 == pytest.approx(1) and n == 4
    assert np.isnan(regression({"a": 1.0}, truth)[0])
    found, simulated = regional(reference(), head()), true_regional(head(), reference().region)
    assert set(found) == set(simulated) and {"GP", "PU", "CC"} <= set(found)
    assert regression(found, simulated)[0] > 0.4


def test_heads_are_compared_one_after_the_other(tmp_path: Path) -> None:
    known = {id(scan): scan for scan in (head(), held_out(RECIPE, 1, first=1)[0])}
    compared = Comparison(
        {"worse": lambda case: (0.9 * known[id(case.scan)].images, 3.0), "same": lambda case: (case.scan.images, 1.0)},
        ["8/0"],
        tmp_path,
    )
    told: list[int] = []
    for scan in known.values():
        compared.add(scan, lambda: told.append(len(compared.tables())))
    worse, same = compared.tables()
    assert told == [1, 2, 2, 2] and worse["heads"] == same["heads"] == 2 and worse["CPU s"] == 3.0
    assert same["QSM RMSE"] == 0 and same["magnitude PSNR"] == np.inf and 15 < worse["magnitude PSNR"] < 40
    full, _, own = compared.regions()
    assert full["method"] == "noise-free" and full["means"] == own["means"] and own["regions n"] == full["regions n"] > 8
    assert own["regions slope (full scan)"] == pytest.approx(1) and own["regions slope (truth)"] != pytest.approx(1)
    assert (tmp_path / "laro_8_0.png").is_file()


def test_the_networks_that_are_installed_are_methods() -> None:
    from benchmarks.laro_cases import WEIGHTS

    names = set(available(sorted(WEIGHTS.glob("laro*.json"))))
    assert {"cg_sense", "llr", "refined", "laro"} <= names


def test_networks_of_an_ablation_are_told_apart_by_their_files(tmp_path: Path) -> None:
    for name, direction in (("laro_tff1", "both"), ("laro_forward", "forward")):
        torch.manual_seed(0)
        network = Laro(LaroSettings(channels=4, features=(4, 4), unrolls=1, direction=direction))
        torch.nn.init.normal_(network.denoiser.unet.last.weight, std=0.1)  # type: ignore[union-attr, arg-type]
        save_weights(tmp_path, name, network, "zero_filled", {"amplitude": 1.0})
    case = acquire(head(), pattern((16, 40), 4, 4.0, 0), 4.0, 0)
    files = sorted(tmp_path.glob("laro*.json"))
    plain, without = (available(files, **settings) for settings in ({}, {"low_rank_steps": 0}))
    both, forward, bare = (m(case)[0] for m in (plain["laro_tff1"], plain["laro_forward"], without["laro_forward"]))
    assert not torch.allclose(both, forward, atol=1e-3) and not torch.equal(forward, bare)


@pytest.mark.skipif(not bart.available(), reason="needs Debian's BART")
def test_bart_s_weight_is_part_of_the_name() -> None:
    case = acquire(head(), pattern((16, 40), 4, 4.0, 0), 4.0, 0)
    methods = available([], [BART_WEIGHT, 10 * BART_WEIGHT])
    found = [methods[name](case)[0] for name in ("bart_llr", f"bart_llr_{BART_WEIGHT:g}", f"bart_llr_{10 * BART_WEIGHT:g}")]
    assert torch.equal(found[0], found[1]) and not torch.allclose(found[1], found[2], atol=1e-3)


def test_every_kind_of_mask_has_the_modl_that_was_trained_with_it(tmp_path: Path) -> None:
    scan, files = head(), []
    for spo in (0, 2):
        torch.manual_seed(spo)
        network = Laro(LaroSettings(kind="modl", features=(4,), unrolls=1, n_echoes=4))
        torch.nn.init.normal_(network.denoiser.layers[-1].weight, std=0.1)  # type: ignore[index,union-attr]
        facts = {"amplitude": 1.0, "recipe": {"patterns": [f"8/{spo}"], "second_unrolls": 1}}
        files.append(save_weights(tmp_path, f"laro_modl_spo{spo}", network, "cg_sense", facts))
    methods = available(files)
    assert set(methods) - {"cg_sense", "llr", "refined", "bart_llr"} == {"modl"}
    mask = pattern((16, 40), 4, 8.0, 0)
    found = [methods["modl"](acquire(scan, mask, 8.0, spo))[0] for spo in (0, 2)]
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    alone = available(files[1:])["modl"](acquire(scan, mask, 8.0, 2))[0]
    assert torch.equal(alone, found[1])
    with pytest.raises(SettingError, match="8/1"):
        methods["modl"](acquire(scan, mask, 8.0, 1))
