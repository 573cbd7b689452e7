"""The listening socket: takes connections, turns away who may not connect, and hands the others on. Nothing that a peer does or
leaves undone keeps the next one from being taken.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from gadgets.admission import AllowList, Place, Places, Quota, is_loopback, require_guarded
from gadgets.errors import WireError
from gadgets.tls import HANDSHAKE_SECONDS, SEND_SECONDS, RenewedContext, ServerTls, TlsBridge, TlsError

logger = logging.getLogger(__name__)

BACKLOG = 128
REPEAT_SECONDS = 60.0
"""A peer that is turned away again and again is one line of the log in this time."""

BROKEN = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK)
"""What accepting says when the listening socket itself is no more; all else passes."""

KEEP_ALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 8}
"""s of silence after which the kernel asks whether the peer is still there, s between questions, and questions in vain. A scanner whose
power was cut says nothing and would hold its place for as long as a paused one may; and firewalls forget connections that are silent."""

REMEDIES = {
    errno.EADDRINUSE: "Is another server running?",
    errno.EACCES: "Ports below 1024 need a privilege: choose another one",
}
"""Where the server cannot listen; in all other cases the address is none of this machine."""

AGAIN_SECONDS, AGAIN_SECONDS_AT_MOST = 1.0, 60.0
"""Pause before a socket that broke is opened again; twice as long after each try in vain."""

Serve = Callable[[socket.socket, Place], None]


@dataclass(frozen=True)
class Access:
    """Who may connect, and how.

    ``allow`` are networks (`AllowList`); a server that does not listen on loopback needs them, or ``allow_any``. With ``tls`` the
    port speaks TLS only.
    """

    allow: tuple[str, ...] = ()
    allow_any: bool = False
    quota: Quota = field(default_factory=Quota)
    tls: ServerTls | None = None
    handshake_seconds: float = HANDSHAKE_SECONDS  # longest wait for a peer's TLS handshake


class Listener:
    """Accepts on one address.

    Parameters
    ----------
    host, port
        Where to listen; port 0 takes a free one (see ``port``).
    serve
        Called with each connection that is let in and its place (`Place.leave` is the callee's duty, also if it raises); from
        the accepting thread, or, with TLS, from the connection's own, once the peer is known. Must not wait.
    access
        Who may connect, and how.
    send_seconds
        Longest wait for a peer that takes nothing.

    Raises
    ------
    SettingError
        The address is open to the network, and nothing says who may connect.
    TlsError
        Certificates that cannot be used.
    """

    def __init__(
        self,
        host: str,
        port: int,
        serve: Serve,
        access: Access | None = None,
        *,
        send_seconds: float = SEND_SECONDS,
    ) -> None:
        access = access or Access()
        self.host, self.port = host, port
        self.allow = AllowList(access.allow)
        require_guarded(host, self.allow, allow_any=access.allow_any)
        self.places = Places(access.quota)
        self._serve = serve
        self._tls = None if access.tls is None else RenewedContext(access.tls)
        self._handshake_seconds, self._send_seconds = access.handshake_seconds, send_seconds
        self._socket: socket.socket | None = None
        self._wake: tuple[socket.socket, socket.socket] | None = None
        self._thread: threading.Thread | None = None
        self._closing = False
        self._broken = False
        self._lock = threading.Lock()
        self._bridges: dict[threading.Thread, TlsBridge] = {}
        self._told: dict[tuple[str, str], float] = {}

    @property
    def running(self) -> bool:
        """Whether connections are accepted: false before `start`, after `stop`, and while there is no socket to accept on."""
        return self._thread is not None and self._thread.is_alive() and not (self._closing or self._broken)

    def claim(self) -> None:
        """Take the address and let nobody in yet: peers are refused until `start`. So a taken one is known before anything is begun.

        Raises
        ------
        WireError
            The address is taken or not this machine's.
        """
        if self._socket is None:
            with self._errors():
                self._socket = _bound(self.host, self.port)
            self.port = int(self._socket.getsockname()[1])

    def start(self) -> None:
        """Listen; a thread accepts from now on.

        Raises
        ------
        WireError
            The address is taken or not this machine's.
        """
        self._open()
        self._wake = socket.socketpair()
        self._thread = threading.Thread(target=self._accept, name="accept", daemon=True)
        self._thread.start()
        logger.info(
            "event=listening host=%s port=%d tls=%s allow=%s",
            self.host,
            self.port,
            "off" if self._tls is None else "on" if self._tls.files.client_ca is None else "with-certificates",
            ",".join(map(str, self.allow.networks)) or "any",
        )
        if not is_loopback(self.host) and self._tls is None:
            logger.warning("event=not_encrypted host=%s note='what is sent can be read on the way'", self.host)

    def _open(self) -> None:
        self.claim()
        assert self._socket is not None
        try:
            with self._errors():
                self._socket.listen(BACKLOG)
        except WireError:  # another process that had claimed it as well was faster
            self._let_go()
            raise
        self._socket.setblocking(False)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (OSError, OverflowError, UnicodeError) as error:
            got = getattr(error, "strerror", None) or type(error).__name__
            place = f"{self.host}:{self.port}"
            remedy = REMEDIES.get(getattr(error, "errno", None) or 0, "Name an address of this machine: --host")
            raise WireError("cannot listen", where=place, got=got, remedy=remedy) from error

    def _let_go(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def stop(self) -> None:
        """Accept no more. Connections that were handed on go on."""
        self._closing = True
        if self._wake is not None:
            with contextlib.suppress(OSError):
                self._wake[1].send(b"x")
        if self._thread is None:
            self._let_go()
        elif self._thread is not threading.current_thread():
            self._thread.join()
        for end in self._wake or ():
            end.close()
        self._wake = None

    def finish(self, until: float) -> None:
        """After `stop`: wait until what was handed to TLS has gone out, at the latest at ``until`` (monotonic)."""
        with self._lock:
            bridges = dict(self._bridges)
        for thread in bridges:
            thread.join(max(0.0, until - time.monotonic()))
        for thread, bridge in bridges.items():
            if thread.is_alive():
                bridge.abort()

    # -- accepting -------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        while not self._closing:
            try:
                self._accept_all()
            except Exception as error:  # the socket itself is broken; `running` and the monitor tell
                logger.critical("event=listening_ended error=%s text=%r", type(error).__name__, str(error))
                self._broken = True  # only now: who sees that it does not run finds the reason in the log
                self._listen_again()

    def _listen_again(self) -> None:
        """On the same port, as soon as that can be had."""
        assert self._wake is not None
        pause = AGAIN_SECONDS
        while self._broken and not self._closing:
            select.select([self._wake[0]], [], [], pause)
            if self._closing:
                return
            try:
                self._let_go()
                self._open()
            except WireError as error:
                logger.error("event=not_listening text=%r", str(error))
                pause = min(2 * pause, AGAIN_SECONDS_AT_MOST)
            else:
                self._broken = False
                logger.warning("event=listening_again host=%s port=%d", self.host, self.port)

    def _accept_all(self) -> None:
        assert self._socket is not None and self._wake is not None
        with self._socket as listening:
            while not self._closing:
                select.select([listening, self._wake[0]], [], [])
                if self._closing:
                    break
                try:
                    accepted, address = listening.accept()
                except BlockingIOError:
                    continue  # the peer was gone before it was accepted
                except OSError as error:
                    if error.errno in BROKEN:
                        raise
                    logger.error("event=accept_failed error=%s", error.strerror)
                    time.sleep(0.1)  # out of file descriptors: the connections at work have to end first
                    continue
                keep_alive(accepted)
                self._take(accepted, str(address[0]))

    def _take(self, accepted: socket.socket, address: str) -> None:
        if not self.allow.allows(address):
            self._tell("peer_refused", address, "its address is in none of the allowed networks")
            accepted.close()
            return
        place = self.places.take(address)
        if place is None:
            self._tell("dropped", address, "too many connections")
            accepted.close()
            return
        try:
            if self._tls is None:
                self._serve(accepted, place)
            else:
                self._secure(accepted, place, self._tls.current())
        except Exception as error:  # no file descriptors, no threads; whatever it is, it ends this connection only
            logger.error("event=dropped error=%s", type(error).__name__)
            accepted.close()
            place.leave()

    def _secure(self, accepted: socket.socket, place: Place, context: ssl.SSLContext) -> None:
        """The handshake, the hand-over and all the carrying, in a thread of this connection."""
        bridge = TlsBridge(accepted, context, send_seconds=self._send_seconds)

        def run() -> None:
            try:
                end = bridge.handshake(self._handshake_seconds)
            except (TlsError, OSError) as error:
                place.leave()
                got = error.got or error.what if isinstance(error, TlsError) else type(error).__name__
                self._tell("tls_refused", place.address, str(got))
            else:
                with contextlib.suppress(OSError, RuntimeError):  # no threads: the connection just ends
                    self._serve(end, place)
                bridge.run()
            finally:
                with self._lock:
                    self._bridges.pop(threading.current_thread(), None)

        thread = threading.Thread(target=run, name="tls", daemon=True)
        with self._lock:
            self._bridges[thread] = bridge
        try:
            thread.start()
        except RuntimeError:
            with self._lock:
                self._bridges.pop(thread, None)
            raise

    def _tell(self, event: str, address: str, reason: str) -> None:
        """A line for the administrator, who needs the address; not one for each try."""
        now, key = time.monotonic(), (event, address)
        with self._lock:
            if len(self._told) > 1000:
                self._told = {k: t for k, t in self._told.items() if now - t < REPEAT_SECONDS}
            known = now - self._told.get(key, -REPEAT_SECONDS) < REPEAT_SECONDS or len(self._told) > 1000
            if not known:
                self._told[key] = now
        logger.log(logging.DEBUG if known else logging.WARNING, "event=%s address=%s reason=%r", event, address, reason)


def keep_alive(connection: socket.socket) -> None:
    """Let the kernel look after a connection on which nobody says anything; as far as the system can."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEP_ALIVE.items():
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        # connections of a server that has just ended do not keep its successor from the port; one that listens does
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((host, port))
    except BaseException:
        made.close()
        raise
    return made
