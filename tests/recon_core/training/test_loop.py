"""The training loop: resumed to the bit, whenever it was stopped; nothing bad is learned; nothing of another training is continued."""

from __future__ import annotations

import csv
import errno
import json
import math
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from recon_core.errors import NumericalError, SettingError, WriteError
from recon_core.training.checkpoint import WeightError, read_pair, write_pair
from recon_core.training.log import TrainingLog
from recon_core.training.loop import LONGEST_STREAK, LoopSettings, ParameterGroup, Progress, Validation, train

Tensor = torch.Tensor


class Regression:
    """A small network fitted to a sine; uses both global generators, and has a buffer."""

    def __init__(self, *, outliers: tuple[int, ...] = (), version: int = 1) -> None:
        torch.manual_seed(0)
        np.random.seed(0)  # noqa: NPY002 - the global generator belongs to what is tested
        self.module: nn.Module = nn.Sequential(
            nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1)
        )
        self.outliers, self.version = outliers, version
        self.modes: list[bool] = []

    def groups(self) -> list[ParameterGroup]:
        first, *rest = self.module.parameters()
        return [ParameterGroup("first", [first], 0.01, 0.0), ParameterGroup("rest", rest, 0.02)]

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        self.modes.append(self.module.training)
        x = torch.rand(16, 1, generator=torch.Generator().manual_seed(step)) + 0.1 * torch.randn(16, 1)
        x = x + float(np.random.normal(0, 0.01))  # noqa: NPY002
        loss = (self.module(x) - torch.sin(6 * x)).square().mean()
        weight = next(self.module.parameters())
        figures = {
            "mean_x": float(x.mean()),
            "slope": lambda: math.nan if weight.grad is None else float(weight.grad.norm()),
        }
        return (loss * 100 if step in self.outliers else loss), figures

    def validate(self, step: int) -> Validation:
        assert not self.module.training and not torch.is_grad_enabled()
        x = torch.rand(64, 1)  # must not disturb the training's generator
        error = float((self.module(x) - torch.sin(6 * x)).square().mean())
        return Validation({"error": error}, {"picture": np.zeros((4, 4))})

    def facts(self) -> Mapping[str, Any]:
        return {"version": self.version, "shape": (1, 8)}


SCHEDULE = LoopSettings(steps=40, warmup_steps=5, ema_decay=0.9, validate_every=10)


def weights(task: Regression) -> list[Tensor]:
    return [v.clone() for v in task.module.state_dict().values()]


def stop_at(step: int) -> Any:
    """What a scheduler does to a job whose time is up, after this step."""

    def progress(p: Progress) -> None:
        if p.step == step:
            signal.raise_signal(signal.SIGTERM)

    return progress


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "minutes"} for row in csv.DictReader(file)]


def test_a_training_stopped_thrice_equals_one_in_one_go_to_the_bit(tmp_path: Path) -> None:
    whole = Regression()
    train(whole, SCHEDULE, tmp_path / "whole")
    for stop in (7, 10, 33):
        parts = Regression()
        if stop > 7:  # whatever the new process did with the generators before
            torch.manual_seed(stop)
            np.random.seed(stop)  # noqa: NPY002
        result = train(parts, SCHEDULE, tmp_path / "parts", resume=True, progress=stop_at(stop))
        assert (result.step, result.finished) == (stop, False)
    parts = Regression()
    result = train(parts, SCHEDULE, tmp_path / "parts", resume=True)
    assert (result.step, result.finished) == (40, True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts), strict=True))
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_a_killed_training_goes_on_from_its_last_checkpoint(tmp_path: Path) -> None:
    whole = Regression()
    train(whole, SCHEDULE, tmp_path / "whole")

    def die(p: Progress) -> None:
        if p.step == 23:
            raise KeyboardInterrupt  # no checkpoint is written; the last one is of step 20

    with pytest.raises(KeyboardInterrupt):
        train(Regression(), SCHEDULE, tmp_path / "killed", progress=die)
    assert len(rows(tmp_path / "killed")) == 23
    parts = Regression()
    train(parts, SCHEDULE, tmp_path / "killed", resume=True)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts), strict=True))
    assert rows(tmp_path / "whole") == rows(tmp_path / "killed")
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == 1


def test_it_learns(tmp_path: Path) -> None:
    task = Regression()
    task.module[3].p = 0.0  # type: ignore[index]
    losses: list[float] = []
    result = train(
        task, LoopSettings(steps=200, warmup_steps=10, clip_norm=10.0), tmp_path, progress=lambda p: losses.append(p.loss)
    )
    assert np.mean(losses[-30:]) < 0.5 * np.mean(losses[:30]) and result.skipped == 0
    assert all(task.modes)


