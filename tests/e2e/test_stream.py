"""MRD streams through pipes: ISMRMRD's own serialiser writes them, its own reader reads the answer."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest
from ismrmrd.serialization import ProtocolDeserializer, ProtocolSerializer
from numpy.typing import NDArray
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.errors import ConfigRefused, IllegalOrder, UnknownChain, WireError
from gadgets.raw_source import Piece, RawFile
from gadgets.replay import replay
from gadgets.service import Service, ServiceOptions
from gadgets.stream import StreamFailed, run_files, run_stream
from gadgets.wire import codec
from gadgets.wire.framing import CONFIG_NAME_BYTES
from gadgets.wire.ids import MessageId
from recon_core.errors import ReconError
from tests.e2e.scans import SimulatedScan, simulated

OPTIONS = ServiceOptions(port=0, workers=0, threads=1, spool=None, previews=False, rehearse=False)


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


@pytest.fixture(scope="module")
def served(scan: SimulatedScan, service: Service, tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.floating]:
    """The server's images of the same scan."""
    out = tmp_path_factory.mktemp("served") / "served.h5"
    answer = replay(scan.path, port=service.port, config="llr", out=out)
    (found,) = pixels(out, str(answer.group)).values()
    return found


def recon_run(folder: Path, *words: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """The command itself, in an empty folder."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "gadgets.cli", "run", *words, "--workers", "0", "--threads", "1"]
    environment = {**os.environ, "XDG_STATE_HOME": str(folder.parent / "state")}
    return subprocess.run(command, input=stdin, capture_output=True, timeout=180, cwd=folder, env=environment)


def test_a_pipe_gives_the_server_s_images(served: NDArray[np.floating], stream: bytes, tmp_path: Path) -> None:
    done = recon_run(tmp_path / "here", "-", "-c", "llr", stdin=stream)
    assert done.returncode == 0, done.stderr.decode()
    others, images = read(done.stdout)
    assert [type(item).__name__ for item in others] == ["ismrmrdHeader"]
    np.testing.assert_array_equal(np.stack([image.data for image in images]), served)
    assert b"INF llr: 6 images" in done.stderr
    assert not os.listdir(tmp_path / "here"), "no file but what was asked for"


def test_a_replay_s_capture_through_a_pipe(served: NDArray[np.floating], scan: SimulatedScan, tmp_path: Path) -> None:
    """What the spool keeps of ``recon replay`` begins with a QUERY, and others may ask before their header as well."""
    spool = tmp_path / "spool"
    with Service(replace(OPTIONS, spool=spool)) as keeper:
        replay(scan.path, port=keeper.port, config="llr", out=tmp_path / "replayed.h5", behind=True)
    capture = next(spool.glob("*.mrd")).read_bytes()
    assert struct.unpack_from("<H", capture) == (MessageId.QUERY,)
    start = capture.index(struct.pack("<H", MessageId.CONFIG_FILE)) + 2 + CONFIG_NAME_BYTES
    out = io.BytesIO()
    asked = capture[:start] + codec.query("gadgetron::info", 3) + capture[start:]
    run_stream(io.BytesIO(asked), out, options=OPTIONS)
    np.testing.assert_array_equal(np.stack([image.data for image in read(out.getvalue())[1]]), served)


def test_a_failure_before_the_pipe_ends_is_no_abort(stream: bytes, tmp_path: Path) -> None:
    """The thread that still waits for the pipe does not hold up the interpreter's end."""
    command = [sys.executable, "-m", "gadgets.cli", "run", "-", "-c", "llr", "--workers", "1", "--threads", "1"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=tmp_path, env=environment
    ) as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write(stream[:-2] + b"\xff\xff")  # no message in place of the CLOSE
        process.stdin.flush()
        code, said = process.wait(timeout=180), process.stderr.read()
    assert code == 1 and b"StreamFailed" in said, said.decode()


def test_a_stream_into_an_image_file(served: NDArray[np.floating], stream: bytes, tmp_path: Path) -> None:
    """Also into one that is called like the default of files, and with pictures."""
    here, name = tmp_path / "here", "out.h5"
    done = recon_run(here, "-", "-c", "llr", "-o", name, "--montage", "pictures", stdin=stream)
    assert done.returncode == 0, done.stderr.decode()
    group = re.fullmatch(rf"6 images in {name} \(group (.*)\)\npictures/\S+\.png\n", done.stdout.decode())
    assert group is not None, done.stdout
    (found,) = pixels(here / name, group[1]).values()
    np.testing.assert_array_equal(found, served)
    assert sorted(os.listdir(here)) == [name, "pictures"] and len(os.listdir(here / "pictures")) == 1


@pytest.mark.parametrize("kind", ["raw file", "capture"])
def test_a_file_into_a_stream(
    kind: str, scan: SimulatedScan, served: NDArray[np.floating], stream: bytes, tmp_path: Path
) -> None:
    source = scan.path
    if kind == "capture":
        source = tmp_path / "capture.mrd"
        source.write_bytes(codec.config_file("fourier.xml") + stream)
    done = recon_run(tmp_path / "here", str(source), "-c", "llr", "-o", "-")
    assert done.returncode == 0, done.stderr.decode()
    others, images = read(done.stdout)
    assert [type(item).__name__ for item in others] == ["ismrmrdHeader"]
    np.testing.assert_array_equal(np.stack([image.data for image in images]), served)
    assert not os.listdir(tmp_path / "here")


@pytest.mark.parametrize(
    ("words", "stdin", "said"),
    [
        (("-", "-c", "llr", "--montage", "pictures"), b"", "ImageFileError.*--out FILE"),
        (("raw.h5", "-c", "llr", "-o", "-", "--montage", "pictures"), b"", "ImageFileError.*--out FILE"),
        (("raw.h5", "-c", "llr", "-o", "-"), b"", "RawFileError.*raw.h5"),
        (("-", "-c", "llr", "-o", "images.h5"), b"", "Disconnected.*ends in the middle"),
        (("-", "-c", "llr", "-o", "images.h5"), b"\x89HDF\r\n\x1a\n", "IllegalOrder.*begins with the MRD header"),
        (("-", "-o", "images.h5"), b"\x06\x00" + b"\x00" * 16 + b"\xff" * 8, "Oversized.*a query"),
        (("-", "-o", "images.h5"), b"\x03\x00\x00\x00\x00\x00", "ConfigRefused.*--config NAME"),
    ],
)
def test_what_cannot_be_is_said_and_leaves_no_file(
    words: tuple[str, ...], stdin: bytes, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["run", *words], input=stdin)
    assert isinstance(done.exception, ReconError) and done.stdout_bytes == b"" and not os.listdir(tmp_path)
    assert re.match(said, f"{type(done.exception).__name__}: {done.exception}")


def test_no_stream_is_written_to_a_terminal(monkeypatch: pytest.MonkeyPatch, scan: SimulatedScan) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    with pytest.raises(ConfigRefused, match="terminal"):
        run_files(scan.path, Path("-"), config="fourier", options=OPTIONS)


def test_a_stream_that_fails_keeps_the_images_it_made(
    stream: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut = stream[: -len(codec.close())]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(cut)))
    with pytest.raises(StreamFailed, match="before its CLOSE"):
        run_files(Path("-"), tmp_path / "images.h5", config="fourier", options=OPTIONS)
    assert not (tmp_path / "images.h5").exists(), "none was made"


def test_a_file_that_cannot_be_read_on_is_named(scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch) -> None:
    class Torn(RawFile):
        def _data(self) -> Iterator[Piece]:
            yield next(super()._data())
            raise KeyError

    monkeypatch.setattr("gadgets.raw_source.RawFile", Torn)
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(StreamFailed, match=r"broke off: scan\.h5"):
        run_files(scan.path, Path("-"), config="fourier", options=OPTIONS)
    with pytest.raises(EOFError):
        read(out.buffer.getvalue())  # type: ignore[attr-defined]


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
