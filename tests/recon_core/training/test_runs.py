"""What the programs that train have in common: the limits of a call, and the recipe on disk."""

from __future__ import annotations

import json
import math
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recon_core.errors import ReconError, SettingError, WriteError
from recon_core.training import laro, pinqi
from recon_core.training.laro_tasks import LaroRecipe
from recon_core.training.loop import Progress, Validation
from recon_core.training.pinqi_tasks import PinqiRecipe
from recon_core.training.runs import RECIPE, CarryOut, PlainReport, commit_of, initial_digest, settle_recipe


@pytest.mark.parametrize("settings", [CarryOut, pinqi.RunSettings, laro.RunSettings])
@pytest.mark.parametrize("minutes", [0.0, -1.0, math.nan])
def test_no_time_to_train_is_refused(settings: type[CarryOut], minutes: float) -> None:
    with pytest.raises(SettingError, match="max_minutes: no time"):
        settings(max_minutes=minutes)
    assert settings(max_minutes=0.01).max_minutes == 0.01


@pytest.mark.parametrize("name", ["validate_every", "checkpoint_minutes", "log_every"])
def test_negative_frequencies_are_refused(name: str) -> None:
    with pytest.raises(SettingError, match=f"{name}: not a frequency"):
        CarryOut(**{name: -1})
    assert CarryOut(**{name: 0})


def test_reports_may_be_of_validations_alone(capsys: pytest.CaptureFixture[str]) -> None:
    report = PlainReport(0)
    report("training", Progress(1, 4, 0.5, 0.1, {}))
    report("training", Progress(2, 4, 0.5, 0.1, {}, Validation({"nrmse": 0.25})))
    assert capsys.readouterr().out.splitlines() == ["training 2/4 0.1 min loss=0.50000 nrmse=0.25"]


def test_the_commit_is_that_of_the_code_itself(tmp_path: Path) -> None:
    """Weights state it: once that of whatever repository was around the package, changed files or not."""

    def git(*words: str) -> str:
        who = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert commit_of(package) == "unknown"
    git("init")
    git("commit", "--allow-empty", "-m", "somebody's project")
    assert commit_of(package) == "unknown"
    git("add", "package")
    git("commit", "-m", "ours")
    (tmp_path / "notes").write_text("beside it")
    assert commit_of(package) == (commit := git("rev-parse", "HEAD"))
    (package / "__init__.py").write_text("changed = True")
    assert commit_of(package) == f"{commit}-dirty"


