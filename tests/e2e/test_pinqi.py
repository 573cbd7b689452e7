"""PINQI's maps through the running server by a separate client: units, windows, geometry, truth, and what stands in for it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from gadgets.image_file import read_images
from gadgets.meta import read_meta
from gadgets.service import Service, ServiceOptions
from gadgets.simulate import simulate_kind, stream_of
from gadgets.wire.events import Image
from recon_core.installed_weights import FOLDERS, weight_folders
from recon_core.simulation.quantitative_brain import BrainBatch
from recon_core.simulation.tubes import PROTOCOL, TubeReport, compare_tubes
from tests.e2e.scans import Batches, SimulatedScan, ask, complaints, encoded, in_memory, is_noise, simulated
from tests.e2e.semi_measured import synthetic_brain
from tests.strict_client import Answer

SMALL = {**PROTOCOL, "matrix_x": 96, "matrix_y": 96, "acceleration": 4.0, "coils": 6, "snr": 60.0}
N_DRAWS = 8
BRAIN = {"mask": "random", "acceleration": 4.0, "acs": 16, "snr": 50.0}


@pytest.fixture(scope="module")
def tubes() -> SimulatedScan:
    """One slice of nine tubes, five delays, four-fold undersampled: nothing like a brain."""
    return in_memory("satrec", **SMALL)


def meta(image: Image) -> dict[str, tuple[str, ...]]:
    return read_meta(image.attributes)


def by_role(answer: Answer) -> dict[str, list[Image]]:
    found: dict[str, list[Image]] = {}
    for image in answer.images:
        found.setdefault(meta(image).get("GADGETRON_DataRole", ("",))[0], []).append(image)
    return found


def in_ms(image: Image) -> NDArray[np.float64]:
    """A map in its unit (T1: ms), NaN where it is empty."""
    m, pixels = meta(image), image.data[0].astype(float)
    shown = pixels * float(m["RescaleSlope"][0]) + float(m["RescaleIntercept"][0])
    return np.where(pixels == float(m["PixelPaddingValue"][0]), np.nan, shown)


@pytest.fixture(scope="module")
def brain_answer(service: Service) -> tuple[SimulatedScan, BrainBatch, Answer]:
    """A held-out brain, and its answer with phase images."""
    scan, batch = synthetic_brain(192, 1, **BRAIN)
    return scan, batch, ask(service, "pinqi_t1", scan, phase=True)


def test_maps_arrive_with_units_windows_and_geometry(brain_answer: tuple[SimulatedScan, BrainBatch, Answer]) -> None:
    answer = brain_answer[2]
    assert not complaints(answer)
    found = by_role(answer)
    assert {role: len(images) for role, images in found.items()} == {"Image": 10, "T1": 1, "T1SD": 1, "M0": 1, "M0_PHASE": 1}
    for role, unit, slope, window in (
        ("T1", ("ms",), 1.0, (1600, 1600)),
        ("T1SD", ("ms",), 1.0, (100, 200)),
        ("M0", None, None, None),  # the images' own unit
        ("M0_PHASE", ("mrad",), 2.0, (0, 6283)),
    ):
        image = found[role][0]
        m = meta(image)
        shown, center, width = in_ms(image), int(m["WindowCenter"][0]), int(m["WindowWidth"][0])
        assert m.get("QuantityUnit") == unit and m["QuantityName"] == (role,) and m["RescaleIntercept"] != ("-0.0",)
        assert slope is None or float(m["RescaleSlope"][0]) == slope
        if window is None:  # it shows what there is
            low, high = np.nanpercentile(shown, (5, 95))
            assert center - width / 2 <= low and high <= center + width / 2
            assert width <= 1.5 * np.nanmax(shown)
        else:
            assert (center, width) == window
        assert any("weights" in text for text in m["ImageComment"])
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view", "matrix_size", "slice"):
            np.testing.assert_array_equal(image.header[name], found["Image"][0].header[name], err_msg=f"{role} {name}")
        np.testing.assert_array_equal(np.isnan(shown), np.isnan(in_ms(found["T1"][0])), err_msg=role)


def test_a_client_process_gets_the_same_in_a_file(service: Service, tmp_path: Path) -> None:
    """``recon replay`` of a file: the maps of the tubes, as they are in the tubes and as an in-process client has them."""
    scan = simulated("satrec", tmp_path / "tubes.h5", **SMALL)
    out, recon = tmp_path / "maps.h5", Path(sys.executable).with_name("recon")
    command = [str(recon), "replay", str(scan.path), "-c", "pinqi_t1", "-o", str(out), "--port", str(service.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    found, expected = by_role(Answer(images=list(read_images(out)))), by_role(ask(service, "pinqi_t1", scan))
    assert {role: len(own) for role, own in found.items()} == {"Image": 5, "T1": 1, "T1SD": 1, "M0": 1, "M0_PHASE": 1}
    for role in ("T1", "T1SD", "M0", "M0_PHASE"):
        (own,), (other,) = found[role], expected[role]
        np.testing.assert_array_equal(own.data, other.data, err_msg=role)
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view", "matrix_size"):
            np.testing.assert_array_equal(own.header[name], other.header[name], err_msg=f"{role} {name}")
        mine, theirs = meta(own), meta(other)
        for name in ("QuantityName", "QuantityUnit", "RescaleSlope", "RescaleIntercept", "WindowCenter", "WindowWidth"):
            assert mine.get(name) == theirs.get(name), (role, name)
    assert report_of(found["T1"][0], scan).rms_deviation < 0.035


def test_t1_is_the_true_one(service: Service, brain_answer: tuple[SimulatedScan, BrainBatch, Answer]) -> None:
    scan, batch, answer = brain_answer
    brain = batch.brain[0].numpy()

    def error(answer: Answer) -> float:
        values, true = in_ms(by_role(answer)["T1"][0])[0][brain], 1e3 * batch.t1[0].numpy()[brain]
        assert np.isfinite(values).mean() > 0.98
        kept = np.isfinite(values)
        return float(np.linalg.norm(values[kept] - true[kept]) / np.linalg.norm(true[kept]))

    assert error(answer) < min(0.1, 1.05 * error(ask(service, "llr_t1", scan, map_model="saturation_recovery")))


def test_m0_and_its_phase_are_those_of_the_object(brain_answer: tuple[SimulatedScan, BrainBatch, Answer]) -> None:
    """After 8 s nearly everything has recovered. Estimated coil maps leave a smooth phase."""
    scan, batch, answer = brain_answer
    brain, true = batch.brain[0].numpy(), scan.stream.truth.images[0, -1, 0]

    def image(answer: Answer, role: str) -> NDArray[np.float64]:
        return in_ms(by_role(answer)[role][0])[0]

    m0, phase = image(answer, "M0"), 1e-3 * image(answer, "M0_PHASE")
    inside = brain & np.isfinite(m0)
    kinds = [int(i.header["image_type"]) for i in by_role(answer)["Image"]]
    assert kinds == [1] * 5 + [2] * 5  # magnitudes of all delays, then phases
    magnitude, angle = (by_role(answer)["Image"][i].data[0, 0] for i in (4, 9))
    recovered = 1 - np.exp(-8.0 / batch.t1[0].numpy())
    own = float(meta(by_role(answer)["M0"][0]).get("QuantityUnit", ("1",))[0])
    assert np.median((own * m0 * recovered / magnitude)[inside]) == pytest.approx(1.0, abs=0.02)
    turn = np.exp(1j * (phase - angle))[inside]
    assert np.median(np.abs(np.angle(turn))) < 0.03

    left = np.where(inside, np.exp(1j * (phase - np.angle(true))), 0)
    smooth = ndimage.gaussian_filter(left.real, 8) + 1j * ndimage.gaussian_filter(left.imag, 8)
    assert np.median(np.abs(np.angle(left * smooth.conj()))[inside]) < 0.03


def test_a_turn_of_the_whole_scan_arrives_in_the_phase_of_m0(service: Service, tubes: SimulatedScan) -> None:
    batches = [(h, np.where(is_noise(h)[:, None, None], s, s * np.complex64(np.exp(1j)))) for h, s in tubes.stream.batches]
    before, after = (
        1e-3 * in_ms(by_role(ask(service, "pinqi_t1", tubes, messages=messages))["M0_PHASE"][0])
        for messages in (None, encoded(batches))
    )
    turned = np.angle(np.exp(1j * (after - before)))
    turned = turned[np.isfinite(turned)]
    assert len(turned) > 500
    assert np.median(turned) == pytest.approx(1.0, abs=0.03) and np.median(np.abs(turned - 1.0)) < 0.03


def report_of(image: Image, scan: SimulatedScan) -> TubeReport:
    """A T1 map against what is in the tubes."""
    values = in_ms(image)[0] * 1e-3
    return compare_tubes(np.nan_to_num(values), scan.stream.truth.labels[0, 0, 0], np.isfinite(values))


def answered_by_llr(answer: Answer, reason: str) -> None:
    """The operator is told why, and nobody may take an image for the network's."""
    assert any(reason in text and "llr" in text for text in complaints(answer))
    for image in answer.images:
        m = meta(image)
        assert any("pinqi_t1 failed" in text for text in m["ImageComment"])
        assert "llr_instead_of_pinqi_t1" in m["SeriesDescriptionAdditional"][0]


