"""Hostile streams against the parser and the session: only typed errors, bounded memory."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from gadgets.errors import WireError
from gadgets.wire import events
from gadgets.wire.framing import FrameParser
from gadgets.wire.session import Session
from tests.wire import streams
from tests.wire.conftest import CAPTURES
from tests.wire.hostile import KINDS, boundaries, hostile, hostile_streams

GOODS = [streams.session(), streams.session(nul=True), (CAPTURES / "client_query.bin").read_bytes()]
NODE = {n: (CAPTURES / n).read_bytes() for n in ("gadgetron_node_bucket.bin", "gadgetron_node_recondata.bin")}
ROLES = ("server", "client", "node")


def run(data: bytes, cuts: list[int], role: str) -> str:
    parser, session = FrameParser(role=role), Session()  # type: ignore[arg-type]
    outcome = "clean"
    for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True):
        for event in parser.feed(data[a:b]):
            assert 0 <= event.offset < len(data)
            if isinstance(event, events.Readouts):
                ends = event.offsets + 342 + event.payload_bytes
                assert (ends <= b).all()
            try:
                session.accept(event)
            except WireError as error:
                assert str(error)
                outcome = type(error).__name__
    try:
        parser.finish()
    except WireError as error:
        outcome = type(error).__name__
    return outcome


@given(st.integers(0, 2**32), st.sampled_from(range(len(GOODS))), st.sampled_from(ROLES), st.integers(1, 5000))
@settings(max_examples=250, deadline=None)
def test_only_typed_errors(seed: int, which: int, role: str, chunk: int) -> None:
    bad = hostile(GOODS[which], seed)
    run(bad.data, list(range(chunk, len(bad.data), max(chunk, len(bad.data) // 50))), role)


@given(st.binary(max_size=600), st.sampled_from(ROLES))
@settings(max_examples=150, deadline=None)
def test_arbitrary_bytes(data: bytes, role: str) -> None:
    run(data, [], role)


def test_memory_stays_bounded() -> None:
    tracemalloc.start()
    for bad in hostile_streams(GOODS, range(200)):
        run(bad.data, [], "server")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20


def test_streams_are_deterministic_and_of_every_kind() -> None:
    first = list(hostile_streams(GOODS, range(300)))
    assert first == list(hostile_streams(GOODS, range(300)))
    assert {h.kind for h in first} == set(KINDS)
    assert boundaries(GOODS[0])[-1] == len(GOODS[0])
    outcomes = {run(h.data, [], "server") for h in first}
    assert {"UnknownMessage", "Oversized", "Disconnected", "IllegalOrder", "MalformedText"} <= outcomes


@given(
    st.sampled_from(["gadgetron_node_bucket.bin", "gadgetron_node_recondata.bin"]),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), min_size=1, max_size=6),
    st.integers(0, 300_000),
)
@settings(max_examples=80, deadline=None)
def test_mutated_composites(name: str, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(NODE[name])
    start = FrameParser(role="node").feed(data)[2].offset
    for at, value in changes:
        data[start + at] = value
    run(bytes(data[: start + cut]), [start + cut // 2] if cut // 2 < len(data) - start else [], "node")
