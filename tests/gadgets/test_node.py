"""The server as Gadgetron's external node (``<connect>``), against a stand-in for Gadgetron's side of the socket."""

from __future__ import annotations

import logging
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from gadgets.errors import ConfigRefused, MalformedMessage, UnknownChain
from gadgets.node import front_end_header, node_request, require_accepted, shortened_encodings, unpack
from gadgets.spool import Spool
from gadgets.wire import codec, events
from gadgets.wire.dialect import is_node_configuration
from gadgets.wire.dtypes import ACQUISITION_HEADER, Flag
from gadgets.wire.framing import FrameParser
from gadgets.wire.header import parse_header
from tests.gadgetron_stand_in import CONFIG, connected, message, recorded, session
from tests.gadgets.serving import HEADER, QUICK, CountingScan, Served, count_image, data, serving
from tests.wire import streams
from tests.wire.conftest import CAPTURES

START = message(2, CONFIG) + message(3, HEADER)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as running:
        yield running


def node_events(name: str) -> list[events.Event]:
    return FrameParser(role="node").feed((CAPTURES / f"gadgetron_node_{name}.bin").read_bytes())


# -- who is talking ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "node"),
    [
        (CONFIG, True),
        ("<configuration><property><name>chain</name><value>llr</value></property></configuration>", True),
        ("<configuration>\n <!-- ours -->\n <property name='chain' value='llr'/></configuration>", True),
        ("<configuration/>", True),
        ("<configuration></configuration>", True),
        ('<?xml version="1.0"?>\n', True),
        ("", False),
        ("fourier", False),
        ("<configuration>", False),
        ("<configuration><version>2</version><stream/></configuration>", False),
        ("<configuration><propertyless/></configuration>", False),
        ("<gadgetronStreamConfiguration><property/></gadgetronStreamConfiguration>", False),
    ],
)
def test_gadgetron_is_told_from_a_client_by_its_configuration(text: str, node: bool) -> None:
    assert is_node_configuration(text) == node


@pytest.mark.parametrize("name", [p.name for p in sorted(CAPTURES.glob("*.bin")) if "answer" not in p.name])
def test_recorded_sessions_of_both_kinds(name: str) -> None:
    parser = FrameParser()
    parser.feed((CAPTURES / name).read_bytes())
    assert parser.error is None and parser.closed
    assert parser.role == ("node" if "_node_" in name else "server")


def test_a_node_configuration_names_the_chain_and_its_settings() -> None:
    text = '<configuration><property name="chain" value="llr"/><property name="method" value="x"/>'
    request = node_request(text + '<property name="iterations" value="8"/></configuration>')
    assert request.name == "llr" and request.overrides == {"iterations": "8"}


@pytest.mark.parametrize(
    "text", ['<?xml version="1.0"?>\n', "<configuration/>", "<configuration><stream/></configuration>", "<a/>"]
)
def test_a_node_configuration_without_a_chain(text: str) -> None:
    with pytest.raises(ConfigRefused):
        node_request(text)


# -- one scan -----------------------------------------------------------------------------------------------------------------------


def test_images_come_without_words(served: Served) -> None:
    received = session(connected(served.server.port), START + data(5) + codec.waveform(*streams.waveform()) + codec.close())
    assert not received.errors
    assert received.images[0].data.flat[0] == 5 + 1j


def test_noise_readouts_first(served: Served) -> None:
    """They say nothing about what the front end did: the scan begins with the first imaging readout."""
    headers, samples, _ = streams.readouts(2, 2, 16)
    headers["flags"] = Flag.ACQ_IS_NOISE_MEASUREMENT.bit
    stream = START + bytes(codec.acquisitions(headers, samples)) + codec.waveform(*streams.waveform()) + data(5)
    received = session(connected(served.server.port), stream + codec.close())
    assert received.images[0].data.flat[0] == 7 + 1j


@pytest.mark.parametrize("name", ["bucket", "recondata"])
def test_buckets_and_buffers_are_counted_and_captured(served: Served, name: str) -> None:
    stream = recorded(name)
    received = session(connected(served.server.port), stream)
    assert received.images[0].data.flat[0] == 80
    ((raw, info),) = served.captures()
    assert raw == stream and info["readouts"] == 80 and info["status"] == "complete"


def test_buckets_leave_no_files_behind(served: Served) -> None:
    session(connected(served.server.port), recorded("bucket"))
    served.captures()
    (scan,) = served.scans
    assert scan.abandoned and not scan.raw.kept
    assert not [left for folder in Spool(None).temporary_directories for left in folder.glob(f"*/{scan.raw.name}")]


# -- failures: ERROR, read on to CLOSE, CLOSE ---------------------------------------------------------------------------------------


def test_the_recorded_configuration_names_no_chain(served: Served) -> None:
    received = session(connected(served.server.port), (CAPTURES / "gadgetron_node_bucket.bin").read_bytes())
    assert [re.match("ConfigRefused: .*names no chain", error) is not None for error in received.errors] == [True]


