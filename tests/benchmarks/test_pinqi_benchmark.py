"""The comparison of PINQI with others: same fit for all, known answers come back, scores are kept and added to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import common, pinqi, pinqi_gpu, pinqi_phantom, pinqi_server, pinqi_speed, pinqi_variants
from benchmarks.pinqi import FIGURES
from benchmarks.pinqi_methods import (
    SWITCHED_OFF,
    T1_RANGE,
    Answer,
    Sample,
    classical,
    fitted,
    learned,
    switched_off,
    zero_filled,
)
from recon_core.methods.pinqi.model import PinqiSettings
from recon_core.methods.pinqi.weights import TrainedPinqi, load_weights
from recon_core.simulation.head_atlas import HeadAtlas
from recon_core.simulation.options import settings_for
from recon_core.simulation.quantitative_brain import SATURATION_TIMES, QuantitativeBrains, SampleRecipe
from recon_core.simulation.scan import simulate_scan
from recon_core.simulation.tubes import PROTOCOL
from tests.recon_core.pinqi.saturation_scan import save_network
from tests.recon_core.volume_writers import nifti


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No networks: the signal model alone."""
    return save_network(tmp_path_factory.mktemp("weights"), times=SATURATION_TIMES)


@pytest.fixture(scope="module")
def trained(weights: Path) -> TrainedPinqi:
    return load_weights(weights)


def sample(acceleration: float, noise: float) -> Sample:
    recipe = SampleRecipe(size=48, n_coils=4, accelerations=(acceleration,), acs=8, noise=(noise, noise))
    return Sample.of(QuantitativeBrains(HeadAtlas(), recipe, seed=3).batch("test", [0]), recipe)


def test_complete_data_give_every_method_the_true_map(trained: TrainedPinqi) -> None:
    s = sample(1.0, 1e-5)
    for name, method in {"zero": zero_filled, "cg": classical("cg_sense"), "pinqi": learned(trained)}.items():
        answer = method(s)
        assert s.score(answer.t1)["nrmse"] < 0.01, name
        assert answer.cpu_s > 0 and answer.wall_s > 0
        assert T1_RANGE[0] <= answer.t1.min() and answer.t1.max() <= T1_RANGE[1]


def test_figures_are_of_the_brain_of_all_tissue_and_of_the_whole_image() -> None:
    s = sample(4.0, 0.02)
    scalp = s.tissue & ~s.brain
    assert scalp.any() and (s.brain & ~s.tissue).sum() < s.brain.sum()
    wrong_air = np.where(s.tissue | s.brain, s.t1, 2 * s.t1)
    figures = s.score(np.where(scalp, 2 * s.t1, wrong_air))
    assert figures["mae"] == 0 and figures["tissue_mae"] == pytest.approx(s.t1[scalp].sum() / s.tissue.sum(), rel=1e-5)
    assert figures["image_mae"] == pytest.approx(s.t1[scalp].sum() / s.tissue.size, rel=1e-5)
    assert figures["nrmse"] == 0 < figures["tissue_nrmse"] == pytest.approx(figures["image_nrmse"])
    assert 0 < figures["image_ssim"] < 1 == pytest.approx(s.score(wrong_air)["image_ssim"])
    assert set(figures) == {p + k for p in ("", "tissue_", "image_") for k in FIGURES}


def test_a_part_that_is_switched_off_is_not_used_and_the_others_are_what_they_were(tmp_path: Path) -> None:
    trained = load_weights(save_network(tmp_path, "whole", PinqiSettings(), times=SATURATION_TIMES))
    s = sample(4.0, 0.02)
    whole, found = learned(trained)(s).t1, {}
    for name in SWITCHED_OFF:
        without = switched_off(trained, name)
        own = trained.network.state_dict()
        assert all(torch.equal(value, own[key]) for key, value in without.network.state_dict().items())
        if name in ("a", "h"):
            found[name] = learned(without)(s).t1
            assert not np.array_equal(found[name], whole), name
    assert switched_off(trained, "h").network.parameter_net is None and switched_off(trained, "b").network.image_net is None
    assert not np.array_equal(found["a"], found["h"])


