"""A live server against a client that is as unforgiving as the real one: every fragility of the protocol."""

import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from gadgets.admission import Place, Quota
from gadgets.capture import capture_status
from gadgets.connection import Connection
from gadgets.dicom_identity import read_header_text, read_identity
from gadgets.handlers import Handlers
from gadgets.listener import Access
from gadgets.peer import Peer, Timing
from gadgets.raw_source import RawFile
from gadgets.spool import Spool
from gadgets.wire import codec
from gadgets.wire.events import Readouts
from gadgets.wire.framing import FrameParser, Limits
from recon_core.errors import DataError
from tests.gadgets.serving import (
    CHAINS,
    HEADER,
    QUICK,
    CountingScan,
    Served,
    check_config,
    count_image,
    counted,
    data,
    errors,
    serving,
    still_works,
)
from tests.waiting import PATIENCE, until
from tests.wire import streams

CAPTURES = Path(__file__).parent.parent / "data" / "wire-captures"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path) as running:
        yield running


# -- what real clients send ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("client_config_file.bin", 81),
        ("client_config_script.bin", 81),
        ("client_compressed_precision.bin", 81),
        ("client_compressed_tolerance.bin", 81),
        ("client_waveforms.bin", 81 + 6j),
        ("client_noise_dependency_2.bin", 81),
    ],
)
def test_sessions_of_the_real_client(served: Served, name: str, expected: complex) -> None:
    sent = (CAPTURES / name).read_bytes()
    answer = served.client().send(sent)
    assert counted(answer) == expected and not answer.texts
    [(stored, info)] = served.captures()
    assert stored == sent, "the capture is verbatim"
    assert info["status"] == "complete" and info["readouts"] == 81 and info["bytes"] == len(sent)


@pytest.mark.parametrize("dialect", ["gadgetron", "fire"])
@pytest.mark.parametrize("kind", ["config", "script"])
def test_name_and_script_with_and_without_nul(served: Served, dialect: str, kind: str) -> None:
    answer = served.client(dialect=dialect).scan(**{kind: "fourier"}, header=HEADER, messages=[data(4)])
    assert counted(answer) == 4
    request = served.scans[0].request
    assert (request.name or request.script) == "fourier"
    assert served.scans[0].header == HEADER


def test_any_header_version(served: Served) -> None:
    for version in ("<version>1</version>", "<version>99</version>", ""):
        header = HEADER.replace("<ismrmrdHeader>", "<ismrmrdHeader>" + version)
        assert counted(served.client().scan("fourier", header=header, messages=[data(2)])) == 2


def test_fire_parameters_override_name_and_settings(tmp_path: Path) -> None:
    parameters = {"config": "cg_sense", "customconfig": "", "iterations": "8", "denoise": True}
    text = codec.text(json.dumps({"version": "1.1.0", "parameters": parameters}) + "\0")
    with serving(tmp_path, timing=replace(QUICK, grace=PATIENCE)) as served:
        client = served.client(dialect="fire")
        # "openrecon" is no chain of ours: the text that follows names one, in a piece of its own
        assert counted(client.scan("openrecon", header=HEADER, messages=[text, data(2)])) == 2
        request = served.scans[0].request
    assert request.name == "cg_sense" and request.overrides == {"iterations": "8", "denoise": "True"}


def test_custom_config_wins(served: Served) -> None:
    parameters = {"config": "no such chain", "customconfig": "fourier"}
    served.client().scan("cg_sense", header=HEADER, parameters=parameters, messages=[data(2)])
    assert served.scans[0].request.name == "fourier"


def test_parameters_keep_a_script(served: Served) -> None:
    served.client().scan(script="cg_sense", header=HEADER, parameters={"iterations": "3"}, messages=[data(2)])
    request = served.scans[0].request
    assert request.script == "cg_sense" and request.overrides == {"iterations": "3"}


def test_other_texts_are_no_harm(served: Served) -> None:
    words = [codec.text("hello"), data(2), codec.text('{"parameters": {"config": "cg_sense"}}'), data(2)]
    assert counted(served.client().scan("fourier", header=HEADER, messages=words)) == 4
    assert served.scans[0].request.name == "fourier"


def test_query_first_and_alone(served: Served) -> None:
    answer = served.client().send((CAPTURES / "client_query.bin").read_bytes())
    [(correlation, text)] = answer.responses
    assert correlation == 0 and "recon-gadgets" in text and "python" in text and not answer.texts
    assert served.captures() == []


