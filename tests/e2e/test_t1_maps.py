"""T1 maps through the running server by a separate client: units, windows, geometry, known truth, measured data, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.io import loadmat

from gadgets.meta import read_meta
from gadgets.service import Service
from gadgets.wire.events import Image
from recon_core.maps.t1 import molli_t1
from tests.e2e.scans import Batches, SimulatedScan, ask, complaints, encoded, in_memory, is_noise, stack
from tests.e2e.semi_measured import semi_measured_molli
from tests.recon_core.molli_phantom import TUBES
from tests.recon_core.test_t1_maps import PHANTOM
from tests.strict_client import Answer, StrictClient

ROLES = ["T1", "T1SD", "M0", "T1RESIDUAL"]
# the protocol is the same for every chain that makes maps: the quickest stands for all (test_moe_dqinr.py has the other)
every_chain = pytest.mark.parametrize("chain", ["llr_t1"])


@pytest.fixture(scope="module")
def molli() -> SimulatedScan:
    """Two slices, 5(3)3, three-fold undersampled."""
    return in_memory(
        "molli", matrix_x=80, matrix_y=80, coils=6, slices=2, mask="golden", acceleration=3.0, acs=12, snr=40.0,
        orientation="oblique", offset_slice=0.02,
    )  # fmt: skip


def meta(image: Image) -> dict[str, tuple[str, ...]]:
    return read_meta(image.attributes)


def maps_of(answer: Answer) -> dict[str, list[Image]]:
    """Map images by role, in order of their index."""
    found: dict[str, list[Image]] = {}
    for image in answer.images:
        role = meta(image).get("GADGETRON_DataRole", ("",))[0]
        if role in ROLES:
            found.setdefault(role, []).append(image)
    return {role: sorted(images, key=lambda i: int(i.header["image_index"])) for role, images in found.items()}


def values(image: Image) -> NDArray[np.float64]:
    """A map in its unit, NaN where there is no value: what a console makes of codes, slope, intercept and padding."""
    m = meta(image)
    pixels = image.data[0].astype(float)
    shown = pixels * float(m["RescaleSlope"][0]) + float(m["RescaleIntercept"][0])
    shown[pixels == float(m["PixelPaddingValue"][0])] = np.nan
    return np.asarray(shown)


def part_of(scan: SimulatedScan, sets: Iterable[int]) -> list[bytes]:
    """Only the readouts of some inversion times (and the noise scan)."""
    chosen = set(sets)
    kept: Batches = []
    for headers, samples in scan.stream.batches:
        keep = is_noise(headers) | np.isin(headers["idx"]["set"], list(chosen))
        if keep.any():
            kept.append((headers[keep], samples[keep]))
    return encoded(kept)


@every_chain
def test_t1_its_deviation_m0_and_residual_arrive_with_units_windows_and_geometry(
    chain: str, service: Service, molli: SimulatedScan
) -> None:
    answer = ask(service, chain, molli)
    assert not complaints(answer)
    maps = maps_of(answer)
    assert {role: len(images) for role, images in maps.items()} == dict.fromkeys(ROLES, 2)
    contrast = [i for i in answer.images if meta(i)["DataRole"][0] == "Image"]
    assert len(contrast) == 2 * 8
    assert len({int(i.header["image_series_index"]) for i in answer.images}) == 5
    for role, unit, window in (("T1", "ms", (1300, 1300)), ("T1SD", "ms", (100, 200))):
        m = meta(maps[role][0])
        assert m["DataRole"] == ("Quantitative",) and m["QuantityUnit"] == (unit,) and float(m["RescaleSlope"][0]) == 1.0
        assert (int(m["WindowCenter"][0]), int(m["WindowWidth"][0])) == window
        assert m["ImageTypeValue4"] == (role,) and f"{chain}_{role}" in m["SeriesDescriptionAdditional"][0]
    assert {meta(i)["WindowWidth"] for i in maps["M0"]} == {meta(maps["M0"][0])["WindowWidth"]}  # one window for all slices
    for slice_ in range(2):
        image = contrast[8 * slice_]
        for role in ROLES:
            own = maps[role][slice_].header
            for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view", "matrix_size", "slice"):
                np.testing.assert_array_equal(own[name], image.header[name], err_msg=f"{role} {name}")
    # the times of the header go out with the images
    times = [float(meta(i)["InversionTime"][0]) for i in contrast[:8]]
    np.testing.assert_allclose(times, 1e3 * np.array(molli.stream.truth.states), atol=1e-3)


@every_chain
def test_t1_is_the_true_one_and_its_deviation_covers_the_error(chain: str, service: Service, molli: SimulatedScan) -> None:
    maps = maps_of(ask(service, chain, molli))
    truth = molli.stream.truth
    t1, sd = (np.stack([values(i) for i in maps[role]]) for role in ("T1", "T1SD"))
    inside = truth.interior & np.isfinite(t1)
    assert inside.sum() > 0.97 * truth.interior.sum()
    difference = (t1 - 1e3 * truth.maps["t1"])[inside]
    assert np.linalg.norm(difference) / np.linalg.norm(1e3 * truth.maps["t1"][inside]) < 0.08
    assert abs(np.median(difference)) < 10  # ms
    assert np.median(np.abs(difference)) < 2 * np.median(sd[inside])
    m0 = np.stack([values(i) for i in maps["M0"]]) * float(meta(maps["M0"][0]).get("QuantityUnit", ("1",))[0])
    brightest = np.abs(stack([i for i in ask(service, chain, molli).images if meta(i)["DataRole"][0] == "Image"], 8)).max(1)
    ratio = np.median(m0[inside] / brightest[inside])
    assert 0.8 < ratio < 1.4  # the images' own unit: M0 is about the recovered signal


@every_chain
def test_a_measured_phantom_within_3_percent_through_the_whole_path(chain: str, service: Service) -> None:
    """Semi-measured: the phantom's images, simulated coils and noise, three-fold undersampled."""
    scan, series = semi_measured_molli("phantom", 160, coils=6, mask="golden", acceleration=3.0, acs=16, snr=60.0)
    t1 = values(maps_of(ask(service, chain, scan))["T1"][0])[0]
    reference = 1e3 * loadmat(PHANTOM)["MOLLIoffLineT1Map"][0]
    assert len(series.images) == 5
    for y, x in TUBES:
        roi = np.hypot(*np.ogrid[-y : 160 - y, -x : 160 - x]) <= 5
        assert np.isfinite(t1[roi]).mean() > 0.97
        assert np.nanmean(t1[roi]) == pytest.approx(float(reference[roi].mean()), rel=0.03)


