"""The benchmark's own arithmetic: scores, means, verdicts; and one run of it on tiny cells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import bart, common, moe_dqinr
from benchmarks.cell import Cell
from benchmarks.dynamic_cells import make_cell
from benchmarks.dynamic_methods import missing, reconstruct
from benchmarks.dynamic_scores import rank, score
from recon_core.metrics import psnr


@pytest.fixture(scope="module")
def cell() -> Cell:
    return make_cell("molli", 50, 3, 0.01, matrix=(48, 56), n_coils=5)


def test_the_truth_scores_best(cell: Cell) -> None:
    figures = score(cell, cell.images, 1.0, 1)
    assert figures.psnr == float("inf") and figures.roi_hfen == 0 and figures.t1_nmse == 0 and figures.ssim == 1
    assert figures.residual == pytest.approx(1, abs=0.1)
    worse = score(cell, cell.images * 1.05, 1.0, 1)
    assert worse.nrmse == pytest.approx(0.05, rel=1e-3) and worse.roi_hfen == pytest.approx(0.05, rel=1e-3)
    # T1 does not depend on the scale; the data do
    assert worse.t1_percent == pytest.approx(0, abs=0.01)
    assert worse.residual is not None and figures.residual is not None and worse.residual > figures.residual


def test_one_bad_state_shows_in_the_worst_residual(cell: Cell) -> None:
    images = cell.images.copy()
    images[4] = 0
    found = score(cell, images, 1.0, 1).residual
    assert found is not None and found > 5


def test_rank_counts_what_the_series_holds() -> None:
    rng = np.random.default_rng(0)
    courses, planes = rng.standard_normal((7, 3)), rng.standard_normal((3, 400))
    assert rank((courses @ planes).reshape(7, 1, 20, 20).astype(np.complex64)) == 3


def test_methods_run_by_name(cell: Cell) -> None:
    answer = reconstruct("llr", cell, {"iterations": 10})
    assert answer.images.shape == cell.images.shape and answer.iterations == 10 and answer.note == "iterations=10"
    assert psnr(answer.images, cell.images) > psnr(reconstruct("cg_sense", cell, {}).images, cell.images)
    assert missing("llr", {}) is None
    assert "no setting speed" in (missing("llr", {"speed": 9}) or "")
    assert "no such method" in (missing("nothing", {}) or "")


def test_bart_gets_the_best_of_its_weights(cell: Cell, monkeypatch: pytest.MonkeyPatch) -> None:
    """BART itself is not needed: its place is taken by images whose error is known for each weight."""
    asked: list[float] = []

    def answer(words: list[str], *_: object, threads: int) -> bart.Timed:
        weight = float(words[3].split(":")[-1])
        asked.append(weight)
        images = cell.images * (1 + abs(np.log2(weight / 0.008)) / 100)
        return bart.Timed(images.transpose(3, 2, 1, 0)[:, :, :, None, None], 1.5, 1.0)

    monkeypatch.setattr(bart, "run", answer)
    found = reconstruct("bart_llr", cell, {})
    assert found.note == "weight 0.008 by truth" and found.seconds == 1.5
    assert np.allclose(found.images, cell.images)
    assert sorted(asked) == [0.002, 0.004, 0.008, 0.016]


def row(cell: str, method: str, value: float, acceleration: float = 4) -> dict[str, Any]:
    figures = dict.fromkeys((*moe_dqinr.CELL_COLUMNS, "seconds"), value)
    return {"cell": cell, "method": method, "kind": "cine", "origin": "simulated", "acceleration": acceleration, **figures}


def test_verdict_compares_with_the_best_classical_mean_and_the_worst_cell() -> None:
    rows = [
        *(row("a", name, value) for name, value in {"llr": 40, "grasp_pro": 38, "ours": 41, "fmlp": 60}.items()),
        *(row("b", name, value) for name, value in {"llr": 30, "grasp_pro": 34, "ours": 29.5}.items()),
    ]
    found = moe_dqinr.verdict(rows, "ours")
    assert found["gain_over_best_classical_db"]["cine 4x (simulated)"] == {"best": "grasp_pro", "gain_db": -0.75}
    assert found["worst_cell_against_llr"] == {"cell": "b", "gain_db": -0.5}
    assert found["mean_gain_over_llr_db"] == 0.25


def test_a_failure_is_told_and_loses_nothing_else(cell: Cell) -> None:
    # without centre lines in one state GRASP-Pro has no subspace; the others do not need them
    mask = cell.mask.copy()
    mask[0, cell.acs_mask] = False
    bare = replace(cell, mask=mask, kspace=cell.kspace * mask[:, None, :, :, None])
    runs: list[moe_dqinr.Run] = [(name, name, {}) for name in ("llr", "grasp_pro", "cg_sense")]
    failed: list[str] = []
    rows, answers = moe_dqinr.run_cell(bare, runs, moe_dqinr.parse(["--threads", "1"]), failed)
    assert [row["method"] for row in rows] == list(answers) == ["llr", "cg_sense"]
    assert len(failed) == 1 and "grasp_pro: CalibrationError" in failed[0]


def test_significance_is_paired_by_cell() -> None:
    ours = [row(str(i), "ours", 40 + i) for i in range(8)]
    theirs = [row(str(i), "llr", 39 + i - 0.01 * i) for i in range(8)]
    assert moe_dqinr.significance(list(reversed(theirs)), ours) == pytest.approx(2 / 2**8, abs=1e-4)
    assert moe_dqinr.significance(theirs[:4], ours) == ""


def test_the_benchmark_runs_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    words = ["--quick", "--methods", "cg_sense,llr,st_inr,nothing", "--montage", str(tmp_path), "--threads", "1"]
    assert moe_dqinr.main(words) == 0
    document = json.loads((tmp_path / "moe_dqinr_quick.json").read_text(encoding="utf-8"))
    assert len(document["cells"]) == 6
    assert {row["kind"] for row in document["cells"]} == {"cine", "molli"}
    assert document["means"]["all cells"]["llr"]["psnr"] > document["means"]["all cells"]["cg_sense"]["psnr"]
    assert (tmp_path / "cine-simulated.png").stat().st_size > 10_000