@pytest.mark.parametrize(
    ("key", "pattern"),
    [
        ("ismrmrd::version", r"\d+\.\d+"),
        ("gadgetron::version", "recon-gadgets"),
        ("gadgetron::build", "recon-gadgets"),
        ("gadgetron::info", "torch"),
        ("gadgetron::info::memory", r"^\d+$"),
        ("gadgetron::info::python", "^1$"),
        ("gadgetron::info::matlab", "^0$"),
        ("gadgetron::info::cuda", "^[01]$"),
        ("gadgetron::cuda::devices", r"^\d+$"),
        ("gadgetron::cuda::driver", "."),
        ("gadgetron::cuda::runtime", "."),
        ("gadgetron::cuda::memory", "."),
        ("gadgetron::cuda::capabilities", "."),
        ("recon::info", "torch"),
        ("recon::behind", "scanners go first"),
        ("recon::chains", "^" + "\n".join(CHAINS) + "$"),
        ("gadgetron::__class__", "^Unknown query$"),
        ("", "^Unknown query$"),
    ],
)
def test_queries(served: Served, key: str, pattern: str) -> None:
    [(_, text)] = served.client().scan(query=key).responses
    assert re.search(pattern, text)


def test_query_before_a_scan(served: Served) -> None:
    answer = served.client().scan("fourier", query="ismrmrd::version", header=HEADER, messages=[data(2)])
    assert counted(answer) == 2 and len(answer.responses) == 1


# -- CLOSE in any state --------------------------------------------------------------------------------------------------


def test_close_first(served: Served) -> None:
    answer = served.client().scan()
    assert not answer.texts and not answer.images and served.captures() == []


@pytest.mark.parametrize(("tail", "said"), [(b"", 0), (codec.config_file("fourier") + data(5), 1)], ids=["CLOSE", "a scan"])
def test_what_comes_behind_close_is_told(served: Served, tail: bytes, said: int) -> None:
    answer = served.client().scan("fourier", header=HEADER, messages=[data(5) + codec.close() + tail])
    assert counted(answer) == 5 and len(answer.texts) == said
    assert not said or re.match(rf"WRN ({len(tail)}|{len(tail) + 2}) bytes came behind CLOSE", answer.texts[0])


def test_close_before_the_header(served: Served) -> None:
    answer = served.client().scan("fourier")
    assert not errors(answer) and "nothing to reconstruct" in answer.texts[0]
    assert served.scans == [] and served.captures() == []


def test_close_after_the_header_reaches_the_scan(served: Served) -> None:
    assert counted(served.client().scan("fourier", header=HEADER)) == 0
    assert served.captures() == []


