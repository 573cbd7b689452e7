"""Gadgetron's side of an external node, as unforgiving as the real 4.7.2 (what it does was measured; see docs).

It shares no framing code with the product. One thread sends, another reads; where the real one crashes, hangs or loses images,
``session`` raises ``GadgetronCrashed``.
"""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gadgets.wire.events import Image
from tests.strict_client import _Abort, _image, _text, _unsigned
from tests.waiting import PATIENCE
from tests.wire.conftest import CAPTURES

CONFIG = '<?xml version="1.0"?>\n<configuration><property name="chain" value="fourier"/></configuration>\n'
CLOSE, ERROR, IMAGE = 4, 8, 1022
ACCEPTED = {CLOSE, ERROR, 1008, IMAGE, 1023, 1024, 1026, 1050}
IMAGE_READER = {1, 5, 7}  # of what a node may send; int16 (2) is "map::at"


class GadgetronCrashed(Exception):
    """The real Gadgetron (or its client) would have died, or lost images; ``received`` is what had come."""

    def __init__(self, reason: str, received: Received) -> None:
        super().__init__(reason)
        self.reason, self.received = reason, received


@dataclass
class Received:
    """What the node sent."""

    images: list[Image] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def message(number: int, text: str) -> bytes:
    """CONFIG (2) or HEADER (3)."""
    raw = text.encode()
    return struct.pack("<HI", number, len(raw)) + raw


def recorded(name: str, config: str = CONFIG) -> bytes:
    """What the real Gadgetron sent, with another node configuration."""
    raw = (CAPTURES / f"gadgetron_node_{name}.bin").read_bytes()
    return message(2, config) + raw[6 + struct.unpack_from("<I", raw, 2)[0] :]


def session(
    node: socket.socket, stream: bytes, *, timeout: float = PATIENCE, after_error: Callable[[], bytes] | None = None
) -> Received:
    """Send ``stream`` (CONFIG, HEADER, messages, CLOSE) and read until the node's CLOSE and end.

    Parameters
    ----------
    node
        Connected.
    stream
        All that is sent.
    timeout
        s without a byte, or without progress in sending, that count as a hang (the real one waits for ever).
    after_error
        Bytes to send once the node has said ERROR: a node that left at once would lose the session.

    Raises
    ------
    GadgetronCrashed
    """
    received, failures = Received(), []
    node.settimeout(timeout)
    said_error = threading.Event()

    def send() -> None:
        try:
            node.sendall(stream)
            if after_error is not None:
                said_error.wait(timeout)
                node.sendall(after_error())
        except OSError as error:
            failures.append(f"general protection fault: the node stopped reading ({type(error).__name__})")

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        while True:
            number = _unsigned(node, 2, "a message id")
            if number not in ACCEPTED:
                raise _Abort(f"Received illegal message id from external peer: {number}")
            if number == CLOSE:
                break
            if number == ERROR:
                received.errors.append(_text(node, 8))
                said_error.set()
            elif number == IMAGE:
                image = _image(node)
                if int(image.header["data_type"]) not in IMAGE_READER:
                    raise _Abort("map::at")
                received.images.append(image)
            else:
                raise _Abort(f"message {number} goes to the next gadget: these tests have none")
        said_error.set()
        sender.join(timeout)
        if not failures and node.recv(1):
            raise _Abort("bytes after the node's CLOSE")
    except _Abort as error:
        failures.append(str(error).replace("the server closed without CLOSE", "illegal message id from external peer: 0"))
    except TimeoutError:
        failures.append(f"nothing came for {timeout} s: Gadgetron hangs")
    except OSError as error:
        failures.append(f"End of file ({type(error).__name__})")
    finally:
        node.close()
    if failures:
        raise GadgetronCrashed("; ".join(failures), received)
    return received


@contextmanager
def executed(
    target: str, *, module: str = "gadgets", folder: Path | None = None, environment: dict[str, str] | None = None
) -> Iterator[tuple[socket.socket, subprocess.Popen[bytes]]]:
    """What Gadgetron does for ``<execute>``: listen, start ``python -m gadgetron``, and take its connection.

    ``folder`` is what Gadgetron puts on the Python path (``$GADGETRON_HOME/share/gadgetron/python``).
    """
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
        env = {**os.environ, **(environment or {})}
        if folder is not None:
            env["PYTHONPATH"] = os.pathsep.join([env.get("PYTHONPATH", ""), str(folder)]).strip(os.pathsep)
        command = [sys.executable, "-m", "gadgetron", str(port), module, target]
        process = subprocess.Popen(command, env=env, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            listener.settimeout(PATIENCE)
            node, _ = listener.accept()
            yield node, process
        finally:
            process.kill()
            process.communicate()


def connected(port: int) -> socket.socket:
    """What Gadgetron does for ``<connect>``."""
    return socket.create_connection(("localhost", port), timeout=PATIENCE)
