"""One pipeline behind every front: the same scan gives the same bits through clients, nodes, streams, files, and a capture."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.image_attributes import is_preview
from gadgets.listener import Access
from gadgets.raw_source import open_source
from gadgets.replay import replay
from gadgets.service import Service, ServiceOptions
from gadgets.stream import chain_script, run_stream
from gadgets.tls import ClientTls, ServerTls
from gadgets.wire import codec
from gadgets.wire.events import Image
from gadgets.wire.framing import FrameParser
from tests.e2e.scans import SimulatedScan, ask, one_by_one, simulated, stack
from tests.gadgetron_stand_in import connected, recorded, session
from tests.gadgets.certificates import authority
from tests.strict_client import StrictClient
from tests.waiting import PATIENCE
from tests.wire.conftest import CAPTURES

RECON = Path(sys.executable).with_name("recon")
CHAINS = ("fourier", "llr")


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    return simulated(
        "cine", tmp_path_factory.mktemp("scan") / "scan.h5", matrix_x=64, matrix_y=64, coils=5, states=4, slices=3,
        mask="vista", acceleration=2.0,
    )  # fmt: skip


def pixels(path: Path) -> dict[str, NDArray[np.floating]]:
    """Every image of the one group of an image file, by series."""
    with h5py.File(path) as file:
        (group,) = file
        return {name: file[group][name]["data"][:] for name in file[group]}


def assert_same(one: Path, other: Path) -> None:
    a, b = pixels(one), pixels(other)
    assert a.keys() == b.keys() and a
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def served(service: Service, scan: SimulatedScan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Images of each chain by the running server."""
    folder = tmp_path_factory.mktemp("served")
    for chain in CHAINS:
        replay(scan.path, port=service.port, config=chain, out=folder / f"{chain}.h5")
    return {chain: folder / f"{chain}.h5" for chain in CHAINS}


@pytest.mark.parametrize("chain", CHAINS)
def test_twice_the_same(chain: str, service: Service, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path) -> None:
    replay(scan.path, port=service.port, config=chain, out=tmp_path / "again.h5")
    assert_same(served[chain], tmp_path / "again.h5")


