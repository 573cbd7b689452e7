"""What runs in the process that Gadgetron starts for ``<execute name="gadgets" target="(a chain)" type="python"/>``.

The process carries messages between Gadgetron and whoever reconstructs: a warm server, when one runs (nothing heavy is imported
here then, so a scan costs no start-up), else this process itself. Only the standard library is used: `recon install-gadgetron`
puts a copy of this file where Gadgetron's own Python finds it, which may know neither torch nor this package.

Answers are forwarded as whole messages. So when the reconstructing side dies in the middle of an image, Gadgetron still gets a
clean ERROR (8), everything it sends is read to its CLOSE, and CLOSE answers it. Leaving earlier crashes Gadgetron's process (measured
with 4.7.2); leaving without ERROR looks like success to the operator.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import logging
import os
import re
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

logger = logging.getLogger(__name__)

SERVER = "RECON_GADGETS_SERVER"
"""Environment variable: ``host:port`` of the warm server, or ``none`` to reconstruct in this process."""

DEFAULT_SERVER = "127.0.0.1:18002"
"""Not 9002: that is Gadgetron's own port."""

CHAIN_PROPERTY = "chain"
"""Names the chain in a node's configuration: ``<connect>`` has no ``target``, and Gadgetron does not send ``<execute>``'s."""

PRODUCT = "recon-gadgets"
CLOSE, QUERY, RESPONSE, ERROR, IMAGE = 4, 6, 7, 8, 1022
CLOSE_BYTES = struct.pack("<H", CLOSE)
PIXEL_BYTES = {1: 2, 5: 4, 7: 8}  # uint16, float32, complex64: what Gadgetron's ImageReader takes from a node
IMAGE_HEADER_BYTES, MAX_ATTRIBUTES, MAX_PIXELS, MAX_TEXT = 198, 1 << 20, 1 << 31, 1 << 20
PIECE_BYTES = 1 << 20
CONNECT_SECONDS, ANSWER_SECONDS = 1.0, 5.0
LINGER = 5.0  # s for Gadgetron to close behind our CLOSE
QUIET_AFTER_CLOSE, QUIET = 0.5, 3600.0  # s of silence that end a drain: behind the bytes of a CLOSE, and anywhere else

CHAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


ONLY_TLS = (
    "the server there speaks only TLS, which Gadgetron and this process do not. Open a plain port for them on loopback "
    "(docs/gadgetron.md, beside a server with TLS)"
)
"""Said of a server that cannot be used for this reason."""


class Failed(Exception):
    """The reconstructing side did not answer as it should; the words are for the operator."""


def target(name: str) -> Callable[[Any], None]:
    """The function that `python -m gadgetron` calls for ``target=name``: any chain's name, known or not.

    Raises
    ------
    AttributeError
        This is no such process, or the name is a module of this package.
    """
    main = sys.modules.get("__main__")
    started_by = getattr(getattr(main, "__spec__", None), "name", None)
    if started_by != "gadgetron.__main__" or not CHAIN_NAME.fullmatch(name) or importlib.util.find_spec(f"gadgets.{name}"):
        raise AttributeError(f"module 'gadgets' has no attribute {name!r}")
    # an unknown chain is reported by the one who knows them: raised here, it would look like a broken connection

    def handle(connection: Any) -> None:
        gadgetron = connection.socket.socket
        # the way out is ours; at its end the package would send another CLOSE
        connection.socket = _Left()
        run(gadgetron, name, connection.raw_bytes.config, connection.raw_bytes.header)

    return handle


class _Left:
    """Stands in for a connection that has ended."""

    def close(self) -> None:
        pass


def run(gadgetron: socket.socket, chain: str, config: bytes, header: bytes) -> None:
    """One scan from Gadgetron's first data message to the end of its connection. Never raises.

    Parameters
    ----------
    gadgetron
        The connection, behind CONFIG and HEADER. It is closed.
    chain
        Which chain.
    config, header
        The texts of the two messages.
    """
    text = with_chain(config.rstrip(b"\0").decode("utf-8", "replace"), chain).encode()
    start = b"".join(struct.pack("<HI", number, len(raw)) + raw for number, raw in ((2, text), (3, header)))
    relay = Relay(gadgetron)
    try:
        core = find_server() or in_this_process()
    except Failed as error:
        relay.refuse(str(error))
        return
    relay.run(core, start)


def with_chain(config: str, chain: str) -> str:
    """The node's ``<configuration>`` with the chain as a property: `<execute>`'s target is not part of what Gadgetron sends."""
    own = f'<property name="{CHAIN_PROPERTY}" value="{chain}"/>'
    found = re.search(r"<configuration\s*(/?)>", config)
    if found is None:
        return f"<configuration>{own}</configuration>"
    inside = own if not found[1] else own + "</configuration>"
    return config[: found.start()] + "<configuration>" + inside + config[found.end() :]


