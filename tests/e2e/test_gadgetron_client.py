"""What runs of the real ``gadgetron_ismrmrd_client`` (see docs/clients.md) taught, as sessions of the strict one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.replay import NOISE_SCRIPT
from gadgets.service import Service
from gadgets.wire import codec
from tests.e2e.scans import SimulatedScan, ask, complaints, in_memory, stack
from tests.strict_client import StrictClient

CAPTURES = Path(__file__).parents[1] / "data" / "wire-captures"


@pytest.fixture(scope="module")
def folded() -> SimulatedScan:
    """Undersampled, and nothing to find coil maps from."""
    return in_memory(
        "cine", matrix_x=48, matrix_y=48, coils=4, states=2, mask="uniform", acceleration=2.0, calibration="none"
    )


def test_a_scan_with_a_noise_query_s_configuration_hears_why_it_has_no_images(
    service: Service, folded: SimulatedScan
) -> None:
    """``-C NoiseSummary.xml`` with a raw file. A real noise query has no header, so words are safe once one has come."""
    client = StrictClient(service.host, service.port)
    answer = client.scan(script=NOISE_SCRIPT.format("1_2_3"), header=folded.header, messages=folded.messages)
    (text,) = answer.texts
    assert text.startswith("ERROR ConfigRefused") and "noise query" in text
    assert not answer.images and not answer.dependencies


@pytest.mark.parametrize("chain", ["cg_sense", "llr"])
def test_no_images_are_announced_that_do_not_come(chain: str, service: Service, folded: SimulatedScan) -> None:
    """The client's exit code stays 0: its words are all that the user has."""
    answer = ask(service, chain, folded)
    assert not answer.images
    assert not [text for text in answer.texts if "its images come from" in text]
    assert [text for text in complaints(answer) if text.startswith("ERROR CalibrationError")]
    assert [text for text in complaints(answer) if text.startswith("WRN") and "cannot stand in for it" in text]


def test_every_text_is_one_whole_line(service: Service, folded: SimulatedScan) -> None:
    """The client prints texts as they are, adds no line end, and stops at the first NUL."""
    headers, samples = folded.stream.batches[1]
    answers = [
        ask(service, "fourier", folded),
        ask(service, "no_such_chain", folded),
        ask(service, "llr", folded),
        ask(service, "fourier", folded, messages=[bytes(codec.acquisitions(headers, samples * float("nan")))]),
        StrictClient(service.host, service.port).scan(script="<configuration>", header=folded.header),
    ]
    texts = [text for answer in answers for text in answer.texts]
    assert len(texts) >= len(answers)
    for text in texts:
        assert text.endswith("\n") and text.count("\n") == 1 and "\0" not in text


def images_of(service: Service, capture: str) -> NDArray[np.float64]:
    """Plain Fourier images of a session that the real client sent; all of them are of one raw file."""
    stream = (CAPTURES / f"client_{capture}.bin").read_bytes()
    assert stream.count(b"cg_sense.xml") == 1
    answer = StrictClient(service.host, service.port).send(stream.replace(b"cg_sense.xml", b"fourier.xml\0"))
    return stack(answer.images, 4)


def test_waveforms_among_the_readouts_change_nothing(service: Service) -> None:
    np.testing.assert_array_equal(images_of(service, "waveforms"), images_of(service, "config_file"))


# -P 12 rounds by half a step of 11 bits of the largest value; -T 0.05 by up to the SD of this scan's noise
@pytest.mark.parametrize(("capture", "tolerance"), [("compressed_precision", 1e-3), ("compressed_tolerance", 0.2)])
def test_its_compressed_readouts_give_the_same_images(capture: str, tolerance: float, service: Service) -> None:
    plain, lossy = images_of(service, "config_file"), images_of(service, capture)
    difference = np.linalg.norm(lossy - plain) / np.linalg.norm(plain)
    assert 0 < difference < tolerance
