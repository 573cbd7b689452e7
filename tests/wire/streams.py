"""Small well-formed streams with everything that a client may send."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gadgets.wire import codec, events
from gadgets.wire.dtypes import ACQUISITION_HEADER, IMAGE_HEADER, WAVEFORM_HEADER
from gadgets.wire.framing import FrameParser
from tests.wire.compressed import compressed_acquisitions

HEADER = (
    "<ismrmrdHeader><encoding><encodedSpace><matrixSize><x>8</x><y>4</y><z>1</z></matrixSize><fieldOfView_mm><x>16</x>"
    "<y>8</y><z>3</z></fieldOfView_mm></encodedSpace><reconSpace><matrixSize><x>4</x><y>4</y><z>1</z></matrixSize>"
    "<fieldOfView_mm><x>8</x><y>8</y><z>3</z></fieldOfView_mm></reconSpace><trajectory>cartesian</trajectory></encoding>"
    "</ismrmrdHeader>"
)


def readouts(
    n: int, channels: int, samples: int, *, seed: int = 0, dims: int = 0
) -> tuple[NDArray[np.void], NDArray[np.complex64], NDArray[np.float32] | None]:
    rng = np.random.default_rng(seed)
    headers = np.zeros(n, ACQUISITION_HEADER)
    headers["version"] = 1
    headers["scan_counter"] = np.arange(n)
    headers["idx"]["kspace_encode_step_1"] = np.arange(n)
    values = rng.standard_normal((n, channels, samples, 2)).astype(np.float32).view(np.complex64)[..., 0]
    return headers, values, rng.standard_normal((n, samples, dims)).astype(np.float32) if dims else None


def waveform(scan_counter: int = 0, channels: int = 2, samples: int = 5) -> tuple[NDArray[np.void], NDArray[np.uint32]]:
    header = np.zeros((), WAVEFORM_HEADER)
    header["scan_counter"], header["sample_time_us"] = scan_counter, 2500.0
    return header, np.arange(channels * samples, dtype=np.uint32).reshape(channels, samples)


def image(shape: tuple[int, int, int, int] = (1, 1, 3, 4), dtype: str = "<f4") -> bytes:
    header = np.zeros((), IMAGE_HEADER)
    header["image_index"] = 1
    return codec.image(header, "<ismrmrdMeta/>", np.arange(np.prod(shape)).reshape(shape).astype(dtype))


def session(nul: bool = False) -> bytes:
    """Query, configuration, header, FIRE parameters, noise and imaging readouts of several shapes, waveforms, close."""
    noise, imaging, navigator, spiral = (
        readouts(1, 2, 16),
        readouts(9, 2, 8, seed=1),
        readouts(1, 2, 3, seed=2),
        readouts(3, 1, 5, seed=3, dims=2),
    )
    return b"".join(
        [
            codec.query("gadgetron::info", 7),
            codec.config_file("cg_sense.xml") if not nul else codec.config_script("cg_sense", nul=True),
            codec.header(HEADER, nul=nul),
            codec.text('{"version": "1.1.0", "parameters": {"config": "fourier"}}'),
            codec.acquisitions(*noise),
            codec.acquisitions(*imaging),
            codec.waveform(*waveform()),
            codec.acquisitions(*navigator),
            compressed_acquisitions(*readouts(2, 2, 8, seed=4), bits=12),
            codec.acquisitions(*spiral),
            image(),
            codec.acquisitions(*readouts(2, 0, 0)),
            codec.close(),
        ]
    )


def flatten(found: list[events.Event]) -> list[tuple[object, ...]]:
    """Events as comparable tuples, readouts one by one: how they were batched does not matter."""
    flat: list[tuple[object, ...]] = []
    for event in found:
        if isinstance(event, events.Readouts):
            rows = zip(event.headers, event.offsets.tolist(), event.payload_bytes.tolist(), strict=True)
            flat += [("readout", header.tobytes(), offset, size) for header, offset, size in rows]
        elif isinstance(event, events.Waveform | events.Image):
            flat.append((type(event).__name__, event.offset, event.header.tobytes(), event.data.tobytes(), event.data.shape))
        elif isinstance(event, events.Problem):
            flat.append(("problem", event.offset, type(event.error), str(event.error)))
        elif isinstance(event, events.Composite):
            flat.append(("composite", event.offset, event.id))
        else:
            flat.append((event,))
    return flat


def parse(data: bytes, cuts: list[int], role: str = "server") -> tuple[list[events.Event], FrameParser]:
    """Feed a stream cut at the given positions, each chunk from a buffer that is overwritten afterwards."""
    parser = FrameParser(role=role)  # type: ignore[arg-type]
    found: list[events.Event] = []
    for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True):
        buffer = bytearray(data[a:b])
        found += parser.feed(memoryview(buffer))
        buffer[:] = b"\xaa" * len(buffer)
    return found, parser
