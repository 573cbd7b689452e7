"""Our own client against a live server: bit-exact input, images where they belong, and no failure without a word."""

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pytest
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.errors import ImageFileError, MalformedText, RawFileError, ReplayFailed, SpoolError
from gadgets.image_file import image_groups, read_images
from gadgets.raw_source import open_source
from gadgets.replay import ReplayResult, fresh_group, replay
from gadgets.wire import codec
from gadgets.wire.events import Image
from gadgets.wire.framing import FrameParser
from recon_core.errors import DataError
from tests.gadgets.serving import HEADER, CountingScan, Served, count_image, serving
from tests.waiting import PATIENCE, until

CAPTURES = Path(__file__).parent.parent / "data" / "wire-captures"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as running:
        yield running


def stream_of(path: Path, **options: object) -> bytes:
    return b"".join(bytes(piece.data) for piece in open_source(path, **options).pieces())  # type: ignore[arg-type]


def pixel(image: Image) -> complex:
    return complex(image.data.flat[0])


# -- what is sent --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "capture"),
    [
        ("replayed_with_waveforms.h5", "client_waveforms.bin"),
        ("replayed_with_noise_dependency.h5", "client_noise_dependency_2.bin"),
    ],
)
def test_a_raw_file_becomes_the_bytes_of_the_real_client(file: str, capture: str) -> None:
    assert stream_of(CAPTURES / file, config="cg_sense.xml") == (CAPTURES / capture).read_bytes()


def test_a_raw_file_with_a_script_becomes_the_bytes_of_the_real_client() -> None:
    captured = (CAPTURES / "client_config_script.bin").read_bytes()
    script = FrameParser().feed(captured)[0]
    assert stream_of(CAPTURES / "replayed.h5", script=script.text) == captured  # type: ignore[attr-defined]


def test_small_slabs_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = stream_of(CAPTURES / "replayed_with_waveforms.h5", config="x")
    monkeypatch.setattr("gadgets.raw_source.SLAB_BYTES", 5000)
    assert stream_of(CAPTURES / "replayed_with_waveforms.h5", config="x") == whole
    assert stream_of(CAPTURES / "client_waveforms.bin") == (CAPTURES / "client_waveforms.bin").read_bytes()


def write_raw(path: Path, stamps: list[int], waveform_stamps: list[int]) -> None:
    """An ISMRMRD file through the public library: readouts of two shapes, one with a trajectory."""
    import ismrmrd

    with ismrmrd.Dataset(str(path), "dataset") as file:
        file.write_xml_header(HEADER.encode())
        for i, stamp in enumerate(stamps):
            dims = 2 if i == 1 else 0
            values = (np.arange(12 if i % 2 else 8) + 1j * i).reshape(2, -1).astype(np.complex64)
            trajectory = np.full((values.shape[1], dims), 0.5, np.float32) if dims else None
            acquisition = ismrmrd.Acquisition.from_array(values, trajectory)
            acquisition.acquisition_time_stamp = stamp
            acquisition.scan_counter = i
            file.append_acquisition(acquisition)
        for stamp in waveform_stamps:
            waveform = ismrmrd.Waveform.from_array(np.arange(6, dtype=np.uint32).reshape(2, 3))
            waveform.time_stamp = stamp
            file.append_waveform(waveform)


def test_waveforms_are_interleaved_by_time_stamp_and_shapes_may_change(tmp_path: Path) -> None:
    write_raw(tmp_path / "raw.h5", [10, 20, 30, 40], [35, 5, 20, 99])
    order: list[object] = []
    for event in FrameParser().feed(stream_of(tmp_path / "raw.h5", config="fourier")):
        name = type(event).__name__
        if name == "Readouts":
            order += event.headers["scan_counter"].tolist()  # type: ignore[attr-defined]
            assert event.headers["trajectory_dimensions"].tolist() == [
                2 if i == 1 else 0 for i in event.headers["scan_counter"]
            ]  # type: ignore[attr-defined]
        elif name == "Waveform":
            order.append(("w", int(event.header["time_stamp"])))  # type: ignore[attr-defined]
    assert order == [("w", 5), 0, 1, ("w", 20), 2, ("w", 35), 3, ("w", 99)]


