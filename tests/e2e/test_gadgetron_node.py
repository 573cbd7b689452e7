"""Our chains inside Gadgetron: the recorded bytes of a real one, and the pip package that it starts, give the images of every front."""

from __future__ import annotations

import socket
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from gadgets.capture import read_capture
from gadgets.relay import SERVER
from gadgets.service import Service
from gadgets.wire import codec
from gadgets.wire.dtypes import Flag
from gadgets.wire.events import Image
from tests.e2e.scans import SimulatedScan, ask, encoded, imaging_part, in_memory
from tests.gadgetron_stand_in import GadgetronCrashed, Received, connected, executed, message, recorded, session
from tests.strict_client import StrictClient
from tests.waiting import PATIENCE, until
from tests.wire.conftest import CAPTURES

CHAINS = ("fourier", "cg_sense", "llr")


def configuration(**properties: object) -> str:
    inside = "".join(f'<property name="{name}" value="{value}"/>' for name, value in properties.items())
    return f'<?xml version="1.0"?>\n<configuration>{inside}</configuration>\n'


def assert_same(one: list[Image], other: list[Image]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
        assert a.header == b.header and a.attributes == b.attributes


def by_client(service: Service, chain: str, **settings: object) -> list[Image]:
    """Images of the recorded scan by the scanner's front, from the session that the real client sent."""
    raw = (CAPTURES / "client_config_file.bin").read_bytes()
    length = struct.unpack_from("<I", raw, 1028)[0]
    client = StrictClient(service.host, service.port, dialect="fire", nul=False)
    header = raw[1032 : 1032 + length].decode()
    scan = raw[1032 + length : -len(codec.close())]
    return client.scan(chain, header=header, messages=[scan], parameters=dict(settings)).images


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", ["acquisitions", "bucket", "recondata"])
def test_what_a_real_gadgetron_sent_gives_the_images_of_the_scanner_s_front(service: Service, chain: str, name: str) -> None:
    """Without whitening: behind Gadgetron's trigger there is no noise to whiten with."""
    received = session(connected(service.port), recorded(name, configuration(chain=chain, prewhiten=False)))
    assert not received.errors
    assert_same(received.images, by_client(service, chain, prewhiten=False))


def test_readouts_are_whitened_as_by_the_scanner_s_front(service: Service) -> None:
    received = session(connected(service.port), recorded("acquisitions", configuration(chain="llr")))
    assert_same(received.images, by_client(service, "llr"))


def test_settings_of_the_chain_file_reach_the_method(service: Service) -> None:
    received = session(connected(service.port), recorded("bucket", configuration(chain="cg_sense", pixel_type="uint16")))
    assert {image.data.dtype.name for image in received.images} == {"uint16"}
    (error,) = session(connected(service.port), recorded("bucket", configuration(chain="cg_sense", device="cuda:0"))).errors
    assert error.startswith("SettingError") and "device" in error


# -- Gadgetron's own front end ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=2, slices=1)


def without_oversampling(samples: np.ndarray) -> np.ndarray:
    """What RemoveROOversampling does to ``(n, coil, sample)``."""
    image = np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(samples, axes=-1), norm="ortho"), axes=-1)
    n = samples.shape[-1]
    image = image[..., n // 4 : n // 4 + n // 2]
    kspace = np.fft.fftshift(np.fft.fft(np.fft.ifftshift(image, axes=-1), norm="ortho"), axes=-1)
    return np.asarray(kspace, np.complex64)


def test_readouts_without_oversampling_under_the_old_header(service: Service, scan: SimulatedScan) -> None:
    expected = ask(service, "fourier", scan, prewhiten=False).images
    shortened = []
    for headers, samples in imaging_part(scan):
        changed = headers.copy()
        changed["center_sample"] //= 2
        shortened.append((changed, without_oversampling(samples)))
    start = message(2, configuration(chain="fourier", prewhiten=False)) + message(3, scan.header)
    received = session(connected(service.port), start + b"".join(encoded(shortened)) + codec.close())
    assert not received.errors and len(received.images) == len(expected)
    for ours, theirs in zip(received.images, expected, strict=True):
        assert ours.data.shape == theirs.data.shape
        assert ours.header["field_of_view"].tolist() == theirs.header["field_of_view"].tolist()
        assert np.linalg.norm(ours.data - theirs.data) < 1e-5 * np.linalg.norm(theirs.data)


# -- failures --------------------------------------------------------------------------------------------------------------------------


def test_a_failing_scan_is_an_error_with_its_reason(service: Service, scan: SimulatedScan) -> None:
    headers, samples = imaging_part(scan)[0]
    bad = headers.copy()
    bad["flags"] &= ~np.uint64(Flag.ACQ_LAST_IN_MEASUREMENT.bit)
    start = message(2, configuration(chain="fourier")) + message(3, scan.header)
    broken = bytes(codec.acquisitions(bad, samples * np.float32("nan")))
    (error,) = session(connected(service.port), start + broken + codec.close()).errors
    assert error.startswith("DataError") and "not finite" in error


# -- the pip package as the process that Gadgetron starts ---------------------------------------------------------------------------


def test_executed_with_a_warm_server(service: Service) -> None:
    with executed("llr", environment={SERVER: f"127.0.0.1:{service.port}"}) as (node, process):
        received = session(node, recorded("recondata", configuration(prewhiten=False)))
        assert process.wait(PATIENCE) == 0
    assert_same(received.images, by_client(service, "llr", prewhiten=False))


def test_executed_without_a_server(service: Service, tmp_path: Path) -> None:
    environment = {SERVER: "none", "XDG_STATE_HOME": str(tmp_path)}
    with executed("fourier", environment=environment) as (node, process):
        received = session(node, recorded("acquisitions", configuration(prewhiten=False)), timeout=120.0)
        assert process.wait(PATIENCE) == 0
    assert_same(received.images, by_client(service, "fourier", prewhiten=False))
    assert len(list(tmp_path.rglob("*.mrd"))) == 1


def test_executed_with_an_unknown_chain(service: Service) -> None:
    with executed("t1_map", environment={SERVER: f"127.0.0.1:{service.port}"}) as (node, _):
        (error,) = session(node, recorded("acquisitions", configuration())).errors
    assert error.startswith("UnknownChain") and "cg_sense" in error


def test_executed_and_killed(service: Service) -> None:
    """Gadgetron itself does not survive that; the server does, and has what came."""
    known = captures(service)
    stream = recorded("acquisitions", configuration(prewhiten=False))
    with executed("llr", environment={SERVER: f"127.0.0.1:{service.port}"}) as (node, process):
        node.sendall(stream[: len(stream) // 2])
        # with a header at least
        until(
            lambda: [path for path in captures(service) - known if path.stat().st_size > 5000], "nothing reached the server"
        )
        process.kill()
        process.wait()
        with pytest.raises(GadgetronCrashed):
            session(node, stream[len(stream) // 2 :])
    left = until(lambda: set(service.spool.captures()) - known, "the capture is not ended")
    assert {read_capture(path).status for path in left} == {"truncated"}
    received = session(connected(service.port), recorded("acquisitions", configuration(chain="llr", prewhiten=False)))
    assert_same(received.images, by_client(service, "llr", prewhiten=False))


def captures(service: Service) -> set[Path]:
    """Also those that grow."""
    root = service.spool.root
    assert root is not None
    return set(root.glob("*.mrd"))


def test_executed_and_the_server_dies_in_the_middle_of_an_image() -> None:
    image = codec.image(np.zeros((), codec.IMAGE_HEADER), "", np.ones((1, 1, 8, 8), np.float32))

    def dying(listener: socket.socket) -> None:
        peer, _ = listener.accept()
        with peer:
            peer.recv(100)
            peer.sendall(codec.response(1, "recon-gadgets 0") + image + image[:-1])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=dying, args=(listener,), daemon=True).start()
        with executed("llr", environment={SERVER: f"127.0.0.1:{listener.getsockname()[1]}"}) as (node, process):
            received: Received = session(node, recorded("acquisitions", configuration()))
            assert process.wait(PATIENCE) == 0
    assert len(received.images) == 1 and len(received.errors) == 1
