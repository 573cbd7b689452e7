"""What a connection needs of the rest of the product: a reconstruction for each scan, and a few answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from gadgets.noise_store import NoiseStore
from gadgets.spool import ScanLog
from gadgets.wire import events


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
        return (self.name or "")[:64] if self.script is None else "(script)"


class Scan(Protocol):
    """What a connection needs of a reconstruction."""

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
    """

    open_scan: OpenScan
    check_config: Callable[[ChainRequest], object] = lambda request: None
    noise_store: NoiseStore | None = None
    noise_request: Callable[[str], str | None] = _noise_request
    chain_names: Callable[[], Iterable[str]] = _chain_names


def with_parameters(request: ChainRequest, parameters: Mapping[str, str]) -> ChainRequest:
    """``request`` with FIRE's parameters: ``config`` (or a ``customconfig``) names the chain, others are settings."""
    overrides = {**request.overrides, **parameters}
    config, custom = overrides.pop("config", "").strip(), overrides.pop("customconfig", "").strip()
    chosen = custom or config
    return ChainRequest(name=chosen, overrides=overrides) if chosen else replace(request, overrides=overrides)
