"""TLS in front of a session: TLS 1.2 or newer outside, an ordinary socket inside.

MRD itself has no encryption. The protocol's own code needs a plain socket (kernel timeouts, half-closed connections, one thread that
reads while others send), so a thread per connection carries bytes between the network and a socket pair: the TLS state is
touched by that thread alone, and everything behind it stays as it is without TLS.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket
import ssl
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from recon_core.errors import ReconError

logger = logging.getLogger(__name__)

PIECE_BYTES = 64 << 10
"""Read at once, and held at most in each direction: a peer that does not read must not fill memory."""

HANDSHAKE_SECONDS = 10.0
"""From the first byte to the last; a peer that says nothing is closed then."""

SEND_SECONDS = 60.0
"""Without progress, a peer that does not take the rest of what was sent is given up when its session has ended."""


class TlsError(ReconError):
    """Certificates or keys that cannot be used, or a peer that does not speak TLS as it has to."""


@dataclass(frozen=True)
class ServerTls:
    """Files in PEM form. With ``client_ca`` only peers with a certificate of that authority get in."""

    certificate: str
    key: str | None = None
    client_ca: str | None = None

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer.

        Raises
        ------
        TlsError
            A file that is missing or is no certificate or key, or a key without a certificate.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        _settle(context, self.certificate, self.key)
        if self.client_ca is not None:
            with _usable_files(self.client_ca):
                context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


class RenewedContext:
    """The context of files that are renewed while the server runs: certificates end after months, servers do not.

    Raises
    ------
    TlsError
        Files that cannot be used when the server starts.
    """

    def __init__(self, tls: ServerTls) -> None:
        self.files = tls
        self._used = self._told = self._look()
        self._context = tls.context()

    def current(self) -> ssl.SSLContext:
        """For the next peer. Files that have changed are read again; as long as they cannot be used, those before them count."""
        now = self._look()
        if now == self._used:
            return self._context
        try:
            self._context = self.files.context()
        except TlsError as error:  # tried again for the next peer: a lack of file descriptors passes
            if now != self._told:
                logger.error("event=tls_not_renewed text=%r", str(error))
            self._told = now
        else:
            self._used = self._told = now
            logger.info("event=tls_renewed certificate=%r", self.files.certificate)
        return self._context

    def _look(self) -> tuple[tuple[int, int, int] | None, ...]:
        files = self.files.certificate, self.files.key, self.files.client_ca
        return tuple(_version(file) for file in files if file is not None)


@dataclass(frozen=True)
class ClientTls:
    """Files in PEM form. The server's certificate is always verified, by the system's authorities unless ``ca`` names another;
    ``certificate`` and ``key`` are our own, if it wants one. ``server_name`` is the name in its certificate where that is not
    the host's."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    server_name: str | None = None

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer, peer and name verified.

        Raises
        ------
        TlsError
            A file that is missing or is no certificate or key, or a key without a certificate.
        """
        with _usable_files(self.ca):
            context = ssl.create_default_context(cafile=self.ca)
        _settle(context, self.certificate, self.key)
        return context


def server_tls(certificate: Path | None, key: Path | None, client_ca: Path | None) -> ServerTls | None:
    """From the command line's options; ``None`` without a certificate.

    Raises
    ------
    TlsError
        A key or an authority without a certificate: the port would be open and unencrypted.
    """
    if certificate is not None:
        return ServerTls(str(certificate), _path(key), _path(client_ca))
    if key is not None or client_ca is not None:
        raise TlsError("no certificate", where="TLS", got="a key or an authority alone", expected="--tls-cert FILE")
    return None


def client_tls(
    wanted: bool, ca: Path | None, certificate: Path | None, key: Path | None, server_name: str | None
) -> ClientTls | None:
    """From the command line's options; ``None`` where none of them asks for TLS."""
    if not (wanted or ca or certificate or key or server_name):
        return None
    return ClientTls(_path(ca), _path(certificate), _path(key), server_name)


