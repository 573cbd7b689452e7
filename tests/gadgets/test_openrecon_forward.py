"""The forwarder of an OpenRecon container: what the scanner gets is whole and ends with CLOSE, whatever happens behind it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from gadgets import openrecon_forward, relay
from gadgets.chain import config_directory
from gadgets.listener import Access
from gadgets.manifest import manifest
from gadgets.openrecon_forward import Forwarder, Session, main, tls_client
from gadgets.openrecon_image import Package, PackageOptions, write_context
from gadgets.relay import answers
from gadgets.service import Service, ServiceOptions
from gadgets.tls import ServerTls
from gadgets.wire import codec
from gadgets.wire.events import Image
from gadgets.wire.framing import FrameParser
from tests.e2e.scans import in_memory
from tests.gadgetron_stand_in import connected
from tests.gadgetron_stand_in import session as asked_by_gadgetron
from tests.gadgets.certificates import authority
from tests.gadgets.serving import HEADER, count_image, data, serving
from tests.ports import free_ports
from tests.strict_client import StrictClient
from tests.waiting import PATIENCE, until


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever listens is slow on a busy machine, and so is the scanner; all the others close."""
    monkeypatch.setattr(relay, "CONNECT_SECONDS", PATIENCE)
    monkeypatch.setattr(relay, "ANSWER_SECONDS", PATIENCE)
    monkeypatch.setattr(openrecon_forward, "FIRST_SECONDS", PATIENCE)


QUERY_BYTES = 26 + len("gadgetron::version")
CLOSE = struct.pack("<H", 4)


@contextmanager
def forwarding(*servers: str, retry_seconds: float = 0.3) -> Iterator[StrictClient]:
    with Forwarder("127.0.0.1", 0, servers, retry_seconds=retry_seconds) as forwarder:
        yield StrictClient("127.0.0.1", forwarder.port, timeout=PATIENCE, dialect="fire")


class Stub:
    """A server that answers the version query, then does ``behave(connection)``; counts connections."""

    def __init__(self, behave: Callable[[socket.socket], None], version: str = "recon-gadgets 0", port: int = 0) -> None:
        self.behave, self.version, self.n = behave, version, 0
        self.listening = socket.create_server(("127.0.0.1", port))
        self.address = f"127.0.0.1:{self.listening.getsockname()[1]}"
        self.thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Stub:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.listening.shutdown(socket.SHUT_RDWR)
        self.listening.close()
        self.thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.listening.accept()
            except OSError:
                return
            self.n += 1
            with connection:
                connection.settimeout(PATIENCE)
                got = b""
                while len(got) < QUERY_BYTES and (piece := connection.recv(QUERY_BYTES - len(got))):
                    got += piece
                if len(got) == QUERY_BYTES:
                    connection.sendall(codec.response(1, self.version))
                    self.behave(connection)


def until_close(connection: socket.socket) -> bytes:
    got = b""
    while not got.endswith(CLOSE) and (piece := connection.recv(1 << 16)):
        got += piece
    return got


def answering(*messages: bytes) -> Callable[[socket.socket], None]:
    """Sends these after the scan's CLOSE, and leaves."""

    def behave(connection: socket.socket) -> None:
        until_close(connection)
        connection.sendall(b"".join(messages))

    return behave


def nobody() -> str:
    """An address where nobody answers."""
    return f"127.0.0.1:{free_ports(1)[0]}"


def warnings(texts: list[str]) -> list[str]:
    return [text for text in texts if text.startswith("WRN")]


@pytest.mark.parametrize("dialect", ["fire", "gadgetron"])
def test_a_scan_is_answered_as_by_the_server_itself(tmp_path: Path, dialect: str) -> None:
    with serving(tmp_path) as served, forwarding(f"127.0.0.1:{served.server.port}") as client:
        client.nul = dialect == "fire"
        direct = served.client(dialect=dialect).scan("fourier", header=HEADER, messages=[data(5), data(7)])
        carried = client.scan("fourier", header=HEADER, messages=[data(5), data(7)])
    assert [i.data.real.max() for i in carried.images] == [i.data.real.max() for i in direct.images] == [12.0]
    assert carried.texts == direct.texts


