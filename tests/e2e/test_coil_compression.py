"""Fewer, virtual coils: found while the scan streams, chunk by chunk, with the same bits however the bytes arrive."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from gadgets.service import Service
from tests.e2e.scans import SimulatedScan, ask, complaints, error, imaging_part, in_memory, one_by_one, stack

VIRTUAL = {"coil_compression": "svd", "virtual_coils": 8}


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """Sixteen coils, two slices, undersampled."""
    return in_memory("cine", matrix_x=64, matrix_y=64, coils=16, states=4, slices=2, mask="vista", acceleration=2.0)


@pytest.fixture
def small_chunks(service: Service) -> Iterator[Service]:
    """Readouts are prepared (and compressed) in pieces of some forty, as a scan of real size is in pieces of 8 MiB."""
    before = service.services
    service.services = replace(before, chunk_bytes=1 << 20)
    yield service
    service.services = before


@pytest.mark.parametrize("chain", ["fourier", "cg_sense"])
def test_eight_virtual_coils_show_what_sixteen_show(chain: str, small_chunks: Service, scan: SimulatedScan) -> None:
    full = stack(ask(small_chunks, chain, scan).images, 4)
    answer = ask(small_chunks, chain, scan, **VIRTUAL)
    # plain Fourier says that it does not unfold; nothing else is wrong
    said = [line for line in complaints(answer) if not (chain == "fourier" and "aliased" in line)]
    assert len(answer.images) == 8 and not said
    few = stack(answer.images, 4)
    assert error(few, full, scan.tissue) < 0.05
    assert np.linalg.norm(few) == pytest.approx(np.linalg.norm(full), rel=0.05)


def test_fewer_coils_lose_more(small_chunks: Service, scan: SimulatedScan) -> None:
    full = stack(ask(small_chunks, "cg_sense", scan).images, 4)

    def of(n: int) -> float:
        answer = ask(small_chunks, "cg_sense", scan, coil_compression="svd", virtual_coils=n)
        return error(stack(answer.images, 4), full, scan.tissue)

    assert of(12) < of(8) < of(3)


def test_sixteen_virtual_coils_are_the_coils(small_chunks: Service, scan: SimulatedScan) -> None:
    full = stack(ask(small_chunks, "fourier", scan).images, 4)
    same = stack(ask(small_chunks, "fourier", scan, coil_compression="svd", virtual_coils=16).images, 4)
    np.testing.assert_array_equal(same, full)


def test_the_bits_do_not_depend_on_how_the_stream_arrives(small_chunks: Service, scan: SimulatedScan) -> None:
    pieces = one_by_one(scan.stream.batches)
    at_once = ask(small_chunks, "cg_sense", scan, messages=[b"".join(pieces)], **VIRTUAL)
    dribbling = ask(small_chunks, "cg_sense", scan, messages=pieces, **VIRTUAL)
    torn = ask(small_chunks, "cg_sense", scan, messages=_torn(b"".join(pieces)), **VIRTUAL)
    for other in (dribbling, torn):
        np.testing.assert_array_equal(stack(other.images, 4), stack(at_once.images, 4))
        assert [i.attributes for i in other.images] == [i.attributes for i in at_once.images]


def _torn(stream: bytes) -> Iterator[bytes]:
    rng = np.random.default_rng(3)
    at = 0
    while at < len(stream):
        n = int(rng.integers(1, 70_000))
        yield stream[at : at + n]
        at += n


def test_compression_that_starts_late_or_never_agrees_with_the_early_one(service: Service, scan: SimulatedScan) -> None:
    """One chunk that holds everything; and a header that announces a slice which never comes."""
    full = stack(ask(service, "cg_sense", scan).images, 4)
    one_chunk = stack(ask(service, "cg_sense", scan, **VIRTUAL).images, 4)
    waiting = scan.header.replace(
        "<slice><minimum>0</minimum><maximum>1</maximum>", "<slice><minimum>0</minimum><maximum>2</maximum>"
    )
    assert waiting != scan.header
    never = ask(service, "cg_sense", scan, header=waiting, incomplete="drop", **VIRTUAL)
    assert error(one_chunk, full, scan.tissue) < 0.05
    assert error(stack(never.images, 4), full, scan.tissue) < 0.05


@pytest.mark.parametrize("announced", ["", "<slice><minimum>0</minimum><maximum>0</maximum><center>0</center></slice>"])
def test_slices_that_the_header_does_not_announce_have_virtual_coils_of_their_own(announced: str, service: Service) -> None:
    """Each slice is seen by other coils, as in a long stack: with those of the first one, the others would be all but empty."""
    stacked = in_memory("cine", matrix_x=48, matrix_y=48, coils=12, states=1, slices=2)
    headers, samples = (np.concatenate(parts) for parts in zip(*imaging_part(stacked), strict=True))
    samples[np.arange(12) // 6 != headers["idx"]["slice"][:, None]] *= 0.01
    in_turn = np.argsort(headers["idx"]["slice"], kind="stable")
    messages = one_by_one([(headers[in_turn], samples[in_turn])])
    header, n = re.subn("<slice>.*?</slice>", announced, stacked.header)
    assert n == 1
    before = service.services
    service.services = replace(before, chunk_bytes=1 << 17)
    try:
        full = ask(service, "fourier", stacked, messages=messages, prewhiten=False)
        few = ask(
            service, "fourier", stacked, messages=messages, header=header, prewhiten=False, **VIRTUAL | {"virtual_coils": 6}
        )
    finally:
        service.services = before
    assert not complaints(few)
    np.testing.assert_allclose(stack(few.images, 1), stack(full.images, 1), atol=0.02 * np.max(stack(full.images, 1)))


def test_noise_that_comes_last_does_not_spoil_early_compression(small_chunks: Service, scan: SimulatedScan) -> None:
    noise, *imaging = scan.messages
    first = stack(ask(small_chunks, "cg_sense", scan, **VIRTUAL).images, 4)
    last = ask(small_chunks, "cg_sense", scan, messages=[*imaging, noise], **VIRTUAL)
    assert not complaints(last)
    assert error(stack(last.images, 4), first, scan.tissue) < 0.02


def test_geometric_compression_of_a_slab(service: Service) -> None:
    slab = in_memory("mgre", matrix_x=48, matrix_y=40, partitions=8, coils=16, states=2, mask="poisson", acceleration=2.0)
    full = stack(ask(service, "cg_sense", slab).images, 2)
    geometric = ask(service, "cg_sense", slab, coil_compression="geometric", virtual_coils=6)
    plain = ask(service, "cg_sense", slab, coil_compression="svd", virtual_coils=6)
    assert not complaints(geometric)
    assert error(stack(geometric.images, 2), full, slab.tissue) < 0.06
    # aligned along the readout, so few virtual coils hold more than one matrix for the whole slab can
    assert error(stack(geometric.images, 2), full, slab.tissue) < error(stack(plain.images, 2), full, slab.tissue)
