"""Our own client: plays raw data to a server as a scanner would, and keeps the images. It fails loudly.

One thread sends, the caller's thread receives. Whatever the real client passes over in silence is an error here: an ERROR
text of the server, no image, no CLOSE, a message that cannot be understood.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import h5py

from gadgets.errors import Disconnected, ImageFileError, ReplayFailed
from gadgets.image_attributes import is_preview
from gadgets.image_file import ImageFile
from gadgets.queries import BEHIND, BEHIND_ID
from gadgets.raw_source import Source, open_source
from gadgets.tls import ClientTls, TlsError, connect_tls
from gadgets.wire import codec, events
from gadgets.wire.framing import FrameParser
from recon_core.errors import ReconError

RETRY_SECONDS = 0.2
PACE_SECONDS = 0.01  # readouts of one such interval are sent together
SILENCE_SECONDS = 600.0
RECEIVE_BYTES = 1 << 20
TLS_ALERT = b"\x15\x03"  # what a TLS server may say to a plain peer; no message begins so
ERROR_WORDS = ("ERROR", "ERR ", "ERR:")

# what the reference client asks before a scan that depends on a noise measurement (same element names, so that a real
# Gadgetron answers, too)
NOISE_SCRIPT = """<?xml version="1.0" encoding="UTF-8"?>
<gadgetronStreamConfiguration xmlns="http://gadgetron.sf.net/gadgetron">
  <writer><slot>1019</slot><dll>gadgetron_mricore</dll><classname>DependencyQueryWriter</classname></writer>
  <gadget><name>NoiseSummary</name><dll>gadgetron_mricore</dll><classname>NoiseSummaryGadget</classname>
    <property><name>noise_file</name><value>GadgetronNoiseCovarianceMatrix_{}</value></property></gadget>
</gadgetronStreamConfiguration>
"""


@dataclass
class ReplayResult:
    """What happened. Times in s, measured here: ``seconds_to_*`` from the last readout's hand-over to the kernel.

    ``n_images`` and the times to the first and last image are those of the final images; previews are counted on their own.
    ``series`` has the number of images of every series, previews included.

    ``noise`` is the server's answer about the noise measurement (an ismrmrdMeta document), ``None`` when it knew of none.
    """

    n_readouts: int = 0
    bytes_sent: int = 0
    n_images: int = 0
    n_previews: int = 0
    series: dict[int, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    noise: str | None = None
    out: Path | None = None
    group: str | None = None
    send_seconds: float = 0.0
    seconds_to_first_preview: float = float("nan")
    seconds_to_first_image: float = float("nan")
    seconds_to_last_image: float = float("nan")

    @property
    def readouts_per_second(self) -> float:
        return self.n_readouts / self.send_seconds if self.send_seconds > 0 else float("nan")

    @property
    def errors(self) -> list[str]:
        """The server's words that begin like an error."""
        lines = [text.strip() for text in self.texts]
        return [line for line in lines if line.startswith(ERROR_WORDS) or "] ERROR:" in line]