def test_a_connection_without_a_byte_is_not_an_event(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            socket.create_connection(("127.0.0.1", served.server.port)).close()
        still_works(served)
        served.ended()
    assert not [record for record in caplog.records if record.levelno > logging.INFO]
    assert caplog.text.count("event=closed") == 1, "only the scan is worth a line"


# -- the noise dependency ------------------------------------------------------------------------------------------------


def test_unknown_noise_is_answered_by_close_alone(served: Served) -> None:
    answer = served.client().send((CAPTURES / "client_noise_dependency.bin").read_bytes(), dependency=True)
    assert not answer.dependencies and served.captures() == []


def test_known_noise_is_answered_by_1019(served: Served) -> None:
    served.noise.put("66056_1_2_3", np.diag([4.0, 16.0]).astype(complex), 5e-6)
    answer = served.client().send((CAPTURES / "client_noise_dependency.bin").read_bytes(), dependency=True)
    [meta] = answer.dependencies
    assert "<name>mean_sigma</name><value>3</value>" in meta and "<name>channels</name><value>2</value>" in meta


@pytest.mark.parametrize(
    "script",
    [
        "<gadgetronStreamConfiguration><gadget><classname>NoiseSummaryGadget</classname></gadget>",  # not closed
        '<!DOCTYPE x [<!ENTITY a "b">]><gadgetronStreamConfiguration>NoiseSummaryGadget&a;</gadgetronStreamConfiguration>',
        "<gadgetronStreamConfiguration><writer><slot> 1019 </slot></writer></gadgetronStreamConfiguration>",
    ],
)
def test_nothing_but_close_goes_to_a_reader_of_1019(served: Served, script: str) -> None:
    answer = served.client().scan(script=script, dependency=True)
    assert not answer.dependencies
    # and not even when the peer goes on with what does not belong there
    served.client().scan(script=script, messages=[data()], dependency=True)
    # a header makes it a scan, whose sender waits for images and understands words
    [text] = errors(served.client().scan(script=script, header=HEADER, messages=[data()]))
    assert "ConfigRefused" in text and "noise query" in text


# -- what goes wrong -----------------------------------------------------------------------------------------------------


def test_unknown_chain_is_said_drained_and_closed(served: Served) -> None:
    answer = served.client().scan("grappa_magic", header=HEADER, messages=[data(200, 8, 256)] * 20)
    [text] = errors(answer)
    assert "UnknownChain" in text and "grappa_magic" in text and "cg_sense" in text
    assert served.scans == [], "never a substitute"
    [(_, info)] = served.captures()
    assert info["status"] == "failed" and info["readouts"] == 4000 and "UnknownChain" in info["note"]


def test_unknown_chain_is_said_before_any_data(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE) as client:
        client.sendall(codec.config_file("nobody") + codec.header(HEADER))
        assert b"UnknownChain" in client.recv(4096)
        client.sendall(codec.close())
        assert client.recv(2) == codec.close() and client.recv(1) == b""


def test_a_script_that_names_code_is_refused(served: Served) -> None:
    script = '<configuration><version>2</version><stream><external><execute name="os"/></external></stream></configuration>'
    answer = served.client().scan(script=script, header=HEADER, messages=[data()])
    assert "ConfigRefused" in errors(answer)[0] and served.scans == []


def test_a_header_that_is_none(served: Served) -> None:
    for header in ("no xml", "<!DOCTYPE a [<!ENTITY b 'c'>]><ismrmrdHeader>&b;</ismrmrdHeader>", "<other/>"):
        answer = served.client().scan("fourier", header=header, messages=[data()])
        assert "HeaderError" in errors(answer)[0]
    still_works(served)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (codec.header(HEADER) + codec.close(), "before any configuration"),
        (data() + codec.close(), "before any configuration"),
        (codec.config_file("fourier") + data() + codec.close(), "before the MRD header"),
        (codec.config_file("fourier") * 2 + codec.close(), "ConfigFile"),
        (codec.config_file("fourier") + codec.header(HEADER) * 2 + codec.close(), "HeaderText"),
        (codec.config_script("\0\0") + codec.header(HEADER) + data() + codec.close(), "no such chain"),
        (struct.pack("<H1024s", 1, b"\xff\xfe") + codec.header(HEADER) + codec.close(), "not UTF-8"),
        (struct.pack("<H", 1) + b"x" * 1024 + codec.header(HEADER) + codec.close(), "not closed"),
        (codec.config_file("fourier") + codec.header(HEADER) + codec.error("oh") + codec.close(), "reports an error"),
        (codec.config_file("fourier") + codec.header(HEADER) + streams.image() + codec.close(), "cannot be reconstructed"),
    ],
)
def test_wrong_order_and_wrong_texts(served: Served, stream: bytes, words: str) -> None:
    answer = served.client().send(stream)
    assert words in errors(answer)[0] and not answer.images
    still_works(served)


def test_a_name_that_is_not_utf8_costs_no_scan(served: Served, tmp_path: Path) -> None:
    named = HEADER.replace(
        "<encoding>", "<subjectInformation><patientName>Müller</patientName></subjectInformation><encoding>"
    )
    raw = tmp_path / "raw.h5"
    with h5py.File(raw, "w") as file:
        file["dataset/xml"] = np.array([named.encode("latin-1")], h5py.string_dtype("ascii"))
        file["dataset/data"] = np.zeros(1)
    for header in (named.encode("latin-1"), next(RawFile(raw, b"").pieces()).data[6:]):
        answer = served.client().send(codec.config_file("fourier") + codec.header(bytes(header)) + data(3) + codec.close())
        assert len(answer.images) == 1
        assert [
            text for text in answer.texts if text.startswith("WRN the MRD header is not UTF-8 and was read as windows-1252")
        ]
    for capture, _ in served.captures():
        (tmp_path / "capture.mrd").write_bytes(capture)
        assert read_identity(read_header_text(tmp_path / "capture.mrd")).patient["PatientName"] == "Müller"