SMALL = LaroRecipe(channels=4, features=(4, 4), patterns=("3/2",), matrix=(12, 20, 14), n_echoes=3, n_coils=4, acs=(4, 4))


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        (PinqiRecipe(precision="foo"), pinqi.RunSettings(device="cpu")),
        (PinqiRecipe(), pinqi.RunSettings(device="cpu", brainweb="no such folder")),
        (PinqiRecipe(), pinqi.RunSettings(device="cpu", initial="no such file.json")),
        (PinqiRecipe(atlas_share=0.3), pinqi.RunSettings(device="cpu")),
        (replace(SMALL, features=(4,)), laro.RunSettings(device="cpu")),
        (SMALL, laro.RunSettings(device="cpu", scans="no such folder")),
        (SMALL, laro.RunSettings(device="cpu", masks="no such folder")),
        (SMALL, laro.RunSettings(device="cpu", initial="no such file.json")),
    ],
)
def test_a_start_that_is_refused_leaves_the_folder_free(recipe: Any, settings: Any, tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(ReconError):
        (pinqi if isinstance(recipe, PinqiRecipe) else laro).run(recipe, output, settings)
    assert not output.exists()


def test_masks_that_are_not_there_are_named(tmp_path: Path) -> None:
    settings = laro.RunSettings(device="cpu", masks=str(tmp_path))
    with pytest.raises(SettingError, match=rf"{tmp_path}: no mask of the pattern; got no laro_mask_r3_spo2\.h5"):
        laro.run(SMALL, tmp_path / "out", settings)


@pytest.mark.parametrize("place", ["file", "file/out"])
def test_a_file_is_no_folder_for_a_training(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("something else")
    for resume in (False, True):
        with pytest.raises(SettingError, match=rf"{place}: the training's folder cannot be used; got Not a directory"):
            laro.run(SMALL, tmp_path / place, laro.RunSettings(device="cpu", resume=resume))
    with pytest.raises(SettingError, match="cannot be used"):
        settle_recipe(SMALL, Path("/proc/nowhere/out"), False)
    assert (tmp_path / "file").read_text() == "something else"


def test_a_damaged_recipe_is_a_typed_error_and_stays(tmp_path: Path) -> None:
    settle_recipe(SMALL, tmp_path, resume=False)
    path = tmp_path / RECIPE
    whole = path.read_text()
    wrong_kind = json.dumps({**json.loads(whole), "patterns": 3})
    for content in (whole[: len(whole) // 2], "", "[1]", wrong_kind, "{}", json.dumps({**json.loads(whole), "data": 1})):
        path.write_text(content)
        with pytest.raises(SettingError, match=f"{tmp_path.name}/{RECIPE}: the recipe is damaged; got .*; expected JSON"):
            settle_recipe(SMALL, tmp_path, resume=True)
        if content not in (wrong_kind, "{}"):
            with pytest.raises(SettingError, match="damaged"):
                initial_digest(None, tmp_path, True)
        assert path.read_text() == content
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SettingError, match="damaged"):
        settle_recipe(SMALL, tmp_path, resume=True)


@pytest.mark.parametrize("training", [laro, pinqi])
def test_where_no_training_was_begun_there_is_none_to_resume(
    training: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "phase").mkdir()
    for name in ("laro.json", "notes.txt", "phase/checkpoint.json"):
        (tmp_path / name).write_text(name)
    for folder in (tmp_path, tmp_path / "typo"):
        with pytest.raises(SystemExit) as stopped:
            training.main(["--output", str(folder), "--resume", "--device", "cpu", "--max-minutes", "0.001"])
        assert stopped.value.code == 1 and "no training to resume; got no recipe.json" in capsys.readouterr().err
    with pytest.raises(SettingError, match=r"no recipe.json; got phase/checkpoint.json"):
        settle_recipe(SMALL, tmp_path, False)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"laro.json", "notes.txt", "phase", "phase/checkpoint.json"}
    (tmp_path / "phase" / "checkpoint.json").unlink()
    (tmp_path / "laro.safetensors").write_text("")
    with pytest.raises(SettingError, match=r"weights or checkpoints, but no recipe.json; got laro.safetensors"):
        settle_recipe(SMALL, tmp_path, False)


def test_a_recipe_of_another_method_is_none_of_ours(tmp_path: Path) -> None:
    """Their choices would be ignored, and ours that are missing be taken for their defaults."""
    settle_recipe(PinqiRecipe(), tmp_path, False)
    stated = json.loads((tmp_path / RECIPE).read_text())
    for content in (stated, {"ablation": "g1"}):
        (tmp_path / RECIPE).write_text(json.dumps(content))
        with pytest.raises(SettingError, match=r"training of another kind; got ablation.*choices of LaroRecipe"):
            settle_recipe(LaroRecipe(), tmp_path, True)
        assert json.loads((tmp_path / RECIPE).read_text()) == content


def test_resuming_does_not_write_the_recipe_again(tmp_path: Path) -> None:
    data = {"scans": "ab"}
    settle_recipe(SMALL, tmp_path, False, data)
    before = (tmp_path / RECIPE).stat()
    settle_recipe(SMALL, tmp_path, True, data)
    after = (tmp_path / RECIPE).stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [p.name for p in tmp_path.iterdir()] == [RECIPE]  # no part is left


def test_a_recipe_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr("recon_core.training.checkpoint.os.replace", full)
    with pytest.raises(WriteError, match=rf"{tmp_path.name}/recipe.json: cannot be written; got the disk is full"):
        settle_recipe(SMALL, tmp_path, False)
    assert not (tmp_path / RECIPE).exists()


def test_other_data_is_another_training_and_older_recipes_get_theirs_recorded(tmp_path: Path) -> None:
    settle_recipe(SMALL, tmp_path, False)
    settle_recipe(SMALL, tmp_path, True, {"scans": "ab"})  # from before it was recorded
    with pytest.raises(SettingError, match="another training; got scans: ab, not simulated"):
        settle_recipe(SMALL, tmp_path, True, {"scans": "simulated"})
    with pytest.raises(SettingError, match="seed: 0, not 1"):
        settle_recipe(replace(SMALL, seed=1), tmp_path, True, {"scans": "ab"})


@pytest.mark.parametrize("recipe", [SMALL, PinqiRecipe()])
def test_a_training_without_a_checkpoint_is_given_its_initial_weights_again(recipe: Any, tmp_path: Path) -> None:
    settle_recipe(replace(recipe, initial_sha256="ab"), tmp_path, False)
    with pytest.raises(SettingError, match=r"before its first checkpoint.*add --initial"):
        initial_digest(None, tmp_path, True)
    (tmp_path / "phase").mkdir()
    (tmp_path / "phase" / "checkpoint.json").write_text("{}")
    assert initial_digest(None, tmp_path, True) == "ab" and initial_digest(None, tmp_path, False) == ""


@pytest.mark.parametrize(
    ("training", "words"), [(pinqi, "--max-minutes 0"), (laro, "--max-minutes nan"), (laro, "--network-rate -1")]
)
def test_a_plain_command_says_what_is_refused(
    training: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        training.main(["--output", str(tmp_path / "out"), *words.split()])
    printed = capsys.readouterr()
    assert stopped.value.code == 1 and not (tmp_path / "out").exists() and printed.out == ""
    name = words.split()[0].removeprefix("--").replace("-", "_")
    assert (
        len(printed.err.splitlines()) == 1
        and name in printed.err
        and printed.err.startswith("python -m recon_core.training.")
    )