def replay(
    source: Path | str | Source,
    *,
    host: str = "127.0.0.1",
    port: int = 9002,
    config: str | None = None,
    script: str | None = None,
    parameters: Mapping[str, str] | None = None,
    out: Path | str | None = None,
    group: str | None = None,
    rate: float | None = None,
    dataset: str = "dataset",
    strip_version: bool = False,
    ask_noise: bool = True,
    progress: Callable[[int, int | None], None] | None = None,
    on_text: Callable[[str], None] | None = None,
    on_image: Callable[[events.Image], None] | None = None,
    connect_seconds: float = 10.0,
    silence_seconds: float = SILENCE_SECONDS,
    tls: ClientTls | None = None,
    behind: bool = False,
) -> ReplayResult:
    """Play one scan and wait for its images.

    Parameters
    ----------
    source
        An ISMRMRD HDF5 file, or a capture of the spool (sent bit for bit, unless ``config`` or ``script`` replaces its own). What
        `gadgets.raw_source.open_source` has made of one has its configuration and parameters already.
    host, port
        The server. A refused connection is tried again for ``connect_seconds``.
    config, script
        Name or text of the configuration; one is needed for an HDF5 file.
    parameters
        Settings to override, sent as FIRE's JSON text after the header.
    out, group
        Image file to append to, and the group in it: the time of day by default, always a fresh one. Without ``out`` images
        are only counted (and given to ``on_image``).
    rate
        Readouts per second; as fast as possible by default.
    dataset, strip_version
        See ``gadgets.raw_source.open_source``.
    ask_noise
        Ask for the noise measurement that an HDF5 file's header depends on, on a connection of its own, as the real client.
    progress
        Called with ``(readouts sent, readouts in all)``, by the sending thread.
    silence_seconds
        Without a byte from the server for so long after everything was sent, the replay fails.
    tls
        Speak TLS, and verify the server by these.
    behind
        Let scans of scanners go first. Servers of others may not know how to answer that.

    Raises
    ------
    ReplayFailed
        The server said ERROR, sent no image, closed without CLOSE, or was silent; ``result`` has what arrived, and images
        that arrived are in ``out``.
    RawFileError, SpoolError, ImageFileError
        The source or the image file cannot be used.
    TlsError
        The server does not speak TLS, or is not the one that it should be.
    """
    played = source
    if isinstance(played, str | Path):
        played = open_source(
            played, config=config, script=script, parameters=parameters, dataset=dataset, strip_version=strip_version
        )
    if out is not None and Path(out).exists() and Path(out).samefile(played.path):
        raise ImageFileError("images would be written into the raw data", where=str(out), remedy="Name another file")
    result = ReplayResult(n_readouts=0, out=None if out is None else Path(out))
    where = f"{host}:{port}"
    wanted = played.header.noise_dependency if played.header is not None and ask_noise else None
    if wanted is not None:
        with _connect(host, port, connect_seconds, tls) as connection:
            result.noise = _ask_noise(connection, wanted, silence_seconds)
    with _connect(host, port, connect_seconds, tls) as connection, contextlib.ExitStack() as stack:
        images = _Images(result, group, stack, on_image)
        if behind:
            with contextlib.suppress(OSError):  # a server that has gone already: what is received says so
                connection.sendall(codec.query(BEHIND, BEHIND_ID))
        sender = _Sender(connection, played, rate, progress)
        sender.start()
        try:
            failure = _receive(connection, result, images, sender, on_text, silence_seconds, where, _unheard(tls))
        finally:
            sender.stop()
    _settle_times(result, images, sender)
    failure = _verdict(result, images, sender, failure, where)
    if failure is not None:
        failure.result = result
        raise failure
    return result


class _Images:
    """Where arriving images go; the file appears with the first one."""

    def __init__(
        self,
        result: ReplayResult,
        group: str | None,
        stack: contextlib.ExitStack,
        tell: Callable[[events.Image], None] | None,
    ) -> None:
        self.result, self._group, self._stack, self._tell = result, group, stack, tell
        self.first_preview = self.first = self.last = float("nan")
        self.failure: ReconError | None = None
        self._file: ImageFile | None = None

    def take(self, image: events.Image) -> None:
        now = time.perf_counter()
        if is_preview(image.attributes):
            self.first_preview = now if self.result.n_previews == 0 else self.first_preview
            self.result.n_previews += 1
        else:
            self.first = now if self.result.n_images == 0 else self.first
            self.last = now
            self.result.n_images += 1
        series = int(image.header["image_series_index"])
        self.result.series[series] = self.result.series.get(series, 0) + 1
        if self._tell is not None:
            self._tell(image)
        if self.result.out is None or self.failure is not None:
            return
        try:
            if self._file is None:
                self.result.group = fresh_group(self.result.out, self._group)
                self._file = self._stack.enter_context(ImageFile(self.result.out, self.result.group))
            self._file.append(image)
        except ReconError as error:
            self.failure = error  # go on receiving: the server must not be left in the middle


