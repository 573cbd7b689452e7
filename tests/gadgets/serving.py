"""A live server with a reconstruction that only counts: for tests of everything around reconstructing."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gadgets.capture import sidecar
from gadgets.chain import noise_dependency_request
from gadgets.errors import ConfigRefused, UnknownChain
from gadgets.handlers import ChainRequest, ScanFacts
from gadgets.noise_store import NoiseStore
from gadgets.peer import Timing
from gadgets.server import Server
from gadgets.spool import ScanLog, Spool
from gadgets.wire import codec
from gadgets.wire.dtypes import IMAGE_HEADER
from gadgets.wire.events import Readouts, Waveform
from tests.strict_client import Answer, StrictClient
from tests.waiting import PATIENCE, until
from tests.wire import streams

HEADER = streams.HEADER
CHAINS = ("fourier", "cg_sense")
QUICK = Timing(
    handshake=PATIENCE, idle=PATIENCE, stall=PATIENCE, send=PATIENCE, grace=0.1, quiet_close=0.05, drain=0.3, linger=20.0
)  # generous where a slow machine must not matter


@dataclass
class CountingScan:
    """Answers with one 2 x 2 image that says how many readouts and waveforms came."""

    request: ChainRequest
    header: str
    raw: ScanLog
    say: Callable[[str], None]
    n_readouts: int = 0
    n_waveforms: int = 0
    abandoned: bool = False
    facts: ScanFacts = field(default_factory=ScanFacts)

    def readouts(self, event: Readouts) -> None:
        self.n_readouts += len(event)

    def waveform(self, event: Waveform) -> None:
        self.n_waveforms += 1

    def finish(self) -> Iterator[bytes]:
        yield count_image(self.n_readouts, self.n_waveforms)

    def abandon(self) -> None:
        self.abandoned = True


def count_image(n_readouts: int, n_waveforms: int = 0, series: int = 0, shape: tuple[int, int] = (2, 2)) -> bytes:
    header = np.zeros((), IMAGE_HEADER)
    header["image_index"], header["image_series_index"] = 1, series
    return codec.image(header, "", np.full((1, 1, *shape), n_readouts + 1j * n_waveforms, np.complex64))


def check_config(request: ChainRequest) -> None:
    """As the real one: bare names are looked up, a script must not name code."""
    if request.script is not None and request.script.startswith("<") and "<stream/>" not in request.script:
        raise ConfigRefused("names code", where="CONFIG_SCRIPT")
    name = (request.script if request.name is None else request.name) or ""
    if not name.startswith("<") and name.removesuffix(".xml") not in CHAINS:
        raise UnknownChain("no such chain", got=repr(name[:40]), expected="one of " + ", ".join(CHAINS))


@dataclass
class Served:
    """A running server and what it did."""

    server: Server
    spool: Path
    noise: NoiseStore
    scans: list[Any] = field(default_factory=list)

    def client(self, **options: Any) -> StrictClient:
        options = {"timeout": PATIENCE, **options}
        return StrictClient("127.0.0.1", self.server.port, **options)

    def ended(self) -> None:
        """Close the server, and wait for its connections for longer than it does."""
        self.server.close()
        until(lambda: not self.server.n_connections, "a connection does not end")

    def captures(self) -> list[tuple[bytes, dict[str, Any]]]:
        """Bytes and sidecar of every capture, once all connections have ended."""
        self.ended()
        found = sorted(self.spool.glob("*.mrd"))
        return [(path.read_bytes(), json.loads(sidecar(path).read_text())) for path in found]


@contextmanager
def serving(tmp_path: Path, scan: type = CountingScan, **options: Any) -> Iterator[Served]:
    spool = options.pop("spool", None) or Spool(tmp_path / "spool", min_free_bytes=0)
    noise = NoiseStore(tmp_path / "noise")
    scans: list[Any] = []
    lock = threading.Lock()

    def open_scan(request: ChainRequest, header: str, raw: ScanLog, say: Callable[[str], None]) -> Any:
        opened = scan(request, header, raw, say)
        with lock:
            scans.append(opened)
        return opened

    options = {
        "check_config": check_config,
        "noise_store": noise,
        "noise_request": noise_dependency_request,
        "chain_names": lambda: CHAINS,
        "timing": QUICK,
        **options,
    }
    with Server(port=0, open_scan=open_scan, spool=spool, **options) as server:
        yield Served(server, tmp_path / "spool", noise, scans)


def data(n: int = 5, channels: int = 2, samples: int = 8) -> bytes:
    """``n`` readouts."""
    return bytes(codec.acquisitions(*streams.readouts(n, channels, samples)))


def counted(answer: Answer) -> complex:
    """The one image's pixel: readouts + 1j * waveforms."""
    assert len(answer.images) == 1
    return complex(answer.images[0].data.flat[0])


def errors(answer: Answer) -> list[str]:
    assert all(text.endswith("\n") and text.count("\n") == 1 for text in answer.texts), "one line each"
    return [text for text in answer.texts if text.startswith("ERROR ")]


def still_works(served: Served) -> None:
    answer = served.client().scan("fourier", header=HEADER, messages=[data(3)])
    assert counted(answer) == 3 and not answer.texts