def test_zfp_is_refused_by_name(served: Served) -> None:
    readout = bytearray(data(1, 2, 8))
    flags = struct.unpack_from("<Q", readout, 4)[0] | 1 << 52
    struct.pack_into("<Q", readout, 4, flags)
    packed = bytes(readout[:342]) + struct.pack("<I", 10) + b"z" * 10
    answer = served.client().scan("fourier", header=HEADER, messages=[packed] * 50)
    [text] = errors(answer)
    assert "ZFP" in text and not answer.images


@pytest.mark.parametrize("tail", [b"", b"rubbish" * 1000 + codec.close(), codec.close()])
def test_unknown_id_is_named_and_drained(served: Served, tail: bytes) -> None:
    stream = codec.config_file("fourier") + codec.header(HEADER) + data(2) + struct.pack("<H", 4711) + tail
    answer = served.client().send(stream)
    [text] = errors(answer)
    assert "4711" in text and not answer.images
    assert served.scans[0].abandoned
    [(stored, info)] = served.captures()
    assert stored == stream and info["status"] == "failed"


def test_unknown_id_and_a_client_that_only_waits(served: Served) -> None:
    """It has sent its CLOSE, which nobody can find, and waits for ours."""
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE) as client:
        client.sendall(codec.config_file("fourier") + struct.pack("<H", 999) + b"x" * 100 + codec.close())
        answer = b""
        while piece := client.recv(4096):
            answer += piece
    assert b"999" in answer and answer.endswith(codec.close())


def test_unknown_id_and_a_client_that_sends_on(tmp_path: Path) -> None:
    """A reset while it is still sending would cost it everything that the server said."""
    with serving(tmp_path, timing=Timing(linger=5.0)) as served:
        stream = codec.config_file("fourier") + struct.pack("<H", 999)
        answer = served.client().scan(messages=[stream, *[bytes(1 << 20)] * 30])
        assert "999" in errors(answer)[0]


def test_oversized_lengths_are_refused_before_anything_is_allocated(tmp_path: Path) -> None:
    limits = Limits(config_script=1000, header=5000, text=100, query=100, readout=10_000)
    huge = struct.pack("<HI", 3, 0xFFFFFFFF)
    with serving(tmp_path, limits=limits) as served:
        for stream in (
            struct.pack("<HI", 2, 0x7FFFFFFF),
            codec.config_file("fourier") + huge,
            codec.config_file("fourier") + codec.header(HEADER) + struct.pack("<HI", 5, 101),
            struct.pack("<HQQQ", 6, 0, 0, 1 << 63),
            codec.config_file("fourier") + codec.header(HEADER) + data(1, 8, 256),
        ):
            answer = served.client().send(stream + b"and more")
            assert "Oversized" in errors(answer)[0], stream[:40]
        still_works(served)


@pytest.mark.parametrize("cut", [1, 500, 1200, -1, -400, -2])
def test_client_vanishing_in_mid_message(served: Served, cut: int) -> None:
    whole = codec.config_file("fourier") + codec.header(HEADER) + data(3) + codec.close()
    answer = served.client().send(whole[:cut])
    [text] = errors(answer)
    assert "Disconnected" in text and not answer.images
    still_works(served)
    captures = served.captures()
    assert all(scan.abandoned for scan in served.scans[:-1])
    truncated = [stored for stored, info in captures if info["status"] == "truncated"]
    has_readouts = served.scans and len(served.scans) == 2
    assert truncated == ([whole[:cut]] if has_readouts else []), "kept when there are readouts in it"


def test_client_resetting_in_mid_message(served: Served) -> None:
    client = socket.create_connection(("127.0.0.1", served.server.port))
    client.sendall(codec.config_file("fourier") + codec.header(HEADER) + data(3) + data(1)[:500])
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
    still_works(served)


def test_slow_byte_by_byte_client(served: Served) -> None:
    whole = codec.config_file("fourier") + codec.header(HEADER) + data(1, 1, 2) + codec.close()
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for i in range(len(whole)):
            client.sendall(whole[i : i + 1])
        parser = FrameParser(role="client")
        found: list[Any] = []
        while piece := client.recv(4096):
            found += parser.feed(piece)
    assert [type(event).__name__ for event in found] == ["Image", "Close"]


# -- what goes wrong in the reconstruction -------------------------------------------------------------------------------


@dataclass
class FailingScan(CountingScan):
    def readouts(self, event: Readouts) -> None:
        super().readouts(event)
        if self.request.name == "fourier":
            raise DataError("channels changed", where="readout 7", got=3, expected=4)

    def finish(self) -> Iterator[bytes]:
        yield count_image(1)
        raise ValueError("DOE^JOHN")


