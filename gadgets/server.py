"""The TCP front: gives each connection that the listener lets in a thread. Loopback unless told otherwise: MRD has neither
encryption nor passwords.
"""

from __future__ import annotations

import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType

from gadgets.admission import Place
from gadgets.connection import Connection
from gadgets.handlers import ChainRequest, Handlers, OpenScan
from gadgets.listener import Access, Listener
from gadgets.noise_store import NoiseStore
from gadgets.peer import Peer, Timing
from gadgets.spool import Spool
from gadgets.wire.framing import Limits

logger = logging.getLogger(__name__)

DEFAULT_PORT = 9002
HURRY_SECONDS = 0.2  # between two looks at whether somebody is in a hurry


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
    access
        Who may connect, how, and how many at once; the next ones are told that the server is busy.
    check_config, noise_store, noise_request, chain_names
        See ``gadgets.connection.Handlers``.
    timing
        Waits of one connection.

    Raises
    ------
    SettingError
        The address is open to the network and nothing says who may connect, or a network that is none.
    TlsError
        Certificates that cannot be used.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        *,
        open_scan: OpenScan,
        spool: Spool,
        limits: Limits | None = None,
        access: Access | None = None,
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
        self.spool = spool
        self._listener = Listener(host, port, self._serve, access, send_seconds=self.timing.send)
        self._closing = False
        self._lock = threading.Lock()
        self._connections: dict[Connection, threading.Thread] = {}
        self._numbers = itertools.count(1)

    @property
    def port(self) -> int:
        """The port that is listened on."""
        return self._listener.port

    @property
    def n_connections(self) -> int:
        """Connections open now."""
        with self._lock:
            return len(self._connections)

    @property
    def is_listening(self) -> bool:
        """Whether connections are being accepted."""
        return self._listener.running

    def claim(self) -> None:
        """Take the address now, and refuse everybody until `start`.

        Raises
        ------
        WireError
            The address is taken or not this machine's.
        """
        self._listener.claim()

    def start(self) -> Server:
        """Listen; connections are accepted by a thread from now on.

        Raises
        ------
        WireError
            The address is taken or not this machine's.
        """
        self._listener.start()
        return self

    def close(self, timeout: float = 10.0, hurry: threading.Event | None = None) -> None:
        """Stop accepting; connections without a scan end at once, scans may take ``timeout`` s and are abandoned then.

        Somebody who does not want to wait for so long sets ``hurry``.
        """
        self._closing = True
        self._listener.stop()
        for connection in self._open():
            if not connection.busy:
                connection.stop()
        self._wait(time.monotonic() + timeout, hurry)
        for connection in self._open():
            logger.warning("event=abandoned connection=%s", connection.name)
            connection.stop()
        until = time.monotonic() + 2.0
        self._wait(until)
        self._listener.finish(until)

    def __enter__(self) -> Server:
        return self if self._listener.running else self.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _open(self) -> list[Connection]:
        with self._lock:
            return list(self._connections)

    def _wait(self, until: float, hurry: threading.Event | None = None) -> None:
        with self._lock:
            threads = list(self._connections.values())
        for thread in threads:
            while thread.is_alive() and not (hurry is not None and hurry.is_set()):
                left = until - time.monotonic()
                if left <= 0:
                    return
                thread.join(min(left, HURRY_SECONDS))

    def _serve(self, accepted: socket.socket, place: Place) -> None:
        name = f"c{next(self._numbers):05d}"
        try:
            if self._closing:
                raise OSError("the server is stopping")
            peer = Peer(accepted, self.timing)
            connection = Connection(name, peer, place.address, self.handlers, self.limits, self.spool, place.refusal)
            thread = threading.Thread(target=self._run, args=(connection, place), name=name, daemon=True)
            with self._lock:
                self._connections[connection] = thread
            thread.start()
        except (OSError, RuntimeError) as error:  # no file descriptors, no threads
            logger.error("event=dropped connection=%s error=%s", name, type(error).__name__)
            with self._lock:
                self._connections = {c: t for c, t in self._connections.items() if c.name != name}
            accepted.close()
            place.leave()

    def _run(self, connection: Connection, place: Place) -> None:
        try:
            connection.run()
        finally:
            place.leave()  # first: where no connection is counted any more, all places are free
            with self._lock:
                self._connections.pop(connection, None)
