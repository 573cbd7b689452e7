"""Noise measurements through the server: level of whitened images, stored measurements, and what is said without one."""

from __future__ import annotations

import re

import numpy as np
import pytest
from defusedxml.ElementTree import fromstring
from numpy.typing import NDArray

from gadgets.replay import NOISE_SCRIPT
from gadgets.service import Service
from recon_core.simulation.encoding import correlated_noise
from tests.e2e.scans import (
    Batches,
    SimulatedScan,
    ask,
    complaints,
    encoded,
    error,
    imaging_part,
    in_memory,
    noise_part,
    stack,
)
from tests.strict_client import StrictClient

COILS, STATES = 4, 4


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """Fully sampled, one slice, coils of different and correlated noise; noise and imaging readouts differ in dwell time."""
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=COILS, states=STATES, snr=20.0)


@pytest.fixture(scope="module")
def nothing_but_noise(scan: SimulatedScan) -> Batches:
    """The scan's imaging readouts with the object taken away."""
    rng = np.random.default_rng(5)
    covariance = scan.stream.truth.noise_covariance
    return [
        (headers, correlated_noise(covariance, (len(headers), samples.shape[2]), rng))
        for headers, samples in imaging_part(scan)
    ]


def level(images: NDArray[np.floating]) -> float:
    """SD of the real (or imaginary) part of one whitened channel, from root-sum-of-squares images of noise."""
    return float(np.sqrt((images**2).mean() / (2 * COILS)))


def named(header: str, measurement: str, depends_on: str | None = None) -> str:
    """The header with another measurement id, and with a noise measurement to depend on."""
    start, rest = header.split("<measurementID>", 1)
    _, rest = rest.split("</measurementID>", 1)
    dependency = ""
    if depends_on is not None:
        dependency = (
            "<measurementDependency><dependencyType>Noise</dependencyType>"
            f"<measurementID>{depends_on}</measurementID></measurementDependency>"
        )
    # the schema has the dependency behind the protocol's name
    rest = rest.replace("</protocolName>", f"</protocolName>{dependency}", 1)
    return f"{start}<measurementID>{measurement}</measurementID>{rest}"


def test_whitened_noise_has_unit_deviation_in_its_real_and_imaginary_part(
    service: Service, scan: SimulatedScan, nothing_but_noise: Batches
) -> None:
    answer = ask(service, "fourier", scan, messages=encoded(noise_part(scan) + nothing_but_noise))
    assert level(stack(answer.images, STATES)) == pytest.approx(1.0, rel=0.02)


def test_combined_complex_images_keep_unit_deviation(service: Service) -> None:
    """Two repetitions of the same object differ by noise alone; unit-norm coil maps leave its level as it is."""
    scan = in_memory("cine", matrix_x=64, matrix_y=64, coils=COILS, states=1, repetitions=2)
    answer = ask(service, "cg_sense", scan, magnitude=False, complex=True)
    first, second = (image.data[0].astype(complex) for image in answer.images)
    noise = ((first - second) / np.sqrt(2))[scan.tissue[0]]
    assert float(noise.real.std()) == pytest.approx(1.0, abs=0.06)
    assert float(noise.imag.std()) == pytest.approx(1.0, abs=0.06)


def test_a_separate_noise_scan_serves_the_scans_that_depend_on_it(service: Service, scan: SimulatedScan) -> None:
    stored = ask(service, "fourier", scan, header=named(scan.header, "noise_1"), messages=encoded(noise_part(scan)))
    assert not stored.images and not complaints(stored)
    assert any("noise measurement stored" in text and f"{COILS} channels" in text for text in stored.texts)
    # the scan that depends on it has noise readouts of its own neither before nor after
    dependent = named(scan.header, "image_1", depends_on="noise_1")
    later = ask(service, "fourier", scan, header=dependent, messages=encoded(imaging_part(scan)))
    at_once = ask(service, "fourier", scan)
    assert not complaints(later)
    np.testing.assert_allclose(stack(later.images, STATES), stack(at_once.images, STATES), rtol=1e-6)


def test_a_stored_noise_measurement_gives_the_same_level(
    service: Service, scan: SimulatedScan, nothing_but_noise: Batches
) -> None:
    """Measured with another noise scan of the same receivers."""
    other = in_memory("cine", matrix_x=48, matrix_y=48, coils=COILS, states=STATES, snr=20.0, noise_readouts=96)
    ask(service, "fourier", other, header=named(other.header, "noise_2"), messages=encoded(noise_part(other)))
    dependent = named(scan.header, "image_2", depends_on="noise_2")
    answer = ask(service, "fourier", scan, header=dependent, messages=encoded(nothing_but_noise))
    assert level(stack(answer.images, STATES)) == pytest.approx(1.0, rel=0.02)