def test_what_the_network_cannot_explain_is_answered_by_llr_with_a_fit(service: Service, tubes: SimulatedScan) -> None:
    """Whoever answers, the tubes are right; and nobody takes one for the other."""
    answer = ask(service, "pinqi_t1", tubes)
    found = by_role(answer)
    report = report_of(found["T1"][0], tubes)
    assert report.rms_deviation < 0.035 and np.abs(report.relative).max() < 0.07
    assert report.valid.min() > 0.95
    told = any("do not fit the measured data" in text and "llr" in text for text in complaints(answer))
    assert told == ("llr_instead_of_pinqi_t1" in meta(found["T1"][0])["SeriesDescriptionAdditional"][0])


@pytest.mark.parametrize("change", [
    {"orientation": "oblique", "offset_read": 0.03, "offset_slice": -0.04, "partial_fourier": 0.75, "asymmetric_echo": 0.8,
     "averages": 2, "delays": "2,8,0.5,1,1.5", "state_counter": "contrast"},
    {"oversampling": 1, "acceleration": 3.0, "noise_readouts": 0, "calibration": "separate", "state_counter": "repetition"},
])  # fmt: skip
def test_what_scanners_vary_changes_no_tube(service: Service, change: dict[str, Any]) -> None:
    """Several at once, on an image matrix twice as fine as the encoded one; maps lie where the images do."""
    scan = in_memory("satrec", **{**SMALL, **change})
    begin, end = scan.header.index("<reconSpace>"), scan.header.index("</reconSpace>")
    fine = scan.header[begin:end].replace("<x>96</x><y>96</y>", "<x>192</x><y>192</y>")
    found = by_role(ask(service, "pinqi_t1", scan, header=scan.header[:begin] + fine + scan.header[end:]))
    values = in_ms(found["T1"][0])[0] * 1e-3
    nearest = np.clip(np.rint((np.arange(192) - 96) / 2).astype(int) + 48, 0, 95)
    labels = scan.stream.truth.labels[0, 0, 0][np.ix_(nearest, nearest)]
    report = compare_tubes(np.nan_to_num(values), labels, np.isfinite(values))
    assert np.abs(report.relative).max() < 0.04 and report.valid.min() > 0.95
    for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view", "matrix_size"):
        np.testing.assert_array_equal(found["T1"][0].header[name], found["Image"][0].header[name], err_msg=name)