def _version(file: str) -> tuple[int, int, int] | None:
    """Another one when the file's content is, or who may read it; ``None`` where there is no such file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns


def _path(file: Path | None) -> str | None:
    return None if file is None else str(file)


def _settle(context: ssl.SSLContext, certificate: str | None, key: str | None) -> None:
    if key is not None and certificate is None:
        raise TlsError("a key, but no certificate", where=f"TLS {key}", expected="the PEM file of the key's certificate")
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION
    if certificate is not None:
        with _usable_files(certificate, key):
            # an encrypted key would make OpenSSL ask at the terminal
            context.load_cert_chain(certificate, key, password=lambda: "")


class _usable_files(contextlib.AbstractContextManager[None]):
    """Around what reads these files: an error names the one that cannot be read, or all of them."""

    def __init__(self, *files: str | None) -> None:
        self._files = [file for file in files if file is not None]

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):  # ssl.SSLError is one
            got = getattr(error, "reason", None) or error.strerror or type(error).__name__
            unreadable = [file for file in self._files if not os.access(file, os.R_OK)]
            where = f"TLS {', '.join(unreadable or self._files)}"
            raise TlsError("cannot use the TLS files", where=where, got=got, expected="PEM files, key unencrypted") from None


class TlsBridge:
    """One connection's TLS. ``handshake`` first, then ``run`` until both directions have ended.

    Parameters
    ----------
    outside
        The connected TCP socket; closed when the bridge ends.
    context
        Of `ServerTls` or `ClientTls`.
    server_name
        The name that the server's certificate must have; ``None`` on the server's side.
    send_seconds
        See ``SEND_SECONDS``.
    """

    def __init__(
        self,
        outside: socket.socket,
        context: ssl.SSLContext,
        *,
        server_name: str | None = None,
        send_seconds: float = SEND_SECONDS,
    ) -> None:
        self._outside, self._send_seconds = outside, send_seconds
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_name is None, server_hostname=server_name
        )
        self._inside: socket.socket | None = None
        self._to_network = bytearray()
        self._to_inside = bytearray()
        self._network_ended = False  # the peer will send no more
        self._inside_ended = False  # our own side will send no more
        self._said_end = False  # and the peer has been told
        self._inside_deaf = False  # our own side reads no more
        self._network_deaf = False  # nor does the peer; what it has sent counts all the same
        outside.setblocking(False)

    def handshake(self, seconds: float = HANDSHAKE_SECONDS) -> socket.socket:
        """Agree with the peer; returns the plain socket for the session's code (`run` must be running then).

        Raises
        ------
        TlsError
            The peer does not speak TLS, has no certificate that is accepted, or is silent. The connection is closed then.
        """
        until = time.monotonic() + seconds
        try:
            self._agree(until)
            self._inside, end = socket.socketpair()
        except BaseException:
            self.close()
            raise
        self._inside.setblocking(False)
        return end

    def start(self, name: str) -> threading.Thread:
        """`run` in a thread of its own."""
        thread = threading.Thread(target=self.run, name=name, daemon=True)
        thread.start()
        return thread

    def run(self) -> None:
        """Carry bytes until both directions have ended. Never raises."""
        try:
            if self._decrypt():
                self._end_inside()
            while not self._is_over():
                self._step()
        except TlsError as error:
            logger.warning("event=tls_broken reason=%r", str(error))
        except OSError as error:
            self._tell_broken(error)
        finally:
            self.close()

    def close(self) -> None:
        """Close both sockets."""
        self._outside.close()
        if self._inside is not None:
            self._inside.close()

    def abort(self) -> None:
        """From another thread: let `handshake` or `run` end now."""
        for end in (self._outside, self._inside):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    # -- handshake -------------------------------------------------------------------------------------------------------

    def _agree(self, until: float) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._flush(until)
                self._incoming.write(self._receive(until))
                continue
            except ssl.SSLError as error:
                with contextlib.suppress(TlsError, OSError):
                    self._flush(until)  # the alert that says why
                raise TlsError("no TLS with this peer", where="TLS handshake", got=error.reason or "refused") from None
            self._to_network += self._outgoing.read()  # the last of it: a peer may have sent all it has to say, and be gone
            return

    def _receive(self, until: float) -> bytes:
        self._wait(select.POLLIN, until)
        try:
            data = self._outside.recv(PIECE_BYTES)
        except OSError as error:
            raise TlsError("no TLS with this peer", where="TLS handshake", got=error.strerror) from None
        if not data:
            raise TlsError("the peer closed the connection", where="TLS handshake")
        return data

    def _flush(self, until: float) -> None:
        left = memoryview(self._outgoing.read())
        while left:
            self._wait(select.POLLOUT, until)
            try:
                left = left[self._outside.send(left) :]
            except OSError as error:
                raise TlsError("no TLS with this peer", where="TLS handshake", got=error.strerror) from None

    def _wait(self, what: int, until: float) -> None:
        poll = select.poll()
        poll.register(self._outside, what)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1e3):
            raise TlsError("the peer is silent", where="TLS handshake", remedy="Does it speak TLS?")

    # -- carrying --------------------------------------------------------------------------------------------------------

    def _is_over(self) -> bool:
        sent = self._said_end and not self._to_network
        heard = (self._network_ended and not self._to_inside) or self._inside_deaf
        return sent and heard

    def _step(self) -> None:
        """Wait until something can be read or written, and do that."""
        assert self._inside is not None
        poll = select.poll()
        outside = (select.POLLOUT if self._to_network else 0) | (
            0 if self._network_ended or self._to_inside else select.POLLIN
        )
        inside = (select.POLLOUT if self._to_inside else 0) | (
            0 if self._inside_ended or self._to_network else select.POLLIN
        )
        if outside:
            poll.register(self._outside, outside)
        if not (self._inside_ended and self._inside_deaf):  # else it would be "ready" for ever
            poll.register(self._inside, inside)
        # as long as the session is there it is the one that gives up a peer that does not read
        ready = dict(poll.poll(self._send_seconds * 1e3 if self._to_network and self._inside_ended else None))
        if not ready:
            raise TlsError("the peer does not read", where="TLS", got=f"nothing taken for {self._send_seconds:g} s")
        at_outside, at_inside = ready.get(self._outside.fileno(), 0), ready.get(self._inside.fileno(), 0)
        if at_inside & (select.POLLHUP | select.POLLERR):  # closed for good
            self._inside_deaf = True
            self._to_inside.clear()
            inside |= 0 if self._inside_ended else select.POLLIN
        if at_inside & select.POLLOUT:
            self._write_inside()
        if at_outside & select.POLLOUT:
            self._write_outside()
        # what is there counts even when the other end is gone
        if inside & select.POLLIN and at_inside & (select.POLLIN | select.POLLHUP):
            self._read_inside()
        if outside & select.POLLIN and at_outside & (select.POLLIN | select.POLLHUP | select.POLLERR):
            self._read_outside()
        said = self._outgoing.read()
        if not self._network_deaf:
            self._to_network += said

    def _read_outside(self) -> None:
        try:
            data = self._outside.recv(PIECE_BYTES)
        except BlockingIOError:
            return
        except OSError as error:
            self._tell_broken(error)
            data = b""
        if data:
            self._incoming.write(data)
        if self._decrypt() or not data:
            # the peer's end, said by TLS or not: the MRD session inside knows by its CLOSE whether it was whole
            self._end_inside()

    def _decrypt(self) -> bool:
        """Hand on all that has come; whether it ends with the peer's end. What came with the handshake's last bytes is there already."""
        try:
            while piece := self._tls.read(PIECE_BYTES):
                if not self._inside_deaf:
                    self._to_inside += piece
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLZeroReturnError:
            pass
        return True

    def _end_inside(self) -> None:
        self._network_ended = True
        if not self._to_inside:
            self._shut_inside()

    def _shut_inside(self) -> None:
        assert self._inside is not None
        with contextlib.suppress(OSError):
            self._inside.shutdown(socket.SHUT_WR)

    def _write_inside(self) -> None:
        assert self._inside is not None
        try:
            del self._to_inside[: self._inside.send(self._to_inside)]
        except BlockingIOError:
            return
        except OSError:  # it reads no more, but may have more to say
            self._inside_deaf = True
            self._to_inside.clear()
        if self._network_ended and not self._to_inside:
            self._shut_inside()

    def _read_inside(self) -> None:
        assert self._inside is not None
        try:
            data = self._inside.recv(PIECE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._tls.write(data)
            return
        self._inside_ended = self._said_end = True
        with contextlib.suppress(ssl.SSLError):  # it would also wait for the peer's own end
            self._tls.unwrap()

    def _write_outside(self) -> None:
        try:
            del self._to_network[: self._outside.send(self._to_network)]
        except BlockingIOError:
            return
        except OSError as error:
            self._tell_broken(error)
            self._network_deaf = True
            self._to_network.clear()

    @staticmethod
    def _tell_broken(error: OSError) -> None:
        reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
        logger.warning("event=tls_broken reason=%r", reason)


def connect_tls(connection: socket.socket, host: str, tls: ClientTls, seconds: float = HANDSHAKE_SECONDS) -> socket.socket:
    """TLS over a connected socket, as a client; returns the plain socket to speak through.

    Raises
    ------
    TlsError
        Files that cannot be used, or no agreement with the server. ``connection`` is closed then.
    """
    try:
        context = tls.context()
    except TlsError:
        connection.close()
        raise
    bridge = TlsBridge(connection, context, server_name=tls.server_name or host)
    end = bridge.handshake(seconds)
    bridge.start("tls-client")
    return end