def test_the_dependency_connection_gets_the_measured_numbers(service: Service, scan: SimulatedScan) -> None:
    ask(service, "fourier", scan, header=named(scan.header, "noise_3"), messages=encoded(noise_part(scan)))
    client = StrictClient(service.host, service.port)
    answer = client.scan(script=NOISE_SCRIPT.format("noise_3"), dependency=True)
    assert len(answer.dependencies) == 1 and not answer.texts
    root = fromstring(answer.dependencies[0])
    told = {meta.findtext("name"): meta.findtext("value") for meta in root.iter("meta")}
    ((headers, samples),) = noise_part(scan)
    flat = samples.astype(complex).transpose(1, 0, 2).reshape(COILS, -1)
    sigma = flat.std(axis=1, ddof=1)
    assert told["status"] == "success" and told["channels"] == str(COILS)
    assert float(told["min_sigma"] or 0) == pytest.approx(sigma.min(), rel=1e-5)
    assert float(told["max_sigma"] or 0) == pytest.approx(sigma.max(), rel=1e-5)
    assert float(told["mean_sigma"] or 0) == pytest.approx(sigma.mean(), rel=1e-5)
    assert float(told["noise_dwell_time_us"] or 0) == pytest.approx(float(headers["sample_time_us"][0]), rel=1e-5)


def test_an_unknown_dependency_is_answered_by_close_alone(service: Service) -> None:
    answer = StrictClient(service.host, service.port).scan(script=NOISE_SCRIPT.format("never_measured"), dependency=True)
    assert not answer.dependencies and not answer.texts


def test_noise_readouts_may_come_last(service: Service, scan: SimulatedScan) -> None:
    first = ask(service, "fourier", scan)
    last = ask(service, "fourier", scan, messages=encoded(imaging_part(scan) + noise_part(scan)))
    assert not complaints(last)
    np.testing.assert_allclose(stack(last.images, STATES), stack(first.images, STATES), rtol=1e-5, atol=1e-4)


def test_samples_that_are_marked_to_be_discarded_are_no_noise(service: Service, scan: SimulatedScan) -> None:
    """Receivers ring at the beginning of a readout; images and level are those of the scan without it, in noise and in images."""

    def ringing(headers: NDArray[np.void], samples: NDArray[np.complex64]) -> tuple[NDArray[np.void], NDArray[np.complex64]]:
        headers = headers.copy()
        headers["number_of_samples"] += 11
        headers["center_sample"] += 6
        headers["discard_pre"], headers["discard_post"] = 6, 5
        top = np.float32(300 * np.abs(samples).max())
        before, after = (np.full((*samples.shape[:2], n), top, np.complex64) for n in (6, 5))
        return headers, np.concatenate((before, samples, after), axis=2)

    marked = [ringing(*batch) for batch in scan.stream.batches]
    plain, answer = ask(service, "fourier", scan), ask(service, "fourier", scan, messages=encoded(marked))
    assert complaints(answer) == complaints(plain) == []
    for image, same in zip(answer.images, plain.images, strict=True):
        np.testing.assert_array_equal(image.data, same.data)


def test_a_missing_dependency_is_said_and_the_images_are_not_whitened(service: Service, scan: SimulatedScan) -> None:
    dependent = named(scan.header, "image_4", depends_on="never_measured")
    answer = ask(service, "fourier", scan, header=dependent, messages=encoded(imaging_part(scan)))
    assert [text for text in complaints(answer) if text.startswith("WRN") and "not stored" in text]
    plain = ask(service, "fourier", scan, prewhiten=False)
    np.testing.assert_array_equal(stack(answer.images, STATES), stack(plain.images, STATES))


@pytest.mark.parametrize(
    ("coils", "name", "said"),
    [(COILS + 2, "", "6 channels in the noise"), (COILS, "Spine", "without noise: Loop1, Loop2, Loop3, Loop4")],
    ids=["number", "names"],
)
def test_a_stored_measurement_of_other_coils_is_not_used(
    coils: int, name: str, said: str, service: Service, scan: SimulatedScan
) -> None:
    other = in_memory("cine", matrix_x=48, matrix_y=48, coils=coils, states=2)
    header = other.header.replace("<coilName>Loop", f"<coilName>{name}") if name else without_labels(other.header)
    ask(service, "fourier", other, header=named(header, f"noise_{said}"), messages=encoded(noise_part(other)))
    dependent = named(scan.header, "image_5", depends_on=f"noise_{said}")
    answer = ask(service, "fourier", scan, header=dependent, messages=encoded(imaging_part(scan)))
    assert [text for text in complaints(answer) if text.startswith("WRN") and said in text]
    assert len(answer.images) == STATES


def without_labels(header: str) -> str:
    return re.sub("<coilLabel>.*?</coilLabel>", "", header, flags=re.DOTALL)