class _Sender(threading.Thread):
    """Sends the session; remembers when the last readout went out."""

    def __init__(
        self,
        connection: socket.socket,
        source: Source,
        rate: float | None,
        progress: Callable[[int, int | None], None] | None,
    ) -> None:
        super().__init__(name="replay-send", daemon=True)
        self.connection, self.source, self.rate = connection, source, rate
        self.progress = progress
        self.n_readouts = self.bytes_sent = 0
        self.first = self.last = float("nan")
        self.failure: Exception | None = None
        self._stopped = threading.Event()

    def run(self) -> None:
        try:
            self._send_all()
        except (OSError, ReconError) as error:
            self.failure = error
            if not isinstance(error, OSError):
                with contextlib.suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)  # the source broke: the server has to see an end

    def stop(self) -> None:
        """The receiver is through; what is left unsent stays so."""
        self.join(0.0 if self.failure else 5.0)
        if self.is_alive():
            self._stopped.set()
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            self.join()

    def _send_all(self) -> None:
        for piece in self.source.pieces():
            at = 0
            for stop, n in self._steps(piece.ends):
                self._send(memoryview(piece.data)[at:stop])
                at = stop
                self.n_readouts += n
                self.last = time.perf_counter()
                if self.progress is not None:
                    self.progress(self.n_readouts, self.source.n_readouts)
            self._send(memoryview(piece.data)[at:])
            if self._stopped.is_set():
                return
        if not self.source.ends_with_close:
            self.connection.shutdown(socket.SHUT_WR)

    def _steps(self, ends: Any) -> Iterator[tuple[int, int]]:
        """Where to cut a piece, and how many readouts each cut sends; waits for the moment when they are due."""
        n = len(ends)
        together = n if self.rate is None else max(1, int(self.rate * PACE_SECONDS))
        for first in range(0, n, max(together, 1)):
            count = min(together, n - first)
            if self.n_readouts == 0:
                self.first = time.perf_counter()
            if self.rate is not None:
                due = self.first + self.n_readouts / self.rate
                if self._stopped.wait(max(0.0, due - time.perf_counter())):
                    return
            yield int(ends[first + count - 1]), count

    def _send(self, data: bytes | memoryview) -> None:
        self.connection.sendall(data)
        self.bytes_sent += len(data)


def _receive(
    connection: socket.socket,
    result: ReplayResult,
    images: _Images,
    sender: _Sender,
    on_text: Callable[[str], None] | None,
    silence: float,
    where: str,
    unheard: str,
) -> ReplayFailed | None:
    """Until the server's CLOSE; the way in which that did not come, if so. ``unheard`` is what may help where nothing came at all."""
    remedy: str | None = unheard
    with FrameParser(role="client") as parser:
        while not parser.closed:
            try:
                chunk = _wait(connection, sender, silence)
            except OSError as error:
                return ReplayFailed(
                    "the connection broke before the server's CLOSE",
                    where=where,
                    got=error.strerror or "silence",
                    remedy=remedy,
                )
            if chunk is None:
                return ReplayFailed("the server is silent", where=where, got=f"nothing for {silence:g} s", expected="CLOSE")
            if not chunk:
                try:
                    parser.finish()
                except Disconnected as error:
                    return ReplayFailed(f"the server closed in the middle: {error}", where=where)
                return ReplayFailed("the server closed without CLOSE", where=where, remedy=remedy)
            if remedy is not None and chunk[: len(TLS_ALERT)] == TLS_ALERT:
                return ReplayFailed("the server answers in TLS", where=where, remedy=remedy)
            remedy = None
            for event in parser.feed(chunk):
                match event:
                    case events.Image():
                        images.take(event)
                    case events.Response(correlation=correlation) if correlation == BEHIND_ID:
                        pass
                    case events.Text() | events.Response():
                        result.texts.append(event.text)
                        if on_text is not None:
                            on_text(event.text)
                    case events.Dependency():
                        result.noise = event.text
                    case events.ErrorText():
                        result.texts.append(f"ERROR {event.text}")
                    case events.Problem():
                        return ReplayFailed(f"the server's answer cannot be understood: {event.error}", where=where)
    return None


def _wait(connection: socket.socket, sender: _Sender | None, silence: float) -> bytes | None:
    """The next bytes; ``None`` after ``silence`` s without any, counted only while nothing is being sent."""
    until = time.monotonic() + silence
    connection.settimeout(None)
    while True:
        ready = _readable(connection, min(1.0, silence))
        if ready:
            return connection.recv(RECEIVE_BYTES)
        if sender is not None and sender.is_alive():
            until = time.monotonic() + silence
        elif time.monotonic() > until:
            return None


def _readable(connection: socket.socket, seconds: float) -> bool:
    return bool(select.select([connection], [], [], seconds)[0])


