"""What goes wrong at a scanner: said loudly, answered where an honest answer exists, and over with the next scan."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from defusedxml.ElementTree import fromstring
from numpy.typing import NDArray

from gadgets.errors import JobFailed
from gadgets.scratch import SCRATCH_PREFIX
from gadgets.service import Service, ServiceOptions
from gadgets.wire import codec
from gadgets.wire.dtypes import Flag
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
    one_by_one,
    stack,
)
from tests.e2e.slow_chain import write_chain
from tests.strict_client import Answer, StrictClient
from tests.waiting import PATIENCE, until


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """Fully sampled, two slices, separate calibration lines."""
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=2, slices=2, calibration="separate", acs=16)


def changed(scan: SimulatedScan, change: Callable[[NDArray[np.void], NDArray[np.complex64]], None]) -> Batches:
    """The scan's readouts after ``change(headers, samples)`` has edited copies of each batch."""
    batches = []
    for headers, samples in scan.stream.batches:
        headers, samples = headers.copy(), samples.copy()
        change(headers, samples)
        batches.append((headers, samples))
    return batches


def kept(scan: SimulatedScan, which: Callable[[NDArray[np.void]], NDArray[np.bool_]]) -> Batches:
    """The noise readouts, and the imaging readouts that ``which`` chooses."""
    chosen = [(headers, samples, which(headers)) for headers, samples in imaging_part(scan)]
    return noise_part(scan) + [(headers[w], samples[w]) for headers, samples, w in chosen if w.any()]


def failed(answer: Answer) -> str:
    """The one ERROR of an answer without images."""
    assert not answer.images
    (text,) = [text for text in answer.texts if text.startswith("ERROR")]
    return text


def has(headers: NDArray[np.void], flag: Flag) -> NDArray[np.bool_]:
    return np.asarray(headers["flags"] >> np.uint64(flag - 1) & np.uint64(1), dtype=bool)


def values(attributes: str, name: str) -> list[str]:
    """All values of an image attribute."""
    root = fromstring(attributes)
    return [value.text or "" for meta in root if meta.findtext("name") == name for value in meta.iter("value")]


# ---- a method that fails ---------------------------------------------------------------------------------------------------


def without_signal_in(number: int) -> Callable[[NDArray[np.void], NDArray[np.complex64]], None]:
    """The calibration lines of one slice are zero: coil maps cannot be had there."""

    def change(headers: NDArray[np.void], samples: NDArray[np.complex64]) -> None:
        calibration = has(headers, Flag.ACQ_IS_PARALLEL_CALIBRATION) & (headers["idx"]["slice"] == number)
        samples[calibration] = 0

    return change


def test_a_slice_whose_method_fails_comes_from_the_fallback_and_says_so(service: Service, scan: SimulatedScan) -> None:
    answer = ask(service, "cg_sense", scan, messages=encoded(changed(scan, without_signal_in(1))))
    (text,) = complaints(answer)
    assert text.startswith("WRN cg_sense failed in slice 1") and "come from fourier" in text
    assert len(answer.images) == 4
    marked = {int(i.header["slice"]): i.attributes for i in answer.images}
    assert "fallback" not in marked[0].lower()
    assert values(marked[1], "ImageComment")[1] == "cg_sense failed: image from fourier instead"
    assert values(marked[0], "SeriesDescriptionAdditional") == ["cg_sense"]
    for name in ("SeriesDescriptionAdditional", "GADGETRON_SeqDescription"):
        assert "fourier_instead_of_cg_sense" in values(marked[1], name)[0]
    # a series of its own: nobody takes the one for the other
    series = {(int(i.header["slice"]), int(i.header["image_series_index"])) for i in answer.images}
    assert len(series) == len({index for _, index in series}) == 2
    images = np.concatenate([stack([i for i in answer.images if i.header["slice"] == number], 2) for number in (0, 1)])
    assert error(images, scan.truth, scan.tissue) < 0.05


def test_plain_fourier_does_not_stand_in_for_undersampled_data(service: Service) -> None:
    folded = in_memory(
        "cine", matrix_x=48, matrix_y=48, coils=4, states=2, mask="uniform", acceleration=2.0, calibration="none"
    )
    text = failed(ask(service, "cg_sense", folded))
    assert "CalibrationError" in text and "no calibration lines" in text


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with the site's own chains: ``fragile`` fails everywhere, and what it falls back to exists here only."""
    folder = tmp_path_factory.mktemp("configs")
    write_chain(folder, "fragile", "cg_sense", "sturdy")
    write_chain(folder, "sturdy", "fourier")
    with Service(ServiceOptions(port=0, workers=1, threads=1, configs=folder, rehearse=False)) as running:
        yield running