def test_a_stored_measurement_of_more_coils_in_another_order_serves_by_their_names(
    service: Service, scan: SimulatedScan
) -> None:
    """The elements that the scan leaves out were measured first, and the others backwards."""
    ((headers, samples),) = noise_part(scan)
    wide = headers.copy()
    wide["active_channels"] = wide["available_channels"] = COILS + 1
    wide["channel_mask"] = 0
    extra = 7 * samples[:, :1, ::-1]
    labels = "".join(
        f"<coilLabel><coilNumber>{i}</coilNumber><coilName>{name}</coilName></coilLabel>"
        for i, name in enumerate(("Other", *(f"Loop{n}" for n in range(COILS, 0, -1))))
    )
    header = without_labels(scan.header).replace("</receiverChannels>", f"</receiverChannels>{labels}")
    messages = encoded([(wide, np.ascontiguousarray(np.concatenate([extra, samples[:, ::-1]], axis=1)))])
    stored = ask(service, "fourier", scan, header=named(header, "noise_6"), messages=messages)
    assert not complaints(stored)
    dependent = named(scan.header, "image_6", depends_on="noise_6")
    later = ask(service, "fourier", scan, header=dependent, messages=encoded(imaging_part(scan)))
    assert not complaints(later)
    np.testing.assert_allclose(stack(later.images, STATES), stack(ask(service, "fourier", scan).images, STATES), rtol=1e-5)


def test_noise_readouts_with_other_channels_are_refused(service: Service, scan: SimulatedScan) -> None:
    other = in_memory("cine", matrix_x=48, matrix_y=48, coils=COILS + 2, states=2)
    answer = ask(service, "fourier", scan, messages=encoded(noise_part(other) + imaging_part(scan)))
    assert not answer.images
    assert any(text.startswith("ERROR SortError") and "channels" in text for text in answer.texts)


@pytest.mark.parametrize("kind", ["noise", "images"])
@pytest.mark.parametrize("dwell", [0.0, 1e-38, 3e38])
def test_without_dwell_times_the_images_come_unwhitened_and_it_is_said(
    service: Service, scan: SimulatedScan, kind: str, dwell: float
) -> None:
    def unset(batches: Batches) -> Batches:
        return [(with_dwell_time(headers, dwell), samples) for headers, samples in batches]

    noise, images = noise_part(scan), imaging_part(scan)
    messages = encoded(unset(noise) + images if kind == "noise" else noise + unset(images))
    answer = ask(service, "fourier", scan, messages=messages)
    assert any("no dwell time" in text and "sample_time_us" in text for text in complaints(answer))
    plain = ask(service, "fourier", scan, prewhiten=False)
    np.testing.assert_array_equal(stack(answer.images, STATES), stack(plain.images, STATES))


def with_dwell_time(headers: NDArray[np.void], microseconds: float) -> NDArray[np.void]:
    changed = headers.copy()
    changed["sample_time_us"] = microseconds
    return changed


def test_too_short_a_noise_scan_is_refused_with_the_remedy(service: Service, scan: SimulatedScan) -> None:
    ((headers, samples),) = noise_part(scan)
    short_headers = headers[:1].copy()
    short_headers["number_of_samples"] = 4
    short = [(short_headers, np.ascontiguousarray(samples[:1, :, :4]))]
    answer = ask(service, "fourier", scan, messages=encoded(short + imaging_part(scan)))
    assert not answer.images
    assert any("too few noise samples" in text and "without prewhitening" in text for text in answer.texts)


@pytest.mark.parametrize("chain", ["fourier", "cg_sense"])
def test_a_dead_channel_is_left_out(chain: str, service: Service, scan: SimulatedScan) -> None:
    dead = 2

    def silenced(batches: Batches) -> Batches:
        return [(headers, samples * (np.arange(COILS) != dead)[:, None]) for headers, samples in batches]

    def removed(batches: Batches) -> Batches:
        kept = []
        for headers, samples in batches:
            fewer = headers.copy()
            fewer["active_channels"] = COILS - 1
            fewer["channel_mask"][:, 0] &= ~np.uint64(1 << dead)
            kept.append((fewer, np.ascontiguousarray(np.delete(samples, dead, axis=1))))
        return kept

    answer = ask(service, chain, scan, messages=encoded(silenced(noise_part(scan) + imaging_part(scan))))
    assert [text for text in complaints(answer) if text.startswith("WRN") and text.rstrip().endswith(f"left out: {dead}")]
    without = ask(service, chain, scan, messages=encoded(removed(noise_part(scan) + imaging_part(scan))))
    images, expected = stack(answer.images, STATES), stack(without.images, STATES)
    assert error(images, expected, scan.tissue) < 1e-3
    assert np.isfinite(images).all()