def _ask_noise(connection: socket.socket, measurement_id: str, silence: float) -> str | None:
    """The server's answer about a noise measurement; ``None`` when it has none (or does not know how to answer)."""
    answer = None
    try:
        with FrameParser(role="client") as parser:
            connection.sendall(codec.config_script(NOISE_SCRIPT.format(escape(measurement_id))) + codec.close())
            while not parser.closed:
                chunk = _wait(connection, None, silence)
                if not chunk:
                    return answer
                for event in parser.feed(chunk):
                    if isinstance(event, events.Dependency):
                        answer = event.text
    except OSError:
        return answer
    return answer


def _connect(host: str, port: int, seconds: float, tls: ClientTls | None) -> socket.socket:
    until = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=max(seconds, 1.0))
        except (ConnectionRefusedError, TimeoutError) as error:
            if time.monotonic() + RETRY_SECONDS > until:
                raise ReplayFailed(
                    "no server answers",
                    where=f"{host}:{port}",
                    got=error.strerror or "time-out",
                    remedy="Start one: recon serve",
                ) from None
            _retry()
            continue
        except OSError as error:
            raise ReplayFailed("cannot connect", where=f"{host}:{port}", got=error.strerror or str(error)) from None
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            return connection if tls is None else connect_tls(connection, host, tls)
        except TlsError as error:
            raise TlsError(
                error.what, where=f"{host}:{port}", got=error.got, expected=error.expected, remedy=_tls_remedy(error)
            ) from None


def _tls_remedy(error: TlsError) -> str | None:
    """Which option is likely to be wrong, where no TLS came about with a server that was reached."""
    if error.where != "TLS handshake":
        return error.remedy  # our own files
    if "CERTIFICATE" in str(error.got):
        return "Is --tls-ca the authority of its certificate, and --tls-name (by default the host) the name in it?"
    return "Does this port speak TLS? A plain one is asked without --tls, --tls-ca and --tls-cert"


def _unheard(tls: ClientTls | None) -> str:
    """What to try where a server ends the connection and has said nothing."""
    least = "let in other addresses only (its --allow): its log says"
    if tls is None:
        return f"It may speak TLS (--tls, or --tls-ca FILE with its authority), or {least}"
    return f"It may {least}" if tls.certificate else f"It may want a certificate (--tls-cert FILE), or {least}"


def _retry() -> None:
    time.sleep(RETRY_SECONDS)


def _settle_times(result: ReplayResult, images: _Images, sender: _Sender) -> None:
    result.n_readouts, result.bytes_sent = sender.n_readouts, sender.bytes_sent
    result.send_seconds = sender.last - sender.first if sender.n_readouts else 0.0
    result.seconds_to_first_preview = images.first_preview - sender.last
    result.seconds_to_first_image = images.first - sender.last
    result.seconds_to_last_image = images.last - sender.last


def _verdict(
    result: ReplayResult, images: _Images, sender: _Sender, failure: ReplayFailed | None, where: str
) -> ReplayFailed | None:
    """The most telling reason why this replay did not end well: the server's words, then how it ended."""
    if isinstance(sender.failure, ReconError):
        return ReplayFailed(f"the source broke off: {sender.failure}", where=where)
    words = " | ".join(line.rstrip() for line in result.errors)
    if words:
        return ReplayFailed(f"the server says: {words}", where=where)
    if failure is not None:
        return failure
    if images.failure is not None:
        return ReplayFailed(f"the images cannot be stored: {images.failure}", where=where)
    if sender.failure is not None or sender.n_readouts < sender.source.n_readouts:
        return ReplayFailed("the server ended before everything was sent", where=where, got=f"{sender.n_readouts} readouts")
    if result.n_images == 0 and not _is_noise_only(result):
        said = " | ".join(text.strip() for text in result.texts)
        return ReplayFailed("the server sent no image", where=where, got=said or "no words either")
    return None


def _is_noise_only(result: ReplayResult) -> bool:
    """A noise measurement has no images; the server says that it was stored."""
    return any("noise measurement stored" in text for text in result.texts)


def fresh_group(path: Path, group: str | None) -> str:
    """``group`` (or the time of day, as the real client names it) with a number behind it when the file has it already."""
    wanted = group or f"{datetime.now():%Y-%m-%d %H:%M:%S}"
    if not (path.exists() and h5py.is_hdf5(path)):
        return wanted
    with h5py.File(path, "r") as file:
        return next(name for name in (wanted, *(f"{wanted} ({i})" for i in range(2, len(file) + 3))) if name not in file)