CHAINS = {"pinqi_t1": {}, "llr_t1": {"map_model": "saturation_recovery"}}


@pytest.mark.parametrize("chain", list(CHAINS))
def test_an_incomplete_saturation_is_told_by_whoever_answers(service: Service, chain: str) -> None:
    """All tubes are too short by 2 to 9 %, and the data are explained as well as ever: silence would be a wrong map."""
    scan = in_memory("satrec", **{**SMALL, "saturation_left": 0.06})
    answer = ask(service, chain, scan, **CHAINS[chain])
    (image,) = by_role(answer)["T1"]
    relative = report_of(image, scan).relative
    assert relative.max() < -0.01 and relative.min() > -0.12
    assert any("% of M0" in text and "too short" in text for text in complaints(answer))
    assert any("% of M0" in text and "too short" in text for text in meta(image)["ImageComment"])


@pytest.mark.parametrize("chain", list(CHAINS))
def test_readout_pulses_before_the_centre_of_k_space_are_told_by_whoever_answers(service: Service, chain: str) -> None:
    """M0 recovers meanwhile, as if the delays were longer: short T1 is 8 % off, long T1 3 %, and one remainder for all tells neither."""
    scan = in_memory("satrec", **{**SMALL, "pulses_before_centre": 6})
    answer = ask(service, chain, scan, **CHAINS[chain])
    (image,) = by_role(answer)["T1"]
    relative = report_of(image, scan).relative
    assert -0.11 < relative[0] < -0.05 and -0.05 < relative[-1] < -0.01
    (said,) = {text for text in complaints(answer) if "longer than stated" in text}
    median, quarter = (float(n) for n in re.findall(r"(\d+) %", said))
    assert median == pytest.approx(-100 * np.median(relative), abs=2) and quarter <= 9
    assert any("longer than stated" in text for text in meta(image)["ImageComment"])
    many = ask(service, chain, in_memory("satrec", **{**SMALL, "pulses_before_centre": 24}), **CHAINS[chain])
    assert len(by_role(many)["Image"]) == 5 and "T1" not in by_role(many)
    assert any("longer than stated" in text and "no T1 map" in text for text in complaints(many))


