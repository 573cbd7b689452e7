"""What a connection needs of the rest of the product: a reconstruction for each scan, and a few answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from gadgets.errors import ConfigRefused
from gadgets.noise_store import NoiseStore
from gadgets.spool import ScanLog
from gadgets.wire import events
from gadgets.wire.session import fire_parameters
from recon_core.errors import plain

if TYPE_CHECKING:
    from gadgets.bookkeeping import Entry

PREVIEW_SERIES = 1000
"""Added to the series index of previews: the final images are numbered as if there were none."""


@dataclass(frozen=True)
class ChainRequest:
    """What the peer asks for: a chain's ``name``, or a configuration as text (``script``), and settings to override.

    All override values are text, as consoles send them ("True", "8").
    """

    name: str | None = None
    script: str | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For logs: never a script's text, never control characters."""
        return plain(self.name or "", 64) if self.script is None else "(script)"


@dataclass
class ScanFacts:
    """What a scan was reconstructed with, as far as it is known; for the journal.

    ``settings`` are plain values by group; ``weights`` is a sha256 or ""; ``fallback`` is the chain that stood in, or "".
    """

    chain: str = ""
    settings: Mapping[str, object] = field(default_factory=dict)
    weights: str = ""
    fallback: str = ""


class Scan(Protocol):
    """What a connection needs of a reconstruction."""

    @property
    def facts(self) -> ScanFacts:
        """What it was made with."""

    def readouts(self, event: events.Readouts) -> None:
        """A batch, in the order of the stream. Must not wait for computing."""

    def waveform(self, event: events.Waveform) -> None:
        """One waveform block."""

    def finish(self) -> Iterator[bytes]:
        """After the peer's CLOSE: encoded messages, sent as they come."""

    def abandon(self) -> None:
        """Give up; may be called at any time, also after ``finish``."""


Say = Callable[[str], None]
OpenScan = Callable[[ChainRequest, str, ScanLog, Say], Scan]


def _noise_request(script: str) -> str | None:
    from gadgets.chain import noise_dependency_request  # imports the methods: not needed for the protocol itself

    return noise_dependency_request(script)


def _chain_names() -> Iterable[str]:
    from gadgets.chain import chain_names

    return chain_names()


def _node_request(script: str) -> ChainRequest:
    from gadgets.node import node_request  # needs this module

    return node_request(script)


def _no_entry(peer: str) -> Entry:
    from gadgets.bookkeeping import Books  # needs this module

    return Books(None).entry(peer)


@dataclass(frozen=True)
class Handlers:
    """What the server's connections share.

    Attributes
    ----------
    open_scan
        ``(request, header text, log, say) -> Scan``; called once, at the first readout or waveform, or at CLOSE.
    check_config
        Raises for a request that cannot be served (``UnknownChain``, ``ConfigRefused``, ``SettingError``).
    noise_request
        The measurement id that a script's NoiseSummaryGadget asks for, or ``None`` for any other script.
    chain_names
        Answers the query ``recon::chains``.
    chosen
        What is reconstructed where this is asked for: a retry may have a chain and settings of its own. Applied twice it is as once.
    node_request
        What the configuration of a Gadgetron node asks for.
    entry
        The row in the journal of a connection from this address; by default nothing is written.
    """

    open_scan: OpenScan
    check_config: Callable[[ChainRequest], object] = lambda request: None
    noise_store: NoiseStore | None = None
    noise_request: Callable[[str], str | None] = _noise_request
    chain_names: Callable[[], Iterable[str]] = _chain_names
    chosen: Callable[[ChainRequest], ChainRequest] = lambda request: request
    entry: Callable[[str], Entry] = _no_entry
    node_request: Callable[[str], ChainRequest] = _node_request


def text_request(text: str) -> ChainRequest:
    """What a configuration text asks for: FIRE's parameters as JSON, else a name or a document that is looked at later.

    Raises
    ------
    MalformedText
        JSON whose parameters cannot be used.
    ConfigRefused
        JSON that names no chain.
    """
    parameters = fire_parameters(text)
    if parameters is None:
        return ChainRequest(script=text)
    request = with_parameters(ChainRequest(script=""), parameters)
    if request.name is None:
        raise ConfigRefused("parameters that name no chain", where="configuration", expected='"config": "(a chain)"')
    return request


def with_parameters(request: ChainRequest, parameters: Mapping[str, str]) -> ChainRequest:
    """``request`` with FIRE's parameters: ``config`` (or a ``customconfig``) names the chain, others are settings."""
    overrides = {**request.overrides, **parameters}
    config, custom = overrides.pop("config", "").strip(), overrides.pop("customconfig", "").strip()
    chosen = custom or config
    return ChainRequest(name=chosen, overrides=overrides) if chosen else replace(request, overrides=overrides)
