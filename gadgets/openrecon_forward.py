"""What runs inside an OpenRecon container: it carries scans to the reconstruction server, and answers when that cannot.

Consoles run containers with at most CUDA 11.8, so the GPU that reconstructs is elsewhere. Only the standard library is used: the
container needs nothing but Python, this file and the few that it imports.

    python -m gadgets.openrecon_forward --port 9002 --server gpu-server:9002 [--local]

* A scan is kept in an unnamed temporary file while it is carried. A server that breaks off before its first image gets the scan
  again, from the beginning, or another one does; reading from the scanner never waits for that.
* Answers are forwarded as whole messages, so the scanner never sees half an image.
* ``--local`` starts a server in the container (``recon serve --device cpu``) and turns to it when the other does not answer; the
  operator reads so.
* At the end there is always a word (TEXT) and CLOSE, and everything that the scanner sends is read.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO, Literal

from gadgets import relay
from gadgets.relay import CLOSE, CLOSE_BYTES, ERROR, IMAGE, IMAGE_HEADER_BYTES, QUERY, RESPONSE, Failed
from gadgets.tls import ClientTls, TlsError, connect_tls
from gadgets.wire.dialect import is_node_configuration

logger = logging.getLogger(__name__)

Secure = Callable[[socket.socket, str], socket.socket]
CONFIG_SCRIPT, TEXT, DEPENDENCY = 2, 5, 1019
QUERY_BYTES, ERROR_WORDS = 26, "ERROR "
HEAD_BYTES, FIRST_SECONDS = 1 << 16, 10.0  # looked at for who listens, and how long the first message may take
VALUE_BYTES = {1: 2, 2: 2, 3: 4, 4: 4, 5: 4, 6: 8, 7: 8, 8: 16}  # of a pixel, by the image header's data type
LOCAL_HOST, LOCAL_PORT = "127.0.0.1", 18002
MAX_SCAN_BYTES, MAX_SESSIONS = 40 << 30, 8
KEEPALIVE = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 1,
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 30,
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 10,
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 3,
}
ACCEPT_PAUSE = 0.1  # s after a connection could not be accepted
RETRY_SECONDS, PAUSE = 30.0, 1.0  # how long a server may be away, and how often it is asked
LOCAL_SECONDS = 300.0  # a server in the container may have been started just now


class Session:
    """One connection of the scanner.

    Parameters
    ----------
    scanner
        The accepted socket; closed at the end.
    servers
        Addresses (``host:port``) in the order of preference.
    retry_seconds
        How long to go on asking when no server answers.
    max_bytes
        Largest scan.
    secure
        TLS to the first server (`gadgets.relay.find_server`).
    """

    def __init__(
        self,
        scanner: socket.socket,
        servers: Sequence[str],
        *,
        retry_seconds: float = RETRY_SECONDS,
        max_bytes: int = MAX_SCAN_BYTES,
        secure: Secure | None = None,
    ) -> None:
        self.scanner, self.servers, self.secure = scanner, servers, secure
        self.retry_seconds, self.max_bytes = retry_seconds, max_bytes
        self.n_images = 0
        self.failure: str | None = None  # of the scan itself: no server could help
        self._file: IO[bytes] = tempfile.TemporaryFile(prefix="recon-forward-")  # noqa: SIM115 - lives as long as the session
        self._size, self._ended = 0, False
        self._news = threading.Condition()
        self._last, self._tail = time.monotonic(), b""
        self._head = b""  # the beginning of what came

    def run(self) -> None:
        """Serve the connection to its end. Never raises."""
        self.scanner.settimeout(None)
        reader = threading.Thread(target=self._read, name="scanner", daemon=True)
        reader.start()
        complete = False
        try:
            complete = self._answer()
        except Exception as error:  # whatever it is, the scanner gets its CLOSE
            logger.error("event=crashed error=%s", type(error).__name__)
            self._say(f"ERROR the forwarding failed ({type(error).__name__})")
        if not complete:
            self._wait_for_close()
        self._send(CLOSE_BYTES)
        with contextlib.suppress(OSError):
            self.scanner.shutdown(socket.SHUT_WR)
        reader.join(relay.LINGER)
        with contextlib.suppress(OSError):
            self.scanner.shutdown(socket.SHUT_RD)
        reader.join()
        self.scanner.close()
        self._file.close()

    # -- from the scanner ------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        while True:
            try:
                data = self.scanner.recv(relay.PIECE_BYTES)
            except OSError:
                data = b""
            with self._news:
                self._last, self._tail = time.monotonic(), (self._tail + data[-2:])[-2:]
                if not data:
                    self._ended = True
                elif self.failure is None:
                    self._keep(data)
                self._news.notify_all()
            if not data:
                return

    def _keep(self, data: bytes) -> None:
        if len(self._head) < HEAD_BYTES:
            self._head = (self._head + data)[:HEAD_BYTES]
        if self._size + len(data) > self.max_bytes:
            self.failure = f"the scan is larger than {self.max_bytes >> 20} MiB"
            return
        try:
            self._file.write(data)
            self._file.flush()
            self._size += len(data)
        except OSError as error:
            self.failure = f"the scan cannot be kept ({error.strerror})"

    def _wait_for_close(self) -> None:
        """Until the scanner's CLOSE, or nothing came for long."""
        with self._news:
            while not self._ended:
                silent = time.monotonic() - self._last
                patience = relay.QUIET_AFTER_CLOSE if self._tail == CLOSE_BYTES else relay.QUIET
                if silent > patience:
                    return
                self._news.wait(min(0.1, patience))

    # -- to the server and back ---------------------------------------------------------------------------------------------------

    def _answer(self) -> bool:
        """Whether a server answered to the end; if not, the scanner was told why."""
        until: float | None = None
        reason = "no reconstruction server answers"
        while True:
            for number, address in enumerate(self.servers):
                if self._gone():
                    return False  # nobody to answer
                core = relay.find_server(address, secure=None if number else self.secure)
                if core is None:
                    continue
                if number:
                    self._say(
                        "WRN the reconstruction server does not answer: this scan is reconstructed in the container, without GPU"
                    )
                try:
                    self._carry(core)
                    return True
                except (Failed, OSError) as error:
                    reason = str(error) if isinstance(error, Failed) else "the connection to the reconstruction server broke"
                finally:
                    with contextlib.suppress(OSError):
                        core.shutdown(socket.SHUT_RDWR)
                    core.close()
                if self.failure is not None or self.n_images:
                    break
                logger.warning("event=repeated reason=%r", reason)
                self._say(f"WRN {reason}; the scan is sent again")
            if until is None:
                until = time.monotonic() + self.retry_seconds
                self._say("DBG waiting for the reconstruction server")
            if self.failure is not None or self.n_images or time.monotonic() >= until:
                break
            with self._news:
                self._news.wait_for(lambda: self.failure is not None, PAUSE)
        after = f"; {self.n_images} images came before" if self.n_images else ""
        logger.error("event=failed reason=%r images=%d", self.failure or reason, self.n_images)
        self._say(f"ERROR {self.failure or reason}{after}. Repeat the reconstruction, or ask who runs the server")
        return False

    def _gone(self) -> bool:
        """Whether the scanner left without its CLOSE."""
        with self._news:
            return self._ended and self._tail != CLOSE_BYTES

    def _carry(self, core: socket.socket) -> None:
        """The scan from its beginning to one server, and its whole answers back, up to its CLOSE.

        Raises
        ------
        Failed, OSError
            The server broke off.
        """
        if core.family != socket.AF_UNIX:  # the inner end of a TLS connection
            for option, value in KEEPALIVE.items():  # a host that is switched off sends no end of stream
                core.setsockopt(*option, value)
        over = threading.Event()
        pump = threading.Thread(target=self._pump, args=(core, over), name="pump", daemon=True)
        pump.start()
        try:
            self._answers(core)
        finally:
            over.set()
            with self._news:
                self._news.notify_all()
            with contextlib.suppress(OSError):
                core.shutdown(socket.SHUT_RDWR)
            pump.join()

    def _pump(self, core: socket.socket, over: threading.Event) -> None:
        position = 0
        while True:
            with self._news:
                while not over.is_set() and self._size == position and not self._ended and self.failure is None:
                    self._news.wait(1.0)
                size, ended = self._size, self._ended
            if over.is_set() or self.failure is not None:
                break
            if size == position and ended:
                with contextlib.suppress(OSError):
                    core.shutdown(socket.SHUT_WR)
                return
            data = os.pread(self._file.fileno(), min(relay.PIECE_BYTES, size - position), position)
            try:
                core.sendall(data)
            except OSError:
                return  # its answers tell
            position += len(data)
        if self.failure is not None:
            with contextlib.suppress(OSError):
                core.shutdown(socket.SHUT_RDWR)

    def _answers(self, core: socket.socket) -> None:
        while True:
            head = relay.exactly(core, 2)
            number = struct.unpack("<H", head)[0]
            if number == CLOSE:
                return
            if number == IMAGE:
                fixed = relay.exactly(core, IMAGE_HEADER_BYTES + 8)
                (kind,) = struct.unpack_from("<H", fixed, 2)
                x, y, z = struct.unpack_from("<3H", fixed, 16)
                (channels,) = struct.unpack_from("<H", fixed, 34)
                (length,) = struct.unpack_from("<Q", fixed, IMAGE_HEADER_BYTES)
                limit, size = relay.MAX_ATTRIBUTES, VALUE_BYTES.get(kind, 0) * x * y * z * channels
                if kind not in VALUE_BYTES or size > relay.MAX_PIXELS:
                    raise Failed(f"the server sent an image that cannot be carried (data type {kind}, {size} bytes)")
            elif number == TEXT:
                fixed, limit, size = relay.exactly(core, 4), relay.MAX_TEXT, 0
                (length,) = struct.unpack("<I", fixed)
            elif number in (RESPONSE, DEPENDENCY) or (number == ERROR and self._listener() == "node"):
                fixed, limit, size = relay.exactly(core, 16 if number == RESPONSE else 8), relay.MAX_TEXT, 0
                (length,) = struct.unpack("<Q", fixed[-8:])
            else:
                raise Failed(f"the server answered with message {number}, which no scanner understands")
            if length > limit:
                raise Failed(f"the server answered with message {number} of {length} bytes")
            self._send(head + fixed + relay.exactly(core, length + size))
            self.n_images += number == IMAGE

    def _listener(self) -> Literal["scanner", "node", "noise query"] | None:
        """Who listens, by the configuration behind any queries; ``None`` as long as too little has come to tell.

        Gadgetron, whose node this is then, understands images and ERROR (8) and crashes at texts; a noise query expects nothing but
        its answer.
        """
        head = self._head
        while len(head) >= QUERY_BYTES and head[:2] == struct.pack("<H", QUERY):
            head = head[QUERY_BYTES + struct.unpack_from("<Q", head, QUERY_BYTES - 8)[0] :]
        if len(head) < 6:
            return "scanner" if self._ended else None
        number, length = struct.unpack_from("<HI", head)
        if number != CONFIG_SCRIPT:
            return None if number == QUERY and not self._ended else "scanner"
        script = head[6 : 6 + length]
        if len(script) < length and len(self._head) < HEAD_BYTES and not self._ended:
            return None
        if b"NoiseSummaryGadget" in script:
            return "noise query"
        return "node" if is_node_configuration(script.rstrip(b"\0").decode("utf-8", "replace")) else "scanner"

    def _say(self, line: str) -> None:
        with self._news:
            self._news.wait_for(lambda: self._listener() is not None, FIRST_SECONDS)
            listener = self._listener()
        if listener == "scanner":
            raw = line.encode() + b"\n\0"  # consoles end their texts with NUL; others print up to it
            self._send(struct.pack("<HI", TEXT, len(raw)) + raw)
        elif listener == "node" and line.startswith(ERROR_WORDS):
            raw = line.removeprefix(ERROR_WORDS).encode()
            self._send(struct.pack("<HQ", ERROR, len(raw)) + raw)

    def _send(self, message: bytes) -> None:
        try:
            self.scanner.sendall(message)
        except OSError:
            logger.warning("event=scanner_gone")