def brightened(scan: SimulatedScan, gains: dict[int, float]) -> list[bytes]:
    """The scan with the readouts of some states made louder; noise readouts stay."""
    batches = []
    for headers, samples in scan.stream.batches:
        gain = np.ones(len(headers), np.float32)
        for state, by in gains.items():
            gain[(headers["idx"]["set"] == state) & ~is_noise(headers)] += by
        batches.append((headers, samples * gain[:, None, None]))
    return encoded(batches)


@pytest.mark.parametrize("chain", list(CHAINS))
def test_a_delay_that_is_brighter_is_named_by_whoever_answers(service: Service, tubes: SimulatedScan, chain: str) -> None:
    answer = ask(service, chain, tubes, messages=brightened(tubes, {4: 0.05}), **CHAINS[chain])
    (image,) = by_role(answer)["T1"]
    assert 0.05 < np.median(report_of(image, tubes).relative) < 0.12
    said = "the images of the delay 8 s seem to be 5 % brighter than the others"
    assert any(said in text for text in complaints(answer))
    assert any(said in text and "too long" in text for text in meta(image)["ImageComment"])


@pytest.mark.parametrize(
    ("gains", "said"), [({4: -0.1}, "the delay 8 s seem to be 1"), ({2: 0.06, 4: 0.06}, "several delays")]
)
@pytest.mark.parametrize("chain", list(CHAINS))
def test_t1_that_would_be_a_tenth_wrong_is_not_sent(
    service: Service, tubes: SimulatedScan, chain: str, gains: dict[int, float], said: str
) -> None:
    """The images are, with the reason."""
    answer = ask(service, chain, tubes, messages=brightened(tubes, gains), **CHAINS[chain])
    found = by_role(answer)
    assert len(found["Image"]) == 5 and "T1" not in found
    assert any(said in text and "no T1 map" in text for text in complaints(answer))
    assert any(said in text for text in meta(found["Image"][0])["ImageComment"])


