"""Training PINQI in miniature: it learns, resumes to the bit in either phase, and leaves weights that the method accepts."""

from __future__ import annotations

import csv
import json
import math
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from recon_core.errors import DataError, ReconError, SettingError
from recon_core.methods.pinqi import model
from recon_core.methods.pinqi.model import ABLATIONS, Pinqi
from recon_core.methods.pinqi.noise_rule import DEFAULT_RULE, NoiseRule
from recon_core.methods.pinqi.weights import load_weights
from recon_core.simulation.brainweb import open_anatomy
from recon_core.simulation.head_atlas import HeadAtlas
from recon_core.simulation.quantitative_brain import BrainBatch, QuantitativeBrains
from recon_core.solvers.linear_layer import LinearSettings, UntrustedGradient
from recon_core.training.checkpoint import WeightError
from recon_core.training.loop import LoopSettings, Progress, train
from recon_core.training.pinqi import RunSettings, main, parser, run
from recon_core.training.pinqi_samples import HeldBatches, NoiseFactors
from recon_core.training.pinqi_tasks import (
    EndToEnd,
    PinqiRecipe,
    Pretraining,
    TrainingSamples,
    _met,
    posed,
    typical_amplitude,
)
from recon_core.training.runs import alone_in
from tests.recon_core.volume_writers import nifti

TINY = PinqiRecipe(
    ablation="g1", size=32, times=(0.5, 1.5, 8.0), n_coils=3, accelerations=(2.0,), batch=1, epochs=0.004, pretrain_epochs=0.002,
    samples_per_epoch=1000, n_validation=1,
)  # fmt: skip
JOINT = replace(
    TINY, pretrain_epochs=0.0, start="llr", held=2, columns=16, noise_factors="learned", image_weight=10.0, image_rate=1e-3
)  # as the shipped weights were trained end to end
CPU = RunSettings(device="cpu", validate_every=2)
SMALL = {"parameter": {"features": (16, 16), "n_groups": 4}, "image": {"features": (8, 8), "n_groups": 4}}


@pytest.fixture(scope="module")
def atlas() -> HeadAtlas:
    return HeadAtlas()


def small_network(recipe: PinqiRecipe) -> Pinqi:
    torch.manual_seed(0)
    return Pinqi(recipe.samples.model, ABLATIONS[recipe.ablation], networks=SMALL)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    result, weights = run(TINY, folder, CPU)
    assert (result.step, result.finished, weights) == (4, True, folder / "pinqi.json")
    return folder