class Forwarder:
    """The container's listening socket; a context manager.

    Parameters
    ----------
    host, port
        Where scanners connect; port 0 takes a free one.
    servers
        As `Session`.
    """

    def __init__(
        self,
        host: str,
        port: int,
        servers: Sequence[str],
        *,
        retry_seconds: float = RETRY_SECONDS,
        secure: Secure | None = None,
    ) -> None:
        self.servers, self.retry_seconds, self.secure = tuple(servers), retry_seconds, secure
        self._listening = socket.create_server((host, port), backlog=MAX_SESSIONS)
        self.port: int = self._listening.getsockname()[1]
        self._free = threading.BoundedSemaphore(MAX_SESSIONS)
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name="accept", daemon=True)

    def __enter__(self) -> Forwarder:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()

    def _accept(self) -> None:
        """Until the end: without this the console finds nobody until somebody restarts the container."""
        while not self._closing:
            self._free.acquire()
            try:
                scanner, _ = self._listening.accept()
                with contextlib.suppress(OSError):
                    scanner.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(scanner,), name="session", daemon=True).start()
            except (OSError, RuntimeError) as error:  # no file descriptors, no threads: sessions that end give some back
                self._free.release()
                if not self._closing:
                    logger.error("event=accept_failed error=%s", getattr(error, "strerror", None) or type(error).__name__)
                    time.sleep(ACCEPT_PAUSE)

    def _serve(self, scanner: socket.socket) -> None:
        try:
            Session(scanner, self.servers, retry_seconds=self.retry_seconds, secure=self.secure).run()
        except OSError as error:  # no room for its temporary file
            logger.error("event=session_failed error=%s", error.strerror)
            scanner.close()
        finally:
            self._free.release()