@pytest.mark.parametrize("chain", list(CHAINS))
def test_a_noise_scan_that_is_too_loud_is_told_and_not_used(service: Service, tubes: SimulatedScan, chain: str) -> None:
    batches = [(h, np.where(is_noise(h)[:, None, None], 3 * s, s)) for h, s in tubes.stream.batches]
    answer = ask(service, chain, tubes, messages=encoded(batches), **CHAINS[chain])
    assert any("noise measurement is" in text and "times louder" in text for text in complaints(answer))
    assert np.abs(report_of(by_role(answer)["T1"][0], tubes).relative).max() < 0.07


@pytest.mark.parametrize("mask", [{"mask": "random"}, {"mask": "uniform", "interleaved": True}])
@pytest.mark.parametrize("chain", list(CHAINS))
def test_without_calibration_lines_of_one_contrast_there_is_no_t1(
    service: Service, chain: str, mask: dict[str, Any]
) -> None:
    """Lines side by side of different delays make coil maps that leave T1 12 to 20 % wrong, and the images look sound."""
    scan = in_memory("satrec", **{**SMALL, "calibration": "none", "acs": 0, **mask})
    answer = ask(service, chain, scan, **CHAINS[chain])
    found = by_role(answer)
    assert len(found["Image"]) == 5 and "T1" not in found
    assert any("no T1 map" in text and "differ in contrast" in text for text in complaints(answer))


@pytest.mark.parametrize("chain", list(CHAINS))
def test_without_the_centre_of_k_space_one_coil_gives_no_t1(service: Service, chain: str) -> None:
    """Separate calibration lines do not tell how bright a delay is: single tubes were 139 % too long, and 5 % was said."""
    scan = in_memory("satrec", **{**SMALL, "calibration": "separate", "coils": 1, "seed": 2})
    answer = ask(service, chain, scan, **CHAINS[chain])
    found = by_role(answer)
    assert len(found["Image"]) == 5 and "T1" not in found
    assert any("no T1 map" in text and "centre of k-space is not measured" in text for text in complaints(answer))
    assert any("centre of k-space" in text for text in meta(found["Image"][0])["ImageComment"])


@pytest.mark.parametrize(("change", "reason", "maps"), [
    ({"delays": "0.5,1,2,8"}, "trained for other delays", True),
    ({"delays": "0.5,1,1.5,2,6"}, "trained for other delays", True),
])  # fmt: skip
def test_a_scan_that_the_weights_do_not_know_is_answered_by_llr_with_a_fit(
    service: Service, change: dict[str, str], reason: str, maps: bool
) -> None:
    answer = ask(service, "pinqi_t1", in_memory("satrec", **{**SMALL, **change}))
    answered_by_llr(answer, reason)
    found = by_role(answer)
    assert len(found["Image"]) == len(change["delays"].split(","))
    assert ("T1" in found) == maps
    if maps:  # those that the network would have sent, and no others
        assert set(found) - {"Image"} == {"T1", "T1SD", "M0", "M0_PHASE"}
        own = by_role(ask(service, "llr_t1", in_memory("satrec", **{**SMALL, **change}), map_model="saturation_recovery"))
        np.testing.assert_allclose(in_ms(found["M0_PHASE"][0]), in_ms(own["M0_PHASE"][0]), atol=4.0)
        assert "T1RESIDUAL" in own


@pytest.mark.parametrize("said", ["", "inversion"])
def test_a_plain_ti_list_holds_the_delays_unless_the_header_says_what_else(service: Service, said: str) -> None:
    """MRD has one list of times for all preparations; whoever picks this chain says that it is a saturation."""
    scan = in_memory("satrec", **{**SMALL, "matrix_x": 64, "matrix_y": 64, "coils": 4, "acceleration": 2.0})
    begin, end = scan.header.index("<userParameters>"), scan.header.index("</userParameters>") + len("</userParameters>")
    user = scan.header[begin:end].replace(">saturation<", f">{said}<") if said else ""
    answer = ask(service, "pinqi_t1", scan, header=scan.header[:begin] + user + scan.header[end:])
    found = by_role(answer)
    assert len(found["Image"]) == 5
    if said:
        assert "T1" not in found and any("no saturation times" in text for text in complaints(answer))
    else:
        report = report_of(found["T1"][0], scan)
        assert not complaints(answer) and report.rms_deviation < 0.035 and np.abs(report.relative).max() < 0.07