def test_an_unknown_chain_lists_the_known_ones(served: Served) -> None:
    stream = message(2, CONFIG.replace("fourier", "t1_map")) + message(3, HEADER) + data(5) + codec.close()
    (error,) = session(connected(served.server.port), stream).errors
    assert error.startswith(UnknownChain.__name__) and "fourier, cg_sense" in error


class Crashing(CountingScan):
    def finish(self) -> Iterator[bytes]:
        yield count_image(self.n_readouts)
        raise ValueError("a bug that quotes the header")


def test_a_crash_after_the_first_image_keeps_it(tmp_path: Path) -> None:
    with serving(tmp_path, Crashing) as served:
        received = session(connected(served.server.port), START + data(5) + codec.close())
    assert len(received.images) == 1
    (error,) = received.errors
    assert error.startswith("internal error (ValueError)") and "header" not in error


class CrashingEarly(CountingScan):
    def readouts(self, event: events.Readouts) -> None:
        raise ValueError("a bug")


def test_after_an_error_everything_is_read(tmp_path: Path) -> None:
    """Leaving at once would crash Gadgetron's process."""
    with serving(tmp_path, CrashingEarly) as served:
        received = session(
            connected(served.server.port), START + data(5), after_error=lambda: 2000 * data(5, 8, 64) + codec.close()
        )
        ((raw, info),) = served.captures()
    assert len(received.errors) == 1 and not received.images
    assert raw.endswith(codec.close()) and info["readouts"] == 10005 and info["status"] == "failed"


class Integers(CountingScan):
    def finish(self) -> Iterator[bytes]:
        yield count_image(1)
        header = np.zeros((), streams.IMAGE_HEADER)
        yield codec.image(header, "", np.ones((1, 1, 2, 2), np.int16))


def test_pixels_that_gadgetron_cannot_take_are_an_error(tmp_path: Path) -> None:
    with serving(tmp_path, Integers) as served:
        received = session(connected(served.server.port), START + data(5) + codec.close())
    assert len(received.images) == 1
    assert "int16" in received.errors[0]


@pytest.mark.parametrize(("dtype", "fine"), [("<u2", True), ("<f4", True), ("<c8", True), ("<i2", False), ("<f8", False)])
def test_accepted_pixels(dtype: str, fine: bool) -> None:
    encoded = streams.image(dtype=dtype)
    if fine:
        require_accepted(encoded)
    else:
        with pytest.raises(MalformedMessage):
            require_accepted(encoded)


class Wordy(CountingScan):
    def finish(self) -> Iterator[bytes]:
        self.say("INF half way")
        yield codec.text("INF done\n")
        yield count_image(self.n_readouts)


def test_words_go_to_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), serving(tmp_path, Wordy) as served:
        received = session(connected(served.server.port), START + data(5) + codec.close())
        served.captures()
    assert len(received.images) == 1 and not received.errors
    assert sum("INF half way" in r.getMessage() or "INF done" in r.getMessage() for r in caplog.records) == 2


class Nothing(CountingScan):
    def finish(self) -> Iterator[bytes]:
        return iter(())


def test_no_image_is_an_error(tmp_path: Path) -> None:
    """The client's exit code stays 0 and it writes no file: only these words tell its user."""
    with serving(tmp_path, Nothing) as served:
        received = session(connected(served.server.port), START + data(5) + codec.close())
    assert "no image" in received.errors[0] and "5 readouts" in received.errors[0]


def test_gadgetron_leaves_early_and_the_server_lives_on(served: Served) -> None:
    node = connected(served.server.port)
    node.sendall(recorded("bucket")[: 10**4])
    node.close()
    received = session(connected(served.server.port), START + data(5) + codec.close())
    assert received.images[0].data.flat[0] == 5
    statuses = sorted(info["status"] for _, info in served.captures())
    assert statuses == ["complete", "truncated"]


def test_a_silent_gadgetron(tmp_path: Path) -> None:
    """It hangs with a message half sent: the node says so, and its CLOSE ends the session."""
    with serving(tmp_path, timing=replace(QUICK, stall=0.2)) as served, connected(served.server.port) as node:
        node.sendall(START + data(5)[:-3])
        answer = b"".join(iter(lambda: node.recv(4096), b""))
    number, length = struct.unpack_from("<HQ", answer)
    assert number == 8 and b"in the middle of 1008" in answer
    assert answer[10 + length :] == codec.close()


def test_readouts_and_buckets_in_one_scan_are_refused(served: Served) -> None:
    stream = recorded("bucket")
    stream = stream[: -len(codec.close())] + data(5, 4, 64) + codec.close()
    (error,) = session(connected(served.server.port), stream).errors
    assert error.startswith("IllegalOrder")


