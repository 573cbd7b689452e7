"""What a peer asks for: from its configuration over the MRD header to a console's parameters."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from gadgets.errors import ConfigRefused, UnknownChain
from gadgets.handlers import ChainRequest, Handlers, text_request, with_parameters
from gadgets.wire.header import MrdHeader, parse_header
from gadgets.wire.ids import MessageId
from gadgets.wire.session import fire_parameters
from recon_core.errors import ReconError

logger = logging.getLogger(__name__)

DEPENDENCY_SLOT = re.compile(rf"<slot>\s*{int(MessageId.DEPENDENCY)}\s*</slot>")


class Asked:
    """The request of one connection, as it comes in.

    Parameters
    ----------
    name
        Of the connection, for the log.
    handlers
        Of the server.
    say
        Tells the operator something.

    Attributes
    ----------
    request
        Chain and settings, as they are reconstructed; ``None`` before any configuration, and for noise queries.
    header_text, header
        The MRD header, as it came and as it is understood.
    pending
        The chain is unknown: to be reported, unless FIRE's text names another one.
    noise_id
        Set on a noise-dependency connection (only 1019 and CLOSE may be answered); "" where the id cannot be told.
    """

    def __init__(self, name: str, handlers: Handlers, say: Callable[[str], None]) -> None:
        self._name, self._handlers, self._say = name, handlers, say
        self.request: ChainRequest | None = None
        self.header_text: str | None = None
        self.header: MrdHeader | None = None
        self.pending: UnknownChain | None = None
        self.noise_id: str | None = None

    def close(self) -> None:
        """Nobody is told anything any more: the connection is over, and ``say`` would keep it."""
        self._say = _unheard

    @property
    def label(self) -> str:
        """The chain, for logs; "" before it is known."""
        return self.request.label if self.request is not None else ""

    def name(self, name: str) -> None:
        """CONFIG_FILE: a chain's name, or FIRE's parameters in its place."""
        self._configure(text_request(name) if name.lstrip().startswith("{") else ChainRequest(name=name))

    def script(self, text: str, *, node: bool) -> None:
        """CONFIG_SCRIPT of a client, or of Gadgetron to its ``node``. The document is looked at, never executed.

        Raises
        ------
        ConfigRefused, MalformedText
            It cannot be used.
        """
        if node:
            return self._configure(self._handlers.node_request(text), node=True)
        if "NoiseSummaryGadget" in text or DEPENDENCY_SLOT.search(text):
            self.noise_id = ""
            try:
                self.noise_id = self._handlers.noise_request(text) or ""
            except ReconError as error:
                logger.warning("event=noise_request_unreadable connection=%s error=%r", self._name, str(error))
            return
        self._configure(text_request(text))

    def describe(self, text: str) -> None:
        """HEADER.

        Raises
        ------
        HeaderError
            It cannot be used.
        ConfigRefused
            A noise query has none: what has one is a scan, whose sender understands words.
        """
        if self.noise_id is not None:
            self.noise_id = None
            raise ConfigRefused(
                "the configuration of a noise query reconstructs nothing",
                where="CONFIG_SCRIPT",
                expected="a chain's name or configuration",
            )
        self.header_text, self.header = text, parse_header(text)

    def parameters(self, text: str, *, open: bool) -> None:
        """FIRE's JSON text between header and data, as long as this is ``open``; any other text is only noted."""
        parameters = fire_parameters(text) if open else None
        if parameters is None:
            logger.info("event=text_ignored connection=%s chars=%d", self._name, len(text))
            if text.lstrip().startswith("{"):
                self._say("WRN a text that begins like parameters holds none that can be used here; it is ignored")
        elif self.request is not None:
            self._configure(with_parameters(self.request, parameters))

    def require_known(self) -> None:
        """Before the chain is needed.

        Raises
        ------
        UnknownChain
            There is none of this name.
        """
        if self.pending is not None:
            raise self.pending

    def _configure(self, request: ChainRequest, *, node: bool = False) -> None:
        request = self._handlers.chosen(request)
        self.request, self.pending = request, None
        try:
            self._handlers.check_config(request)
        except UnknownChain as error:
            if node:
                raise
            self.pending = error


def _unheard(text: str) -> None:
    """In place of a connection that is over."""
