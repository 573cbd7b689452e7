"""The nine-tube phantom: its T1 survive simulation and fit, and the report says by hand what it should."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.maps.t1 import saturation_recovery_t1
from recon_core.simulation.options import settings_for
from recon_core.simulation.scan import simulate_scan
from recon_core.simulation.tubes import LABELS, PROTOCOL, TABLE_I, TubePhantom, compare_tubes

SMALL = {**PROTOCOL, "matrix_x": 64, "matrix_y": 64, "coils": 2, "mask": "full", "acceleration": 1.0}


def test_the_scans_noise_free_images_give_the_tubes_t1() -> None:
    scan = simulate_scan("satrec", settings_for("satrec", SMALL))
    truth = scan.truth
    assert truth.states == (0.5, 1.0, 1.5, 2.0, 8.0) and truth.label_names == LABELS
    fitted = saturation_recovery_t1(torch.from_numpy(truth.images[0]), truth.states)
    report = compare_tubes(fitted.t1.data.numpy(), truth.labels[0, 0], fitted.t1.valid.numpy())
    assert report.reference.tolist() == list(TABLE_I) and (report.valid == 1).all()
    assert np.abs(report.relative).max() < 0.01 and report.rms_deviation < 0.01


def test_at_eight_fold_the_protocol_reads_24_lines_of_which_8_are_central() -> None:
    s = settings_for("satrec", {**PROTOCOL, "coils": 1, "slices": 1})
    assert (s.matrix_y / s.acceleration, s.acs) == (24, 8)
    with pytest.raises(SettingError, match="tubes are for satrec"):
        settings_for("molli", {"phantom": "tubes"})


def test_report_by_hand() -> None:
    labels = np.zeros((2, 60, 60), np.uint8)
    for i in range(9):
        labels[:, 2 + 20 * (i // 3) : 16 + 20 * (i // 3), 2 + 20 * (i % 3) : 16 + 20 * (i % 3)] = i + 1
    t1 = np.zeros(labels.shape)
    for i, value in enumerate(TABLE_I):
        t1[labels == i + 1] = value + 0.03
    edge = np.zeros_like(labels, bool)
    edge[:, 2, :] = True
    report = compare_tubes(np.where(edge, 9.0, t1), labels)  # rims do not count
    assert report.deviation == pytest.approx(np.full(9, 0.03)) and report.rms_deviation == pytest.approx(0.03)
    assert report.sd == pytest.approx(np.zeros(9)) and report.relative[0] == pytest.approx(0.03 / 0.28)
    half = compare_tubes(t1, labels, (t1 > 0) & (np.arange(2) == 0)[:, None, None])
    assert half.valid == pytest.approx(np.full(9, 0.5)) and half.rms_deviation == pytest.approx(0.03)
    empty = compare_tubes(np.where(labels == 4, 0.0, t1), labels)
    assert empty.valid[3] == 0 and np.isnan(empty.mean[3]) and np.isnan(empty.rms_deviation)
    with pytest.raises(DataError, match="missing"):
        compare_tubes(t1, np.where(labels == 5, 0, labels))
    with pytest.raises(DataError, match="do not fit"):
        compare_tubes(t1[0], labels)
    with pytest.raises(DataError, match="not nine"):
        TubePhantom((1.0,))
