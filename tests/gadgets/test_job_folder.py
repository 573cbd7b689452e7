"""The job folder: what is kept can be read back without pickles, pictures show what they say, and nothing outlives its capture."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from gadgets import job_folder
from gadgets.job_folder import JobFolders, JobRecord, job_folder_of, remove_orphans, write_job_folder
from gadgets.jobs import Jobs
from gadgets.spool import Spool
from recon_core.types import Result

N_STATES, N_EXPERTS, N_ITERATIONS = 12, 4, 50


def told() -> Result:
    """As a network's method tells it: the first expert takes all of the first half of the states, the last one the other half."""
    weights = np.zeros((N_STATES, N_EXPERTS), np.float32)
    weights[: N_STATES // 2, 0] = weights[N_STATES // 2 :, -1] = 1
    return Result(
        images=(),
        quality={"residual": 1.02, "held_out": float("nan")},
        notes=("stopped early",),
        extras={
            "routing_weights": weights,
            "loss": np.geomspace(1.0, 1e-3, N_ITERATIONS, dtype=np.float32),
            "held_out": np.array([[0, 0.5], [25, 0.2], [49, 0.1]], np.float32),
            "residual_per_state": np.ones(N_STATES, np.float32),
            "temporal_basis": np.eye(N_STATES, 3, dtype=np.complex64),
            "iterations": 50,
        },
    )


@pytest.fixture
def record() -> JobRecord:
    made = JobRecord("moe_dqinr_cine")
    made.add(0, "moe_dqinr_cine", told())
    made.add(2, "llr", Result(images=(), quality={"iterations": 30.0}))
    return made


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_arrays_curves_and_figures_of_merit_come_back(record: JobRecord, tmp_path: Path) -> None:
    folder = tmp_path / "scan.job"
    assert write_job_folder(folder, record) == []
    with np.load(folder / "slice-0000.npz", allow_pickle=False) as kept:
        assert set(kept) == set(told().extras)
        for name, array in told().extras.items():
            np.testing.assert_array_equal(kept[name], array)
    loss = rows(folder / "slice-0000_loss.csv")
    assert loss[0] == ["iteration", "loss"] and len(loss) == 1 + N_ITERATIONS
    np.testing.assert_allclose([float(value) for _, value in loss[1:]], told().extras["loss"])
    assert rows(folder / "slice-0000_held_out.csv")[:2] == [["iteration", "relative_error"], ["0.0", "0.5"]]
    weights = rows(folder / "slice-0000_routing_weights.csv")
    assert weights[0] == ["index", *(f"routing_weights_{n}" for n in range(N_EXPERTS))]
    assert weights[1] == ["0", "1.0", "0.0", "0.0", "0.0"] and weights[-1] == ["11", "0.0", "0.0", "0.0", "1.0"]
    assert not (folder / "slice-0000_temporal_basis.csv").exists()  # complex: only in the arrays
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["chain"] == "moe_dqinr_cine" and set(quality["slices"]) == {"0", "2"}
    assert quality["slices"]["0"]["quality"] == {"residual": 1.02, "held_out": None}
    assert quality["slices"]["0"]["notes"] == ["stopped early"]
    assert quality["slices"]["2"] == {"chain": "llr", "quality": {"iterations": 30.0}, "notes": []}


def test_the_folder_is_its_owners_only_and_holds_no_half_written_file(record: JobRecord, tmp_path: Path) -> None:
    folder = tmp_path / "scan.job"
    write_job_folder(folder, record)
    assert folder.stat().st_mode & 0o077 == 0
    files = list(folder.iterdir())
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)
    assert not [path for path in files if "part" in path.name]


def test_the_heat_map_has_experts_in_rows_and_states_in_columns(record: JobRecord, tmp_path: Path) -> None:
    write_job_folder(tmp_path, record)
    picture = imread(tmp_path / "slice-0000_routing_weights.png")[..., :3]
    # the colour bar's own end of the scale lies to the right of the map
    full = np.abs(picture - np.array([253, 231, 37]) / 255).max(axis=-1) < 0.02
    y, x = np.nonzero(full & (np.arange(picture.shape[1]) < 0.75 * picture.shape[1]))
    top = y < np.median(np.unique(y))
    assert x[top].max() < x[~top].min()  # above: the first expert and the first states; below: the last ones
    wide, high = np.ptp(x[top]) + 1, np.ptp(y[top]) + 1
    assert wide > high