def test_through_tls_to_a_server_that_wants_our_certificate(tmp_path: Path) -> None:
    """And a server whose certificate is not of this authority gets no data."""
    ours, theirs = authority(tmp_path / "ours"), authority(tmp_path / "theirs", "stranger")
    access = Access(tls=ServerTls(*ours.issue("server"), client_ca=ours.certificate), handshake_seconds=PATIENCE)
    with serving(tmp_path, access=access) as served:
        for certificates, words in ((ours, ""), (theirs, "ERROR no reconstruction server answers")):
            secure = tls_client(certificates.certificate, *ours.issue("container"))
            address = f"127.0.0.1:{served.server.port}"
            with Forwarder("127.0.0.1", 0, [address], retry_seconds=0.3, secure=secure) as forwarder:
                client = StrictClient("127.0.0.1", forwarder.port, timeout=PATIENCE, dialect="fire")
                answer = client.scan("fourier", header=HEADER, messages=[data(5), data(7)])
            assert [i.data.real.max() for i in answer.images] == ([] if words else [12.0])
            assert (answer.texts[-1] if words else "").startswith(words)
        assert len(served.scans) == 1


def test_queries_and_noise_dependencies_pass(tmp_path: Path) -> None:
    with serving(tmp_path) as served, forwarding(f"127.0.0.1:{served.server.port}") as client:
        answer = client.scan(query="recon::chains")
        assert answer.responses[0][1].split() == ["fourier", "cg_sense"]
        assert client.scan("no_such_chain", header=HEADER).texts[0].startswith("ERROR UnknownChain")


def test_console_parameters_pass(tmp_path: Path) -> None:
    with serving(tmp_path) as served, forwarding(f"127.0.0.1:{served.server.port}") as client:
        client.scan("whatever", header=HEADER, messages=[data(3)], parameters={"config": "fourier", "virtualCoils": "6"})
        assert dict(served.scans[-1].request.overrides) == {"virtualCoils": "6"}


class Unlucky:
    """A listening socket whose next connection cannot be accepted."""

    def __init__(self, listening: socket.socket) -> None:
        self.listening, self.failures = listening, 1

    def accept(self) -> tuple[socket.socket, object]:
        if self.failures:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self.listening.accept()

    def __getattr__(self, name: str) -> object:
        return getattr(self.listening, name)


def test_a_connection_that_cannot_be_accepted_is_not_the_last_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path) as served:
        forwarder = Forwarder("127.0.0.1", 0, [f"127.0.0.1:{served.server.port}"], retry_seconds=0.3)
        forwarder._listening = Unlucky(forwarder._listening)  # type: ignore[assignment]
        with forwarder:
            client = StrictClient("127.0.0.1", forwarder.port, timeout=5.0, dialect="fire")
            assert len(client.scan("fourier", header=HEADER, messages=[data(3)]).images) == 1
    assert "event=accept_failed" in caplog.text


def test_nobody_answers() -> None:
    with forwarding(nobody()) as client:
        answer = client.scan("fourier", header=HEADER, messages=[data(50) for _ in range(40)])
    assert not answer.images
    assert len(answer.texts) == 2 and answer.texts[0].startswith("DBG waiting")
    assert answer.texts[1].startswith("ERROR no reconstruction server answers")


def test_a_server_that_comes_late_gets_the_whole_scan(tmp_path: Path) -> None:
    """The scanner has sent everything before anybody listens."""
    [port] = free_ports(1)
    ours, theirs = socket.socketpair()
    with ours:
        ours.sendall(codec.config_file("fourier") + codec.header(HEADER) + data(9) + CLOSE)
        running = threading.Thread(target=Session(theirs, [f"127.0.0.1:{port}"], retry_seconds=PATIENCE).run)
        running.start()
        stub = Stub(answering(count_image(9), CLOSE), port=port)
        with stub:
            ours.settimeout(PATIENCE)
            got = until_close(ours)
            ours.shutdown(socket.SHUT_WR)
            running.join(PATIENCE)
    (image,) = [event for event in FrameParser(role="client").feed(got) if isinstance(event, Image)]
    assert image.data.flat[0] == 9 and not running.is_alive()


def test_a_server_that_dies_before_its_first_image_is_replaced(tmp_path: Path) -> None:
    def die(connection: socket.socket) -> None:
        connection.recv(100)
        connection.sendall(codec.text("DBG 10 %\n"))

    with (
        Stub(die) as dying,
        serving(tmp_path) as served,
        forwarding(dying.address, f"127.0.0.1:{served.server.port}") as client,
    ):
        answer = client.scan("fourier", header=HEADER, messages=[data(5)])
    assert [image.data.real.max() for image in answer.images] == [5.0]
    assert any("the scan is sent again" in text for text in warnings(answer.texts))
    assert any("without GPU" in text for text in warnings(answer.texts))
    assert not [text for text in answer.texts if text.startswith("ERROR")]


