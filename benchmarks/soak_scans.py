"""What the soak's clients send: scans of several kinds, whole or broken off."""

from __future__ import annotations

import hashlib
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

from gadgets.image_attributes import is_preview
from gadgets.wire import codec
from tests.e2e.scans import SimulatedScan, in_memory
from tests.strict_client import Answer, ClientAborted, StrictClient


@dataclass
class Kind:
    """One kind of scan: its chain, header and readouts, and the digest of the images that it has to give."""

    name: str
    chain: str
    header: str
    data: bytes
    parameters: dict[str, object] | None = None
    digest: str = ""


@dataclass
class Outcome:
    """``digest`` is empty when there were no images; ``seconds`` from the last byte sent to the end."""

    digest: str = ""
    seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def complaints(self) -> list[str]:
        return [text.strip()[:200] for text in self.texts if text.startswith(("ERR", "WRN"))][:5]


def make_kinds() -> list[Kind]:
    """2D, cine with three methods, T1 maps, one with a console's parameters: small, because the number counts."""
    flat = in_memory("cine", matrix_x=64, matrix_y=64, coils=4, states=1, slices=2)
    cine = in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=4, slices=1, mask="vista", acceleration=2.0)
    molli = in_memory(
        "molli", matrix_x=40, matrix_y=40, coils=4, slices=1, mask="golden", acceleration=2.0, acs=10, snr=40.0
    )
    wanted: list[tuple[str, str, SimulatedScan, dict[str, object] | None]] = [
        ("2d", "fourier", flat, None),
        ("2d-console", "fourier", flat, {"config": "fourier", "pixel_type": "uint16"}),
        ("cine-sense", "cg_sense", cine, None),
        ("cine-llr", "llr", cine, None),
        ("cine-grasp", "grasp_pro", cine, None),
        ("t1", "llr_t1", molli, None),
    ]
    return [Kind(name, chain, scan.header, b"".join(scan.messages), parameters) for name, chain, scan, parameters in wanted]


def scan(port: int, kind: Kind, limit: float, *, pieces: int = 1, pause: float = 0.0) -> Outcome:
    """One whole scan by the strict client; an answer that the real client could not bear is a problem."""
    client = StrictClient("127.0.0.1", port, dialect="fire" if kind.parameters else "gadgetron", timeout=limit)
    sent = [0.0]

    def messages() -> Iterator[bytes]:
        step = -(-len(kind.data) // pieces)
        for start in range(0, len(kind.data), step):
            yield kind.data[start : start + step]
            time.sleep(pause)  # a scanner sends as it measures
        sent[0] = time.monotonic()

    outcome = Outcome()
    answer = Answer()
    try:
        answer = client.scan(kind.chain, header=kind.header, messages=messages(), parameters=kind.parameters)
    except ClientAborted as error:
        outcome.problem, answer = error.reason, error.answer
    except OSError as error:
        outcome.problem = f"no connection ({type(error).__name__})"
    outcome.seconds = time.monotonic() - sent[0] if sent[0] else 0.0
    outcome.texts = answer.texts
    images = [image for image in answer.images if not is_preview(image.attributes)]
    if images and not outcome.problem:
        digest = hashlib.sha256()
        for image in sorted(images, key=lambda i: (int(i.header["image_series_index"]), int(i.header["image_index"]))):
            digest.update(image.data.tobytes())
        outcome.digest = f"{len(images)} images {digest.hexdigest()[:16]}"
    return outcome


def leave(port: int, kind: Kind, marker: str, *, part: float, reset: bool) -> None:
    """Send ``part`` of a scan (1: all of it, with CLOSE) and go. ``marker`` stands in its header, to find the capture by."""
    header = kind.header.replace("<encoding>", f"<userParameters/><!-- {marker} --><encoding>", 1)
    stream = codec.config_file(kind.chain) + codec.header(header)
    body = kind.data + codec.close() if part >= 1 else kind.data[: int(len(kind.data) * part)]
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(stream + body)
        if part < 1:
            # what is on the way when a connection is reset is lost by the network, not by the server
            _settle(connection)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _settle(connection: socket.socket) -> None:
    """Until the server has taken some of it: an answer comes, or a moment has passed."""
    connection.settimeout(0.5)
    try:
        connection.recv(1)
    except OSError:
        return