def start_local(port: int) -> subprocess.Popen[bytes]:
    """A server in this container, on its CPU."""
    serve = ["serve", "--host", LOCAL_HOST, "--port", str(port), "--device", "cpu", "--no-keep-raw"]
    return subprocess.Popen([sys.executable, "-m", "gadgets.cli", *serve], stdin=subprocess.DEVNULL, stdout=sys.stderr)


def tls_client(ca: str, certificate: str | None, key: str | None) -> Secure:
    """TLS to a server whose certificate is verified; ours goes with it if it wants one."""
    options = ClientTls(ca, certificate, key)

    def secure(connected: socket.socket, host: str) -> socket.socket:
        try:
            return connect_tls(connected, host, options)
        except TlsError as error:
            raise Failed(str(error)) from None

    return secure


def parser() -> argparse.ArgumentParser:
    """What the container's command takes."""
    made = argparse.ArgumentParser(description="Carries scans to a reconstruction server.")
    made.add_argument("--host", default="0.0.0.0", help="address to listen on: the container's own network")
    made.add_argument("--port", type=int, default=9002)
    made.add_argument("--server", default=os.environ.get(relay.SERVER, ""), help="host:port of the reconstruction server")
    made.add_argument("--local", action="store_true", help="reconstruct in the container when the server does not answer")
    made.add_argument("--local-port", type=int, default=LOCAL_PORT, help="its port inside the container")
    made.add_argument("--tls-ca", help="authority (PEM) of the server's certificate: speak TLS to it")
    made.add_argument("--tls-cert", help="our own certificate (PEM), where the server wants one")
    made.add_argument("--tls-key", help="its key")
    return made