@pytest.mark.parametrize("cut", [0, 1, 300])
def test_a_server_that_dies_after_an_image_is_reported_and_nothing_comes_twice(cut: int) -> None:
    """``cut`` bytes of a second image are on the way: the scanner must not see half of it."""
    partial = count_image(2, series=1, shape=(64, 64))[:cut]
    with (
        Stub(answering(count_image(1), partial)) as dying,
        forwarding(dying.address, retry_seconds=5.0) as client,
    ):
        answer = client.scan("fourier", header=HEADER, messages=[data(5)])
        assert dying.n == 1
    assert len(answer.images) == 1
    assert "1 images came before" in answer.texts[-1] and answer.texts[-1].startswith("ERROR")


@pytest.mark.parametrize(
    "nonsense",
    [
        struct.pack("<H", 8) + struct.pack("<Q", 3) + b"no!",
        struct.pack("<H", 77),
        struct.pack("<HI", 5, 1 << 30),
        struct.pack("<HQ", 1019, 1 << 40),
        struct.pack("<H", 1022) + b"\xff" * 206,
    ],
    ids=["ERROR", "unknown", "a long text", "a long answer", "an absurd image"],
)
def test_a_server_that_answers_nonsense_is_not_passed_on(nonsense: bytes) -> None:
    with Stub(answering(nonsense)) as broken, forwarding(broken.address) as client:
        answer = client.scan("fourier", header=HEADER, messages=[data(5)])
    assert not answer.images and answer.texts[-1].startswith("ERROR the server")


def test_whoever_else_listens_there_gets_no_patient_data() -> None:
    received = []
    with (
        Stub(lambda c: received.append(c.recv(100)), version="another program 1.0") as other,
        forwarding(other.address) as client,
    ):
        answer = client.scan("fourier", header=HEADER, messages=[data(5)])
    assert answer.texts[-1].startswith("ERROR no reconstruction server answers")
    assert not any(received)


def test_on_a_noise_query_nothing_but_close_is_said() -> None:
    script = "<gadgetronStreamConfiguration><gadget><classname>NoiseSummaryGadget</classname></gadget></gadgetronStreamConfiguration>"
    with forwarding(nobody()) as client:
        assert client.scan(script=script, dependency=True).dependencies == []


def node_scan(chain: str, *before: bytes) -> bytes:
    """What Gadgetron sends to a node of its own."""
    text = f'<configuration><property name="chain" value="{chain}"/></configuration>'
    return b"".join(before) + codec.config_script(text) + codec.header(HEADER) + data(7) + CLOSE


@pytest.mark.parametrize("before", [(), (codec.query("gadgetron::version", 1),)], ids=["connect", "execute"])
def test_gadgetron_hears_errors_as_it_understands_them(tmp_path: Path, before: tuple[bytes, ...]) -> None:
    """A TEXT would end its process: with and without a server the way out is ERROR and CLOSE."""
    with Forwarder("127.0.0.1", 0, [nobody()], retry_seconds=0.3) as forwarder:
        alone = asked_by_gadgetron(connected(forwarder.port), node_scan("fourier", *before))
    with serving(tmp_path) as served, Forwarder("127.0.0.1", 0, [f"127.0.0.1:{served.server.port}"]) as forwarder:
        refused = asked_by_gadgetron(connected(forwarder.port), node_scan("no_such_chain"))
    assert not alone.images and alone.errors[0].startswith("no reconstruction server answers")
    assert not refused.images and refused.errors[0].startswith("UnknownChain") and len(refused.errors) == 1


def test_words_wait_until_it_is_clear_who_listens() -> None:
    """A noise query in pieces: the first bytes do not tell that no text may be sent."""
    script = codec.config_script(
        "<gadgetronStreamConfiguration>" + " " * 3000 + "NoiseSummaryGadget</gadgetronStreamConfiguration>"
    )
    scanner, thread = session(nobody())
    with scanner:
        for piece in (script[:1], script[1:100], script[100:-5], script[-5:] + CLOSE):
            scanner.sendall(piece)
            time.sleep(0.1)  # the forwarder may already have something to say
        assert until_close(scanner) == CLOSE
        scanner.shutdown(socket.SHUT_WR)
        thread.join(PATIENCE)


def session(server: str, **options: int) -> tuple[socket.socket, threading.Thread]:
    ours, theirs = socket.socketpair()
    ours.settimeout(PATIENCE)
    thread = threading.Thread(target=Session(theirs, [server], retry_seconds=0.2, **options).run, daemon=True)
    thread.start()
    return ours, thread