def test_typed_errors_are_said_in_full(tmp_path: Path) -> None:
    with serving(tmp_path, FailingScan) as served:
        answer = served.client().scan("fourier", header=HEADER, messages=[data(4)] * 10)
        assert errors(answer) == ["ERROR DataError: readout 7: channels changed; got 3; expected 4\n"]
        assert served.scans[0].abandoned
        [(_, info)] = served.captures()
        assert info["status"] == "failed" and info["readouts"] == 40, "what came after the failure is kept, too"


def test_unexpected_errors_are_neutral_and_images_before_them_arrive(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG), serving(tmp_path, FailingScan) as served:
        answer = served.client().scan("cg_sense", header=HEADER, messages=[data(4)])
        assert len(answer.images) == 1
        [text] = errors(answer)
        assert "ValueError" in text and "DOE" not in text
        [(_, info)] = served.captures()
        assert "DOE" not in str(info)
    assert "event=crashed" in caplog.text and "test_server.py:" in caplog.text
    assert "DOE" not in caplog.text, "the words of an unexpected error may quote the header"


@dataclass
class SilentScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        yield from ()


@dataclass
class TalkingScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        self.say("WRN two\nlines")
        yield codec.text("INF nothing to show\n")


def test_no_image_is_said(tmp_path: Path) -> None:
    with serving(tmp_path / "a", SilentScan) as served:
        assert "no image" in served.client().scan("fourier", header=HEADER, messages=[data(4)]).texts[0]
    with serving(tmp_path / "b", TalkingScan) as served:
        texts = served.client().scan("fourier", header=HEADER, messages=[data(4)]).texts
        assert texts == ["WRN two lines\n", "INF nothing to show\n"]


def test_a_scan_that_cannot_open(tmp_path: Path) -> None:
    def refuse(*given: Any) -> Any:
        raise DataError("no such trajectory", where="header", got="spiral")

    with serving(tmp_path, refuse) as served:  # type: ignore[arg-type]
        answer = served.client().scan("fourier", header=HEADER, messages=[data(4)] * 3)
        assert "spiral" in errors(answer)[0]


def test_a_scan_over_the_spools_limit(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", min_free_bytes=0, max_scan_bytes=20_000)
    with serving(tmp_path, spool=spool) as served:
        answer = served.client().scan("fourier", header=HEADER, messages=[data(100, 4, 64)] * 10)
        [text] = errors(answer)
        assert "larger than allowed" in text and not answer.images
        still_works(served)


def test_spool_off_reconstructs_all_the_same(tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with serving(tmp_path, spool=Spool(None, temporary_directories=(temporary,))) as served:
        still_works(served)
        served.ended()
    assert list(temporary.iterdir()) == []


# -- several at once, and the end ----------------------------------------------------------------------------------------


def test_two_scans_at_once(served: Served) -> None:
    """Message by message in turn: each gets its own readouts back."""
    clients = [socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE) for _ in range(2)]
    for client in clients:
        client.sendall(codec.config_file("fourier") + codec.header(HEADER))
    for n in range(1, 4):
        clients[0].sendall(data(n))
        clients[1].sendall(data(10 * n))
    for client in reversed(clients):
        client.sendall(codec.close())
    found = []
    for client in clients:
        parser = FrameParser(role="client")
        images: list[Any] = []
        while piece := client.recv(1 << 16):
            images += [event for event in parser.feed(piece) if type(event).__name__ == "Image"]
        client.close()
        found.append([complex(image.data.flat[0]) for image in images])
    assert found == [[6], [60]]


def test_many_scans_at_once(served: Served) -> None:
    found: dict[int, complex] = {}

    def scan(n: int) -> None:
        found[n] = counted(served.client().scan("fourier", header=HEADER, messages=[data(n)] * 5))

    threads = [threading.Thread(target=scan, args=(n,)) for n in range(1, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: 5 * n for n in range(1, 13)}
    assert len({stored for stored, _ in served.captures()}) == 12


def test_a_busy_server_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, access=Access(quota=Quota(total=1))) as served:
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE) as first:
            first.sendall(codec.query("ismrmrd::version"))
            assert first.recv(1), "the first connection is being served"
            answer = served.client().scan("fourier", header=HEADER, messages=[data(10)])
            assert "busy" in errors(answer)[0] and not answer.images
            first.sendall(codec.close())
            while first.recv(4096):
                pass
        until(lambda: not served.server.n_connections)
        still_works(served)