def test_the_version_can_be_left_out() -> None:
    stream = stream_of(CAPTURES / "replayed.h5", config="x", strip_version=True)
    assert b"<version>" not in stream and b"<ismrmrdHeader" in stream


def test_a_capture_goes_out_bit_for_bit_and_comes_back_so(tmp_path: Path) -> None:
    sent = (CAPTURES / "client_waveforms.bin").read_bytes()
    with serving(tmp_path / "first") as served:
        served.client().send(sent)
        served.captures()
        [capture] = served.spool.glob("*.mrd")
    with serving(tmp_path / "second") as served:
        assert replay(capture, port=served.server.port).n_images == 1
        [(stored, info)] = served.captures()
    assert stored == sent and info["status"] == "complete"


def test_a_capture_with_another_chain_and_settings(served: Served) -> None:
    result = replay(
        CAPTURES / "client_waveforms.bin", port=served.server.port, config="fourier", parameters={"iterations": "4"}
    )
    assert result.n_images == 1 and result.n_readouts == 81
    request = served.scans[0].request
    assert request.name == "fourier" and request.overrides == {"iterations": "4"}
    assert (served.scans[0].n_readouts, served.scans[0].n_waveforms) == (81, 6)


# -- what comes back -----------------------------------------------------------------------------------------------------


