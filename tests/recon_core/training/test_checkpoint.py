"""Tensors on disk: bit for bit, whole or not at all, and never a pickle."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from recon_core.errors import WriteError
from recon_core.training import checkpoint
from recon_core.training.checkpoint import (
    WeightError,
    load_into,
    optimizer_tensors,
    random_state,
    read_pair,
    restore_optimizer,
    restore_random_state,
    sha256_of,
    stored_shape,
    write_json,
    write_pair,
)


def test_a_pair_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(float("nan")), "t": torch.randn(2, 3).mT}
    path = write_pair(tmp_path, "w", tensors, {"seed": 3})
    found, facts = read_pair(path)
    assert facts["seed"] == 3 and facts["sha256"] == sha256_of(tmp_path / "w.safetensors")
    assert all(torch.equal(found[k], v) or (k == "c" and found[k].isnan()) for k, v in tensors.items())
    assert not list(tmp_path.glob("*.part"))


def test_a_new_version_replaces_the_old_one_last(tmp_path: Path) -> None:
    write_pair(tmp_path, "w", {"a": torch.zeros(2)}, {}, version="-1")
    path = write_pair(tmp_path, "w", {"a": torch.ones(2)}, {}, version="-2")
    assert [p.name for p in tmp_path.glob("*.safetensors")] == ["w-2.safetensors"]
    assert read_pair(path)[0]["a"].sum() == 2
    # a writer that dies before the JSON is renamed leaves the old pair whole
    (tmp_path / "w-3.safetensors").write_bytes(b"half")
    (tmp_path / "w.json.part").write_text("{")
    assert read_pair(path)[0]["a"].sum() == 2


def disk_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("version", ["", "-2"])
def test_a_full_disk_is_named_and_leaves_the_old_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Once the writer's own error came out, as a traceback."""
    path = write_pair(tmp_path, "w", {"a": torch.zeros(2)}, {}, version=version and "-1")
    with monkeypatch.context() as full:
        full.setattr(checkpoint.os, "fsync", disk_full)
        with pytest.raises(
            WriteError, match=rf"{tmp_path.name}/w{version}.safetensors: cannot be written; got No space left"
        ):
            write_pair(tmp_path, "w", {"a": torch.ones(2)}, {}, version=version)
        with pytest.raises(WriteError, match=r"other\.json: cannot be written"):
            write_json(tmp_path / "other.json", {})
    assert read_pair(path)[0]["a"].sum() == 0 and len(list(tmp_path.iterdir())) == 2  # and nothing that fills the disk
    assert read_pair(write_pair(tmp_path, "w", {"a": torch.ones(2)}, {}, version=version))[0]["a"].sum() == 2


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"out/w\.safetensors: cannot be written; got Not a directory"):
        write_pair(tmp_path / "file" / "out", "w", {"a": torch.zeros(2)}, {})


@pytest.mark.parametrize("dies_at", [1, 2])
def test_a_writer_that_dies_never_leaves_a_json_beside_other_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: int
) -> None:
    """Of exported weights, whose tensors keep their name: before either of the two renamings."""
    path, calls, replace = write_pair(tmp_path, "w", {"a": torch.zeros(2)}, {}), [], os.replace

    def dies(part: Path, final: Path) -> None:
        calls.append(final)
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        replace(part, final)

    with monkeypatch.context() as dying:
        dying.setattr(checkpoint.os, "replace", dies)
        with pytest.raises(KeyboardInterrupt):
            write_pair(tmp_path, "w", {"a": torch.ones(2)}, {})
    with pytest.raises(WeightError, match="no such weights"):
        read_pair(path)
    assert read_pair(write_pair(tmp_path, "w", {"a": torch.ones(2)}, {}))[0]["a"].sum() == 2
    assert not list(tmp_path.glob("*.part"))