def test_where_no_connection_is_left_every_place_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave = Place.leave

    def slowly(place: Place) -> None:
        time.sleep(0.2)
        leave(place)

    monkeypatch.setattr(Place, "leave", slowly)
    with serving(tmp_path) as served:
        still_works(served)
        until(lambda: not served.server.n_connections)
        assert not len(served.server._listener.places)


def test_a_silent_peer_is_given_up(tmp_path: Path) -> None:
    timing = Timing(handshake=0.1, idle=0.1, linger=1.0)
    with serving(tmp_path, timing=timing) as served:
        for start in (b"\x01", codec.config_file("fourier") + codec.header(HEADER) + data(1)[:100]):
            with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE) as client:
                client.sendall(start)
                answer = b""
                while piece := client.recv(4096):
                    answer += piece
                assert b"too long" in answer and answer.endswith(codec.close())


@dataclass
class LargeScan(CountingScan):
    def finish(self) -> Iterator[bytes]:
        for i in range(8):
            yield count_image(1, series=i, shape=(1024, 1024))


def test_a_peer_that_does_not_read_is_given_up(tmp_path: Path) -> None:
    timing = Timing(send=0.2, linger=0.2)
    with serving(tmp_path, LargeScan, timing=timing) as served:
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE) as client:
            client.sendall(codec.config_file("fourier") + codec.header(HEADER) + data(3) + codec.close())
            until(lambda: served.scans and served.scans[0].abandoned)
        [(_, info)] = served.captures()
        assert info["status"] == "failed" and "does not read" in info["note"]


def test_closing_the_server_ends_idle_connections_and_abandons_scans(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        idle = socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE)
        scanning = socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE)
        scanning.sendall(codec.config_file("fourier") + codec.header(HEADER) + data(3))
        until(lambda: served.scans and served.scans[0].n_readouts)
        served.server.close(timeout=0.1)
        assert idle.recv(100) == codec.close()
        answer = b""
        while piece := scanning.recv(4096):
            answer += piece
        assert b"stopping" in answer and answer.endswith(codec.close())
        assert served.scans[0].abandoned
        until(lambda: served.server.n_connections == 0)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", served.server.port))
        idle.close()
        scanning.close()


def test_listens_on_loopback_and_says_when_the_port_is_taken(served: Served) -> None:
    from gadgets.errors import WireError
    from gadgets.server import Server

    other = Server(port=served.server.port, open_scan=CountingScan, spool=Spool(None))
    assert other.host == "127.0.0.1"
    with pytest.raises(WireError, match="cannot listen"):
        other.start()
    assert QUICK.send > 0


def test_no_patient_data_in_any_log_line(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    header = HEADER.replace(
        "<ismrmrdHeader>",
        "<ismrmrdHeader><subjectInformation><patientName>DOE^JANE</patientName><patientID>4711-X</patientID>"
        "</subjectInformation>",
    )
    with caplog.at_level(logging.DEBUG):
        served.client().scan("fourier", header=header, messages=[data(3)])
        served.client().scan("fourier", header=header.replace("<x>8</x>", "<x>eight</x>"), messages=[data(3)])
        served.client().scan("fourier", header=header.replace("</encoding>", ""), messages=[data(3)])
        captures = served.captures()
    lines = [record.getMessage() for record in caplog.records]
    told = "\n".join([*lines, *(str(info) for _, info in captures)])
    assert "4711-X" not in told and "DOE" not in told
    assert "127.0.0.1" not in str([info for _, info in captures])
    assert len(captures) == 3 and all(line.startswith("event=") and "\n" not in line for line in lines)


def test_what_came_before_a_reset_is_kept(tmp_path: Path) -> None:
    """The reset is there before the first byte is read: the bytes are, too."""
    spool = Spool(tmp_path, min_free_bytes=0)
    sent = codec.config_file("fourier") + codec.header(HEADER) + data(20)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        client.sendall(sent)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        accepted, _ = listener.accept()
    handlers = Handlers(open_scan=CountingScan, check_config=check_config)
    Connection("c1", Peer(accepted, QUICK), "127.0.0.1", handlers, Limits(), spool).run()
    (capture,) = spool.captures()
    assert capture.read_bytes() == sent and capture_status(capture) == "truncated"