def test_outliers_change_nothing(tmp_path: Path) -> None:
    seen: list[list[Tensor]] = []
    task = Regression(outliers=(3, 4))
    settings = LoopSettings(steps=6, warmup_steps=0, skip_above=5.0)
    result = train(
        task, settings, tmp_path, progress=lambda _: seen.append([p.detach().clone() for p in task.module.parameters()])
    )
    assert result.skipped == 2 and result.skipped_words == ", 2 of 6 steps skipped"
    unchanged = [all(torch.equal(a, b) for a, b in zip(seen[i - 1], seen[i], strict=True)) for i in range(1, 6)]
    assert unchanged == [False, False, True, True, False]
    assert [row["skipped"] for row in rows(tmp_path)] == ["0", "0", "0", "1", "2", "2"]


def test_a_training_that_diverged_says_so(tmp_path: Path) -> None:
    said = "diverged; got 50 skipped batches in a row, the last with a loss of .* and gradients of nan; expected a loss up to 5,"
    with pytest.raises(NumericalError, match=said):
        train(Regression(outliers=tuple(range(5, 200))), LoopSettings(steps=200, skip_above=5.0), tmp_path)
    assert len(rows(tmp_path)) == 5 + LONGEST_STREAK - 1


def test_too_little_memory_is_said_in_words(tmp_path: Path) -> None:
    class Large(Regression):
        def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
            if step == 2:
                torch.empty(1 << 50)
            return super().loss(step)

    with pytest.raises(SettingError, match=r"step 2: too little memory; got no 4503599627370496 bytes more\. .*--recompute"):
        train(Large(), LoopSettings(steps=4, checkpoint_minutes=0), tmp_path)
    assert train(Regression(), LoopSettings(steps=4), tmp_path, resume=True).finished  # nothing was lost


def test_gradients_that_are_not_finite_are_not_applied(tmp_path: Path) -> None:
    class Broken(Regression):
        def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
            value, figures = super().loss(step)
            # finite value, infinite slope
            return (value + (value - value.detach()).sqrt() if step == 1 else value), figures

    task = Broken()
    result = train(task, LoopSettings(steps=4, warmup_steps=0), tmp_path)
    assert result.skipped == 1 and all(p.isfinite().all() for p in task.module.parameters())


def test_gradients_are_clipped_together(tmp_path: Path) -> None:
    norms: list[float] = []
    task = Regression()
    settings = LoopSettings(steps=3, warmup_steps=0, clip_norm=1e-3)

    def watch(*_: Any) -> None:
        norms.append(float(torch.cat([p.grad.flatten() for p in task.module.parameters() if p.grad is not None]).norm()))

    handle = register_optimizer_step_pre_hook(watch)
    try:
        train(task, settings, tmp_path)
    finally:
        handle.remove()
    assert norms == pytest.approx([1e-3] * 3, rel=1e-2)
    assert all(float(row["gradient_norm"]) > 1e-2 for row in rows(tmp_path))