def test_the_loss_curve_is_drawn_with_and_without_held_out_samples(record: JobRecord, tmp_path: Path) -> None:
    def colours(folder: Path) -> tuple[bool, bool]:
        write_job_folder(folder, record)
        picture = (imread(folder / "slice-0000_loss.png")[..., :3] * 255).round().astype(int).reshape(-1, 3)
        blue, orange = (31, 119, 180), (255, 127, 14)
        return bool((picture == blue).all(axis=1).any()), bool((picture == orange).all(axis=1).any())

    assert colours(tmp_path / "with") == (True, True)
    del record.slices[0].arrays["held_out"]
    assert colours(tmp_path / "without") == (True, False)


def test_a_picture_that_cannot_be_drawn_costs_nothing_else(record: JobRecord, tmp_path: Path) -> None:
    record.slices[0].arrays["routing_weights"] = np.ones(5)  # not (state, expert)
    (problem,) = write_job_folder(tmp_path, record)
    assert "routing_weights" in problem and "slice 0" in problem
    assert (tmp_path / "slice-0000_loss.png").exists() and (tmp_path / "slice-0000.npz").exists()
    assert not (tmp_path / "slice-0000_routing_weights.png").exists()


def test_what_would_need_a_pickle_or_too_much_room_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(job_folder, "MAX_BYTES", 1000)
    made = JobRecord("llr")
    extras = {"object": {"a": 1}, "text": "words", "large": np.zeros(1000), "small": np.zeros(10), "ragged": None}
    with caplog.at_level(logging.WARNING):
        made.add(0, "llr", Result(images=(), extras=extras))
    assert set(made.slices[0].arrays) == {"small"}
    assert len(caplog.records) == 4


def test_folders_go_with_their_captures(tmp_path: Path) -> None:
    kept, gone = tmp_path / "a.mrd", tmp_path / "b.mrd"
    kept.write_bytes(b"x")
    for capture in (kept, gone):
        job_folder_of(capture).mkdir()
        (job_folder_of(capture) / "quality.json").write_text("{}")
    (tmp_path / "something else").mkdir()
    assert remove_orphans(tmp_path) == 1
    assert job_folder_of(kept).exists() and not job_folder_of(gone).exists() and (tmp_path / "something else").exists()


@pytest.mark.parametrize("spool", [True, False])
def test_a_scan_without_a_capture_has_no_folder_unless_one_is_named(spool: bool, record: JobRecord, tmp_path: Path) -> None:
    jobs = Jobs(0)
    log = Spool(tmp_path / "spool" if spool else None, min_free_bytes=0, temporary_directories=(tmp_path,)).open()
    log.append(b"\1\0")
    for folder in (None, tmp_path / "named"):
        folders = JobFolders(jobs, folder)
        folders.keep(record, log)
        folders.close()
    assert (tmp_path / "named" / "quality.json").exists()
    assert job_folder_of(log.path).exists() == spool
    log.finish("complete")
    jobs.close()


def test_a_folder_that_cannot_be_written_is_told(
    record: JobRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    jobs = Jobs(0)
    folders = JobFolders(jobs, tmp_path / "file" / "folder")
    log = Spool(None, temporary_directories=(tmp_path,)).open()
    folders.keep(record, log)
    folders.close()
    jobs.close()
    assert "event=job_folder_failed" in caplog.text
    assert folders.problems == ["Not a directory"]


def test_a_scan_that_told_nothing_leaves_no_folder(tmp_path: Path) -> None:
    jobs = Jobs(0)
    log = Spool(tmp_path / "spool", min_free_bytes=0).open()
    log.append(b"\1\0")
    made = JobRecord("fourier")
    made.add(0, "fourier", Result(images=(), quality={"states": 3.0}))
    folders = JobFolders(jobs)
    folders.keep(made, log)
    folders.close()
    assert not job_folder_of(log.path).exists()
    log.discard()
    jobs.close()
