"""The command ``recon train``: a training, its end in words, and its resumption."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gadgets.train_cli import app
from recon_core.errors import SettingError

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
