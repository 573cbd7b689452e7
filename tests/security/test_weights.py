"""A weight file from somebody else can be refused, and nothing more."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from recon_core.installed_weights import find_installed, weight_folders
from recon_core.methods.laro import weights as laro
from recon_core.methods.pinqi import weights as pinqi
from recon_core.training.checkpoint import WeightError, read_pair, sha256_of, write_pair

INSTALLED = {"pinqi_t1": pinqi.load_weights, "laro": laro.load_weights, "laro_206x80": laro.load_weights}


def shipped(name: str) -> tuple[dict[str, Any], bytes]:
    path = weight_folders()[-1] / f"{name}.json"
    facts = json.loads(path.read_text())
    return facts, (path.parent / facts["file"]).read_bytes()


def changed(folder: Path, name: str, facts: Mapping[str, Any], tensors: bytes | None = None) -> Path:
    """Somebody's pair: the digest is right, because they made it themselves."""
    original, content = shipped(name)
    content = content if tensors is None else tensors
    (folder / original["file"]).write_bytes(content)
    digest = sha256_of(folder / original["file"])
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**original, "sha256": digest, **facts}))
    return path


@pytest.mark.parametrize("name", INSTALLED)
def test_shipped_weights_load(name: str, tmp_path: Path) -> None:
    INSTALLED[name](changed(tmp_path, name, {}))


@pytest.mark.parametrize("name", INSTALLED)
def test_a_wrong_digest(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="sha256"):
        INSTALLED[name](changed(tmp_path, name, {"sha256": "0" * 64}))


@pytest.mark.parametrize("name", INSTALLED)
def test_one_byte_of_the_tensors_changed(name: str, tmp_path: Path) -> None:
    path = changed(tmp_path, name, {})
    file = path.parent / json.loads(path.read_text())["file"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(WeightError, match="sha256"):
        INSTALLED[name](path)


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize("value", [10**9, 10**30, -(10**9), [1] * 5000, {"a": [10**9]}, 1e300])
def test_absurd_networks_are_not_built(name: str, value: object, tmp_path: Path) -> None:
    network = shipped(name)[0]["network"]
    for key in network:
        with pytest.raises(WeightError):
            INSTALLED[name](changed(tmp_path, name, {"network": {**network, key: value}}))


@pytest.mark.parametrize("name", INSTALLED)
@pytest.mark.parametrize(
    "change",
    [
        {"network": None},
        {"network": []},
        {"network": "x"},
        {"network": {"__class__": "x"}},
        {"amplitude": None},
        {"amplitude": "one"},
        {"method": ["pinqi"]},
        {"format": "1"},
        {"file": None},
        {"file": ""},
        {"file": "../../../../etc/passwd"},
        {"file": "/dev/zero"},
        {"sha256": 7},
    ],
    ids=str,
)
def test_incomplete_descriptions(name: str, change: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(WeightError):
        INSTALLED[name](changed(tmp_path, name, change))


def header(entries: object, n_bytes: int = 0) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(n_bytes)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04K\x01.",  # a pickle
        struct.pack("<Q", 1 << 60) + b"{}",
        struct.pack("<Q", 1 << 30) + bytes(1000),
        header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}, 4),
        header({"a": {"dtype": "F32", "shape": [1 << 31, 1 << 31, 1 << 31], "data_offsets": [0, 0]}}),
        header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1 << 50]}}, 4),
        header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, 4),
        header({"a": {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]}}, 8),
        header(
            {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for i in range(1000)}, 4
        ),  # all the same bytes
        header("[" * 1000),
        b"\x02\0\0\0\0\0\0\0{}" + bytes(1000),
    ],
)
def test_tensor_files(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(WeightError):
        pinqi.load_weights(changed(tmp_path, "pinqi_t1", {}, content))


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"x"', "[" * 200_000, "NaN", '{"file": NaN}', "\xff"])
def test_descriptions_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightError):
        read_pair(path)


def test_shapes_of_another_network(tmp_path: Path) -> None:
    facts, _ = shipped("pinqi_t1")
    tensors, _ = read_pair(weight_folders()[-1] / "pinqi_t1.json")
    first = sorted(tensors)[0]
    for wrong in (
        {**tensors, first: torch.zeros(3, 3)},
        {**tensors, "more": torch.zeros(1)},
        {name: value for name, value in tensors.items() if name != first},
    ):
        stated = {k: v for k, v in facts.items() if k not in ("file", "sha256")}
        with pytest.raises(WeightError, match="another network"):
            pinqi.load_weights(write_pair(tmp_path / "w", "w", wrong, stated))


@pytest.mark.parametrize(
    "name", ["../laro", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "laro\n", "x" * 65, "*", "lar?"]
)
def test_names_are_not_paths(name: str) -> None:
    with pytest.raises(WeightError):
        find_installed(name, "laro")


def test_weights_that_are_not_there_are_answered_with_those_of_the_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken.json").write_text("[")
    monkeypatch.setenv("RECON_WEIGHTS", str(tmp_path))
    for method, known in (("laro", "laro, laro_206x80"), ("pinqi", "pinqi_t1")):
        with pytest.raises(WeightError, match="no such weights") as found:
            find_installed("lost", method)
        assert found.value.expected == known
