"""Peers that stop in the middle of a message, or are gone when their images are made; and what they write into the log."""

import json
import logging
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from gadgets.wire import codec
from gadgets.wire.dtypes import ACQUISITION_HEADER
from tests.gadgets.serving import HEADER, QUICK, CountingScan, Served, data, serving
from tests.waiting import PATIENCE
from tests.wire import streams

START = codec.config_file("fourier") + codec.header(HEADER)
PATIENT = replace(QUICK, handshake=3600.0, idle=3600.0, stall=3600.0, stall_close=3600.0)


def answer_to(served: Served, sent: bytes) -> bytes:
    """Everything the server says to a client that sends, keeps its socket open and waits."""
    with socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE) as client:
        client.sendall(sent)
        answer = b""
        while piece := client.recv(4096):
            answer += piece
    return answer


def still_works(served: Served) -> None:
    assert len(served.client().scan("fourier", header=HEADER, messages=[data(3)]).images) == 1


def lying(field: str, value: int) -> bytes:
    """Five readouts of 2 channels and 8 samples whose headers say something else."""
    raw = bytearray(data(5))
    size = 2 + ACQUISITION_HEADER.itemsize + 2 * 8 * 8
    offset = 2 + ACQUISITION_HEADER.fields[field][1]
    for at in range(0, len(raw), size):
        raw[at + offset : at + offset + 2] = struct.pack("<H", value)
    return bytes(raw)


@pytest.mark.parametrize(
    "sent",
    [
        pytest.param(data(3) + data(1)[:-50], id="cut short"),
        pytest.param(data(3) + data(1)[:1], id="cut in the id"),
        pytest.param(lying("number_of_samples", 65535), id="65535 samples"),
        pytest.param(lying("active_channels", 3000), id="3000 channels"),
    ],
)
def test_a_readout_that_is_cut_short_before_close_is_reported_soon(tmp_path: Path, sent: bytes) -> None:
    """The CLOSE is taken for samples: nothing more comes, and the client waits for ever."""
    with serving(tmp_path, timing=replace(PATIENT, stall_close=0.1)) as served:
        answer = answer_to(served, START + sent + codec.close())
        assert b"ERROR" in answer and answer.endswith(codec.close())
        assert b"in the middle of" in answer or b"message id" in answer
        still_works(served)
        [info] = [info for _, info in served.captures() if info["status"] != "complete"]
        assert info["bytes"] == len(START + sent) + 2, "every byte is kept"


def test_the_rest_of_a_message_is_not_waited_for_as_long_as_the_next_message(tmp_path: Path) -> None:
    with serving(tmp_path, timing=replace(PATIENT, stall=0.1)) as served:
        answer = answer_to(served, START + data(3) + data(1)[:-50])
        assert b"too long" in answer and b"in the middle of" in answer and answer.endswith(codec.close())
        assert all(scan.abandoned for scan in served.scans)
        still_works(served)


def test_between_messages_a_scanner_may_pause(tmp_path: Path) -> None:
    with serving(tmp_path, timing=replace(PATIENT, stall=0.01, stall_close=0.01)) as served:
        with socket.create_connection(("127.0.0.1", served.server.port), timeout=0.3) as client:
            for part in (START, data(3), data(2)):
                client.sendall(part)
                with pytest.raises(TimeoutError):
                    client.recv(1)
            client.settimeout(PATIENCE)
            client.sendall(codec.close())
            answer = b""
            while piece := client.recv(4096):
                answer += piece
        assert b"ERROR" not in answer and served.scans[0].n_readouts == 5


def test_a_failed_scan_whose_message_never_ends_is_given_up_too(tmp_path: Path) -> None:
    with serving(tmp_path, timing=replace(PATIENT, stall=0.1)) as served:
        answer = answer_to(served, START + codec.config_file("fourier") + data(1)[:-50])
        assert answer.count(b"ERROR") == 1 and b"IllegalOrder" in answer and answer.endswith(codec.close())


@dataclass
class EndlessScan(CountingScan):
    """Computes until somebody stops it."""

    def finish(self) -> Iterator[bytes]:
        while True:
            self.say("DBG 1 %")
        yield b""


def test_images_of_a_client_that_is_gone_are_not_made(tmp_path: Path) -> None:
    with serving(tmp_path, EndlessScan) as served:
        client = socket.create_connection(("127.0.0.1", served.server.port), timeout=PATIENCE)
        client.sendall(START + data(3) + codec.close())
        assert client.recv(2) == b"\x05\x00"
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        [(_, info)] = served.captures()  # returns when the connection has ended
        assert served.scans[0].abandoned
        assert info["status"] == "failed" and info["readouts"] == 3


def test_a_spool_that_disappears_costs_no_scan_and_is_made_again(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        served.spool.rmdir()
        still_works(served)
        assert len(served.captures()) == 1


def test_a_spool_that_cannot_be_written_costs_no_scan_and_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path) as served:
        served.spool.rmdir()
        served.spool.write_text("in the way")
        answer = served.client().scan("fourier", header=HEADER, messages=[data(3)])
        assert len(answer.images) == 1
        assert answer.texts == ["WRN the raw data of this scan are not kept: the spool cannot take them\n"]
        bad = HEADER.replace("<x>8</x>", "<x>eight</x>")
        texts = served.client().scan("fourier", header=bad, messages=[data(3)]).texts
        assert texts[0].startswith("ERROR HeaderError") and "not kept" in texts[1]
        assert served.client().scan(query="ismrmrd::version").texts == []
    assert "event=spool_full" in caplog.text


FORGED = "x\nevent=forged level=INFO\r\x85\u2028\x1b[2J"


def test_no_peer_can_write_lines_into_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    parameters = json.dumps({"parameters": {FORGED: FORGED, "config": "fourier" + FORGED}}).encode()
    header = HEADER.replace("<x>8</x>", f"<x>8{FORGED[:-4]}</x>")  # XML has no escape character
    sessions = [
        codec.config_file(FORGED) + codec.header(HEADER) + data(3),
        codec.config_script(FORGED) + codec.header(HEADER) + data(3),
        codec.config_script(f"<configuration><{FORGED}") + codec.header(HEADER) + data(3),
        codec.config_file("fourier") + codec.header(header) + data(3),
        START + codec.text(parameters.decode()) + data(3),
        START + codec.text(FORGED) + data(3),
        START + codec.query(FORGED) + data(3),
        codec.query(FORGED) + codec.config_file(FORGED),
    ]
    with caplog.at_level(logging.DEBUG), serving(tmp_path) as served:
        for session in sessions:
            served.client(dialect="fire").send(session + codec.close())
        for raw in (streams.session(), b"\x08\x00" + struct.pack("<Q", 20) + FORGED.encode()[:20]):
            answer_to(served, START + raw + codec.close())
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) > 10 and all(line.startswith("event=") and line.isprintable() for line in lines)