def test_a_run_leaves_recipe_logs_pictures_and_weights(whole: Path) -> None:
    assert PinqiRecipe.from_facts(json.loads((whole / "recipe.json").read_text())) == TINY
    with open(whole / "training" / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert "nrmse=" in rows[1]["validation"] and rows[0]["validation"] == ""
    picture = matplotlib.image.imread(whole / "training" / "t1_0_000004.png")
    assert picture.shape == (32, 96) and picture.std() > 0.01
    facts = json.loads((whole / "pinqi.json").read_text())
    assert facts["finished"] and facts["steps_done"] == {"pretraining": 2, "training": 4}
    assert set(facts["validation"]) == {"nrmse", "mae", "ssim"} and len(facts["sha256"]) == 64


def test_the_weights_are_what_the_method_loads(whole: Path) -> None:
    trained = load_weights(whole / "pinqi.json")
    assert trained.times == TINY.times and 0.5 < trained.amplitude < 1.5
    assert trained.network.settings == ABLATIONS["g1"] and not trained.network.training
    brains = QuantitativeBrains(HeadAtlas(), TINY.samples, seed=1)
    batch = brains.batch("test", [0])
    operator = batch.operator()
    found = trained.network(operator, operator.adjoint(operator.enter_data(batch.kspace)))
    assert found.parameters.isfinite().all()


@pytest.mark.parametrize(("phase", "step"), [("pretraining", 1), ("pretraining", 2), ("training", 3)])
def test_a_run_stopped_in_either_phase_ends_with_the_same_bits(whole: Path, tmp_path: Path, phase: str, step: int) -> None:
    def stop(name: str, p: Progress) -> None:
        if (name, p.step) == (phase, step):
            signal.raise_signal(signal.SIGTERM)

    first, _ = run(TINY, tmp_path, CPU, stop)
    assert not first.finished
    stated = json.loads((tmp_path / "pinqi.json").read_text())
    assert not stated["finished"] and stated["steps_done"][phase] == step
    assert (
        phase == "training" or stated["steps_done"]["training"] == 0
    )  # asked in the last step of a phase, the next does not begin
    checkpoint = tmp_path / "pretraining" / "checkpoint.json"
    checkpoint.write_text(json.dumps({**json.loads(checkpoint.read_text()), "minutes": 100.0}))
    result, weights = run(TINY, tmp_path, replace(CPU, resume=True))
    assert result.finished
    assert json.loads(weights.read_text())["minutes"] == pytest.approx(result.minutes, abs=0.01) and result.minutes > 100
    assert (tmp_path / "pinqi.safetensors").read_bytes() == (whole / "pinqi.safetensors").read_bytes()


def test_a_training_may_begin_from_llr_images_and_from_weights_and_says_so(whole: Path, tmp_path: Path) -> None:
    recipe, origin = replace(TINY, start="llr", pretrain_epochs=0.0, epochs=0.001), whole / "pinqi.json"
    settings = replace(CPU, initial=str(origin), validate_every=0)
    _, weights = run(replace(recipe, network_rate=1e-12, lambda_rate=1e-12, embedding_rate=1e-12), tmp_path, settings)
    facts, before = json.loads(weights.read_text()), load_weights(origin).network
    assert (
        facts["recipe"]["initial_sha256"] == json.loads(origin.read_text())["sha256"] and facts["network"]["start"] == "llr"
    )
    after = load_weights(weights).network
    for (name, a), b in zip(after.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-8), name
    brains = QuantitativeBrains(HeadAtlas(), TINY.samples, seed=1)
    batch = brains.batch("test", [0])
    operator = batch.operator()
    rhs = operator.adjoint(operator.enter_data(batch.kspace))
    with pytest.raises(DataError, match="given images"):
        after(operator, rhs)
    true = operator.enter_image(batch.images)
    assert not torch.equal(after(operator, rhs, true).parameters, before(operator, rhs).parameters)


def test_pixels_without_a_trusted_gradient_are_logged(whole: Path, atlas: HeadAtlas) -> None:
    with open(whole / "training" / "log.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert all(0 <= float(row["singular"]) < 32**2 and float(row["unconverged"]) >= 0 for row in rows)
    recipe = replace(TINY, ablation="c")  # nothing but the data holds the parameters: hardly anything in air
    task = EndToEnd(small_network(recipe), recipe, atlas, torch.device("cpu"), 0)
    loss, figures = task.loss(0)
    singular = figures["singular"]
    assert callable(singular) and math.isnan(singular())  # nobody knows yet
    with pytest.warns(UntrustedGradient, match="nonlinear"):
        loss.backward()
    assert 0 < singular() < 6 * 32**2


def test_fits_of_predictions_and_images_count_too(whole: Path, atlas: HeadAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prediction by kernels ends in a fit of its own: both its gradient and that of the images may belong to another point."""
    with open(whole / "training" / "log.csv", newline="", encoding="utf-8") as file:
        assert all(float(row["images_untrusted"]) == 0 for row in csv.DictReader(file))
    recipe = replace(TINY, prediction="kernel")
    torch.manual_seed(0)
    variant = replace(ABLATIONS["g1"], prediction="kernel")
    network = Pinqi(recipe.samples.model, variant, networks=SMALL, linear=LinearSettings(max_iterations=2))
    task = EndToEnd(network, recipe, atlas, torch.device("cpu"), 0)
    before = task.loss(0)[1]["unconverged"]
    monkeypatch.setattr(model, "FIT_STEPS", 1)
    loss, figures = task.loss(0)
    assert isinstance(before, float) and isinstance(figures["unconverged"], float) and figures["unconverged"] > before + 100
    untrusted = figures["images_untrusted"]
    assert callable(untrusted) and math.isnan(untrusted())
    with pytest.warns(UntrustedGradient):
        loss.backward()
    assert untrusted() == 1


def test_the_published_solver_can_be_trained_with_and_is_recorded(whole: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, nonlinear_solver="lbfgs", pretrain_epochs=0.0, epochs=0.001, n_validation=0)
    _, weights = run(recipe, tmp_path, replace(CPU, validate_every=0))
    assert json.loads(weights.read_text())["recipe"]["nonlinear_solver"] == "lbfgs"
    assert PinqiRecipe.from_facts(json.loads((tmp_path / "recipe.json").read_text())) == recipe
    # trainings from before there was a choice are the same trainings
    assert "nonlinear_solver" not in json.loads((whole / "recipe.json").read_text())
    with pytest.raises(SettingError, match="no such solver"):
        replace(TINY, nonlinear_solver="newton")
    assert parser().parse_args(["--output", "x", "--nonlinear-solver", "lbfgs"]).nonlinear_solver == "lbfgs"


def test_a_folder_with_a_training_is_not_overwritten_or_mixed(whole: Path) -> None:
    with pytest.raises(SettingError, match="--resume"):
        run(TINY, whole, CPU)
    with pytest.raises(SettingError, match="seed: 0, not 1"):
        run(replace(TINY, seed=1), whole, replace(CPU, resume=True))


def test_a_training_goes_on_with_the_heads_it_was_begun_with(tmp_path: Path) -> None:
    heads, output = tmp_path / "heads", tmp_path / "out"
    heads.mkdir()
    for i in range(3):
        nifti(heads / f"subject0{i}_crisp_v.nii", np.full((40, 80, 80), 1 + i, np.uint8))
    short = replace(TINY, epochs=0.001, pretrain_epochs=0.0, n_validation=0)
    run(short, output, replace(CPU, brainweb=str(heads)))
    nifti(heads / "subject01_crisp_v.nii", np.full((40, 80, 80), 3, np.uint8))
    with pytest.raises(SettingError, match="heads: "):
        run(short, output, replace(CPU, brainweb=str(heads), resume=True))
    with pytest.raises(SettingError, match="not mni152"):
        run(short, output, replace(CPU, resume=True))


def test_a_part_of_the_samples_from_the_atlas_is_told_with_the_weights(tmp_path: Path) -> None:
    for i in range(3):
        nifti(tmp_path / f"subject0{i}_crisp_v.nii", np.full((40, 80, 80), 1 + i, np.uint8))
    short = replace(TINY, epochs=0.001, pretrain_epochs=0.0, n_validation=0, atlas_share=0.5)
    _, weights = run(short, tmp_path / "out", replace(CPU, brainweb=str(tmp_path)))
    facts = json.loads(weights.read_text(encoding="utf-8"))
    assert facts["anatomy"].startswith("brainweb, 0.5 mni152") and facts["recipe"]["atlas_share"] == 0.5
    assert "atlas_share" not in TINY.facts()
    for share in (-0.1, 1.0, math.nan):
        with pytest.raises(SettingError, match="no part of the samples"):
            replace(TINY, atlas_share=share)
    with pytest.raises(SettingError, match="add --brainweb FOLDER"):
        run(short, tmp_path / "other", CPU)


def test_a_damaged_head_is_found_before_the_training_begins(tmp_path: Path) -> None:
    """Once it ended the training that first drew it, and with the head mended the folder was one of other heads."""
    heads, output = tmp_path / "heads", tmp_path / "out"
    heads.mkdir()
    for i in range(20):
        nifti(heads / f"subject{i:02d}_crisp_v.nii", np.full((12, 12, 12), 1 + i % 11, np.uint8))
    damaged = heads / "subject07_crisp_v.nii"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    short = replace(TINY, epochs=0.001, pretrain_epochs=0.0, n_validation=0)
    with pytest.raises(DataError, match="subject07_crisp_v"):
        run(short, output, replace(CPU, brainweb=str(heads)))
    assert not output.exists()


def test_devices_and_ablations_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    for device in ("cuda:99", "meta"):
        with pytest.raises(SettingError, match="no such device"):
            run(TINY, tmp_path, replace(CPU, device=device))
    with pytest.raises(SettingError, match="unknown ablation"):
        replace(TINY, ablation="z")


@pytest.mark.parametrize("size", [32, 40, 59])
def test_a_size_with_fewer_lines_than_calibration_lines_is_refused(size: int) -> None:
    with pytest.raises(SettingError, match=rf"{size} lines at acceleration [5-8]; expected 8 or more\. take a size of"):
        PinqiRecipe(size=size)
    assert PinqiRecipe(size=60).size == 60 and replace(TINY, size=32, accelerations=(4.0,)).size == 32
    recipe = replace(TINY, size=60, accelerations=(8.0,))  # the smallest of this acceleration: its samples can be made
    assert int(QuantitativeBrains(HeadAtlas(), recipe.samples).batch("train", [0]).mask.sum(-1).min()) == 8


def test_numbers_that_cannot_be_trained_with_are_refused_before_anything_is_written() -> None:
    wrong: list[dict[str, object]] = [{"accelerations": (a,)} for a in (math.nan, math.inf, 0.5, -2.0)]
    wrong += [{name: value} for name in ("network_rate", "lambda_rate", "image_rate") for value in (-1.0, math.nan)]
    wrong += [{"epochs": math.nan}, {"pretrain_epochs": math.nan}, {"warmup_steps": -1}, {"ema_decay": 1.0}]
    wrong += [{"times": (-1.0, 8.0)}, {"times": (math.nan, 8.0)}, {"columns": 33}, {"rate_spread": math.nan}]
    wrong += [{"times": times} for times in ((0.5,), (0.5, 8.0, 0.5), (0.5, 0.501, 8.0), (500.0, 1500.0, 8000.0))]
    wrong += [{"network_rate": 0.0}, {"samples_per_epoch": 0}, {"n_coils": 0}, {"accelerations": ()}]
    for change in wrong:
        with pytest.raises(ReconError):
            print(replace(TINY, **change))  # type: ignore[arg-type]  # shown where it is not refused
    assert replace(TINY, image_rate=0.0, lambda_rate=0.0).lambda_rate == 0


def test_the_losses_are_the_published_ones(atlas: HeadAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out: parameters without factors, brain 1.01 and elsewhere 0.01, the first prediction 0.1 and the others 0.05."""
    recipe = replace(TINY, ablation="g2", batch=2, first_weight=0.1, other_weight=0.05)
    network = small_network(recipe)
    task = EndToEnd(network, recipe, atlas, torch.device("cpu"), 0)
    batch = task.samples.batch(3)
    operator = batch.operator()
    with torch.no_grad():
        found = network(operator, operator.adjoint(operator.enter_data(batch.kspace))).predictions
        loss, _ = task.loss(3)
        weight = batch.brain[:, None] + 0.01
        first, second, last = (float((weight * (p.mT - batch.parameters) ** 2).mean()) for p in found)
    assert float(loss) == pytest.approx(last + 0.1 * first + 0.05 * second, rel=1e-4)

    task_h = EndToEnd(
        small_network(replace(recipe, ablation="h")), replace(recipe, ablation="h"), atlas, torch.device("cpu"), 0
    )
    with torch.no_grad():
        images = task_h.network(operator, operator.adjoint(operator.enter_data(batch.kspace))).images.mT
        weight = 0.9 * batch.brain[:, None] + 0.1
        error = float((weight * (images - batch.images).abs() ** 2).mean()) / 2
        assert float(task_h.loss(3)[0]) == pytest.approx(error, rel=1e-4)


def test_pretraining_mixes_truth_and_first_images_as_published(atlas: HeadAtlas) -> None:
    """The first call sees ``y_0``, the later ones ``r y_truth + (1 - r) y_0`` and noise of at most the data's; brain 1, elsewhere 0.05."""
    recipe = replace(TINY, ablation="g2", batch=2)
    network = small_network(recipe)
    task = Pretraining(network, recipe, atlas, torch.device("cpu"), 0)
    batch = task.samples.batch(0)
    held = task._posed(batch)
    first = network.first_images(batch.operator(), batch.operator().adjoint(batch.operator().enter_data(batch.kspace)))
    call, share, quiet = torch.tensor([0.0, 0.99]), torch.tensor([0.5, 0.25]), torch.zeros(2)
    tags, images = _met(held, (0.0, 1.5, 2.0), call, share, quiet)
    assert tags.tolist() == [0.0, 2.0] and torch.equal(images[0], first[0])
    assert torch.allclose(images[1], 0.75 * first[1] + 0.25 * batch.images[1].mT, atol=1e-6)
    noisy = _met(held, (0.0, 1.5, 2.0), call, share, torch.tensor([1.0, 1.0]))[1] - images
    assert not noisy[0].any()
    assert float(noisy[1].abs().square().mean().sqrt()) == pytest.approx(float(batch.noise_std[1]), rel=0.1)
    with torch.no_grad():
        _, figures = task._loss(held, torch.zeros(2), share, quiet)
        parameters, clean = network.predict_parameters(first, 0.0), network.predict_images(first, 0.5)
    weight = torch.clamp(batch.brain[:, None] + 0.05, max=1.0)
    expected = float((weight * (parameters.mT - batch.parameters) ** 2).mean())
    assert figures["parameter_loss"] == pytest.approx(expected, rel=1e-4)
    expected = float(((0.9 * batch.brain[:, None] + 0.1) * (clean.mT - batch.images).abs() ** 2).mean())
    assert figures["image_loss"] == pytest.approx(expected, rel=1e-4)


def test_shares_of_the_truth_are_squares_of_uniform_numbers(atlas: HeadAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Pretraining(small_network(TINY), TINY, atlas, torch.device("cpu"), 0)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(task, "_loss", lambda posed, call, share, noise: (seen.append(share), {}))
    monkeypatch.setattr(task, "_posed", lambda batch: _Truth(torch.zeros(4000, 1)))
    task.loss(0)
    assert float(seen[0].mean()) == pytest.approx(1 / 3, abs=0.03) and float(seen[0].median()) == pytest.approx(
        0.25, abs=0.03
    )


@dataclass(frozen=True)
class _Truth:
    truth: torch.Tensor


def test_the_amplitude_is_that_of_the_samples(atlas: HeadAtlas) -> None:
    """Twice as bright samples have twice the amplitude."""
    brains = QuantitativeBrains(atlas, TINY.samples)

    class Brighter(QuantitativeBrains):
        def batch(self, split: str, indices: Sequence[int]) -> BrainBatch:
            plain = super().batch(split, indices)
            return replace(plain, kspace=2 * plain.kspace, noise_std=2 * plain.noise_std)

    brighter = Brighter(atlas, TINY.samples)
    assert typical_amplitude(brighter, 3) == pytest.approx(2 * typical_amplitude(brains, 3), rel=1e-4)


def overfitted(recipe: PinqiRecipe, atlas: HeadAtlas, folder: Path, steps: int) -> list[float]:
    """Losses while learning the same two samples again and again."""
    network = small_network(recipe)
    task = EndToEnd(network, replace(recipe, network_rate=0.01), atlas, torch.device("cpu"), 0)
    always = task.samples.batch(0)
    task.samples.batch = lambda step: always  # type: ignore[method-assign]
    losses: list[float] = []
    train(task, LoopSettings(steps=steps, warmup_steps=3), folder, progress=lambda p: losses.append(p.loss))
    return losses


@pytest.mark.parametrize("ablation", ["g1", "e", "h"])
def test_two_samples_can_be_learned(ablation: str, atlas: HeadAtlas, tmp_path: Path) -> None:
    losses = overfitted(replace(TINY, ablation=ablation, batch=2), atlas, tmp_path, steps=15)
    assert losses[-1] < 0.85 * losses[0], losses[::6]


def test_pretraining_teaches_both_networks_and_nothing_else(atlas: HeadAtlas, tmp_path: Path) -> None:
    network = small_network(TINY)
    task = Pretraining(network, TINY, atlas, torch.device("cpu"), 0)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    seen: list[dict[str, float]] = []
    train(
        task,
        LoopSettings(steps=20, warmup_steps=2, clip_norm=10.0),
        tmp_path,
        progress=lambda p: seen.append(dict(p.figures)),
    )
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("lambda"), name
    assert sum(f["parameter_loss"] for f in seen[-5:]) < sum(f["parameter_loss"] for f in seen[:5])


def test_pretraining_uses_the_tags_and_only_the_tags_of_the_loop(atlas: HeadAtlas, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once it tagged mixtures with their share of the truth, 0 to 1, where the loop calls with 0 and 1.2 to 2."""
    called: dict[str, set[float]] = {"parameter": set(), "image": set()}
    plain = Pinqi._network

    def noting(self: Pinqi, name: str, net: object, images: torch.Tensor, tags: torch.Tensor) -> torch.Tensor:
        called[name] |= {round(float(t), 5) for t in tags}
        return plain(self, name, net, images, tags)  # type: ignore[arg-type]

    monkeypatch.setattr(Pinqi, "_network", noting)
    recipe = replace(TINY, ablation="proposed", reuse=100)
    network = small_network(recipe)
    task = Pretraining(network, recipe, atlas, torch.device("cpu"), 0)
    with torch.no_grad():
        for step in range(60):
            task.loss(step)
        taught, called = called, {"parameter": set(), "image": set()}
        batch = task.samples.batch(0)
        operator = batch.operator()
        network(operator, operator.adjoint(operator.enter_data(batch.kspace)))
    assert taught == called
    assert called == {"parameter": {0.0, 1.2, 1.4, 1.6, 1.8, 2.0}, "image": {0.2, 0.4, 0.6, 0.8, 1.0}}


def test_one_network_is_pretrained_and_training_left_out_where_asked(atlas: HeadAtlas, tmp_path: Path) -> None:
    recipe = replace(TINY, epochs=0.0, pretrain_networks="parameter", prediction="kernel", t1_weight=0.1)
    result, weights = run(recipe, tmp_path, CPU)
    facts = json.loads(weights.read_text())
    assert result.finished and facts["finished"] and facts["steps_done"] == {"pretraining": 2, "training": 0}
    assert facts["network"]["prediction"] == "kernel"
    torch.manual_seed(0)
    task = Pretraining(small_network(recipe), recipe, atlas, torch.device("cpu"), 0)
    assert {g.name for g in task.groups()} == {"parameter_net", "embedding"}
    with pytest.raises(SettingError, match="pretrain_networks"):
        replace(TINY, pretrain_networks="none")


def test_a_kernel_network_begins_from_a_direct_one(whole: Path, tmp_path: Path) -> None:
    recipe = replace(TINY, prediction="kernel", pretrain_epochs=0.001, epochs=0.0)
    _, weights = run(recipe, tmp_path, replace(CPU, initial=str(whole / "pinqi.json"), validate_every=0))
    assert load_weights(weights).network.settings.prediction == "kernel"


def test_a_part_of_the_samples_has_other_rates(atlas: HeadAtlas) -> None:
    plain = QuantitativeBrains(atlas, TINY.samples)
    some = plain.with_recipe(rate_spread=2.2, spread_part=0.5)
    ratios = [(some.batch("train", [i]).parameters[0, 2] / plain.batch("train", [i]).parameters[0, 2]) for i in range(12)]
    spread = [float(r.median()) for r in ratios]
    assert 2 <= sum(abs(s - 1) < 1e-6 for s in spread) <= 10 and all(1 / 2.3 < s < 2.3 for s in spread)


def test_groups_hold_every_weight_once_at_the_published_rates(atlas: HeadAtlas) -> None:
    for name in ABLATIONS:
        task = EndToEnd(
            small_network(replace(TINY, ablation=name)), replace(TINY, ablation=name), atlas, torch.device("cpu"), 0
        )
        groups = {g.name: g for g in task.groups()}
        held = [id(p) for g in groups.values() for p in g.parameters]
        assert len(held) == len(set(held)) and set(held) == {id(p) for p in task.module.parameters()}
    assert {n: (g.learning_rate, g.weight_decay) for n, g in groups.items()} == {
        "image_net": (0.004, 0.01),
        "lambdas": (0.001, 1e-5),
    }


def test_phases_and_steps_draw_different_samples(atlas: HeadAtlas) -> None:
    brains = QuantitativeBrains(atlas, TINY.samples)
    one, two = TrainingSamples(brains, 2), TrainingSamples(brains, 2, first=4)
    assert torch.equal(one.batch(2).parameters, two.batch(0).parameters)
    assert not torch.equal(one.batch(0).parameters, one.batch(1).parameters)


def test_the_published_schedule() -> None:
    recipe = PinqiRecipe()
    assert recipe.steps(80) == 9760 and recipe.steps(80) * 16 == 156_160
    loop = recipe.loop(80, pretraining=False)
    assert (loop.warmup_steps, loop.clip_norm, loop.skip_above) == (1500, 1.0, 5.0)
    assert loop.rate(loop.steps) * recipe.network_rate == pytest.approx(1e-4)
    assert recipe.loop(1, pretraining=True).clip_norm == 10.0


def test_the_typical_amplitude_follows_the_samples(atlas: HeadAtlas) -> None:
    assert 0.7 < typical_amplitude(QuantitativeBrains(atlas, TINY.samples), 8) < 1.4


def test_the_plain_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--ablation g1 --size 32 --times 0.5 8 --n-coils 2 --accelerations 2 --batch 1 --samples-per-epoch 100"
    words = f"--output {tmp_path / 'out'} {options} --epochs 0.01 --pretrain-epochs 0 --n-validation 0 --device cpu"
    main(words.split())
    assert "training 1/1" in (text := capsys.readouterr().out) and "finished" in text
    assert (tmp_path / "out" / "pinqi.safetensors").is_file() and not (tmp_path / "out" / "pretraining").exists()
    with alone_in(tmp_path / "out"), pytest.raises(SystemExit):
        main([*words.split(), "--resume"])
    assert "out: the folder's training is running already" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main([*words.split()[2:], "--output", str(tmp_path / "file" / "out")])
    assert "folder cannot be used; got Not a directory" in (said := capsys.readouterr().err) and "Traceback" not in said
    given = parser().parse_args(["--output", "x", "--resume", "--max-minutes", "3"])
    assert given.resume and given.max_minutes == 3.0 and given.seed == 0


def test_held_batches_come_once_a_pass_and_mirrored_ones_are_the_same_problem(atlas: HeadAtlas) -> None:
    samples = TrainingSamples(QuantitativeBrains(atlas, TINY.samples).with_recipe(columns=16), 1)
    made: list[int] = []

    def make(number: int) -> BrainBatch:
        made.append(number)
        return samples.batch(number)

    held = HeldBatches(make, lambda batch: posed(batch, "llr"), 3, seed=1)
    seen = [held.at(step) for step in range(12)]
    assert len(set(made)) == len(made)  # each once, whatever was passed over
    amounts = [round(float(batch.images.abs().sum()), 3) for batch, _ in seen]
    assert all(len(set(amounts[i : i + 3])) == 3 and set(amounts[i : i + 3]) == set(amounts[:3]) for i in (3, 6, 9))
    again = HeldBatches(samples.batch, lambda batch: posed(batch, "llr"), 3, seed=1)  # as a resumed training
    assert torch.equal(again.at(7)[0].images, seen[7][0].images)
    same = [i for i in range(12) if amounts[i] == amounts[0]]
    images = [seen[i][0].images for i in same]
    assert any(torch.equal(images[0], other.flip(-1)) for other in images)
    for batch, (operator, rhs, start) in seen:
        measured = operator.forward(operator.enter_image(batch.images))
        noise = operator.enter_data(batch.kspace) - measured
        assert float(noise.abs().max()) < 6 * float(batch.noise_std[0])
        assert torch.allclose(rhs, operator.adjoint(operator.enter_data(batch.kspace)), atol=1e-5)
        assert start is not None and start.shape == rhs.shape
        assert float((start - operator.enter_image(batch.images)).abs().mean()) < 0.1


@pytest.mark.parametrize("noise", [1e-4, 0.002, 0.01, 0.3])
def test_factors_begin_as_the_rule_says_and_can_be_learned(noise: float) -> None:
    rule = NoiseRule((0.001, 0.01, 0.04), (0.1, 0.3, 2.0), (1.0, 3.0, 9.0), (1.0, 1.0, 2.0))
    for one in (replace(rule, acceleration_power=1.5), NoiseRule((0.01,), (0.1,), (1.0,), (2.0,))):
        factors, stated = NoiseFactors(one, learned=True), one.at(noise, 7.0)
        found = factors.at(noise, 7.0)
        for name in ("image", "signal", "parameter"):
            assert getattr(found, name).item() == pytest.approx(getattr(stated, name), rel=1e-4)
        assert found.noise == noise and factors.rule().image == pytest.approx(one.image, rel=1e-5)
        assert factors.rule().acceleration_power == one.acceleration_power
        assert isinstance(found.image, torch.Tensor)
        found.image.backward()
        assert factors.get_parameter("image").grad is not None
    assert not list(p for p in NoiseFactors(rule, learned=False).parameters() if p.requires_grad)


def test_a_joint_training_states_its_rule_and_resumes_to_the_bit(tmp_path: Path) -> None:
    _, whole = run(JOINT, tmp_path / "whole", CPU)

    def stop(name: str, p: Progress) -> None:
        if p.step == 2:
            signal.raise_signal(signal.SIGTERM)

    run(JOINT, tmp_path / "parts", CPU, stop)
    _, parts = run(JOINT, tmp_path / "parts", replace(CPU, resume=True))
    assert parts.with_suffix(".safetensors").read_bytes() == whole.with_suffix(".safetensors").read_bytes()
    facts, again = json.loads(whole.read_text()), json.loads(parts.read_text())
    assert facts["noise_rule"] == again["noise_rule"] and facts["recipe"]["held"] == 2
    trained = load_weights(whole)
    assert trained.noise_rule.facts() == facts["noise_rule"] and trained.noise_rule.image != DEFAULT_RULE.image
    # the next one begins with what this one learned
    kept = replace(JOINT, lambda_rate=1e-12, epochs=0.001)
    _, later = run(kept, tmp_path / "next", replace(CPU, initial=str(whole)))
    assert load_weights(later).noise_rule.image == pytest.approx(trained.noise_rule.image, rel=1e-5)
    with pytest.raises(SettingError, match="initial"):
        run(kept, tmp_path / "next", replace(CPU, resume=True))
    # and one that would forget the rule is refused: its weights would be used with another one
    with pytest.raises(SettingError, match=r"pinqi\.json: lambdas that were learned with factors.*--noise-factors fixed"):
        run(replace(kept, noise_factors="none"), tmp_path / "none", replace(CPU, initial=str(whole)))
    assert not (tmp_path / "none").exists()


def test_fixed_factors_stay_and_need_one_sample_a_step(tmp_path: Path) -> None:
    _, weights = run(replace(JOINT, noise_factors="fixed", epochs=0.001), tmp_path, CPU)
    assert load_weights(weights).noise_rule.image == pytest.approx(DEFAULT_RULE.image)
    with pytest.raises(SettingError, match="one sample"):
        replace(JOINT, batch=2)
    with pytest.raises(SettingError, match="noise_factors"):
        replace(JOINT, noise_factors="some")


def test_fewer_iterations_take_the_lambdas_of_the_same_parts_of_the_way(tmp_path: Path) -> None:
    recipe = replace(TINY, ablation="proposed", pretrain_epochs=0.0, epochs=0.001, lambda_rate=1e-12, n_validation=0)
    _, five = run(recipe, tmp_path / "five", replace(CPU, validate_every=0))
    settings = replace(CPU, validate_every=0, initial=str(five))
    _, three = run(replace(recipe, n_iterations=3), tmp_path / "three", settings)
    long, short = load_weights(five).network, load_weights(three).network
    assert short.settings.n_iterations == 3 and long.lambda_q is not None and short.lambda_q is not None
    assert torch.allclose(short.lambda_q(), long.lambda_q()[[0, 2, 4]], atol=1e-6)


def test_a_variant_begins_with_the_weights_of_the_parts_that_it_has(tmp_path: Path) -> None:
    recipe = replace(JOINT, ablation="proposed", epochs=0.001)
    _, whole = run(recipe, tmp_path / "whole", CPU)
    tensors = load_weights(whole).network.state_dict()
    still = replace(recipe, network_rate=1e-12, image_rate=1e-12, lambda_rate=1e-12, embedding_rate=1e-12)
    for name, lost in {"a": {"lambda_q", "lambda_p"}, "h": {"lambda_q", "lambda_p", "parameter_net", "embedding"}}.items():
        _, weights = run(replace(still, ablation=name), tmp_path / name, replace(CPU, initial=str(whole)))
        own = load_weights(weights).network.state_dict()
        assert {key.split(".")[0] for key in tensors} - {key.split(".")[0] for key in own} == lost
        assert all(torch.allclose(value, tensors[key], atol=1e-6) for key, value in own.items())
    _, stepwise = run(replace(still, ablation="e"), tmp_path / "e", replace(CPU, initial=str(whole)))
    own = load_weights(stepwise).network.state_dict()
    assert set(own) - set(tensors) == {"step_sizes.raw"}
    assert all(torch.allclose(own[key], value, atol=1e-6) for key, value in tensors.items())
    with pytest.raises(WeightError, match="another network"):  # the other way there is nothing to begin with
        run(recipe, tmp_path / "back", replace(CPU, initial=str(tmp_path / "h" / "pinqi.json")))


def test_trainings_share_held_batches_and_end_with_the_bits_that_they_have_by_themselves(tmp_path: Path) -> None:
    recipe = replace(JOINT, ablation="h")
    shared = EndToEnd(small_network(recipe), recipe, open_anatomy(None), torch.device("cpu"), 0).held
    assert shared is not None
    _, one = run(recipe, tmp_path / "one", CPU, held=shared)
    _, other = run(recipe, tmp_path / "other", CPU)
    assert one.with_suffix(".safetensors").read_bytes() == other.with_suffix(".safetensors").read_bytes()


@pytest.mark.parametrize("ablation", ["proposed", "h", "i"])
def test_what_the_image_network_gives_is_judged_too(atlas: HeadAtlas, ablation: str) -> None:
    losses = []
    for weight in (0.0, 10.0):
        recipe = replace(TINY, ablation=ablation, image_weight=weight)
        losses.append(EndToEnd(small_network(recipe), recipe, atlas, torch.device("cpu"), 0).loss(0)[0].item())
    assert losses[1] > losses[0] + 1e-3
    groups = EndToEnd(small_network(JOINT), JOINT, atlas, torch.device("cpu"), 0).groups()
    rates = {g.name: g.learning_rate for g in groups}
    assert rates["image_net"] == 1e-3 and rates["parameter_net"] == JOINT.network_rate
