"""Headers that are well-formed and make no sense: finite, placed images or one typed error; never a crash, never NaN."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.service import Service, ServiceOptions
from gadgets.wire import codec
from gadgets.wire.dtypes import ACQUISITION_HEADER
from tests.e2e.scans import SimulatedScan, ask, complaints, in_memory, is_noise
from tests.strict_client import Answer


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Computes in this process: an error is not lost in a worker's."""
    folder = tmp_path_factory.mktemp("hostile")
    with Service(
        ServiceOptions(port=0, workers=0, threads=1, spool=folder / "spool", noise=folder / "noise", rehearse=False)
    ) as running:
        yield running


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return in_memory("cine", matrix_x=32, matrix_y=32, coils=4, states=2, slices=2)


@dataclass(frozen=True)
class Change:
    """``value`` in ``field`` of the readouts that are noise, that are not, or of the first that is not."""

    field: str
    value: float
    where: str = "image"

    def __call__(self, headers: NDArray[np.void]) -> NDArray[np.void]:
        headers = headers.copy()
        noise = is_noise(headers)
        rows = np.flatnonzero(noise if self.where == "noise" else ~noise)[: 1 if self.where == "one" else None]
        target, _, name = self.field.rpartition(".")
        (headers[target] if target else headers)[name][rows] = self.value
        return headers


COUNTERS = ("kspace_encode_step_1", "kspace_encode_step_2", "slice", "contrast", "phase", "repetition", "set", "segment")
ABSURD = (0.0, -1.0, math.nan, math.inf, 3e38)
CHANGES = [
    *(Change("sample_time_us", value, where) for value in (*ABSURD, 1e-38) for where in ("noise", "image")),
    *(Change(name, value) for name in ("position", "read_dir", "slice_dir", "user_float") for value in ABSURD),
    *(Change(f"idx.{name}", 65535, where) for name in (*COUNTERS, "average", "user") for where in ("image", "one")),
    Change("channel_mask", 2**64 - 1),
    Change("channel_mask", 2**63, "one"),
    *(Change(name, 65535, where) for name in ("center_sample", "discard_pre", "discard_post") for where in ("image", "one")),
    Change("encoding_space_ref", 9),
    Change("available_channels", 0),
    Change("version", 65535),
    Change("flags", 2**64 - 1 - (3 << 52)),
    Change("scan_counter", 2**32 - 1),
    Change("acquisition_time_stamp", 2**32 - 1),
]


def sane(answer: Answer) -> None:
    """Images without NaN at a place that exists, or words that say why not (a noise measurement that was stored is fine)."""
    for image in answer.images:
        assert np.isfinite(image.data).all()
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position"):
            assert np.isfinite(image.header[name]).all()
        assert (np.isfinite(image.header["field_of_view"]) & (image.header["field_of_view"] > 0)).all()
    wrong = [text for text in answer.texts if text.startswith("ERROR")]
    assert len(wrong) <= 1 and "internal" not in str(answer.texts)
    assert answer.images or wrong or "noise measurement stored" in str(answer.texts)


@pytest.mark.parametrize("chain", ["fourier", "cg_sense"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: f"{c.field}={c.value:g}-{c.where}")
def test_readout_headers(
    here: Service, scan: SimulatedScan, chain: str, change: Change, caplog: pytest.LogCaptureFixture
) -> None:
    pieces = [bytes(codec.acquisitions(change(headers), samples)) for headers, samples in scan.stream.batches]
    with caplog.at_level(logging.ERROR):
        sane(ask(here, chain, scan, messages=pieces))
    assert caplog.records == []


def bare(scan: SimulatedScan, payload: int, **fields: int) -> bytes:
    """One readout whose header says ``fields``, with ``payload`` bytes behind it."""
    headers = next(headers for headers, _ in scan.stream.batches if not is_noise(headers).any())[:1].copy()
    for name, value in fields.items():
        headers[name] = value
    return b"\xf0\x03" + headers.tobytes() + bytes(payload)


@pytest.mark.parametrize(
    ("fields", "payload"),
    [
        ({"number_of_samples": 0}, 0),
        ({"active_channels": 0}, 0),
        ({"number_of_samples": 0, "active_channels": 0}, 0),
        ({"number_of_samples": 65535, "active_channels": 4}, 65535 * 32),
        ({"number_of_samples": 1, "active_channels": 65535}, 65535 * 8),
        ({"trajectory_dimensions": 65535, "number_of_samples": 2, "active_channels": 1}, 2 * (4 * 65535 + 8)),
    ],
)
@pytest.mark.parametrize("place", ["first", "last", "alone"])
def test_readouts_of_odd_sizes(
    here: Service, scan: SimulatedScan, fields: dict[str, int], payload: int, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    odd = bare(scan, payload, **fields)
    pieces = {"first": [odd, *scan.messages], "last": [*scan.messages, odd], "alone": [odd] * 3}[place]
    with caplog.at_level(logging.ERROR):
        sane(ask(here, "fourier", scan, messages=pieces))
    assert caplog.records == []


def test_more_channels_in_the_headers_than_in_the_data(here: Service, scan: SimulatedScan) -> None:
    """The borders of all messages are lost: said, and over, although the client keeps its socket open."""
    raw = bytearray(b"".join(scan.messages))
    at = 2 + ACQUISITION_HEADER.fields["active_channels"][1]
    raw[at : at + 2] = b"\x08\x00"
    answer = ask(here, "fourier", scan, messages=[bytes(raw)])
    assert not answer.images and complaints(answer)[0].startswith("ERROR")


def rewritten(header: str, path: str, value: str) -> str:
    """The header with ``value`` at a path of element names."""
    opening = "".join(f"<{name}>.*?" for name in path.split("/")).removesuffix(".*?")
    text, n = re.subn(rf"({opening})[^<]*", rf"\g<1>{value}", header, count=1, flags=re.DOTALL)
    assert n == 1
    return text


SIZES = ("0", "-1", "65535", "65536", "1e9", "NaN", "inf", "", "eight", "9" * 5000)
LENGTHS = ("0", "-1", "NaN", "inf", "1e300", "1e-300", "")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((f"{space}/matrixSize/{axis}", v) for space in ("encodedSpace", "reconSpace") for axis in "xyz" for v in SIZES),
        *(
            (f"{space}/fieldOfView_mm/{axis}", v)
            for space in ("encodedSpace", "reconSpace")
            for axis in "xyz"
            for v in LENGTHS
        ),
        *((f"encodingLimits/kspace_encoding_step_1/{part}", v) for part in ("minimum", "maximum", "center") for v in SIZES),
        *((f"encodingLimits/slice/{part}", v) for part in ("minimum", "maximum") for v in ("0", "65535")),
        ("systemFieldStrength_T", "1e300"),
        ("TE", "1</TE><TE>2</TE><TE>3</TE><TE>4</TE><TE>5"),
        ("TE", "NaN"),
        ("trajectory", "spiral"),
    ],
)
def test_mrd_headers(here: Service, scan: SimulatedScan, path: str, value: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        sane(ask(here, "fourier", scan, header=rewritten(scan.header, path, value)))
    assert caplog.records == []
