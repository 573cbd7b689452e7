"""MRD streams through pipes: ISMRMRD's own serialiser writes them, its own reader reads the answer."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from ismrmrd.serialization import ProtocolDeserializer, ProtocolSerializer
from numpy.typing import NDArray

from gadgets.errors import ConfigRefused, IllegalOrder, UnknownChain, WireError
from gadgets.replay import replay
from gadgets.service import Service, ServiceOptions
from gadgets.stream import StreamFailed, run_stream
from gadgets.wire import codec
from tests.e2e.scans import SimulatedScan, simulated

OPTIONS = ServiceOptions(port=0, workers=0, threads=1, spool=None, previews=False)
RUN = "import sys; from pathlib import Path; from gadgets.service import ServiceOptions; from gadgets.stream import run_files; "
RUN += "run_files(Path('-'), Path('-'), config='llr', options=ServiceOptions(port=0, workers=1, threads=1, spool=None, previews=False))"


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    return simulated(
        "cine", tmp_path_factory.mktemp("scan") / "scan.h5", matrix_x=48, matrix_y=48, coils=4, states=3, slices=2,
        mask="vista", acceleration=2.0,
    )  # fmt: skip


@pytest.fixture(scope="module")
def stream(scan: SimulatedScan) -> bytes:
    """The raw file as ``ismrmrd_hdf5_to_stream`` writes it, by ISMRMRD's Python."""
    dataset = ismrmrd.Dataset(str(scan.path), "dataset", create_if_needed=False)
    out = io.BytesIO()
    with ProtocolSerializer(out) as serializer:
        serializer.serialize(ismrmrd.xsd.CreateFromDocument(dataset.read_xml_header()))
        for number in range(dataset.number_of_acquisitions()):
            serializer.serialize(dataset.read_acquisition(number))
        for number in range(dataset.number_of_waveforms()):
            serializer.serialize(dataset.read_waveform(number))
    dataset.close()
    return out.getvalue()


def read(answer: bytes) -> tuple[list[object], list[ismrmrd.Image]]:
    """Headers and images by ISMRMRD's reader, which raises at a stream without CLOSE."""
    found = list(ProtocolDeserializer(io.BytesIO(answer)).deserialize())
    images = [item for item in found if isinstance(item, ismrmrd.Image)]
    return found[: -len(images) or None], images


def pixels(path: Path, group: str) -> dict[str, NDArray[np.floating]]:
    with h5py.File(path) as file:
        return {name: file[group][name]["data"][:] for name in file[group]}


def test_a_pipe_gives_the_server_s_images(service: Service, scan: SimulatedScan, stream: bytes, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RUN], input=stream, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr.decode()
    others, images = read(done.stdout)
    assert [type(item).__name__ for item in others] == ["ismrmrdHeader"]
    served = replay(scan.path, port=service.port, config="llr", out=tmp_path / "served.h5")
    (expected,) = pixels(tmp_path / "served.h5", str(served.group)).values()
    np.testing.assert_array_equal(np.stack([image.data for image in images]), expected)
    assert b"INF llr: 6 images" in done.stderr


def test_the_header_is_echoed_and_images_follow(stream: bytes) -> None:
    out = io.BytesIO()
    result = run_stream(io.BytesIO(stream), out, config="fourier", settings={"pixel_type": "uint16"}, options=OPTIONS)
    (length,) = struct.unpack_from("<I", stream, 2)
    assert out.getvalue()[: 6 + length] == stream[: 6 + length]
    _, images = read(out.getvalue())
    assert len(images) == result.n_images == 6 and images[0].data.dtype == np.uint16


def test_a_capture_s_own_configuration_counts_unless_another_is_named(stream: bytes) -> None:
    for start in (codec.config_file("fourier.xml"), codec.config_script("fourier", nul=True)):
        out = io.BytesIO()
        assert run_stream(io.BytesIO(start + stream), out, options=OPTIONS).n_images == 6
    out = io.BytesIO()
    assert (
        run_stream(io.BytesIO(codec.config_file("no_such") + stream), out, config="fourier", options=OPTIONS).n_images == 6
    )


def test_a_failure_leaves_the_stream_without_its_close(stream: bytes) -> None:
    """A reader must not take it for a scan without images."""
    out = io.BytesIO()
    with pytest.raises(StreamFailed, match="before its CLOSE"):
        run_stream(io.BytesIO(stream[: -len(codec.close())]), out, config="fourier", options=OPTIONS)
    with pytest.raises(EOFError):
        read(out.getvalue())


@pytest.mark.parametrize(
    ("start", "config", "settings", "error"),
    [
        (b"", "no_such_chain", {}, UnknownChain),
        (b"", None, {}, ConfigRefused),
        (b"", None, {"iterations": "3"}, ConfigRefused),
        (codec.text("hello"), "fourier", {}, IllegalOrder),
        (2 * codec.config_file("fourier"), "fourier", {}, IllegalOrder),
        (struct.pack("<HI", 3, 1 << 31), "fourier", {}, WireError),
    ],
)
def test_a_stream_that_cannot_be_used(
    stream: bytes, start: bytes, config: str | None, settings: dict[str, str], error: type[Exception]
) -> None:
    out = io.BytesIO()
    with pytest.raises(error):
        run_stream(io.BytesIO(start + stream), out, config=config, settings=settings, options=OPTIONS)
    assert out.getvalue() == b""


@pytest.mark.parametrize("n", [0, 1, 5, 100])
def test_a_stream_that_ends_early(stream: bytes, n: int) -> None:
    with pytest.raises(WireError, match="ends in the middle"):
        run_stream(io.BytesIO(stream[:n]), io.BytesIO(), config="fourier", options=OPTIONS)
