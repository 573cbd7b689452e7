"""The life of one connection: bytes to the log, messages to the scan, images back, and one way out for everything.

    read -> log -> frame -> (configured, header, data ...) -> CLOSE -> images -> CLOSE

Whatever goes wrong is said once (TEXT; ERROR to a Gadgetron whose node this is), then everything up to the peer's CLOSE is read and
kept, and CLOSE answers it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from pathlib import PurePath
from typing import Protocol

from gadgets import queries
from gadgets.asking import Asked
from gadgets.bookkeeping import reason_of
from gadgets.errors import Disconnected, IllegalOrder, MalformedMessage, SpoolError, WireError
from gadgets.handlers import ChainRequest as ChainRequest
from gadgets.handlers import Handlers, Scan, ScanFacts
from gadgets.node import NodeScan, require_accepted
from gadgets.peer import Peer
from gadgets.spool import ScanLog, Status
from gadgets.wire import codec, events
from gadgets.wire.framing import FrameParser, Limits
from gadgets.wire.header_text import GUESS
from gadgets.wire.ids import MessageId
from gadgets.wire.session import Session
from recon_core.errors import ReconError, plain

logger = logging.getLogger(__name__)

IMAGE_ID = int(MessageId.IMAGE).to_bytes(2, "little")
TEXT_ID = int(MessageId.TEXT).to_bytes(2, "little")
CLOSE_BYTES = 2
FORCED_SECONDS = 1.0  # after the last image, for the news whether the raw data have reached the device


class Logs(Protocol):
    """What a connection needs of a spool."""

    def open(self, *, peer: str = "") -> ScanLog:
        """A log for this connection."""


class Connection:
    """One accepted connection; ``run`` is its thread.

    Parameters
    ----------
    name
        Short id for the logs.
    peer, address
        The socket, and the peer's address (as a hash in the capture, in the journal as it is, never logged).
    handlers, limits, spool
        Of the server.
    refusal
        When set, nothing is done but to tell the peer this, politely.
    """

    def __init__(
        self,
        name: str,
        peer: Peer,
        address: str,
        handlers: Handlers,
        limits: Limits,
        spool: Logs,
        refusal: str | None = None,
    ) -> None:
        self.name, self.peer, self.handlers = name, peer, handlers
        self.parser = FrameParser(limits)
        self.session = Session()
        self.asked = Asked(name, handlers, self.say)
        self.scan: Scan | NodeScan | None = None
        self.n_readouts = 0
        self.n_images = 0
        self.stopping = False
        self._log: ScanLog | None = spool.open(peer=address) if refusal is None else None
        self._refusal = refusal
        self._failure: Exception | None = None
        self._closed = False  # nothing more is to be read
        self._complete = False  # the peer's CLOSE has come
        self._has_data = False  # also what could not be used: it is a scan, and has a row
        self._tail = b""  # the last two bytes that came
        self._answering = False  # nothing is read any more: a peer that is gone now will not take the images either
        self._entry = handlers.entry(address)
        self._started = time.monotonic()
        self._bytes = 0

    @property
    def is_node(self) -> bool:
        """Whether the peer is Gadgetron and this its external node: a TEXT would end its session."""
        return self.parser.role == "node"

    @property
    def busy(self) -> bool:
        """Whether a scan is under way."""
        return self.scan is not None

    def stop(self) -> None:
        """From the server's thread: end this connection soon, also one that waits for its images."""
        self.stopping = True
        self.peer.stop()
        if self._answering:
            self._abandon()

    def run(self) -> None:
        """Serve the connection to its end. Never raises."""
        logger.debug("event=connected connection=%s", self.name)
        try:
            if self._refusal is not None:
                self._fail(IllegalOrder(self._refusal, where="server", remedy="Try again later"))
            self._read()
            if self._failure is None:
                self._answer()
        except Exception as error:
            # tasks and files of a scan that is abandoned vanish under its hands: whatever came of that, this is why
            abandoned = self.stopping and self._answering
            self._fail(_stopping() if abandoned else error)
        finally:
            self._leave()

    # -- reading ---------------------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """Until the peer's CLOSE, or until nothing more can come."""
        while not self._closed:
            try:
                view = self.peer.receive(self._patience())
            except Disconnected as error:
                return self._vanished(error)
            if view is None:
                if self.asked.pending is not None and self._failure is None:
                    self._fail(self.asked.pending)
                    continue
                return self._fail(self._silence())
            if not view:
                return self._ended()
            try:
                fresh = self._gather(view)
            except Disconnected as error:
                return self._vanished(error)
            self._tail = (self._tail + bytes(fresh[-2:]))[-2:]
            for event in self.parser.feed(fresh):
                self._take(event)
            if self.parser.lost:
                return self._drain(self._tail)

    def _gather(self, view: memoryview) -> memoryview:
        """Keep ``view`` and what has arrived meanwhile, piece by piece, before any of it is looked at."""
        held = 0
        more: memoryview | None = view
        while more is not None:
            held += len(more)
            self._bytes += len(more)
            self._keep(more)
            try:
                more = self.peer.receive_more(held)
            except Disconnected:  # what came before the reset is a scan all the same; the next receive finds the end
                more = None
        return self.peer.received(held)

    def _patience(self) -> float:
        timing = self.peer.timing
        if self.asked.pending is not None and self.asked.header is not None:
            return timing.grace
        patience = timing.handshake if self.asked.header_text is None else timing.idle
        if self.parser.in_message:
            return min(patience, timing.stall_close if self._tail == codec.close() else timing.stall)
        return patience

    def _silence(self) -> WireError:
        """Nothing came for as long as this connection waits."""
        seconds = f"{self._patience():g} s"
        if self.parser.in_message:
            remedy = "Are there as many samples and channels as the readouts' headers say?" if self.n_readouts else None
            return self.parser.incomplete(MalformedMessage, f"nothing came for too long ({seconds})", remedy)
        return WireError("nothing was received for too long", where="connection", got=seconds)

    def _keep(self, view: memoryview) -> None:
        """Raw bytes are on disk before anything else is done with them."""
        if self._log is None:
            return
        try:
            self._log.append(view)
        except SpoolError as error:
            self._fail(error)
            self._log.finish("failed", str(error), chain=self.asked.label, readouts=self.n_readouts)
            self._log = None

    def _drain(self, tail: bytes) -> None:
        """Message borders are lost: keep and read what still comes, so that the peer is not reset while it sends.

        Ends with the stream, or with silence: a short one when the last bytes (``tail``) are those of a CLOSE.
        """
        timing, total = self.peer.timing, 0
        while total < timing.drain_bytes:
            try:
                view = self.peer.receive(timing.quiet_close if tail == codec.close() else timing.drain)
            except Disconnected as error:
                return self._vanished(error)
            if not view:
                return
            self._keep(view)
            self._bytes += len(view)
            total += len(view)
            tail = (tail + bytes(view[-2:]))[-2:]

    def _ended(self) -> None:
        """The stream ended without CLOSE."""
        if self._bytes == 0:
            self._closed = True
            return
        if self.stopping:
            return self._vanished(_stopping())
        try:
            self.parser.finish()
        except Disconnected as error:
            return self._vanished(error)
        self._vanished(Disconnected("the peer closed the connection before its CLOSE", where=f"byte {self.parser.offset}"))

    def _vanished(self, error: Disconnected) -> None:
        if self._bytes:
            self._fail(error)
        self._closed = True

    # -- messages --------------------------------------------------------------------------------------------------------

    def _take(self, event: events.Event) -> None:
        """One message. Errors are reported and leave the connection reading on."""
        if isinstance(event, events.Close):
            self._closed = self._complete = True
        if isinstance(event, events.Readouts):
            self.n_readouts += len(event)
        self._has_data |= isinstance(event, events.Readouts | events.Waveform | events.Composite)
        if self._failure is not None:
            return
        try:
            self.session.accept(event)
            self._dispatch(event)
        except Exception as error:
            self._fail(error)

    def _dispatch(self, event: events.Event) -> None:
        match event:
            case events.Readouts():
                self._open().readouts(event)
            case events.Waveform():
                self._open().waveform(event)
            case events.Composite() if isinstance(scan := self._open(), NodeScan):
                self.n_readouts += scan.composite(event)
            case events.ConfigFile():
                self.asked.name(event.name)
            case events.ConfigScript():
                self.asked.script(event.text, node=self.is_node)
            case events.HeaderText():
                self.asked.describe(event.text)
                if event.guessed:
                    self.say(f"WRN the MRD header is not UTF-8 and was read as {GUESS}: are the names in the images right?")
            case events.Text():
                self.asked.parameters(event.text, open=self.scan is None and not self.is_node)
            case events.Query():
                if event.text == queries.BEHIND and self._log is not None:
                    self._log.behind = True
                text = queries.answer(event.text, chains=self.handlers.chain_names)
                self.peer.send(codec.response(event.correlation, text))
            case events.Close():
                self.asked.require_known()
            case events.ErrorText():
                raise WireError("the peer reports an error", where="ERROR (8)")
            case _:
                name = type(event).__name__
                raise WireError(
                    "input of this kind cannot be reconstructed", where="connection", got=name, expected="readouts"
                )

    def _open(self) -> Scan | NodeScan:
        self.asked.require_known()
        if self.scan is None:
            request, header, header_text = self.asked.request, self.asked.header, self.asked.header_text
            if request is None or header_text is None or self._log is None:
                raise IllegalOrder("data without a configuration and a header", where="connection")
            open_scan = self.handlers.open_scan
            if self.is_node and header is not None:
                self.scan = NodeScan(lambda text, log: open_scan(request, text, log, self.say), header, self._log)
            else:
                self.scan = open_scan(request, header_text, self._log, self.say)
            logger.info("event=scan_started connection=%s chain=%r file=%s", self.name, request.label, self._log.name)
        return self.scan

    # -- answering -------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """One line to the operator, at once. Kept back where it would abort the peer.

        Raises
        ------
        Disconnected
            The peer is gone while its images are being made: computing them has no purpose. (While it is being read, the words
            are lost and reading finds out by itself.) Or the server ends, and waits for them no more.
        """
        if self.stopping and self._answering:
            raise _stopping()
        line = plain(" ".join(text.split()), 2000)
        self._entry.said(line)
        if self.asked.noise_id is not None or self.is_node:
            logger.info("event=kept_back connection=%s text=%r", self.name, line)
            return
        try:
            self.peer.send(self._text(line + "\n"))
        except Disconnected:
            logger.info("event=unsaid connection=%s text=%r", self.name, line)
            if self._answering:
                raise

    def _text(self, words: str) -> bytes:
        """A TEXT as this peer writes its own: consoles (FIRE) end theirs with NUL."""
        return codec.text(words + "\0" if self.parser.nul_terminated else words)

    def _answer(self) -> None:
        """After the peer's CLOSE."""
        if self.asked.noise_id is not None:
            return self._answer_noise()
        if not self._complete or self.asked.request is None:
            return
        if self.asked.header_text is None:
            return self.say("WRN CLOSE came before the MRD header: there is nothing to reconstruct")
        scan, said = self._open(), False
        self._answering = True
        self._warn_of_loss()
        behind = self._bytes - self.parser.offset
        if behind > CLOSE_BYTES:  # some clients send CLOSE twice
            self.say(f"WRN {behind} bytes came behind CLOSE and are not reconstructed: a connection carries one scan")
        self._entry.received(self._log, self.asked.label, self.n_readouts, self.parser.role)
        for message in scan.finish():
            self._warn_of_power_cuts()
            if self.stopping:
                raise _stopping()
            kind = bytes(memoryview(message)[:2])
            said = said or kind == TEXT_ID
            self._entry.sent(message)
            if self.is_node and kind == TEXT_ID:
                logger.info("event=kept_back connection=%s text=%r", self.name, bytes(message[6:]).decode(errors="replace"))
                continue
            if self.is_node:
                require_accepted(message)
            self.peer.send(self._text(bytes(message[6:]).decode()) if kind == TEXT_ID else message)
            self.n_images += kind == IMAGE_ID
        self._warn_of_power_cuts(FORCED_SECONDS)
        if not self.n_images and not said:
            if self.is_node:  # the client's exit code stays 0: words are all that tells its user
                raise WireError("no image was made", where="node", got=f"{self.n_readouts} readouts")
            self.say(f"WRN no image was made from {self.n_readouts} readouts")

    def _warn_of_loss(self) -> None:
        if self._log is not None and self._log.lost_by_its_spool:
            self.say("WRN the raw data of this scan are not kept: the spool cannot take them")

    def _warn_of_power_cuts(self, seconds: float = 0.0) -> None:
        words = self._entry.unforced(seconds)
        if words:
            self.say(f"WRN {words}")

    def _answer_noise(self) -> None:
        store, wanted = self.handlers.noise_store, self.asked.noise_id
        noise = store.get(wanted) if store is not None and wanted else None
        logger.info("event=noise_query connection=%s known=%s", self.name, noise is not None)
        if noise is not None:
            self.peer.send(codec.dependency(noise.meta()))

    def _fail(self, error: Exception) -> None:
        """Report the first failure, stop computing, and go on reading."""
        if self._failure is not None:
            return
        self._failure, self.asked.pending, self._answering = error, None, False
        if isinstance(error, ReconError):
            logger.warning("event=failed connection=%s error=%s text=%r", self.name, type(error).__name__, str(error))
            words = f"{type(error).__name__}: {error}"
        else:
            # neither message nor locals: they may quote the header. The capture repeats the scan for whoever looks for it
            logger.error("event=crashed connection=%s error=%s at=%s", self.name, type(error).__name__, _where(error))
            words = f"internal error ({type(error).__name__}); the server's log has more under connection {self.name}"
        if self.is_node:
            with contextlib.suppress(Disconnected):
                self.peer.send(codec.error(words))
        else:
            self.say(f"ERROR {words}")
        self._abandon()

    def _abandon(self) -> None:
        scan = self.scan
        if scan is None:
            return
        try:
            scan.abandon()
        except Exception as error:
            logger.error("event=abandon_failed connection=%s error=%s at=%s", self.name, type(error).__name__, _where(error))

    # -- the way out -----------------------------------------------------------------------------------------------------

    def _leave(self) -> None:
        if self._failure is not None and self.n_readouts:
            self._warn_of_loss()
            self._warn_of_power_cuts()
        delivered = self.peer.close()
        status: Status = "complete"
        if self._failure is not None:
            vanished = isinstance(self._failure, Disconnected) and not self._complete
            status = "truncated" if vanished else "failed"
        if self._has_data or self.scan is not None:
            self._entry.end(
                self._failure, ScanFacts() if self.scan is None else self.scan.facts, complete=self._complete,
                delivered=delivered, stopping=self.stopping, raw=self._log, chain=self.asked.label,
                n_readouts=self.n_readouts, protocol=self.parser.role,
            )  # fmt: skip
        if self._log is not None:
            # half a bucket has no readout yet, but is data
            if self.n_readouts or status == "failed" or (self.is_node and self.asked.header is not None):
                self._log.finish(status, reason_of(self._failure), chain=self.asked.label, readouts=self.n_readouts)
            else:
                self._log.discard()
        self._let_go()
        level = logging.INFO if self._bytes else logging.DEBUG
        logger.log(
            level,
            "event=closed connection=%s status=%s chain=%r readouts=%d images=%d bytes=%d seconds=%.3f",
            self.name,
            status,
            self.asked.label,
            self.n_readouts,
            self.n_images,
            self._bytes,
            time.monotonic() - self._started,
        )

    def _let_go(self) -> None:
        """Break the circles that this connection is in, so that its scan's memory is free now.

        Otherwise it waits for the collector of circles. That one looks at everything when a quarter of it is new, and torch brings so
        many objects along that this takes hundreds of scans, each with the headers of all its readouts.
        """
        _without_frames(self._failure)
        self.scan = None
        self.asked.close()
        self.parser.close()


def _stopping() -> Disconnected:
    return Disconnected("the server is stopping", where="connection")


def _without_frames(error: BaseException | None) -> None:
    """An error's frames hold what they worked on, and that holds the error; so do those of the errors behind it."""
    left, seen = [error], set[int]()
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            one.__traceback__ = None
            left += [one.__cause__, one.__context__]


def _where(error: BaseException) -> str:
    """Where an error was raised, innermost last, as one word: ``file:line>file:line``."""
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(f"{PurePath(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
        trace = trace.tb_next
    return ">".join(frames[-12:])