def test_the_learning_rate_warms_up_and_follows_a_cosine() -> None:
    s = LoopSettings(steps=110, warmup_steps=10, final_rate=0.1)
    assert [s.rate(i) for i in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert s.rate(10) == pytest.approx(1.0) and s.rate(60) == pytest.approx(0.55)
    assert s.rate(110) == pytest.approx(0.1) == s.rate(500)
    assert LoopSettings(steps=4, warmup_steps=0).rate(0) == 1.0
    assert all(a >= b for a, b in zip([s.rate(i) for i in range(10, 110)], [s.rate(i) for i in range(11, 111)], strict=True))


def test_the_moving_average_is_what_is_left_at_the_end(tmp_path: Path) -> None:
    task = Regression()
    names = [k for k, v in task.module.state_dict().items() if v.is_floating_point()]
    average = {k: task.module.state_dict()[k].clone() for k in names}

    def follow(p: Progress) -> None:
        decay = min(0.99, p.step / (9 + p.step))  # quicker in the first steps
        for k in names:
            average[k] = decay * average[k] + (1 - decay) * task.module.state_dict()[k]

    train(task, LoopSettings(steps=30, warmup_steps=0, ema_decay=0.99), tmp_path, progress=follow)
    assert all(torch.allclose(task.module.state_dict()[k], average[k], atol=1e-6) for k in names)


def test_time_that_is_up_ends_it_resumably(tmp_path: Path) -> None:
    result = train(Regression(), LoopSettings(steps=10, max_minutes=1e-9), tmp_path)
    assert (result.step, result.finished) == (0, False)
    assert train(Regression(), LoopSettings(steps=10), tmp_path, resume=True).finished


def test_another_training_is_not_continued(tmp_path: Path) -> None:
    train(Regression(), LoopSettings(steps=3), tmp_path)
    with pytest.raises(SettingError, match="holds a training"):
        train(Regression(), LoopSettings(steps=3), tmp_path)
    with pytest.raises(SettingError, match="version: 1, not 2"):
        train(Regression(version=2), LoopSettings(steps=3), tmp_path, resume=True)
    with pytest.raises(SettingError, match="steps: 3, not 5"):
        train(Regression(), LoopSettings(steps=5), tmp_path, resume=True)
    # limits and reports may change
    assert train(Regression(), LoopSettings(steps=3, max_minutes=5, validate_every=1), tmp_path, resume=True).finished


def test_a_training_that_goes_on_otherwise_than_it_was_begun_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums over other numbers of threads differ in their last bits: the weights were others, and nobody heard of it."""
    train(Regression(), SCHEDULE, tmp_path, progress=stop_at(3))
    train(Regression(), SCHEDULE, tmp_path, resume=True, progress=stop_at(5))
    assert not caplog.records
    here = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: here + 1)
    train(Regression(), SCHEDULE, tmp_path, resume=True)
    assert f"(threads: {here}, not {here + 1})" in caplog.text and "the weights will differ" in caplog.text
    caplog.clear()
    train(Regression(), SCHEDULE, tmp_path, resume=True)  # finished: nothing is computed
    assert not caplog.records


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    train(Regression(), LoopSettings(steps=3), tmp_path)
    facts = json.loads((tmp_path / "checkpoint.json").read_text())
    file = tmp_path / facts["file"]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(
        WeightError, match=rf"{tmp_path.name}/checkpoint.json: .*damaged: wrong sha256.*this phase then begins anew"
    ):
        train(Regression(), LoopSettings(steps=3), tmp_path, resume=True)
    (tmp_path / "checkpoint.json").rename(tmp_path / "kept")
    (tmp_path / "checkpoint.json").mkdir()
    with pytest.raises(WeightError, match="damaged: no such weights"):
        train(Regression(), LoopSettings(steps=3), tmp_path, resume=True)
    (tmp_path / "checkpoint.json").rmdir()  # as it says
    assert train(Regression(), LoopSettings(steps=3), tmp_path, resume=True).finished


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"step": "x"}, "ValueError"),
        ({"step": -5}, "got step -5; expected 0 to 4"),
        ({"step": 10**9}, "expected 0 to 4"),
        ({"figures": 3}, "TypeError"),
        ({"random": 3}, "TypeError"),
        ({"random": {}}, "no 'kind'"),
        ({"schedule": 3}, "another training; got schedule: 3"),
        ({"task": [1]}, r"another training; got task: \[1\]"),
        ("random/torch", "random generators"),
        ("optimizer/0.exp_avg", "optimizer state 0.exp_avg"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_in_words_and_stays(
    tmp_path: Path, changes: dict[str, Any] | str, words: str
) -> None:
    train(Regression(), LoopSettings(steps=4), tmp_path, progress=stop_at(2))
    path = tmp_path / "checkpoint.json"
    tensors, facts = read_pair(path)
    del facts["sha256"]
    if isinstance(changes, str):
        tensors[changes], changes = tensors[changes].flatten()[:1].clone(), {}
    before = write_pair(tmp_path, "checkpoint", tensors, {**facts, **changes}, version="-2").read_bytes()
    with pytest.raises((WeightError, SettingError), match=words):
        train(Regression(), LoopSettings(steps=4), tmp_path, resume=True)
    assert path.read_bytes() == before


def test_a_training_that_is_finished_writes_nothing_anew(tmp_path: Path) -> None:
    """Otherwise the checkpoint of one phase would change before that of the next is looked at."""
    train(Regression(), LoopSettings(steps=3), tmp_path)
    (tmp_path / "log.csv").write_bytes((tmp_path / "log.csv").read_bytes() + b"\xff\xfe,garbage\n")
    before = (tmp_path / "checkpoint.json").stat()
    assert train(Regression(), LoopSettings(steps=3), tmp_path, resume=True).finished
    after = (tmp_path / "checkpoint.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3"]


def test_a_full_disk_ends_a_training_in_words_and_it_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever could not be written: the log's header, a row, a checkpoint."""
    whole = Regression()
    train(whole, SCHEDULE, tmp_path / "whole")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    opened = TrainingLog._opened

    def until_full(left: list[int]) -> Any:
        def open_log(log: TrainingLog) -> Any:
            file = opened(log)
            if left.pop() == 0:
                with file:
                    file.write("step,min")  # the disk still took these
                full()
            return file

        return open_log

    folder = tmp_path / "parts"
    for n_rows in (0, 12):
        with monkeypatch.context() as disk:
            disk.setattr(TrainingLog, "_opened", until_full(list(range(n_rows + 1))))
            with pytest.raises(WriteError, match=r"parts/log\.csv: cannot be written; got No space left"):
                train(Regression(), SCHEDULE, folder, resume=True)
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(WriteError, match=r"parts/checkpoint-20\.safetensors: cannot be written"):
            train(Regression(), SCHEDULE, folder, resume=True)
    parts = Regression()
    assert train(parts, SCHEDULE, folder, resume=True).finished
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(parts), strict=True))
    assert rows(tmp_path / "whole") == rows(folder)


def test_signals_are_given_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(Regression(), LoopSettings(steps=5), tmp_path, progress=stop_at(2))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_impossible_schedules_are_refused() -> None:
    for wrong in ({"steps": 0}, {"steps": 3, "ema_decay": 1.0}, {"steps": 3, "max_minutes": math.nan}):
        with pytest.raises(SettingError, match="schedule"):
            LoopSettings(**wrong)  # type: ignore[arg-type]
