"""Bytes that the real client and the real Gadgetron 4.7.2 sent, against the HDF5 files that they came from."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from gadgets.errors import Disconnected
from gadgets.wire import composite, events
from gadgets.wire.dtypes import IMAGE_HEADER, WAVEFORM_HEADER, Flag, has_flag
from gadgets.wire.framing import FrameParser
from gadgets.wire.header import parse_header
from gadgets.wire.readouts import groups, read_samples
from gadgets.wire.session import CLOSED, Session
from tests.wire.conftest import CAPTURES, Stored

GetStored = Callable[[str], Stored]
GetBytes = Callable[[str], bytes]

SCANS = [
    ("client_config_file.bin", "replayed.h5", "server"),
    ("client_config_script.bin", "replayed.h5", "server"),
    ("client_noise_dependency_2.bin", "replayed_with_noise_dependency.h5", "server"),
    ("client_waveforms.bin", "replayed_with_waveforms.h5", "server"),
    ("gadgetron_node_acquisitions.bin", "replayed.h5", "node"),
]


def parse(data: bytes, role: str) -> list[events.Event]:
    parser = FrameParser(role=role)  # type: ignore[arg-type]
    found = parser.feed(data)
    parser.finish()
    assert parser.closed
    assert parser.offset == len(data)
    assert parser.error is None
    return found


def readouts(found: list[events.Event]) -> events.Readouts:
    (only,) = (e for e in found if isinstance(e, events.Readouts))
    return only


def test_every_capture_is_covered() -> None:
    named = {name for name, _, _ in SCANS} | {
        "client_compressed_precision.bin",
        "client_compressed_tolerance.bin",
        "client_noise_dependency.bin",
        "client_query.bin",
        "gadgetron_answer_default.bin",
        "gadgetron_node_bucket.bin",
        "gadgetron_node_recondata.bin",
    }
    assert {path.name for path in CAPTURES.glob("*.bin")} == named


@pytest.mark.parametrize(("name", "source", "role"), SCANS)
def test_scan_equals_its_file(name: str, source: str, role: str, capture: GetBytes, stored: GetStored) -> None:
    found, truth = parse(capture(name), role), stored(source)
    session = Session()
    for event in found:
        session.accept(event)
    assert session.state == CLOSED
    acquired = readouts(found)
    assert_array_equal(acquired.headers, truth.headers)
    samples = read_samples(CAPTURES / name, acquired.headers, acquired.offsets, acquired.payload_bytes)
    assert_array_equal(samples, np.stack(truth.samples))


@pytest.mark.parametrize(("name", "source", "role"), SCANS[:4])
def test_client_sends_the_header_unchanged(name: str, source: str, role: str, capture: GetBytes, stored: GetStored) -> None:
    (header,) = (e for e in parse(capture(name), role) if isinstance(e, events.HeaderText))
    assert header.text == stored(source).text


@pytest.mark.parametrize("source", ["replayed.h5", "replayed_with_noise_dependency.h5"])
def test_header_fields(source: str, stored: GetStored) -> None:
    header = parse_header(stored(source).text)
    (encoding,) = header.encodings
    assert encoding.encoded_matrix == (1, 32, 64)
    assert encoding.recon_fov == pytest.approx((0.006, 0.3, 0.3))
    assert encoding.acceleration == (2, 1)
    assert header.noise_dependency == ("66056_1_2_3" if "noise" in source else None)


def test_configurations(capture: GetBytes) -> None:
    first = parse(capture("client_config_file.bin"), "server")[0]
    assert first == events.ConfigFile(0, "cg_sense.xml")
    script = parse(capture("client_config_script.bin"), "server")[0]
    assert isinstance(script, events.ConfigScript)
    assert script.text.rstrip().endswith("</configuration>")


def test_waveforms(capture: GetBytes, stored: GetStored) -> None:
    found = [e for e in parse(capture("client_waveforms.bin"), "server") if isinstance(e, events.Waveform)]
    truth = stored("replayed_with_waveforms.h5").waveforms
    assert len(found) == len(truth) == 6
    for event, (header, data) in zip(found, truth, strict=True):
        assert_array_equal(event.data, data)
        assert all(event.header[name] == header[name] for name in WAVEFORM_HEADER.names or ())


def test_query(capture: GetBytes) -> None:
    assert parse(capture("client_query.bin"), "server") == [events.Query(0, 0, "gadgetron::info"), events.Close(41)]


def test_noise_dependency_connection(capture: GetBytes) -> None:
    config, close = parse(capture("client_noise_dependency.bin"), "server")
    assert isinstance(config, events.ConfigScript)
    assert "GadgetronNoiseCovarianceMatrix_66056_1_2_3" in config.text
    assert isinstance(close, events.Close)


@pytest.mark.parametrize(
    ("name", "tolerance"),
    # -T 0.05 bounds the error itself; -P 12 bounds it by half a step of 11 bits of each readout's largest value
    [("client_compressed_tolerance.bin", 0.05), ("client_compressed_precision.bin", None)],
)
def test_compressed_scan(name: str, tolerance: float | None, capture: GetBytes, stored: GetStored) -> None:
    acquired, truth = readouts(parse(capture(name), "server")), stored("replayed.h5")
    assert has_flag(acquired.headers, Flag.ACQ_COMPRESSION2).all()
    plain = acquired.headers.copy()
    plain["flags"] &= ~np.uint64(Flag.ACQ_COMPRESSION2.bit)
    assert_array_equal(plain, truth.headers)
    samples = read_samples(CAPTURES / name, acquired.headers, acquired.offsets, acquired.payload_bytes)
    for got, want in zip(samples, truth.samples, strict=True):
        parts = want.view(np.float32)
        bound = tolerance if tolerance else 0.51 / (2**11 - 2) * np.abs(parts).max()
        error = np.abs(got.view(np.float32) - parts).max()
        assert 0 < error <= bound * (1 + 1e-5)


def test_recon_data(capture: GetBytes, stored: GetStored) -> None:
    truth = stored("replayed.h5")
    found = [e.content for e in parse(capture("gadgetron_node_recondata.bin"), "node") if isinstance(e, events.Composite)]
    assert len(found) == 4
    for repetition, content in enumerate(found):
        assert isinstance(content, composite.ReconData)
        ((data, reference),) = content.bits
        assert reference is not None
        for buffer, n_lines in ((data, 16), (reference, 8)):
            assert buffer.data.shape == (1, 1, 1, 4, 1, 32, 64)
            assert buffer.sampling["recon_matrix"].tolist() == [32, 32, 1]
            filled = np.flatnonzero(buffer.data.any(axis=(0, 1, 2, 3, 4, 6)))
            assert len(filled) == n_lines
            for k1 in filled:
                header = buffer.headers[0, 0, 0, 0, k1]
                (source,) = np.flatnonzero(truth.headers == header)
                assert truth.headers[source]["idx"]["repetition"] == repetition
                assert_array_equal(buffer.data[0, 0, 0, :, 0, k1], truth.samples[source])


def test_bucket(capture: GetBytes, stored: GetStored) -> None:
    truth = stored("replayed.h5")
    found = [e.content for e in parse(capture("gadgetron_node_bucket.bin"), "node") if isinstance(e, events.Composite)]
    assert len(found) == 4
    for repetition, content in enumerate(found):
        assert isinstance(content, composite.Bucket)
        for part, n in ((content.data, 16), (content.reference, 8)):
            assert len(part.headers) == len(part.samples) == n
            assert part.statistics[0]["repetition"] == (repetition,)
            assert part.statistics[0]["kspace_encode_step_1"] == tuple(part.headers["idx"]["kspace_encode_step_1"])
            for header, samples in zip(part.headers, part.samples, strict=True):
                (source,) = np.flatnonzero(truth.headers == header)
                assert_array_equal(samples, truth.samples[source])


@pytest.mark.parametrize("name", ["gadgetron_node_recondata.bin", "gadgetron_node_bucket.bin"])
def test_a_composite_that_ends_early(name: str, capture: GetBytes) -> None:
    data = capture(name)
    second = parse(data, "node")[3]
    parser = FrameParser(role="node")
    assert not any(isinstance(e, events.Composite) for e in parser.feed(data[: second.offset - 1]))
    with pytest.raises(Disconnected):
        parser.finish()


def test_answer_is_the_image_of_the_imaging_lines(capture: GetBytes, stored: GetStored) -> None:
    truth = stored("replayed.h5")
    images = [e for e in parse(capture("gadgetron_answer_default.bin"), "client") if isinstance(e, events.Image)]
    assert [int(image.header["image_index"]) for image in images] == [1, 2, 3, 4]
    skipped = has_flag(truth.headers, Flag.ACQ_IS_NOISE_MEASUREMENT) | has_flag(
        truth.headers, Flag.ACQ_IS_PARALLEL_CALIBRATION
    )
    for repetition, image in enumerate(images):
        assert image.header.dtype == IMAGE_HEADER
        assert image.data.dtype == np.float32
        kspace = np.zeros((4, 32, 64), np.complex64)
        for i in np.flatnonzero(~skipped & (truth.headers["idx"]["repetition"] == repetition)):
            kspace[:, truth.headers["idx"]["kspace_encode_step_1"][i]] = truth.samples[i]
        axes = (1, 2)
        coils = np.fft.fftshift(np.fft.ifft2(np.fft.ifftshift(kspace, axes), norm="ortho"), axes)[:, :, 16:48]
        expected = np.sqrt((np.abs(coils) ** 2).sum(axis=0))
        np.testing.assert_allclose(image.data[0, 0], expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_groups_split_shapes(stored: GetStored) -> None:
    headers = stored("replayed.h5").headers.copy()
    headers["number_of_samples"][[3, 7]] = 10
    headers["active_channels"][5] = 1
    found = [g.tolist() for g in groups(headers)]
    assert found[1:] == [[3, 7], [5]]
    assert sorted(i for group in found for i in group) == list(range(81))
