"""The command ``recon train``: a training, its end in words, and its resumption."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from gadgets.train_cli import app
from recon_core.errors import SettingError
from recon_core.simulation.scan_folder import main as simulate_scans
from recon_core.training import laro, pinqi
from recon_core.training.laro_tasks import LaroRecipe
from recon_core.training.loop import TrainingResult
from recon_core.training.pinqi_tasks import PinqiRecipe
from recon_core.training.runs import TrainingRecipe

TINY = ["pinqi"] + [
    word
    for option in (
        "--size 32", "--batch 1", "--epochs 0.0005", "--pretrain-epochs 0.0005", "--acceleration 2", "--time 0.5", "--time 8",
        "--coils 2", "--ablation g1", "--device cpu", "--validate-every 1", "--threads 1", "--n-validation 1", "--rate-spread 2",
        "--spread-part 0.5", "--pretrain-scale 2", "--pretrain-networks parameter", "--reuse 2", "--t1-weight 0.1",
        "--prediction kernel", "--first-weight 0.2", "--other-weight 0.1", "--embedding-rate 0.001", "--warmup-steps 5",
    )
    for word in option.split()
]  # fmt: skip


def test_a_training_from_the_command_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*TINY, "--output", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0 and "finished after" in done.output and "nrmse" in done.output
    facts = json.loads((tmp_path / "pinqi.json").read_text())
    assert facts["finished"] and facts["times"] == [0.5, 8.0] and facts["recipe"]["accelerations"] == [2.0]
    given = {
        "rate_spread": 2.0,
        "spread_part": 0.5,
        "pretrain_scale": 2.0,
        "reuse": 2,
        "first_weight": 0.2,
        "other_weight": 0.1,
    }
    given |= {"embedding_rate": 0.001, "warmup_steps": 5, "n_validation": 1, "prediction": "kernel", "t1_weight": 0.1}
    assert {key: facts["recipe"][key] for key in given} == given
    assert list((tmp_path / "training").glob("*.png")) and (tmp_path / "training" / "log.csv").is_file()
    with pytest.raises(SettingError, match="--resume"):
        CliRunner().invoke(app, [*TINY, "--output", str(tmp_path)], catch_exceptions=False)
    again = CliRunner().invoke(app, [*TINY, "--resume", "--output", str(tmp_path)], catch_exceptions=False)
    assert again.exit_code == 0 and "finished" in again.output


def test_help_does_not_need_torch_and_names_the_options() -> None:
    done = CliRunner().invoke(app, ["pinqi", "--help"], env={"COLUMNS": "200"})
    for option in ("--output", "--max-minutes", "--resume", "--brainweb", "--acceleration", "--precision", "--ablation"):
        assert option in done.output


LARO_TINY = ["laro"] + [
    word
    for option in (
        "--k1 20", "--k2 12", "--readout 14", "--echoes 3", "--coils 4", "--acs-k1 4", "--acs-k2 4", "--pattern 3/2", "--channels 4",
        "--features 4", "--features 4", "--first-steps 0", "--second-steps 1", "--second-unrolls 1", "--second-start refined",
        "--decay-weight 0.5", "--steps-per-scan 3", "--scans-held 2", "--measured-held 3", "--warmup-steps 7", "--batch 2",
        "--n-validation 0", "--mask-rate 0", "--precision bfloat16", "--device cpu", "--threads 1",
    )
    for word in option.split()
]  # fmt: skip


def test_a_training_like_that_of_the_shipped_weights(tmp_path: Path) -> None:
    scans = ["--scans", str(tmp_path / "scans")]
    words = "--matrix 12 20 14 --voxel 7 9 --coils 4 --echoes 3 --planes 4 --count 3 --output"
    simulate_scans([*words.split(), scans[1]])
    first = CliRunner().invoke(app, [*LARO_TINY, *scans, "--output", str(tmp_path / "one")], catch_exceptions=False)
    assert first.exit_code == 0 and "finished after" in first.output
    begun = tmp_path / "one" / "laro.json"
    words = ["--initial", str(begun), *scans, "--output", str(tmp_path / "two")]
    CliRunner().invoke(app, [*LARO_TINY, *words], catch_exceptions=False)
    recipe = json.loads((tmp_path / "two" / "laro.json").read_text())["recipe"]
    given = {"second_start": "refined", "decay_weight": 0.5, "steps_per_scan": 3, "scans_held": 2, "measured_held": 3}
    given |= {"warmup_steps": 7, "batch": 2, "n_validation": 0, "mask_rate": 0.0, "matrix": [12, 20, 14], "acs": [4, 4]}
    given |= {
        "precision": "bfloat16",
        "initial_sha256": json.loads(begun.read_text())["sha256"],
        "patterns": ["3/2"],
        "features": [4, 4],
    }
    assert {key: recipe[key] for key in given} == given
    with pytest.raises(SettingError, match="not simulated"):
        CliRunner().invoke(app, [*LARO_TINY, "--resume", "--output", str(tmp_path / "two")], catch_exceptions=False)


@pytest.mark.parametrize(
    ("name", "training", "recipe"), [("pinqi", pinqi, PinqiRecipe), ("laro", laro, LaroRecipe)], ids=["pinqi", "laro"]
)
def test_both_commands_have_the_same_choices_and_defaults(
    name: str, training: ModuleType, recipe: type[TrainingRecipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def note(*arguments: object) -> tuple[TrainingResult, Path]:
        seen.append((arguments[0], arguments[2]))
        return TrainingResult(1, True, 0.0, 0, {}), tmp_path

    monkeypatch.setattr(training, "run", note)
    CliRunner().invoke(app, [name, "--output", str(tmp_path)], catch_exceptions=False)
    training.main(["--output", str(tmp_path)])
    assert seen == [(recipe(), training.RunSettings())] * 2


@pytest.mark.parametrize(
    "words", ["laro --network-rate -1", "laro --mask-rate -1", "pinqi --network-rate 0", "pinqi --epochs -1"]
)
def test_rates_that_cannot_be_are_refused(words: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, [*words.split(), "--output", str(tmp_path / "out")])
    assert done.exit_code == 2 and not (tmp_path / "out").exists()


def test_the_digest_of_initial_weights_is_no_option(capsys: pytest.CaptureFixture[str]) -> None:
    for training in (pinqi, laro):
        with pytest.raises(SystemExit):
            training.main(["--output", "x", "--initial-sha256", "ab"])
        assert "unrecognized arguments: --initial-sha256" in capsys.readouterr().err


def test_help_of_laro_names_what_docs_promise() -> None:
    done = CliRunner().invoke(app, ["laro", "--help"], env={"COLUMNS": "200"})
    for words in ("--initial", "--decay-weight", "--steps-per-scan", "--measured-held", "cg_sense, llr or refined"):
        assert words in done.output
