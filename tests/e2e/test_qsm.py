"""R2* and susceptibility of a 3D multi-echo scan through the running server: units, windows, geometry, known truth, bad input."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.service import Service
from gadgets.wire.events import Image
from tests.e2e.multi_echo_head import INSERTS, HeadTruth, multi_echo_head
from tests.e2e.scans import Batches, SimulatedScan, ask, complaints, encoded, is_noise
from tests.e2e.test_t1_maps import meta, values
from tests.strict_client import Answer

ROLES = {"R2STAR": "1/s", "R2STARSD": "1/s", "S0": None, "LOCALFIELD": "Hz", "QSM": "ppb", "BRAINMASK": ""}
WARN: dict[str, Any] = {"maps": "qsm", "map_failure": "warn"}  # what the chain llr_qsm sets, for a quicker method


def head() -> tuple[SimulatedScan, HeadTruth]:
    """Two-fold undersampled in both phase-encoding directions, oblique: B0 lies along no axis of the image."""
    return multi_echo_head(mask="poisson", acceleration=2.0, orientation="oblique")


@pytest.fixture(scope="module")
def answer(service: Service) -> Answer:
    return ask(service, "llr_qsm", head()[0], iterations=20)


def maps_of(answer: Answer) -> dict[str, Image]:
    return {meta(i)["GADGETRON_DataRole"][0]: i for i in answer.images if meta(i)["DataRole"][0] == "Quantitative"}


def contrast(answer: Answer) -> list[Image]:
    return [i for i in answer.images if meta(i)["DataRole"][0] == "Image"]


def without_echoes(scan: SimulatedScan, lost: set[int]) -> list[bytes]:
    kept: Batches = []
    for headers, samples in scan.stream.batches:
        keep = is_noise(headers) | ~np.isin(headers["idx"]["contrast"], list(lost))
        if keep.any():
            kept.append((headers[keep], samples[keep]))
    return encoded(kept)


def inner(mask: NDArray[np.bool_], values_: NDArray[np.float64]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = values_[mask & np.isfinite(values_)]
    return found


def test_images_and_maps_arrive_with_units_windows_and_geometry(answer: Answer) -> None:
    assert not complaints(answer)
    combined, *echoes = contrast(answer)
    assert len(echoes) == 4 and "root sum of squares" in combined.attributes
    assert "EchoTime" not in meta(combined)  # it belongs to no echo
    assert [float(meta(i)["EchoTime"][0]) for i in echoes] == pytest.approx([4.0, 9.0, 14.0, 19.0])
    squares = sum(np.abs(i.data[0].astype(float)) ** 2 for i in echoes)
    np.testing.assert_allclose(combined.data[0], np.sqrt(squares), rtol=1e-4, atol=1e-3 * np.sqrt(squares).max())
    maps = maps_of(answer)
    assert set(maps) == set(ROLES)
    for role, unit in ROLES.items():
        m, own = meta(maps[role]), maps[role].header
        assert unit is None or m.get("QuantityUnit", ("",)) == (unit,)
        assert maps[role].data.dtype == np.uint16 and m["PixelPaddingValue"] == ("0",)
        assert int(m["WindowWidth"][0]) > 0 and m["ImageTypeValue4"] == (role,)
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view", "matrix_size"):
            np.testing.assert_array_equal(own[name], combined.header[name], err_msg=f"{role} {name}")
    chi = meta(maps["QSM"])
    assert (int(chi["WindowCenter"][0]), int(chi["WindowWidth"][0])) == (0, 300)
    assert (float(chi["RescaleSlope"][0]), float(chi["RescaleIntercept"][0])) == (0.5, -1024.0)
    assert "zero: mean of whole mask" in maps["QSM"].attributes


def test_r2star_is_the_true_one(answer: Answer) -> None:
    truth, maps = head()[1], maps_of(answer)
    r2star, sd = values(maps["R2STAR"]), values(maps["R2STARSD"])
    for (_, _, _, rate), inside in zip(INSERTS, truth.inserts, strict=True):
        assert np.isfinite(r2star[inside]).mean() > 0.98
        assert np.median(inner(inside, r2star)) == pytest.approx(rate, rel=0.04)
        # regularisation smooths: the deviation, which is that of the noise, is not all of it
        assert np.median(np.abs(inner(inside, r2star) - rate)) < 0.12 * rate
        assert 0.2 < np.median(inner(inside, sd)) < 4.0


def test_brain_local_field_and_susceptibility(answer: Answer) -> None:
    truth, maps = head()[1], maps_of(answer)
    mask = np.isfinite(values(maps["BRAINMASK"]))
    assert 2 * (mask & truth.brain).sum() / (mask.sum() + truth.brain.sum()) > 0.95
    ppm, local = values(maps["QSM"]) / 1e3, values(maps["LOCALFIELD"])
    both = truth.brain & np.isfinite(local)
    error = (local - truth.local)[both]
    assert np.linalg.norm(error - error.mean()) < 0.42 * np.linalg.norm(truth.local[both])
    brain = np.median(inner(truth.brain & (truth.chi == 0), ppm))
    found = [float(inner(inside, ppm).mean()) - brain for inside in truth.inserts]
    true = [ppm for _, _, ppm, _ in INSERTS]
    slope = float(np.dot(found, true) / np.dot(true, true))
    assert 0.8 < slope < 1.1
    assert np.corrcoef(found, true)[0, 1] > 0.99


def test_echo_images_can_be_left_out_and_r2star_asked_for_alone(service: Service) -> None:
    alone = ask(service, "cg_sense", head()[0], maps="r2star", map_echo_images=False, map_r2star_fit="arlo")
    assert len(contrast(alone)) == 1 and sorted(maps_of(alone)) == ["R2STAR", "R2STARSD", "S0"]
    assert not complaints(alone)


def test_a_header_without_echo_times_gives_images_and_says_why_there_is_no_map(service: Service) -> None:
    scan, _ = head()
    header = re.sub(r"(<TE>.*?</TE>)+", "", scan.header)
    said = ask(service, "cg_sense", scan, header=header, **WARN)
    assert len(contrast(said)) == 4 and not maps_of(said)
    assert any("no echo times" in text for text in complaints(said))


def test_a_header_without_field_strength_gives_r2star_and_says_why_there_is_no_susceptibility(service: Service) -> None:
    scan, truth = head()
    header = re.sub(r"<(H1resonanceFrequency_Hz|systemFieldStrength_T)>.*?</\1>", "", scan.header)
    header = header.replace("<experimentalConditions/>", "")
    said = ask(service, "cg_sense", scan, header=header, **WARN)
    assert len(contrast(said)) == 5 and sorted(maps_of(said)) == ["R2STAR", "R2STARSD", "S0"]
    assert any("R2* only, no susceptibility map: " in text and "no field strength" in text for text in complaints(said))
    rate = np.median(inner(truth.inserts[0], values(maps_of(said)["R2STAR"])))
    assert rate == pytest.approx(INSERTS[0][3], rel=0.06)
    refused = ask(service, "cg_sense", scan, header=header, maps="qsm")  # before anything is reconstructed
    assert any("no field strength" in text for text in complaints(refused))


def test_equal_echo_times_and_a_single_echo_are_refused_in_words(service: Service) -> None:
    scan, _ = head()
    header = re.sub(r"(<TE>.*?</TE>)+", "<TE>4</TE>" * 4, scan.header)
    same = ask(service, "cg_sense", scan, header=header, **WARN)
    assert len(contrast(same)) == 4 and any("occurs twice" in text for text in complaints(same))
    single = ask(service, "cg_sense", scan, messages=without_echoes(scan, {1, 2, 3}), incomplete="drop", **WARN)
    assert len(contrast(single)) == 1 and any("too few echoes" in text for text in complaints(single))


def test_a_missing_echo_is_named_and_the_others_make_the_maps(service: Service) -> None:
    scan, truth = head()
    refused = ask(service, "cg_sense", scan, messages=without_echoes(scan, {2}), maps="r2star")
    assert not refused.images and any("contrast 2" in text for text in refused.texts)
    three = ask(service, "cg_sense", scan, messages=without_echoes(scan, {2}), maps="r2star", incomplete="drop")
    echoes = contrast(three)[1:]
    assert [float(meta(i)["EchoTime"][0]) for i in echoes] == pytest.approx([4.0, 9.0, 19.0])
    assert any("contrast" in text for text in complaints(three))
    inside = truth.inserts[0]
    assert np.median(inner(inside, values(maps_of(three)["R2STAR"]))) == pytest.approx(INSERTS[0][3], rel=0.06)


def test_alternating_readouts_of_which_one_echo_was_lost_are_still_corrected(service: Service) -> None:
    """Echoes 0, 2 and 3 are left: two forwards, one backwards, and no two neighbours alternate as before."""
    scan, truth = multi_echo_head(bipolar=True)
    told = ask(service, "cg_sense", scan, messages=without_echoes(scan, {1}), incomplete="drop", **WARN)
    assert any("alternating readouts: phase corrected" in text for text in complaints(told))
    ppm = values(maps_of(told)["QSM"]) / 1e3
    found = [float(inner(inside, ppm).mean()) for inside in truth.inserts]
    assert np.corrcoef(found, [ppm for _, _, ppm, _ in INSERTS])[0, 1] > 0.98


def test_no_brain_is_said_and_nothing_is_lost(service: Service) -> None:
    scan, _ = multi_echo_head(empty=True)
    said = ask(service, "cg_sense", scan, **WARN)
    assert len(contrast(said)) >= 4 and "QSM" not in maps_of(said)
    assert any("no brain found" in text for text in complaints(said))