def test_a_scan_that_is_too_large_is_refused_and_read_to_its_end(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        scanner, thread = session(f"127.0.0.1:{served.server.port}", max_bytes=20_000)
        scanner.sendall(codec.config_file("fourier") + codec.header(HEADER))
        for _ in range(50):
            scanner.sendall(data(20))
        scanner.sendall(CLOSE)
        got = until_close(scanner)
        scanner.close()
        thread.join(PATIENCE)
    assert b"ERROR the scan is larger than" in got and not thread.is_alive()


def test_a_scanner_that_vanishes_leaves_nothing_behind(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        scanner, thread = session(f"127.0.0.1:{served.server.port}")
        scanner.sendall(codec.config_file("fourier") + codec.header(HEADER) + data(5)[:-7])
        scanner.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        scanner.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
    until(lambda: not [t for t in threading.enumerate() if t.name in ("scanner", "pump")])  # nor of the tests before


def test_nothing_stays_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scan is patient data: its file has no name."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    seen: list[list[str]] = []

    def look(connection: socket.socket) -> None:
        until_close(connection)
        seen.append(os.listdir(tmp_path / "kept"))
        connection.sendall(CLOSE)

    with Stub(look) as stub, forwarding(stub.address) as client:
        client.scan("fourier", header=HEADER, messages=[data(5)])
    assert seen == [[]] and not os.listdir(tmp_path / "kept")


def test_the_command_needs_somebody_who_reconstructs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RECON_GADGETS_SERVER", raising=False)
    with pytest.raises(SystemExit):
        main(["--port", "0"])
    assert "nobody would reconstruct" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_container_reconstructs_by_itself_when_no_server_answers(tmp_path: Path) -> None:
    """What is copied into a ``--cpu`` image, started by its command: its own server makes the images of the site's; SIGTERM ends both."""
    configs, built, local = tmp_path / "configs", tmp_path / "built", nobody().rpartition(":")[2]
    configs.mkdir()
    for name in ("cg_sense", "fourier"):
        shutil.copy(config_directory() / f"{name}.xml", configs)
    write_context(Package(manifest("cg_sense"), PackageOptions("cpu", server=nobody(), configs=configs)), built)
    dockerfile = (built / "context" / "Dockerfile").read_text()
    python, *command = json.loads(dockerfile.split("CMD ")[1])
    assert python == "python"
    environment = {
        **os.environ,
        "PYTHONPATH": str(built / "context" / "app"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XDG_STATE_HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
    }
    here = ["--host", "127.0.0.1", "--port", "0", "--local-port", local]
    scan = in_memory("cine", matrix_x=32, matrix_y=32, coils=4, states=2, slices=2, calibration="separate", acs=16)
    parameters = {"config": "cg_sense", "virtualCoils": "3"}
    with subprocess.Popen(
        [sys.executable, *command, *here], stdout=subprocess.PIPE, text=True, env=environment, cwd=built
    ) as process:
        assert process.stdout is not None
        try:
            port = int(process.stdout.readline().rpartition(":")[2])
            until = time.monotonic() + 400.0
            while not answers(f"127.0.0.1:{local}"):  # importing torch takes long on a busy machine
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.2)
            scanner = StrictClient("127.0.0.1", port, dialect="fire", timeout=PATIENCE)
            made = scanner.scan("openrecon", header=scan.header, messages=scan.messages, parameters=parameters)
            unknown = scanner.scan("no_such_chain", header=HEADER)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(120.0) == 0
    assert "without GPU" in made.texts[0] and not [text for text in made.texts if text.startswith("ERROR")]
    with Service(
        ServiceOptions(port=0, device="cpu", rehearse=False)
    ) as site:  # as many threads: sums depend on their number
        client = StrictClient(site.host, site.port, dialect="fire", timeout=PATIENCE)
        expected = client.scan("openrecon", header=scan.header, messages=scan.messages, parameters=parameters)
    assert len(made.images) == len(expected.images) == 4
    for one, other in zip(made.images, expected.images, strict=True):
        assert one.header.tobytes() == other.header.tobytes() and one.attributes == other.attributes
        np.testing.assert_array_equal(one.data, other.data)
    # the chains are those of the image, not of this checkout
    assert unknown.texts[1].startswith("ERROR UnknownChain: ")
    assert "fourier" in unknown.texts[1] and "llr" not in unknown.texts[1]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", int(local)), timeout=1.0)