@pytest.mark.parametrize(("chain", "workers"), [("fourier", "0"), ("llr", "0"), ("llr", "2")])
def test_without_a_server(chain: str, workers: str, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "run.h5"
    # as many threads as the server of these tests has: sums depend on their number in the last bits
    command = [RECON, "run", scan.path, "--config", chain, "--out", out, "--threads", "1", "--workers", workers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same(served[chain], out)


def test_the_capture_is_what_was_sent(service: Service, scan: SimulatedScan, tmp_path: Path) -> None:
    replay(scan.path, port=service.port, config="fourier", out=tmp_path / "out.h5")
    sent = b"".join(bytes(piece.data) for piece in open_source(scan.path, config="fourier").pieces())
    assert wait_for_capture(service, len(sent)).read_bytes() == sent


def wait_for_capture(service: Service, size: int) -> Path:
    """The newest finished capture, once no connection is at work any more."""
    for thread in threading.enumerate():
        if re.fullmatch(r"c\d+", thread.name):  # one for each connection
            thread.join(PATIENCE)
    path: Path = service.spool.captures()[-1]
    assert path.stat().st_size == size
    return path


@pytest.mark.parametrize("chain", CHAINS)
def test_a_capture_repeats_the_scan(
    chain: str, service: Service, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path
) -> None:
    first = replay(scan.path, port=service.port, config=chain, out=tmp_path / "first.h5")
    capture = wait_for_capture(service, first.bytes_sent)
    again = replay(capture, port=service.port, out=tmp_path / "again.h5")
    assert again.bytes_sent == first.bytes_sent and again.n_images == first.n_images
    assert_same(served[chain], tmp_path / "again.h5")


def test_a_capture_through_another_chain(
    service: Service, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path
) -> None:
    first = replay(scan.path, port=service.port, config="fourier", out=tmp_path / "first.h5")
    capture = wait_for_capture(service, first.bytes_sent)
    replay(capture, port=service.port, config="llr", out=tmp_path / "llr.h5")
    assert_same(served["llr"], tmp_path / "llr.h5")


def test_a_capture_by_the_command_line(
    service: Service, scan: SimulatedScan, served: dict[str, Path], tmp_path: Path
) -> None:
    first = replay(scan.path, port=service.port, config="fourier", out=tmp_path / "first.h5")
    capture = wait_for_capture(service, first.bytes_sent)
    command = [RECON, "replay", capture, "--port", str(service.port), "--out", tmp_path / "again.h5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert_same(served["fourier"], tmp_path / "again.h5")


def test_in_pieces_of_one_readout(service: Service, scan: SimulatedScan) -> None:
    whole = ask(service, "llr", scan)
    pieces = ask(service, "llr", scan, messages=one_by_one(scan.stream.batches))
    np.testing.assert_array_equal(stack(pieces.images, 4), stack(whole.images, 4))
    assert [i.attributes for i in pieces.images] == [i.attributes for i in whole.images]


# -- every front, from the same recorded scan ------------------------------------------------------------------------------------

SETTINGS = {"prewhiten": "False"}  # behind Gadgetron's trigger there is no noise to whiten with
QUIET = ServiceOptions(port=0, workers=0, threads=1, spool=None, previews=False, rehearse=False)
Front = Callable[[Service, str, Path], list[Image]]


@dataclass(frozen=True)
class Recorded:
    """A session that the real client sent: header, and everything between it and CLOSE."""

    header: str
    messages: bytes

    @property
    def stream(self) -> bytes:
        return codec.header(self.header) + self.messages + codec.close()


def recorded_scan() -> Recorded:
    raw = (CAPTURES / "client_config_file.bin").read_bytes()
    (length,) = struct.unpack_from("<I", raw, 1028)
    return Recorded(raw[1032 : 1032 + length].decode(), raw[1032 + length : -len(codec.close())])


def gadgetron_client(service: Service, chain: str, folder: Path) -> list[Image]:
    scan, script = recorded_scan(), chain_script(chain, SETTINGS)
    return StrictClient(service.host, service.port).scan(script=script, header=scan.header, messages=[scan.messages]).images


def fire_client(service: Service, chain: str, folder: Path, **parameters: object) -> list[Image]:
    scan, client = recorded_scan(), StrictClient(service.host, service.port, dialect="fire")
    named = "openrecon" if parameters else chain
    return client.scan(named, header=scan.header, messages=[scan.messages], parameters={**SETTINGS, **parameters}).images


def console(service: Service, chain: str, folder: Path) -> list[Image]:
    """OpenRecon: the chain is one of the parameters."""
    return fire_client(service, chain, folder, config=chain)


def node(kind: str) -> Front:
    def front(service: Service, chain: str, folder: Path) -> list[Image]:
        properties = "".join(f'<property name="{k}" value="{v}"/>' for k, v in {"chain": chain, **SETTINGS}.items())
        received = session(connected(service.port), recorded(kind, f"<configuration>{properties}</configuration>"))
        assert not received.errors
        return received.images

    return front


def stream(service: Service, chain: str, folder: Path) -> list[Image]:
    """`recon run -`, without a server."""
    out = io.BytesIO()
    run_stream(io.BytesIO(recorded_scan().stream), out, config=chain, settings=SETTINGS, options=QUIET)
    return [event for event in FrameParser(role="node").feed(out.getvalue()) if isinstance(event, Image)]


def file(service: Service, chain: str, folder: Path) -> list[Image]:
    """`recon replay` of a capture."""
    capture, images = folder / "capture.mrd", list[Image]()
    capture.write_bytes(codec.config_file("other") + recorded_scan().stream)
    replay(capture, host=service.host, port=service.port, config=chain, parameters=SETTINGS, on_image=images.append)
    return images


def tls(service: Service, chain: str, folder: Path) -> list[Image]:
    """`recon replay` through a TLS port."""
    ours, images = authority(folder / "authority"), list[Image]()
    capture = folder / "capture.mrd"
    capture.write_bytes(codec.config_file("other") + recorded_scan().stream)
    options = replace(QUIET, access=Access(tls=ServerTls(*ours.issue("server"))))
    with Service(options) as secure:
        replay(
            capture,
            port=secure.port,
            config=chain,
            parameters=SETTINGS,
            on_image=images.append,
            tls=ClientTls(ours.certificate),
        )
    return images


FRONTS: dict[str, Front] = {
    "gadgetron-client": gadgetron_client,
    "fire-client": fire_client,
    "console": console,
    "node-readouts": node("acquisitions"),
    "node-bucket": node("bucket"),
    "node-recondata": node("recondata"),
    "stream": stream,
    "file": file,
    "tls": tls,
}


def wire_bytes(images: list[Image]) -> list[bytes]:
    """The final images as they were on the wire: header, attributes, pixels."""
    return [codec.image(i.header, i.attributes, i.data) for i in images if not is_preview(i.attributes)]


@pytest.mark.parametrize("chain", ["fourier", "cg_sense", "llr"])
def test_all_fronts_give_the_same_bits(chain: str, service: Service, tmp_path: Path) -> None:
    found = {}
    for name, front in FRONTS.items():
        folder = tmp_path / name
        folder.mkdir()
        found[name] = wire_bytes(front(service, chain, folder))
    reference = found["gadgetron-client"]
    assert reference and len(reference[0]) > 1000
    assert {name: images == reference for name, images in found.items()} == dict.fromkeys(FRONTS, True)