def test_what_a_killed_writer_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "w-1.safetensors.part").write_bytes(b"half")
    write_pair(tmp_path, "w", {"a": torch.ones(2)}, {}, version="-2")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w-2.safetensors", "w.json"]


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda d: (d / "w.json").unlink(), "no such weights"),
        (lambda d: (d / "w.json").write_text("{}"), "not a description"),
        (lambda d: (d / "w.json").write_text("[1"), "not a description"),
        (lambda d: (d / "w.safetensors").unlink(), "missing"),
        (lambda d: (d / "w.safetensors").write_bytes(b"x"), "sha256"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, why: str) -> None:
    write_pair(tmp_path, "w", {"a": torch.zeros(2)}, {})
    damage(tmp_path)  # type: ignore[operator]
    with pytest.raises(WeightError, match=why):
        read_pair(tmp_path / "w.json")


def test_files_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_pair(tmp_path, "w", {"a": torch.zeros(2)}, {})
    for owner, name, where in ((Path, "read_text", r"w\.json"), (checkpoint, "sha256_of", r"w\.safetensors")):

        def refused(*_: object, **__: object) -> None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

        with monkeypatch.context() as closed:
            closed.setattr(owner, name, refused)
            with pytest.raises(WeightError, match=f"{where}: cannot be read; got Permission denied"):
                read_pair(path)


def test_a_folder_is_no_description_of_weights(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no folder")
    for path in (tmp_path, tmp_path / "text" / "w.json"):
        with pytest.raises(WeightError, match="no such weights"):
            read_pair(path)


def test_a_shape_is_known_without_reading_the_tensors(tmp_path: Path) -> None:
    path = write_pair(tmp_path, "w", {"a": torch.zeros(2, 3)}, {})
    assert stored_shape(path, "a") == (2, 3)
    with pytest.raises(WeightError, match="'b'"):
        stored_shape(path, "b")
    (tmp_path / "w.safetensors").write_bytes(b"half")
    with pytest.raises(WeightError, match="not a safetensors file"):
        stored_shape(path, "a")


def test_a_pickle_is_not_read_even_with_the_right_digest(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(json.dumps({"file": "w.safetensors", "sha256": sha256_of(tmp_path / "w.safetensors")}))
    with pytest.raises(WeightError, match="not a safetensors"):
        read_pair(tmp_path / "w.json")


def test_a_description_cannot_point_outside_its_folder(tmp_path: Path) -> None:
    path = write_pair(tmp_path / "in", "w", {"a": torch.zeros(2)}, {})
    (tmp_path / "in" / "w.safetensors").rename(tmp_path / "w.safetensors")
    facts = json.loads(path.read_text())
    path.write_text(json.dumps({**facts, "file": "../w.safetensors"}))
    with pytest.raises(WeightError, match="missing"):
        read_pair(path)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(WeightError, match="another network"):
        load_into(nn.Linear(2, 3), nn.Linear(3, 3).state_dict(), "w")
    with pytest.raises(WeightError, match="bias"):
        load_into(nn.Linear(2, 3), {"weight": torch.zeros(3, 2)}, "w")


def test_an_optimiser_continues_as_if_nothing_had_happened() -> None:
    def steps(optimizer: torch.optim.Optimizer, p: nn.Parameter, n: int) -> None:
        for i in range(n):
            p.grad = torch.sin(p.detach() + i)
            optimizer.step()

    p = nn.Parameter(torch.ones(4))
    first = torch.optim.AdamW([p], lr=0.1)
    steps(first, p, 5)
    stored, value = {k: v.clone() for k, v in optimizer_tensors(first).items()}, p.detach().clone()
    steps(first, p, 5)
    q = nn.Parameter(value)
    second = torch.optim.AdamW([q], lr=0.1)
    restore_optimizer(second, stored)
    steps(second, q, 5)
    assert torch.equal(p, q)


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    np.random.normal()  # noqa: NPY002 - leaves half a pair in the generator
    tensors, facts = random_state()
    path = write_pair(tmp_path, "r", tensors, {"random": facts})
    wanted = torch.randn(3), np.random.normal(size=3)  # noqa: NPY002
    loaded, found = read_pair(path)
    restore_random_state(loaded, found["random"])
    assert torch.equal(torch.randn(3), wanted[0]) and np.array_equal(np.random.normal(size=3), wanted[1])  # noqa: NPY002
