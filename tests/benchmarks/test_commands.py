"""Benchmark commands that are called wrongly, or fail half-way: one line of words, and nothing lost that was recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import bart, common, laro, laro_gpu, pinqi, pinqi_gpu, pinqi_speed, qsm, qsm_challenge_2016
from recon_core.errors import SettingError
from recon_core.training import laro as laro_training
from recon_core.training import pinqi as pinqi_training


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for module in (common, pinqi, pinqi_gpu, laro_gpu):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--methods nope", "nope"),
        ("--methods llr --kinds 8", "--kinds"),
        ("--methods llr --kinds 8/9", "--kinds"),
        ("--methods llr --parts tabels", "tabels"),
        ("--methods llr --parts regions", "tables,regions"),
        ("--methods laro --weights /no/such/folder", "laro"),
    ],
)
def test_wrong_words_are_refused_before_a_result_is_written(words: str, said: str, results: Path) -> None:
    with pytest.raises(SettingError, match=said):
        laro.main(words.split())
    assert not results.exists()


def test_inversions_that_do_not_exist_are_refused(results: Path) -> None:
    for command, words in ((qsm.main, ["--methods", "tv"]), (qsm_challenge_2016.main, ["nowhere", "--methods", "tv"])):
        with pytest.raises(SettingError, match=r"--methods: there is no such choice; got tv; expected TV-ADMM"):
            command(words)
    assert not results.exists()


def test_a_benchmark_without_heads_is_refused(results: Path) -> None:
    with pytest.raises(SystemExit, match="2"):
        laro.main(["--scans", "0"])
    assert not results.exists()


def test_bart_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
    monkeypatch.setattr(bart, "available", lambda: None)
    with pytest.raises(SettingError, match="BART is not installed"):
        laro.main(["--methods", "bart_llr_0.001", "--bart-weights", "0.001"])
    assert not results.exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SettingError("no such thing", where="--option"), "--option: no such thing"),
        (OSError(28, "No space left on device", "results/laro.part"), "No space left on device: results/laro.part"),
    ],
)
def test_refusals_are_one_line(error: Exception, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        raise error

    assert common.in_words(command) == 1
    assert capsys.readouterr().err == line + "\n"


def raiser(error: BaseException) -> Callable[..., object]:
    def fail(*_: object) -> object:
        raise error

    return fail


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), SystemExit(1)])
def test_a_training_that_fails_leaves_the_speed_to_be_measured(
    error: BaseException, tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results.mkdir()
    asked: list[list[str]] = []

    def speed(words: list[str]) -> None:
        asked.append(words)
        (results / "pinqi_speed_gpu.json").write_text("{}")

    monkeypatch.setattr(pinqi_training, "main", raiser(error))
    monkeypatch.setattr(pinqi_speed, "main", speed)
    code = pinqi_gpu.main(["--output", str(tmp_path / "out"), "--device", "cpu"])
    assert code == 1 and (tmp_path / "out" / "pinqi_speed_gpu.json").is_file()
    assert len(asked) == 1 and "--weights" not in asked[0]  # none were left
    said = capsys.readouterr().out
    assert "training: " in said and "quality: " in said


def test_words_that_a_training_does_not_know_end_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinqi_speed, "main", raiser(AssertionError()))
    with pytest.raises(SystemExit, match="2"):
        pinqi_gpu.main(["--output", str(tmp_path), "--device", "cpu", "--no-such-option"])


def test_laro_s_parts_are_independent_too(tmp_path: Path, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    (tmp_path / "laro.json").write_text("{}")
    monkeypatch.setattr(laro_training, "main", raiser(RuntimeError("out of memory")))
    monkeypatch.setattr(laro_gpu, "large_scan", raiser(RuntimeError("out of memory")))
    monkeypatch.setattr(laro_gpu, "load_weights", raiser(RuntimeError("damaged")))
    results.mkdir()

    def quality(words: list[str]) -> None:
        done.append(words[words.index("--name") + 1])
        (results / "laro_gpu_quality.json").write_text("{}")

    monkeypatch.setattr(laro, "main", quality)
    assert laro_gpu.main(["--output", str(tmp_path), "--device", "cpu", "--heads", "0"]) == 1
    assert done == ["laro_gpu_quality"] and (tmp_path / "laro_gpu_quality.json").is_file()