@every_chain
def test_a_measured_kidney_keeps_its_plausible_t1(chain: str, service: Service) -> None:
    """Semi-measured, not registered. Kidney at 3 T: cortex about 1.1 to 1.6 s, medulla 1.4 to 2.1 s; muscle 0.9 to 1.5 s."""
    scan, _ = semi_measured_molli("kidney 0", 128, coils=6, mask="golden", acceleration=3.0, acs=16, snr=80.0)
    t1 = values(maps_of(ask(service, chain, scan))["T1"][0])[0]
    truth = molli_t1(torch.from_numpy(scan.stream.truth.images[0]), scan.stream.truth.states).t1
    for rows, columns, low, high in (
        (slice(52, 65), slice(34, 40), 1100, 2100),
        (slice(65, 70), slice(79, 86), 1100, 2100),
        (slice(70, 79), slice(71, 74), 900, 1500),
    ):
        region = t1[rows, columns]
        assert np.isfinite(region).mean() > 0.7
        assert low < np.nanmedian(region) < high
        expected = 1e3 * float(truth.data[0, rows, columns][truth.valid[0, rows, columns]].median())
        assert np.nanmedian(region) == pytest.approx(expected, rel=0.08)


def test_any_chain_answers_with_maps_on_request(service: Service, molli: SimulatedScan) -> None:
    answer = ask(service, "cg_sense", molli, maps="t1")
    assert sorted(maps_of(answer)) == sorted(ROLES) and not complaints(answer)
    assert not maps_of(ask(service, "llr", molli))


def test_magnitude_images_and_float_maps(service: Service) -> None:
    """The console may ask for the zero-crossing path and for maps in ms as float32."""
    scan = in_memory("molli", matrix_x=64, matrix_y=64, coils=4, snr=80.0)
    answer = ask(service, "llr_t1", scan, map_sign="magnitude", map_pixel_type="float32")
    (image,) = maps_of(answer)["T1"]
    assert image.data.dtype == np.float32 and "zero crossing" in image.attributes
    inside = scan.stream.truth.interior[0] & (image.data[0] > 0)
    assert inside.sum() > 0.95 * scan.stream.truth.interior.sum()
    assert np.median(np.abs(image.data[0] - 1e3 * scan.stream.truth.maps["t1"][0])[inside]) < 20  # ms


