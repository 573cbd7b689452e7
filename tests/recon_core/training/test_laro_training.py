"""Training of LARO: both phases, resuming to the same bits, masks that are learned, scans from a folder."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.methods.laro.weights import load_weights
from recon_core.operators.planes import Planes
from recon_core.sampling.mask_files import SamplingMask, read_mask, write_mask
from recon_core.simulation.multi_echo_brain import BrainScan, ScanRecipe, simulate
from recon_core.simulation.scan_folder import ScanFolder, cut_readout, read_scan, write_scan
from recon_core.simulation.scan_folder import main as command
from recon_core.training.checkpoint import WeightError, read_pair
from recon_core.training.laro import RunSettings, learn_masks, main, mask_name, run
from recon_core.training.laro_starts import MeasuredScans, measure
from recon_core.training.laro_tasks import LaroModule, LaroRecipe, LaroTask, plane_sample
from recon_core.training.loop import Progress
from recon_core.training.losses import channel_ssim, decay_error
from recon_core.training.runs import alone_in

TINY = LaroRecipe(
    channels=4,
    features=(4, 4),
    patterns=("3/2", "3/1"),
    matrix=(12, 20, 14),
    n_echoes=3,
    n_coils=4,
    acs=(4, 4),
    first_steps=4,
    second_steps=3,
    second_unrolls=2,
    scans_held=2,
    steps_per_scan=4,
    mask_rate=0.1,
    pixel_weight=1.0,
    n_validation=0,
)


@cache
def scans() -> tuple[BrainScan, ...]:
    recipe = ScanRecipe(matrix=TINY.matrix, voxel=(7.0, 9.0), n_echoes=3, n_coils=4)
    return tuple(simulate(recipe, seed, ("train", seed)) for seed in range(3))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    for number, scan in enumerate(scans()):
        write_scan(tmp_path / "scans", f"s{number}", scan)
    return str(tmp_path / "scans")


def test_both_phases_leave_weights_and_masks(folder: str, tmp_path: Path) -> None:
    result, path = run(replace(TINY, n_validation=1), tmp_path / "out", RunSettings(scans=folder, validate_every=3))
    assert result.finished and result.step == 3
    trained = load_weights(path)
    assert trained.network.settings.unrolls == 2 and trained.start == "cg_sense" and 0.3 < trained.amplitude < 3
    assert trained.facts["steps_done"] == {"phase1": 4, "phase2": 3} and "psnr_3/2" in trained.facts["validation"]
    assert list((tmp_path / "out" / "phase2").glob("magnitude_0_*.png"))
    for spo in (1, 2):
        mask = read_mask(tmp_path / "out" / f"laro_mask_r3_spo{spo}.h5")
        assert mask.mask.shape == (3, 12, 20) and set(mask.mask.sum((1, 2))) == {80}
        assert mask.probability is not None and mask.probability.mean() == pytest.approx(80 / 240, abs=1e-4)
        assert bool((mask.mask[0] == mask.mask[1]).all()) == (spo == 1)


@pytest.mark.parametrize("stops", [(2,), (4, 1)])
def test_a_training_in_parts_equals_one_in_one(folder: str, tmp_path: Path, stops: tuple[int, ...]) -> None:
    run(TINY, tmp_path / "whole", RunSettings(scans=folder, validate_every=0))
    seen = 0

    class Enough(Exception):
        pass

    for number, stop in enumerate(stops):
        seen = 0

        def count(phase: str, progress: object, stop: int = stop) -> None:
            nonlocal seen
            seen += 1
            if seen == stop:
                raise Enough

        with pytest.raises(Enough):
            # a crash: what the last checkpoint has not is lost, and done again
            run(
                TINY,
                tmp_path / "parts",
                RunSettings(scans=folder, validate_every=0, checkpoint_minutes=0, resume=number > 0),
                count,
            )
    run(TINY, tmp_path / "parts", RunSettings(scans=folder, validate_every=0, resume=True))
    for name in ("laro", "phase1/checkpoint", "phase2/checkpoint"):
        (one, _), (other, _) = (read_pair(tmp_path / way / f"{name}.json") for way in ("whole", "parts"))
        assert set(one) == set(other) and all(torch.equal(one[k], other[k]) for k in one), name
    masks = [read_mask(tmp_path / way / "laro_mask_r3_spo2.h5") for way in ("whole", "parts")]
    assert np.array_equal(masks[0].mask, masks[1].mask)


def test_a_stop_in_the_last_step_of_phase_one_holds_for_phase_two(folder: str, tmp_path: Path) -> None:
    def stop(phase: str, progress: Progress) -> None:
        if (phase, progress.step) == ("phase1", 1):
            signal.raise_signal(signal.SIGTERM)

    recipe, settings = replace(TINY, first_steps=1, second_steps=1), RunSettings(scans=folder, validate_every=0)
    result, weights = run(recipe, tmp_path, settings, stop)
    assert not result.finished and json.loads(weights.read_text())["steps_done"] == {"phase1": 1, "phase2": 0}
    (exported, _), (learned, _) = read_pair(weights), read_pair(tmp_path / "phase1" / "checkpoint.json")
    assert all(
        torch.equal(value, learned[f"module/network.{name}"]) for name, value in exported.items()
    )  # phase two begins there
    assert run(recipe, tmp_path, replace(settings, resume=True))[0].finished


def test_a_time_limit_leaves_something_to_resume(folder: str, tmp_path: Path) -> None:
    result, path = run(TINY, tmp_path / "out", RunSettings(scans=folder, max_minutes=1e-6))
    assert not result.finished and path.is_file()
    with pytest.raises(SettingError, match="resume"):
        run(TINY, tmp_path / "out", RunSettings(scans=folder))
    with pytest.raises(SettingError, match="mask_rate"):
        run(replace(TINY, mask_rate=1.0), tmp_path / "out", RunSettings(scans=folder, resume=True))
    for command_of in (run, learn_masks):  # each would remove the checkpoints of the other
        with alone_in(tmp_path / "out"), pytest.raises(SettingError, match="out: the folder's training is running already"):
            command_of(TINY, tmp_path / "out", RunSettings(scans=folder, resume=True, max_minutes=1e-6))
    with alone_in(tmp_path / "out"):  # it was given back
        pass


def test_a_training_goes_on_with_the_scans_it_was_begun_with_alone(folder: str, tmp_path: Path) -> None:
    recipe, out = replace(TINY, first_steps=1, second_steps=1), tmp_path / "out"
    settings = RunSettings(scans=folder, max_minutes=1e-6)
    _, path = run(recipe, out, settings)
    data = read_pair(path)[1]["data"]
    assert len(data["scans"]) == 64 and data["masks"] == "none"
    with pytest.raises(SettingError, match=r"scans: [0-9a-f]{64}, not simulated"):
        run(recipe, out, replace(settings, scans=None, resume=True))
    moved = Path(folder).rename(tmp_path / "elsewhere")  # the same scans in another place
    result, _ = run(recipe, out, RunSettings(scans=str(moved), validate_every=0, resume=True))
    assert result.finished
    write_scan(moved, "s1", replace(scans()[1], noise_std=0.5))
    with pytest.raises(SettingError, match="holds another training; got scans:"):
        run(recipe, out, replace(settings, scans=str(moved), resume=True))
    # from before it was recorded: accepted, and recorded from then on
    stated = json.loads((out / "recipe.json").read_text())
    del stated["data"]
    (out / "recipe.json").write_text(json.dumps(stated))
    run(recipe, out, replace(settings, scans=str(moved), resume=True))
    with pytest.raises(SettingError, match="simulated"):
        run(recipe, out, replace(settings, scans=None, resume=True))


def test_a_training_goes_on_with_the_masks_it_was_begun_with_alone(folder: str, tmp_path: Path) -> None:
    recipe = replace(FROM_LLR, second_start="cg_sense", patterns=("3/2",), n_validation=0)
    for name, sign in (("one", 1), ("other", -1)):
        (tmp_path / name).mkdir()
        probability = np.full((3, 12, 20), 1 / 3, np.float32)
        probability[:, :, :10] += sign * 0.2
        write_mask(tmp_path / name / mask_name("3/2"), SamplingMask(probability > 0.3, probability))
    settings = RunSettings(scans=folder, max_minutes=1e-6)
    run(recipe, tmp_path / "out", replace(settings, masks=str(tmp_path / "one")))
    run(recipe, tmp_path / "out", replace(settings, masks=str(tmp_path / "one"), resume=True))
    with pytest.raises(SettingError, match="begun with another mask"):
        run(recipe, tmp_path / "out", replace(settings, masks=str(tmp_path / "other"), resume=True))
    run(recipe, tmp_path / "without", settings)
    with pytest.raises(SettingError, match=r"masks: none, not [0-9a-f]{64}"):
        run(recipe, tmp_path / "without", replace(settings, masks=str(tmp_path / "one"), resume=True))
    # what a start finds in the folder already is not preferred to what it is given
    (tmp_path / "anew" / "masks").mkdir(parents=True)
    shutil.copy(tmp_path / "one" / mask_name("3/2"), tmp_path / "anew" / "masks")
    run(recipe, tmp_path / "anew", replace(settings, masks=str(tmp_path / "other")))
    found = read_mask(tmp_path / "anew" / mask_name("3/2")).probability
    assert found is not None and found[:, :, :8].mean() < found[:, :, 14:].mean()


def test_weights_for_masks_without_a_central_block_can_be_used(folder: str, tmp_path: Path) -> None:
    recipe = replace(TINY, patterns=("3/1",), first_steps=0, second_steps=1, second_unrolls=1)
    amplitudes = []
    for acs in ((0, 0), (4, 4)):
        _, weights = run(replace(recipe, acs=acs), tmp_path / str(acs[0]), RunSettings(scans=folder))
        amplitudes.append(load_weights(weights).amplitude)
    assert amplitudes[0] == pytest.approx(amplitudes[1], rel=0.2)  # the same scans


def test_phase_one_changes_masks_and_phase_two_does_not(folder: str, tmp_path: Path) -> None:
    result, masks = learn_masks(TINY, tmp_path / "out", RunSettings(scans=folder, validate_every=0))
    assert result is not None and result.finished and len(masks) == 2
    first, _ = read_pair(tmp_path / "out" / "phase1" / "checkpoint.json")
    start = LaroModule(TINY).state_dict()["sampling.r3_2.weights"]
    learned = first["module/sampling.r3_2.weights"]
    free = start.new_tensor(1) * (learned != start)
    assert float(free.sum()) > 0.5 * learned.numel()
    run(TINY, tmp_path / "out", RunSettings(scans=folder, validate_every=0, resume=True))
    second, _ = read_pair(tmp_path / "out" / "phase2" / "checkpoint.json")
    assert torch.equal(second["module/sampling.r3_2.weights"], learned)


FROM_LLR = replace(TINY, first_steps=0, second_start="llr", mask_draws=2, n_validation=1)


def test_a_training_from_llr_images_in_parts_equals_one_in_one(folder: str, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    given = {}
    for pattern, patterns in (("3/2", 3), ("3/1", 1)):
        probability = np.full((3, 12, 20), 1 / 3, np.float32)
        probability[:, :, :10] += np.linspace(0.1, 0.3, patterns)[:, None, None].astype(np.float32)
        given[pattern] = probability
        write_mask(masks / mask_name(pattern), SamplingMask(probability > 0.3, probability))
    whole, path = run(FROM_LLR, tmp_path / "whole", RunSettings(scans=folder, masks=str(masks), validate_every=3))
    trained = load_weights(path)
    assert whole.finished and trained.start == "llr" and trained.facts["steps_done"] == {"phase1": 0, "phase2": 3}

    class Enough(Exception):
        pass

    def stop(phase: str, progress: object) -> None:
        raise Enough

    parts = RunSettings(scans=folder, masks=str(masks), validate_every=3, checkpoint_minutes=0)
    with pytest.raises(Enough):
        run(FROM_LLR, tmp_path / "parts", parts, stop)
    # the masks that were taken over are in the folder: nobody has to name them again
    run(FROM_LLR, tmp_path / "parts", replace(parts, masks=None, resume=True))
    (one, _), (other, _) = (read_pair(tmp_path / way / "laro.json") for way in ("whole", "parts"))
    assert all(torch.equal(one[k], other[k]) for k in one)
    for pattern in FROM_LLR.patterns:
        found = read_mask(tmp_path / "parts" / mask_name(pattern)).probability
        assert found is not None
        # sides that were given more keep more, in each echo alike or more and more
        sides = found[:, :, :8].mean((1, 2)) - found[:, :, 14:].mean((1, 2))
        assert (sides > 0.05).all() and (np.diff(sides) > 0.02).all() == (pattern == "3/2")


def test_a_training_from_refined_images_goes_on_from_given_weights(folder: str, tmp_path: Path) -> None:
    _, earlier = run(replace(FROM_LLR, second_steps=1, n_validation=0), tmp_path / "earlier", RunSettings(scans=folder))
    recipe = replace(FROM_LLR, second_start="refined", patterns=("3/2",), n_validation=0)
    settings = RunSettings(scans=folder, initial=str(earlier), checkpoint_minutes=0)
    # no time at all: what is exported is what it began with
    stopped, path = run(recipe, tmp_path / "out", replace(settings, max_minutes=1e-6))
    (first, facts), (given, theirs) = read_pair(path), read_pair(earlier)
    assert stopped.step < recipe.second_steps
    if stopped.step == 0:
        assert all(torch.equal(first[k], given[k]) for k in given)
    assert facts["start"] == "refined" and facts["recipe"]["initial_sha256"] == theirs["sha256"]
    # the folder knows what it began with: nobody has to name it again
    result, path = run(recipe, tmp_path / "out", replace(settings, initial=None, resume=True))
    assert result.finished
    whole, _ = read_pair(run(recipe, tmp_path / "whole", settings)[1])
    assert all(torch.equal(whole[k], value) for k, value in read_pair(path)[0].items())
    with pytest.raises(SettingError, match="initial_sha256"):
        run(recipe, tmp_path / "out", replace(settings, initial=str(path), resume=True))


def test_recipes_from_before_there_were_given_weights_go_on() -> None:
    facts = TINY.facts()
    assert "initial_sha256" not in facts and LaroRecipe.from_facts(facts) == TINY
    given = replace(TINY, initial_sha256="ab")
    assert LaroRecipe.from_facts(given.facts()) == given


def test_a_training_in_bfloat16_keeps_float32_weights_and_is_another_training(folder: str, tmp_path: Path) -> None:
    recipe = replace(TINY, precision="bfloat16", patterns=("3/2",), first_steps=1, second_steps=1)
    settings = RunSettings(scans=folder)
    result, path = run(recipe, tmp_path / "out", settings)
    tensors, facts = read_pair(path)
    assert result.finished and facts["recipe"]["precision"] == "bfloat16" and "precision" not in facts["network"]
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    exact, _ = read_pair(run(replace(recipe, precision="float32"), tmp_path / "exact", settings)[1])
    assert any(not torch.equal(tensors[k], exact[k]) for k in exact)
    with pytest.raises(SettingError, match="precision: bfloat16, not float32"):
        run(replace(recipe, precision="float32"), tmp_path / "out", replace(settings, resume=True))
    # trainings from before there was a choice go on
    assert "precision" not in TINY.facts() and LaroRecipe.from_facts(recipe.facts()) == recipe


def test_refined_starts_of_a_training_are_nearer_to_the_truth(folder: str) -> None:
    mask = torch.from_numpy(LaroModule(FROM_LLR).pattern("3/2").draw(0)).float()
    scan, cpu = scans()[0], torch.device("cpu")
    errors = []
    for start in ("llr", "refined"):
        measured = measure(scan, mask, FROM_LLR.acs, 5, cpu, own_maps=False, start=start)
        errors.append(float((scan.brain * (measured.start - measured.images)).norm()))
    assert errors[1] < 0.97 * errors[0]


def test_a_scan_is_measured_once_and_starts_near_the_truth(folder: str) -> None:
    module = LaroModule(FROM_LLR)
    supply = MeasuredScans(
        ScanFolder(folder), lambda pattern, number: module.pattern(pattern).draw(number),
        acs=FROM_LLR.acs, draws=2, seed=0, keep=4, device=torch.device("cpu"),
    )  # fmt: skip
    measured = supply.measured("train", 0, "3/2")
    assert supply.measured("train", 0, "3/2") is measured
    columns = torch.tensor([3, 7])
    both, one = measured.kspace(columns, torch.device("cpu")), measured.kspace(columns[1:], torch.device("cpu"))
    assert torch.equal(both[1:], one)  # a plane's noise is its own
    inside = measured.scan.brain

    def error(images: torch.Tensor) -> float:
        return float((inside * (images - measured.images)).norm() / (inside * measured.images).norm())

    assert error(measured.start) < 0.35 < error(torch.zeros_like(measured.start))
    # the start belongs to this noise and this mask: it explains the samples that were taken
    operator = Planes(measured.maps.movedim(-1, 0), measured.mask)
    everything = torch.arange(measured.start.shape[-1])
    data = measured.kspace(everything, torch.device("cpu")) * measured.mask[:, None]
    explained = operator.forward(measured.start.movedim(-1, 0)) * measured.mask[:, None]
    assert float((data - explained).norm() / data.norm()) < 0.2
    mask = torch.from_numpy(module.pattern("3/2").draw(0)).float()
    own = measure(measured.scan, torch.ones_like(mask), (10, 10), 5, torch.device("cpu"), own_maps=True)
    assert not torch.equal(own.maps, measured.scan.coil_maps)
    # its truth is what its own maps combine
    combined = (own.maps.conj() * measured.scan.coil_maps * measured.scan.images[:1]).sum(0)
    torch.testing.assert_close(own.images[0], combined)


def test_a_few_steps_on_one_plane_lower_the_loss() -> None:
    torch.manual_seed(0)
    module = LaroModule(TINY)
    task = LaroTask(
        module, TINY, torch.device("cpu"), 2, masks={p: torch.from_numpy(module.pattern(p).draw(0)) for p in TINY.patterns}
    )
    sample = plane_sample(scans()[0], torch.tensor([7]), 1.0, 3, torch.device("cpu"))
    task.samples.batch = lambda step: sample  # type: ignore[method-assign]
    optimizer = torch.optim.Adam(module.network.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss, _figures = task.loss(0)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


def test_the_loss_is_the_similarity_of_every_iteration_under_a_mask_drawn_anew() -> None:
    """Eq. 9 inside the brain, mean over the unrolls; phase one never sees one mask twice, phase two no other than its own."""
    recipe = replace(TINY, pixel_weight=0.0, first_unrolls=3)
    module, cpu = LaroModule(recipe), torch.device("cpu")
    own = {p: torch.from_numpy(module.pattern(p).draw(0)) for p in recipe.patterns}
    first, second = LaroTask(module, recipe, cpu, 1), LaroTask(module, recipe, cpu, 2, masks=own)
    sample = plane_sample(scans()[0], torch.tensor([7]), 1.0, 3, cpu)
    first.samples.batch = second.samples.batch = lambda step: sample  # type: ignore[method-assign]
    drawn = [first._mask("3/2") for _ in range(3)]
    assert all(set(mask.unique().tolist()) == {0.0, 1.0} and mask.requires_grad for mask in drawn)
    assert not torch.equal(drawn[0], drawn[1]) and torch.equal(second._mask("3/2"), own["3/2"].float())
    for task, unrolls, mask in ((first, 3, drawn[2]), (second, 2, own["3/2"].float())):
        task._mask = lambda name, mask=mask: mask  # type: ignore[method-assign]
        loss, _ = task.loss(0)
        found = task.reconstruct(sample, mask)
        parts = [1 - channel_ssim(x * sample.brain, sample.images * sample.brain) for x in found]
        longer = torch.cat((mask.detach(), 1 - mask.detach()))  # for more echoes than the scan has: the first ones are taken
        torch.testing.assert_close(task.reconstruct(sample, longer)[-1], found[-1])
        assert len(found) == unrolls and len({round(float(part.detach()), 7) for part in parts}) > 1
        torch.testing.assert_close(loss, sum(parts) / unrolls)
        loss.backward()
    assert module.pattern("3/2").weights.grad is not None and bool((module.pattern("3/2").weights.grad != 0).any())


def test_samples_are_a_function_of_the_step(folder: str) -> None:
    tasks = [LaroTask(LaroModule(TINY), TINY, torch.device("cpu"), 1, ScanFolder(folder)) for _ in range(2)]
    for step in (5, 0):
        a, b = (task.samples.batch(step) for task in tasks)
        assert torch.equal(a.kspace, b.kspace) and torch.equal(a.images, b.images)
    assert not torch.equal(tasks[0].samples.batch(1).kspace, a.kspace)


def test_channel_similarity() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 16, 20, dtype=torch.complex64, generator=g)
    assert float(channel_ssim(x, x)) == pytest.approx(1.0)
    y = x + 0.3 * torch.randn(x.shape, dtype=x.dtype, generator=g)
    worse = x + 0.6 * torch.randn(x.shape, dtype=x.dtype, generator=g)
    assert float(channel_ssim(worse, x)) < float(channel_ssim(y, x)) < 1
    # against the definition, in one plane large enough that its middle sees no border
    offsets = torch.arange(11.0) - 5
    k = torch.exp(-0.5 * (offsets / 1.5) ** 2)
    k = (k / k.sum())[:, None] * (k / k.sum())

    def mean(v: torch.Tensor) -> torch.Tensor:
        padded = torch.nn.functional.pad(v, (5, 5, 5, 5))
        return (padded.unfold(0, 11, 1).unfold(1, 11, 1) * k).sum((-1, -2))

    values = []
    for a, b in ((x[0, 0].real, y[0, 0].real), (x[0, 0].imag, y[0, 0].imag)):
        ma, mb = mean(a), mean(b)
        top = (2 * ma * mb + 1e-4) * (2 * (mean(a * b) - ma * mb) + 9e-4)
        values.append(top / ((ma**2 + mb**2 + 1e-4) * (mean(a * a) - ma**2 + mean(b * b) - mb**2 + 9e-4)))
    assert float(channel_ssim(x[0, 0], y[0, 0])) == pytest.approx(float(torch.stack(values).mean()), rel=1e-4)


def test_the_error_of_the_decay_is_that_of_the_rate() -> None:
    times = (0.002, 0.0065, 0.011, 0.02)
    t = torch.tensor(times)[:, None, None]
    rate = torch.full((6, 8), 30.0)
    phase = torch.exp(2j * torch.pi * torch.rand(6, 8, generator=torch.Generator().manual_seed(0)))
    truth, faster = ((phase * torch.exp(-t * r)[None]).to(torch.complex64) for r in (rate, rate + 5))
    inside = torch.ones(1, 1, 6, 8, dtype=torch.bool)
    assert float(decay_error(truth * (0.8 + 0.1j), truth, times, inside)) < 1e-3  # a scale and a phase change no rate
    assert float(decay_error(faster, truth, times, inside)) == pytest.approx(5 * 0.018, rel=1e-2)
    inside[..., :4] = False
    spoilt = torch.cat((faster[..., :4], truth[..., 4:]), dim=-1).requires_grad_(True)
    error = decay_error(spoilt, truth, times, inside)
    error.backward()
    assert float(error.detach()) < 1e-5 and spoilt.grad is not None and float(spoilt.grad[..., :4].abs().max()) == 0
    dark = torch.zeros_like(truth).requires_grad_(True)
    decay_error(dark, torch.zeros_like(truth), times, inside).backward()
    assert dark.grad is not None and bool(torch.isfinite(torch.view_as_real(dark.grad)).all())


def test_the_decay_can_be_trained_on(folder: str, tmp_path: Path) -> None:
    recipe = replace(FROM_LLR, decay_weight=0.5, n_validation=0)
    result, path = run(recipe, tmp_path / "out", RunSettings(scans=folder))
    assert result.finished and load_weights(path).facts["recipe"]["decay_weight"] == 0.5
    assert "decay_weight" not in TINY.facts() and LaroRecipe.from_facts(recipe.facts()) == recipe


def test_the_default_recipe_is_the_papers() -> None:
    recipe = LaroRecipe()
    assert (recipe.matrix[:2], recipe.n_echoes, recipe.n_coils, recipe.acs) == ((80, 206), 10, 8, (20, 20))
    assert (recipe.first_unrolls, recipe.second_unrolls, recipe.batch, recipe.network_rate) == (2, 10, 1, 1e-3)
    assert recipe.network(10).unrolls == 10 and recipe.pixel_weight == recipe.decay_weight == 0
    assert recipe.patterns == ("8/2",) and recipe.sampling("8/2").n_samples == 80 * 206 // 8


def test_recipes_that_cannot_be() -> None:
    for wrong in (
        {"patterns": ("8",)},
        {"patterns": ("8/3",)},
        {"patterns": ()},
        {"patterns": ("400/2",)},
        {"second_steps": 0},
        {"mask_start": "random"},
        {"second_start": "zero_filled"},
        {"mask_draws": 0},
        {"network_rate": -1.0},
        {"network_rate": math.nan},
        {"network_rate": 0.0},
        {"mask_rate": -1.0},
        {"decay_weight": -1.0},
        {"decay_weight": 0.5, "n_echoes": 2},
        {"warmup_steps": -1},
        {"n_validation": -1},
        {"second_unrolls": 0},
        {"kind": "foo"},
        {"precision": "float16"},
        {"n_coils": 1},
    ):
        with pytest.raises(SettingError):
            replace(TINY, **wrong)
    assert LaroRecipe.from_facts(TINY.facts()) == TINY and replace(TINY, mask_rate=0.0).mask_rate == 0
    with pytest.raises(SettingError, match=r"impossible mask_rate; got -1\.0; expected a finite number, 0 or more"):
        replace(TINY, mask_rate=-1.0)


def test_scans_on_disk(folder: str, tmp_path: Path) -> None:
    scan = read_scan(Path(folder) / "s1.json")
    assert (
        torch.equal(scan.images, scans()[1].images) and scan.echo_times == scans()[1].echo_times and scan.key == ("train", 1)
    )
    supply = ScanFolder(folder)
    kinds = [supply.scan(split, 0).key[1] for split in ("train", "test", "validation")]
    assert kinds == [0, 1, 2] and supply.scan("train", 9).key[1] == 0
    with pytest.raises(DataError, match="too few"):
        ScanFolder(tmp_path)
    (Path(folder) / "s0.safetensors").write_bytes(b"x")
    with pytest.raises(WeightError, match="sha256"):
        read_scan(Path(folder) / "s0.json")


def test_a_short_readout_is_part_of_the_whole_one() -> None:
    scan = scans()[0]
    found = [cut_readout(scan, 4, seed) for seed in range(6)]
    begins = set()
    for cut in found:
        assert cut.images.shape == (3, 12, 20, 4) and cut.coil_maps.shape[-1] == 4 and bool(cut.brain.any(0).any(0).all())
        places = [x for x in range(11) if torch.equal(scan.images[..., x : x + 4], cut.images)]
        assert len(places) == 1 and torch.equal(scan.labels[..., places[0] : places[0] + 4], cut.labels)
        begins.add(places[0])
    assert len(begins) > 1 and cut_readout(scan, 14, 0) is scan


def test_scans_with_few_readout_positions_can_be_validated_on(tmp_path: Path) -> None:
    for number, scan in enumerate(scans()):
        write_scan(tmp_path / "scans", f"s{number}", cut_readout(scan, 5, number))
    recipe = replace(TINY, patterns=("3/2",), first_steps=0, second_steps=1, second_unrolls=1, n_validation=1)
    result, _ = run(recipe, tmp_path / "out", RunSettings(scans=str(tmp_path / "scans"), validate_every=1))
    assert result.finished and math.isfinite(result.figures["psnr_3/2"])
    write_scan(tmp_path / "scans", "s1", replace(scans()[0], brain=torch.zeros_like(scans()[0].brain)))
    with pytest.raises(DataError, match=r"s1\.json: a scan without a brain"):
        ScanFolder(tmp_path / "scans").scan("test", 0)
    write_scan(tmp_path / "scans", "s1", replace(scans()[0], images=scans()[0].images * math.nan))
    with pytest.raises(DataError, match=r"s1\.json: values that are not finite"):
        ScanFolder(tmp_path / "scans").scan("test", 0)


def test_scans_of_different_length_and_number_of_echoes_share_a_folder(tmp_path: Path) -> None:
    words = "--matrix 12 20 14 --voxel 7 9 --coils 4 --echoes 3 2 --planes 5 --output"
    command([*words.split(), str(tmp_path), "--count", "2"])
    command([*words.split(), str(tmp_path), "--count", "1", "--first", "2"])
    supply = ScanFolder(tmp_path)
    assert [tuple(supply.scan(split, 0).images.shape) for split in ("train", "test", "validation")] == [
        (n, 12, 20, 5) for n in (3, 2, 3)
    ]
    module = LaroModule(FROM_LLR)
    measured = MeasuredScans(
        supply, lambda pattern, number: module.pattern(pattern).draw(number),
        acs=FROM_LLR.acs, draws=2, seed=0, keep=4, device=torch.device("cpu"),
    ).measured("test", 0, "3/2")  # fmt: skip
    assert measured.mask.shape[0] == measured.start.shape[0] == 2


def test_scans_with_fewer_echoes_than_the_recipe_take_the_first_patterns(folder: str, tmp_path: Path) -> None:
    recipe = replace(TINY, n_echoes=5, first_steps=1, second_steps=1, n_validation=1)
    result, path = run(recipe, tmp_path / "out", RunSettings(scans=folder, validate_every=1))
    assert result.finished and "psnr_3/2" in load_weights(path).facts["validation"]
    assert read_mask(tmp_path / "out" / mask_name("3/2")).mask.shape == (5, 12, 20)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"matrix": (12, 24, 14)}, "planes of 12 x 20 .* planes of 12 x 24"),
        ({"matrix": (20, 12, 14)}, "planes of 12 x 20 .* planes of 20 x 12"),
        ({"n_echoes": 2}, "got 3 echoes.* expected 1 to 2 echoes"),
        ({"kind": "modl", "n_echoes": 5}, "got 3 echoes.* expected 5 echoes"),
    ],
)
def test_scans_that_do_not_fit_are_named_before_the_training_begins(
    folder: str, tmp_path: Path, change: dict[str, object], words: str
) -> None:
    recipe = replace(TINY, **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=rf"s0\.json: a scan that does not fit the training; .*{words}"):
        run(recipe, tmp_path / "out", RunSettings(scans=folder))
    assert not (tmp_path / "out").exists()


def test_measured_scans_of_a_folder_are_told_apart(folder: str) -> None:
    for path in sorted(Path(folder).glob("*.json")):  # as a converter writes them: every file says the same of itself
        write_scan(folder, path.stem, replace(read_scan(path), key=("measured", 0)))
    write_scan(folder, "s3", replace(scans()[0], key=("measured", 0)))
    module = LaroModule(FROM_LLR)
    supply = MeasuredScans(
        ScanFolder(folder), lambda pattern, number: module.pattern(pattern).draw(number),
        acs=FROM_LLR.acs, draws=2, seed=0, keep=4, device=torch.device("cpu"),
    )  # fmt: skip
    one, other, again = (supply.measured("train", index, "3/2") for index in (0, 1, 2))
    assert again is one and not torch.equal(one.scan.images, other.scan.images)
    assert not torch.equal(one.mask, other.mask)  # each its own draw


def test_the_plain_command(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--channels 4 --features 4 4 --patterns 3/2 --matrix 12 20 14 --n-echoes 3 --n-coils 4 --acs 4 4 --first-steps 1"
    more = f"--second-steps 1 --second-unrolls 1 --n-validation 0 --device cpu --scans {folder} --output {tmp_path / 'out'}"
    main([*words.split(), *more.split()])
    assert "phase2 1/1" in (text := capsys.readouterr().out) and "finished" in text