def test_complete_data_are_fitted_once_for_all_methods(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    for module in (common, pinqi):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    pinqi.main(
        ["--size", "32", "--accelerations", "1", "2", "--samples", "1", "--only-weights", "--weights", f"physics={weights}"]
    )
    scores = json.loads((tmp_path / "pinqi.json").read_text())["scores"]
    (method,) = set(scores) - {pinqi.FULLY_SAMPLED}
    assert set(scores[pinqi.FULLY_SAMPLED]) == {"1"} and set(scores[method]) == {"2"}
    assert scores[pinqi.FULLY_SAMPLED]["1"]["0"]["nrmse"] < scores[method]["2"]["0"]["nrmse"]


def test_undersampling_ranks_the_simple_methods(trained: TrainedPinqi) -> None:
    s = sample(2.0, 0.005)
    zero, sense, joined = (s.score(m(s).t1)["nrmse"] for m in (zero_filled, classical("cg_sense"), learned(trained)))
    assert joined < zero and sense < zero


def test_the_common_fit_keeps_its_range() -> None:
    images = torch.ones(5, 2, 3, dtype=torch.complex64)  # recovered at once
    assert np.allclose(fitted(images, SATURATION_TIMES), T1_RANGE[0], atol=0.05)
    rising = torch.tensor(SATURATION_TIMES).reshape(5, 1, 1).expand(5, 2, 3).to(torch.complex64)  # never recovers
    assert np.allclose(fitted(rising, SATURATION_TIMES), T1_RANGE[1], rtol=1e-4)


def test_scores_are_kept_and_only_what_is_missing_is_added(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (common, pinqi):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    words = ["--size", "32", "--accelerations", "2", "--no-bart", "--samples"]
    pinqi.main([*words, "1"])
    first = json.loads((tmp_path / "pinqi.json").read_text())
    assert set(first["scores"]) == {"zero-filled + fit", "cg_sense + fit", "llr + fit", pinqi.REFINED}
    capsys.readouterr()
    pinqi.main([*words, "1", "--weights", f"physics={weights}", "--picture", str(tmp_path / "p.png")])
    second = json.loads((tmp_path / "pinqi.json").read_text())
    (added,) = set(second["scores"]) - set(first["scores"])
    assert added.startswith("physics (") and second["weights"]["physics"]["sha256"].startswith(added[9:17])
    assert (tmp_path / "p.png").stat().st_size > 10_000
    kept = {n: s["2"]["0"]["nrmse"] for n, s in first["scores"].items()}
    assert {n: second["scores"][n]["2"]["0"]["nrmse"] for n in kept} == pytest.approx(kept)
    assert str(weights.parent) not in (tmp_path / "pinqi.json").read_text()  # no paths of a machine
    capsys.readouterr()
    pinqi.main([*words, "1", "--weights", f"physics={weights}"])
    assert "sample 0" not in capsys.readouterr().err  # nothing was left to do


def test_an_interrupted_call_keeps_what_it_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, pinqi):
        monkeypatch.setattr(module, "RESULTS", tmp_path)

    def interrupted(s: Sample) -> Answer:
        raise KeyboardInterrupt

    monkeypatch.setattr(pinqi, "methods_for", lambda options: {"one": zero_filled, "other": interrupted})
    with pytest.raises(KeyboardInterrupt):
        pinqi.main(["--size", "32", "--accelerations", "2", "--samples", "1"])
    document = json.loads((tmp_path / "pinqi.json").read_text())
    assert set(document["scores"]["one"]["2"]) == {"0"} and set(document["summary"]["2"]) == {"one"}


def test_a_call_for_one_acceleration_leaves_the_summary_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (common, pinqi):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    for acceleration in ("1", "2"):
        pinqi.main(["--size", "32", "--accelerations", acceleration, "--no-bart", "--samples", "1"])
    assert set(json.loads((tmp_path / "pinqi.json").read_text())["summary"]) == {"1", "2"}


def test_methods_are_compared_slice_by_slice() -> None:
    def slices(*errors: float) -> dict[str, dict[str, float]]:
        return {str(i): {"nrmse": e, "mae": 2 * e, "ssim": 1 - e} for i, e in enumerate(errors)}

    scores = {"one": {"4": slices(0.1, 0.2, 0.3)}, "other": {"4": slices(0.2, 0.1, 0.5)}, "alone": {"8": slices(0.1, 0.1)}}
    assert pinqi.paired(scores, "one") == [["4x", "other", 0.0667, 0.1528, 0.1333, -0.0667, "1, 1, 1 of 3"]]


def test_variants_are_trained_alike_from_one_start_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (common, pinqi_variants):
        monkeypatch.setattr(module, "RESULTS", tmp_path)
    start = save_network(tmp_path, "whole", PinqiSettings(start="refined", prediction="kernel"), times=SATURATION_TIMES)
    words = f"--initial {start} --output {tmp_path / 'out'} --steps 2 --held 1 --size 64 --columns 16 --image-factors"
    pinqi_variants.main([*words.split(), "--rows", "proposed", "h"])
    document = json.loads((tmp_path / "pinqi_variants.json").read_text())
    rows = document["rows"]
    assert {name: row["steps"] for name, row in rows.items()} == {"proposed": 2, "h": 2}
    assert document["settings"]["initial_sha256"] == json.loads(start.read_text())["sha256"]
    assert load_weights(tmp_path / "out" / "h" / "pinqi.json").network.parameter_net is None
    assert "python -m benchmarks.pinqi" in capsys.readouterr().out and str(tmp_path) not in json.dumps(document)
    pinqi_variants.main([*words.split(), "--rows", "h"])
    again = json.loads((tmp_path / "pinqi_variants.json").read_text())["rows"]
    assert again["h"]["sha256"] == rows["h"]["sha256"] and again["proposed"] == rows["proposed"]


def test_the_one_command_trains_goes_on_and_measures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU machine, in miniature: called twice, the second call ends what the first began."""
    for module in (common, pinqi, pinqi_gpu):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    output = tmp_path / "out"
    words = f"--output {output} --device cpu --size 64 --samples 1 --slices 1 --ablation g1 --batch 1 --n-coils 2 --n-validation 0"
    recipe = "--pretrain-epochs 0.001 --epochs 0.001 --samples-per-epoch 1000"
    pinqi_gpu.main(f"{words} {recipe} --max-minutes 1e-6 --slices 0 --samples 0".split())
    assert not json.loads((output / "pinqi.json").read_text())["finished"]
    pinqi_gpu.main(f"{words} {recipe} --max-minutes 10".split())
    facts = json.loads((output / "pinqi.json").read_text())
    assert facts["finished"] and facts["steps_done"] == {"pretraining": 1, "training": 1}
    speed, quality = (json.loads((output / f"pinqi_{name}.json").read_text()) for name in ("speed_gpu", "gpu"))
    assert set(speed["float32"]["parts_s"]) == set(pinqi_speed.PARTS.values())
    assert speed["float32"]["weights"] == facts["sha256"][:8]
    assert all(f"g1 ({facts['sha256'][:8]})" in quality["summary"][key] for key in "468")


def test_the_one_command_takes_brainweb_for_training_and_quality(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (common, pinqi, pinqi_gpu):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    heads, output = tmp_path / "heads", tmp_path / "out"
    heads.mkdir()
    for i in range(3):
        nifti(heads / f"subject0{i}_crisp_v.nii", np.full((40, 360, 320), 2, np.uint8))  # grey matter alone
    words = f"--output {output} --device cpu --size 64 --samples 1 --slices 0 --ablation g1 --batch 1 --n-coils 2 --n-validation 0"
    recipe = "--pretrain-epochs 0 --epochs 0.001 --samples-per-epoch 1000 --max-minutes 10 --atlas-share 0.5"
    pinqi_gpu.main(f"{words} {recipe} --brainweb {heads}".split())
    facts, quality = (json.loads((output / f"{name}.json").read_text()) for name in ("pinqi", "pinqi_gpu"))
    assert facts["anatomy"].startswith("brainweb, 0.5 ") and quality["settings"]["anatomy"] == "brainweb"
    assert str(tmp_path) not in json.dumps(quality)


def test_claimed_deviations_are_compared_tube_by_tube() -> None:
    labels = np.repeat(np.arange(1, 10), 12)[None].repeat(12, 0)
    rng = np.random.default_rng(0)
    real = 0.01 * labels
    plain = [(1 + real * rng.standard_normal(labels.shape), 1.1 * real) for _ in range(20)]
    calm = [(1 + 0.5 * real * rng.standard_normal(labels.shape), real) for _ in range(20)]
    plain[3][0][labels == 2] = np.nan  # the console shows nothing
    plain[3][0][:6, :][labels[:6] == 4] = np.nan
    found = pinqi_server.compare_deviations({pinqi_server.PLAIN: plain, "pinqi_t1": calm}, labels)
    ratio = np.array(found[pinqi_server.PLAIN]["ratio"])
    assert np.isnan(ratio[1]) and np.delete(ratio, 1) == pytest.approx(1.1, abs=0.1)
    assert found[pinqi_server.PLAIN]["believed"][1] == 0 and 0 < found[pinqi_server.PLAIN]["believed"][3] < 1
    assert found["pinqi_t1"]["ratio"][8] == pytest.approx(2.0, abs=0.2)
    assert found["pinqi_t1"]["over_plain"][8] == pytest.approx(1.0, abs=0.1)


def test_parts_of_the_time_are_found(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    words = ["--size", "64", "--slices", "1", "--repeats", "1", "--weights", str(weights), "--processes", "2"]
    pinqi_speed.main(words)
    found = json.loads((tmp_path / "pinqi_speed.json").read_text())["float32"]
    assert found["processes"]["number"] == 2 and found["processes"]["s_a_slice"] > 0
    parts = found["parts_s"]
    assert parts["conjugate gradients"] > 0 and parts["per-pixel solver"] > 0
    assert parts["UNet of images"] == 0  # these weights have none


def test_the_phantom_arrives_whitened_and_calibrated() -> None:
    values = {**PROTOCOL, "matrix_x": 64, "matrix_y": 64, "coils": 4, "acceleration": 2.0, "snr": 100.0}
    scan = simulate_scan("satrec", settings_for("satrec", values))
    kspace, info = pinqi_phantom.acquired(scan, 0)
    assert kspace.data.shape == (5, 4, 1, 64, 64) and info.saturation_times == SATURATION_TIMES
    assert (kspace.data.abs().sum(dim=(1, 2, 4)) > 0).equal(kspace.mask[:, 0])
    air = kspace.data[..., :4][kspace.mask[:, None, :, :, None].expand(-1, 4, -1, -1, 4)]  # columns beside the tubes
    assert float(air.abs().square().mean().sqrt()) == pytest.approx(np.sqrt(2), rel=0.1)