def test_a_site_falls_back_to_its_own_chain(site: Service, scan: SimulatedScan) -> None:
    messages = encoded(changed(scan, without_signal_in(0)))
    answer = ask(site, "fragile", scan, messages=messages)
    assert [text for text in complaints(answer) if "its images come from sturdy" in text]
    assert len(answer.images) == 4
    stood_in = [i for i in answer.images if i.header["slice"] == 0]
    assert all(values(i.attributes, "SeriesDescriptionAdditional") == ["sturdy_instead_of_fragile"] for i in stood_in)
    straight = [i for i in ask(site, "sturdy", scan, messages=messages).images if i.header["slice"] == 0]
    np.testing.assert_array_equal(stack(stood_in, 2), stack(straight, 2))


def test_chain_files_are_edited_while_the_server_runs(site: Service, scan: SimulatedScan) -> None:
    folder = site.options.configs
    assert folder is not None
    write_chain(folder, "edited", "cg_sense", "helper")
    write_chain(folder, "helper", "fourier")
    bad = encoded(changed(scan, without_signal_in(0)))
    assert [text for text in complaints(ask(site, "edited", scan, messages=bad)) if "its images come from helper" in text]
    (folder / "helper.xml").write_text("<configuration>")
    answer = ask(site, "edited", scan, messages=bad)
    said = " ".join(complaints(answer))
    assert "CalibrationError" in failed(answer), "why the images are missing, not why nobody stood in"
    assert "helper cannot stand in for it (chain helper: not well-formed XML" in said
    (folder / "edited.xml").write_text("<configuration>")
    assert "ConfigRefused: chain edited: not well-formed XML" in failed(ask(site, "edited", scan))
    write_chain(folder, "edited", "fourier")
    answer = ask(site, "edited", scan, messages=bad)
    assert len(answer.images) == 4 and not complaints(answer)


def test_what_the_console_asked_for_holds_for_the_stand_in(service: Service) -> None:
    partial = in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=1, partial_fourier=0.75, calibration="separate")
    messages = encoded(changed(partial, without_signal_in(0)))
    stood_in = ask(service, "cg_sense", partial, messages=messages, partial_fourier="zero_fill")
    straight = ask(service, "fourier", partial, messages=messages, partial_fourier="zero_fill")
    np.testing.assert_array_equal(stack(stood_in.images, 1), stack(straight.images, 1))


# ---- data that are not what they should be ---------------------------------------------------------------------------------


def test_samples_that_are_no_numbers(service: Service, scan: SimulatedScan) -> None:
    def change(headers: NDArray[np.void], samples: NDArray[np.complex64]) -> None:
        if not has(headers, Flag.ACQ_IS_NOISE_MEASUREMENT).any():
            samples[7, 2, 11] = np.nan

    text = failed(ask(service, "cg_sense", scan, messages=encoded(changed(scan, change))))
    assert "DataError" in text and "not finite" in text and "k1" in text


def test_noise_that_is_no_number(service: Service, scan: SimulatedScan) -> None:
    def change(headers: NDArray[np.void], samples: NDArray[np.complex64]) -> None:
        if has(headers, Flag.ACQ_IS_NOISE_MEASUREMENT).any():
            samples[3, 1, 5] = np.inf

    text = failed(ask(service, "fourier", scan, messages=encoded(changed(scan, change))))
    assert "DataError" in text and "noise" in text


def test_a_few_missing_lines_are_told(service: Service, scan: SimulatedScan) -> None:
    def which(headers: NDArray[np.void]) -> NDArray[np.bool_]:
        line = headers["idx"]["kspace_encode_step_1"]
        return np.asarray(~((headers["idx"]["slice"] == 1) & (headers["idx"]["phase"] == 0) & (line >= 4) & (line < 7)))

    answer = ask(service, "cg_sense", scan, messages=encoded(kept(scan, which)))
    assert len(answer.images) == 4
    assert any("slice 1 phase 0, 45 of 48 lines" in text for text in complaints(answer))
    assert error(stack(answer.images, 2), scan.truth, scan.tissue) < 0.1


def test_a_scan_that_was_stopped_is_refused_or_cut(service: Service, scan: SimulatedScan) -> None:
    def which(headers: NDArray[np.void]) -> NDArray[np.bool_]:
        late = (headers["idx"]["slice"] == 1) & (headers["idx"]["kspace_encode_step_1"] > 2)
        return np.asarray(~late | has(headers, Flag.ACQ_IS_PARALLEL_CALIBRATION))

    messages = encoded(kept(scan, which))
    text = failed(ask(service, "fourier", scan, messages=messages))
    assert "SortError" in text and "3 of 48 lines" in text and "incomplete = drop" in text
    dropped = ask(service, "fourier", scan, messages=messages, incomplete="drop")
    assert {int(i.header["slice"]) for i in dropped.images} == {0}
    assert any("left out as incomplete" in text for text in complaints(dropped))