def test_without_delay_times_the_images_come_and_the_reason_is_said(service: Service, tubes: SimulatedScan) -> None:
    header = tubes.header
    begin, end = header.index("<sequenceParameters>"), header.index("</sequenceParameters>") + len("</sequenceParameters>")
    bare = header[:begin] + header[end:]
    start, stop = bare.find("<userParameters>"), bare.find("</userParameters>") + len("</userParameters>")
    bare = bare if start < 0 else bare[:start] + bare[stop:]
    answer = ask(service, "pinqi_t1", tubes, header=bare)
    assert any("saturation times" in text for text in complaints(answer))
    found = by_role(answer)
    assert len(found["Image"]) == 5 and "T1" not in found


def test_standard_deviation_is_the_spread_over_repeated_scans(service: Service) -> None:
    """Complete data, a fit without regularisation: what every scan claims is how far repetitions of it lie apart.

    About a tenth more, in fact: where the residual exceeds the noise, by chance or not, the larger one counts.
    """
    once = simulate_kind(
        "satrec", {**SMALL, "matrix_x": 64, "matrix_y": 64, "coils": 4, "mask": "full", "acceleration": 1.0}
    )
    t1, sd = [], []
    for seed in range(N_DRAWS):
        again = SimulatedScan(
            Path("(in memory)"), stream_of(replace(once, settings=replace(once.settings, seed=100 + seed)))
        )
        answer = ask(
            service, "cg_sense", again, maps="t1", map_model="saturation_recovery", weight=0, map_pixel_type="float32"
        )
        assert not complaints(answer)
        found = by_role(answer)
        t1.append(found["T1"][0].data[0, 0])
        sd.append(found["T1SD"][0].data[0, 0])
    labels = once.truth.labels[0, 0, 0]
    everywhere = np.all(np.array(t1) > 0, axis=0)  # emptied pixels are 0
    spread, claimed = np.var(t1, axis=0, ddof=1), np.mean(np.square(sd), axis=0)
    ratios = []
    for tube in range(1, labels.max() + 1):
        inside = ndimage.binary_erosion(labels == tube) & everywhere
        assert inside.sum() >= 9
        ratios.append(np.sqrt(claimed[inside].mean() / spread[inside].mean()))
    assert np.median(ratios) == pytest.approx(1.0, abs=0.15)


# ------------------------------------------------------------------------------------------------------------ bad input


def thinned(scan: SimulatedScan, shares: dict[int, float]) -> Batches:
    """The scan without a share of the outer lines of some states."""
    middle, kept = scan.stream.truth.images.shape[-2] // 2, []
    for headers, samples in scan.stream.batches:
        line = headers["idx"]["kspace_encode_step_1"].astype(int)
        draw = np.random.default_rng(0).random(2 * middle)[line]
        lost = draw < np.array([shares.get(int(state), 0.0) for state in headers["idx"]["set"]])
        keep = is_noise(headers) | ~lost | (np.abs(line - middle) <= PROTOCOL["acs"])
        kept.append((headers[keep], samples[keep]))
    return kept


