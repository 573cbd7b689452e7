"""The TCP front: accepts connections and gives each one a thread. Loopback unless told otherwise: MRD has neither encryption
nor passwords.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from gadgets.connection import Connection
from gadgets.errors import WireError
from gadgets.handlers import ChainRequest, Handlers, OpenScan
from gadgets.noise_store import NoiseStore
from gadgets.peer import Peer, Timing
from gadgets.spool import Spool
from gadgets.wire.framing import Limits

logger = logging.getLogger(__name__)

DEFAULT_PORT = 9002
BACKLOG = 128
REFUSALS_AT_ONCE = 32


class Server:
    """Listens, and serves every connection in its own thread; a context manager.

    Parameters
    ----------
    host, port
        Where to listen; port 0 takes a free one (see ``port``).
    open_scan
        Makes the reconstruction of one scan (see ``gadgets.connection.Handlers``).
    spool
        Where raw data go.
    limits
        Sizes that a peer may ask for.
    max_connections
        Connections served at once. The next ones are told that the server is busy.
    check_config, noise_store, noise_request, chain_names
        See ``gadgets.connection.Handlers``.
    timing
        Waits of one connection.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        *,
        open_scan: OpenScan,
        spool: Spool,
        limits: Limits | None = None,
        max_connections: int = 32,
        check_config: Callable[[ChainRequest], object] | None = None,
        noise_store: NoiseStore | None = None,
        noise_request: Callable[[str], str | None] | None = None,
        chain_names: Callable[[], Iterable[str]] | None = None,
        timing: Timing | None = None,
    ) -> None:
        given = {"check_config": check_config, "noise_request": noise_request, "chain_names": chain_names}
        chosen = {name: handler for name, handler in given.items() if handler is not None}
        self.handlers = Handlers(open_scan=open_scan, noise_store=noise_store, **chosen)  # type: ignore[arg-type]
        self.host = host
        self.limits, self.timing = limits or Limits(), timing or Timing()
        self.max_connections = max_connections
        self.spool = spool
        self._port = port
        self._listener: socket.socket | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._acceptor: threading.Thread | None = None
        self._closing = False
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._numbers = itertools.count(1)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._port

    @property
    def n_connections(self) -> int:
        """Connections open now."""
        with self._lock:
            return len(self._connections)

    def start(self) -> Server:
        """Listen; connections are accepted by a thread from now on.

        Raises
        ------
        WireError
            The address is taken or not this machine's.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        try:
            self._listener = socket.create_server((self.host, self._port), family=family, backlog=BACKLOG)
        except OSError as error:
            place = f"{self.host}:{self._port}"
            raise WireError("cannot listen", where=place, got=error.strerror, remedy="Is another server running?") from error
        self._port = int(self._listener.getsockname()[1])
        self._listener.setblocking(False)
        self._wake = socket.socketpair()
        self._acceptor = threading.Thread(target=self._accept, name="accept", daemon=True)
        self._acceptor.start()
        logger.info("event=listening host=%s port=%d", self.host, self._port)
        if not _is_loopback(self.host):
            logger.warning("event=not_loopback host=%s note='MRD has neither encryption nor passwords'", self.host)
        return self

    def serve_forever(self) -> None:
        """``start``, and wait until ``close`` is called from elsewhere."""
        if self._acceptor is None:
            self.start()
        assert self._acceptor is not None
        self._acceptor.join()

    def close(self, timeout: float = 10.0) -> None:
        """Stop accepting; connections without a scan end at once, scans may take ``timeout`` s and are abandoned then."""
        self._closing = True
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake[1].send(b"x")
        if self._acceptor is not None and self._acceptor is not threading.current_thread():
            self._acceptor.join()
        for connection in self._open():
            if not connection.busy:
                connection.stop()
        self._wait(time.monotonic() + timeout)
        for connection in self._open():
            logger.warning("event=abandoned connection=%s", connection.name)
            connection.stop()
        self._wait(time.monotonic() + 2.0)
        for end in self._wake or ():
            end.close()
        self._wake = None

    def __enter__(self) -> Server:
        return self.start() if self._acceptor is None else self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> list[Connection]:
        with self._lock:
            return list(self._connections)

    def _wait(self, until: float) -> None:
        with self._lock:
            threads = list(self._connections.values())
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))

    def _accept(self) -> None:
        assert self._listener is not None and self._wake is not None
        with self._listener as listener:
            while not self._closing:
                select.select([listener, self._wake[0]], [], [])
                if self._closing:
                    break
                try:
                    accepted, address = listener.accept()
                except BlockingIOError:
                    continue  # the peer was gone before it was accepted
                except OSError as error:
                    logger.error("event=accept_failed error=%s", error.strerror)
                    time.sleep(0.1)  # out of file descriptors: the connections at work have to end first
                    continue
                self._serve(accepted, str(address[0]))

    def _serve(self, accepted: socket.socket, address: str) -> None:
        name = f"c{next(self._numbers):05d}"
        with self._lock:
            n = len(self._connections)
        if n >= self.max_connections + REFUSALS_AT_ONCE:
            logger.error("event=dropped connection=%s open=%d", name, n)
            accepted.close()
            return
        refusal = f"the server is busy with {n} connections" if n >= self.max_connections else None
        try:
            peer = Peer(accepted, self.timing)
            connection = Connection(name, peer, address, self.handlers, self.limits, self.spool, refusal)
            thread = threading.Thread(target=self._run, args=(connection,), name=name, daemon=True)
            with self._lock:
                self._connections[connection] = thread
            thread.start()
        except (OSError, RuntimeError) as error:  # no file descriptors, no threads
            logger.error("event=dropped connection=%s error=%s", name, type(error).__name__)
            with self._lock:
                self._connections = {c: t for c, t in self._connections.items() if c.name != name}
            accepted.close()

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._lock:
                self._connections.pop(connection, None)


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")