def test_readouts_of_two_sizes(service: Service, scan: SimulatedScan) -> None:
    """Longer than the encoded matrix: they cannot belong to it. Nothing is cut silently."""
    short, long = (in_memory("cine", matrix_x=n, matrix_y=48, coils=4, states=2) for n in (48, 64))
    text = failed(ask(service, "fourier", short, messages=encoded(short.stream.batches + imaging_part(long))))
    assert "SortError" in text and "readout grid" in text


def test_channels_that_change(service: Service) -> None:
    four, six = (in_memory("cine", matrix_x=48, matrix_y=48, coils=n, states=2) for n in (4, 6))
    text = failed(ask(service, "fourier", four, messages=encoded(four.stream.batches + imaging_part(six))))
    assert "SortError" in text and "channels" in text


@pytest.mark.parametrize("what", ["nothing", "noise of no id", "calibration", "navigators"])
def test_scans_without_imaging_readouts(what: str, service: Service, scan: SimulatedScan) -> None:
    header = scan.header
    if what == "nothing":
        messages: list[bytes] = []
    elif what == "noise of no id":
        messages, header = encoded(noise_part(scan)), re.sub(r"<measurementID>.*?</measurementID>", "", header)
    elif what == "calibration":
        messages = encoded(kept(scan, lambda headers: has(headers, Flag.ACQ_IS_PARALLEL_CALIBRATION)))
    else:

        def navigate(headers: NDArray[np.void], samples: NDArray[np.complex64]) -> None:
            headers["flags"] |= np.uint64(1 << (Flag.ACQ_IS_NAVIGATION_DATA - 1))

        messages = encoded(changed(scan, navigate)[1:])
    text = failed(ask(service, "fourier", scan, header=header, messages=messages))
    assert "SortError" in text


# ---- headers and configurations --------------------------------------------------------------------------------------------


def test_a_header_without_encoding(service: Service, scan: SimulatedScan) -> None:
    header = re.sub(r"<encoding>.*</encoding>", "", scan.header)
    text = failed(ask(service, "fourier", scan, header=header))
    assert "HeaderError" in text and "no <encoding>" in text


def resized(header: str, space: str, **sizes: int) -> str:
    """The header with other matrix sizes in ``encodedSpace`` or ``reconSpace``."""
    begin, end = header.index(f"<{space}>"), header.index(f"</{space}>")
    part = header[begin:end]
    for axis, size in sizes.items():
        part = re.sub(f"(<matrixSize>.*?<{axis}>)\\d+(</{axis}>)", f"\\g<1>{size}\\g<2>", part, count=1)
    return header[:begin] + part + header[end:]


@pytest.mark.parametrize(
    ("space", "sizes", "n_readouts"),
    [
        ("encodedSpace", {"y": 65535, "z": 65535}, 1),
        ("encodedSpace", {"y": 65535, "z": 65535}, 80),
        ("encodedSpace", {"y": 65535, "z": 100}, 1),
        ("encodedSpace", {"x": 65535, "y": 100}, 80),
        ("encodedSpace", {"x": 65535}, 80),
        ("reconSpace", {"x": 65535, "y": 65535}, 1),
        ("reconSpace", {"x": 4096, "y": 4096}, 80),
    ],
)
def test_absurd_matrices_are_refused_before_anything_is_allocated(
    service: Service, scan: SimulatedScan, space: str, sizes: dict[str, int], n_readouts: int
) -> None:
    header = resized(scan.header, space, **sizes)
    header = re.sub(r"<encodingLimits>.*</encodingLimits>", "", header)
    headers, samples = imaging_part(scan)[0]
    imaging = ~has(headers, Flag.ACQ_IS_PARALLEL_CALIBRATION)
    headers, samples = headers[imaging][:n_readouts].copy(), samples[imaging][:n_readouts]
    headers["idx"]["slice"] = headers["idx"]["phase"] = 0
    headers["number_of_samples"], headers["center_sample"] = 2, 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pieces = one_by_one([(headers, np.ascontiguousarray(samples[..., :2]))])
    text = failed(ask(service, "fourier", scan, header=header, messages=pieces))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert "SortError" in text and ("out of proportion" in text or "too large" in text)


def test_an_unknown_chain_lists_the_known_ones(service: Service, scan: SimulatedScan) -> None:
    text = failed(ask(service, "default_recon.xml", scan))
    assert "UnknownChain" in text and "cg_sense" in text and "fourier" in text


