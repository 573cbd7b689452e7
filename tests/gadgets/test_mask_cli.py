"""``recon mask``: from the density to the sequence, in four commands."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from gadgets.mask_cli import app
from recon_core.errors import DataError, SettingError
from recon_core.sampling.mask_files import SamplingMask, read_mask, write_mask

SMALL = [
    "--k1",
    "16",
    "--k2",
    "8",
    "--echoes",
    "3",
    "--acceleration",
    "4",
    "--segments",
    "4",
    "--acs-k1",
    "4",
    "--acs-k2",
    "2",
]


def _run(*words: str | Path) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_from_density_to_sequence(tmp_path: Path) -> None:
    drawn, ordered = tmp_path / "drawn.h5", tmp_path / "ordered.h5"
    assert "32 of 16 x 8 positions in each of 3 echoes, acceleration 4.000" in _run("draw", drawn, *SMALL, "--per-echo")
    said = _run("order", drawn, ordered, "--segments", "4", "--png", tmp_path / "order.png")
    assert "4 segments x 8 = 32 excitations, as in the paper" in said and "largest echo-to-echo jump" in said
    shown = _run("show", ordered, "--png", tmp_path / "mask.png")
    assert "acceleration 4.000" in shown and "density: multi-level" in shown and "seed: 0" in shown
    for picture in ("order.png", "mask.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    said = _run(
        "export", ordered, "--csv", tmp_path / "scan.csv", "--seq", tmp_path / "scan.seq",
        *["--matrix", "16", "--fov-mm", "160", "160", "80", "--echo-spacing-ms", "4", "--tr-ms", "20", "--dummies", "1"],
    )  # fmt: skip
    assert "96 readouts in 0.7 s" in said and "echo times 3.99" in said and "timing check passed" in said
    assert (tmp_path / "scan.seq").is_file() and (tmp_path / "scan.mrd.xml").is_file()
    np.testing.assert_array_equal(read_mask(tmp_path / "scan.csv").order, read_mask(ordered).order)


def test_one_pattern_by_default_and_bounded_jumps(tmp_path: Path) -> None:
    _run("draw", tmp_path / "a.h5", *SMALL)
    mask = read_mask(tmp_path / "a.h5").mask
    assert (mask == mask[:1]).all()
    assert "jump 0.00" in _run("order", tmp_path / "a.h5", tmp_path / "b.csv", "--segments", "4", "--max-jump", "0")
    _run("draw", tmp_path / "c.h5", *SMALL, "--per-echo", "--seed", "1")
    with pytest.raises(SettingError, match="at least"):
        _run("order", tmp_path / "c.h5", tmp_path / "d.h5", "--segments", "4", "--max-jump", "0.1")
    assert not (tmp_path / "d.h5").exists()


def test_learned_probabilities_for_another_matrix_and_fewer_echoes(tmp_path: Path) -> None:
    """Probability in the left half of k1 in echo 0, in the right half in echo 1: so are the samples."""
    p = np.full((3, 8, 10), 0.02, np.float32)
    p[0, :, :4] = p[1, :, 6:] = 0.6
    write_mask(tmp_path / "trained.h5", SamplingMask(p > 0.5, p))
    words = [
        "--k1",
        "30",
        "--k2",
        "16",
        "--echoes",
        "2",
        "--acceleration",
        "6",
        "--segments",
        "4",
        "--acs-k1",
        "2",
        "--acs-k2",
        "2",
    ]
    _run("draw", tmp_path / "new.h5", "--like", tmp_path / "trained.h5", *words)
    mask = read_mask(tmp_path / "new.h5").mask
    assert mask.shape == (2, 16, 30) and mask.sum((1, 2)).tolist() == [80, 80]
    assert mask[0, :, :15].sum() > 60 and mask[1, :, 15:].sum() > 60
    with pytest.raises(DataError, match="fewer echoes"):
        _run("draw", tmp_path / "x.h5", "--like", tmp_path / "trained.h5", "--echoes", "4")
    write_mask(tmp_path / "bare.h5", SamplingMask(mask))
    with pytest.raises(DataError, match="no probabilities"):
        _run("draw", tmp_path / "x.h5", "--like", tmp_path / "bare.h5")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        _run("show", tmp_path / "none.h5")
    _run("draw", tmp_path / "a.h5", *SMALL)
    with pytest.raises(SettingError, match="nothing to write"):
        _run("export", tmp_path / "a.h5")
    with pytest.raises(SettingError, match="no order"):
        _run("export", tmp_path / "a.h5", "--seq", tmp_path / "a.seq")
    with pytest.raises(SettingError, match="divides the samples"):
        _run("order", tmp_path / "a.h5", tmp_path / "b.h5", "--segments", "5")
