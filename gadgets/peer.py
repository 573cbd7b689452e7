"""One socket, as the protocol needs it: bounded waits, whole messages out, and an end that loses nothing.

Real clients lose their images when a server closes before it has read everything (the kernel then resets the connection),
and abort without a CLOSE. So every end is: CLOSE, no more sending, read on until the peer closes too.
"""

from __future__ import annotations

import collections
import contextlib
import socket
import struct
import threading
import time
from dataclasses import dataclass

from gadgets.errors import Disconnected

CLOSE_BYTES = b"\x04\x00"
PIECE_BYTES = 1 << 20  # one read: still in the processor's cache when it is written to the log
BUFFER_BYTES = 4 * PIECE_BYTES  # what is framed at once when data wait: framing costs by the call, not by the byte

_free_buffers: collections.deque[bytearray] = collections.deque(maxlen=4)
"""Buffers of connections that have ended, for the next ones: fresh memory for each would cost page faults, and a connection that
is still referenced by a traceback would hold 4 MiB until the garbage collector comes by."""


@dataclass(frozen=True)
class Timing:
    """How long one connection waits, in s."""

    handshake: float = 120.0  # for the next byte until the MRD header is there
    idle: float = 3600.0  # for the next message during a scan: breath-holds, table moves, a paused sequence
    stall: float = 30.0  # for the rest of a message: scanners pause between messages, never inside one
    stall_close: float = 1.5  # the same behind the bytes of a CLOSE: the header announced more samples than came
    send: float = 60.0  # for a peer that does not take what is sent to it
    grace: float = 0.5  # after the header, before an unknown chain name is reported: FIRE's JSON text may still name another
    quiet_close: float = 0.3  # framing lost: silence after the bytes of a CLOSE
    drain: float = 2.0  # framing lost: any silence
    linger: float = 5.0  # after our CLOSE, for the peer to close
    drain_bytes: int = 64 * 10**9  # framing lost: most bytes that are read on


class Peer:
    """The other end of one accepted connection. One thread reads; any thread may send."""

    def __init__(self, connection: socket.socket, timing: Timing) -> None:
        self.socket = connection
        self.timing = timing
        self.gone = False  # sending is no longer possible
        try:
            self._memory = _free_buffers.pop()
        except IndexError:
            self._memory = bytearray(BUFFER_BYTES)
        self._buffer = memoryview(self._memory)
        self._lock = threading.Lock()
        self._receive_timeout = -1.0
        self._stopped = False
        connection.setblocking(True)
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # the kernel's own timeouts: those of Python would cost a second system call for every read
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(timing.send))

    def receive(self, timeout: float) -> memoryview | None:
        """The next bytes (until the next call); empty at the end of the stream, ``None`` after ``timeout`` s of silence.

        Raises
        ------
        Disconnected
            The connection was reset.
        """
        if timeout != self._receive_timeout:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(timeout))
            self._receive_timeout = timeout
        return self._read(0, 0)

    def receive_more(self, held: int) -> memoryview | None:
        """What has arrived meanwhile, behind the first ``held`` bytes of the buffer; ``None`` when nothing has, or it is full.

        The end of the stream is not reported here but by the next ``receive``.
        """
        return self._read(held, socket.MSG_DONTWAIT) or None if held < len(self._buffer) else None

    def received(self, held: int) -> memoryview:
        """The first ``held`` bytes of the buffer: everything since the last ``receive``."""
        return self._buffer[:held]

    def _read(self, at: int, flags: int) -> memoryview | None:
        try:
            n = self.socket.recv_into(self._buffer[at : at + PIECE_BYTES], 0, flags)
        except BlockingIOError:
            return None
        except OSError as error:
            self.gone = True
            raise Disconnected("the connection was reset", got=error.strerror) from error
        return self._buffer[at : at + n]

    def send(self, message: bytes | bytearray | memoryview) -> None:
        """One whole message.

        Raises
        ------
        Disconnected
            The peer is gone, or takes nothing for ``timing.send`` s.
        """
        with self._lock:
            if self.gone:
                raise Disconnected("the peer is gone")
            try:
                self.socket.sendall(message)
            except BlockingIOError as error:
                self.gone = True  # part of a message may be out: nothing can follow it
                raise Disconnected("the peer does not read", got=f"nothing taken for {self.timing.send:g} s") from error
            except OSError as error:
                self.gone = True
                raise Disconnected("the connection broke while sending", got=error.strerror) from error

    def close(self) -> bool:
        """CLOSE, end of sending, read until the peer has closed (or is silent), then close the socket. Never raises.

        Returns
        -------
        Whether everything can have been read: a peer that ends with something unread resets the connection.
        """
        delivered = False
        with contextlib.suppress(Disconnected):
            self.send(CLOSE_BYTES)
            delivered = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        until = time.monotonic() + 6 * self.timing.linger
        try:
            while not self._stopped and time.monotonic() < until and self.receive(self.timing.linger):
                pass
        except Disconnected:
            delivered = False
        self.gone = True
        self.socket.close()
        self._buffer = memoryview(b"")
        _free_buffers.append(self._memory)
        self._memory = bytearray()
        return delivered

    def stop(self) -> None:
        """From another thread: let a waiting ``receive`` return the end of the stream."""
        self._stopped = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("@ll", whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))