def test_states_with_different_numbers_of_lines_give_the_true_maps(service: Service, tubes: SimulatedScan) -> None:
    batches = thinned(tubes, {1: 0.3, 3: 0.5})
    lines = np.bincount(np.concatenate([h["idx"]["set"][~is_noise(h)] for h, _ in batches]))
    assert lines.max() - lines.min() >= 4 and len(set(lines.tolist())) >= 3
    answer = ask(service, "pinqi_t1", tubes, messages=encoded(batches))
    assert any("fewer lines than expected" in text for text in complaints(answer))
    found = by_role(answer)
    assert len(found["Image"]) == 5
    report = report_of(found["T1"][0], tubes)
    assert report.rms_deviation < 0.035 and np.abs(report.relative).max() < 0.07 and report.valid.min() > 0.95


def test_states_of_which_one_is_a_stump_are_refused_in_words(service: Service, tubes: SimulatedScan) -> None:
    answer = ask(service, "pinqi_t1", tubes, messages=encoded(thinned(tubes, {3: 1.0})), min_line_fraction=0.9)
    assert not answer.images and any("SortError" in text and "set 3" in text for text in answer.texts)


def test_one_coil_gives_the_true_maps(service: Service) -> None:
    scan = in_memory("satrec", **{**SMALL, "coils": 1, "acceleration": 2.0})
    found = by_role(ask(service, "pinqi_t1", scan))
    assert len(found["Image"]) == 5
    report = report_of(found["T1"][0], scan)
    assert report.rms_deviation < 0.035 and np.abs(report.relative).max() < 0.07 and report.valid.min() > 0.95


def test_a_slice_that_is_all_zero_costs_the_scan_no_other_slice(service: Service) -> None:
    """The middle one, which leaves first."""
    scan = in_memory("satrec", **{**SMALL, "matrix_x": 64, "matrix_y": 64, "acceleration": 2.0, "slices": 3})
    batches = []
    for headers, samples in scan.stream.batches:
        zero = (headers["idx"]["slice"] == 1) & ~is_noise(headers)
        batches.append((headers, np.where(zero[:, None, None], np.complex64(0), samples)))
    answer = ask(service, "pinqi_t1", scan, messages=encoded(batches), pixel_type="uint16")
    assert any("slice 1" in text and "all samples are zero" in text for text in complaints(answer))
    found = by_role(answer)
    for role, n in (("Image", 15), ("T1", 3), ("T1SD", 3), ("M0", 3)):
        assert len(found[role]) == n
        for image in found[role]:
            if image.header["slice"] == 1:
                assert not image.data.any() and any("all samples are zero" in text for text in meta(image)["ImageComment"])
            else:  # and their scale is not that of nothing
                assert len(np.unique(image.data)) > 20, role
    inside = scan.stream.truth.interior
    for image in found["T1"]:
        number = int(image.header["slice"])
        if number != 1:
            difference = in_ms(image)[0] - 1e3 * scan.stream.truth.maps["t1"][number, 0]
            assert np.nanmedian(np.abs(difference)[inside[number, 0]]) < 40


def test_weights_with_a_wrong_hash_are_answered_by_llr_with_a_fit(
    tubes: SimulatedScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once the weights are whole, the same server uses them."""
    shipped, weights = weight_folders()[-1], tmp_path / "weights"
    weights.mkdir()
    shutil.copy(shipped / "pinqi_t1.safetensors", weights)
    facts = json.loads((shipped / "pinqi_t1.json").read_text(encoding="utf-8"))
    (weights / "pinqi_t1.json").write_text(json.dumps({**facts, "sha256": "0" * 64}), encoding="utf-8")
    monkeypatch.setenv(FOLDERS, str(weights))
    options = ServiceOptions(
        port=0, workers=1, threads=1, spool=tmp_path / "spool", noise=tmp_path / "noise", rehearse=False
    )
    with Service(options) as own:
        answer = ask(own, "pinqi_t1", tubes)
        answered_by_llr(answer, "sha256")
        found = by_role(answer)
        assert len(found["Image"]) == 5 and report_of(found["T1"][0], tubes).rms_deviation < 0.035
        shutil.copy(shipped / "pinqi_t1.json", weights)
        again = ask(own, "pinqi_t1", tubes)
        assert not any("sha256" in text for text in again.texts) and len(by_role(again)["Image"]) == 5