def test_an_image_to_a_node_is_refused(served: Served) -> None:
    (error,) = session(connected(served.server.port), START + count_image(1) + codec.close()).errors
    assert "cannot be reconstructed" in error


def test_a_client_may_not_send_buckets(served: Served) -> None:
    """Only Gadgetron does; for a scanner's connection they stay an unknown message."""
    bucket = next(e for e in node_events("bucket") if isinstance(e, events.Composite))
    raw = (CAPTURES / "gadgetron_node_bucket.bin").read_bytes()
    answer = served.client().scan("fourier", header=HEADER, messages=[raw[bucket.offset :]])
    assert any("1050" in text for text in answer.texts)


# -- unpacking ------------------------------------------------------------------------------------------------------------------------


def test_every_readout_of_a_bucket_comes_once_and_unchanged() -> None:
    (acquired,) = (e for e in node_events("acquisitions") if isinstance(e, events.Readouts))
    imaging = acquired.headers[1:]  # the first one is noise, which Gadgetron's trigger drops
    lines = {(int(i["repetition"]), int(i["kspace_encode_step_1"])) for i in imaging["idx"]}
    for name in ("bucket", "recondata"):
        rows = [row for e in node_events(name) if isinstance(e, events.Composite) for row in unpack(e.content)]
        found = [(int(i["repetition"]), int(i["kspace_encode_step_1"])) for headers, _ in rows for i in headers["idx"]]
        assert len(found) == len(imaging) and set(found) == lines
        assert all(samples.shape[1:] == (4, 64) for _, samples in rows)


def test_unpacking_changes_nothing_of_the_message() -> None:
    bucket = next(e.content for e in node_events("bucket") if isinstance(e, events.Composite))
    before = bucket.data.headers.tobytes(), bucket.reference.headers.tobytes()  # type: ignore[attr-defined]
    unpack(bucket)
    assert before == (bucket.data.headers.tobytes(), bucket.reference.headers.tobytes())  # type: ignore[attr-defined]


def test_readouts_come_in_the_order_of_acquisition() -> None:
    bucket = next(e.content for e in node_events("bucket") if isinstance(e, events.Composite))
    headers = bucket.data.headers.copy()  # type: ignore[attr-defined]
    headers["scan_counter"] = 100 - np.arange(len(headers))
    part = replace(bucket.data, headers=headers)  # type: ignore[attr-defined]
    rows = unpack(replace(bucket, data=part, reference=replace(part, headers=headers[:0], samples=())))  # type: ignore[type-var]
    counters = np.concatenate([found["scan_counter"] for found, _ in rows])
    assert (np.diff(counters.astype(int)) == 1).all()


def test_something_else_is_refused() -> None:
    with pytest.raises(MalformedMessage):
        unpack("an image array")


# -- the header behind a front end -------------------------------------------------------------------------------------------------


def readout_headers(samples: int, n: int = 3) -> np.ndarray:
    headers = np.zeros(n, ACQUISITION_HEADER)
    headers["number_of_samples"] = samples
    return headers


# streams.HEADER: 8 samples encoded over twice the reconstructed field of view
@pytest.mark.parametrize(("samples", "expected"), [(8, {}), (6, {}), (5, {}), (4, {0: 4}), (3, {0: 4})])
def test_removed_oversampling_is_seen(samples: int, expected: dict[int, int]) -> None:
    assert shortened_encodings(readout_headers(samples), parse_header(HEADER)) == expected


def test_slight_oversampling_is_only_seen_in_whole_readouts() -> None:
    header = parse_header(HEADER.replace("<x>16</x>", "<x>10</x>"))
    assert shortened_encodings(readout_headers(6), header) == {0: 6}
    assert shortened_encodings(readout_headers(5), header) == {}


def test_without_oversampling_nothing_is_shortened() -> None:
    header = parse_header(HEADER.replace("<x>16</x>", "<x>8</x>"))
    assert shortened_encodings(readout_headers(8), header) == {}
    assert shortened_encodings(readout_headers(4), header) == {}


def test_the_header_is_only_changed_where_it_has_to_be() -> None:
    dependency = (
        "<measurementInformation><measurementDependency><dependencyType>Noise</dependencyType>"
        "<measurementID>1</measurementID></measurementDependency></measurementInformation><encoding>"
    )
    text = '<?xml version="1.0" encoding="UTF-8"?>\n' + HEADER.replace("<encoding>", dependency, 1)
    header = parse_header(text.replace("<ismrmrdHeader>", '<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">'))
    assert front_end_header(header, {}, whitened=False) == header.text
    changed = parse_header(front_end_header(header, {0: 4}, whitened=True))
    assert header.noise_dependency == "1" and changed.noise_dependency is None
    (before,), (after,) = header.encodings, changed.encodings
    assert after.encoded_matrix == (1, 4, 4) and after.encoded_fov == pytest.approx(before.recon_fov)
    assert replace(after, encoded_matrix=before.encoded_matrix, encoded_fov=before.encoded_fov) == before