@pytest.mark.parametrize(
    "node",
    [
        '<execute name="os" target="system" type="python"/>',
        '<execute name="gadgets" target="fourier" type="matlab"/>',
        '<connect port="9003"/>',
        '<execute name="gadgets" target="../../etc/passwd" type="python"/>',
    ],
)
def test_a_script_that_names_code(service: Service, scan: SimulatedScan, node: str) -> None:
    script = f"<configuration><version>2</version><stream><external>{node}</external></stream></configuration>"
    client = StrictClient(service.host, service.port)
    text = failed(client.scan(script=script, header=scan.header, messages=scan.messages))
    assert "ConfigRefused" in text or "UnknownChain" in text


@pytest.mark.parametrize(("name", "value"), [("iterations", "many"), ("no_such_setting", "1"), ("virtual_coils", "-3")])
def test_settings_that_cannot_be(service: Service, scan: SimulatedScan, name: str, value: str) -> None:
    text = failed(ask(service, "cg_sense", scan, **{name: value}))
    assert "SettingError" in text and name in text


# ---- processes and connections that die ------------------------------------------------------------------------------------


@pytest.fixture
def small_chunks(service: Service) -> Iterator[Service]:
    before = service.services
    service.services = replace(before, chunk_bytes=64 << 10)
    yield service
    service.services = before


def test_a_worker_that_is_killed_in_mid_scan_costs_nothing(small_chunks: Service, scan: SimulatedScan) -> None:
    expected = stack(ask(small_chunks, "cg_sense", scan).images, 2)
    pieces = one_by_one(scan.stream.batches)

    def killing(at: int) -> Iterator[bytes]:
        for number, piece in enumerate(pieces):
            yield piece
            if number == at:
                os.kill(small_chunks.jobs.submit(os.getpid).result(), signal.SIGKILL)

    for at in (len(pieces) // 2, len(pieces) - 1):
        answer = ask(small_chunks, "cg_sense", scan, messages=killing(at))
        np.testing.assert_array_equal(stack(answer.images, 2), expected)


def test_a_task_that_kills_its_worker_takes_no_other_task_with_it(service: Service) -> None:
    poison = service.jobs.submit(os._exit, 1)
    innocent = [service.jobs.submit(abs, -number) for number in range(6)]
    assert [future.result(PATIENCE) for future in innocent] == list(range(6))
    with pytest.raises(JobFailed, match="died twice"):
        poison.result(PATIENCE)
    assert service.jobs.submit(abs, -7).result(PATIENCE) == 7


def test_a_client_that_vanishes_leaves_no_traces(small_chunks: Service, scan: SimulatedScan) -> None:
    expected = stack(ask(small_chunks, "fourier", scan).images, 2)
    start = struct.pack("<H1024s", 1, b"fourier") + codec.header(scan.header)
    stream = start + b"".join(scan.messages)
    for cut in (len(start), len(start) + 20_001, len(stream) // 2, len(stream)):
        with socket.create_connection((small_chunks.host, small_chunks.port)) as connection:
            connection.sendall(stream[:cut])
            # no CLOSE, nothing read, and a reset rather than an orderly end
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        answer = ask(small_chunks, "fourier", scan)
        np.testing.assert_array_equal(stack(answer.images, 2), expected)
    for thread in threading.enumerate():
        if re.fullmatch(r"c\d+", thread.name):
            thread.join(PATIENCE)
    own = f"{SCRATCH_PREFIX}{os.getpid()}-*"
    until(lambda: not [*Path("/dev/shm").glob(own), *Path(os.environ.get("TMPDIR", "/tmp")).glob(own)])


@pytest.mark.parametrize("n", [2, 4])
def test_scans_at_once_give_the_images_that_they_give_alone(n: int, small_chunks: Service, scan: SimulatedScan) -> None:
    other = in_memory("mgre", matrix_x=48, matrix_y=40, partitions=8, coils=6, states=2, mask="poisson", acceleration=2.0)
    asked = [("cg_sense", scan), ("llr", other), ("fourier", scan), ("cg_sense", other)][:n]
    alone = [ask(small_chunks, chain, one) for chain, one in asked]
    start = threading.Barrier(n)

    def together(chain: str, one: SimulatedScan) -> Answer:
        start.wait(PATIENCE)
        return ask(small_chunks, chain, one, messages=one_by_one(one.stream.batches))

    with ThreadPoolExecutor(n) as pool:
        answers = list(pool.map(lambda pair: together(*pair), asked))
    for answer, expected in zip(answers, alone, strict=True):
        np.testing.assert_array_equal(stack(answer.images, 2), stack(expected.images, 2))