def test_images_go_to_a_file_as_the_real_client_writes_it(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    told: list[tuple[int, int | None]] = []
    result = replay(
        CAPTURES / "replayed.h5", port=served.server.port, config="fourier", out=out, group="run", progress=lambda *n: told.append(n)
    )  # fmt: skip
    assert (result.n_readouts, result.n_images, result.series, result.group) == (81, 1, {0: 1}, "run")
    assert told[-1] == (81, 81)
    assert result.seconds_to_first_image == result.seconds_to_last_image
    with h5py.File(out) as file:
        assert sorted(file["run/image_0"]) == ["attributes", "data", "header"]
        assert file["run/image_0/data"].shape == (1, 1, 1, 2, 2)
    assert [pixel(image) for image in read_images(out, "run")] == [81]


def test_every_run_has_a_fresh_group(served: Served, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    runs = [replay(CAPTURES / "replayed.h5", port=served.server.port, config="fourier", out=out) for _ in range(3)]
    assert len({run.group for run in runs}) == 3
    assert image_groups(out) == sorted(run.group or "" for run in runs)
    assert fresh_group(out, runs[0].group) not in image_groups(out)


def test_rate_plays_at_scanner_speed(served: Served) -> None:
    started = time.perf_counter()
    result = replay(CAPTURES / "replayed.h5", port=served.server.port, config="fourier", rate=400.0)
    # lower bounds only: a slow machine may take longer. 81 readouts in groups of 4: the last group is due at 80 / 400 s
    assert time.perf_counter() - started >= 0.2
    assert result.send_seconds >= 0.199 and result.readouts_per_second <= 81 / 0.199


def test_a_replay_may_stand_behind_scanners(served: Served) -> None:
    raw = CAPTURES / "replayed.h5"
    plain, behind = (replay(raw, port=served.server.port, config="fourier", behind=chosen) for chosen in (False, True))
    assert [scan.raw.behind for scan in served.scans] == [False, True]
    assert plain.texts == behind.texts == [] and plain.n_images == behind.n_images == 1
    first, second = (stored for stored, _ in served.captures())
    assert second == codec.query("recon::behind", 7) + first


def test_the_place_of_an_earlier_replay_is_none_of_the_scan(served: Served, tmp_path: Path) -> None:
    """A capture of a replay that stood behind scanners may be urgent, and its captures do not grow from replay to replay."""
    replay(CAPTURES / "replayed.h5", port=served.server.port, config="fourier", behind=True)
    [capture] = finished(served, 1)
    for behind in (False, True):
        replay(capture, port=served.server.port, behind=behind)
    assert [scan.raw.behind for scan in served.scans] == [True, False, True]
    first, urgent, again = (stored for stored, _ in served.captures())
    assert first == again == codec.query("recon::behind", 7) + urgent


def finished(served: Served, n: int) -> list[Path]:
    """The captures, when there are so many."""
    return until(lambda: found if len(found := served.server.spool.captures()) >= n else [])


@pytest.mark.parametrize(("words", "behind"), [([], True), (["--behind"], True), (["--urgent"], False)])
def test_the_command_lets_scanners_go_first_unless_it_is_urgent(
    served: Served, tmp_path: Path, words: list[str], behind: bool
) -> None:
    place = ["-p", str(served.server.port), "-o", str(tmp_path / "o.h5")]
    done = CliRunner().invoke(app, ["replay", str(CAPTURES / "replayed.h5"), "-c", "fourier", *place, *words])
    assert done.exit_code == 0, done.output
    assert [scan.raw.behind for scan in served.scans] == [behind]


def test_the_noise_measurement_is_asked_for_first(served: Served) -> None:
    source = CAPTURES / "replayed_with_noise_dependency.h5"
    assert replay(source, port=served.server.port, config="fourier").noise is None
    served.noise.put("66056_1_2_3", np.eye(4).astype(complex), 5e-6)
    result = replay(source, port=served.server.port, config="fourier")
    assert result.noise is not None and "<value>success</value>" in result.noise
    assert replay(source, port=served.server.port, config="fourier", ask_noise=False).noise is None


def test_it_waits_for_a_server_that_is_still_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = threading.Event()
    monkeypatch.setattr("gadgets.replay._retry", lambda: refused.set())
    from gadgets.server import Server
    from gadgets.spool import Spool

    server = Server(port=0, open_scan=CountingScan, spool=Spool(None))
    server.claim()  # it has its port, and refuses everybody
    results: list[ReplayResult] = []

    def client() -> None:
        results.append(replay(CAPTURES / "replayed.h5", port=server.port, config="fourier", connect_seconds=PATIENCE))

    thread = threading.Thread(target=client)
    thread.start()
    assert refused.wait(PATIENCE)
    with server:
        thread.join()
    assert results[0].n_images == 1


# -- failures ------------------------------------------------------------------------------------------------------------


def fails(port: int, **options: object) -> ReplayFailed:
    with pytest.raises(ReplayFailed) as caught:
        replay(CAPTURES / "replayed.h5", port=port, **{"config": "fourier", **options})  # type: ignore[arg-type]
    return caught.value


def test_the_servers_words_are_the_error(served: Served) -> None:
    error = fails(served.server.port, config="grappa_magic")
    assert "UnknownChain" in str(error) and "grappa_magic" in str(error)
    assert isinstance(error.result, ReplayResult) and error.result.n_readouts == 81


@dataclass
class HalfScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        yield count_image(1)
        raise DataError("the second half is missing")


def test_images_before_an_error_are_kept(tmp_path: Path) -> None:
    with serving(tmp_path, HalfScan) as served:
        error = fails(served.server.port, out=tmp_path / "out.h5")
    assert "second half" in str(error)
    assert len(list(read_images(tmp_path / "out.h5"))) == 1


@dataclass
class WarnedScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        yield codec.text("WRN the first half is dim\n")
        raise DataError("the second half is missing")


def test_the_command_shows_the_words_before_an_error(tmp_path: Path) -> None:
    given = [str(CAPTURES / "replayed.h5"), "-o", str(tmp_path / "o.h5"), "-c"]
    with serving(tmp_path, WarnedScan) as served:
        done = CliRunner().invoke(app, ["replay", *given, "fourier", "-p", str(served.server.port)])
    assert done.output.count("WRN the first half is dim") == 1
    assert re.match(r"127\.0\.0\.1:\d+: the server says: ERROR .*second half", str(done.exception))


@dataclass
class EmptyScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        yield codec.text("INF an empty answer\n")


def test_no_image_is_a_failure_and_leaves_no_file(tmp_path: Path) -> None:
    with serving(tmp_path, EmptyScan) as served:
        error = fails(served.server.port, out=tmp_path / "out.h5")
    assert "no image" in str(error) and "an empty answer" in str(error)
    assert not (tmp_path / "out.h5").exists()


@dataclass
class MixedScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        yield count_image(1)
        yield count_image(2, shape=(3, 3))
        yield count_image(3)


def test_two_matrices_in_one_series_are_a_failure(tmp_path: Path) -> None:
    with serving(tmp_path, MixedScan) as served:
        error = fails(served.server.port, out=tmp_path / "out.h5")
    assert "cannot be stored" in str(error) and "series" in str(error)


@contextmanager
def pretender(answer: Callable[[socket.socket], None]) -> Iterator[int]:
    """A server that takes one connection, reads it to its end, and does what it wants."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                parser = FrameParser()
                while not parser.closed:
                    piece = connection.recv(1 << 16)
                    if not piece:
                        return
                    parser.feed(piece)
                answer(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()[1]
        thread.join()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "without CLOSE"),
        (count_image(1), "without CLOSE"),
        (count_image(1)[:100], "in the middle"),
        (struct.pack("<H", 4711) + codec.close(), "4711"),
        (codec.error("out of memory") + codec.close(), "out of memory"),
        (codec.text("[Connection Main Thread/Stream] ERROR: map::at\n") + count_image(1) + codec.close(), "map::at"),
        (codec.close(), "no words either"),
    ],
)
def test_a_server_that_breaks_the_protocol(answer: bytes, words: str) -> None:
    with pretender(lambda connection: connection.sendall(answer)) as port:
        failed = str(fails(port))
    assert words in failed
    assert ("--tls-ca" in failed) == (answer == b""), "only of a server that said nothing"


def test_a_server_that_has_gone_before_the_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    theirs.close()  # sending fails from the first byte on, and a command that ends by a broken pipe says nothing
    monkeypatch.setattr("gadgets.replay._connect", lambda *_: ours)
    assert "closed without CLOSE" in str(fails(0, behind=True))


def test_a_silent_server_is_not_waited_for_for_ever() -> None:
    through = threading.Event()
    with pretender(lambda connection: void(through.wait(PATIENCE))) as port:
        error = fails(port, silence_seconds=0.2)
        through.set()
    assert "silent" in str(error)


def void(value: object) -> None:
    """For lambdas that must return nothing."""


def test_nobody_listens() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        assert "no server answers" in str(fails(holder.getsockname()[1], connect_seconds=0.0))


def test_a_truncated_capture_ends_as_it_did(served: Served, tmp_path: Path) -> None:
    cut = (CAPTURES / "client_config_file.bin").read_bytes()[:50_000]
    (tmp_path / "cut.mrd").write_bytes(cut)
    with pytest.raises(ReplayFailed, match="Disconnected"):
        replay(tmp_path / "cut.mrd", port=served.server.port)
    [(stored, info)] = served.captures()
    assert stored == cut and info["status"] == "truncated"


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(RawFileError, match="cannot read"):
        open_source(tmp_path / "missing.mrd")
    with pytest.raises(RawFileError, match="Is a directory"):
        open_source(tmp_path, config="x")
    (tmp_path / "words.h5").write_text("not HDF5")
    with pytest.raises(SpoolError, match="neither an MRD raw file"):
        open_source(tmp_path / "words.h5", config="x")
    with pytest.raises(RawFileError, match="no chain to ask for"):
        open_source(CAPTURES / "replayed.h5")
    with pytest.raises(RawFileError, match="no raw data in this group"):
        open_source(CAPTURES / "replayed.h5", config="x", dataset="other")
    with pytest.raises(MalformedText, match="exclude"):
        open_source(CAPTURES / "replayed.h5", config="x", script="y")
    query = tmp_path / "query.mrd"
    query.write_bytes(codec.query("x") + codec.close())
    with pytest.raises(RawFileError, match="no header"):
        open_source(query, config="x")


def test_images_are_never_written_into_the_raw_data(tmp_path: Path, served: Served) -> None:
    raw = tmp_path / "raw.h5"
    raw.write_bytes((CAPTURES / "replayed.h5").read_bytes())
    before = raw.read_bytes()
    (tmp_path / "link.h5").symlink_to(raw)
    for out in (raw, tmp_path / "link.h5"):
        with pytest.raises(ImageFileError, match="raw data"):
            replay(raw, port=served.server.port, config="fourier", out=out)
    assert raw.read_bytes() == before


def test_a_raw_file_whose_samples_are_short(tmp_path: Path, served: Served) -> None:
    write_raw(tmp_path / "raw.h5", [1, 2], [])
    with h5py.File(tmp_path / "raw.h5", "a") as file:
        row = file["dataset/data"][0]
        row["head"]["number_of_samples"] += 1
        file["dataset/data"][0] = row
    with pytest.raises(ReplayFailed, match="not as long as its header says"):
        replay(tmp_path / "raw.h5", port=served.server.port, config="fourier")