# -- who reconstructs ---------------------------------------------------------------------------------------------------------


def find_server(
    address: str | None = None, *, secure: Callable[[socket.socket, str], socket.socket] | None = None
) -> socket.socket | None:
    """A connection to the warm server, or ``None`` when there is none. Whatever else listens there gets no data.

    Parameters
    ----------
    address
        ``host:port``; by default the environment names it.
    secure
        Puts TLS over the connected socket, given the host's name; raises `Failed` where that cannot be.
    """
    address = (os.environ.get(SERVER, DEFAULT_SERVER) if address is None else address).strip()
    if address.lower() in ("", "none", "off"):
        return None
    host, _, port = address.rpartition(":")
    try:
        server = socket.create_connection((host or "127.0.0.1", int(port)), timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        logger.info("event=no_server address=%s reason=%r", address, getattr(error, "strerror", None) or str(error))
        return None
    try:
        server = server if secure is None else secure(server, host.strip("[]") or "127.0.0.1")
        server.settimeout(ANSWER_SECONDS)
        words = b"gadgetron::version"
        server.sendall(struct.pack("<HQQQ", QUERY, 0, 1, len(words)) + words)
        number, correlation, length = struct.unpack("<HQQ", exactly(server, 18))
        said = exactly(server, length).decode("utf-8", "replace") if length < 1000 else ""
        if (number, correlation) == (RESPONSE, 1) and said.startswith(PRODUCT):
            server.settimeout(None)
            return server
        logger.warning("event=other_server address=%s", address)
    except (OSError, Failed) as error:
        if secure is None and speaks_tls(address):
            text = f"{ONLY_TLS}; until then every scan is reconstructed in a process of its own, slowly"
            logger.warning("event=server_wants_tls address=%s text=%r", address, text)
        else:
            logger.warning("event=other_server address=%s reason=%s", address, type(error).__name__)
    server.close()
    return None


def speaks_tls(address: str) -> bool:
    """Whether a TLS server listens there, ours or another: for words, not for trust. No data is sent."""
    try:
        import ssl
    except ImportError:  # a Python that was built without
        return False
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host or "127.0.0.1", int(port)), timeout=CONNECT_SECONDS) as plain:
            plain.settimeout(ANSWER_SECONDS)
            context.wrap_socket(plain).close()
    except ssl.SSLError as error:
        return "ALERT" in str(error.reason)  # it wants a certificate of ours, or another version of TLS
    except (OSError, ValueError):
        return False
    return True


def answers(address: str) -> bool:
    """Whether our server answers there: for health checks."""
    server = find_server(address)
    if server is None:
        return False
    with server, contextlib.suppress(OSError):
        server.settimeout(ANSWER_SECONDS)
        server.sendall(CLOSE_BYTES)  # leaving without a word would be a warning in the server's log
        while server.recv(PIECE_BYTES):
            pass
    return True


def in_this_process() -> socket.socket:
    """A reconstruction in a thread of this process, at the other end of the socket that is returned.

    Raises
    ------
    Failed
        This Python cannot reconstruct.
    """
    for name, value in (("OMP_WAIT_POLICY", "PASSIVE"), ("OPENBLAS_NUM_THREADS", "1")):
        os.environ.setdefault(name, value)  # threads that wait must sleep: see gadgets.compute_local.WORKER_ENVIRONMENT
    try:
        # `from gadgets import node` would take it for a chain's name where there is no such module
        node = importlib.import_module("gadgets.node")
    except Exception as error:  # missing, or its libraries cannot be loaded (OSError), or do not fit each other
        address = os.environ.get(SERVER, DEFAULT_SERVER)
        alone = f"and this Python cannot reconstruct by itself ({error})"
        if speaks_tls(address):
            raise Failed(f"no reconstruction server can be used at {address}, {alone}: {ONLY_TLS}") from None
        raise Failed(
            f"no reconstruction server answers at {address}, {alone}. "
            f"Start one: recon serve --port {DEFAULT_SERVER.rpartition(':')[2]}"
        ) from None
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            node.serve(theirs)
        except Exception as error:
            logger.error("event=node_failed error=%s", type(error).__name__)
            theirs.close()

    threading.Thread(target=serve, name="node", daemon=True).start()
    return ours


def exactly(source: socket.socket, n: int) -> bytes:
    """The next ``n`` bytes.

    Raises
    ------
    Failed
        The stream ended before.
    """
    got = bytearray()
    while len(got) < n:
        piece = source.recv(min(n - len(got), PIECE_BYTES))
        if not piece:
            raise Failed("the reconstruction ended without an answer")
        got += piece
    return bytes(got)


# -- between the two ------------------------------------------------------------------------------------------------------------