def test_lines_of_zeros_count_as_not_measured_and_a_signal_that_was_cut_off_and_a_coil_that_failed_are_told(
    service: Service,
) -> None:
    """Some converters write the whole grid. The maps are those of the scan as it was, to the last bit."""
    scan = in_memory("molli", matrix_x=48, matrix_y=48, coils=4, mask="golden", acceleration=3.0, acs=8, snr=60.0)
    batches = list(scan.stream.batches)
    headers = np.concatenate([own for own, _ in batches if not is_noise(own).any()])
    samples = np.concatenate([own for own_headers, own in batches if not is_noise(own_headers).any()])
    measured = {(int(idx["set"]), int(idx["kspace_encode_step_1"])) for idx in headers["idx"]}
    places = [(state, line) for state in range(8) for line in range(48) if (state, line) not in measured]
    empty = np.repeat(headers[-1:], len(places))
    empty["flags"], empty["idx"]["set"], empty["idx"]["kspace_encode_step_1"] = 0, *np.array(places).T
    padded = encoded([*batches, (empty, np.zeros((len(empty), *samples.shape[1:]), np.complex64))])
    answer = ask(service, "llr_t1", scan, messages=padded)
    assert complaints(answer) == [
        f"WRN {len(empty)} of {8 * 48} readouts hold nothing but zeros: they count as not measured\n"
    ]
    np.testing.assert_array_equal(maps_of(answer)["T1"][0].data, maps_of(ask(service, "llr_t1", scan))["T1"][0].data)
    top = 0.5 * max(np.abs(samples.real).max(), np.abs(samples.imag).max())
    cut = (np.clip(samples.real, -top, top) + 1j * np.clip(samples.imag, -top, top)).astype(np.complex64)
    noise = [batch for batch in batches if is_noise(batch[0]).any()]
    answer = ask(service, "llr_t1", scan, messages=encoded([*noise, (headers, cut)]))
    assert any("cut the signal off" in text for text in complaints(answer))
    failed = np.where((headers["idx"]["set"] == 0)[:, None, None] & (np.arange(4) == 1)[:, None], np.complex64(0), samples)
    answer = ask(service, "llr_t1", scan, messages=encoded([*noise, (headers, failed)]))
    assert any("(channels 1; the first: slice 0 set 0): a coil failed" in text for text in complaints(answer))


@every_chain
def test_a_header_without_inversion_times_gives_images_and_says_why_there_is_no_map(
    chain: str, service: Service, molli: SimulatedScan
) -> None:
    header = re.sub(r"<TI>.*?</TI>", "", molli.header)
    answer = ask(service, chain, molli, header=header)
    assert len(answer.images) == 16 and not maps_of(answer)
    assert any("no inversion times" in text and "failed" in text for text in complaints(answer))
    assert any("no T1 map" in text for text in complaints(answer))


@every_chain
def test_one_state_gives_its_image_and_says_why_there_is_no_map(chain: str, service: Service, molli: SimulatedScan) -> None:
    one = re.sub(r"(<TI>.*?</TI>)+", "<TI>120</TI>", molli.header)
    answer = ask(service, chain, molli, header=one, messages=part_of(molli, {4}), incomplete="drop")
    assert len(answer.images) == 2 and not maps_of(answer)
    assert any("too few images for a T1 map" in text for text in complaints(answer))


@every_chain
def test_times_stated_by_the_console_replace_those_of_the_header(chain: str, service: Service, molli: SimulatedScan) -> None:
    stated = ",".join(f"{1e3 * t:g}" for t in molli.stream.truth.states)
    header = re.sub(r"<TI>.*?</TI>", "", molli.header)
    answer = ask(service, chain, molli, header=header, inversion_times=stated)
    assert len(maps_of(answer)["T1"]) == 2 and not complaints(answer)
    wrong = ask(service, chain, molli, inversion_times="100,200")
    assert not wrong.images and any("count of times and of images differ" in text for text in wrong.texts)


@every_chain
def test_times_of_the_readouts_serve_where_the_header_knows_only_the_first(
    chain: str, service: Service, molli: SimulatedScan
) -> None:
    header = re.sub(r"(<TI>.*?</TI>)+", "<TI>120</TI>", molli.header)
    batches = []
    for headers, samples in molli.stream.batches:
        own = headers.copy()
        imaging = ~is_noise(own)
        second = own["idx"]["set"] >= 5
        first = np.where(second, molli.stream.truth.states[5], molli.stream.truth.states[0])
        own["user_int"][imaging, 4] = np.round(1e3 * first[imaging])
        own["user_int"][imaging, 5] = second[imaging]
        batches.append((own, samples))
    answer = ask(service, chain, molli, header=header, messages=encoded(batches))
    assert any("time stamps" in text for text in complaints(answer))
    t1 = np.stack([values(i) for i in maps_of(answer)["T1"]])
    truth = molli.stream.truth
    inside = truth.interior & np.isfinite(t1)
    assert inside.sum() > 0.95 * truth.interior.sum()
    assert abs(np.median((t1 - 1e3 * truth.maps["t1"])[inside])) < 15  # ms: time stamps are in steps of 2.5 ms


def test_values_that_are_not_finite_are_refused_in_words(service: Service, molli: SimulatedScan) -> None:
    batches = [(headers, samples.copy()) for headers, samples in molli.stream.batches]
    batches[-1][1][-1, 0, 3] = np.nan
    answer = StrictClient(service.host, service.port).scan("llr_t1", header=molli.header, messages=encoded(batches))
    assert not maps_of(answer)
    assert any("not finite" in text for text in answer.texts)
