"""Published weights: half the size, the same answer to what rounding allows, and the origin stated."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recon_core.errors import SettingError
from recon_core.training.checkpoint import read_pair, write_pair
from recon_core.training.publish import main, publish


def test_a_published_pair_is_rounded_and_says_where_it_comes_from(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(4, 300), "steps": torch.arange(3)}
    source = write_pair(tmp_path, "pinqi", tensors, {"method": "pinqi", "seed": 3, "commit": "unknown"})
    main([str(source), "--output", str(tmp_path / "out"), "--name", "pinqi_t1", "--fact", "commit=abc"])
    found, facts = read_pair(tmp_path / "out" / "pinqi_t1.json")
    _, before = read_pair(source)
    assert found["a"].dtype == torch.float16 and torch.equal(found["steps"], tensors["steps"])
    assert torch.allclose(found["a"].float(), tensors["a"], rtol=1e-3, atol=1e-7)
    assert facts["trained_sha256"] == before["sha256"] != facts["sha256"]
    assert (facts["seed"], facts["commit"], facts["file"]) == (3, "abc", "pinqi_t1.safetensors")
    size = (tmp_path / "out" / "pinqi_t1.safetensors").stat().st_size
    assert size < 0.6 * (tmp_path / "pinqi.safetensors").stat().st_size


def test_weights_beyond_the_format_are_refused(tmp_path: Path) -> None:
    source = write_pair(tmp_path, "pinqi", {"a": torch.tensor([1e6])}, {"method": "pinqi"})
    with pytest.raises(SettingError, match="a"):
        publish(source, tmp_path / "out", "x")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("none.json", "none.json: no such weights"),
        ("checkpoint.json", "checkpoint.json: no weights of a method"),
        ("pinqi.json --fact sha256=0", "not for you to state; got sha256"),
        ("pinqi.json --fact shipped", "'shipped' is not KEY=TEXT"),
    ],
)
def test_what_cannot_be_published_is_said_in_words(
    words: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pair(tmp_path, "pinqi", {"a": torch.ones(2)}, {"method": "pinqi"})
    write_pair(tmp_path, "checkpoint", {"a": torch.ones(2)}, {"step": 3})
    with pytest.raises(SystemExit):
        main([*f"{tmp_path}/{words}".split(), "--output", str(tmp_path / "out"), "--name", "x"])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()