class Relay:
    """Carries one scan to the reconstructing side and whole answers back.

    Parameters
    ----------
    gadgetron
        A connected socket; closed at the end.
    """

    def __init__(self, gadgetron: socket.socket, *, quiet: float = QUIET) -> None:
        self.gadgetron, self.quiet = gadgetron, quiet
        gadgetron.settimeout(None)
        self._draining = threading.Event()  # what still comes is read and dropped
        self._over = threading.Event()  # the answer is complete: what is left to read is up to Gadgetron

    def run(self, core: socket.socket, start: bytes) -> None:
        """``start`` and all that Gadgetron sends go to ``core``; its answers come back. Never raises."""
        upstream = threading.Thread(target=self._upstream, args=(core, start), name="upstream", daemon=True)
        upstream.start()
        failure: str | None = None
        try:
            self._answers(core)
        except Failed as error:
            failure = str(error)
        except OSError:
            failure = "the reconstruction broke off"
        except MemoryError:
            failure = "no memory for an image"
        if failure is not None:
            self._say(failure)
        with contextlib.suppress(OSError):
            core.shutdown(socket.SHUT_RDWR)
        if failure is not None:
            self._draining.set()
            upstream.join()
        self._leave()
        upstream.join()
        core.close()
        self.gadgetron.close()

    def refuse(self, words: str) -> None:
        """Say why there will be no images, and read to the end."""
        self._say(words)
        self._draining.set()
        self._upstream(None, b"")
        self._leave()
        self.gadgetron.close()

    def _answers(self, core: socket.socket) -> None:
        """Whole messages from ``core`` to Gadgetron, until CLOSE (which is not sent here)."""
        while True:
            number = struct.unpack("<H", exactly(core, 2))[0]
            if number == CLOSE:
                return
            if number == IMAGE:
                head = exactly(core, IMAGE_HEADER_BYTES + 8)
                (data_type,) = struct.unpack_from("<H", head, 2)
                x, y, z = struct.unpack_from("<3H", head, 16)
                (channels,) = struct.unpack_from("<H", head, 34)
                (attributes,) = struct.unpack_from("<Q", head, IMAGE_HEADER_BYTES)
                pixels = PIXEL_BYTES.get(data_type, 0) * x * y * z * channels
                if data_type not in PIXEL_BYTES or attributes > MAX_ATTRIBUTES or pixels > MAX_PIXELS:
                    raise Failed(f"an image that Gadgetron cannot take (data type {data_type}, {pixels} bytes)")
                body = head + exactly(core, attributes + pixels)
            elif number == ERROR:
                head = exactly(core, 8)
                (length,) = struct.unpack("<Q", head)
                if length > MAX_TEXT:
                    raise Failed("the reconstruction failed, with too many words")
                body = head + exactly(core, length)
            else:
                raise Failed(f"the reconstruction answered with message {number}, which Gadgetron does not understand")
            self._send(struct.pack("<H", number) + body)

    def _send(self, message: bytes) -> None:
        try:
            self.gadgetron.sendall(message)
        except OSError:
            # Gadgetron is gone: reading finds out too, and nobody is left to be told
            logger.warning("event=gadgetron_gone")

    def _say(self, words: str) -> None:
        logger.error("event=failed text=%r", words)
        raw = " ".join(words.split()).encode()[:MAX_TEXT]
        self._send(struct.pack("<HQ", ERROR, len(raw)) + raw)

    def _leave(self) -> None:
        self._over.set()
        self._send(CLOSE_BYTES)
        with contextlib.suppress(OSError):
            self.gadgetron.shutdown(socket.SHUT_WR)

    def _upstream(self, core: socket.socket | None, start: bytes) -> None:
        """Read Gadgetron to its end, or, once the answer is complete or lost, to its silence."""
        tail, silent_since = b"", time.monotonic()
        if core is None or not _forward(core, start):
            core = None
        while True:
            if not select.select([self.gadgetron], [], [], 0.1)[0]:
                patience = QUIET_AFTER_CLOSE if tail == CLOSE_BYTES else self.quiet
                patience = LINGER if self._over.is_set() else patience
                leaving = self._over.is_set() or self._draining.is_set()
                if leaving and time.monotonic() - silent_since > patience:
                    return
                continue
            try:
                data = self.gadgetron.recv(PIECE_BYTES)
            except OSError:
                data = b""
            if not data:
                break
            silent_since, tail = time.monotonic(), (tail + data[-2:])[-2:]
            if self._draining.is_set() or (core is not None and not _forward(core, data)):
                core = None
        if core is not None:
            with contextlib.suppress(OSError):
                core.shutdown(socket.SHUT_WR)


def _forward(core: socket.socket, data: bytes) -> bool:
    """Whether ``core`` took the data; that it ended is told by its answers."""
    try:
        core.sendall(data)
    except OSError:
        return False
    return True