def log_to_stderr() -> None:
    """As the server's log (`gadgets.log_lines`, which is not in the container): times are UTC."""
    line = logging.Formatter("%(asctime)s.%(msecs)03dZ level=%(levelname)s logger=%(name)s %(message)s", "%Y-%m-%d %H:%M:%S")
    line.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(line)
    logging.basicConfig(level="INFO", handlers=[handler])


def main(arguments: Sequence[str] | None = None) -> None:
    """Until SIGTERM or SIGINT."""
    chosen = parser().parse_args(arguments)
    local_server = f"{LOCAL_HOST}:{chosen.local_port}" if chosen.local else ""
    servers = [address for address in (chosen.server.strip(), local_server) if address]
    if not servers:
        parser().error("neither --server nor --local: nobody would reconstruct")
    log_to_stderr()
    secure = tls_client(chosen.tls_ca, chosen.tls_cert, chosen.tls_key) if chosen.tls_ca else None
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    local = start_local(chosen.local_port) if chosen.local else None
    try:
        patience = LOCAL_SECONDS if chosen.local else RETRY_SECONDS
        with Forwarder(chosen.host, chosen.port, servers, retry_seconds=patience, secure=secure) as forwarder:
            print(f"listening on {chosen.host}:{forwarder.port}", flush=True)
            stop.wait()
    finally:
        if local is not None:
            local.terminate()
            local.wait()


if __name__ == "__main__":
    main()
